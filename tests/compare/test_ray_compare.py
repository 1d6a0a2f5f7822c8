"""A comparison whose runs are tasks on a local Ray of two processes: the same tables, also after an interruption."""

from __future__ import annotations

import pytest
from tests.compare.small import comparison_values
from tests.compare.test_run import alone, by_name
from tests.jobs import rays

from modicum.compare.report import write_report
from modicum.compare.run import run_comparison
from modicum.compare.spec import make_comparison
from modicum.errors import MissingExtraError

try:
    import ray
except ImportError:
    ray = None

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of several kinds


def spec_in(folder, output):
    """A comparison of two cells and four runs, with its data in `folder`."""
    values = comparison_values(folder, compressions={"none": {}}, threads=1, workers=2)
    values["methods"] = {"lora": values["methods"]["lora"]}
    return make_comparison({**values, "output": str(folder / output)})


def test_without_ray_nothing_is_begun(tmp_path):
    if ray is not None:
        pytest.skip("Ray is installed")
    with pytest.raises(MissingExtraError, match=r"modicum\[ray\]"):
        run_comparison(spec_in(tmp_path, "out"), ray=True)
    assert not (tmp_path / "out").exists()


class StopError(Exception):
    """An interruption."""


@pytest.mark.slow
def test_tables_are_the_same_with_a_killed_worker_and_after_an_interruption(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (modicum[ray])")
    folder, told, killed = tmp_path / "out", [], []

    def say(line):
        told.append(line)
        if " seed " in line and not killed:
            # whoever is at work just now; nobody waits here for somebody to be
            killed.extend(filter(None, [rays.kill_one()]))
        elif killed and " seed " in line:
            raise StopError

    with pytest.raises(StopError):
        run_comparison(spec_in(tmp_path, "out"), ray=True, say=say, publish=write_report)
    assert rays.gone(rays.processes())
    done = {path: path.stat().st_mtime_ns for path in folder.glob("cells/**/report.json")}
    assert len(done) >= 2
    assert not any("FAILED" in line for line in told)
    found = run_comparison(
        spec_in(tmp_path, "out"), resume=True, ray=True, say=told.append, publish=write_report
    ).comparison
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items())
    expected = by_name(run_comparison(spec_in(tmp_path, "alone"), publish=write_report).comparison)
    cells = by_name(found)
    assert len(cells) == 2
    for name, cell in cells.items():
        assert cell["state"] == "done"
        assert alone(cell) == alone(expected[name]), name
    assert rays.gone(rays.processes())
