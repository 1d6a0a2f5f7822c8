"""OpenVINO IR: int4 or int8 weights, exact float offsets, and a cache inside the model.

A low-bit weight s (c − 2^(bits−1)) + Σ o is computed as two products,

    y = x [s (c − 2^(bits−1))]ᵀ + Σ (sums of x over the p inputs of a block) oᵀ,

the first with signed codes and no zero-point, which is the storage that OpenVINO runs fastest, the second with
one number per block: a few percent of the work. Measured on a 4096 × 4096 layer in groups of 32, one thread, one
row, it takes 0.37 of the time of a float16 zero-point (which also loses the integer products on 8-bit
activations), and it keeps every bit of the offsets, where a float16 zero-point moves the weights by 0.04 %.

Inputs: `input_ids`, `attention_mask` (past and new tokens), `position_ids`, `beam_idx` (which row of the cache
each row continues); output: `logits`. The cache is a state of the inference request: `reset_state()` empties it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch

from modicum.compress.export._decoder import Graph, logits
from modicum.compress.export._fit import Fit, need
from modicum.compress.export._source import LowBit, Source, narrow, save_texts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

SUFFIX = ""
PRECISION = "none: codes, scales and offsets are kept bit for bit"
#: what optimum's exports are called, so that software for them finds the files
_MODEL = "openvino_model.xml"
#: groups for which its CPU plugin computes right: 2026.4 does not for 40, 48, 56, 80, 112, 172 and others, in silence
_BLOCKS = (256, 128, 64, 32, 16, 8, 4)


def check(source: Source) -> None:
    """Raise unless OpenVINO is installed; it takes every model that a `Source` is made of."""
    del source
    need("openvino")


def fit(source: Source, name: str, allow_inexact: bool) -> Fit:
    """The layer as signed codes, scales and offsets; a dense weight where its groups are too odd."""
    del allow_inexact
    weight = source.weight(name)
    assert isinstance(weight, LowBit)
    block = next((size for size in _BLOCKS if weight.group % size == 0), None)
    if block is None:
        note = f"groups of {weight.group} inputs have no fast form, so the weights are stored in full"
        return Fit("dense", True, {"weight": narrow(weight.decoded())}, weight.decoded(), note)
    home = "i4" if weight.bits <= 4 else "i8"
    note = f"{weight.bits}-bit codes take 4 bits" if weight.bits < 4 else ""
    scales = narrow(weight.scales).repeat_interleave(weight.group // block, 1)
    parts = {"codes": weight.centred(), "scales": scales, "offsets": weight.offsets}
    return Fit(home, True, parts, weight.decoded(), note)


def write(source: Source, target: Path, fit: Callable[[str], Fit]) -> None:
    """Write the model, its configuration and its tokenizer into the folder `target`."""
    import openvino

    graph = _Builder(source, fit)
    result = graph.op.result(logits(graph, source))
    result.get_output_tensor(0).set_names({"logits"})
    build: Any = openvino.Model
    model = build([result], graph.sinks, list(graph.inputs.values()), type(source.model).__name__)
    model.validate_nodes_and_infer_types()
    openvino.save_model(model, target / _MODEL, compress_to_fp16=False)
    save_texts(source, target)


@final
class _Builder(Graph):
    """Builds the model from OpenVINO's operations; the cache follows the pattern its plugins fuse."""

    def __init__(self, source: Source, fit: Callable[[str], Fit]) -> None:
        from openvino import opset13

        self.op: Any = opset13
        self.source, self.fit = source, fit
        #: OpenVINO shares the memory of constants, which has to live until the model is saved
        self.kept: list[Any] = []
        self.sinks: list[Any] = []
        self.embedding: Any = None
        self.inputs = {
            name: self._input(name, shape)
            for name, shape in (
                ("input_ids", [-1, -1]),
                ("attention_mask", [-1, -1]),
                ("position_ids", [-1, -1]),
                ("beam_idx", [-1]),
            )
        }
        shape = self.op.shape_of(self.inputs["input_ids"])
        self.batch, self.new = self._part(shape, 0), self._part(shape, 1)
        self.cos, self.sin = self._rotation()
        self.mask = self._mask()

    def embed(self, name: str) -> Any:
        """See `Graph`."""
        return self.op.gather(self._float(self._dense(name)), self.inputs["input_ids"], self._ints(0))

    def norm(self, x: Any, name: str) -> Any:
        """See `Graph`."""
        op = self.op
        mean = op.reduce_mean(op.multiply(x, x), self._ints([-1]), True)
        scaled = op.divide(x, op.sqrt(op.add(mean, self._number(self.source.config.rms_norm_eps))))
        return op.multiply(scaled, self._constant(self.source.tensor(f"{name}.weight")))

    def linear(self, x: Any, name: str) -> Any:
        """See `Graph`."""
        op = self.op
        fitted = self.fit(name) if name in self.source.low_bit else None
        if fitted is None or "weight" in fitted.parts:
            weight = self._dense(name) if fitted is None else self._constant(fitted.parts["weight"])
            y = op.matmul(x, self._float(weight), False, True)
        else:
            y = self._low_bit(x, fitted)
        bias = None if name == "model.embed_tokens" else self.source.bias(name)
        return y if bias is None else op.add(y, self._constant(bias))

    def attend(self, layer: int, q: Any, k: Any, v: Any) -> Any:
        """See `Graph`."""
        op, (heads, shared) = self.op, self.source.heads
        at = f"model.layers.{layer}.self_attn"
        q, k = self._heads(q, heads, f"{at}.q_norm"), self._heads(k, shared, f"{at}.k_norm")
        q, k = self._rotated(q), self._cached(f"past_key_values.{layer}.key", self._rotated(k))
        v = self._cached(f"past_key_values.{layer}.value", self._heads(v, shared))
        k, v = (self._repeated(value, heads // shared) for value in (k, v))
        scale = self._number(self.source.model.model.layers[layer].self_attn.scaling)
        y = op.scaled_dot_product_attention(q, k, v, self.mask, scale, causal=False)
        y = op.transpose(y, self._ints([0, 2, 1, 3]))
        return op.reshape(y, self._ints([0, 0, heads * self.source.head_dim]), special_zero=True)

    def gated(self, gate: Any, up: Any) -> Any:
        """See `Graph`."""
        return self.op.multiply(self.op.swish(gate), up)

    def add(self, x: Any, y: Any) -> Any:
        """See `Graph`."""
        return self.op.add(x, y)

    def _low_bit(self, x: Any, fit: Fit) -> Any:
        op = self.op
        codes, scales = fit.parts["codes"], fit.parts["scales"]
        (out, inner), groups = codes.shape, scales.shape[1]
        codes = op.convert(self._codes(codes.view(out, groups, -1), fit.home), np.float32)
        scaled = op.multiply(codes, self._float(self._constant(scales.unsqueeze(-1))))
        y = op.matmul(x, op.reshape(scaled, self._ints([out, inner]), special_zero=False), False, True)
        for values, (rows, columns) in fit.parts["offsets"]:
            split = op.reshape(x, self._ints([0, 0, inner // columns, columns]), special_zero=True)
            part = op.matmul(
                op.reduce_sum(split, self._ints([-1]), False),
                self._float(self._constant(narrow(values))),
                False,
                True,
            )
            if rows > 1:
                part = op.broadcast(
                    op.unsqueeze(part, self._ints([-1])),
                    self._ints([1, 1, 1, rows]),
                    broadcast_spec="BIDIRECTIONAL",
                )
                part = op.reshape(part, self._ints([0, 0, out]), special_zero=True)
            y = op.add(y, part)
        return y

    def _codes(self, codes: Tensor, home: str) -> Any:
        import openvino

        if home == "i8":
            return self._constant(codes)
        flat = codes.reshape(-1).numpy().view(np.uint8) & 15
        flat = np.append(flat, np.zeros(len(flat) % 2, np.uint8))
        packed = flat[0::2] | (flat[1::2] << 4)
        self.kept.append(packed)
        return self.op.constant(openvino.Tensor(packed, openvino.Shape(list(codes.shape)), openvino.Type.i4))

    def _cached(self, name: str, new: Any) -> Any:
        """Keys or values of past and new tokens, which become the next past."""
        from openvino import opset6

        op, width, heads = self.op, self.source.head_dim, self.source.heads[1]
        empty = op.broadcast(self._number(0.0), op.concat([self.batch, self._ints([heads, 0, width])], 0))
        state = opset6.read_value(empty, name, np.float32, [-1, heads, -1, width])
        past = op.gather(state, self.inputs["beam_idx"], self._ints(0))
        both = op.concat([past, new], 2)
        self.sinks.append(opset6.assign(both, name))
        return both

    def _heads(self, x: Any, heads: int, norm: str = "") -> Any:
        split = self.op.reshape(x, self._ints([0, 0, heads, self.source.head_dim]), special_zero=True)
        if norm and self.source.norms_heads:
            split = self.norm(split, norm)
        return self.op.transpose(split, self._ints([0, 2, 1, 3]))

    def _repeated(self, x: Any, times: int) -> Any:
        """Each head `times` times in a row."""
        if times == 1:
            return x
        op, (heads, _) = self.op, self.source.heads
        wide = op.broadcast(
            op.unsqueeze(x, self._ints([2])), self._ints([1, 1, times, 1, 1]), broadcast_spec="BIDIRECTIONAL"
        )
        return op.reshape(wide, self._ints([0, heads, -1, self.source.head_dim]), special_zero=True)

    def _rotated(self, x: Any) -> Any:
        op, half = self.op, self.source.head_dim // 2
        low = op.slice(x, self._ints([0]), self._ints([half]), self._ints([1]), self._ints([-1]))
        high = op.slice(x, self._ints([half]), self._ints([2 * half]), self._ints([1]), self._ints([-1]))
        turned = op.concat([op.multiply(high, self._number(-1.0)), low], -1)
        return op.add(op.multiply(x, self.cos), op.multiply(turned, self.sin))

    def _rotation(self) -> tuple[Any, Any]:
        """Cosines and sines (batch, 1, tokens, width) of the positions' angles."""
        op = self.op
        positions = op.unsqueeze(self._float(self.inputs["position_ids"]), self._ints([-1]))
        angles = op.multiply(positions, self._constant(self.source.rope.inv_freq.float()))
        angles = op.unsqueeze(op.concat([angles, angles], -1), self._ints([1]))
        return op.cos(angles), op.sin(angles)

    def _mask(self) -> Any:
        """What to add to the scores, (batch, 1, tokens, past + tokens): 0 where a token may look, −∞ elsewhere."""
        op = self.op
        mask = self.inputs["attention_mask"]
        total = op.squeeze(self._part(op.shape_of(mask), 1), self._ints([0]))
        start = op.subtract(total, op.squeeze(self.new, self._ints([0])))
        keys = op.range(self._ints(0), total, self._ints(1), "i64")
        rows = op.unsqueeze(op.range(start, total, self._ints(1), "i64"), self._ints([-1]))
        seen = op.logical_and(
            op.less_equal(keys, rows), op.unsqueeze(op.greater(mask, self._ints(0)), self._ints([1, 2]))
        )
        return op.select(seen, self._number(0.0), self._number(float(np.finfo(np.float32).min)))

    def _input(self, name: str, shape: list[int]) -> Any:
        node = self.op.parameter(shape, np.int32 if name == "beam_idx" else np.int64, name=name)
        node.get_output_tensor(0).set_names({name})
        return node

    def _dense(self, name: str) -> Any:
        if name == "model.embed_tokens":
            # one constant, also where it is the head
            if self.embedding is None:
                self.embedding = self._constant(narrow(self.source.tensor(f"{name}.weight")))
            return self.embedding
        weight = self.source.weight(name)
        assert isinstance(weight, torch.Tensor)
        return self._constant(narrow(weight))

    def _constant(self, values: Tensor) -> Any:
        import openvino

        values = values.contiguous()
        if values.dtype == torch.bfloat16:
            array = values.view(torch.int16).numpy()
            tensor = openvino.Tensor(array, openvino.Shape(list(values.shape)), openvino.Type.bf16)
        else:
            array = values.numpy()
            tensor = openvino.Tensor(array, shared_memory=True)
        self.kept.append(array)
        return self.op.constant(tensor)

    def _float(self, value: Any) -> Any:
        return self.op.convert(value, np.float32)

    def _number(self, value: float) -> Any:
        return self.op.constant(np.float32(value))

    def _ints(self, values: int | list[int]) -> Any:
        return self.op.constant(np.array(values, np.int64))

    def _part(self, shape: Any, index: int) -> Any:
        return self.op.gather(shape, self._ints([index]), self._ints(0))
