"""Comparisons as wholes: what they find, that being interrupted changes nothing, and what failures leave."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from pyarrow import parquet
from tests.compare.small import changed, numbers, reference, write
from tests.small_checkpoints import recipe_values

from modicum.cli import main
from modicum.compare.bases import base_bytes, base_report, make_base
from modicum.compare.report import write_report
from modicum.compare.run import check, crowded, run_comparison
from modicum.compare.spec import load_comparison, make_comparison
from modicum.errors import ConfigError
from modicum.jobs.cluster import ADDRESS

#: of a cell's entry, what depends on the other cells
_RELATIVE = ("significantly_worse_than_best", "p_value", "difference")


def read(folder):
    return json.loads((folder / "comparison.json").read_text())


def by_name(comparison):
    return {(cell["compression"], cell["label"]): cell for cell in comparison["cells"]}


def alone(cell):
    return numbers({key: value for key, value in cell.items() if key not in _RELATIVE})


def modicum(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, arguments)])
    return ended.value.code, capsys.readouterr()


def test_more_threads_than_cores_are_told_unless_other_machines_have_them(monkeypatch):
    monkeypatch.delenv(ADDRESS, raising=False)
    assert crowded(8, 8, ray=False) is None
    assert "9 threads on 8 cores" in crowded(9, 8, ray=False)
    # a local Ray has the same cores
    assert crowded(9, 8, ray=True) == crowded(9, 8, ray=False)
    monkeypatch.setenv(ADDRESS, "head:6379")
    assert crowded(9, 8, ray=True) is None
    assert "9 threads" in crowded(9, 8, ray=False)


def test_every_cell_is_measured(tmp_path):
    folder = reference()
    found = read(folder)
    cells = by_name(found)
    labels = ("lora r=1", "lora r=2", "xs r=2", "xs r=4")
    assert list(cells) == [(base, label) for base in ("none", "4bit") for label in labels]
    assert {cell["state"] for cell in cells.values()} == {"done"}
    # two layers; per layer LoRA-XS trains r² in each of 7 matrices
    assert {label: cells["4bit", label]["trained_values"] for label in labels[2:]} == {
        "xs r=2": 56,
        "xs r=4": 224,
    }
    assert cells["none", "lora r=2"]["trained_values"] == 2 * cells["none", "lora r=1"]["trained_values"]
    for (base, label), cell in cells.items():
        sweep = folder / "cells" / base / label
        summary = json.loads((sweep / "summary.json").read_text())
        assert cell["learning_rate"] == summary["best_learning_rate"]
        means = {rate["learning_rate"]: rate["validation"]["loss"]["value"] for rate in cell["rates"]}
        assert means[cell["learning_rate"]] == min(means.values())
        # test rows meet the chosen rate only, and nothing is chosen on them
        tested = sweep.glob("lr=*/seed=*/test.json")
        assert {file.parent.parent.name for file in tested} == {f"lr={cell['learning_rate']:g}"}
        reports = [json.loads(file.read_text()) for file in sweep.glob("lr=*/seed=*/report.json")]
        assert len(reports) == 2 * len(cell["rates"])
        assert all(report["metrics"]["test"] is None for report in reports)
        assert cell["metrics"]["loss"]["values"] == [run["metrics"]["loss"] for run in summary["test_runs"]]
        assert cell["at_edge"] == ("high" if len(cell["rates"]) > 1 else None)
        adapter = sweep / f"lr={cell['learning_rate']:g}" / "seed=0" / "adapter"
        files = [file for file in adapter.iterdir() if file.name != "README.md"]
        # the path of the base, which the adapter's configuration names, is not counted
        path = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert cell["stored_bytes"] == sum(file.stat().st_size for file in files) - len(path)
        assert cell["train_seconds"]["n"] == cell["cpu_seconds"]["n"] == 2
        assert cell["peak_memory_bytes"] > 100 << 20
        # two runs at a time share the counters of the machine
        assert cell["energy_joules"] is None
        assert [step for step, _ in cell["curves"][1]["train"]] == [1, 2, 3]
        assert cell["curves"][0]["validation"][-1][0] == 3


def test_shared_bytes_are_those_of_the_base_once():
    folder = reference()
    found = read(folder)
    for cell in found["cells"]:
        assert cell["shared_bytes"] == found["base"]["shared_bytes"][cell["compression"]]
    base = folder / "bases" / "4bit"
    needed = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert found["base"]["shared_bytes"]["4bit"] == sum((base / name).stat().st_size for name in needed)
    assert found["base"]["shared_bytes"]["4bit"] < found["base"]["shared_bytes"]["none"]


def test_the_bare_base_is_measured_on_the_same_rows():
    from modicum.data.prepare import prepare
    from modicum.evaluate.run import evaluate
    from modicum.models.loading import load_base, load_tokenizer

    folder = reference()
    recipe = load_comparison(folder / "comparison.yaml").recipe
    for name, path in (("none", recipe.model.name_or_path), ("4bit", str(folder / "bases" / "4bit"))):
        tokenizer = load_tokenizer(path)
        rows = prepare(recipe.data, tokenizer, "causal_lm").test
        expected = evaluate(load_base(path), tokenizer, rows, exact_match=False).metrics["loss"].value
        assert read(folder)["untrained"][name]["loss"] == pytest.approx(expected, rel=1e-5)


def test_runs_are_rows_of_a_table():
    folder = reference()
    rows = parquet.read_table(folder / "runs.parquet").to_pylist()
    assert len(rows) == 2 * 2 * (2 + 4)
    cells = by_name(read(folder))
    for row in rows:
        cell = cells[row["compression"], row["label"]]
        assert row["chosen"] == (row["learning_rate"] == cell["learning_rate"])
        assert (row["test_loss"] is not None) == row["chosen"]
        assert row["workers"] == 2
        assert (folder / row["folder"] / "report.json").is_file()
    assert "xs r=4" in (folder / "report.html").read_text()
    assert "xs r=4" in (folder / "report.md").read_text()


@pytest.mark.slow
def test_killed_and_resumed_it_ends_with_the_same_tables(tmp_path):
    """SIGKILL to everything at once, in the middle of a run; then another number of workers goes on."""
    values = changed(tmp_path / "out", compressions={"none": {}})
    values["methods"] = {
        name: {**entry, "ranks": entry["ranks"][:1]} for name, entry in values["methods"].items()
    }
    file, out = write(tmp_path, values), tmp_path / "out"
    command = [sys.executable, "-m", "modicum", "compare", str(file), "--workers", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while process.poll() is None and len(list(out.glob("cells/*/*/lr=*/seed=*/report.json"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.02)
    everybody = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    # nobody goes on writing when the one that started it is gone
    assert not psutil.wait_procs(everybody, timeout=20)[1]
    done = {path: path.stat().st_mtime_ns for path in out.glob("cells/**/report.json")}
    assert 2 <= len(done) < 6
    assert {cell["state"] for cell in read(out)["cells"]} >= {"missing"}
    with pytest.raises(ConfigError, match="holds a comparison: --resume"):
        run_comparison(load_comparison(file))
    told = []
    result = run_comparison(load_comparison(file).with_options(workers=2), resume=True, say=told.append)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    assert len([line for line in told if " seed " in line]) == 6 - len(done)
    expected = by_name(read(reference()))
    for name, cell in by_name(result.comparison).items():
        assert alone(cell) == alone(expected[name]), name
    assert len(result.comparison["cells"]) == 2
    # and once more, when there is nothing left to do
    again = run_comparison(load_comparison(file), resume=True)
    assert numbers(again.comparison) == numbers(result.comparison)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())


def classifier(tmp_path, **changes):
    recipe = recipe_values(tmp_path, "seq_cls", max_steps=2)
    del recipe["method"], recipe["output"]
    return {
        "recipe": recipe,
        "methods": {
            "lora": {"learning_rate": [1e-2]},
            "full": {"learning_rate": [1e-3]},
            "broken": {"name": "lora", "learning_rate": [1e-2], "train": {"optim": "no_such_optimizer"}},
            "diverging": {"name": "lora", "learning_rate": [1e30], "train": {"max_grad_norm": 0}},
        },
        "seeds": [0, 1],
        "output": str(tmp_path / "out"),
        **changes,
    }


def test_cells_that_fail_say_why_and_the_others_are_finished(tmp_path, capsys):
    file = write(tmp_path, classifier(tmp_path))
    code, said = modicum(capsys, file, "--workers", "2", "--json")
    assert code == 1
    found = json.loads(said.out)
    cells = {cell["label"]: cell for cell in found["cells"]}
    assert {label: cell["state"] for label, cell in cells.items()} == {
        "lora": "done", "full": "done", "broken": "failed", "diverging": "failed",
    }  # fmt: skip
    assert "no_such_optimizer" in cells["broken"]["error"]
    assert "seed 0" in cells["broken"]["error"]
    assert "diverged" in cells["diverging"]["error"]
    assert "FAILED" in said.err
    assert "no_such_optimizer" in next((tmp_path / "out" / "errors").glob("*broken*")).read_text()
    # the second seed of a cell that failed is not tried
    assert not list((tmp_path / "out").glob("cells/none/broken/**/report.json"))
    lora, full = cells["lora"], cells["full"]
    assert lora["trained_values"] - lora["trained_values_without_head"] == 2 * 32 + 2
    # without test rows the split is validation; a fresh head answers at random
    assert found["split"] == "validation"
    assert found["untrained"] == {"none": None}
    # every result of full fine-tuning is a model of its own
    assert full["shared_bytes"] == 0
    assert full["stored_bytes"] > found["base"]["shared_bytes"]["none"]
    assert full["trained_values"] > lora["trained_values"]
    # trying again keeps what is there
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/cells/none/*/summary.json")}
    assert len(stamps) == 3
    code, said = modicum(capsys, file, "--resume")
    assert code == 1
    assert "no_such_optimizer" in said.out
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())


def test_choosing_on_the_first_seed_runs_the_others_at_the_chosen_rate_only(tmp_path):
    values = changed(tmp_path / "out", select_on="first_seed", workers=1, compressions={"none": {}})
    values["methods"] = {"xs": {**values["methods"]["xs"], "ranks": [2]}}
    result = run_comparison(make_comparison(values), publish=write_report)
    (cell,) = result.comparison["cells"]
    counts = {rate["learning_rate"]: rate["validation"]["loss"]["n"] for rate in cell["rates"]}
    assert counts == {1e-3: 1, 5e-2: 2}
    # one run at a time: what the machine counted is its own
    assert {row["workers"] for row in parquet.read_table(tmp_path / "out" / "runs.parquet").to_pylist()} == {
        1
    }
    expected = by_name(read(reference()))["none", "xs r=2"]
    assert alone(cell)["metrics"] == alone(expected)["metrics"]


def test_a_folder_of_another_comparison_is_refused_with_every_difference(tmp_path):
    shutil.copytree(reference().parent, tmp_path / "copy")
    folder = tmp_path / "copy" / "out"
    stamp = (folder / "comparison.json").stat().st_mtime_ns
    values = yaml.safe_load((tmp_path / "copy" / "comparison.yaml").read_text())
    rows = tmp_path / "copy" / "validation.jsonl"
    rows.write_text(rows.read_text().replace("1+", "2+"))
    values |= {"output": str(folder), "seeds": [0, 5]}
    values["methods"]["lora"]["lora_alpha"] = 5
    values["recipe"]["train"]["max_steps"] = 4
    values["recipe"]["data"]["validation"] = str(rows)
    with pytest.raises(ConfigError) as caught:
        run_comparison(make_comparison(values), resume=True)
    for words in (
        "seeds: [0, 1] and [0, 5]",
        "methods.lora.lora_alpha: 4 and 5",
        "recipe.train.max_steps: 3 and 4",
        "rows.validation: ",
    ):
        assert words in str(caught.value)
    assert "rows.test" not in str(caught.value)
    assert (folder / "comparison.json").stat().st_mtime_ns == stamp


def test_two_at_a_time_in_one_folder_are_refused(tmp_path):
    import fcntl

    spec = make_comparison(changed(tmp_path / "out"))
    spec.folder.mkdir()
    with (spec.folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process is at work"):
            run_comparison(spec)


def test_a_base_of_several_stages_is_made_once_and_keeps_no_stage_between(tmp_path):
    stages = {
        "quantize": {"bits": 4, "group_size": 16, "algorithm": "rtn", "zero_point": "integer", "keep_zeros": True,
                     "evaluate": False},
        "sparsify": {"sparsity": 0.5, "algorithm": "magnitude", "evaluate": False},
    }  # fmt: skip
    spec = make_comparison(changed(tmp_path / "out", compressions={"small": stages}))
    data, _ = check(spec)
    assert base_report(spec, "small") is None
    make_base(spec, "small", data)
    folder = tmp_path / "out" / "bases"
    assert sorted(entry.name for entry in folder.iterdir()) == ["small", "small.json"]
    # sparse first, whatever the order in the file
    report = json.loads((folder / "small" / "quantization_report.json").read_text())
    assert report["zeros_kept"] == report["zeros"] >= 0.5 * report["quantized_weights"]
    found = base_report(spec, "small")
    assert found["bytes"] == base_bytes(folder / "small")
    weights = folder / "small" / "model.safetensors"
    stamp = weights.stat().st_mtime_ns
    (folder / "small.json").unlink()
    make_base(spec, "small", data)
    assert weights.stat().st_mtime_ns == stamp
    assert base_report(spec, "small") == found
