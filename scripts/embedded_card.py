"""The model card of the embedded base model, written from the numbers in metrics.json."""

from __future__ import annotations

from typing import Any

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [llama, small-language-model]
---

<!-- Written by scripts/pretrain_embedded.py; change it there. -->

# The embedded base model

A very small Llama ({parameters:,} parameters) that comes with modicum, so that demos, tests and
documentation have a real pre-trained model without a download.

## Shape

{layers} layers, width {hidden}, feed-forward width {inner}, {heads} heads of 64 ({kv_heads} key-value
heads), context {long_context} (rows of {context} until the last part of the run), tied
embeddings, byte-level BPE of {vocabulary:,} entries trained on the
same texts. Weights are stored in bfloat16. There is a simple chat template (`<|user|>...<|assistant|>...`).

## How it was made

    {command}

{tokens:,} tokens in {steps:,} steps and {minutes} minutes on {threads} threads of a shared machine;
optimizer {optimizer}, peak learning rate {lr:g}, {batch_tokens:,} tokens a step, seed {seed}. The schedule
follows the clock, so another run gives another model.{remark}

| source | share of the rows | passes | what it is | licence |
|---|---|---|---|---|
{sources}

No instruction data, no benchmark data and no text written by another model was used apart from
TinyStories, which is synthetic.

## Held-out perplexity

Texts that were in no training row (the first 12,000 characters of each of 8 books, 120 stories, the
first 100,000 characters of WikiText-2), in windows of {long_context} tokens without overlap.

| corpus | tokens | perplexity | bits per character |
|---|---|---|---|
{scores}

Perplexities are per token of this tokenizer and compare with no other tokenizer's; bits per character
do. `wikitext2` is another kind of text than anything the model has read.

## Use and limits

For trying out fine-tuning, merging, compression and serving in seconds on a laptop. It has read about
{ratio:.0f} tokens a parameter, a tenth of what would be usual at this size. It writes
simple English that soon loses its thread, knows no facts, follows no instructions beyond copying and
looking things up in a sentence, and repeats the views of books of 1790-1922. Do not put it before users.
"""

SOURCES = {
    "books": ("241 books of 1790-1922", "public domain"),
    "stories_lower": ("TinyStories as released in lower case", "CDLA-Sharing-1.0"),
    "stories_cased": ("the same stories with capitals put back by rule", "CDLA-Sharing-1.0"),
    "shakespeare": ("Tiny Shakespeare", "public domain"),
    "exercises": ("passages from `scripts/embedded_exercises.py`", "this project"),
}


def render(metrics: dict[str, Any]) -> str:
    """The text of README.md."""
    training = metrics["training"]
    sources = [
        f"| {name} | {share:.0%} | {training['passes'].get(name, 0):.2f} | {what} | {licence} |"
        for name, (what, licence) in SOURCES.items()
        for share in [training["mixture"][name]]
    ]
    scores = [
        f"| {name} | {score['tokens']:,} | {score['perplexity']:.2f} | {score['bits_per_character']:.3f} |"
        for name, score in metrics["held_out"].items()
    ]
    return CARD.format(
        parameters=metrics["parameters"],
        tokens=training["tokens"],
        steps=training["steps"],
        minutes=training["minutes"],
        ratio=training["tokens"] / metrics["parameters"],
        command=training["command"],
        remark=f"\n\n{training['remark']}" if training["remark"] else "",
        sources="\n".join(sources),
        scores="\n".join(scores),
        **{name: value for name, value in training["options"].items() if name not in ("tokens", "minutes")},
    )
