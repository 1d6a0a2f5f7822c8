"""What a sparsification was asked to do, and what it did."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from modicum.errors import ConfigError, not_among, too_low

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ALGORITHMS = ("wanda", "magnitude")
COMPARED = ("row", "layer")
REPORT = "sparsity_report.json"
#: of a model that is asked for no share of its own
_HALF = 0.5


@dataclass(frozen=True)
class SparsifyOptions:
    """How to zero weights of the linear layers of a model. `faults()` says what is wrong, all of it."""

    #: share of zeros in each layer; 0.5 when unset, or what the pattern makes
    sparsity: float | None = None
    #: "wanda" weighs weights with the inputs they meet, "magnitude" looks at weights alone
    algorithm: str = "wanda"
    #: N:M, e.g. "2:4": of each M consecutive weights of a row the N best are kept
    pattern: str | None = None
    #: among which weights the lowest are sought: "row" (wanda when unset) or "layer" (magnitude when unset)
    per: str | None = None
    #: shares of zeros of layers that differ: name endings or a regular expression -> share; the last that matches
    #: counts
    ratios: Mapping[str, float] = field(default_factory=dict)
    #: layers that stay as they are: name endings or regular expressions
    exclude: tuple[str, ...] = ()
    #: wanda: text files to calibrate on, or data sets as hub:NAME; the bundled task without
    calibration: tuple[Path | str, ...] = ()
    #: wanda: sequences to calibrate on, at most
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
    def n_m(self) -> tuple[int, int] | None:
        """(N, M) of the pattern, None without one.

        Raises:
            ConfigError: it is not written so, or keeps none or all.
        """
        return None if self.pattern is None else parse_pattern(self.pattern)

    @property
    def ratio(self) -> float:
        """The share of zeros in layers that no entry of `ratios` names."""
        if self.n_m is not None:
            n, m = self.n_m
            return 1 - n / m
        return _HALF if self.sparsity is None else self.sparsity

    @property
    def compared(self) -> str:
        """Among which weights the lowest are sought: "row" or "layer"."""
        return self.per or {"magnitude": "layer"}.get(self.algorithm, "row")

    def faults(self) -> list[str]:
        """What is wrong with the options by themselves; empty if fine."""
        faults = not_among("algorithm", self.algorithm, ALGORITHMS)
        faults += [] if self.per is None else not_among("per", self.per, COMPARED)
        shares = {"sparsity": self.sparsity}
        shares |= {f"ratios: {pattern}": ratio for pattern, ratio in self.ratios.items()}
        for name, share in shares.items():
            if share is not None and not 0 <= share < 1:
                hint = f"; {share:g} % is {share / 100:g}" if 1 < share < 100 else ""
                faults.append(f"{name} = {share}, must be at least 0 and below 1{hint}")
        faults += self._faults_of_pattern()
        if self.calibration and self.algorithm == "magnitude":
            faults.append("magnitude needs no calibration text, wanda does")
        faults += too_low(self, {"sequences": 1, "sequence_length": 2, "eval_sequences": 0})
        if self.eval_text is not None and not self.evaluate:
            faults.append("an evaluation text without evaluation")
        return faults

    def _faults_of_pattern(self) -> list[str]:
        if self.pattern is None:
            return []
        try:
            n, m = parse_pattern(self.pattern)
        except ConfigError as error:
            return [str(error)]
        faults = []
        if self.sparsity is not None and self.sparsity != 1 - n / m:
            faults.append(
                f"sparsity = {self.sparsity}, but the pattern {self.pattern} zeroes {1 - n / m:g}; give one of them"
            )
        if self.ratios:
            faults.append("ratios are for layers without a pattern; leave layers out of it with exclude")
        if self.per is not None:
            faults.append(f"per = {self.per!r}: a pattern compares the weights of each run of {m}")
        return faults

    def as_json(self) -> dict[str, Any]:
        """The options in plain JSON types."""
        return {
            **asdict(self),
            "ratios": dict(self.ratios),
            "exclude": list(self.exclude),
            "calibration": [str(file) for file in self.calibration],
            "eval_text": None if self.eval_text is None else str(self.eval_text),
        }


@dataclass(frozen=True)
class LayerReport:
    """One layer."""

    name: str
    #: (out, in)
    shape: tuple[int, int]
    #: share of zeros; may be more than was asked for where the original has zeros
    sparsity: float
    #: what chose the zeros; magnitude under wanda for a layer that no calibration text reached
    algorithm: str
    #: ‖W − Ŵ‖ / ‖W‖ (Frobenius); None in a plan
    weight_error: float | None = None
    #: ‖(W − Ŵ) X‖ / ‖W X‖ on inputs X that the sparse layer meets; None where no text was run
    output_error: float | None = None
    seconds: float = 0.0

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> LayerReport:
        """The report that `asdict` made `about` of."""
        return cls(**{**about, "shape": tuple(about["shape"])})


@dataclass(frozen=True)
class SparsityReport:
    """A sparse model folder, or the plan of one. Written to the folder as `sparsity_report.json`."""

    model: str
    output: str
    #: algorithm, shares, texts and all other options
    options: dict[str, Any]
    #: share of zeros in all layers together
    sparsity: float
    #: numbers in these layers, and in all that stays as it is (embeddings, norms, biases, heads, excluded layers)
    weights: int
    kept_weights: int
    layers: list[LayerReport]
    #: what wanda was calibrated on, and its tokens
    calibration: str | None = None
    calibration_tokens: int = 0
    #: what the perplexities are measured on, and how many tokens are predicted
    evaluation: str | None = None
    evaluation_tokens: int = 0
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    #: wall time of this run, which may have been a resumed one
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    dry_run: bool = False
    modicum_version: str = ""


def parse_pattern(text: str) -> tuple[int, int]:
    """(N, M) of `N:M`.

    Raises:
        ConfigError: it is not written so, or keeps none or all of the M.
    """
    n, colon, m = text.partition(":")
    if not colon or not n.strip().isdecimal() or not m.strip().isdecimal() or not 1 <= int(n) < int(m):
        raise ConfigError(
            f"pattern = {text!r}; write N:M with 1 <= N < M, e.g. 2:4 keeps two of four weights"
        )
    return int(n), int(m)


def parse_ratios(pairs: list[str]) -> dict[str, float]:
    """Pattern -> share of `PATTERN=SHARE` pairs, in their order.

    Raises:
        ConfigError: pairs are not written so; all of them.
    """
    found, wrong = {}, []
    for pair in pairs:
        # a regular expression may hold an equals sign
        pattern, _, share = pair.rpartition("=")
        try:
            # a later pair counts over an earlier one, so it takes its place at the end
            found.pop(pattern, None)
            found[pattern] = float(share)
        except ValueError:
            wrong.append(pair)
        if not pattern and pair not in wrong:
            wrong.append(pair)
    if wrong:
        raise ConfigError(
            f"ratio = {', '.join(map(repr, wrong))}; write PATTERN=SHARE, e.g. down_proj=0.4 or '.*layers\\.0\\..*=0'"
        )
    return found
