"""QA-SparsePEFT: where it starts, what residuals are for, its gradient, what it refuses, the layouts of the base."""

from __future__ import annotations

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from tests.laws.cases import OneLayer, base_layer
from tests.models_for_tests import base_for, llama
from torch.nn import functional as F

from modicum import AffineConfig, QASparsePeftConfig
from modicum.adapters import panels
from modicum.errors import BaseMismatchError, CorruptAdapterError, InexactMergeError, TargetError
from modicum.ops.affine import PRUNED, middle
from modicum.quant.huggingface import quantize_linears, quantized_linear
from modicum.quant.spec import AffineSpec

OUT, IN, RANK = 200, 64, 6


def base(bits=4, block=(1, 16), zero_point="integer", *, residuals=True, bias=True, columns=IN, rows=OUT):
    dense = base_layer("linear", columns, rows, torch.float32, bias=bias, seed=0).layer.requires_grad_(False)
    spec = AffineSpec(bits, block, zero_point, offset_dtype="float32", residuals=residuals)
    return dense.weight, quantized_linear(dense, spec)


def adapted(quantized, size=None, **options):
    config = QASparsePeftConfig(r=RANK, alpha=12, target_modules=["layer"], **options)
    model = get_peft_model(OneLayer(quantized), config).eval()
    layer = model.base_model.model.layer
    adapter = layer.adapters["default"]
    if size is not None:
        with torch.no_grad():
            adapter.B.normal_(std=size, generator=torch.Generator().manual_seed(3))
    return model, layer, adapter


@pytest.fixture(autouse=True)
def _several_panels(monkeypatch):
    monkeypatch.setattr(panels, "_PANEL", 1)


def inputs(rows=9, columns=IN):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def naive(weight, quantized, adapter):
    """V̂ and where the gradient passes, from the definition: no panels, no groups, codes and zero-points as integers."""
    spec = quantized.spec
    rows, columns = spec.block
    spread = [
        t.repeat_interleave(rows, 0).repeat_interleave(columns, 1) for t in (quantized.grid().scales.float(),)
    ]
    scale = spread[0]
    offsets = quantized.grid().offsets
    zero = torch.full_like(scale, middle(spec.bits))
    if offsets is not None:
        zero -= (
            (offsets / quantized.grid().scales.float())
            .round()
            .repeat_interleave(rows, 0)
            .repeat_interleave(columns, 1)
        )
    codes = quantized.unpacked_codes().float()
    if quantized.residuals is None:
        kept, left = codes != zero, 0.0
    else:
        kept, left = weight != 0, torch.where(weight != 0, quantized.residuals.float() / 256, 0.0)
    product = 12 / RANK * (adapter.B @ adapter.A)
    position = codes + left + torch.where(kept, product, 0.0) / scale
    chosen = position.round().clamp(0, 2**spec.bits - 1)
    inside = (position.round() == chosen) & kept
    # straight through: the value of one, the gradient of the other
    ste = scale * (chosen - zero)
    return ste.detach() + (product * inside - (product * inside).detach()), inside


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", ["integer", "none"])
@pytest.mark.parametrize("residuals", [True, False])
def test_values_and_gradients_are_those_of_the_definition(bits, zero_point, residuals):
    weight, quantized = base(bits, (4, 8), zero_point, residuals=residuals)
    model, layer, adapter = adapted(quantized, size=0.3)
    value, inside = naive(weight, quantized, adapter)
    # some weights have left the grid, and some have moved
    assert 0 < (~inside).float().mean() < 1
    assert (value != quantized.dequantized()).float().mean() > 0.1
    torch.testing.assert_close(layer.site.weight() + layer.get_delta_weight("default"), value)
    x = inputs().requires_grad_()
    slope = torch.linspace(-1, 2, OUT)
    truth = torch.autograd.grad(
        (F.linear(x, value, layer.site.bias).tanh() * slope).sum(), [x, *adapter.parameters()]
    )
    found = torch.autograd.grad((model(x).tanh() * slope).sum(), [x, *adapter.parameters()])
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_blocks_may_lie_across_the_borders_of_panels():
    weight, quantized = base(4, (25, 8))
    _, layer, adapter = adapted(quantized, size=0.3)
    value, _ = naive(weight, quantized, adapter)
    torch.testing.assert_close(layer.site.weight() + layer.get_delta_weight("default"), value)


def test_autocast_rounds_what_is_multiplied_and_not_what_decides_on_codes():
    _, quantized = base()
    _, layer, adapter = adapted(quantized, size=0.1)
    delta = layer.get_delta_weight("default")
    with torch.autocast("cpu", torch.bfloat16):
        # rows of one 1 read the update column by column, without a sum
        read = adapter(torch.eye(IN).bfloat16(), torch.zeros(IN, OUT, dtype=torch.bfloat16))
    assert delta.any()
    assert torch.equal(read, delta.bfloat16().T)


