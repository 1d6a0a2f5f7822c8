"""Results of comparisons, as the documentation shows them: each of the files through `modicum compare`.

    python benchmarks/quality/compare.py FILE... --work FOLDER [--workers 3]

with FILE from benchmarks/quality/comparisons or recipes/ablations, in the root of the repository; some need ../shared.
What was interrupted goes on where it stopped. Results, all but the learning curves:
benchmarks/quality/results/compare_NAME.json.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from modicum.compare.markdown import table
from modicum.compare.report import write_report
from modicum.compare.run import run_comparison
from modicum.compare.spec import load_comparison

RESULTS = Path(__file__).parent / "results"


def shown(comparison: dict[str, Any], command: str) -> dict[str, Any]:
    """The table of the reports with a shorter note: several stand on one page, which says how to read them."""
    metric = comparison["metric"]
    untrained = ", ".join(f"{values[metric]:.3f}" for values in comparison["untrained"].values())
    note = f"{comparison['name']}; without training the {metric} is {untrained}. Made by `{command}`."
    return {**table(comparison), "note": note}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    for file in options.files:
        spec = load_comparison(file).with_options(
            output=str(options.work / file.stem), workers=options.workers, threads=1
        )
        result = run_comparison(spec, resume=True, say=print, publish=write_report)
        command = f"python benchmarks/quality/compare.py {file} --work FOLDER"
        found = {"command": command, "table": shown(result.comparison, command), **result.comparison}
        for cell in found["cells"]:
            cell.pop("curves")
        (RESULTS / f"compare_{file.stem}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
