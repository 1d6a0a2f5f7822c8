"""What a report says in sentences: what was found, how the numbers are to be read, under which conditions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from modicum.compare.columns import best_cell, compressions, count, metric_of, value_of, with_interval

if TYPE_CHECKING:
    from collections.abc import Iterator


def found(comparison: dict[str, Any]) -> list[str]:
    """What the comparison found: the best cell, the smallest one not told apart from it, and what did not finish."""
    metric, cells = comparison["metric"], comparison["cells"]
    states = [str(cell["state"]) for cell in cells]
    sentences = []
    best = best_cell(comparison)
    if best is not None:
        word = "Highest" if comparison["larger_is_better"] else "Lowest"
        sentences.append(f"{word} {metric}: {_shown(comparison, best)}.")
        # None where it was not tested
        level = [cell for cell in cells if cell.get("significantly_worse_than_best") is False]
        level = [cell for cell in level if metric_of(comparison, cell) and cell.get("trained_values")]
        smallest = min(level, key=lambda cell: cell["trained_values"], default=best)
        if smallest is not best and smallest["trained_values"] < (best.get("trained_values") or 0):
            sentences.append(
                f"Fewest trained values among those not told apart from it: {_shown(comparison, smallest)}."
            )
    rest = [f"{states.count(state)} {state}" for state in dict.fromkeys(states) if state != "done"]
    if rest:
        sentences.append(f"Of {len(cells)} cells, {states.count('done')} are done, {', '.join(rest)}.")
    return sentences


def reading(comparison: dict[str, Any]) -> list[str]:
    """How the numbers are to be read: over what they are means, what ± is, how rates were chosen, what is flagged."""
    metric, cells, n = comparison["metric"], comparison["cells"], len(comparison["seeds"])
    best = "larger" if comparison["larger_is_better"] else "smaller"
    if n > 1:
        spread = f"means over {n} seeds ± half of the interval ({comparison['interval']})"
    else:
        spread = "of a single seed, so there are no intervals and nothing is tested"
    sentences = [
        f"Metrics are measured on the {comparison['split']} rows ({best} {metric} is better), {spread}."
    ]
    if any(len(cell.get("rates") or []) > 1 for cell in cells):
        sentences.append("The learning rate of each cell is the best of its sweep on validation rows.")
    if any(cell.get("at_edge") for cell in cells):
        sentences.append(
            "Where the best rate is the lowest or the highest one tried, a better one may lie outside the sweep: "
            "such cells are flagged."
        )
    if any(cell.get("significantly_worse_than_best") is not None for cell in cells):
        sentences.append(
            "“Worse than the best” means: a paired t-test over seeds rejects equality with the best cell at "
            f"{1 - comparison['confidence']:.2g}, corrected for the number of cells by Holm's method. A cell without "
            "the words may still be worse."
        )
    sentences += [
        "“Stored” is what one adapter takes on disk, “shared” what all of its kind need once, the base included.",
        "Times, energy and cost are those of one run at the chosen rate, means over seeds; memory is the highest peak.",
    ]
    sources = sorted({str(cell["energy_source"]) for cell in cells if cell.get("energy_source")})
    if sources:
        sentences.append(f"Energy is that of one run, from {', '.join(sources)}.")
    if any((cell.get("cost") or {}).get("missing") for cell in cells):
        sentences.append("A cost with ≥ lacks a part that has a price but was not measured.")
    untrained = [
        f"{value:.3f} ({name})" if len(compressions(comparison)) > 1 else f"{value:.3f}"
        for name, value in untrained_values(comparison).items()
    ]
    if untrained:
        sentences.append(f"The base model without training has {metric} {', '.join(untrained)}.")
    return sentences


def untrained_values(comparison: dict[str, Any]) -> dict[str, float]:
    """The metric of the untrained base by compression, as far as it was measured."""
    values: dict[str, float] = {}
    for name, metrics in (comparison.get("untrained") or {}).items():
        value = (metrics or {}).get(comparison["metric"])
        # a measure with an interval, or the number alone
        value = value_of(value if isinstance(value, dict) else {"value": value})
        if value is not None:
            values[str(name)] = value
    return values


def conditions(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Under which conditions the cells were run: name and value, nested names joined by a space."""
    known = {
        "seeds": ", ".join(str(seed) for seed in comparison["seeds"]),
        **(comparison.get("conditions") or {}),
        "digest": comparison["digest"],
        "joined from": comparison.get("sources"),
    }
    return list(_flat(known))


def unfinished(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and reason of every cell without results."""
    return [
        (_name(comparison, cell), str(cell.get("error") or cell["state"]))
        for cell in comparison["cells"]
        if cell["state"] != "done"
    ]


def _shown(comparison: dict[str, Any], cell: dict[str, Any]) -> str:
    measure = with_interval(cell["metrics"][comparison["metric"]])
    values = f" with {count(cell['trained_values'])} trained values" if cell.get("trained_values") else ""
    return f"{_name(comparison, cell)}, {measure}{values}"


def _name(comparison: dict[str, Any], cell: dict[str, Any]) -> str:
    return (
        f"{cell['label']} ({cell['compression']})"
        if len(compressions(comparison)) > 1
        else str(cell["label"])
    )


def _flat(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{above} {key}".strip().replace("_", " ")
        if isinstance(value, dict):
            yield from _flat(value, name)
        elif isinstance(value, list):
            if value:
                yield name, ", ".join(str(one) for one in value)
        elif value is not None:
            yield name, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
