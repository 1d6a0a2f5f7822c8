"""The comparisons that ship, as far as they are checked without their models and texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from modicum.compare.spec import load_comparison

ROOT = Path(__file__).parents[2]
ABLATIONS = sorted((ROOT / "recipes/ablations").glob("*.yaml"))
MEASURED = sorted((ROOT / "benchmarks/quality/comparisons").glob("*.yaml"))
#: what all ablations share is an ordinary recipe
SHARED = "notes"


# PEFT says what save_projection: false means
@pytest.mark.filterwarnings("ignore:Specified to not save vera_A:UserWarning")
@pytest.mark.parametrize(
    "path",
    [path for path in [*ABLATIONS, *MEASURED] if path.parent.name != "ablations" or path.stem != SHARED],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_they_are_valid_and_sweep_rates_on_three_seeds(path):
    spec = load_comparison(path)
    assert path.read_text().startswith("#")
    assert len(spec.options.seeds) >= 3
    for cell in spec.cells:
        assert len(cell.rates) >= 3, cell.label
    assert len({cell.label for cell in spec.cells}) >= 3


def test_ablations_change_one_thing():
    assert {path.stem for path in ABLATIONS} == {"basis", "directions", "rank", "sigma", "targets", SHARED}
    for path in ABLATIONS:
        if path.stem != SHARED:
            assert {cell.method for cell in load_comparison(path).cells} == {"lora_xs"}, path.stem
