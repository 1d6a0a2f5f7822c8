"""Products with quantized weights: both layouts, with and without the library, against the decoded weight."""

from __future__ import annotations

import shutil
import sysconfig
import threading
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from modicum import AffineConfig, QALoraConfig
from modicum.quant import int4pack, matmul, native
from modicum.quant.affine import AffineLinear
from modicum.quant.huggingface import quantize_linears
from modicum.quant.spec import AffineSpec

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
_HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()
#: what torch's own compiler compiles with, None where it cannot
COMPILER = (shutil.which("g++") or shutil.which("clang++")) if _HEADERS else None


def layer(bits=4, block=(1, 32), out=192, columns=64, *, bias=True, seed=0) -> AffineLinear:
    torch.manual_seed(seed)
    made = AffineLinear(columns, out, AffineSpec(bits, block, offset_dtype="float32"), bias, torch.float32)
    made.codes.random_(0, 256)
    made.scales.uniform_(0.01, 0.02)
    made.offsets.normal_(std=0.02)
    if made.bias is not None:
        made.bias.requires_grad_(False).normal_()
    return made


def four_bit_llama() -> LlamaForCausalLM:
    """A Llama of one layer on 4 bits whose widths the packed kernel takes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=67, hidden_size=128, intermediate_size=192, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(requires_grad=False)
    quantize_linears(model, AffineConfig(bits=4, group_size=32, modules_to_not_convert=["lm_head"]))
    return model


@pytest.fixture(params=["library", "torch"])
def backend(request, monkeypatch):
    """With the library, and as if there were none."""
    if request.param == "library" and not native.available():
        pytest.skip(f"no library: {native.why_not()}")
    if request.param == "torch":
        monkeypatch.setattr(native, "takes", lambda *_: False)


@pytest.fixture(params=[1 << 21, 128 * 64], ids=["one panel", "panels"])
def panels(request, monkeypatch):
    monkeypatch.setattr(matmul, "PANEL", request.param)
    monkeypatch.setattr(matmul, "LARGEST_PANEL", request.param)


def packs(made: AffineLinear, packed: bool) -> None:
    if packed and not int4pack.available():
        pytest.skip("this processor's kernel has another layout")
    if packed:
        made.pack_layout()
    assert made.packed is packed


def near(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    assert found.dtype == dtype
    return bool((found.double() - wanted).abs().max() <= TOLERANCE[dtype] * wanted.abs().max())


@pytest.mark.usefixtures("backend", "panels")
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("bits", "block", "out", "columns", "packed"),
    [
        (4, (1, 32), 320, 64, True),
        (4, (1, 32), 320, 64, False),
        (3, (2, 13), 130, 39, False),
        (2, (1, 5), 67, 45, False),
        (8, (4, 8), 200, 72, False),
    ],
)
def test_product_and_input_gradient(bits, block, out, columns, packed, dtype, monkeypatch):
    monkeypatch.setattr(int4pack, "FEW_ROWS", 0)
    made = layer(bits, block, out, columns)
    packs(made, packed)
    weight = made.dequantized().double()
    for shape in ((3, 40, columns), (2, columns), (columns,), (0, columns)):
        x = torch.randn(shape).to(dtype).requires_grad_()
        wanted = x.detach().double() @ weight.T + made.bias.double()
        y = made(x)
        grad = torch.randn_like(y)
        y.backward(grad)
        with torch.no_grad():
            assert torch.equal(made(x), y)
        if x.numel():
            assert near(y.detach(), wanted, dtype)
            assert near(x.grad, grad.double() @ weight, dtype)
        assert x.grad.shape == x.shape


@pytest.mark.skipif(not int4pack.available(), reason="this processor's kernel has another layout")
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
def test_few_and_many_rows_agree(rows):
    made = layer(bias=False)
    x = torch.randn(rows, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        first, packed = made(x), made.packed
        made.pack_layout()
        again = made(x)
    assert packed is (rows <= int4pack.FEW_ROWS)
    wanted = x.double() @ made.dequantized().double().T
    assert near(first, wanted, torch.bfloat16)
    assert near(again, wanted, torch.bfloat16)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("packed", [False, True])
def test_compiled_and_checkpointed_training(packed):
    first, second = layer(out=64, seed=1), layer(out=128, seed=2)
    packs(first, packed)

    def network(x):
        return second(torch.tanh(first(x)))

    def gradients(run):
        x = torch.randn(20, 64, generator=torch.Generator().manual_seed(3)).requires_grad_()
        y = run(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    wanted = gradients(
        lambda x: torch.tanh(x @ first.dequantized().T + first.bias) @ second.dequantized().T + second.bias
    )
    torch.compiler.reset()  # how often other tests compiled the same code counts
    for run in (
        network,
        lambda x: checkpoint(network, x, use_reentrant=False),
        torch.compile(network, fullgraph=True, backend="aot_eager"),
    ):
        for found, expected in zip(gradients(run), wanted, strict=True):
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True])
def test_training_keeps_codes_and_no_weight(packed):
    made = layer(out=320, columns=64)
    packs(made, packed)
    x = torch.randn(40, 64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda it: it
    ):
        made(x)
    own = {
        tensor.untyped_storage().data_ptr()
        for tensor in (made.codes, made.scales, made.offsets)
        if tensor is not None
    }
    assert made.codes.untyped_storage().data_ptr() in {tensor.untyped_storage().data_ptr() for tensor in kept}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= own


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="torch.compile needs a C++ compiler and Python's headers")
def test_a_compiled_model_trains_and_decodes(tmp_path, monkeypatch):
    """What `torch.compile` makes by default of an MLP of a 4-bit Llama with adapters: a step, then one row."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = get_peft_model(four_bit_llama(), QALoraConfig(r=4, pool=32, init_weights=False))
    mlp = model.base_model.model.model.layers[0].mlp.train()
    inputs = torch.randn(2, 9, 128, generator=torch.Generator().manual_seed(0))

    def gradients(run):
        x = inputs.clone().requires_grad_()
        run(x).square().mean().backward()
        found = [p.grad.clone() for p in mlp.parameters() if p.requires_grad]
        mlp.zero_grad()
        return [x.grad, *found]

    torch.compiler.reset()  # how often other tests compiled the same code counts
    compiled = torch.compile(mlp, fullgraph=True)
    wanted, found = gradients(mlp), gradients(compiled)
    assert len(found) == 1 + 2 * 3
    for one, other in zip(found, wanted, strict=True):
        assert other.norm() > 0
        assert (one - other).norm() < 1e-4 * other.norm()
    mlp.eval().bfloat16()
    row = inputs[:1, :1].bfloat16()
    with torch.no_grad():
        plain = mlp(row).float()
        assert {m.packed for m in mlp.modules() if isinstance(m, AffineLinear)} == {int4pack.available()}
        assert (compiled(row).float() - plain).norm() < 2e-2 * plain.norm()


