"""Running a suite: every item recorded as it is finished, one file per task, and a summary of the metrics."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modicum._version import __version__
from modicum.errors import ConfigError, DataError, listing
from modicum.evaluate.load import placed
from modicum.evaluate.mixing import AT_ONCE, check_heads, groups, leaves_base, put_on, taken_off
from modicum.evaluate.protocols import EvaluationTask, Subject, check, version_of
from modicum.evaluate.records import SUFFIX, Header, Records, digest_of
from modicum.evaluate.resources import ResourceFile
from modicum.models.loading import load_base, load_tokenizer, quiet_transformers
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from modicum.evaluate.intervals import Measure
    from modicum.evaluate.suites import Suite

    Advance = Callable[[int], None]

#: beside the records
RESOURCES = "resources.json"
#: seconds between two writes of what is recorded: what an interrupted evaluation loses at most, and a batch
_SAVE_EVERY = 20.0


@dataclass(frozen=True)
class TaskResult:
    """The metrics of one task, the main one first; `details` are those of its protocol."""

    items: int
    metrics: dict[str, Measure]
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SuiteResult:
    """What became of a suite for one model and adapter; `adapter` with the digest of its files."""

    suite: str
    protocol: str
    protocol_version: str
    model: str
    adapter: str | None
    limit: int | None
    tasks: dict[str, TaskResult]

    @property
    def average(self) -> float | None:
        """The mean of the tasks' accuracies, None for a single task or where the main metric is another."""
        mains = [next(iter(task.metrics.items())) for task in self.tasks.values()]
        if len(mains) < 2 or {name for name, _ in mains} not in ({"accuracy"}, {"acc"}):
            return None
        return sum(measure.value for _, measure in mains) / len(mains)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "average": self.average}


def run_suite(
    suite: Suite,
    model: str,
    *,
    data_dir: Path,
    output: Path,
    adapters: Sequence[str] = (),
    limit: int | None = None,
    resume: bool = False,
    batch_size: int = 16,
    adapters_at_once: int = AT_ONCE,
    dtype: str = "auto",
    advance: Advance | None = None,
) -> list[SuiteResult]:
    """The results of `suite` for `model`, or for each of `adapters` on it; the base is loaded once.

    `output` receives `TASK.parquet` (see `Records`) and `summary.json`, with several adapters in a folder for each.
    What all of it took, interrupted attempts included, is in `resources.json` (see `ResourceFile`).
    With `resume`, items that are recorded there already are not run again. `limit`: only so many items of each task.
    Up to `adapters_at_once` adapters are on the base together and share batches, where `mixing.groups` lets them.

    Raises:
        ConfigError, DataError: what is wrong with the suite, its data or the output; all of it, before the model is
        loaded where possible.
    """
    tasks = checked(suite, data_dir, limit)
    folders = result_folders(output, adapters)
    for folder, adapter in folders.items():
        _check_output(folder, suite, version_of(suite.protocol), model, adapter, resume)
    runs = [_Run(folder, adapter) for folder, adapter in folders.items()]
    results: dict[int, SuiteResult] = {}
    with ResourceFile(output / RESOURCES) as used:

        def advanced(items: int) -> None:
            used.note_now_and_then()
            if advance is not None:
                advance(items)

        evaluation = _Evaluation(suite, tasks, model, limit, batch_size, advanced)
        for subject, places in _subjects(evaluation, adapters, runs, adapters_at_once, dtype):
            results |= zip(
                places, evaluation.results(subject, [runs[place] for place in places]), strict=True
            )
    return [results[place] for place in range(len(runs))]


def checked(suite: Suite, data_dir: Path, limit: int | None = None) -> list[EvaluationTask]:
    """The tasks of `suite`, ready to run.

    Raises:
        ConfigError: the faults of all tasks at once; tasks that need different heads.
    """
    found = check(suite, data_dir, limit)
    if found.faults:
        raise ConfigError(f"the suite {suite.name} cannot be run. " + ". ".join(found.faults))
    return found.tasks


