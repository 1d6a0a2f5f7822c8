"""The protocol `perplexity`: running text in overlapping windows, every token predicted once.

The first window predicts all its tokens but the first; each later one moves on by `stride` and predicts only the
tokens that no window before it has, so that each has at least `window − stride` tokens of context. Perplexity per
token depends on the tokenizer; per word, exp(nats / words), and bits per byte do not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import Field
from torch.nn import functional as F

from modicum.data.checks import Faults, require_columns, text_of
from modicum.data.language import special_prefix
from modicum.data.options import Section
from modicum.errors import ConfigError, DataError
from modicum.evaluate import metrics as formulas
from modicum.evaluate.intervals import Measure, bootstrap
from modicum.evaluate.mixing import routed
from modicum.evaluate.protocols import EvaluationTask, Subject, fingerprint, item_ids
from modicum.evaluate.records import Item, Records
from modicum.evaluate.suites import task_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

VERSION = "1"


class Options(Section):
    """What a suite may say about a task of this protocol."""

    data: str = Field(description="File of the texts below the data folder, or hub:NAME:CONFIG:SPLIT.")
    column: str = Field("text", description="Column of the text.")
    window: int = Field(512, ge=2, description="Tokens that the model sees at once; at most its positions.")
    stride: int | None = Field(
        None, ge=1, description="Tokens by which a window moves on; half of it if unset."
    )


class Task(EvaluationTask):
    """The texts of one file; its items are windows, named `text#number`."""

    Options = Options
    options: Options

    def __init__(
        self, name: str, options: Options, texts: list[str], names: list[str], limit: int | None
    ) -> None:
        super().__init__(name, options)
        self._texts, self._names, self._limit = texts, names, limit
        self._windows: list[tuple[list[int], int]] = []
        self.template = fingerprint(*texts)
        self.decoding = {"window": options.window, "stride": options.stride or max(1, options.window // 2)}

    @classmethod
    def prepare(
        cls, name: str, options: Section, data_dir: Path, folder: Path | None, limit: int | None
    ) -> Task:
        """See `EvaluationTask.prepare`; `limit` counts windows."""
        del folder  # these tasks name no functions
        assert isinstance(options, Options)
        if options.stride and options.stride >= options.window:
            raise ConfigError(
                f"stride = {options.stride} must be less than window = {options.window}: tokens would be left out"
            )
        rows = task_rows(data_dir, options.data)
        require_columns(rows, [options.column], f"the task {name}")
        faults = Faults(rows)
        texts = [text_of(row, options.column, index, faults) for index, row in enumerate(rows.rows)]
        faults.finish()
        return cls(name, options, texts, item_ids(rows), limit)

    def bind(self, subject: Subject) -> None:
        """See `EvaluationTask.bind`: windows are of tokens, and the model has only so many positions."""
        positions = getattr(subject.model.config, "max_position_embeddings", None)
        window, stride = self.decoding["window"], self.decoding["stride"]
        if positions and window > positions:
            raise ConfigError(
                f"{self.name}: window = {window}, but {subject.name} has {positions} positions; set window (and "
                "stride) lower in a suite of your own"
            )
        start = special_prefix(subject.tokenizer)
        self._windows, self.ids = [], []
        for name, text in zip(self._names, self._texts, strict=True):
            ids = start + subject.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for number, (begin, scored) in enumerate(_spans(len(ids), window, stride)):
                self._windows.append((ids[begin : scored[1]], scored[1] - scored[0]))
                self.ids.append(f"{name}#{number}")
        if not self.ids:
            raise DataError(f"{self.name}: no text has two tokens, and the first of a text is not predicted")
        self._windows, self.ids = self._windows[: self._limit], self.ids[: self._limit]

    def run(
        self, subject: Subject, done: Sequence[Records], batch_size: int
    ) -> Iterator[list[tuple[int, Item]]]:
        """See `EvaluationTask.run`."""
        by_length: dict[int, list[tuple[int, int]]] = {}
        for place, index in self.missing(done):
            # windows of one length need no padding; all but the last of a text have the same
            by_length.setdefault(len(self._windows[index][0]), []).append((place, index))
        for same in by_length.values():
            for at in range(0, len(same), batch_size):
                chosen = same[at : at + batch_size]
                windows = [self._windows[index] for _, index in chosen]
                ids = torch.tensor([tokens for tokens, _ in windows], device=subject.model.device)
                told = routed(subject.model, subject.names(place for place, _ in chosen))
                with torch.no_grad():
                    logits = subject.model(input_ids=ids, **told).logits[:, :-1].float()
                losses = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double()
                yield [
                    (place, Item(self.ids[index], loss=row[-count:].sum().item(), tokens=count))
                    for (place, index), row, (_, count) in zip(chosen, losses, windows, strict=True)
                ]

    def metrics(self, records: Records, details: Mapping[str, Any]) -> dict[str, Measure]:
        """Perplexity per token, and per word and byte once every window of the whole text is recorded."""
        del details
        sums = np.stack([records.column("loss"), records.column("tokens")], 1)
        tokens = int(sums[:, 1].sum())
        found = bootstrap(sums, lambda rows: formulas.perplexity(rows[:, 0].sum() / rows[:, 1].sum()))
        measures = {
            "perplexity": Measure(found.value, found.low, found.high, tokens, "bootstrap over windows")
        }
        if self._limit is None and records.complete:
            nats = float(sums[:, 0].sum())
            words = sum(len(text.split()) for text in self._texts)
            size = sum(len(text.encode()) for text in self._texts)
            whole = "the whole text"
            measures["word_perplexity"] = Measure(formulas.perplexity(nats / words), None, None, words, whole)
            measures["bits_per_byte"] = Measure(nats / math.log(2) / size, None, None, size, whole)
        return measures


def _spans(length: int, window: int, stride: int) -> Iterator[tuple[int, tuple[int, int]]]:
    """Where each window begins, and the tokens [from, to) that it predicts."""
    done = 1
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        if end > done:
            yield begin, (done, end)
        done = end
        if end == length:
            return
