"""Train on a 4-bit base model and fold the adapter into it exactly: one 4-bit model, codes untouched."""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modicum import AffineConfig, QALoraConfig
from modicum.models.embedded import path

TEXTS = ["the red fox sleeps under the old bridge", "the small boat waits at the green island"]


def main() -> None:
    """Quantize while loading, train a little, merge, save, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", default="example-merged-4-bit", help="folder of the merged model")
    args = parser.parse_args()

    config = AffineConfig(bits=4, group_size=32)
    base = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32, quantization_config=config)
    # pool = group size: the update is one number per group, which the group's offset takes
    model = get_peft_model(base, QALoraConfig(r=8, alpha=8, pool=32))

    tokenizer = AutoTokenizer.from_pretrained(path())
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses: list[float] = []
    for _ in range(args.steps):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    model.eval()
    codes = [tensor.clone() for tensor in _codes(model)]
    with torch.no_grad():
        before = model(**batch).logits
        merged = model.merge_and_unload()
    merged.save_pretrained(args.output)
    again = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    with torch.no_grad():
        after = again(**batch).logits
    kept = sum(torch.equal(a, b) for a, b in zip(codes, _codes(again), strict=True))
    error = (after - before).abs().max()
    print(f"saved and loaded: {error:.1e} off; {kept} of {len(codes)} codes as they were")
    assert kept == len(codes)


def _codes(model: torch.nn.Module) -> list[torch.Tensor]:
    return [tensor for name, tensor in model.named_buffers() if name.endswith("codes")]


if __name__ == "__main__":
    main()
