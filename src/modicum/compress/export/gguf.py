"""GGUF for llama.cpp: one file with the weights, the tokenizer and everything else.

A GGUF block is 32 inputs of a row. Up to 4 bits, asymmetric: `Q4_1`, w = d c + m with the same codes and float16
d = s, m = o − 2^(bits−1) s, so that only the rounding of d and m separates it from the layer (2 and 3 bits take
4, since no smaller block has a minimum for every 32 inputs). Symmetric: `Q4_0` and `Q8_0`, exact to the bit for
scales that float16 holds. What fits no block (groups that 32 does not divide, 8 bits with offsets) is stored as
float16 weights, or, where inexactness is allowed, as `Q8_0`, which moves the grid. llama.cpp itself rounds the
inputs of every low-bit product to 8 bits.

Source: the GGUF specification (ggml) and the tensor names of its `gguf` library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from modicum.compress.export import _gguf_tokenizer
from modicum.compress.export._fit import Fit, need
from modicum.compress.export._source import LowBit, Source, narrow
from modicum.errors import ConfigError, listing
from modicum.ops.affine import middle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SUFFIX = ".gguf"
PRECISION = "float16 of scales and minima (Q4_1, Q4_0, Q8_0) or of weights (F16)"
_BLOCK = 32
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
#: the layers that may have one, by architecture; llama's all may
_BIASES = {"qwen2": ("q_proj", "k_proj", "v_proj"), "qwen3": ()}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def check(source: Source) -> None:
    """Raise unless gguf is installed and the tokenizer has a form in it."""
    need("gguf")
    _gguf_tokenizer.write(_Nothing(), source.tokenizer, source.config.vocab_size)
    known = _BIASES.get(source.architecture)
    biased = [name for name in source.linears if source.bias(name) is not None]
    extra = [name for name in biased if known is not None and not name.endswith(known)]
    if extra:
        raise ConfigError(f"a {source.architecture} GGUF file has no bias for {listing(extra)}")


def fit(source: Source, name: str, allow_inexact: bool) -> Fit:
    """The layer as blocks of 32 inputs; as float16 weights, or coarser if allowed, where none hold its grid."""
    weight = source.weight(name)
    assert isinstance(weight, LowBit)
    group, scales, offsets = weight.in_row_groups()
    found = None
    if group % _BLOCK == 0:
        scales, offsets = (t.repeat_interleave(group // _BLOCK, 1) for t in (scales, offsets))
        if not bool(offsets.any()):
            found = _symmetric(weight, scales)
        elif weight.bits <= 4:
            found = _with_minimum(weight, scales, offsets)
    if found is not None and bool(torch.isfinite(found.decoded).all()):
        return found
    why = f"groups of {group} inputs" if group % _BLOCK else f"{weight.bits} bits with offsets"
    decoded = weight.decoded()
    if allow_inexact and decoded.shape[1] % _BLOCK == 0:
        return _rounded(decoded, f"{why} have no GGUF block; moved to the grid of Q8_0")
    note = f"{why} have no GGUF block, so the weights take 16 bits"
    return Fit("F16", True, {"F16": decoded.half().numpy()}, decoded.half().float(), note)


def write(source: Source, target: Path, fit: Callable[[str], Fit]) -> None:
    """Write the model and its tokenizer into the file `target`."""
    import gguf

    writer = gguf.GGUFWriter(target, source.architecture, use_temp_file=True)
    try:
        _describe(writer, source)
        _gguf_tokenizer.write(writer, source.tokenizer, source.config.vocab_size)
        for name in source.linears:
            _add_linear(writer, source, name, fit)
        _add(writer, "token_embd.weight", source.tensor("model.embed_tokens.weight"))
        norms = [name for name, _ in source.model.named_parameters() if "norm" in name]
        for name in norms:
            _add(writer, _renamed(name), source.tensor(name))
        factors = _rope_factors(source)
        if factors is not None:
            _add(writer, "rope_freqs.weight", factors)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _symmetric(weight: LowBit, scales: Tensor) -> Fit:
    d, codes = scales.half(), weight.centred()
    decoded = codes.float() * d.float().repeat_interleave(_BLOCK, 1)
    if weight.bits == 8:
        parts = {"Q8_0": _blocks([d], codes.numpy().view(np.uint8).reshape(*d.shape, _BLOCK))}
        return Fit("Q8_0", True, parts, decoded)
    packed = _nibbles((codes + 8).to(torch.uint8))
    return Fit("Q4_0", True, {"Q4_0": _blocks([d], packed)}, decoded, _widened(weight.bits))


def _with_minimum(weight: LowBit, scales: Tensor, offsets: Tensor) -> Fit:
    d, m = scales.half(), (offsets - middle(weight.bits) * scales).half()
    spread = [t.float().repeat_interleave(_BLOCK, 1) for t in (d, m)]
    decoded = weight.codes.float() * spread[0] + spread[1]
    parts = {"Q4_1": _blocks([d, m], _nibbles(weight.codes))}
    return Fit("Q4_1", True, parts, decoded, _widened(weight.bits))


def _rounded(weight: Tensor, note: str) -> Fit:
    """The nearest weights on the grid of Q8_0."""
    blocks = weight.unflatten(1, (-1, _BLOCK))
    d = (blocks.abs().amax(-1) / 127).half()
    step = torch.where(d == 0, 1, d).float().unsqueeze(-1)
    codes = (blocks / step).round().clamp(-127, 127)
    parts = {"Q8_0": _blocks([d], codes.to(torch.int8).numpy().view(np.uint8))}
    return Fit("Q8_0", False, parts, (codes * d.float().unsqueeze(-1)).flatten(1), note)


def _blocks(numbers: list[Tensor], codes: np.ndarray) -> np.ndarray:
    """Rows of blocks as bytes, (out, n): float16 `numbers` (out, blocks), then `codes` (out, blocks, bytes)."""
    heads = [np.ascontiguousarray(t.numpy())[..., None].view(np.uint8) for t in numbers]
    return np.concatenate([*heads, codes], -1).reshape(codes.shape[0], -1)


def _nibbles(codes: Tensor) -> np.ndarray:
    """Codes (out, in) as (out, blocks, 16) bytes: the first half of a block in the low bits, the second in the high."""
    halves = codes.numpy().reshape(codes.shape[0], -1, 2, _BLOCK // 2)
    return halves[:, :, 0] | (halves[:, :, 1] << 4)


def _widened(bits: int) -> str:
    return f"{bits}-bit codes take 4 bits" if bits < 4 else ""


def _describe(writer: Any, source: Source) -> None:
    import gguf

    config, (heads, shared) = source.config, source.heads
    homes = gguf.LlamaFileType
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(homes.MOSTLY_Q4_1 if source.low_bit else homes.MOSTLY_F16)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(source.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(shared)
    writer.add_key_length(source.head_dim)
    writer.add_value_length(source.head_dim)
    writer.add_rope_dimension_count(source.head_dim)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _add_linear(writer: Any, source: Source, name: str, fit: Callable[[str], Fit]) -> None:
    heads = {"q_proj": source.heads[0], "k_proj": source.heads[1]}.get(name.rpartition(".")[2])
    # llama.cpp rotates neighbouring rows of a head, Transformers row i with row i + half
    order = None if heads is None or source.architecture != "llama" else _interleaved(heads, source.head_dim)
    bias, at = source.bias(name), _renamed(f"{name}.weight")
    if name in source.low_bit:
        ((home, rows),) = fit(name).parts.items()
        _add_raw(writer, at, rows if order is None else rows[order], home)
    else:
        weight = source.weight(name)
        assert isinstance(weight, torch.Tensor)
        _add(writer, at, weight if order is None else weight[order])
    if bias is not None:
        _add(writer, _renamed(f"{name}.bias"), bias if order is None else bias[order])


def _interleaved(heads: int, width: int) -> Tensor:
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten()


def _add(writer: Any, name: str, values: Tensor) -> None:
    """Add a dense tensor: matrices in the shortest type that keeps every bit, vectors in float32."""
    stored = narrow(values) if values.dim() == 2 else values.float()
    if stored.dtype == torch.bfloat16:
        _add_raw(writer, name, stored.contiguous().view(torch.uint8).numpy(), "BF16")
    else:
        writer.add_tensor(name, stored.contiguous().numpy())


def _add_raw(writer: Any, name: str, rows: np.ndarray, home: str) -> None:
    import gguf

    if home == "F16":
        writer.add_tensor(name, np.ascontiguousarray(rows))
    else:
        writer.add_tensor(name, np.ascontiguousarray(rows), raw_dtype=gguf.GGMLQuantizationType[home])


def _renamed(name: str) -> str:
    """llama.cpp's name of a parameter."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{_NAMES[rest]}.{kind}"


def _rope_factors(source: Source) -> Tensor | None:
    """What llama.cpp divides the plain rotary frequencies by, None where they are plain."""
    width = source.head_dim
    plain = float(source.config.rope_parameters["rope_theta"]) ** (
        -torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    factors = (plain / source.rope.inv_freq.double().cpu()).float()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-5) else factors


class _Nothing:
    """A writer that takes everything and writes nothing, to hear the faults before the work."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None
