"""The protocol `llm-adapters`: the model writes an answer to an instruction, and the answer is looked for in it.

Choices by the first match of a pattern, as in LLM-Adapters (Hu et al. 2023, arXiv:2304.01933); numbers and
expressions after a fixed closing phrase, as in MetaMath (Yu et al. 2023, arXiv:2309.12284). The originals count a text
in which no answer is found as wrong and say nothing of it; here it is counted as wrong and reported.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

from pydantic import Field

from modicum.data.checks import Faults, require_columns, template_columns, text_of
from modicum.data.language import special_prefix
from modicum.data.options import Section
from modicum.errors import ConfigError, listing
from modicum.evaluate import answers
from modicum.evaluate.generate import completions
from modicum.evaluate.intervals import Measure, wilson
from modicum.evaluate.protocols import EvaluationTask, Subject, fingerprint, held, item_ids
from modicum.evaluate.records import Item, Records
from modicum.evaluate.suites import task_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from modicum.data.files import Rows
    from modicum.evaluate.answers import Found

VERSION = "1"
#: the slice that says how an answer was found
FOUND = "found"


class Options(Section):
    """What a suite may say about a task of this protocol."""

    data: str = Field(description="File of the rows below the data folder, or hub:NAME:CONFIG:SPLIT.")
    template: str = Field(description="The prompt, with columns in braces.")
    reference: str = Field(description="Column of the wanted answer.")
    extract: str = Field(description="choice, number, math, or FILE.py:FUNCTION beside the suite.")
    answers: list[str] = Field([], description="choice: all possible answers.")
    closing: str = Field("The answer is: ", description="number and math: the phrase before the answer.")
    stop: list[str] = Field([], description="Words before the first of which an answer ends.")
    slices: list[str] = Field([], description="Columns whose values group the items.")
    num_beams: int = Field(1, ge=1, description="Beams of the search; 1 is greedy.")
    max_new_tokens: int = Field(32, ge=1, description="Longest answer.")


class Task(EvaluationTask):
    """One task: prompts, wanted answers, and how to find the given ones."""

    Options = Options
    options: Options

    def __init__(self, name: str, options: Options, rows: Rows, ids: list[str], folder: Path | None) -> None:
        super().__init__(name, options)
        self.ids = ids
        self._rows = rows.rows
        self._prompts = [options.template.format_map(row) for row in rows.rows]
        self._extract = _extractor(options, folder)
        self.template = fingerprint(
            options.template, options.reference, options.extract, options.answers, options.closing
        )
        self.decoding = {"num_beams": options.num_beams, "max_new_tokens": options.max_new_tokens}
        if options.stop:
            self.decoding["stop"] = options.stop

    @classmethod
    def prepare(
        cls, name: str, options: Section, data_dir: Path, folder: Path | None, limit: int | None
    ) -> Task:
        """See `EvaluationTask.prepare`."""
        assert isinstance(options, Options)
        if options.extract == "choice" and len(set(options.answers)) < 2:
            raise ConfigError("extract = choice needs at least two different answers")
        rows = task_rows(data_dir, options.data)
        columns = template_columns(options.template)
        if not columns:
            raise ConfigError("the template names no column: every item would be asked the same")
        require_columns(rows, [*columns, options.reference, *options.slices], f"the task {name}")
        references = _check_rows(rows, options, columns)
        ids = item_ids(rows)
        kept = list(range(len(rows)))[:limit]
        task = cls(name, options, rows.subset(kept), ids[:limit], folder)
        task.rows = held(rows, ids, [*columns, options.reference])
        never = [answer for answer in options.answers if answer not in references]
        if never:
            task.notes.append(f"no item has the answer {listing(never)}")
        return task

    def bind(self, subject: Subject) -> None:
        """See `EvaluationTask.bind`: notes whether prompt and answer may run past the model's positions."""
        positions = getattr(subject.model.config, "max_position_embeddings", None) or math.inf
        ids = subject.tokenizer(self._prompts, verbose=False)["input_ids"]
        long = sum(len(prompt) + self.options.max_new_tokens > positions for prompt in ids)
        note = f"up to {long} items run past the {positions} positions of {subject.name}"
        if long and note not in self.notes:
            self.notes.append(note)

    def run(
        self, subject: Subject, done: Sequence[Records], batch_size: int
    ) -> Iterator[list[tuple[int, Item]]]:
        """See `EvaluationTask.run`."""
        rows = self.missing(done)
        start = special_prefix(subject.tokenizer)
        texts = [self._prompts[index] for _, index in rows]
        ids = subject.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        prompts = [start + prompt for prompt in ids]
        for batch in completions(
            subject.model,
            subject.tokenizer,
            prompts,
            num_beams=self.options.num_beams,
            max_new_tokens=self.options.max_new_tokens,
            batch_size=batch_size,
            adapter_names=subject.names(place for place, _ in rows),
        ):
            found = [(*rows[at], text) for at, text in batch.items()]
            yield [(place, self._item(index, text)) for place, index, text in found]

    def metrics(self, records: Records, details: Mapping[str, Any]) -> dict[str, Measure]:
        """Accuracy; the shares of items with an answer (`matched`), found elsewhere than wanted, and empty."""
        del details
        n = len(records)
        how = records.slice_of(FOUND)
        right = [bool(one.correct) for one in records.items]
        measures = {"accuracy": wilson(sum(right), n), "matched": wilson(n - how.count("none"), n)}
        if self.options.extract in {"number", "math"}:
            literal = sum(hit and way == "literal" for hit, way in zip(right, how, strict=True))
            measures["accuracy_literal"] = wilson(literal, n)
            measures["fallback"] = wilson(how.count("fallback"), n)
        measures["empty"] = wilson(sum(not one.prediction for one in records.items), n)
        return measures

    def _item(self, index: int, text: str) -> Item:
        row = self._rows[index]
        text = answers.before(text, self.options.stop)
        found, wanted = self._extract(text, row), row[self.options.reference]
        same = {"number": answers.same_number, "math": answers.same_expression}.get(
            self.options.extract, str.__eq__
        )
        right = found.how != "none" and same(found.answer, wanted)
        slices = {name: str(row[name]) for name in self.options.slices}
        return Item(
            self.ids[index],
            correct=float(right),
            prediction=text,
            reference=wanted,
            matched=found.how != "none",
            slices={**slices, FOUND: found.how},
        )


