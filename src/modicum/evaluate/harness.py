"""The protocol `lm-eval`: tasks of lm-evaluation-harness, run by that library on rows of our own.

Everything is the library's: prompts, examples, scoring, filters, metrics and their standard errors (Gao et al.,
https://github.com/EleutherAI/lm-evaluation-harness). Only the source of the rows is replaced, by `harness_rows`.
A task is recorded as a whole: the library draws the examples of one item after the other from one generator.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
import logging
import sys
import warnings
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum.data.options import Section
from modicum.errors import ConfigError, MissingExtraError, did_you_mean
from modicum.evaluate.harness_model import library_model
from modicum.evaluate.harness_rows import SETS, HarnessSet, converted, never_right
from modicum.evaluate.intervals import CONFIDENCE, Measure, wilson
from modicum.evaluate.protocols import EvaluationTask, Subject, fingerprint, item_ids
from modicum.evaluate.records import Item, Records
from modicum.evaluate.suites import task_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


VERSION = "1"
#: the seed from which the library draws examples unless it is told another
_EXAMPLE_SEED = 1234
#: the tokens that the library generates at most unless a task says otherwise
_NEW_TOKENS = 256
_INVALID = "[invalid]"


class Options(Section):
    """What a suite may say about a task of this protocol."""

    data: str = Field(description="File of the rows below the data folder, or hub:NAME:CONFIG:SPLIT.")
    examples: str | None = Field(None, description="File of the rows from which examples are drawn.")
    task: str | None = Field(None, description="The library's name of the task, if not the one in the suite.")
    num_fewshot: int | None = Field(
        None, ge=0, description="Examples before the question; else the library's."
    )


class Task(EvaluationTask):
    """One task of the library, or several of one set (the subjects of MMLU)."""

    Options = Options
    options: Options

    def __init__(
        self, name: str, options: Options, built: dict[str, Any], examples: list[list[dict[str, Any]]]
    ) -> None:
        super().__init__(name, options)
        self._built = built
        self.ids = [doc["id"] for task in built.values() for doc in task.eval_docs]
        first = next(iter(built.values()))
        # examples are drawn by their places, so their order belongs to what is shown too
        before = [json.dumps(examples)] if first.config.num_fewshot else []
        self.template = fingerprint(*(_shown(task) for task in built.values()), *before)
        self.decoding = {"num_fewshot": first.config.num_fewshot or 0, "version": str(first.VERSION)}
        if first.OUTPUT_TYPE == "generate_until":
            self.decoding["generation"] = dict(first.config.generation_kwargs)
        self._details: dict[int, dict[str, Any]] = {}

    @classmethod
    def prepare(
        cls, name: str, options: Section, data_dir: Path, folder: Path | None, limit: int | None
    ) -> Task:
        """See `EvaluationTask.prepare`; `limit` counts for every subject of MMLU."""
        del folder  # nothing of the library's tasks is the suite's
        assert isinstance(options, Options)
        wanted = options.task or name
        if wanted not in SETS:
            raise ConfigError(
                f"no local rows for the lm-eval task {wanted!r}{did_you_mean(wanted, SETS)}; known: {', '.join(SETS)}"
            )
        source = SETS[wanted]
        rows = task_rows(data_dir, options.data)
        examples = task_rows(data_dir, options.examples) if options.examples else None
        ids = item_ids(rows)
        docs = converted(source, rows, ids)
        shown = converted(source, examples, item_ids(examples)) if examples else {}
        with _quietly():
            built = {
                key: _build(source, key, some[:limit], shown.get(key, []), options.num_fewshot)
                for key, some in docs.items()
            }
        short = [
            f"{key} ({len(shown.get(key, []))})"
            for key, task in built.items()
            if (task.config.num_fewshot or 0) > len(shown.get(key, []))
        ]
        if short:
            raise ConfigError(
                f"fewer examples than num_fewshot wants: {', '.join(short)}; name rows with `examples`"
            )
        task = cls(name, options, built, [shown.get(key, []) for key in built])
        # the examples of an item depend on the items before it
        task.rows = fingerprint(json.dumps(docs))
        task.notes += never_right(source, rows)
        return task

    def bind(self, subject: Subject) -> None:
        """See `EvaluationTask.bind`: an answer that is generated must leave room for its question, any must fit."""
        positions = getattr(subject.model.config, "max_position_embeddings", None)
        answers = sorted({text for task in self._built.values() for text in _answers(task)})
        ids = (
            subject.tokenizer(answers, add_special_tokens=False, verbose=False)["input_ids"]
            if answers
            else []
        )
        longest = max(map(len, ids), default=0)
        if positions and longest > positions:
            raise ConfigError(
                f"{self.name}: an answer of {longest} tokens is to be scored, but {subject.name} has {positions} "
                "positions; this task needs a model with more"
            )
        new = self.decoding.get("generation", {}).get("max_gen_toks", _NEW_TOKENS)
        if "generation" in self.decoding and positions and new >= positions:
            raise ConfigError(
                f"{self.name}: up to {new} new tokens, but {subject.name} has {positions} positions; this task needs a "
                "model with more"
            )

    def run(
        self, subject: Subject, done: Sequence[Records], batch_size: int
    ) -> Iterator[list[tuple[int, Item]]]:
        """See `EvaluationTask.run`; all items of an adapter at once."""
        self._details = {}
        places = [place for place, records in enumerate(done) if not records.complete]
        if not places:
            return
        evaluator = _library("evaluator")
        with _quietly(bars=sys.stderr.isatty()):
            wrapped = library_model(_library("models.huggingface").HFLM, subject, places, batch_size)
        for place in places:
            with _quietly(bars=sys.stderr.isatty()):
                wrapped.answer_for(place)
                for task in self._built.values():
                    task.set_fewshot_seed(_EXAMPLE_SEED)
                found = evaluator.evaluate(
                    wrapped, {"tasks": dict(self._built), "groups": {}, "group_map": {}}
                )
            self._details[place] = {
                "library": f"lm_eval {_library().__version__}",
                "results": _plain(found["results"]),
                "versions": _plain(found["versions"]),
                "n-shot": _plain(found["n-shot"]),
            }
            items = [
                _item(task, sample, wrapped, SETS[self.options.task or self.name].subject)
                for key, task in self._built.items()
                for sample in _first_filter(found["samples"][key])
            ]
            yield [(place, one) for one in items if one.item not in done[place]]

    def metrics(self, records: Records, details: Mapping[str, Any]) -> dict[str, Measure]:
        """The library's metrics with its standard errors as intervals; accuracy alone for partial records.

        Generated answers have the shares of items with an answer (`matched`, by the first filter) and empty ones too.
        """
        results, n = details.get("results"), len(records)
        if not results or not records.complete:
            return {"acc": wilson(sum(one.correct or 0 for one in records.items), n)}
        measures = _pooled(list(results.values()), [len(task.eval_docs) for task in self._built.values()])
        if "generation" in self.decoding:
            measures["matched"] = wilson(sum(one.matched for one in records.items), n)
            measures["empty"] = wilson(sum(not one.prediction.strip() for one in records.items), n)
        return measures

    def details(self, place: int) -> dict[str, Any]:
        """The library's version, results with standard errors, task versions and numbers of examples."""
        return self._details.get(place, {})


