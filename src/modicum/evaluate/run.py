"""Evaluating a model on rows: every metric with an interval and the number of rows behind it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional as F

from modicum.data.encoded import IGNORED, Collator, Encoded
from modicum.errors import ConfigError, DataError
from modicum.evaluate import metrics as formulas
from modicum.evaluate.generate import complete
from modicum.evaluate.intervals import CONFIDENCE, Measure, bootstrap, wilson

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from modicum.data.options import Task

    Advance = Callable[[int], None]


@dataclass(frozen=True)
class Evaluation:
    """What was measured: metrics with intervals, and optionally what the model said."""

    task: str
    rows: int
    metrics: dict[str, Measure]
    #: per row: completions (exact match), predicted class or predicted number
    predictions: list[Any] = field(default_factory=list, repr=False)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "task": self.task,
            "rows": self.rows,
            "metrics": {name: asdict(measure) for name, measure in self.metrics.items()},
        }


def evaluate(
    model: Any,
    tokenizer: Any,
    data: Encoded,
    task: Task = "causal_lm",
    *,
    batch_size: int = 16,
    exact_match: bool | None = None,
    max_new_tokens: int | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = 1000,
    seed: int = 0,
    advance: Advance | None = None,
) -> Evaluation:
    """The metrics of `model` on `data`, each with an interval (`Measure.method` says which) and its n.

    causal_lm: loss and perplexity per trained token, token accuracy, and, for rows with a prompt, the share of
    greedy completions equal to the wanted one (outer spaces aside); `exact_match=False` leaves that out.
    seq_cls: accuracy, F1, Matthews, loss. regression: Pearson, Spearman, mean squared error.
    `max_new_tokens`: by default enough for the longest wanted completion. `advance(rows)` reports progress.

    Raises:
        DataError: no rows. ConfigError: exact match is wanted but the rows have no prompts.
    """
    if not len(data):
        raise DataError("there are no rows to evaluate on")
    was_training = model.training
    model.eval()
    boot = {"confidence": confidence, "resamples": resamples, "seed": seed}
    try:
        if task == "causal_lm":
            return _language(
                model,
                tokenizer,
                data,
                batch_size,
                _wants_match(data, exact_match),
                max_new_tokens,
                boot,
                advance,
            )
        return _labelled(model, tokenizer, data, task, batch_size, boot, advance)
    finally:
        model.train(was_training)


def token_losses(
    model: Any, tokenizer: Any, data: Encoded, batch_size: int, advance: Advance | None = None
) -> Any:
    """(rows, 3) float64 array: summed loss in nats, number of tokens, tokens guessed right, of each row."""
    sums = np.zeros((len(data), 3))
    for chosen, batch in _batches(model, tokenizer, data, batch_size):
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, :-1]
        wanted = labels[:, 1:]
        counted = wanted != IGNORED
        for row, index in enumerate(chosen):
            scores, target = logits[row][counted[row]].float(), wanted[row][counted[row]]
            loss = F.cross_entropy(scores, target, reduction="sum").item() if len(target) else 0.0
            sums[index] = loss, len(target), (scores.argmax(-1) == target).sum().item()
        if advance is not None:
            advance(len(chosen))
    return sums


def _language(
    model: Any,
    tokenizer: Any,
    data: Encoded,
    batch_size: int,
    match: bool,
    max_new_tokens: int | None,
    boot: dict[str, Any],
    advance: Advance | None,
) -> Evaluation:
    sums = token_losses(model, tokenizer, data, batch_size, advance)
    tokens = int(sums[:, 1].sum())
    # rows are resampled, not tokens: the tokens of one row depend on each other
    found = {
        name: bootstrap(sums, lambda rows, name=name: formulas.language(rows)[name], **boot)
        for name in ("loss", "perplexity", "token_accuracy")
    }
    measures = {
        name: Measure(m.value, m.low, m.high, tokens, "bootstrap over rows") for name, m in found.items()
    }
    texts: list[str] = []
    if match:
        room = max_new_tokens or longest_completion(data)
        prompts = [data.prompt(index) for index in range(len(data))]
        texts = complete(
            model, tokenizer, prompts, max_new_tokens=room, batch_size=batch_size, advance=advance
        )
        hits = sum(text == wanted for text, wanted in zip(texts, data.references, strict=True))
        measures["exact_match"] = wilson(hits, len(data), boot["confidence"])
    return Evaluation("causal_lm", len(data), measures, list(texts))


def _labelled(
    model: Any,
    tokenizer: Any,
    data: Encoded,
    task: Task,
    batch_size: int,
    boot: dict[str, Any],
    advance: Advance | None,
) -> Evaluation:
    outputs: list[Any] = [None] * len(data)
    for chosen, batch in _batches(model, tokenizer, data, batch_size):
        batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits.float().cpu().numpy()
        for row, index in enumerate(chosen):
            outputs[index] = logits[row]
        if advance is not None:
            advance(len(chosen))
    values, labels = np.stack(outputs), np.asarray(data.targets)
    if task == "regression":
        pair = (values[:, 0], labels)
        measures = {
            name: bootstrap(pair, lambda x, y, name=name: formulas.regression(x, y)[name], **boot)
            for name in ("pearson", "spearman", "mse")
        }
        return Evaluation(task, len(data), measures, values[:, 0].tolist())
    predicted, classes = values.argmax(1), values.shape[1]
    pair = (predicted, labels)
    measures = {
        "accuracy": wilson(int((predicted == labels).sum()), len(data), boot["confidence"]),
        "f1": bootstrap(pair, lambda x, y: formulas.f1(x, y, classes), **boot),
        "matthews": bootstrap(pair, formulas.matthews, **boot),
        "loss": bootstrap(formulas.cross_entropies(values, labels), np.mean, **boot),
    }
    return Evaluation(task, len(data), measures, predicted.tolist())


def _batches(
    model: Any, tokenizer: Any, data: Encoded, batch_size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Row indices and padded batches; rows of similar length together, the longest first."""
    lengths = data.lengths
    order = sorted(range(len(data)), key=lambda index: -lengths[index])
    pad = Collator(tokenizer.pad_token_id)
    device = next(model.parameters()).device
    for at in range(0, len(order), batch_size):
        chosen = order[at : at + batch_size]
        yield chosen, {name: tensor.to(device) for name, tensor in pad([data[i] for i in chosen]).items()}


def _wants_match(data: Encoded, exact_match: bool | None) -> bool:
    possible = all(reference is not None for reference in data.references)
    if exact_match and not possible:
        raise ConfigError(
            "exact match needs rows of prompt and completion with data.completion_only; these rows have no prompt"
        )
    return possible if exact_match is None else exact_match


def longest_completion(data: Encoded) -> int:
    """Tokens of the longest wanted completion."""
    return max(len(data[i]["input_ids"]) - len(data.prompt(i)) for i in range(len(data)))