def _extractor(options: Options, folder: Path | None) -> Callable[[str, dict[str, Any]], Found]:
    if options.extract == "choice":
        return lambda text, _: answers.choice(text, options.answers)
    if options.extract == "number":
        return lambda text, _: answers.number(text, options.closing)
    if options.extract == "math":
        answers.same_expression("1", "1")  # says now, not after hours, if the library is missing
        return lambda text, _: answers.expression(text, options.closing)
    own = answers.function(options.extract, folder)

    def extract(text: str, row: dict[str, Any]) -> Found:
        answer = own(text, row)
        if answer is not None and not isinstance(answer, str):
            raise ConfigError(
                f"{options.extract} gave {answer!r}; it must return text, or None where there is none"
            )
        return answers.Found(answer, "literal") if answer else answers.NOTHING

    return extract


def _check_rows(rows: Rows, options: Options, columns: list[str]) -> Counter[str]:
    """How often each wanted answer occurs."""
    faults, references = Faults(rows), Counter()
    for index, row in enumerate(rows.rows):
        for column in dict.fromkeys([*columns, *options.slices]):
            text_of(row, column, index, faults)
        wanted = text_of(row, options.reference, index, faults)
        references[wanted] += 1
        if wanted and options.answers and wanted not in options.answers:
            faults.add(index, f"{options.reference} = {wanted!r} is none of {', '.join(options.answers)}")
        if wanted and options.extract == "number" and not answers.same_number(wanted, wanted):
            faults.add(index, f"{options.reference} = {wanted!r} is no number")
    faults.finish()
    return references
