"""Fold an adapter into the base model: an ordinary checkpoint, without a trace of the adapter."""

import argparse

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modicum import LoraXSConfig
from modicum.models.embedded import path


def main() -> None:
    """Save an adapter, load it, merge it, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", default="example-adapter", help="where the adapter is written")
    parser.add_argument("--output", default="example-merged", help="where the merged model is written")
    args = parser.parse_args()

    # an untrained adapter that does something, in place of a trained one; in bfloat16 the merged weights would be
    # rounded to bfloat16, which `modicum merge` measures
    base = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)
    get_peft_model(base, LoraXSConfig(r=4, init_weights=False)).save_pretrained(args.adapter)

    base = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, args.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(path())
    batch = tokenizer("the red fox sleeps", return_tensors="pt")
    with torch.no_grad():
        before = model(**batch).logits
        merged = model.merge_and_unload()
        after = merged(**batch).logits
    merged.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)

    again = AutoModelForCausalLM.from_pretrained(args.output)
    with torch.no_grad():
        saved = again(**batch).logits
    print(f"merged: largest difference {(after - before).abs().max():.1e}")
    print(f"saved and loaded without modicum: {(saved - before).abs().max():.1e}")
    assert torch.allclose(saved, before, atol=1e-3 * before.abs().max().item())


if __name__ == "__main__":
    main()
