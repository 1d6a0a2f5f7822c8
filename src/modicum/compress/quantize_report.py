"""What a quantization was asked to do, and what it did."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, not_among, too_low
from modicum.quant.spec import AffineSpec

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: algorithms whose layers bitsandbytes stores in formats of its own
FOREIGN = ("nf4", "int8")
ALGORITHMS = ("rtn", "mse", "gptq", *FOREIGN)
CLIPS = ("minmax", "mse")


@dataclass(frozen=True)
class QuantizeOptions:
    """How to quantize the linear layers of a model. `faults()` says what is wrong, all of it."""

    bits: int = 4
    #: inputs of a row that share a scale
    group_size: int = 128
    #: (q, p): blocks of q outputs and p inputs that share a scale, in place of `group_size`
    block: tuple[int, int] | None = None
    #: "float", "integer" or "none" (symmetric)
    zero_point: str = "float"
    #: "rtn" covers the range, "mse" clips it for the least squared error, "gptq" makes up for errors; "nf4" and
    #: "int8" are the formats of bitsandbytes
    algorithm: str = "gptq"
    #: gptq: how grids are fitted, "minmax" or "mse"
    clip: str = "minmax"
    #: gptq: columns with large inputs first
    act_order: bool = False
    #: gptq: part of the Hessian's mean diagonal that is added to it
    damping: float = 0.01
    #: nf4: quantize the scales too (QLoRA's double quantization), 0.37 bits less per weight
    double_quant: bool = True
    scale_dtype: str = "bfloat16"
    #: bfloat16, or float32 for integer zero-points, when unset
    offset_dtype: str | None = None
    #: whether weights that are exactly 0 in the checkpoint stay exactly 0; needs 0 on the grid
    keep_zeros: bool = False
    #: whether what rounding takes away of each weight is kept beside the codes, 8 bits more, for `qa_sparse_peft`
    keep_residuals: bool = False
    #: whether the output head is quantized too (causal language models whose head is not the embedding)
    head: bool = False
    #: layers that stay as they are: name endings or regular expressions
    exclude: tuple[str, ...] = ()
    #: gptq: text files to calibrate on, or data sets as hub:NAME; the bundled task without
    calibration: tuple[Path | str, ...] = ()
    #: gptq: sequences to calibrate on, at most
    sequences: int = 128
    #: tokens in a sequence, of calibration and evaluation
    sequence_length: int = 512
    #: whether to measure perplexity before and after (causal language models)
    evaluate: bool = True
    #: text file or data set to measure on; the bundled task without
    eval_text: Path | str | None = None
    #: at most so many sequences to measure on, 0 for all
    eval_sequences: int = 64

    @property
    def spec(self) -> AffineSpec:
        """How a layer is stored."""
        offsets = self.offset_dtype or ("float32" if self.zero_point == "integer" else "bfloat16")
        block = self.block or (1, self.group_size)
        grid: Any = self.bits, block, self.zero_point, self.scale_dtype, offsets
        return AffineSpec(*grid, residuals=self.keep_residuals and not self._misses_zero)

    @property
    def _misses_zero(self) -> bool:
        """Whether 0 is not on the grid."""
        return self.zero_point not in {"integer", "none"}

    @property
    def fitting(self) -> str:
        """How grids are fitted: "minmax" or "mse"."""
        return {"rtn": "minmax", "mse": "mse"}.get(self.algorithm, self.clip)

    def faults(self) -> list[str]:
        """What is wrong with the options by themselves; empty if fine."""
        faults = not_among("algorithm", self.algorithm, ALGORITHMS) + not_among("clip", self.clip, CLIPS)
        if self.act_order and self.algorithm != "gptq":
            faults.append(f"act_order is an option of gptq, not of {self.algorithm}")
        if self.calibration and self.algorithm != "gptq":
            faults.append(f"{self.algorithm} needs no calibration text, gptq does")
        if self.head and self.algorithm in FOREIGN:
            faults.append(
                f"head: {self.algorithm} is bitsandbytes' own format, which keeps the output head in full precision; "
                "gptq, mse and rtn quantize it"
            )
        faults += self._zero_faults()
        if not 0 <= self.damping < math.inf:
            faults.append(f"damping = {self.damping}, must be at least 0")
        faults += too_low(self, {"sequences": 1, "sequence_length": 2, "eval_sequences": 0})
        if self.eval_text is not None and not self.evaluate:
            faults.append("an evaluation text without evaluation")
        # a 1 x 1 layer whose blocks fit tells faults of the options from those of a shape
        q, p = self.spec.block
        return faults + (self.spec.faults(q, p) if min(q, p) > 0 else [f"block = {(q, p)}, must be positive"])

    def _zero_faults(self) -> list[str]:
        asked = " and ".join(name for name in ("keep_zeros", "keep_residuals") if getattr(self, name))
        if asked and self.algorithm in FOREIGN:
            return [f"{asked}: an option of gptq, mse and rtn, not of {self.algorithm}"]
        if asked and self._misses_zero:
            return [
                f"{asked}: needs grids that hold 0, zero_point = 'integer' or 'none', not {self.zero_point!r}"
            ]
        return []

    def as_json(self) -> dict[str, Any]:
        """The options in plain JSON types."""
        return {
            **asdict(self),
            "block": list(self.spec.block),
            "offset_dtype": self.spec.offset_dtype,
            "exclude": list(self.exclude),
            "calibration": [str(file) for file in self.calibration],
            "eval_text": None if self.eval_text is None else str(self.eval_text),
        }


@dataclass(frozen=True)
class LayerReport:
    """One quantized layer."""

    name: str
    #: (out, in)
    shape: tuple[int, int]
    bits_per_weight: float
    #: bytes of codes, scales, offsets and residuals
    bytes: int
    #: ‖W − Ŵ‖ / ‖W‖ (Frobenius); None in a plan
    weight_error: float | None = None
    #: ‖(W − Ŵ) X‖ / ‖W X‖ on inputs X that the quantized layer meets; None where no text was run
    output_error: float | None = None
    seconds: float = 0.0
    #: weights that are exactly 0 in the checkpoint, their share, and how many of them still are
    zeros: int = 0
    sparsity: float = 0.0
    zeros_kept: int = 0

    @classmethod
    def planned(cls, name: str, shape: tuple[int, int], spec: AffineSpec) -> LayerReport:
        """The layer as it will be stored."""
        bits = spec.bits_per_weight(*shape)
        return cls(name, shape, bits, round(bits * math.prod(shape) / 8))

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> LayerReport:
        """The report that `asdict` made `about` of."""
        return cls(**{**about, "shape": tuple(about["shape"])})


@dataclass(frozen=True)
class QuantizationReport:
    """A quantized model folder, or the plan of one. Written to the folder as `quantization_report.json`."""

    model: str
    output: str
    #: algorithm, bits, block, texts and all other options
    options: dict[str, Any]
    #: bits per quantized weight: codes, scales, offsets and residuals
    bits_per_weight: float
    #: numbers that were quantized, and that stay as they are (embeddings, norms, biases, the head unless asked for)
    quantized_weights: int
    kept_weights: int
    #: bytes of all weights
    bytes_before: int
    bytes_after: int
    layers: list[LayerReport]
    #: what gptq was calibrated on, and its tokens
    calibration: str | None = None
    calibration_tokens: int = 0
    #: what the perplexities are measured on, and how many tokens are predicted
    evaluation: str | None = None
    evaluation_tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    #: wall time of this run, which may have been a resumed one
    seconds: float = 0.0
    #: quantized weights that are exactly 0 in the checkpoint, and how many of them still are
    zeros: int = 0
    zeros_kept: int = 0
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    modicum_version: str = ""


def parse_block(text: str) -> tuple[int, int]:
    """(q, p) of `QxP`.

    Raises:
        ConfigError: it is not written so.
    """
    q, cross, p = text.lower().partition("x")
    if not cross or not q.strip().isdecimal() or not p.strip().isdecimal():
        raise ConfigError(f"block = {text!r}; write outputs x inputs, e.g. 8x4")
    return int(q), int(p)


def bits_of(layers: Sequence[LayerReport]) -> float:
    """Bits stored per weight over all layers."""
    weights = sum(math.prod(layer.shape) for layer in layers)
    return 8 * sum(layer.bytes for layer in layers) / weights if weights else 0.0
