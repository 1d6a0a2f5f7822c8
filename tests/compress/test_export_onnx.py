"""Models exported to ONNX compute the same logits in onnxruntime, token by token and in any cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.compress import export_cases as cases

from modicum.compress.export import export_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


class Opened:
    """A session and the cache between its calls."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            folder / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        self.caches = [value for value in self.session.get_inputs() if value.name.startswith("past")]
        self.past = None

    def run(self, given, start, stop):
        shapes = ([len(given.ids), *value.shape[1:2], 0, *value.shape[3:]] for value in self.caches)
        past = self.past or [np.zeros(shape, np.float32) for shape in shapes]
        found, *self.past = self.session.run(
            None,
            {
                "input_ids": given.ids[:, start:stop],
                "attention_mask": given.mask[:, :stop],
                "position_ids": given.positions[:, start:stop],
                **{value.name: array for value, array in zip(self.caches, past, strict=True)},
            },
        )
        return found


@pytest.mark.parametrize("case", cases.CASES.values(), ids=cases.CASES)
def test_logits_are_ours(case, tmp_path):
    model, given = case.model(), cases.batch()
    result = export_model(model, cases.tokenizer(), tmp_path / "out", "onnx")
    assert (result.exact, result.max_weight_error, result.max_update_error) == (True, 0.0, 0.0)
    opened = Opened(tmp_path / "out")
    found = np.concatenate([opened.run(given, a, b) for a, b in ((0, 5), (5, 6), (6, 9))], 1)
    wanted = cases.logits(model, given)
    assert cases.relative(found[given.real], wanted[given.real]) < 1e-5
    assert set(result.files) >= {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("name", "fast"), [("4 bits", 14), ("integer zero-points, head too", 15), ("tiles", 0)]
)
def test_low_bit_layers_take_the_fast_path(name, fast, tmp_path):
    result = export_model(cases.CASES[name].model(), cases.tokenizer(), tmp_path / "out", "onnx")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == fast
    # float zero-points, a fourth input, would leave it
    assert all(len(node.input) == 3 for node in nodes)
    assert ("stored in full" in " ".join(result.notes)) == (fast == 0)


def test_inputs_are_rounded_on_request_only(tmp_path):
    model, given = cases.Case().model(), cases.batch(padded=0)
    export_model(model, cases.tokenizer(), tmp_path / "out", "onnx")
    wanted = cases.logits(model, given)
    assert cases.relative(Opened(tmp_path / "out").run(given, 0, 9), wanted) < 1e-5
    file = onnx.load(tmp_path / "out" / "model.onnx")
    for node in file.graph.node:
        if node.op_type == "MatMulNBits":
            node.attribute.append(onnx.helper.make_attribute("accuracy_level", 4))
    onnx.save_model(file, tmp_path / "out" / "model.onnx")
    assert 1e-3 < cases.relative(Opened(tmp_path / "out").run(given, 0, 9), wanted) < 0.08


def test_generation_continues_as_ours(tmp_path):
    model, tokenizer = cases.embedded()
    export_model(model, tokenizer, tmp_path / "out", "onnx")
    opened, ids = Opened(tmp_path / "out"), tokenizer("The weather today is", return_tensors="np").input_ids
    wanted = model.generate(torch.from_numpy(ids), max_new_tokens=12, do_sample=False)[0].tolist()
    tokens, start = ids[0].tolist(), 0
    while len(tokens) < len(wanted):
        given = cases.Batch(
            np.array([tokens]), np.ones((1, len(tokens)), np.int64), np.arange(len(tokens))[None]
        )
        found = opened.run(given, start, len(tokens))
        start = len(tokens)
        tokens.append(int(found[0, -1].argmax()))
    assert tokens == wanted
