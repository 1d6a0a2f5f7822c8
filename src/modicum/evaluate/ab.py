"""Which of two or more versions is better on the same items, and whether the items suffice to say so."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.errors import ConfigError, DataError, did_you_mean, listing, not_among
from modicum.evaluate import statistics as tests
from modicum.evaluate.metrics import perplexity
from modicum.evaluate.records import SUFFIX, Records, faults_between

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from modicum.evaluate.intervals import Measure

METRICS = ("correct", "loss", "perplexity")
#: how the rows over the items of all tasks are called
ALL = "all tasks"


@dataclass(frozen=True)
class Comparison:
    """Two versions on the same items."""

    #: the task, or all tasks together
    task: str
    #: `field = value` of a slice, None for all items
    slice: str | None
    first: str
    second: str
    n: int
    first_value: float
    second_value: float
    #: first − second with an interval; of perplexities first / second
    difference: Measure
    #: McNemar or permutation
    test: str
    p: float
    #: `p` after Holm's correction for all rows of the table
    p_corrected: float
    #: Cohen's h, wins, losses and their odds for 0/1 outcomes, else d_z
    effect: dict[str, float | None]
    #: the smallest difference (of perplexities: ratio above 1) that these items tell apart with a power of 80 %
    detectable: float | None
    #: items that it takes to tell the observed difference apart with that power; None where there is none
    needed: int | None
    #: the name of the better version, None where they cannot be told apart
    better: str | None = None
    sentence: str = ""


@dataclass(frozen=True)
class Comparisons:
    """Versions compared pair by pair; each table is corrected for the number of its rows."""

    metric: str
    alpha: float
    versions: dict[str, str]
    #: all items together: one row for each pair of versions
    overall: tuple[Comparison, ...]
    #: task by task, where there are several
    tasks: tuple[Comparison, ...]
    #: by value of the slice that was asked for
    slices: tuple[Comparison, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Aligned:
    """What several versions made of the same items, item by item in one order."""

    #: of each version (items,): outcomes, or summed losses
    values: dict[str, NDArray[Any]]
    #: (items,) ones, or numbers of tokens
    weights: NDArray[Any]
    #: of each item, its slices
    slices: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.weights)

    def only(self, chosen: Sequence[int]) -> Aligned:
        """These items alone."""
        rows = list(chosen)
        values = {name: column[rows] for name, column in self.values.items()}
        return Aligned(values, self.weights[rows], [self.slices[row] for row in rows])

    @classmethod
    def joined(cls, parts: Sequence[Aligned]) -> Aligned:
        """The items of all parts."""
        return cls(
            {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values},
            np.concatenate([part.weights for part in parts]),
            [slices for part in parts for slices in part.slices],
        )


def compare(
    paths: Sequence[str | Path],
    *,
    metric: str | None = None,
    slice_by: str | None = None,
    alpha: float = tests.ALPHA,
    seed: int = 0,
) -> Comparisons:
    """The versions whose records lie at `paths` (files, or folders with a file for each task), pair by pair.

    `metric`: correct, loss (nats per token) or perplexity; unset: correct where the records have it, else loss.
    Intervals have the confidence 1 − `alpha`. `slice_by` names a slice of the items for a table by its values.

    Raises:
        ConfigError: fewer than two versions, no such metric, no such slice, an impossible alpha.
        DataError: no records, or records that do not compare: all that differs, at once.
    """
    faults = [] if metric is None else not_among("metric", metric, METRICS)
    if not 0 < alpha < 1:
        faults.append(f"alpha = {alpha}, must be between 0 and 1")
    if len({Path(path).expanduser().resolve() for path in paths}) < 2:
        faults.append("one version is nothing to compare: name the records of two or more")
    if faults:
        raise ConfigError("; ".join(faults))
    names = _names([Path(path) for path in paths])
    versions = {name: read_version(path) for name, path in names.items()}
    chosen = metric or _usual(versions)
    found = align(versions, chosen)
    parts = {task: part for task, part in found.items() if part is not None}
    whole = Aligned.joined(list(parts.values()))
    title = ALL if len(parts) > 1 else next(iter(parts))
    groups = {} if slice_by is None else _groups(whole, slice_by)

    def table(rows: Mapping[tuple[str, str | None], Aligned]) -> tuple[Comparison, ...]:
        pairs = list(combinations(versions, 2))
        share = alpha / max(1, len(rows) * len(pairs))
        return _judged(
            [
                pair(items, first, second, chosen, alpha, share, seed, *where)
                for where, items in rows.items()
                for first, second in pairs
            ],
            chosen,
            alpha,
        )

    return Comparisons(
        chosen,
        alpha,
        {name: str(path) for name, path in names.items()},
        overall=table({(title, None): whole}),
        tasks=table({(task, None): part for task, part in parts.items()}) if len(parts) > 1 else (),
        slices=table({(title, value): whole.only(rows) for value, rows in groups.items()}),
        notes=_notes(versions, [task for task in found if task not in parts], chosen),
    )


def read_version(path: str | Path) -> dict[str, Records]:
    """The records at `path`, a file or a folder with a file for each task, by task.

    Raises:
        DataError: no records there, damaged ones, or two files of one task.
    """
    place = Path(path).expanduser()
    files = sorted(place.rglob(f"*{SUFFIX}")) if place.is_dir() else [place]
    if not files:
        raise DataError(f"no records in the folder {place}: it holds no {SUFFIX} files")
    found: dict[str, Records] = {}
    places: dict[str, Path] = {}
    for file in files:
        records = Records.read(file)
        task = records.header.task
        if task in found:
            raise DataError(
                f"{place} holds the task {task} twice: {places[task]} and {file}; name one version"
            )
        if not len(records):
            raise DataError(f"{file} holds no items")
        found[task], places[task] = records, file
    return found


def align(versions: Mapping[str, Mapping[str, Records]], metric: str) -> dict[str, Aligned | None]:
    """The outcomes of all versions task by task, None for tasks without the metric.

    Raises:
        DataError: the records do not compare (all that differs, at once), or none has the metric.
    """
    check_same(versions)
    found = {
        task: _aligned({name: tasks[task] for name, tasks in versions.items()}, metric)
        for task in next(iter(versions.values()))
    }
    if all(part is None for part in found.values()):
        raise DataError(f"the records hold no {_column(metric)}, which {metric} is made of")
    return found


def _aligned(versions: Mapping[str, Records], metric: str) -> Aligned | None:
    """The outcomes of `versions` on the items of one task, None where none of them has the metric."""
    column = _column(metric)
    order = {name: np.argsort([one.item for one in records.items]) for name, records in versions.items()}
    values = {name: records.column(column)[order[name]] for name, records in versions.items()}
    lacking = {name: int(np.isnan(found).sum()) for name, found in values.items()}
    first, records = next(iter(versions.items()))
    if all(lacking[name] == len(values[name]) for name in versions):
        return None
    task = records.header.task
    faults = [f"{task}: {count} items of {name} have no {column}" for name, count in lacking.items() if count]
    weights = np.ones(len(records))
    if column == "loss":
        tokens = {name: versions[name].column("tokens")[order[name]] for name in versions}
        weights = tokens[first]
        for name, counts in tokens.items():
            other = int(np.sum(counts != weights))
            if other:
                faults.append(
                    f"{task}: {first} and {name} count other tokens on {other} items; losses per token compare only "
                    "with the same tokenizer"
                )
        if not faults and not weights.sum() > 0:
            faults.append(f"{task}: no item has a scored token")
    if faults:
        raise DataError("; ".join(faults))
    return Aligned(values, weights, [records.items[row].slices for row in order[first]])


def pair(
    items: Aligned,
    first: str,
    second: str,
    metric: str,
    alpha: float = tests.ALPHA,
    share: float | None = None,
    seed: int = 0,
    task: str = ALL,
    slice_name: str | None = None,
) -> Comparison:
    """Two of the versions on `items`, without a verdict; `share`: the alpha left to it when many are tested."""
    a, b, weights, n = items.values[first], items.values[second], items.weights, len(items)
    d, left = a - b, share or alpha
    means = [float(column.sum() / weights.sum()) for column in (a, b)]
    if metric == "correct" and set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        wins, losses = int((d > 0).sum()), int((d < 0).sum())
        difference = tests.score_interval(wins, losses, n, 1 - alpha)
        test, p = "McNemar", tests.mcnemar(wins, losses)
        effect: dict[str, float | None] = {
            "cohens_h": tests.cohens_h(*means), "odds": tests.odds(wins, losses), "wins": wins, "losses": losses
        }  # fmt: skip
        discordance = (wins + losses) / n
        detectable = tests.detectable_paired(n, discordance, alpha=left)
        needed = tests.items_needed_paired(difference.value, discordance, alpha=left)
    else:
        transform: Callable[[float], float] = perplexity if metric == "perplexity" else float
        difference = tests.paired_bootstrap(d, weights, confidence=1 - alpha, seed=seed, transform=transform)
        test, p = "permutation", tests.permutation(d, seed=seed)
        effect = {"d_z": tests.cohens_d(d)}
        spread, mean = tests.spread(d, weights), float(d.sum() / weights.sum())
        # without any spread, nothing says how far other items would differ
        detectable = transform(tests.detectable(n, spread, alpha=left)) if spread else math.inf
        needed = tests.items_needed(mean, spread, alpha=left)
        means = [transform(value) for value in means]
    return Comparison(
        task, slice_name, first, second, n, means[0], means[1], difference, test, p, p, effect,
        detectable if math.isfinite(detectable) else None, needed,
    )  # fmt: skip


def _judged(rows: list[Comparison], metric: str, alpha: float) -> tuple[Comparison, ...]:
    """`rows` with corrected p values, verdicts and their sentences."""
    corrected = tests.holm([row.p for row in rows])
    judged = []
    for row, p in zip(rows, corrected, strict=True):
        ahead = (row.first_value > row.second_value) == (metric == "correct")
        better = None if p > alpha else row.first if ahead else row.second
        found = replace(row, p_corrected=p, better=better)
        judged.append(replace(found, sentence=_sentence(found, metric, alpha)))
    return tuple(judged)


def _sentence(row: Comparison, metric: str, alpha: float) -> str:
    where = f"{row.slice}: " if row.slice else ""
    values = f"{row.first} {shown(row.first_value, metric)}, {row.second} {shown(row.second_value, metric)}"
    measured = (
        f"{values}, {shown_difference(row.difference, metric)} at {1 - alpha:.0%}, p = {row.p_corrected:.2g}"
    )
    if row.better is not None:
        other = row.second if row.better == row.first else row.first
        return f"{where}{row.better} is better than {other} with {row.n:,} items ({measured})."
    if row.needed is None:
        rest = "on these they come out even"
    else:
        # the test on so many items had a fair chance, and the difference is not shown all the same
        rest = f"you would need about {max(row.needed, row.n + 1):,}"
    return f"{where}{row.first} and {row.second} are not distinguishable with {row.n:,} items; {rest} ({measured})."


def shown(value: float, metric: str) -> str:
    """A value of `metric` for people."""
    return f"{value:.1%}".replace("%", " %") if metric == "correct" else f"{value:.4g}"


def shown_change(value: float, metric: str) -> str:
    """A difference of `metric` (of perplexities a ratio) for people."""
    if metric == "correct":
        return f"{value * 100:+.1f} points"
    return f"{value:+.4f} nats" if metric == "loss" else f"× {value:.4f}"


def shown_difference(found: Measure, metric: str) -> str:
    """The difference (of perplexities the ratio) with its interval, for people."""
    value = shown_change(found.value, metric)
    if found.low is None or found.high is None:
        return value
    low, high = (shown_change(end, metric).strip("× ").split()[0] for end in (found.low, found.high))
    return f"{value} [{low}, {high}]"


def _names(paths: list[Path]) -> dict[str, Path]:
    """Short names of the paths where those tell them apart, else the paths."""
    for short in ([path.name.removesuffix(SUFFIX) for path in paths], [str(path) for path in paths]):
        if len(set(short)) == len(paths):
            return dict(zip(short, paths, strict=True))
    raise ConfigError(f"a version is named twice: {listing([str(path) for path in paths])}")


def check_same(versions: Mapping[str, Mapping[str, Records]]) -> None:
    """Refuses records of other conditions or items: all that differs, at once.

    Raises:
        DataError: they do not compare.
    """
    first, tasks = next(iter(versions.items()))
    faults = []
    for name, others in list(versions.items())[1:]:
        for here, there, mine in (
            (first, name, set(tasks) - set(others)),
            (name, first, set(others) - set(tasks)),
        ):
            if mine:
                faults.append(f"only {here} has the tasks {listing(sorted(mine))}, {there} does not")
        faults += [
            f"{first} and {name}, {task}: {fault}"
            for task in tasks
            if task in others
            for fault in faults_between(tasks[task], others[task])
        ]
    if faults:
        raise DataError("the records do not compare: " + "; ".join(faults))


def _column(metric: str) -> str:
    return "correct" if metric == "correct" else "loss"


def _usual(versions: Mapping[str, Mapping[str, Records]]) -> str:
    every = [
        one.correct for tasks in versions.values() for records in tasks.values() for one in records.items
    ]
    return "loss" if any(value is None for value in every) else "correct"


def _groups(items: Aligned, name: str) -> dict[str, list[int]]:
    """Rows by value of the slice `name`; items without it are in none."""
    groups: dict[str, list[int]] = {}
    for row, slices in enumerate(items.slices):
        if name in slices:
            groups.setdefault(f"{name} = {slices[name]}", []).append(row)
    if not groups:
        known = sorted({key for slices in items.slices for key in slices})
        raise ConfigError(
            f"no slice {name!r}{did_you_mean(name, known)}; the items have {listing(known) or 'none'}"
        )
    return dict(sorted(groups.items()))


def _notes(
    versions: Mapping[str, Mapping[str, Records]], without: Sequence[str], metric: str
) -> tuple[str, ...]:
    notes = [
        f"{name}, {task}: the evaluation is not complete, {len(records):,} items are recorded"
        for name, tasks in versions.items()
        for task, records in tasks.items()
        if not records.complete
    ]
    if without:
        notes.append(f"left out, for they have no {_column(metric)}: {listing(list(without))}")
    return tuple(notes)