@pytest.mark.parametrize("bits", [2, 4])
def test_it_starts_from_the_codes_and_residuals_let_small_updates_move_some(bits):
    moved = {}
    for residuals in (True, False):
        _, quantized = base(bits, residuals=residuals)
        model, layer, adapter = adapted(quantized)
        assert not layer.get_delta_weight("default").any()
        assert torch.equal(model(inputs()), quantized(inputs()))
        with torch.no_grad():
            adapter.B.normal_(std=0.01, generator=torch.Generator().manual_seed(3))
        step = quantized.grid().scales.float().mean()
        reach = (12 / RANK * (adapter.B @ adapter.A)).abs().mean() / step
        moved[residuals] = adapter.moved_steps().ne(0).float().mean().item(), reach.item()
    share, reach = moved[True]
    # an update of a tenth of a step moves about a tenth of the kept weights
    assert share == pytest.approx(reach * 2 / 3, rel=0.4)
    assert moved[False][0] < share / 10


def test_residuals_say_what_is_pruned_and_zeros_that_are_not_may_move():
    weight, quantized = base(2, (1, 16))
    assert torch.equal(quantized.residuals == PRUNED, weight == 0)
    rounded_away = (quantized.dequantized() == 0) & (weight != 0)
    assert rounded_away.any()
    _, layer, _ = adapted(quantized, size=0.3)
    delta = layer.get_delta_weight("default")
    assert not delta[weight == 0].any()
    assert delta[rounded_away].any()
    # without residuals nothing tells the two kinds of zeros apart
    _, layer, _ = adapted(base(2, (1, 16), residuals=False)[1], size=0.3)
    assert not layer.get_delta_weight("default")[layer.site.weight() == 0].any()


def test_training_keeps_nothing_of_the_size_of_the_weight():
    _, quantized = base()
    model, _, _ = adapted(quantized, size=0.1)
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    buffers = {b.data_ptr() for b in quantized.buffers()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(inputs())
    assert len(kept) > 2
    assert max(t.numel() for t in kept if t.data_ptr() not in buffers) <= OUT * RANK


def test_the_layout_of_the_packed_kernel_changes_no_bit():
    _, quantized = base(4, (1, 32), rows=192)
    model, layer, adapter = adapted(quantized, size=0.1)
    wanted = adapter.moved_steps()
    quantized.pack_layout()
    if not quantized.packed:
        pytest.skip("this processor has no packed int4 kernel")
    assert torch.equal(adapter.moved_steps(), wanted)
    assert quantized.packed
    before = quantized.dequantized()
    model.merge_adapter()
    assert torch.equal(quantized.dequantized(), before + layer.get_delta_weight("default"))
    quantized.pack_layout()
    assert torch.equal(adapter.moved_steps(), wanted)
    assert torch.equal(layer.site.weight(), before)
    model.unmerge_adapter()
    assert torch.equal(quantized.dequantized(), before)


def test_other_bases_are_refused_and_told_what_to_do():
    with pytest.raises(TargetError, match=r"stored as dense.*--zero-point integer --keep-zeros"):
        get_peft_model(llama(), QASparsePeftConfig(r=4))
    model = llama()
    quantize_linears(model, AffineConfig(bits=4, group_size=16))
    with pytest.raises(TargetError, match="zero-points are no whole numbers"):
        get_peft_model(model, QASparsePeftConfig(r=4))
    assert not any("modicum" in name for name, _ in model.named_modules())


def test_a_base_with_other_residuals_is_another_base(tmp_path):
    get_peft_model(base_for("qa_sparse_peft", llama()), QASparsePeftConfig(r=4)).save_pretrained(tmp_path)
    PeftModel.from_pretrained(base_for("qa_sparse_peft", llama()), tmp_path)
    dropped = base_for("qa_sparse_peft", llama())
    for module in dropped.modules():
        if hasattr(module, "drop_residuals"):
            module.drop_residuals()
    with pytest.raises(BaseMismatchError):
        PeftModel.from_pretrained(dropped, tmp_path)


def test_nan_is_never_merged_and_a_failed_merge_changes_nothing():
    _, quantized = base()
    model, layer, adapter = adapted(quantized, size=0.1)
    before = quantized.codes.clone()
    model.add_adapter(
        "far", QASparsePeftConfig(r=RANK, alpha=300, target_modules=["layer"], init_weights=False, seed=1)
    )
    model.merge_adapter(["default"])
    merged = quantized.codes.clone()
    with (
        pytest.raises(InexactMergeError, match="beyond the grid"),
        pytest.warns(UserWarning, match="Already"),
    ):
        model.merge_adapter(["far"])
    assert torch.equal(quantized.codes, merged)
    assert quantized.residuals is None
    model.unmerge_adapter()
    assert torch.equal(quantized.codes, before)
    assert quantized.residuals is not None
    with torch.no_grad():
        adapter.A[0, 0] = float("nan")
    with pytest.raises(CorruptAdapterError):
        layer.merge(adapter_names=["default"])
    assert torch.equal(quantized.codes, before)


def test_a_lora_on_the_same_base_is_as_before():
    """Residuals are there for one method; the others see a plain quantized layer."""
    _, quantized = base()
    plain = base(residuals=False)[1]
    config = peft.LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False)
    torch.manual_seed(0)
    one = get_peft_model(OneLayer(quantized), config)(inputs())
    torch.manual_seed(0)
    assert torch.equal(one, get_peft_model(OneLayer(plain), config)(inputs()))
