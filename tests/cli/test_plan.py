"""`modicum plan` from the outside."""

from __future__ import annotations

import json

import pytest
import yaml
from tests import small_checkpoints
from tests.cli.adapter_files import run
from tests.fleet import fleets

from modicum.cli import main
from modicum.cli._common import size


def _run(capsys, *args):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", *args])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_the_headline_in_words(capsys):
    out = _run(
        capsys, "gpt3", "--targets", "q_proj,v_proj", "--users", "1000000", "--dtype", "float16",
        "--method", "lora_xs", "--method", "lora",
    )  # fmt: skip
    for part in ("144 MiB", "96 KiB", "1,536", "49,152", "1,000,000 users", "shared basis, once"):
        assert part in out


def test_the_headline_as_json(capsys):
    rows = json.loads(_run(capsys, "gpt3", "--targets", "q_proj", "--targets", "v_proj", "--json"))["rows"]
    assert {row["method"]: row["payload_bytes"] for row in rows}["lora_xs"] == 96 * 1024


def test_ranks_and_options(capsys):
    out = _run(
        capsys,
        "gpt3",
        "--method",
        "lora_xs",
        "--rank",
        "4",
        "--rank",
        "8",
        "--option",
        "core=diagonal",
        "--json",
    )
    assert [row["trained"] for row in json.loads(out)["rows"]] == [6 * 96 * 4, 6 * 96 * 8]


def test_what_peft_saves_besides(capsys):
    assert "of frozen numbers to every tiny_lora folder at rank 2" in _run(capsys, "gpt3", "--rank", "2")


def test_an_error_names_the_nearest(capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "gpt3", "--targets", "q_prj"])
    assert exit_.value.code == 1
    assert "did you mean 'q_proj'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (96 * 1024, "96 KiB"),
        (1536, "1.5 KiB"),
        (144 * 2**20, "144 MiB"),
        (5e15, "4547 TiB"),
    ],
)
def test_sizes(count, text):
    assert size(count) == text


@pytest.fixture
def fleet(tmp_path, monkeypatch):
    """The YAML of a small fleet, its users, and the job that trained them."""
    monkeypatch.chdir(tmp_path)
    fleets.table(tmp_path / "users.jsonl", (6, 9, 12, 7))
    values = {
        "model": {"name_or_path": str(small_checkpoints.llama())},
        "users": {"source": "users.jsonl"},
        "data": {"max_length": 64},
        "method": {"name": "lora_xs", "r": 4},
        "train": {"epochs": 2, "learning_rate": 2e-2, "tokens_per_pass": 300, "cohort_size": 2},
        "store": {"path": "store"},
    }
    path = tmp_path / "night.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_fleet_from_a_finished_job(fleet, tmp_path, capsys):
    assert run(capsys, "fleet", "train", fleet).code == 0
    (tmp_path / "prices.yaml").write_text("cpu_hour: 0.05\ncurrency: EUR\n")
    done = run(
        capsys, "plan", "--fleet", fleet, "--measured", "runs/night", "--users", "1000000", "--workers", "8",
        "--workers-per-machine", "4", "--mtbf", "1000", "--prices", "prices.yaml", "--gb-month", "0.02",
    )  # fmt: skip
    assert done.code == 0, done.err
    for part in (
        "1,000,000 users", "4 users of 8.5 rows", "500,000 of 2 users, passes of 300 tokens", "8 workers, 2 machines",
        "cohorts again", "containers", "shared basis", "EUR: cpu ", "storage ", "most cost", "measured: 2 cohorts",
    ):  # fmt: skip
        assert part in done.out, part
    half = run(capsys, "plan", "--fleet", fleet, "--measured", "runs/night", "--json").json
    assert half["users"] == 4
    assert half["cohorts"] == 2
    assert half["work"]["users"] == 4
    # what a plan wrote is a measurement for the next one
    (tmp_path / "plan.json").write_text(json.dumps(half))
    again = run(
        capsys, "plan", "--fleet", fleet, "--measured", "plan.json", "--users", "400", "--set",
        "train.min_steps=20", "--json",
    ).json  # fmt: skip
    assert again["work"]["steps"] == 200 * half["work"]["steps"]
    assert again["hours"]["value"] > 100 * half["hours"]["value"]


def test_a_fleet_that_is_measured_here(fleet, tmp_path, capsys):
    (tmp_path / "users.jsonl").unlink()
    words = ("plan", "--fleet", fleet, "--measure", "0.1", "--threads", "1")
    found = run(capsys, *words, "--rows", "10", "--tokens", "20", "--users", "5000", "--json").json
    assert found["work"]["steps"] == 5000 * 10
    assert found["measured"]["threads"] == 1
    assert found["rows_per_user"] == 10
    assert found["notes"] == ["reading rows was not measured: there are none yet"]
    assert sum(found["memory"].values()) > 2**20
    done = run(capsys, *words)
    assert done.code == 1
    assert "no file or folder" in done.err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "store").exists()


def test_everything_wrong_with_a_fleet_is_said_at_once(fleet, capsys):
    done = run(
        capsys, "plan", "embedded", "--rank", "4", "--fleet", fleet, "--set", "method.name=vera", "--users", "0",
        "--rows", "3", "--workers", "0", "--cpu-hour", "0.05", "--measured", "nowhere", "--measure", "-1",
        "--threads", "0",
    )  # fmt: skip
    assert done.code == 1
    for part in (
        "MODEL, --rank: not with --fleet", "no cohorts of 'vera'", "users = 0", "go together", "workers = 0",
        "set currency", "nowhere is no measured fleet", "either measured", "measure = -1", "threads = 0",
    ):  # fmt: skip
        assert part in done.err, part
    done = run(capsys, "plan", "--fleet", fleet, "--measure", "1", "--prices", "absent.yaml", "--kwh", "1")
    assert done.code == 2
    done = run(capsys, "plan", "gpt3", "--workers", "4", "--measure", "1")
    assert "--measure, --workers: only with --fleet" in done.err
    assert "give a MODEL" in run(capsys, "plan").err
    done = run(capsys, "plan", "--fleet", fleet, "--prices", "absent.yaml", "--set", "method.r=400")
    for part in ("cannot read the prices absent.yaml", "lora_xs does not fit", "either measured"):
        assert part in done.err, part
