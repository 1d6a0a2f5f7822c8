"""Completions of many prompts, greedy or by beam search: batched, padded on the left, longest prompts first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from modicum.data.encoded import Collator
from modicum.evaluate.mixing import in_order, routed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


def complete(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    advance: Callable[[int], None] | None = None,
) -> list[str]:
    """The greedy completion of each prompt (token ids) as text, without special tokens and outer spaces.

    `advance(rows)` is called after every batch; see `completions`.
    """
    texts = [""] * len(prompts)
    for found in completions(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
        for index, text in found.items():
            texts[index] = text
        if advance is not None:
            advance(len(found))
    return texts


@torch.no_grad()
def completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    batch_size: int = 16,
    adapter_names: Sequence[str] | None = None,
) -> Iterator[dict[int, str]]:
    """The completions of one batch after the other: index of the prompt and its text, special tokens stripped.

    Without sampling: the likeliest token at each step, or the likeliest of `num_beams` sequences. Prompts of
    similar length share a batch, the longest first, so that memory runs out at once or never. `adapter_names`: which
    adapter of the model answers each prompt; without, the active one answers all.
    """
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    pad = Collator(tokenizer.pad_token_id, left=True)
    order = in_order([len(prompt) for prompt in prompts], adapter_names)
    was_training = model.training
    model.eval()
    try:
        for at in range(0, len(order), batch_size):
            chosen = order[at : at + batch_size]
            batch = pad([{"input_ids": prompts[index]} for index in chosen])
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            width = batch["input_ids"].shape[1]
            # every beam is a row of the batch
            names = [adapter_names[i] for i in chosen for _ in range(num_beams)] if adapter_names else []
            output = model.generate(**batch, **routed(model, names), generation_config=config)
            decoded = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
            yield {index: text.strip() for index, text in zip(chosen, decoded, strict=True)}
    finally:
        model.train(was_training)
