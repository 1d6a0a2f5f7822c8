"""Searching the super-network of a finished run, on rows that neither training nor the reported test has seen."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import multiprocessing
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modicum.data.files import load_rows
from modicum.data.prepare import Prepared, encode, load_splits, prepare
from modicum.errors import ConfigError, DataError, listing
from modicum.evaluate.metrics import TASK_METRICS
from modicum.jobs.cluster import Cluster, require_ray
from modicum.jobs.pool import Task
from modicum.models.loading import load_tokenizer, quiet_transformers
from modicum.train import artifacts
from modicum.train.recipe import load_recipe
from modicum.train.run import finished_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from modicum.data.encoded import Encoded
    from modicum.data.files import Rows
    from modicum.jobs.pool import Pool
    from modicum.search.options import SearchOptions
    from modicum.search.result import SearchResult
    from modicum.search.space import Choices
    from modicum.search.strategies import EvaluateMany
    from modicum.search.study import Found, Point
    from modicum.train.recipe import Recipe

FOLDER = "search"


def search_run(
    run: str | Path,
    options: SearchOptions,
    output: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    ray: bool = False,
    tell: Callable[[Point], None] = lambda _: None,
) -> SearchResult:
    """The finished search of the super-network in the folder `run` of `modicum tune`.

    The study is kept in `output` (RUN/search when unset), with every point; `resume` goes on with it. `tell` is
    called with every point this process evaluates. `ray`: each point is a task on a cluster (see `Cluster`) whose
    machines all see `run`; points are drawn and kept here, the same ones for any number of workers.

    Raises:
        ConfigError: no finished run with an elastic adapter, options that do not fit, a budget that no sub-network
            keeps, or a study of something else in the folder.
        DataError: there are no rows to score on, or training or test rows are among them.
        MissingExtraError: Optuna or Matplotlib is not installed, or Ray for `ray`.
    """
    from modicum.search.pareto import blank
    from modicum.search.result import clear, write_result

    folder = Path(run)
    recipe = finished_recipe(folder)
    target = Path(output) if output is not None else folder / FOLDER
    _check_free(target, resume=resume, overwrite=overwrite)
    blank()  # a missing library is told now, not after the search
    if ray:
        require_ray()
    with quiet_transformers():
        job = _Job(folder, recipe, options)
        with contextlib.ExitStack() as stack:
            # a cluster that is not there is told before anything is written
            pool = stack.enter_context(Cluster(options.workers)) if ray else None
            if overwrite:
                clear(target)
            target.mkdir(parents=True, exist_ok=True)
            study = job.study(target)
            if pool is None:
                stack.enter_context(_workers(folder, options, target))
            job.explore(study, tell, many=pool and points_of(pool, folder, options))
        evaluator = job.evaluator
        return write_result(
            target, job.space, options, evaluator.maximized, study.points(), evaluator.budgets.whole
        )


def finished_recipe(folder: Path) -> Recipe:
    """The recipe of the finished run in `folder`.

    Raises:
        ConfigError: it holds no finished run, or a sweep.
    """
    if not (folder / artifacts.RECIPE).is_file():
        raise ConfigError(f"{folder} holds no run of `modicum tune`: there is no {artifacts.RECIPE}")
    if artifacts.read_json(folder / artifacts.REPORT) is None:
        inside = sorted(str(entry.parent.relative_to(folder)) for entry in folder.rglob(artifacts.REPORT))
        hint = f"; name one of the runs inside: {listing(inside)}" if inside else ""
        raise ConfigError(f"{folder} holds no finished run{hint}")
    return load_recipe(folder / artifacts.RECIPE)


class _Job:
    """Model, rows and evaluator of a search."""

    def __init__(self, folder: Path, recipe: Recipe, options: SearchOptions) -> None:
        from modicum.search.evaluator import Evaluator
        from modicum.search.space import SearchSpace

        task = recipe.model.task
        metrics = [*TASK_METRICS[task], *(["exact_match"] if task == "causal_lm" else [])]
        faults = options.faults(recipe.metric, metrics)
        if faults:
            raise ConfigError("the search cannot run: " + "; ".join(faults))
        tokenizer = load_tokenizer(recipe.model.name_or_path, revision=recipe.model.revision)
        data = prepare(recipe.data, tokenizer, task, recipe.model.num_labels)
        rows = search_rows(recipe, data, tokenizer, options)
        model = finished_model(recipe, folder, tokenizer, data)
        config = model.peft_config["default"]
        if getattr(config, "search_space", None) is None:
            raise ConfigError(
                f"the adapter in {folder} was not trained with a search space (recipe section `elastic`)"
            )
        self.options = options
        self.space = SearchSpace.of_model(config.search_space, model)
        self.evaluator = Evaluator(model, tokenizer, rows, task, self.space, options, recipe.metric)
        self._identity = {
            "base model": config.base_fingerprint,
            "adapter": _digest(folder / artifacts.ADAPTER / "adapter_model.safetensors"),
            "search space": self.space.digest(),
            "rows": rows_digest(rows),
            "budgets": options.budgets,
            "prompt, batch": [options.prompt, options.batch],
        }

    def study(self, target: Path, worker: int = 0) -> Any:
        """The study in `target`, opened."""
        from modicum.search.study import Study

        return Study(target, self.space, self.options, self.evaluator.maximized, self._identity, worker)

    def explore(
        self, study: Any, tell: Callable[[Point], None], worker: int = 0, many: EvaluateMany | None = None
    ) -> None:
        """Evaluate until the study has all its points."""
        import torch

        from modicum.search.strategies import Explorer

        evaluator, threads = self.evaluator, torch.get_num_threads()
        explorer = Explorer(
            study,
            self.options,
            evaluator,
            evaluator.violations,
            maximized=evaluator.maximized,
            tell=tell,
            worker=worker,
            many=many,
        )
        # processes that each take all threads wait for each other
        torch.set_num_threads(max(1, threads // self.options.workers))
        try:
            explorer.run()
        finally:
            torch.set_num_threads(threads)


def search_rows(recipe: Recipe, data: Prepared, tokenizer: Any, options: SearchOptions) -> Encoded:
    """The rows that sub-networks are scored on.

    Raises:
        DataError: there are none, or training or test rows are among them.
    """
    wanted = recipe.data
    if options.rows is not None:
        found: Rows | None = load_rows(options.rows, "validation", wanted.hub_config)
    else:
        found = load_splits(wanted).get("validation")
    if found is None:
        raise DataError(
            "there are no rows to score on: the recipe has no validation rows; name some with `rows`"
        )
    found = found.sample(options.max_rows, wanted.seed)
    rows = encode(found, wanted, tokenizer, recipe.model.task, data.num_labels)
    mine = {_row(rows, index) for index in range(len(rows))}
    faults = []
    for name, split in (("training", data.train), ("test", data.test)):
        shared = len(mine & {_row(split, index) for index in range(len(split))}) if split is not None else 0
        if shared:
            faults.append(f"{shared} of {len(mine)} are {name} rows")
    if faults:
        raise DataError(
            f"the rows to score on must be seen by neither training nor the reported test: {'; '.join(faults)}"
        )
    return rows


def rows_digest(rows: Encoded) -> str:
    """16 hex digits over the tokens of `rows` and their labels."""
    digest = hashlib.blake2b(digest_size=8)
    for index in range(len(rows)):
        row = rows[index]
        digest.update(repr((row["input_ids"], row["labels"])).encode())
    return digest.hexdigest()


def _row(rows: Encoded, index: int) -> tuple[int, ...]:
    return tuple(rows[index]["input_ids"])


def points_of(pool: Pool, folder: Path, options: SearchOptions) -> EvaluateMany:
    """A function that evaluates sub-networks of the run in `folder` as tasks of `pool`.

    What it raises is a `ModicumError` with the sub-network that failed.
    """
    values = options.model_dump_json()

    def many(batch: Sequence[Choices]) -> Iterator[tuple[int, Found, float]]:
        tasks = (Task(at, evaluated, (str(folder), values, choices)) for at, choices in enumerate(batch))
        for outcome in pool.outcomes(tasks):
            at: Any = outcome.key
            yield at, *outcome.result(f"the sub-network {dict(batch[at])}")

    return many


def evaluated(folder: str, options: str, choices: Choices) -> tuple[Found, float]:
    """A task: what the sub-network of `choices` gives, and the seconds it took."""
    with quiet_transformers():
        job, began = _loaded(folder, options), time.monotonic()
        return job.evaluator(choices), time.monotonic() - began


@functools.lru_cache(maxsize=1)
def _loaded(folder: str, options: str) -> _Job:
    """Model and rows of a search, which a process keeps from one point to the next."""
    from modicum.search.options import SearchOptions

    return _Job(Path(folder), finished_recipe(Path(folder)), SearchOptions.model_validate_json(options))


@contextlib.contextmanager
def _workers(folder: Path, options: SearchOptions, target: Path) -> Iterator[None]:
    """Runs the other processes of a search beside what happens inside, and waits for them.

    Raises:
        ConfigError: some of them failed.
    """
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_work, args=(str(folder), options, str(target), index))
        for index in range(1, options.workers)
    ]
    try:
        for process in others:
            process.start()
        yield
    except BaseException:
        for process in others:
            if process.is_alive():
                process.terminate()
        raise
    finally:
        for process in others:
            if process.pid is not None:
                process.join()
    failed = [process.exitcode for process in others if process.exitcode]
    if failed:
        raise ConfigError(
            f"{len(failed)} of {options.workers} workers failed (what they said is above); all points are kept, "
            "--resume goes on"
        )


def _work(folder: str, options: SearchOptions, target: str, worker: int) -> None:
    """One more process of a search; the one that started it is interrupted for both, and ends both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = Path(folder)
    with quiet_transformers():
        job = _Job(run, finished_recipe(run), options)
        job.explore(job.study(Path(target), worker), _stop_with_parent, worker)


def _stop_with_parent(point: Point) -> None:
    del point
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit(1)


def _check_free(target: Path, *, resume: bool, overwrite: bool) -> None:
    from modicum.search.study import FILE

    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target} is a file; name a folder")
    if (target / FILE).is_file() and not resume and not overwrite:
        raise ConfigError(f"{target} holds a search: --resume to go on, --overwrite to start again")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]
