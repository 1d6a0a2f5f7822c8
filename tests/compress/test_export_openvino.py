"""Models exported to OpenVINO compute the same logits, token by token and in any cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.compress import export_cases as cases
from tests.conftest import ROOT

from modicum.compress.export import export_model

openvino = pytest.importorskip("openvino", reason="openvino is not installed")
#: everything in float32, so that what is left is the order of additions
PLAIN = {
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "INFERENCE_NUM_THREADS": 1,
}


def opened(folder):
    compiled = openvino.Core().compile_model(folder / "openvino_model.xml", "CPU", PLAIN)
    return compiled.create_infer_request()


def dense(layer):
    linear = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    linear.weight.data = layer.dequantized()
    return linear


def run(request, given, start, stop, rows=(0, 1)):
    """Logits of the tokens start … stop, after those before them; `rows` is where each row's past is."""
    inputs = {
        "input_ids": given.ids[:, start:stop],
        "attention_mask": given.mask[:, :stop],
        "position_ids": given.positions[:, start:stop],
        "beam_idx": np.array(rows, np.int32),
    }
    return request.infer(inputs)["logits"].copy()


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_logits_are_ours(case, tmp_path):
    model, given = case.model(), cases.batch()
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "openvino")
    assert (result.exact, result.max_weight_error, result.max_update_error) == (True, 0.0, 0.0)
    request = opened(tmp_path / "out")
    found = np.concatenate([run(request, given, a, b) for a, b in ((0, 5), (5, 6), (6, 9))], 1)
    wanted = cases.logits(model, given)
    assert cases.relative(found[given.real], wanted[given.real]) < 1e-5
    assert set(result.files) >= {"openvino_model.xml", "openvino_model.bin", "config.json", "tokenizer.json"}


def test_the_cache_can_be_reordered_and_emptied(tmp_path):
    model, given = cases.Case().model(), cases.batch(padded=0)
    export_model(model, cases.tokenizer(), tmp_path / "out", "openvino")
    request = opened(tmp_path / "out")
    first = run(request, given, 0, 8)
    swapped = run(request, given, 8, 9, rows=(1, 0))
    turned = cases.Batch(
        np.concatenate([given.ids[::-1, :8], given.ids[:, 8:]], 1), given.mask, given.positions
    )
    assert cases.relative(swapped, cases.logits(model, turned)[:, 8:]) < 1e-5
    request.reset_state()
    assert np.array_equal(run(request, given, 0, 8), first)


def test_the_default_settings_round_inputs_and_the_page_says_how_not_to(tmp_path):
    model, given = cases.Case().model(), cases.batch(padded=0)
    export_model(model, cases.tokenizer(), tmp_path / "out", "openvino")
    defaults = (
        openvino.Core().compile_model(tmp_path / "out" / "openvino_model.xml", "CPU").create_infer_request()
    )
    assert cases.relative(run(defaults, given, 0, 9), cases.logits(model, given)) < 0.08
    page = (ROOT / "docs" / "do" / "export-to-engines.md").read_text(encoding="utf-8")
    assert not [name for name in PLAIN if name not in page and name != "INFERENCE_NUM_THREADS"]


@pytest.mark.parametrize("group", [4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 172, 256, 384])
def test_every_group_size_computes(group, tmp_path):
    """OpenVINO is wrong without a word for some; one and a few rows take different kernels."""
    sizes = {"hidden_size": 2 * group, "intermediate_size": 3 * group, "head_dim": 8}
    model, given = cases.Case(block=(1, 4), options=sizes).model(), cases.batch(padded=0)
    for name, module in cases.low_bit(model).items():
        if "mlp" in name:
            model.set_submodule(name, cases.Case(block=(1, group)).layer(dense(module)))
    export_model(model, cases.tokenizer(), tmp_path / "out", "openvino")
    request = opened(tmp_path / "out")
    found = np.concatenate([run(request, given, a, b) for a, b in ((0, 5), (5, 6), (6, 9))], 1)
    assert cases.relative(found, cases.logits(model, given)) < 1e-5


def test_the_codes_are_stored_in_four_bits(tmp_path):
    model = cases.Case().model()
    export_model(model, cases.tokenizer(), tmp_path / "out", "openvino")
    graph = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    stored = [
        op
        for op in graph.get_ops()
        if op.get_type_name() == "Constant" and op.get_element_type().get_type_name() == "i4"
    ]
    assert len(stored) == len(cases.low_bit(model)) == 14
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()


def test_generation_continues_as_ours(tmp_path):
    model, tokenizer = cases.embedded()
    export_model(model, tokenizer, tmp_path / "out", "openvino")
    request, ids = opened(tmp_path / "out"), tokenizer("The weather today is", return_tensors="np").input_ids
    wanted = model.generate(torch.from_numpy(ids), max_new_tokens=12, do_sample=False)[0].tolist()
    tokens, start = ids[0].tolist(), 0
    while len(tokens) < len(wanted):
        given = cases.Batch(
            np.array([tokens]), np.ones((1, len(tokens)), np.int64), np.arange(len(tokens))[None]
        )
        found = run(request, given, start, len(tokens), rows=(0,))
        start = len(tokens)
        tokens.append(int(found[0, -1].argmax()))
    assert tokens == wanted
