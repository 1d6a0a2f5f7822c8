"""Adapters on every low-bit base: evaluate first, then train, and compare with the dequantized dense model.

Evaluating comes first on purpose. Several libraries change packed weights for their inference kernels at the
first evaluation, and lose the gradient of most adapters from then on, without an error.
"""

from __future__ import annotations

import functools
import importlib.util

import peft
import pytest
import torch
from tests import models_for_tests as models
from tests.laws.cases import VARIANTS
from tests.quant import published
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from modicum import AffineConfig
from modicum.adapters import registry
from modicum.adapters.layer import AdapterLinear
from modicum.errors import TargetError
from modicum.models.loading import load_base
from modicum.quant.base import format_of, prepare_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def saved(folder, settings, dtype: torch.dtype) -> None:
    """Write the test model quantized on loading with `settings`."""
    published.llama(dtype).save_pretrained(folder / "dense")
    model = AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=settings, dtype=dtype)
    model.save_pretrained(folder)


def bitsandbytes(folder, dtype, **options) -> None:
    saved(folder, BitsAndBytesConfig(**options), dtype)


def torchao(folder, dtype, kind: str, **options) -> None:
    from torchao import quantization
    from torchao.quantization.granularity import PerGroup
    from transformers import TorchAoConfig

    if "groups" in options:
        name = "granularity" if kind.startswith("IntxWeight") else "weight_granularity"
        options[name] = PerGroup(options.pop("groups"))
    saved(folder, TorchAoConfig(getattr(quantization, kind)(**options)), dtype)


def affine(folder, dtype, **options) -> None:
    saved(folder, AffineConfig(**options), dtype)


def foreign(writer, folder, dtype, **options) -> None:
    writer(folder, published.llama(dtype), **options)


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
FP4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}
#: kind -> (writer of a checkpoint, its options, number type, library, tolerance)
# bitsandbytes int8 and torchao's dynamic kinds also round what flows in, gptqmodel computes in float16
BASES = {
    "nf4": (bitsandbytes, NF4, torch.float32, "bitsandbytes", 1e-4),
    "nf4 bfloat16": (bitsandbytes, NF4, torch.bfloat16, "bitsandbytes", 0.15),
    "fp4": (bitsandbytes, FP4, torch.float32, "bitsandbytes", 1e-4),
    "int8": (bitsandbytes, {"load_in_8bit": True}, torch.float32, "bitsandbytes", 6e-2),
    "compressed-tensors": (functools.partial(foreign, published.compressed_tensors), {}, torch.float32,
                           "compressed_tensors", 1e-4),
    "gptq": (functools.partial(foreign, published.gptq), {}, torch.float32, "gptqmodel", 1e-2),
    "gptq act-order": (functools.partial(foreign, published.gptq),
                       {"g_idx": torch.randperm(64, generator=torch.Generator().manual_seed(0)) // 32},
                       torch.float32, "gptqmodel", 1e-2),
    "gptq bfloat16": (functools.partial(foreign, published.gptq), {}, torch.bfloat16, "gptqmodel", 0.15),
    "awq": (functools.partial(foreign, published.awq), {}, torch.float32, "gptqmodel", 1e-2),
    "torchao int8": (torchao, {"kind": "Int8WeightOnlyConfig"}, torch.float32, "torchao", 1e-4),
    "torchao int4": (torchao, {"kind": "IntxWeightOnlyConfig", "weight_dtype": torch.int4, "groups": 32},
                     torch.float32, "torchao", 1e-4),
    "torchao int8 dynamic": (torchao, {"kind": "Int8DynamicActivationInt8WeightConfig"}, torch.float32,
                             "torchao", 0.15),
    "affine 8": (affine, {"bits": 8, "group_size": 32}, torch.float32, "modicum", 1e-4),
    "affine 4": (affine, {"bits": 4, "group_size": 32}, torch.float32, "modicum", 1e-4),
    "affine 4 bfloat16": (affine, {"bits": 4, "group_size": 32}, torch.bfloat16, "modicum", 0.15),
    "affine 3": (affine, {"bits": 3, "block": [2, 16]}, torch.float32, "modicum", 1e-4),
    "affine 2": (affine, {"bits": 2, "group_size": 16, "zero_point": "none"}, torch.float32, "modicum", 1e-4),
    "affine 4 on 0": (affine, {"bits": 4, "group_size": 32, "zero_point": "integer", "residuals": True},
                      torch.float32, "modicum", 1e-4),
    "affine 4 on 0 bfloat16": (affine, {"bits": 4, "group_size": 32, "zero_point": "integer"}, torch.bfloat16,
                               "modicum", 0.15),
}  # fmt: skip
METHODS = [*registry.names(), "peft lora", "peft vera"]

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes.*"),
    # PEFT wants what only merging needs
    pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torchao.*"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:gptqmodel.*"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module", params=BASES)
def base(request, tmp_path_factory):
    """(folder, number type, tolerance) of a quantized checkpoint."""
    write, options, dtype, library, tolerance = BASES[request.param]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    folder = tmp_path_factory.mktemp("base")
    write(folder, dtype, **options)
    return folder, dtype, tolerance


def load(base):
    folder, dtype, _ = base
    return load_base(str(folder), dtype=str(dtype).removeprefix("torch."))


def config_of(method: str):
    """An adapter that changes every target and starts away from zero."""
    if method == "peft lora":
        return peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    if method == "peft vera":
        return peft.VeraConfig(r=4, target_modules=TARGETS, init_weights=False)
    options = VARIANTS.get(method, [{}])[0]
    return registry.config_class(method)(r=4, target_modules=TARGETS, init_weights=False, **options)


def layers_of(model) -> dict[str, torch.nn.Module]:
    names = published.linears(published.llama())
    return {name: model.get_submodule(name) for name in names}


def dense_twin(model):
    """The same model with every quantized weight as a plain float32 matrix."""
    twin = published.llama(torch.float32)
    quantized = layers_of(model)
    rest = {
        key: value
        for key, value in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in quantized)
    }
    twin.load_state_dict({**twin.state_dict(), **rest})
    for name, layer in quantized.items():
        twin.get_submodule(name).weight.data = format_of(layer).weight(layer).float()
    return twin