def test_the_custom_operations_keep_their_contract():
    made = layer(out=64)
    x = torch.randn(5, 64, requires_grad=True)
    arguments = (x, made.codes, made.scales, made.offsets, made.bias, 4, 1, 32, False)
    torch.library.opcheck(matmul._linear, arguments)


@pytest.mark.usefixtures("backend")
def test_scratch_memory_does_not_leak_into_results():
    one, two = layer(seed=1), layer(seed=2)
    x = torch.randn(30, 64, requires_grad=True)
    with torch.no_grad():
        first = one(x)
        kept = first.clone()
        two(x)
    assert torch.equal(first, kept)
    (gradient,) = torch.autograd.grad(one(x).sum(), x)
    kept = gradient.clone()
    torch.autograd.grad(two(x).sum(), x)
    assert torch.equal(gradient, kept)
    with torch.inference_mode():
        one(x)
    # memory first used in inference mode serves training
    one(x).sum().backward()
    assert torch.equal(x.grad, gradient)


@pytest.mark.usefixtures("backend", "panels")
def test_several_threads_at_once():
    layers = [layer(bits, seed=bits) for bits in (2, 3, 4, 8)]
    x = torch.randn(30, 64)
    wanted = [made(x) for made in layers]
    wrong = []

    def work(index):
        for _ in range(30):
            with torch.no_grad():
                if not torch.equal(layers[index](x), wanted[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
