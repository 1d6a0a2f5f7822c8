"""Reading weights of every storage, and the traps of the ones that repack themselves."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tests.laws.cases import OneLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from modicum import LoraXSConfig
from modicum.errors import InexactMergeError
from modicum.quant.base import format_of


def test_conv1d_reads_as_out_in_and_writes_back():
    layer = Conv1D(5, 3)
    fmt = format_of(layer)
    assert fmt.shape(layer) == (5, 3)
    x = torch.randn(2, 3)
    assert torch.allclose(layer(x), x @ fmt.weight(layer).T + layer.bias, atol=1e-6)
    wanted = torch.randn(5, 3)
    fmt.write(layer, wanted)
    assert layer.weight.shape == (3, 5)
    assert torch.equal(fmt.weight(layer), wanted)


def test_what_is_no_linear_layer_has_no_format():
    for module in (nn.Embedding(4, 4), nn.LayerNorm(4), nn.Conv1d(2, 2, 1), nn.Sequential()):
        assert format_of(module) is None


@pytest.fixture
def four_bit():
    bnb = pytest.importorskip("bitsandbytes", reason="needs the extra modicum[quant]")
    torch.manual_seed(0)
    dense = nn.Linear(64, 96).to(torch.bfloat16)
    layer = bnb.nn.Linear4bit(64, 96, compute_dtype=torch.bfloat16, quant_type="nf4")
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu"), dense


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*")
def test_four_bit_base_after_an_evaluation_forward(four_bit):
    """An evaluation forward may repack the weights in place; reading and training must survive it."""
    layer, dense = four_bit
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.eval()(x)
    weight = format_of(layer)
    model = get_peft_model(
        OneLayer(layer), LoraXSConfig(r=8, alpha=8, target_modules=["layer"], init_weights=False)
    ).eval()
    read = weight.weight(layer).float()
    error = (read - dense.weight.float()).norm() / dense.weight.float().norm()
    assert error < 0.15
    with torch.no_grad():
        model(x)
    model.train()
    model(x.requires_grad_()).float().square().sum().backward()
    assert x.grad.abs().sum() > 0
    adapter = model.base_model.model.layer.adapters["default"]
    assert adapter.R.grad.abs().sum() > 0
    expected = layer(x).float() + x.float() @ adapter.delta_weight().T
    assert (model.eval()(x).float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_four_bit_base_refuses_a_merge(four_bit):
    model = get_peft_model(OneLayer(four_bit[0]), LoraXSConfig(r=8, target_modules=["layer"]))
    with pytest.raises(InexactMergeError, match="4-bit"):
        model.merge_and_unload()
