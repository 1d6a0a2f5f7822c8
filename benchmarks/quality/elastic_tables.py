"""What `elastic.py` measured, as result files and tables."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from modicum.evaluate.intervals import over_seeds
from modicum.train import artifacts

RESULTS = Path(__file__).parent / "results"
#: file of the learning rate that was chosen for an arm, in its folder
CHOSEN = "chosen.json"
PAIRED = "elastic_paired"
COMMAND = "python benchmarks/quality/elastic.py --shared ../shared --work FOLDER"
SHIPPED = "shipped "
#: question -> (arm, form) less (arm, form)
QUESTIONS: list[tuple[str, tuple[str, str], tuple[str, str]]] = [
    ("NLS, same rank", ("shears 50", "heuristic"), ("sparse 50 + lora r24", "whole")),
    ("NLS, largest rank", ("shears 50", "largest"), ("sparse 50 + lora r32", "whole")),
    ("half the weights gone", ("shears 50", "heuristic"), ("lora r32", "whole")),
    ("search in Shears 40", ("shears 40", "searched"), ("shears 40", "heuristic")),
    ("search in Shears 50", ("shears 50", "searched"), ("shears 50", "heuristic")),
    ("search in Shears 60", ("shears 60", "searched"), ("shears 60", "heuristic")),
    ("search in SQFT 4-bit", ("sqft 4-bit", "searched"), ("sqft 4-bit", "heuristic")),
    ("search in SparsePEFT", ("sparse_peft", "searched"), ("sparse_peft", "heuristic")),
    ("search in QA-SparsePEFT", ("qa_sparse_peft", "searched"), ("qa_sparse_peft", "heuristic")),
    ("price of 4 bits", ("sqft 4-bit", "heuristic"), ("shears 50", "heuristic")),
    ("price of the mask", ("sparse_peft", "shipped heuristic"), ("shears 50", "heuristic")),
    ("price of the grid", ("qa_sparse_peft", "shipped heuristic"), ("sqft 4-bit", "heuristic")),
    (
        "residuals",
        ("qa_sparse_peft", "shipped heuristic"),
        ("qa_sparse_peft, no residuals", "shipped heuristic"),
    ),
    ("reordering, heuristic", ("lonas", "shipped heuristic"), ("lonas, not reordered", "shipped heuristic")),
    ("reordering, searched", ("lonas", "shipped searched"), ("lonas, not reordered", "shipped searched")),
    ("LoNAS searched, alone", ("lonas", "shipped searched"), ("80 % alone", "shipped heuristic")),
    ("LoNAS against LoRA", ("lonas", "shipped searched"), ("lora r32", "whole")),
]


def collect(
    protocol: dict[str, Any], folders: dict[str, Path], forms: dict[str, list[str]], bases: Path
) -> dict[str, Any]:
    """The result file of a setting, from the arms that are complete."""
    import torch
    import transformers

    from modicum import __version__

    untuned = {}
    for base in ("dense", *protocol["bases"]):
        found = artifacts.read_json(bases / f"{base}-measured.json")
        if found is not None:
            untuned[base] = found | (artifacts.read_json(bases / f"{base}.json") or {})
    arms = {arm: _arm(folder, forms[arm], protocol["seeds"]) for arm, folder in folders.items()}
    arms = {arm: found for arm, found in arms.items() if found is not None}
    return {
        "what": f"{protocol['what']}, CPU, float32 computation",
        "command": COMMAND,
        "protocol": protocol,
        "versions": {
            "modicum": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "untuned": untuned,
        "arms": arms,
        "checks": _checks(arms),
        "table": _shown(protocol, untuned, arms),
    }


def _arm(folder: Path, forms: list[str], seeds: list[int]) -> dict[str, Any] | None:
    """Everything of an arm, seed by seed; None while something is missing."""
    summary = artifacts.read_json(folder / "summary.json")
    chosen = artifacts.read_json(folder / CHOSEN)
    if summary is None or chosen is None:
        return None
    rate = chosen["learning_rate"]
    runs = [folder / f"lr={rate:g}" / f"seed={seed}" for seed in seeds]
    measured: dict[str, list[dict[str, Any]]] = {}
    for form in forms:
        entries = [artifacts.read_json(run / f"measured-{form}.json") for run in runs]
        shipped = [artifacts.read_json(run / f"shipped-{form}.json") for run in runs]
        if None in entries or (any(shipped) and None in shipped):
            return None
        measured[form] = [entry for entry in entries if entry]
        if any(shipped):
            measured[SHIPPED + form] = [entry for entry in shipped if entry]
    reports = [artifacts.read_json(run / "report.json") or {} for run in runs]
    searches = [artifacts.read_json(run / "search" / "search.json") for run in runs]
    return {
        **chosen,
        "trained_values": summary["trained_values"]["adapter"],
        "stored_bytes": summary["stored_bytes"]["weights"],
        # of a median step: what else ran on the machine stopped some runs for minutes
        "step_seconds": [report["timing"]["seconds_per_step_median"] for report in reports],
        "peak_rss_bytes": max(report["resources"]["peak_memory_bytes"] for report in reports),
        "searches": [
            {key: search[key] for key in ("best", "whole", "space_size")}
            | {"points": len(search["points"]), "first": search["points"][0]["values"]}
            for search in searches
            if search
        ],
        "forms": measured,
    }


def _checks(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Over all that ships: the largest difference of any metric from the unmerged form, and revived zeros."""
    found = {}
    for arm, facts in arms.items():
        for form, entries in facts["forms"].items():
            if not form.startswith(SHIPPED):
                continue
            apart = facts["forms"][form.removeprefix(SHIPPED)]
            found[f"{arm}, {form}"] = {
                "largest_difference": max(
                    abs(one["metrics"][name] - other["metrics"][name])
                    for one, other in zip(entries, apart, strict=True)
                    for name in one["metrics"]
                    if name != "perplexity"
                ),
                "largest_logit_error": max(entry["logit_error"] for entry in entries),
                **({"revived": sum(e["revived"] for e in entries)} if "revived" in entries[0] else {}),
            }
    return found


