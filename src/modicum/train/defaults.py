"""Learning rates used where a recipe names none, with their reasons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Default learning rates for language modelling and for classification or regression."""

    language: float
    labelled: float
    reason: str
    #: rank at which the rates hold; they are divided by r / rank where the step depends on the rank
    rank: int | None = None


#: one table for all methods; others (third-party ones too) use `FALLBACK`
RATES: dict[str, Rate] = {
    "lora_xs": Rate(
        4e-3,
        1e-3,
        "arXiv 2405.17604 tunes R with 4e-3 on maths and about 1e-3 on GLUE at ranks near 16; Adam's first step has "
        "norm lr·r, so lr·r is kept constant when the rank changes",
        rank=16,
    ),
    "lora": Rate(
        2e-4, 4e-4, "arXiv 2305.14314 (QLoRA) for language, arXiv 2106.09685 (GLUE, RoBERTa) for labels"
    ),
    "dora": Rate(2e-4, 4e-4, "as LoRA, arXiv 2402.09353"),
    "vera": Rate(4e-3, 4e-3, "arXiv 2310.11454 trains its vectors about ten times faster than LoRA"),
    "tiny_lora": Rate(
        2e-3, 2e-3, "a few hundred numbers that each move whole layers; between LoRA-XS and VeRA"
    ),
    "psoft": Rate(4e-4, 4e-4, "rotations inside a low-rank subspace, trained like LoRA"),
    "q_bara": Rate(2e-4, 4e-4, "arXiv 2407.17029 trains it with LoRA's 2e-4"),
    "qa_hira": Rate(2e-4, 4e-4, "as Q-BaRA, arXiv 2407.17029"),
    "qa_lora": Rate(2e-4, 4e-4, "as LoRA, arXiv 2309.14717 uses 2e-5 to 2e-4"),
    "qa_blora": Rate(2e-4, 4e-4, "as QA-LoRA"),
    "elastic_lora": Rate(3e-4, 3e-4, "arXiv 2404.10934 and 2410.03750 train all their adapters with 3e-4"),
    "sparse_peft": Rate(3e-4, 3e-4, "arXiv 2410.03750"),
    "qa_sparse_peft": Rate(3e-4, 3e-4, "arXiv 2410.03750"),
    "full": Rate(2e-5, 2e-5, "the usual rate for fine-tuning all weights with Adam"),
}
FALLBACK = Rate(2e-4, 4e-4, "as LoRA")

#: a fresh classification head starts from random numbers and needs more than the adapter; arXiv 2405.17604 uses
#: 5e-4 to 1e-2
HEAD_RATE = 1e-3


def learning_rate(method: str, task: str, rank: int | None) -> float:
    """The default learning rate of `method` on `task` at rank `rank` (None: the method's own default)."""
    rate = RATES.get(method, FALLBACK)
    base = rate.language if task == "causal_lm" else rate.labelled
    return base * rate.rank / rank if rate.rank and rank else base


def head_learning_rate(method: str, rate: float) -> float:
    """The default learning rate of a fresh head beside an adapter trained at `rate`."""
    return rate if method == "full" else max(rate, HEAD_RATE)