@dataclass(frozen=True)
class _Run:
    """Where the records of one adapter (`PATH@digest`, None for the base alone) go."""

    folder: Path
    adapter: str | None


@dataclass(frozen=True)
class _Evaluation:
    """What is the same for all adapters."""

    suite: Suite
    tasks: Sequence[EvaluationTask]
    model: str
    limit: int | None
    batch_size: int
    advance: Advance | None

    def results(self, subject: Subject, runs: Sequence[_Run]) -> list[SuiteResult]:
        """The results of the adapters of `subject`, whose records `runs` name; what is recorded is not run again."""
        found = {task.name: self._task(task, subject, runs) for task in self.tasks}
        results = []
        for place, run in enumerate(runs):
            tasks = {name: several[place] for name, several in found.items()}
            version = version_of(self.suite.protocol)
            result = SuiteResult(
                self.suite.name, self.suite.protocol, version, self.model, run.adapter, self.limit, tasks
            )
            write_text(run.folder / "summary.json", json.dumps(result.as_dict(), indent=1) + "\n")
            results.append(result)
        return results

    def records(self, task: EvaluationTask, run: _Run, base_fingerprint: str) -> Records:
        """What is recorded of a task that is bound to its subject, perhaps nothing."""
        header = Header(
            protocol=self.suite.protocol,
            protocol_version=version_of(self.suite.protocol),
            suite=self.suite.name,
            task=task.name,
            template=task.template,
            model=self.model,
            adapter=run.adapter,
            base_fingerprint=base_fingerprint,
            items=digest_of(task.ids),
            decoding=task.decoding,
            created_with=f"modicum {__version__}",
            rows=task.rows,
        )
        path = run.folder / f"{task.name}{SUFFIX}"
        return Records.read(path).resumed(header, task.ids) if path.exists() else Records(header)

    def _task(self, task: EvaluationTask, subject: Subject, runs: Sequence[_Run]) -> list[TaskResult]:
        task.bind(subject)
        done = [self.records(task, run, subject.base_fingerprint) for run in runs]
        self._report(sum(map(len, done)))
        last = time.monotonic()
        try:
            for items in task.run(subject, done, self.batch_size):
                for place in dict.fromkeys(place for place, _ in items):
                    done[place].append(item for whose, item in items if whose == place)
                self._report(len(items))
                if time.monotonic() - last >= _SAVE_EVERY:
                    _save(task, runs, done)
                    last = time.monotonic()
        finally:
            _save(task, runs, done)
        results = []
        for run, records in zip(runs, done, strict=True):
            beside = _beside(task, run)
            details = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
            notes = [*task.notes, *task.remarks(records)]
            results.append(TaskResult(len(records), task.metrics(records, details), notes, details))
        return results

    def _report(self, items: int) -> None:
        if self.advance is not None and items:
            self.advance(items)


def _save(task: EvaluationTask, runs: Sequence[_Run], done: Sequence[Records]) -> None:
    for place, (run, records) in enumerate(zip(runs, done, strict=True)):
        if details := task.details(place):
            write_text(_beside(task, run), json.dumps(details, indent=1) + "\n")
        records.write(run.folder / f"{task.name}{SUFFIX}")


def _beside(task: EvaluationTask, run: _Run) -> Path:
    return run.folder / f"{task.name}.json"


def _subjects(
    evaluation: _Evaluation, adapters: Sequence[str], runs: Sequence[_Run], at_once: int, dtype: Any
) -> Iterator[tuple[Subject, list[int]]]:
    """The model with those adapters that share batches, or with one, or alone, and their places among `runs`.

    Adapters are taken off before others are put on, and those whose items are all recorded stay off.
    """
    name = evaluation.model
    base, tokenizer = _load_base(evaluation, dtype)
    check_heads(base, name, adapters)
    bare = Subject(base, tokenizer, name, _fingerprint(base))
    if not adapters:
        yield bare, [0]
        return
    for task in evaluation.tasks:
        task.bind(bare)
    left = [
        place
        for place, run in enumerate(runs)
        if not all(evaluation.records(task, run, bare.base_fingerprint).complete for task in evaluation.tasks)
    ]
    finished = [place for place in range(len(runs)) if place not in left]
    if finished:
        yield bare, finished
    for group in groups([adapters[place] for place in left], base, at_once):
        places = [left[index] for index in group]
        carrying, routes = put_on(base, [adapters[place] for place in places])
        yield Subject(placed(carrying), tokenizer, name, bare.base_fingerprint, routes), places
        base = taken_off(carrying)
        if not all(leaves_base(adapters[place]) for place in places):
            # the next adapter must not stand on what this one has left behind
            base = base if _fingerprint(base) == bare.base_fingerprint else _load_base(evaluation, dtype)[0]