def _build(
    source: HarnessSet,
    key: str,
    docs: list[dict[str, Any]],
    examples: list[dict[str, Any]],
    shots: int | None,
) -> Any:
    """The library's task `key` with `docs` as rows of the split that it evaluates."""
    import datasets

    loader, tasks = _library("tasks._yaml_loader"), _library("tasks")
    folder = _tasks_folder() / source.folder
    manager = tasks.TaskManager(include_defaults=False, include_path=str(folder))
    if key not in manager.task_index:
        raise ConfigError(
            f"lm-eval has no task {key!r}{did_you_mean(key, manager.all_subtasks)} in {folder.name}"
        )
    config = loader.load_yaml(manager.task_index[key].yaml_path)
    evaluated = config.get("test_split") or config["validation_split"]
    splits = {evaluated: datasets.Dataset.from_list(docs)}
    shown = config.get("fewshot_split") or config.get("training_split")
    if examples and shown:
        splits[shown] = datasets.Dataset.from_list(examples)
    for name in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(name) not in splits:
            config[name] = None
    for name in ("tag", "group", "task_alias", "dataset_path", "dataset_name", "dataset_kwargs"):
        config.pop(name, None)
    if shots is not None:
        config["num_fewshot"] = shots
    return _library("api.task").ConfigurableTask(config={**config, "custom_dataset": lambda **_: splits})


