"""Layers of other libraries: which format claims them, what is refused, and what a missing library says."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from tests import models_for_tests as models
from tests.laws.cases import OneLayer
from tests.quant import published
from torch import nn
from transformers import AutoModelForCausalLM

from modicum import LoraXSConfig
from modicum.errors import InexactMergeError, MissingExtraError, TargetError
from modicum.models.loading import load_base
from modicum.quant.allocator import keep_freed_memory
from modicum.quant.base import format_of, formats, loading_options, prepare_model

ABSENT = "is not installed"


@pytest.fixture
def compressed(tmp_path):
    """A symmetric compressed-tensors model as Transformers loads it by itself, and the weights in it."""
    pytest.importorskip("compressed_tensors", reason=f"compressed-tensors {ABSENT}")
    written = published.compressed_tensors(tmp_path, published.llama(), symmetric=True)
    return AutoModelForCausalLM.from_pretrained(tmp_path), written


@pytest.mark.parametrize("evaluated", [False, True])
def test_compressed_layers_become_plain_ones(compressed, evaluated):
    model, written = compressed
    if evaluated:  # the library decompresses at the first forward pass
        with torch.no_grad():
            model(models.tokens())
    name, weight = next(iter(written.items()))
    layer = model.get_submodule(name)
    fmt = format_of(layer)
    assert fmt.name == "compressed-tensors"
    assert fmt.shape(layer) == tuple(weight.shape)
    assert (fmt.dtype(layer), fmt.device(layer)) == (torch.bfloat16, torch.device("cpu"))
    assert torch.equal(fmt.weight(layer), weight.bfloat16())
    prepare_model(model)
    assert {format_of(model.get_submodule(other)).name for other in written} == {"dense"}
    with torch.no_grad():
        found = model(models.tokens()).logits
    twin = published.llama()
    twin.model.rotary_emb = model.model.rotary_emb  # not rounded to bfloat16
    for other, wanted in written.items():
        assert torch.equal(model.get_submodule(other).weight, wanted.bfloat16())
        twin.get_submodule(other).weight.data = wanted.bfloat16()
    with torch.no_grad():
        assert torch.equal(found, twin(models.tokens()).logits)


def test_a_compressed_layer_takes_an_adapter_and_refuses_a_merge(compressed):
    model, _ = compressed
    adapted = get_peft_model(model, LoraXSConfig(r=4, target_modules=["q_proj"]))
    adapted(models.tokens()).logits.sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(InexactMergeError, match="compressed-tensors"):
        adapted.merge_and_unload()


def test_torchao_weights_are_not_taken_for_dense_ones():
    quantization = pytest.importorskip("torchao.quantization", reason=f"torchao {ABSENT}")
    layer = nn.Linear(64, 48)
    dense = layer.weight.detach().clone()
    quantization.quantize_(layer, quantization.Int8WeightOnlyConfig())
    fmt = format_of(layer)
    assert (fmt.name, fmt.shape(layer), fmt.dtype(layer)) == ("torchao", (48, 64), torch.float32)
    assert (fmt.weight(layer) - dense).abs().max() < 0.01
    with pytest.raises(InexactMergeError, match="torchao"):
        get_peft_model(OneLayer(layer), LoraXSConfig(r=4, target_modules=["layer"])).merge_and_unload()


@pytest.mark.parametrize("kind", ["rounded inputs", "packed int4"])
def test_torchao_layers_without_a_derivative_pass_gradients_on(kind):
    quantization = pytest.importorskip("torchao.quantization", reason=f"torchao {ABSENT}")
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    layer = nn.Linear(64, 48, bias=False).requires_grad_(requires_grad=False)
    dense = layer.weight.clone()
    packed = kind == "packed int4"
    config = (
        PrototypeInt4WeightOnlyConfig(32) if packed else quantization.Int8DynamicActivationInt8WeightConfig()
    )
    quantization.quantize_(layer, config)
    with torch.no_grad():
        before = layer(torch.ones(5, 64))
    weight = format_of(layer).weight(layer)
    assert (weight - dense).norm() < (0.1 if packed else 0.01) * dense.norm()
    copied = copy.deepcopy(prepare_model(OneLayer(layer)))
    x = torch.ones(5, 64, requires_grad=True)
    assert torch.equal(copied(x), before)
    copied(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(5, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("writer", "option"), [(published.gptq, "gptq_torch"), (published.awq, "torch_awq")])
def test_kernels_that_only_infer_are_refused(tmp_path, writer, option):
    pytest.importorskip("gptqmodel", reason=f"gptqmodel {ABSENT}")
    writer(tmp_path, published.llama())
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(TargetError, match=option):
        get_peft_model(model, LoraXSConfig(r=4, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("library", "quant_method", "remedy"),
    [
        ("bitsandbytes", "bitsandbytes", r"modicum\[quant\]"),
        ("compressed_tensors", "compressed-tensors", "modicum import"),
        ("gptqmodel", "gptq", "modicum import"),
        ("gptqmodel", "awq", "modicum import"),
        ("torchao", "torchao", "pip install torchao"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, library, quant_method, remedy):
    monkeypatch.setitem(sys.modules, library, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=rf"{library}.*not installed: .*{remedy}"):
        loading_options(quant_method)


def test_loading_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gptqmodel", None)
    published.gptq(tmp_path, published.llama())
    with pytest.raises(MissingExtraError, match="a GPTQ checkpoint needs gptqmodel"):
        load_base(str(tmp_path))


def test_unknown_quantization_is_left_to_transformers():
    assert loading_options("") == loading_options("modicum") == loading_options("something else") == {}


def test_every_format_is_found_once_and_dense_ones_last():
    names = [fmt.name for fmt in formats()]
    assert len(set(names)) == len(names)
    assert {"GPTQ", "AWQ", "compressed-tensors", "torchao", "bitsandbytes 4-bit", "affine"} <= set(names)
    assert names[-2:] == ["dense", "dense (Conv1D)"]


def test_freed_memory_is_kept_where_glibc_is():
    """A block of 64 MiB freed and taken again has its pages still: no page faults to speak of."""
    if not keep_freed_memory():
        pytest.skip("no glibc here")
    assert keep_freed_memory()
    faults = subprocess.run(
        [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True
    ).stdout.split()
    without, kept = map(int, faults)
    assert without > 16384 * 3
    assert kept < without / 3


_FAULTS = """
import ctypes, resource, sys
from modicum.quant.allocator import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def churn():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        block = libc.malloc(64 << 20)
        ctypes.memset(block, 1, 64 << 20)
        libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(churn(), keep_freed_memory() and churn())
"""
