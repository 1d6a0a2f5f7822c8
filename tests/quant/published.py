"""Tiny checkpoints written by hand in the published file formats of other quantization tools.

Every writer rounds the linear layers of a model to a grid, packs codes, scales and zero-points bit by bit as
the format says, and returns the weights that a reader has to find, s (c − z) in float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

if TYPE_CHECKING:
    from pathlib import Path

#: the columns that the nibbles of an AWQ word hold
AWQ_COLUMNS = [0, 2, 4, 6, 1, 3, 5, 7]


@dataclass
class Rounded:
    """One weight on its grid: codes (out, in), scales and zero-points (out, in/g)."""

    codes: np.ndarray
    scales: torch.Tensor
    zeros: np.ndarray
    bits: int

    @property
    def weight(self) -> torch.Tensor:
        """The weight s (c − z), float32."""
        columns = self.codes.shape[1] // self.zeros.shape[1]
        steps = self.codes - np.repeat(self.zeros, columns, 1)
        return torch.from_numpy(steps).float() * self.scales.float().repeat_interleave(columns, 1)


def rounded(
    weight: torch.Tensor,
    bits: int,
    group: int,
    *,
    symmetric: bool = False,
    scale_dtype: torch.dtype = torch.float16,
) -> Rounded:
    """`weight` on integer grids of `group` inputs."""
    out, columns = weight.shape
    values = weight.detach().double().view(out, columns // group, group)
    top = 2**bits - 1
    if symmetric:
        scales = (2 * values.abs().amax(-1) / top).to(scale_dtype)
        zeros = torch.full_like(scales, 2 ** (bits - 1), dtype=torch.long)
    else:
        low, high = values.amin(-1).clamp_max(0), values.amax(-1).clamp_min(0)
        scales = ((high - low) / top).to(scale_dtype)
        # not 0: the first GPTQ format stores z − 1 and cannot say it
        zeros = (-low / scales.double()).round().long().clamp(1, top)
    codes = (values / scales.double().unsqueeze(-1) + zeros.unsqueeze(-1)).round().clamp(0, top).long()
    return Rounded(codes.view(out, columns).numpy(), scales, zeros.numpy(), bits)


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """Rows of integers as int32 words: one stream of bits per row, lowest first."""
    stream = (values[..., None] >> np.arange(bits)) & 1
    stream = stream.reshape(len(values), -1).astype(np.uint8)
    stream = np.pad(stream, ((0, 0), (0, -stream.shape[1] % 32)))
    return np.packbits(stream, axis=1, bitorder="little").view("<i4").copy()


def llama(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of 14 linear layers whose widths the kernels of other tools accept."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=67, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, initializer_range=0.08,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that such tools quantize: all but the head."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in found.items() if "lm_head" not in name}


def gptq(
    folder: Path,
    model: nn.Module,
    bits: int = 4,
    group: int = 32,
    *,
    symmetric: bool = False,
    version: int = 1,
    g_idx: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Write `model` as a GPTQ checkpoint; `g_idx` shuffles the columns of every 64-wide layer over its groups."""
    tensors, weights = _rest(model), {}
    for name, layer in linears(model).items():
        columns = layer.weight.shape[1]
        order = torch.arange(columns)
        if g_idx is not None and columns == len(g_idx):
            order = torch.argsort(g_idx, stable=True)
        grid = rounded(layer.weight[:, order], bits, group, symmetric=symmetric)
        back = torch.argsort(order)
        codes = grid.codes[:, back.numpy()]
        zeros = grid.zeros.T - (1 if version == 1 else 0)
        tensors |= {
            f"{name}.qweight": torch.from_numpy(words(codes, bits)).T.contiguous(),
            f"{name}.qzeros": torch.from_numpy(words(zeros, bits)),
            f"{name}.scales": grid.scales.T.contiguous(),
            f"{name}.g_idx": (order.argsort() // group).int(),
        }
        weights[name] = grid.weight[:, back]
    config = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": g_idx is not None,
        "sym": symmetric, "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "damp_percent": 0.1,
    }  # fmt: skip
    _save(folder, model, tensors, config)
    return weights


def awq(folder: Path, model: nn.Module, group: int = 32) -> dict[str, torch.Tensor]:
    """Write `model` as an AWQ checkpoint (4 bits, format gemm)."""
    tensors, weights = _rest(model), {}
    for name, layer in linears(model).items():
        grid = rounded(layer.weight, 4, group)
        tensors |= {
            f"{name}.qweight": torch.from_numpy(words(_interleaved(grid.codes.T), 4)),
            f"{name}.qzeros": torch.from_numpy(words(_interleaved(grid.zeros.T), 4)),
            f"{name}.scales": grid.scales.T.contiguous(),
        }
        weights[name] = grid.weight
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    _save(folder, model, tensors, config)
    return weights


def compressed_tensors(
    folder: Path,
    model: nn.Module,
    bits: int = 4,
    group: int | None = 32,
    *,
    symmetric: bool = False,
    packed: bool = True,
    words_of_ten: bool = False,
) -> dict[str, torch.Tensor]:
    """Write `model` as a compressed-tensors checkpoint, by group or (None) by row.

    `packed`: pack-quantized, else int-quantized. `words_of_ten`: 3-bit codes as old versions packed them.
    """
    tensors, weights = _rest(model), {}
    for name, layer in linears(model).items():
        out, columns = layer.weight.shape
        grid = rounded(layer.weight, bits, group or columns, symmetric=symmetric, scale_dtype=torch.bfloat16)
        tensors[f"{name}.weight_scale"] = grid.scales
        middle = 2 ** (bits - 1)
        if packed:
            codes = _words_of_ten(grid.codes) if words_of_ten else words(grid.codes, bits)
            tensors[f"{name}.weight_packed"] = torch.from_numpy(codes)
            tensors[f"{name}.weight_shape"] = torch.tensor([out, columns])
            zeros = words(grid.zeros.T, bits).T
        else:
            tensors[f"{name}.weight"] = torch.from_numpy((grid.codes - middle).astype(np.int8))
            zeros = (grid.zeros - middle).astype(np.int8)
        if not symmetric:
            tensors[f"{name}.weight_zero_point"] = torch.from_numpy(zeros.copy())
        weights[name] = grid.weight
    scheme = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if group else "channel",
        "group_size": group, "dynamic": False, "actorder": None, "block_structure": None, "observer": "minmax",
    }  # fmt: skip
    form = "pack-quantized" if packed else "int-quantized"
    config = {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None,
                                      "output_activations": None, "format": form}},
        "ignore": ["lm_head"], "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip
    _save(folder, model, tensors, config)
    return weights


def _words_of_ten(codes: np.ndarray) -> np.ndarray:
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % 10)))
    return np.concatenate([words(part, 3) for part in np.split(padded, padded.shape[1] // 10, 1)], 1)


def _interleaved(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1, 8)[:, :, AWQ_COLUMNS].reshape(len(values), -1)


def _rest(model: nn.Module) -> dict[str, torch.Tensor]:
    quantized = {f"{name}.weight" for name in linears(model)}
    return {key: value.clone() for key, value in model.state_dict().items() if key not in quantized}


def _save(folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor], config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    stored |= {"quantization_config": config, "dtype": dtype, "architectures": [type(model).__name__]}
    (folder / "config.json").write_text(json.dumps(stored))
    save_file(
        {key: value.contiguous() for key, value in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
