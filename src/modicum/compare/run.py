"""Running a comparison: bases, runs, tests, each in a process of its own, and the reports after every finished cell."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast, final

from modicum.compare.bases import BASES, base_report, make_base
from modicum.compare.cells import CELLS, Cell, count_values
from modicum.compare.conditions import conditions, differences, flat, identity, threads_of
from modicum.compare.result import (
    COMPARISON,
    RUNS,
    SHARED,
    SPEC,
    comparison,
    entry,
    finished_runs,
    open_entry,
    run_rows,
)
from modicum.compare.spec import make_comparison
from modicum.data.prepare import Prepared, prepare
from modicum.errors import ConfigError, DataError
from modicum.jobs.cluster import ADDRESS, Cluster, require_ray
from modicum.jobs.pool import Outcome, Pool, Task
from modicum.jobs.processes import Processes
from modicum.models.loading import load_tokenizer, quiet_transformers
from modicum.store.atomic import write_text
from modicum.train import artifacts
from modicum.train.run import TuneResult, run_one
from modicum.train.sweep import SUMMARY, cell_recipe, choose, run_sweep
from modicum.train.trackers import chosen
from modicum.train.yaml_lines import read_yaml

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from modicum.compare.spec import Spec
    from modicum.train.recipe import Recipe

    Say = Callable[[str], None]
    Publish = Callable[[Path, dict[str, Any]], None]

REPORTS = ("report.html", "report.md")
IDENTITY = "digests.json"
ERRORS = "errors"
#: what processes of this machine are forked with
PRELOAD = ("modicum.compare.preload",)
_LOCK = ".lock"


@dataclass(frozen=True)
class Compared:
    """A comparison that has ended: its folder, what it found (`comparison.json`), and which cells failed."""

    folder: Path
    comparison: dict[str, Any] = field(repr=False)

    @property
    def failed(self) -> dict[str, str]:
        """Cell -> error, of those that failed."""
        return {
            f"{cell['compression']}/{cell['label']}": cell["error"]
            for cell in self.comparison["cells"]
            if cell["state"] == "failed"
        }


def run_comparison(
    spec: Spec,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ray: bool = False,
    say: Say = lambda _: None,
    publish: Publish = lambda _folder, _comparison: None,
) -> Compared:
    """The finished comparison of `spec`; `say` is told what ends, `publish` writes reports after every cell.

    A cell that fails says why, and the others go on. `resume` keeps every finished run, continues the unfinished ones
    from their last checkpoint and tries failed ones again; the tables are those of a run that was never interrupted.
    `ray`: on a cluster (see `Cluster`) whose machines all see the results; otherwise in processes of this machine.

    Raises:
        ConfigError, DataError: see `check`; or the folder holds another comparison, or one that is running.
        MissingExtraError: `ray` without Ray.
    """
    if ray:
        require_ray()
    data, _ = check(spec)
    with _locked(spec.folder):
        digests = identity(spec, data)
        spec = _claim(spec, digests, resume=resume, overwrite=overwrite)
        about = conditions(spec, data, digests)
        if crowd := crowded(spec.options.workers * about["threads"], about["cores"], ray=ray):
            say(crowd)
        engine = _Engine(spec, data, about, say, publish)
        with _pool(spec, ray=ray) as pool:
            engine.run(pool)
        return Compared(spec.folder, engine.publish())


def crowded(threads: int, cores: int, *, ray: bool) -> str | None:
    """What to tell whoever runs so many threads on the cores of this machine; None where there is nothing to tell.

    The machines of a named Ray cluster have cores of their own, a local Ray has those of this one.
    """
    if threads <= cores or (ray and os.environ.get(ADDRESS)):
        return None
    return f"{threads} threads on {cores} cores will wait for each other: take fewer workers"


def check(spec: Spec) -> tuple[Prepared, dict[Cell, int]]:
    """The token rows, and what each cell trains, once everything is right that can be told before anything is trained.

    Raises:
        ConfigError: everything that does not fit the model. DataError: the rows cannot be read, or some are missing.
    """
    recipe, faults = spec.recipe, []
    chosen(recipe)  # experiment trackers
    with quiet_transformers():
        counts, misfits = count_values(spec, spec.cells)
        faults += misfits
        tokenizer = load_tokenizer(
            recipe.model.name_or_path,
            revision=recipe.model.revision,
            trust_remote_code=recipe.model.trust_remote_code,
        )
        try:
            data = prepare(recipe.data, tokenizer, recipe.model.task, recipe.model.num_labels)
        except DataError as error:
            if not faults:
                raise
            raise ConfigError("\n".join([*faults, str(error)])) from error
    if data.train is None or not len(data.train):
        faults.append("there are no training rows: set data.train")
    if data.validation is None and any(len(cell.rates) > 1 for cell in counts):
        faults.append(
            "choosing among learning rates needs validation rows: set data.validation or data.validation_fraction, "
            "or give every method one rate"
        )
    if data.validation is None and data.test is None:
        faults.append("there are neither test nor validation rows to compare on: set data.test")
    if faults:
        raise ConfigError("\n".join(faults))
    return data, counts


def _pool(spec: Spec, *, ray: bool) -> Pool:
    """Where the runs are: a process for each, so that peaks of memory are its own."""
    workers, threads = spec.options.workers, threads_of(spec)
    return Cluster(workers, threads, fresh=True) if ray else Processes(workers, threads, PRELOAD)


def train_run(recipe: Recipe, data: Prepared, workers: int) -> dict[str, Any]:
    """The validation metrics of one run, trained now or continued; test rows stay unseen."""
    begun = (recipe.folder / artifacts.RECIPE).is_file()
    with artifacts.disk_guard(recipe.folder), quiet_transformers():
        artifacts.write_json(recipe.folder / SHARED, {"workers": workers})
        sweep = str(recipe.folder.parents[1])
        result = run_one(recipe, resume=begun, data=data, use_test=False, sweep=sweep)
    return result.metrics["validation"]


def finish_cell(recipe: Recipe, data: Prepared) -> None:
    """Finish the sweep of a cell whose runs are there: the rate is chosen, and the test rows met."""
    with artifacts.disk_guard(recipe.folder), quiet_transformers():
        run_sweep(recipe, resume=True, data=data)


@final
class _Engine:
    """What has to be done, in which order, and what came of it. The state is on disk; this only looks there."""

    def __init__(self, spec: Spec, data: Prepared, about: dict[str, Any], say: Say, publish: Publish) -> None:
        self.spec, self.data, self.about, self.say, self._publish = spec, data, about, say, publish
        self.cells = spec.cells
        self.entries = {cell: open_entry(cell) for cell in self.cells}
        self.bases = {name: base_report(spec, name) for name in spec.options.compressions}
        #: the rows of cells that ended
        self.rows: dict[Cell, list[dict[str, Any]]] = {}
        self.tried: set[tuple[Cell, float, int]] = set()
        #: runs of a cell that are waiting or under way
        self.pending: dict[Cell, int] = {}
        self.queue: deque[Task] = deque()

    def run(self, pool: Pool) -> None:
        """Do everything that is not done yet."""
        for name in self._used_bases():
            if self.bases[name] is None:
                self.queue.append(Task(("base", name), make_base, (self.spec, name, self.data)))
            else:
                self._open(name)
        # a report exists from the start, and what keeps it from being written is told now
        self.publish()
        while self.queue or pool.busy:
            while self.queue and pool.free:
                pool.start(self.queue.popleft())
            for outcome in pool.wait():
                self._take(outcome)

    def publish(self) -> dict[str, Any]:
        """Write the comparison as far as it is finished; what was written."""
        folder, entries = self.spec.folder, list(self.entries.values())
        rows = [row for cell in self.cells for row in self.rows.get(cell, [])]
        artifacts.write_table(folder / RUNS, rows)
        used = {name: self.bases[name] for name in self._used_bases()}
        artifacts.write_json(folder / COMPARISON, comparison(self.spec, entries, used, self.about))
        written = artifacts.read_json(folder / COMPARISON)
        assert written is not None
        self._publish(folder, written)
        return written

    def _used_bases(self) -> list[str]:
        return list(dict.fromkeys(cell.compression for cell in self.cells))

    def _open(self, compression: str) -> None:
        """Begin with the cells on a base that is there."""
        for cell in self.cells:
            if cell.compression == compression:
                self._advance(cell)

    def _advance(self, cell: Cell, *, first: bool = False) -> None:
        """Put what a cell needs next into the queue, at its front if it is to come `first`."""
        recipe = self._recipe(cell)
        summary = artifacts.read_json(recipe.folder / SUMMARY)
        if summary is not None and summary["recipe_digest"] == recipe.digest():
            self._close(cell)
            return
        runs = self._missing(cell, recipe)
        if again := [f"lr {rate:g} seed {seed}" for rate, seed in runs if (cell, rate, seed) in self.tried]:
            self._failed("run", cell, f"{cell.name}: {again[0]} ended, but left no report of its recipe", "")
            return
        self.tried |= {(cell, *run) for run in runs}
        tasks = [
            Task(("run", cell, rate, seed), train_run, (run, self.data, self.spec.options.workers))
            for rate, seed in runs
            for run in [cell_recipe(recipe, rate, seed)]
        ]
        self.pending[cell] = len(tasks)
        tasks = tasks or [Task(("finish", cell), finish_cell, (recipe, self.data))]
        if first:
            self.queue.extendleft(reversed(tasks))
        else:
            self.queue.extend(tasks)

    def _missing(self, cell: Cell, recipe: Recipe) -> list[tuple[float, int]]:
        """The runs of a cell that are to be done next: of all seeds, or first those that choose the rate."""
        seeds = self.spec.options.seeds
        done = {(run.rate, run.seed): run for run in finished_runs(recipe)}
        cheap = self.spec.options.select_on == "first_seed" and len(cell.rates) > 1
        missing = [
            (rate, s) for rate in cell.rates for s in (seeds[:1] if cheap else seeds) if (rate, s) not in done
        ]
        if missing or not cheap:
            return missing
        first = {rate: done[rate, seeds[0]] for rate in cell.rates}
        best = choose(recipe, {rate: [TuneResult(run.folder, run.report)] for rate, run in first.items()})
        return [(best, seed) for seed in seeds if (best, seed) not in done]

    def _take(self, outcome: Outcome) -> None:
        """Go on with what a task has made possible."""
        kind, subject, *run = cast("Any", outcome.key)
        name = subject if kind == "base" else subject.name
        shown = f"{name} lr {run[0]:g} seed {run[1]}" if run else f"{kind} {name}"
        if outcome.error is not None:
            self._failed(kind, subject, f"{shown}: {outcome.error}", outcome.trace)
        elif kind == "base":
            self.bases[subject] = base_report(self.spec, subject)
            self.say(f"{shown}: done")
            self._open(subject)
        elif kind == "finish":
            self._close(subject)
            self.publish()
        else:
            metric = self.spec.recipe.metric
            value = (outcome.value or {}).get(metric)
            self.say(shown if value is None else f"{shown}: {metric} {value:.4g}")
            self.pending[subject] -= 1
            if not self.pending[subject] and self.entries[subject]["state"] == "missing":
                self._advance(subject, first=True)

    def _close(self, cell: Cell) -> None:
        """Enter what a finished cell found."""
        base = self.bases[cell.compression]
        assert base is not None
        self._enter(cell, entry(self.spec, cell, base))
        self.say(self.entries[cell]["error"] or f"{cell.name}: done")

    def _enter(self, cell: Cell, found: dict[str, Any]) -> None:
        self.entries[cell] = found
        self.rows[cell] = run_rows(self.spec, cell, self.bases[cell.compression], found["learning_rate"])

    def _failed(self, kind: str, subject: Any, error: str, trace: str) -> None:
        """Give up the cell, or all cells on a base, and go on with the others."""
        lost = [subject] if kind != "base" else [cell for cell in self.cells if cell.compression == subject]
        self.queue = deque(task for task in self.queue if cast("Any", task.key)[1] not in lost)
        for cell in lost:
            if self.entries[cell]["state"] == "missing":
                self._enter(cell, open_entry(cell, error))
        if trace:
            write_text(self.spec.folder / ERRORS / f"{error.partition(':')[0].replace('/', ' ')}.txt", trace)
        self.say(f"FAILED {error}")
        self.publish()

    def _recipe(self, cell: Cell) -> Recipe:
        base = self.bases[cell.compression]
        assert base is not None
        return cell.recipe(self.spec, base["model"])


def _claim(spec: Spec, digests: dict[str, Any], *, resume: bool, overwrite: bool) -> Spec:
    """The comparison with its folder ready; one that goes on keeps the threads it began with, which change digits.

    Raises:
        ConfigError: the folder holds a comparison, and neither flag allows to touch it, or another one.
    """
    folder = spec.folder
    started = (folder / SPEC).is_file()
    if started and not (resume or overwrite):
        raise ConfigError(f"{folder} holds a comparison: --resume to go on, --overwrite to start again")
    if overwrite:
        clear(folder)
    if started and resume:
        values, _ = read_yaml((folder / SPEC).read_text(encoding="utf-8"), str(folder / SPEC))
        before = make_comparison(values, str(folder / SPEC))
        if spec.options.threads is None:
            spec = spec.with_options(threads=before.options.threads)
        other = differences(flat(before.identity()), flat(spec.identity()))
        other += differences(flat(artifacts.read_json(folder / IDENTITY)), flat(digests))
        if other:
            raise ConfigError(
                f"{folder} holds another comparison ({'; '.join(other)}). Resume the one it holds, set another output "
                "(finished comparisons can be joined with --join), or use --overwrite"
            )
        shutil.rmtree(folder / ERRORS, ignore_errors=True)  # of runs that are tried again
    spec = spec.with_options(threads=threads_of(spec))
    artifacts.write_json(folder / IDENTITY, digests)
    write_text(folder / SPEC, spec.to_yaml())
    return spec


def clear(folder: Path) -> None:
    """Remove what a comparison left in `folder`, and nothing else."""
    for name in (BASES, CELLS, ERRORS):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (COMPARISON, RUNS, SPEC, IDENTITY, *REPORTS):
        (folder / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps `folder` from other comparisons; the system lets go of it when this process ends, however it does.

    Raises:
        ConfigError: another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another process is at work in {folder}: wait for it, or set another output"
            ) from error
        yield
