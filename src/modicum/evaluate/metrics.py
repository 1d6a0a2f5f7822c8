"""Metrics as small formulas on NumPy arrays."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[Any]

#: whether a larger value of the metric is better
LARGER_IS_BETTER: dict[str, bool] = {
    "loss": False,
    "perplexity": False,
    "token_accuracy": True,
    "exact_match": True,
    "accuracy": True,
    "f1": True,
    "matthews": True,
    "pearson": True,
    "spearman": True,
    "mse": False,
}

#: what each task reports, the first one selects models unless a recipe names another
TASK_METRICS: dict[str, tuple[str, ...]] = {
    "causal_lm": ("loss", "perplexity", "token_accuracy"),
    "seq_cls": ("accuracy", "f1", "matthews", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
}


def accuracy(predicted: Array, labels: Array) -> float:
    """Share of predictions equal to their label."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def f1(predicted: Array, labels: Array, classes: int = 2) -> float:
    """F1 of class 1 for two classes, else the plain mean over the classes; 0 where a class has no hits."""
    predicted, labels = np.asarray(predicted), np.asarray(labels)
    scores = []
    for index in [1] if classes == 2 else range(classes):
        hits = np.sum((predicted == index) & (labels == index))
        total = np.sum(predicted == index) + np.sum(labels == index)
        scores.append(2 * hits / total if total else 0.0)
    return float(np.mean(scores))


def matthews(predicted: Array, labels: Array) -> float:
    """Matthews correlation (R_K for more than two classes); 0 when either side is constant."""
    predicted, labels = np.asarray(predicted, np.int64), np.asarray(labels, np.int64)
    size = int(max(predicted.max(), labels.max())) + 1
    table = np.bincount(labels * size + predicted, minlength=size * size).reshape(size, size).astype(float)
    seen, guessed, total = table.sum(1), table.sum(0), table.sum()
    above = np.trace(table) * total - seen @ guessed
    below = math.sqrt((total**2 - guessed @ guessed) * (total**2 - seen @ seen))
    return float(above / below) if below else 0.0


def pearson(x: Array, y: Array) -> float:
    """Linear correlation; 0 when either side is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    # by their ends: rounding of the mean makes constants look as if they varied
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = _centred(x), _centred(y)
    return float(np.clip(x @ y / math.sqrt((x @ x) * (y @ y)), -1, 1))


def _centred(x: Array) -> Array:
    """Distances from the mean, the largest of them 1, so that no square over- or underflows."""
    x = x / np.abs(x).max()
    x = x - x.mean()
    return x / np.abs(x).max()


def ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Array, y: Array) -> float:
    """Rank correlation; 0 when either side is constant."""
    return pearson(ranks(x), ranks(y))


def perplexity(loss: float) -> float:
    """exp(loss in nats per token); infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def cross_entropies(logits: Array, labels: Array) -> Array:
    """Loss in nats of each row: logits (n, classes), labels (n,)."""
    logits = np.asarray(logits, float)
    top = logits.max(1, keepdims=True)
    norm = np.log(np.exp(logits - top).sum(1)) + top[:, 0]
    return norm - logits[np.arange(len(logits)), np.asarray(labels, np.int64)]


def classification(logits: Array, labels: Array) -> dict[str, float]:
    """Accuracy, F1, Matthews and loss from logits (n, classes) and labels (n,)."""
    logits, labels = np.asarray(logits), np.asarray(labels)
    predicted = logits.argmax(1)
    return {
        "accuracy": accuracy(predicted, labels),
        "f1": f1(predicted, labels, logits.shape[1]),
        "matthews": matthews(predicted, labels),
        "loss": float(cross_entropies(logits, labels).mean()),
    }


def regression(values: Array, labels: Array) -> dict[str, float]:
    """Pearson, Spearman and mean squared error (which is also the loss) from values and labels (n,)."""
    values, labels = np.asarray(values, float).reshape(-1), np.asarray(labels, float).reshape(-1)
    error = float(np.mean((values - labels) ** 2))
    return {
        "pearson": pearson(values, labels),
        "spearman": spearman(values, labels),
        "mse": error,
        "loss": error,
    }


def language(sums: Array) -> dict[str, float]:
    """Loss, perplexity and token accuracy from rows of (summed loss, tokens, tokens guessed right).

    The loss is a mean over tokens, not over rows, so batches and padding do not change it.
    """
    loss, tokens, right = np.asarray(sums, float).sum(0)
    mean = float(loss / tokens) if tokens else math.nan
    share = float(right / tokens) if tokens else math.nan
    return {"loss": mean, "perplexity": perplexity(mean), "token_accuracy": share}
