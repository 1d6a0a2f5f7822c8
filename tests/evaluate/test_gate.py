"""Gates: each kind kept and not kept, what cannot be measured, and files of gates that are wrong."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
import yaml
from tests import models_for_tests as models
from tests.docs.pages import ROOT
from tests.evaluate.record_files import records

from modicum.errors import ConfigError
from modicum.evaluate import gate_file
from modicum.evaluate import statistics as paired
from modicum.evaluate.gate import check_gates, write_json, write_junit
from modicum.evaluate.gate_file import BYTES, COUNTS, quantity

PAGE = ROOT / "docs" / "do" / "compare-versions.md"
OLD = [1.0] * 180 + [0.0] * 20


@pytest.fixture
def check(tmp_path, monkeypatch):
    """What becomes of gates, with paths relative to a folder of their own."""
    monkeypatch.chdir(tmp_path)

    def verdicts(*gates):
        (tmp_path / "gates.yaml").write_text(yaml.safe_dump({"gates": list(gates)}))
        return check_gates("gates.yaml").verdicts

    return verdicts


def test_not_worse_is_judged_at_the_far_end(check, tmp_path):
    records(OLD).write(tmp_path / "old.parquet")
    records([0.0, *OLD[1:]]).write(tmp_path / "new.parquet")
    low = paired.score_interval(0, 1, 200).low
    assert -0.028 < low < -0.02
    gate = {"records": "new.parquet", "than": "old.parquet"}
    kept, not_kept = check(
        {"not_worse": {**gate, "by": "3 points"}}, {"not_worse": {**gate, "by": "1 point"}}
    )
    # half a point is lost, but 200 items do not show that it is less than one
    assert (kept.passed, not_kept.passed) == (True, False)
    assert kept.measured == not_kept.measured == pytest.approx(-low)
    assert (kept.limit, not_kept.limit) == pytest.approx((0.03, 0.01))
    assert kept.shown.startswith("-0.5 points [-2.")
    assert kept.shown.endswith("(200 items)")
    assert kept.compared == "new.parquet against old.parquet, correct"
    (sure,) = check({"not_worse": {**gate, "by": "2 points", "confidence": 0.5}})
    assert sure.passed


def test_not_worse_in_losses_and_perplexity(check, tmp_path):
    random = np.random.default_rng(0)
    old = random.normal(8, 1, 300)
    new = old + random.normal(0.04, 0.02, 300)  # of four tokens: 0.01 nats each
    records([None] * 300, old.tolist()).write(tmp_path / "old" / "x.parquet")
    records([None] * 300, new.tolist()).write(tmp_path / "new" / "x.parquet")
    gates = [
        {"not_worse": {"records": "new", "than": "old", "metric": metric, "by": by}}
        for metric, by in (
            ("loss", "0.012 nats"),
            ("loss", "0.009 nats"),
            ("perplexity", "1.2 %"),
            ("perplexity", "1 %"),
        )
    ]
    found = check(*gates)
    assert [verdict.passed for verdict in found] == [True, False, True, False]
    assert found[0].measured == pytest.approx(0.0106, abs=0.0004)
    assert found[2].measured == pytest.approx(0.0107, abs=0.0004)
    (better,) = check({"not_worse": {"records": "old", "than": "new", "metric": "loss", "by": "0 nats"}})
    assert better.passed


def test_metrics(check, tmp_path):
    records(OLD, [2.0] * 200).write(tmp_path / "a" / "x.parquet")
    records([0.0] * 200, [6.0] * 200, task="y").write(tmp_path / "a" / "y.parquet")
    gates = [
        ({"at_least": "45 %"}, True), ({"at_least": 0.46}, False), ({"at_least": 0.9, "task": "x"}, True),
        ({"at_most": 0.4}, False), ({"metric": "loss", "at_most": 1.0}, True),
        ({"metric": "loss", "at_most": 0.99}, False),
        ({"metric": "perplexity", "at_most": 2.72}, True), ({"metric": "perplexity", "at_least": 2.72}, False),
        ({"metric": "loss", "task": "y", "at_most": 1.5}, True),
    ]  # fmt: skip
    found = check(*({"metric": {"records": "a", **options}} for options, _ in gates))
    assert [verdict.passed for verdict in found] == [passed for _, passed in gates]
    assert (found[0].measured, found[0].limit) == (0.45, 0.45)
    (missing,) = check({"metric": {"records": "a", "task": "z", "at_least": 0}})
    assert "no task 'z'" in missing.error


def test_sizes(check, tmp_path):
    (tmp_path / "adapter" / "deep").mkdir(parents=True)
    (tmp_path / "adapter" / "a").write_bytes(b"." * 1000)
    (tmp_path / "adapter" / "deep" / "b").write_bytes(b"." * 24)
    sizes = [("adapter", "1 KiB"), ("adapter", "1023 B"), ("adapter/a", "1 KB"), ("adapter/a", "0.99 kb")]
    found = check(*({"size": {"path": path, "at_most": size}} for path, size in sizes))
    assert [verdict.passed for verdict in found] == [True, False, True, False]
    assert (found[0].measured, found[0].limit) == (1024, 1024)


def test_latency(check, tmp_path):
    turns = {"base": [0.010] * 19 + [0.050], "small": [0.005] * 18 + [0.020, 0.040]}
    bench = {
        "baseline": "base",
        "models": [{"name": n, "decode_seconds": t, "prefill_seconds": []} for n, t in turns.items()],
    }
    (tmp_path / "times.json").write_text(json.dumps(bench))
    p95 = float(np.quantile(turns["small"], 0.95))
    gates = [
        ({"at_most": "5 ms"}, True), ({"at_most": "4.9 ms"}, False), ({"model": "base", "at_most": "0.01 s"}, True),
        ({"quantile": "p95", "at_most": f"{p95 + 1e-6} s"}, True),
        ({"quantile": "p95", "at_most": f"{p95 - 1e-6} s"}, False),
        ({"at_most_times_baseline": 0.5}, True), ({"at_most_times_baseline": 0.49}, False),
    ]  # fmt: skip
    found = check(*({"latency": {"bench": "times.json", **options}} for options, _ in gates))
    assert [verdict.passed for verdict in found] == [passed for _, passed in gates]
    assert found[5].measured == 0.5
    assert "times that of base" in found[5].shown
    wrong = check(
        {"latency": {"bench": "times.json", "model": "smal", "at_most": "1 s"}},
        {"latency": {"bench": "times.json", "of": "prefill", "at_most": "1 s"}},
        {"latency": {"bench": "gates.yaml", "at_most": "1 s"}},
    )
    assert "did you mean 'small'" in wrong[0].error
    assert "no prefill times of small, base" in wrong[1].error
    assert "no output of `modicum bench --output`" in wrong[2].error
    (tmp_path / "times.json").write_text(
        json.dumps({**bench, "models": [*bench["models"], bench["models"][1] | {"name": "c"}]})
    )
    assert "name one with `model`" in check({"latency": {"bench": "times.json", "at_most": "1 s"}})[0].error


def test_the_same(check, tmp_path):
    base = [2.0] * 200
    records(OLD, base).write(tmp_path / "unmerged.parquet")
    records(OLD, [2.0 + 4e-4, *base[1:]], backwards=True).write(tmp_path / "near.parquet")
    records([0.0, *OLD[1:]], base).write(tmp_path / "other.parquet")
    records(OLD, [float("nan"), *base[1:]]).write(tmp_path / "nan.parquet")
    records(OLD).write(tmp_path / "none.parquet")
    found = check(
        *(
            {"same": {"records": f"{name}.parquet", "other": "unmerged.parquet", "tolerance": tolerance}}
            for name, tolerance in (
                ("near", 1.1e-4),
                ("near", 0.9e-4),
                ("other", 1),
                ("nan", 1),
                ("none", 1),
                ("unmerged", 1),
            )
        )
    )
    assert [verdict.passed for verdict in found] == [True, False, False, False, False, False]
    assert found[0].measured == pytest.approx(1e-4)
    assert "(x/x-0)" in found[0].shown
    assert found[2].shown.startswith("1 of 200 items answered otherwise (first: x/x-0)")
    assert "200 of 200" in found[4].shown
    assert "compared with itself" in found[5].error


def test_models(check, tmp_path):
    model = models.llama()
    torch.nn.init.zeros_(model.model.layers[0].mlp.up_proj.weight)
    model.save_pretrained(tmp_path / "model")
    linear = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    share = sum((w == 0).sum().item() for w in linear) / sum(w.numel() for w in linear)
    numbers = sum(p.numel() for p in model.parameters())
    found = check(
        {"sparsity": {"model": "model", "at_least": share - 1e-6}},
        {"sparsity": {"model": "model", "at_least": f"{share * 100 + 0.01:.2f} %"}},
        {"parameters": {"model": "model", "at_most": f"{numbers / 1e3}K"}},
        {"parameters": {"model": "model", "at_most": numbers - 1}},
    )
    assert [verdict.passed for verdict in found] == [True, False, True, False]
    assert found[0].measured == pytest.approx(share)
    assert found[2].measured == numbers
    (tmp_path / "model" / "model.safetensors").write_bytes(b"damaged")
    (damaged,) = check({"parameters": {"model": "model", "at_most": 10**9}})
    assert not damaged.passed
    assert damaged.error.startswith("model: ")


def test_all_that_is_missing_fails_and_says_so(check, tmp_path):
    records(OLD).write(tmp_path / "there.parquet")
    found = check(
        {"not_worse": {"records": "new.parquet", "than": "there.parquet", "by": "1 point"}},
        {"metric": {"records": "gone", "at_least": 0}},
        {"size": {"path": "gone", "at_most": "1 KB"}},
        {"latency": {"bench": "gone.json", "at_most": "1 s"}},
        {"same": {"records": "there.parquet", "other": "gone.parquet"}},
        {"sparsity": {"model": "gone", "at_least": 0}},
        {"parameters": {"model": "gone", "at_most": "1B"}},
        {"name": "there", "metric": {"records": "there.parquet", "at_least": 0.5}},
    )
    assert [verdict.passed for verdict in found] == [False] * 7 + [True]
    for verdict, name in zip(found, ("new.parquet", *["gone"] * 6), strict=False):
        assert name in verdict.error
    assert [found[0].name, found[7].name] == ["not worse", "there"]
    assert found[3].error == "No such file or directory: gone.json"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"protocol": "lm-eval"}, "protocol differs: 'lm-eval' and 'choices'"),
        ({"template": "ef" * 16}, "template differs"),
        ({"rows": "0b" * 16}, "rows differs"),
        ({"decoding": {"num_beams": 4}}, "decoding differs"),
    ],
)
def test_records_under_other_conditions_are_refused(check, tmp_path, change, told):
    records(OLD, [2.0] * 200, rows="0a" * 16).write(tmp_path / "old.parquet")
    records(OLD, [2.0] * 200, **{"rows": "0a" * 16, **change}).write(tmp_path / "new.parquet")
    found = check(
        {"not_worse": {"records": "new.parquet", "than": "old.parquet", "by": "99 points"}},
        {"same": {"records": "new.parquet", "other": "old.parquet", "tolerance": 1}},
    )
    for verdict in found:
        assert not verdict.passed
        assert told in verdict.error


def test_reports(check, tmp_path):
    records(OLD).write(tmp_path / "a.parquet")
    check(
        {"name": "good <enough>", "metric": {"records": "a.parquet", "at_least": 0.8}},
        {"metric": {"records": "a.parquet", "at_least": 0.95}},
        {"size": {"path": "gone", "at_most": "1 KB"}},
    )
    report = check_gates("gates.yaml")
    write_junit(report, tmp_path / "out" / "gates.xml")
    root = ET.parse(tmp_path / "out" / "gates.xml").getroot()
    (suite,) = root
    assert root.tag == "testsuites"
    assert {key: suite.get(key) for key in ("tests", "failures", "errors")} == {
        "tests": "3", "failures": "1", "errors": "1",
    }  # fmt: skip
    good, bad, missing = suite
    assert [case.get("classname") for case in suite] == ["gate.metric", "gate.metric", "gate.size"]
    assert good.get("name") == "good <enough>: a.parquet, correct"
    assert [child.tag for case in suite for child in case] == ["system-out", "failure", "error"]
    assert bad[0].get("message") == "correct 90.0 % (200 items); limit: at least 95.0 %"
    assert missing[0].get("message") == "nothing at gone"
    write_json(report, tmp_path / "gates.json")
    saved = json.loads((tmp_path / "gates.json").read_text())
    assert (saved["passed"], saved["verdicts"][1]["measured"], saved["verdicts"][1]["limit"]) == (
        False,
        0.9,
        0.95,
    )


WORSE = {"records": "a", "than": "b", "by": "1 point"}


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"not_wors": WORSE}, "gate 1 not_wors: no such option (did you mean 'not_worse'?)"),
        (
            {"not_worse": {**WORSE, "record": "a"}},
            "not_worse record: no such option (did you mean 'records'?)",
        ),
        ({"not_worse": {"records": "a", "by": "1 point"}}, "gate 1 not_worse than is missing"),
        ({"not_worse": {**WORSE, "by": 1}}, "not_worse by"),
        ({"not_worse": {**WORSE, "by": "1 nats"}}, "no unit 'nats'; known: point, points"),
        ({"not_worse": {**WORSE, "by": "-1 point"}}, "must not be below 0"),
        ({"not_worse": {**WORSE, "metric": "perplexity"}}, "no unit 'point'; known: %"),
        ({"not_worse": WORSE, "size": {"path": "a", "at_most": "1 B"}}, "it has not_worse, size"),
        ({"name": "nothing"}, "it has none"),
        ({"size": {"path": "a", "at_most": 60}}, "at_most = 60: no unit; known: B, KB"),
        ({"size": {"path": "a", "at_most": "many KB"}}, "no number"),
        ({"metric": {"records": "a"}}, "give one limit: at_least or at_most"),
        ({"metric": {"records": "a", "at_least": 1, "at_most": 1}}, "give one limit"),
        ({"latency": {"bench": "a"}}, "give one limit: at_most or at_most_times_baseline"),
        ({"latency": {"bench": "a", "at_most": "3 min"}}, "no unit 'min'; known: s, ms, us"),
    ],
)
def test_wrong_gates(check, gate, told):
    with pytest.raises(ConfigError) as refused:
        check(gate)
    assert told in str(refused.value)


def test_all_faults_at_once(check):
    with pytest.raises(ConfigError) as refused:
        check({"sizes": {}}, {"size": {"path": "a", "at_most": 60}}, {"metric": {"records": "a"}})
    assert [line.split(": ")[1].split()[:2] for line in str(refused.value).splitlines()] == [
        ["gate", "1"], ["gate", "2"], ["gate", "3"],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["gates: [", "- a", "gates: []", "gate: []"])
def test_no_file_of_gates(tmp_path, text):
    file = tmp_path / "gates.yaml"
    with pytest.raises(ConfigError, match="cannot read the gates"):
        check_gates(file)
    file.write_text(text)
    with pytest.raises(ConfigError, match="gates"):
        check_gates(file)


def test_quantities():
    assert quantity("1_000 KiB", BYTES) == quantity("1,000kib", BYTES) == 1_024_000
    assert quantity("5e-1 GB", BYTES) == 5e8
    assert quantity(12, COUNTS) == 12
    assert quantity("1.2b", COUNTS) == 1.2e9


def test_the_gates_that_are_shown_can_be_read(tmp_path):
    shown = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    shown += re.findall(r"```yaml\n(.*?)```", gate_file.__doc__, re.DOTALL)
    assert len(shown) == 2
    for text in shown:
        (tmp_path / "gates.yaml").write_text(text)
        kinds = {gate.kind for gate in gate_file.read_gates(tmp_path / "gates.yaml")}
        assert kinds == {"not_worse", "metric", "size", "latency", "same", "sparsity", "parameters"}
