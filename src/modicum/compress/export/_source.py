"""The model that is exported, as every engine's file sees it: shapes, low-bit and dense weights, tensors."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from modicum.errors import ConfigError
from modicum.ops.affine import middle, spread
from modicum.quant.affine import AffineLinear
from modicum.quant.base import format_of

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

#: decoder-only architectures of one shape: they differ in biases, and in what a configuration may ask for
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


@dataclass(frozen=True)
class LowBit:
    """A weight of codes: ŵ = s (c − 2^(bits−1)) + Σ spread(offset, block)."""

    bits: int
    #: (out, in) uint8
    codes: Tensor
    #: (out, in/g) float32, one per row group of g inputs
    scales: Tensor
    #: float32 offsets (out/q, in/p), each constant on its (q, p) blocks
    offsets: tuple[tuple[Tensor, tuple[int, int]], ...]

    @property
    def group(self) -> int:
        """Inputs of a row that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def centred(self) -> Tensor:
        """The signed codes c − 2^(bits−1), (out, in) int8."""
        return (self.codes.to(torch.int16) - middle(self.bits)).to(torch.int8)

    def decoded(self) -> Tensor:
        """ŵ, (out, in) float32."""
        weight = self.centred().float().mul_(spread(self.scales, (1, self.group)))
        for offset, block in self.offsets:
            weight += spread(offset, block)
        return weight

    def in_row_groups(self) -> tuple[int, Tensor, Tensor]:
        """The same weight with one scale and one offset per row group: (g, scales, offsets), both (out, in/g)."""
        group = math.gcd(self.group, *(block[1] for _, block in self.offsets))
        offsets = torch.zeros(self.codes.shape[0], self.codes.shape[1] // group)
        for offset, (rows, columns) in self.offsets:
            offsets += spread(offset, (rows, columns // group))
        return group, spread(self.scales, (1, self.group // group)), offsets


@dataclass(frozen=True)
class Source:
    """A causal language model of one of `ARCHITECTURES`, and its tokenizer."""

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        """Check that the model is one whose every part is known.

        Raises:
            ConfigError: another architecture, or an option that no engine's file of ours knows.
        """
        name = type(self.model).__name__
        if name not in ARCHITECTURES:
            raise ConfigError(
                f"exports know the architectures {', '.join(ARCHITECTURES)}, not {name}"
                + ("; merge the adapter first" if name.startswith("Peft") else "")
            )
        config, faults = self.config, []
        if config.hidden_act not in ("silu", "swish"):
            faults.append(f"hidden_act = {config.hidden_act!r}, must be silu")
        window = getattr(config, "sliding_window", None)
        if window and window < config.max_position_embeddings and getattr(config, "use_sliding_window", True):
            faults.append(f"sliding_window = {window}, must be absent or cover all positions")
        if self.rope.attention_scaling != 1.0 or "dynamic" in str(self.rope.rope_type):
            faults.append(f"rope_type = {self.rope.rope_type!r}, must be default, linear or llama3")
        if 2 * len(self.rope.inv_freq) != self.head_dim:
            faults.append("rotary positions on a part of each head, must be on all of it")
        if faults:
            raise ConfigError("cannot export this model: " + "; ".join(faults))

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def architecture(self) -> str:
        """`llama`, `qwen2` or `qwen3`."""
        return ARCHITECTURES[type(self.model).__name__]

    @property
    def rope(self) -> Any:
        """The module that holds the rotary frequencies."""
        return self.model.model.rotary_emb

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.config.num_hidden_layers

    @property
    def heads(self) -> tuple[int, int]:
        """Heads of queries, and of keys and values."""
        return self.config.num_attention_heads, self.config.num_key_value_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads[0]

    @property
    def norms_heads(self) -> bool:
        """Whether every head of queries and keys is normalised."""
        return self.architecture == "qwen3"

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.model.lm_head.weight is self.model.model.embed_tokens.weight

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers; a head that is the embedding is none of its own."""
        names = (name for name, module in self.model.named_modules() if format_of(module) is not None)
        return tuple(name for name in names if not (name == "lm_head" and self.tied))

    @cached_property
    def low_bit(self) -> tuple[str, ...]:
        """Names among `linears` whose weights are codes."""
        return tuple(n for n in self.linears if isinstance(self.model.get_submodule(n), AffineLinear))

    @torch.no_grad()
    def weight(self, name: str) -> LowBit | Tensor:
        """The weight of a linear layer: codes, or (out, in) float32 for any other storage."""
        module = self.model.get_submodule(name)
        if not isinstance(module, AffineLinear):
            fmt = format_of(module)
            assert fmt is not None
            return fmt.weight(module).detach().float().cpu()
        spec, grid = module.spec, module.grid()
        offsets = []
        if grid.offsets is not None:
            offsets.append((grid.offsets.float().cpu(), spec.block))
        if module.block_offsets is not None and spec.offset_block is not None:
            offsets.append((module.block_offsets.float().cpu(), spec.offset_block))
        scales = spread(grid.scales.float().cpu(), (spec.block[0], 1))
        return LowBit(spec.bits, module.unpacked_codes().cpu(), scales, tuple(offsets))

    def bias(self, name: str) -> Tensor | None:
        """The bias of a linear layer, float32."""
        bias = self.model.get_submodule(name).bias
        return None if bias is None else bias.detach().float().cpu()

    def tensor(self, name: str) -> Tensor:
        """A parameter, float32."""
        return self.model.get_parameter(name).detach().float().cpu()


def narrow(values: Tensor) -> Tensor:
    """`values` in the first of float16, bfloat16 and float32 that holds every one of them exactly."""
    for dtype in (torch.float16, torch.bfloat16):
        short = values.to(dtype)
        if torch.equal(short.float(), values.float()):
            return short
    return values.float()


def save_texts(source: Source, folder: Path) -> None:
    """Writes configuration and tokenizer into `folder`, without what is said of how our own folders are quantized."""
    config = copy.deepcopy(source.config)
    vars(config).pop("quantization_config", None)
    config.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