def evaluate(model) -> torch.Tensor:
    """Logits in evaluation, several times over, on one row and on many."""
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            model(models.tokens(1, 1))
        many = model(models.tokens(4, 7)).logits
        assert torch.equal(model(models.tokens(4, 7)).logits, many)
    return many.float()


def gradients(model) -> dict[str, torch.Tensor]:
    model.train()
    ids = models.tokens(3, 6, seed=1)
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.requires_grad}


def close(got: torch.Tensor, wanted: torch.Tensor, tolerance: float, what: str) -> None:
    error = ((got - wanted).norm() / wanted.norm()).item()
    assert error <= tolerance, f"{what}: {error:.3g}"


def trains_codes(method: str) -> bool:
    return method in registry.names() and registry.get(method).on_grid


def has_codes(model) -> bool:
    """Whether the quantized layers of `model` are codes on grids that hold 0."""
    return not any(format_of(layer).grid_fault(layer) for layer in layers_of(model).values())


@pytest.mark.parametrize("method", METHODS)
def test_evaluated_then_trained_as_on_the_dequantized_model(base, method):
    tolerance = base[2]
    model = load(base)
    if trains_codes(method):
        # a dense model has none; what can be told apart is whether the base has
        if not has_codes(model):
            with pytest.raises(TargetError, match="--zero-point integer --keep-zeros"):
                peft.get_peft_model(model, config_of(method))
        return
    before = {name: format_of(layer).weight(layer).clone() for name, layer in layers_of(model).items()}
    twin = dense_twin(model)
    close(evaluate(model), evaluate(twin), tolerance, "logits")
    adapted = peft.get_peft_model(model, config_of(method))
    for parameter in adapted.parameters():
        if parameter.requires_grad:  # saturated attention has gradients of rounding errors only
            parameter.data *= 0.3
    reference = peft.get_peft_model(twin, config_of(method))
    state = {key: value.float() for key, value in peft.get_peft_model_state_dict(adapted).items()}
    peft.set_peft_model_state_dict(reference, state)
    close(evaluate(adapted), evaluate(reference), tolerance, "adapted logits")
    found, truth = gradients(adapted), gradients(reference)
    assert set(found) == set(truth)
    assert len({name.split(".self_attn.")[-1].split(".mlp.")[-1] for name in found}) >= len(TARGETS)
    for name, wanted in truth.items():
        assert found[name].abs().sum() > 0, name
        close(found[name], wanted, tolerance, name)
    close(evaluate(adapted), evaluate(reference), tolerance, "logits after training")
    for name, layer in layers_of(adapted.base_model.model).items():
        assert torch.equal(format_of(layer.base_layer).weight(layer.base_layer), before[name]), name


@pytest.mark.parametrize("method", registry.names())
def test_a_layer_is_its_base_plus_its_update(base, method):
    _, dtype, tolerance = base
    if trains_codes(method) and not has_codes(load(base)):
        return
    adapted = peft.get_peft_model(load(base), config_of(method)).eval()
    for name, layer in adapted.named_modules():
        if isinstance(layer, AdapterLinear):
            for rows in (1, 40):
                x = torch.randn(
                    rows, layer.in_features, dtype=dtype, generator=torch.Generator().manual_seed(rows)
                )
                with torch.no_grad():
                    update = layer(x).float() - layer.base_layer(x).float()
                wanted = x.float() @ layer.get_delta_weight("default").T
                # the update is what is left of two outputs that were rounded
                scale = (layer.base_layer(x).float().norm() / wanted.norm()).item() + 1
                close(update, wanted, max(tolerance, 1e-4) * scale, name)


def test_a_model_that_was_evaluated_already_is_repaired(tmp_path):
    """What `load_base` does can be had for a model that was loaded otherwise, even after the damage."""
    pytest.importorskip("bitsandbytes", reason="needs the extra modicum[quant]")
    bitsandbytes(tmp_path, torch.float32, **NF4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.no_grad():
        model(models.tokens(4, 7))
    assert prepare_model(model) is model
    reference = peft.get_peft_model(dense_twin(model), config_of("peft lora"))
    adapted = peft.get_peft_model(model, config_of("peft lora"))
    peft.set_peft_model_state_dict(reference, peft.get_peft_model_state_dict(adapted))
    close(evaluate(adapted), evaluate(reference), 1e-4, "logits")
    truth = gradients(reference)
    for name, got in gradients(adapted).items():
        close(got, truth[name], 1e-4, name)
