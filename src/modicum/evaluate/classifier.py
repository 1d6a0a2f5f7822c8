"""The protocol `classifier`: a trained classification or regression head, measured with the metrics of GLUE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import Field

from modicum.data.checks import require_columns
from modicum.data.encoded import Collator
from modicum.data.labelled import encode_labelled, labels_of
from modicum.data.options import DataOptions, Section
from modicum.errors import ConfigError, listing
from modicum.evaluate import metrics as formulas
from modicum.evaluate.intervals import Measure, bootstrap, wilson
from modicum.evaluate.mixing import in_order, routed
from modicum.evaluate.protocols import EvaluationTask, Subject, fingerprint, held, item_ids
from modicum.evaluate.records import Item, Records
from modicum.evaluate.suites import task_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from modicum.data.files import Rows

VERSION = "1"

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
_CONTINUOUS = ("pearson", "spearman")


class Options(Section):
    """What a suite may say about a task of this protocol."""

    data: str = Field(description="File of the rows below the data folder, or hub:NAME:CONFIG:SPLIT.")
    columns: list[str] = Field(min_length=1, max_length=2, description="One or two columns of text.")
    label: str = Field("label", description="Column of the class index, or of the number.")
    labels: int = Field(ge=0, description="Classes; 0 when the label is a number.")
    label_names: list[str] = Field(
        [], description="Names of the classes, which rows may have instead of indices."
    )
    metrics: list[Metric] = Field(min_length=1, description="Official metrics, the main one first.")
    max_length: int = Field(128, ge=2, description="Longest row in tokens.")


class Task(EvaluationTask):
    """One labelled set."""

    Options = Options
    options: Options

    def __init__(self, name: str, options: Options, rows: Rows, ids: list[str]) -> None:
        super().__init__(name, options)
        self.ids = ids
        self._rows = rows
        self.kind = "seq_cls" if options.labels else "regression"
        self.num_labels = options.labels or 1
        self.template = fingerprint(options.columns, options.label, options.labels)
        self.decoding = {"max_length": options.max_length}

    @classmethod
    def prepare(
        cls, name: str, options: Section, data_dir: Path, folder: Path | None, limit: int | None
    ) -> Task:
        """See `EvaluationTask.prepare`."""
        del folder  # these tasks name no functions
        assert isinstance(options, Options)
        wrong = [one for one in options.metrics if (one in _CONTINUOUS) == bool(options.labels)]
        if wrong or options.labels == 1:
            raise ConfigError(
                f"labels = {options.labels} does not go with {listing(wrong) or 'a classifier'}: numbers (labels: 0) "
                "have pearson and spearman, classes (at least 2) have accuracy, f1 and matthews"
            )
        if len(options.label_names) not in {0, options.labels}:
            raise ConfigError(f"{len(options.label_names)} label_names for labels = {options.labels}")
        rows = task_rows(data_dir, options.data)
        require_columns(rows, [*options.columns, options.label], f"the task {name}")
        ids = item_ids(rows)
        found = labels_of(rows, _reading(options), options.labels or None, regression=not options.labels)
        never = [str(label) for label in range(options.labels) if label not in found]
        task = cls(name, options, rows.subset(list(range(len(rows)))[:limit]), ids[:limit])
        task.rows = held(rows, ids, [*options.columns, options.label])
        if never:
            task.notes.append(f"no item has the label {listing(never)}")
        return task

    def run(
        self, subject: Subject, done: Sequence[Records], batch_size: int
    ) -> Iterator[list[tuple[int, Item]]]:
        """See `EvaluationTask.run`."""
        regression = self.kind == "regression"
        data = encode_labelled(
            self._rows, _reading(self.options), subject.tokenizer, self.num_labels, regression=regression
        )
        assert data.targets is not None
        rows = self.missing(done)
        order = in_order([data.lengths[index] for _, index in rows], [place for place, _ in rows])
        pad = Collator(subject.tokenizer.pad_token_id)
        for at in range(0, len(order), batch_size):
            chosen = [rows[number] for number in order[at : at + batch_size]]
            batch = pad([{"input_ids": data[index]["input_ids"]} for _, index in chosen])
            told = routed(subject.model, subject.names(place for place, _ in chosen))
            with torch.no_grad():
                moved = {name: tensor.to(subject.model.device) for name, tensor in batch.items()}
                logits = subject.model(**moved, **told).logits.float().cpu().numpy()
            yield [
                (place, self._item(self.ids[index], row, data.targets[index].item()))
                for (place, index), row in zip(chosen, logits, strict=True)
            ]

    def metrics(self, records: Records, details: Mapping[str, Any]) -> dict[str, Measure]:
        """The metrics that the suite names."""
        del details
        predicted, labels = (records.column(name).astype(float) for name in ("prediction", "reference"))
        formula: dict[str, Any] = {
            "f1": lambda x, y: formulas.f1(x, y, self.options.labels),
            "matthews": formulas.matthews,
            "pearson": formulas.pearson,
            "spearman": formulas.spearman,
        }
        return {
            name: wilson(int((predicted == labels).sum()), len(records))
            if name == "accuracy"
            else bootstrap((predicted, labels), formula[name])
            for name in self.options.metrics
        }

    def remarks(self, records: Records) -> list[str]:
        """Metrics that the records leave undefined; each is 0 then, as scikit-learn has it."""
        sides = {name: set(records.column(name)) for name in ("prediction", "reference")}
        constant = [f"every {name} is {next(iter(seen))}" for name, seen in sides.items() if len(seen) == 1]
        found = [
            f"{name} is undefined and counted as 0: {' and '.join(constant)}"
            for name in self.options.metrics
            if constant and name in {"matthews", *_CONTINUOUS}
        ]
        if "f1" in self.options.metrics:
            counted = [1] if self.options.labels == 2 else range(self.options.labels)
            empty = [
                str(label) for label in counted if not any(str(label) in seen for seen in sides.values())
            ]
            if empty:
                found.append(
                    f"f1 of {listing(empty)} is undefined and counted as 0: nowhere wanted or predicted"
                )
        return found

    def _item(self, name: str, logits: Any, target: float) -> Item:
        if self.kind == "regression":
            return Item(name, prediction=repr(float(logits[0])), reference=repr(float(target)))
        predicted = int(logits.argmax())
        loss = float(formulas.cross_entropies(logits[None], np.array([target]))[0])
        return Item(
            name,
            correct=float(predicted == target),
            loss=loss,
            tokens=1,
            prediction=str(predicted),
            reference=str(int(target)),
        )


def _reading(options: Options) -> DataOptions:
    """How rows are read, in the words of the data section of a recipe."""
    return DataOptions.model_validate(
        {
            "text_columns": options.columns,
            "label_column": options.label,
            "label_names": options.label_names or None,
            "max_length": options.max_length,
        }
    )
