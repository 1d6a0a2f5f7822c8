"""ONNX for onnxruntime: `MatMulNBits` weights, exact float offsets, the cache as inputs and outputs.

A low-bit weight s (c − 2^(bits−1)) + Σ o is computed as two products,

    y = x [s (c − 2^(bits−1))]ᵀ + Σ (sums of x over the p inputs of a block) oᵀ,

the first by `MatMulNBits` with its usual middle zero-point, the second with one number per block. `MatMulNBits`
takes float zero-points too, but leaves its fast path then: measured on a 4096 × 4096 layer in groups of 32,
one thread, one row, 48 ms against 0.9 ms for the two products.

Inputs: `input_ids`, `attention_mask` (past and new tokens), `position_ids`, `past_key_values.N.key` and `.value`;
outputs: `logits`, `present.N.key` and `.value`. Weights lie beside the model, in `model.onnx.data`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import torch

from modicum.compress.export._decoder import Graph, logits
from modicum.compress.export._fit import Fit, need
from modicum.compress.export._source import LowBit, Source, narrow, save_texts
from modicum.ops.affine import middle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

SUFFIX = ""
PRECISION = "none: codes, scales and offsets are kept bit for bit"
_MODEL = "model.onnx"
#: of the operators RMSNormalization, RotaryEmbedding and Attention
_OPSET, _IR = 23, 11
_BLOCKS = (256, 128, 64, 32, 16)
_FLOAT, _LONG = 1, 7


def check(source: Source) -> None:
    """Raise unless onnx is installed; it takes every model that a `Source` is made of."""
    del source
    need("onnx")


def fit(source: Source, name: str, allow_inexact: bool) -> Fit:
    """The layer as `MatMulNBits` and offsets; a dense weight where its groups do not suit the operator."""
    del allow_inexact
    weight = source.weight(name)
    assert isinstance(weight, LowBit)
    block = next((size for size in _BLOCKS if weight.group % size == 0), None)
    if block is None:
        note = f"MatMulNBits has no groups of {weight.group} inputs, so the weights are stored in full"
        return Fit("dense", True, {"weight": narrow(weight.decoded())}, weight.decoded(), note)
    bits = 8 if weight.bits == 8 else 4
    parts = {
        "codes": (weight.centred().to(torch.int16) + middle(bits)).to(torch.uint8),
        "scales": weight.scales.repeat_interleave(weight.group // block, 1),
        "offsets": weight.offsets,
        "bits": bits,
        "block": block,
    }
    note = f"{weight.bits}-bit codes take 4 bits" if weight.bits < 4 else ""
    return Fit(f"MatMulNBits {bits}", True, parts, weight.decoded(), note)


def write(source: Source, target: Path, fit: Callable[[str], Fit]) -> None:
    """Write the model, its weights, its configuration and its tokenizer into the folder `target`."""
    import onnx

    builder = _Builder(source, fit)
    builder.run("Identity", [logits(builder, source)], names=["logits"])
    model = onnx.helper.make_model(
        builder.graph(),
        opset_imports=[onnx.helper.make_opsetid("", _OPSET), onnx.helper.make_opsetid("com.microsoft", 1)],
        ir_version=_IR,
        producer_name="modicum",
    )
    # protobuf holds 2 GB at most, so the weights always go beside it
    onnx.save_model(
        model, target / _MODEL, save_as_external_data=True, location=f"{_MODEL}.data", size_threshold=1024
    )
    save_texts(source, target)


@final
class _Builder(Graph):
    """Builds the model from ONNX's operators; a value is the name of a tensor."""

    def __init__(self, source: Source, fit: Callable[[str], Fit]) -> None:
        import onnx

        self.onnx = onnx
        self.source, self.fit = source, fit
        self.nodes: list[Any] = []
        self.tensors: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = [
            self._value("logits", _FLOAT, ["batch", "tokens", source.config.vocab_size])
        ]
        for name, length in (
            ("input_ids", "tokens"),
            ("attention_mask", "past + tokens"),
            ("position_ids", "tokens"),
        ):
            self.inputs.append(self._value(name, _LONG, ["batch", length]))
        self.cos, self.sin = self._rotation()
        self.mask = self._mask()

    def graph(self) -> Any:
        """All of it as one ONNX graph."""
        name = type(self.source.model).__name__
        tensors = list(self.tensors.values())
        return self.onnx.helper.make_graph(self.nodes, name, self.inputs, self.outputs, tensors)

    def run(self, kind: str, inputs: Sequence[str], names: Sequence[str] = (), **attributes: Any) -> str:
        """The first result of a new node; results are called `names`, one of its own without."""
        results = list(names) or [f"v{len(self.nodes)}"]
        domain = "com.microsoft" if kind == "MatMulNBits" else ""
        self.nodes.append(
            self.onnx.helper.make_node(kind, list(inputs), results, domain=domain, **attributes)
        )
        return results[0]

    def embed(self, name: str) -> str:
        """See `Graph`."""
        return self._float(self.run("Gather", [self._dense(name), "input_ids"], axis=0))

    def norm(self, x: str, name: str) -> str:
        """See `Graph`."""
        weight = self._tensor(f"{name}.weight", self.source.tensor(f"{name}.weight"))
        return self.run("RMSNormalization", [x, weight], axis=-1, epsilon=self.source.config.rms_norm_eps)

    def linear(self, x: str, name: str) -> str:
        """See `Graph`."""
        fitted = self.fit(name) if name in self.source.low_bit else None
        if fitted is None or "weight" in fitted.parts:
            weight = (
                self._dense(name)
                if fitted is None
                else self._tensor(f"{name}.weight", fitted.parts["weight"])
            )
            y = self._product(x, weight)
        else:
            y = self._low_bit(x, name, fitted.parts)
        bias = None if name == "model.embed_tokens" else self.source.bias(name)
        return y if bias is None else self.add(y, self._tensor(f"{name}.bias", bias))

    def attend(self, layer: int, q: str, k: str, v: str) -> str:
        """See `Graph`."""
        heads, shared = self.source.heads
        at = f"model.layers.{layer}.self_attn"
        q, k = self._heads(q, heads, f"{at}.q_norm"), self._heads(k, shared, f"{at}.k_norm")
        q, k = (self.run("RotaryEmbedding", [x, self.cos, self.sin]) for x in (q, k))
        past, present = (
            [f"{way}.{layer}.{part}" for part in ("key", "value")] for way in ("past_key_values", "present")
        )
        for names, values, length in ((past, self.inputs, "past"), (present, self.outputs, "past + tokens")):
            values += [self._value(n, _FLOAT, ["batch", shared, length, self.source.head_dim]) for n in names]
        scale = self.source.model.model.layers[layer].self_attn.scaling
        y = self.run(
            "Attention",
            [q, k, self._heads(v, shared), self.mask, *past],
            names=[f"attention.{layer}", *present],
            scale=scale,
        )
        y = self.run("Transpose", [y], perm=[0, 2, 1, 3])
        return self.run("Reshape", [y, self._ints([0, 0, heads * self.source.head_dim])])

    def gated(self, gate: str, up: str) -> str:
        """See `Graph`."""
        return self.run("Mul", [self.run("Mul", [gate, self.run("Sigmoid", [gate])]), up])

    def add(self, x: str, y: str) -> str:
        """See `Graph`."""
        return self.run("Add", [x, y])

    def _low_bit(self, x: str, name: str, parts: dict[str, Any]) -> str:
        codes, bits, block = parts["codes"], parts["bits"], parts["block"]
        out, inner = codes.shape
        if bits == 4:
            codes = codes[:, 0::2] | (codes[:, 1::2] << 4)
        stored = [
            self._tensor(f"{name}.codes", codes.reshape(out, inner // block, -1)),
            self._tensor(f"{name}.scales", parts["scales"].flatten()),
        ]
        y = self.run("MatMulNBits", [x, *stored], K=inner, N=out, bits=bits, block_size=block)
        for index, (values, (rows, columns)) in enumerate(parts["offsets"]):
            split = self.run("Reshape", [x, self._ints([0, 0, inner // columns, columns])])
            sums = self.run("ReduceSum", [split, self._ints([-1])], keepdims=0)
            part = self._product(sums, self._tensor(f"{name}.offsets.{index}", narrow(values)))
            if rows > 1:
                part = self.run("Unsqueeze", [part, self._ints([-1])])
                part = self.run("Expand", [part, self._ints([1, 1, 1, rows])])
                part = self.run("Reshape", [part, self._ints([0, 0, out])])
            y = self.add(y, part)
        return y

    def _product(self, x: str, weight: str) -> str:
        """X Wᵀ for a stored W (out, in) of any float type."""
        return self.run("MatMul", [x, self.run("Transpose", [self._float(weight)], perm=[1, 0])])

    def _heads(self, x: str, heads: int, norm: str = "") -> str:
        split = self.run("Reshape", [x, self._ints([0, 0, heads, self.source.head_dim])])
        if norm and self.source.norms_heads:
            split = self.norm(split, norm)
        return self.run("Transpose", [split], perm=[0, 2, 1, 3])

    def _rotation(self) -> tuple[str, str]:
        """Cosines and sines (batch, tokens, width / 2) of the positions' angles."""
        positions = self.run("Unsqueeze", [self._float("position_ids"), self._ints([-1])])
        angles = self.run("Mul", [positions, self._tensor("frequencies", self.source.rope.inv_freq.float())])
        return self.run("Cos", [angles]), self.run("Sin", [angles])

    def _mask(self) -> str:
        """Whether a new token may look at a token, (batch, 1, tokens, past + tokens)."""
        zero, one = (self._tensor(str(n), torch.tensor(n)) for n in (0, 1))
        total, new = (
            self.run("Squeeze", [self.run("Shape", [name], start=1, end=2)])
            for name in ("attention_mask", "input_ids")
        )
        keys = self.run("Range", [zero, total, one])
        rows = self.run("Range", [self.run("Sub", [total, new]), total, one])
        causal = self.run("LessOrEqual", [keys, self.run("Unsqueeze", [rows, self._ints([-1])])])
        real = self.run("Unsqueeze", [self.run("Greater", ["attention_mask", zero]), self._ints([1, 2])])
        return self.run("And", [causal, real])

    def _value(self, name: str, kind: int, shape: list[Any]) -> Any:
        return self.onnx.helper.make_tensor_value_info(name, kind, shape)

    def _dense(self, name: str) -> str:
        key = f"{name}.weight"
        if key in self.tensors:
            return key
        weight = self.source.tensor(key) if name == "model.embed_tokens" else self.source.weight(name)
        assert isinstance(weight, torch.Tensor)
        return self._tensor(key, narrow(weight))

    def _tensor(self, name: str, values: Tensor) -> str:
        if name not in self.tensors:
            values = values.contiguous()
            if values.dtype == torch.bfloat16:
                kind, data = self.onnx.TensorProto.BFLOAT16, values.view(torch.int16).numpy()
            else:
                data = values.numpy()
                kind = self.onnx.helper.np_dtype_to_tensor_dtype(data.dtype)
            self.tensors[name] = self.onnx.helper.make_tensor(
                name, kind, data.shape, data.tobytes(), raw=True
            )
        return name

    def _float(self, value: str) -> str:
        return self.run("Cast", [value], to=_FLOAT)

    def _ints(self, values: list[int]) -> str:
        return self._tensor("_".join(map(str, values)), torch.tensor(values, dtype=torch.int64))