def _worded(values: list[float], percent: bool) -> str:
    measure = over_seeds([100 * value for value in values] if percent else values)
    digits = 1 if percent or measure.value >= 100 else 2 if measure.value >= 3 else 3
    if measure.low is None or measure.high is None:
        return f"{measure.value:.{digits}f}"
    return f"{measure.value:.{digits}f} ± {(measure.high - measure.low) / 2:.{digits}f}"


def _shown(protocol: dict[str, Any], untuned: dict[str, Any], arms: dict[str, Any]) -> dict[str, Any]:
    """The documentation's table: bases untuned, then every arm, sub-network by sub-network."""
    score = protocol["score"]
    rows = [
        [
            base,
            "untuned",
            "–",
            "–",
            _worded([found["metrics"]["perplexity"]], False),
            _worded([found["metrics"][score]], True),
            f"{found['sparsity']:.0%}",
            "–",
            f"{found['bytes'] / 1e6:.2f}",
            "–",
        ]
        for base, found in untuned.items()
    ]
    for arm, facts in arms.items():
        base = untuned[protocol["arms"][arm]["base"]]
        for form, entries in facts["forms"].items():
            ships = form.startswith(SHIPPED)
            total = [e["parameters"] / e["parameters_before"] for e in entries if "parameters" in e]
            size = entries[0]["bytes"] if ships else base["bytes"] + facts["stored_bytes"]
            seconds = protocol["steps"] * median(facts["step_seconds"])
            rows.append(
                [
                    arm,
                    form.replace(SHIPPED, _way(protocol, arm)),
                    f"{facts['trained_values']:,}",
                    f"{facts['learning_rate']:g}",
                    *(
                        _worded([e["metrics"][name] for e in entries], percent)
                        for name, percent in (("perplexity", False), (score, True))
                    ),
                    f"{entries[0]['sparsity'] if ships else base['sparsity']:.0%}",
                    f"{sum(total) / len(total):.1%}" if total else "–",
                    f"{size / 1e6:.2f}",
                    f"{seconds:.0f}",
                ]
            )
    columns = ["arm", "sub-network", "trained", "rate", "perplexity", f"{score.replace('_', ' ')} (%)"]
    return {
        "columns": [*columns, "zeros", "parameters", "MB", "training, s"],
        "rows": rows,
        "note": (
            f"{protocol['what'][0].upper()}{protocol['what'][1:]}; {protocol['steps']} steps of {protocol['batch']} "
            "rows for every arm, learning rate swept on validation. Test rows; mean over three seeds ± half of "
            "Student's 95 % interval. `zeros`: share of the transformer layers' weights. `parameters`: what is left of "
            "all numbers, embeddings included and tied ones once, after extraction. `MB`: weights on disk, zeros "
            "stored as numbers, the whole adapter (float32) included where it is kept apart; dense models that ship in "
            f"{protocol['shipped_as']}, bases as the model came. Seconds: the steps at the median time of one, shared "
            f"machine, one thread. Made by `{COMMAND}`."
        ),
    }


def _way(protocol: dict[str, Any], arm: str) -> str:
    return {"merge": "merged, ", "extract": "extracted, "}.get(protocol["arms"][arm].get("ship"), "")


def paired_result(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The result file of the questions: differences within a seed, in all settings."""
    entries, rows = [], []
    for setting, result in found.items():
        score = result["protocol"]["score"]
        for question, left, right in QUESTIONS:
            sides = [result["arms"].get(arm, {}).get("forms", {}).get(form) for arm, form in (left, right)]
            if None in sides:
                continue
            gaps = {
                metric: [a["metrics"][metric] - b["metrics"][metric] for a, b in zip(*sides, strict=True)]
                for metric in ("loss", score)
            }
            means = {metric: asdict(over_seeds(values)) for metric, values in gaps.items()}
            entries.append(
                {"setting": setting, "question": question, "pair": [left, right]}
                | {"differences": gaps, "means": means}
            )
            cells = [_gap(means["loss"], 1), _gap(means[score], 100)]
            rows.append([setting, question, f"{', '.join(left)} − {', '.join(right)}", *cells])
    return {
        "what": "differences between arms, seed by seed",
        "command": COMMAND,
        "paired": entries,
        "table": {
            "columns": ["setting", "question", "difference", "loss", "score"],
            "rows": rows,
            "note": (
                "Mean over three seeds of the difference within a seed ± half of Student's 95 % interval, on test "
                "rows. Loss in nats per token: below zero the first is better; score in points (exact match on notes, "
                "else token accuracy): above zero it is. `*`: the interval excludes zero; of so many rows one in "
                "twenty does so by chance."
            ),
        },
    }


def _gap(mean: dict[str, Any], unit: int) -> str:
    value, half = unit * mean["value"], unit * (mean["high"] - mean["low"]) / 2
    digits = 3 if unit == 1 else 1
    return f"{value:+.{digits}f} ± {half:.{digits}f}{' *' if abs(value) > half else ''}"
