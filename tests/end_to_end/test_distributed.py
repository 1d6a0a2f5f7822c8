"""Two CPU processes give the result of one: the same rows per step, only the main one writes."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.docs.pages import ROOT
from tests.small_checkpoints import recipe_values

from modicum.train.recipe import make_recipe
from modicum.train.run import tune

SPACE = {
    "groups": [
        {"rank": ["heads.outputs"], "choices": [4, 2, 1]},
        {"width": "mlp", "choices": [1.0, 0.75, 0.5]},
        {"rank": ["heads.inputs"], "choices": [4, 1]},
    ]
}
# the first recipe is broken off in its second epoch and resumed; all in one process, because starting Python takes
# longer than training
COMMANDS = """
import sys
from modicum.cli import main
from modicum.train.callbacks import Meter

def run(*words):
    try:
        main(["tune", "--json", "--config", *words])
    except SystemExit as stop:
        print("exit", stop.code, flush=True)

whole = Meter.on_step_end
def broken(self, args, state, control, **kwargs):
    whole(self, args, state, control, **kwargs)
    if state.global_step == 5:
        raise KeyboardInterrupt

Meter.on_step_end = broken
run(sys.argv[1])
Meter.on_step_end = whole
run(sys.argv[1], "--resume")
for file in sys.argv[2:-1]:
    run(file)
from modicum.evaluate.resources import resident_peak
print("peak", resident_peak(), flush=True)
run(sys.argv[-1])
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def in_two_processes(*files) -> list[str]:
    processes, port = [], free_port()
    for rank in range(2):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{key: str(value) for key, value in (ranks | address).items()}}
        command = [sys.executable, "-c", COMMANDS, *map(str, files)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    return [process.communicate(timeout=300)[0] for process in processes]


def test_two_processes_equal_one(tmp_path):
    files, alone = [], []
    for name in ("causal_lm", "seq_cls", "elastic"):
        folder = tmp_path / name
        folder.mkdir()
        task = "seq_cls" if name == "seq_cls" else "causal_lm"
        # three steps make an epoch, so that the second checkpoint lies inside the second one
        values = recipe_values(folder, task, batch_size=8, eval_steps=2)
        if name == "elastic":
            # processes that drew different sub-networks would average the gradients of different ones
            values["method"] = {"name": "elastic_lora", "r": 4, "alpha": 8}
            values["elastic"] = {"space": SPACE, "sampling": "sandwich", "samples": 1, "distill": True}
            values["train"] |= {"gradient_accumulation_steps": 2, "batch_size": 4}
        elif task == "seq_cls":
            values["sweep"] = {"learning_rate": [1e-3, 5e-3]}
            values["data"]["test"] = values["data"]["validation"]
        else:
            values["method"] = {"name": "lora_xs", "r": 2}
        alone.append(tune(make_recipe({**values, "output": str(folder / "one")})))
        files.append(folder / "recipe.yaml")
        files[-1].write_text(yaml.safe_dump({**values, "output": str(folder / "two")}))
    odd = tmp_path / "odd.yaml"
    odd.write_text(yaml.safe_dump(recipe_values(tmp_path, batch_size=5)))
    main, other = (text.splitlines() for text in in_two_processes(*files, odd))
    for lines in (main, other):
        assert [line for line in lines if line.startswith("exit")] == [
            "exit 130",
            "exit 0",
            "exit 0",
            "exit 0",
            "exit 1",
        ]
    results = [json.loads(line) for line in main if '"recipe_digest"' in line]
    assert len(results) == 3
    # only the main process writes results
    assert not any('"recipe_digest"' in line for line in other)
    assert "train.batch_size = 5 rows do not divide over 2 devices" in main[-2]
    assert results[0]["processes"] == 2
    assert results[0]["timing"]["resumed_from"] == "checkpoint-4"
    # a run took what its processes took together
    peaks = [int(line.split()[1]) for lines in (main, other) for line in lines if line.startswith("peak")]
    assert len(peaks) == 2
    assert results[-1]["resources"]["peak_memory_bytes"] > 1.3 * max(peaks)

    for one, together in zip(alone, results, strict=True):
        adapters = sorted(one.folder.rglob("adapter_model.safetensors"))
        assert adapters
        for path in adapters:
            expected = load_file(path)
            found = load_file(one.folder.with_name("two") / path.relative_to(one.folder))
            for name, tensor in expected.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
        for split in ("validation", "test"):
            for name, value in (one.metrics[split] or {}).items():
                pair = [
                    v["value"] if isinstance(v, dict) else v
                    for v in (value, together["metrics"][split][name])
                ]
                assert pair[0] == pytest.approx(pair[1], rel=1e-5), name


@pytest.mark.slow
def test_accelerate_launches_two_processes_that_equal_one(tmp_path):
    """The command of the page, with what says that there are two processes and no GPUs."""
    text = (ROOT / "docs" / "do" / "fleet.md").read_text(encoding="utf-8")
    (page,) = re.findall(r"`accelerate (launch) -m modicum tune`", text)
    values = recipe_values(tmp_path, batch_size=8, max_steps=4)
    values["method"] = {"name": "lora_xs", "r": 2}
    one = tune(make_recipe({**values, "output": str(tmp_path / "one")}))
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({**values, "output": str(tmp_path / "two")}))
    command = [sys.executable, "-m", f"accelerate.commands.{page}", "--multi_gpu", "--num_processes", "2"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command += [
        "--main_process_port",
        str(free_port()),
        "-m",
        "modicum",
        "tune",
        "--json",
        "--config",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = [json.loads(line) for line in done.stdout.splitlines() if '"recipe_digest"' in line]
    assert result["processes"] == 2
    expected = load_file(one.adapter / "adapter_model.safetensors")
    found = load_file(tmp_path / "two" / "adapter" / "adapter_model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=name)