def _item(task: Any, sample: dict[str, Any], wrapped: Any, subject: str | None) -> Item:
    doc = sample["doc"]
    slices = {subject: str(doc[subject])} if subject else {}
    if task.OUTPUT_TYPE == "generate_until":
        answer = sample["filtered_resps"][0]
        return Item(
            doc["id"],
            correct=float(sample["exact_match"]),
            prediction=sample["resps"][0][0],
            reference=str(sample["target"]),
            matched=answer != _INVALID,
            slices=slices,
        )
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else sample["target"]
    gold = choices.index(gold) if isinstance(gold, str) else int(gold)
    scores = [float(score) for score, _ in sample["filtered_resps"]]
    context, continuation = sample["arguments"][gold]
    return Item(
        doc["id"],
        correct=float(sample["acc"]),
        loss=-scores[gold],
        tokens=len(wrapped._encode_pair(context, continuation)[1]),  # noqa: SLF001, what the library scores
        prediction=choices[scores.index(max(scores))],
        reference=choices[gold],
        slices=slices,
    )


def _answers(task: Any) -> Iterator[str]:
    """All texts that are scored, which the library keeps whole while it cuts what stands before them."""
    if task.OUTPUT_TYPE == "multiple_choice":
        for doc in task.eval_docs:
            texts = [task.doc_to_target(doc)] if task.multiple_input else task.doc_to_choice(doc)
            yield from (f"{task.config.target_delimiter}{text}" for text in texts)


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _pooled(results: list[dict[str, Any]], sizes: list[int]) -> dict[str, Measure]:
    """Metrics over all `results`, weighted by `sizes` as the library does it for MMLU."""
    formulas = _library("api.metrics")
    found = {}
    for key in results[0]:
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr"):
            continue
        label = name if chosen == "none" else f"{name} ({chosen})"
        value = formulas.aggregate_subtask_metrics([one[key] for one in results], sizes, weight_by_size=True)
        errors = [one.get(f"{name}_stderr,{chosen}") for one in results]
        known = all(isinstance(error, float) for error in errors) and min(sizes) > 1
        error = formulas.pooled_sample_stderr(errors, sizes) if known else None
        half = None if error is None else NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
        low, high = (None, None) if half is None else (value - half, value + half)
        found[label] = Measure(value, low, high, sum(sizes), "standard error of lm-eval")
    return found


def _shown(task: Any) -> str:
    """What the model is shown and how it is scored, in words that stay the same while the library's task does."""
    config = task.config
    parts = [
        config.task, config.description, config.doc_to_text, config.doc_to_target, config.doc_to_choice,
        config.target_delimiter, config.fewshot_delimiter, config.fewshot_config, config.process_docs,
        config.output_type, config.filter_list, config.metric_list,
    ]  # fmt: skip
    return "\n".join(inspect.getsource(part) if inspect.isfunction(part) else repr(part) for part in parts)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, bool, int, float)) or value is None else str(value)


def _tasks_folder() -> Path:
    from pathlib import Path

    return Path(inspect.getfile(_library("tasks"))).parent


def _library(part: str = "") -> Any:
    from importlib import import_module

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(f"lm_eval.{part}" if part else "lm_eval")
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise _unusable(error) from error
        raise MissingExtraError(
            'the protocol lm-eval needs lm-evaluation-harness, which is not installed: pip install "modicum[eval]"'
        ) from error
    except (ImportError, AttributeError) as error:
        raise _unusable(error) from error


def _unusable(error: Exception) -> MissingExtraError:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("lm_eval", "transformers", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return MissingExtraError(
        f"lm-evaluation-harness cannot be used with what is installed ({', '.join(found)}): {type(error).__name__}: "
        f'{error}; pip install "modicum[eval]" with the versions in constraints.txt'
    )


@contextlib.contextmanager
def _quietly(*, bars: bool = False) -> Iterator[None]:
    """Silences the library's log and warnings while open, and its bars unless they are wanted."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.ExitStack() as stack:
            warnings.simplefilter("ignore")
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            yield
    finally:
        log.setLevel(level)
