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
from modicum.evaluate.load import adapted, placed
from modicum.evaluate.protocols import EvaluationTask, Subject, check, version_of
from modicum.evaluate.records import SUFFIX, Header, Records, digest_of
from modicum.models.loading import load_base, load_tokenizer, quiet_transformers
from modicum.store.atomic import write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from modicum.evaluate.intervals import Measure
    from modicum.evaluate.suites import Suite

    Advance = Callable[[int], None]

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
    dtype: str = "auto",
    advance: Advance | None = None,
) -> list[SuiteResult]:
    """The results of `suite` for `model`, or for each of `adapters` on it in turn; the base is loaded once.

    `output` receives `TASK.parquet` (see `Records`) and `summary.json`, with several adapters in a folder for each.
    With `resume`, items that are recorded there already are not run again. `limit`: only so many items of each task.

    Raises:
        ConfigError, DataError: what is wrong with the suite, its data or the output; all of it, before the model is
        loaded where possible.
    """
    tasks = checked(suite, data_dir, limit)
    folders = _folders(output, adapters)
    for folder, adapter in folders.items():
        _check_output(folder, suite, version_of(suite.protocol), model, adapter, resume)
    results = []
    for subject, folder in zip(_subjects(model, tasks, adapters, dtype), folders, strict=True):
        found = {task.name: _run(task, suite, subject, folder, batch_size, advance) for task in tasks}
        result = SuiteResult(
            suite.name, suite.protocol, version_of(suite.protocol), model, subject.adapter, limit, found
        )
        write_text(folder / "summary.json", json.dumps(result.as_dict(), indent=1) + "\n")
        results.append(result)
    return results


def checked(suite: Suite, data_dir: Path, limit: int | None = None) -> list[EvaluationTask]:
    """The tasks of `suite`, ready to run.

    Raises:
        ConfigError: the faults of all tasks at once; tasks that need different heads.
    """
    found = check(suite, data_dir, limit)
    if found.faults:
        raise ConfigError(f"the suite {suite.name} cannot be run. " + ". ".join(found.faults))
    return found.tasks


def _run(
    task: EvaluationTask,
    suite: Suite,
    subject: Subject,
    folder: Path,
    batch_size: int,
    advance: Advance | None,
) -> TaskResult:
    task.bind(subject)
    path, beside = folder / f"{task.name}{SUFFIX}", folder / f"{task.name}.json"
    header = Header(
        protocol=suite.protocol,
        protocol_version=version_of(suite.protocol),
        suite=suite.name,
        task=task.name,
        template=task.template,
        model=subject.name,
        adapter=subject.adapter,
        base_fingerprint=subject.base_fingerprint,
        items=digest_of(task.ids),
        decoding=task.decoding,
        created_with=f"modicum {__version__}",
    )
    records = Records.read(path).resumed(header, task.ids) if path.exists() else Records(header)
    if beside.is_file():
        task.restore(json.loads(beside.read_text(encoding="utf-8")))
    _report(advance, len(records))
    last = time.monotonic()
    try:
        for items in task.run(subject, records, batch_size):
            records.append(items)
            _report(advance, len(items))
            if time.monotonic() - last >= _SAVE_EVERY:
                records.write(path)
                last = time.monotonic()
    except BaseException:
        records.write(path)
        raise
    details = task.details()
    if details:
        write_text(beside, json.dumps(details, indent=1) + "\n")
    records.write(path)
    return TaskResult(len(records), task.metrics(records), task.notes, details)


def _report(advance: Advance | None, items: int) -> None:
    if advance is not None and items:
        advance(items)


def _subjects(
    model: str, tasks: Sequence[EvaluationTask], adapters: Sequence[str], dtype: Any
) -> Iterator[Subject]:
    """`model` with each adapter in turn, or alone; an adapter is taken off before the next is put on."""
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
    digest = _fingerprint(base)
    if not adapters:
        yield Subject(base, tokenizer, model, None, digest)
        return
    for adapter in adapters:
        with quiet_transformers():
            carrying = placed(adapted(base, adapter)).eval()
        yield Subject(carrying, tokenizer, model, _with_digest(adapter), digest)
        base = carrying.unload()


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


def _folders(output: Path, adapters: Sequence[str]) -> dict[Path, str | None]:
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