def _load_base(evaluation: _Evaluation, dtype: Any) -> tuple[Any, Any]:
    """The model without adapters, on its device, and its tokenizer."""
    tasks, model = evaluation.tasks, evaluation.model
    kinds = {(task.kind, task.num_labels) for task in tasks}
    if len(kinds) > 1:
        names = listing([task.name for task in tasks], 10)
        raise ConfigError(
            f"one classifier cannot answer {names}: they have different labels; choose with --only"
        )
    kind, num_labels = kinds.pop()
    tokenizer = load_tokenizer(model)
    with quiet_transformers(), torch.random.fork_rng():
        # a head that the checkpoint lacks is drawn, and a drawn one must not make every base another one
        torch.manual_seed(0)
        base = placed(load_base(model, kind, dtype=dtype, num_labels=num_labels, tokenizer=tokenizer))
    return base, tokenizer


def _fingerprint(model: Any) -> str:
    """A digest (32 hexadecimal digits) over all weights of a model without adapter, rounded to bfloat16."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, torch.Tensor):
            continue
        plain = tensor.detach().to(torch.bfloat16) if tensor.is_floating_point() else tensor.detach()
        total.update(f"{name} {tuple(plain.shape)}".encode())
        total.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:32]


def _with_digest(adapter: str) -> str:
    """`PATH@digest` of the adapter's files: an adapter that was trained anew is another one."""
    path = Path(adapter)
    places = [path, path / "adapter"]
    files = (
        [path] if path.is_file() else [file for place in places for file in sorted(place.glob("adapter_*"))]
    )
    total = hashlib.sha256()
    for file in files:
        total.update(file.name.encode() + file.read_bytes())
    return f"{adapter}@{total.hexdigest()[:12]}"


def result_folders(output: Path, adapters: Sequence[str]) -> dict[Path, str | None]:
    """Where the results of every adapter go: into `output`, or below it by the names of several adapters."""
    if len(adapters) < 2:
        return {output: _with_digest(adapters[0]) if adapters else None}
    folders = {output / Path(adapter).name: _with_digest(adapter) for adapter in adapters}
    if len(folders) < len(adapters):
        names = listing([Path(adapter).name for adapter in adapters], 10)
        raise ConfigError(
            f"adapters are told apart by the names of their folders, and some are the same: {names}"
        )
    return dict(folders)


def _check_output(
    folder: Path, suite: Suite, version: str, model: str, adapter: str | None, resume: bool
) -> None:
    """Refuses a folder with records, unless they are to be continued and are of the same protocol and model."""
    files = sorted(folder.glob(f"*{SUFFIX}")) if folder.is_dir() else []
    if files and not resume:
        raise ConfigError(
            f"{folder} holds records already ({listing([file.name for file in files])}): continue them with --resume, "
            "or write to another folder"
        )
    wanted = {
        "protocol": suite.protocol,
        "protocol_version": version,
        "model": model,
        "adapter": adapter,
    }
    faults = []
    for file in files:
        header = Records.read(file).header
        faults += [
            f"{file.name} has {name} {getattr(header, name)!r}, not {value!r}"
            for name, value in wanted.items()
            if getattr(header, name) != value
        ]
    if faults:
        raise DataError(f"{folder} cannot be continued, results are never mixed: {'; '.join(faults)}")
