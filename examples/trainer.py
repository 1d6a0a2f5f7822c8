"""LoRA-XS with Transformers' Trainer: a bundled model learns a few lines by heart."""

import argparse

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from modicum import LoraXSConfig
from modicum.models.embedded import path

LINES = ["the red fox sleeps under the old bridge", "a small boat crosses the river at dawn"]


def main() -> None:
    """Train, save, and say what was trained."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(path()), help="any causal language model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", default="example-trainer")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(LINES)["input_ids"]]

    model = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(model, LoraXSConfig(r=16, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()

    options = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        learning_rate=4e-3,
        per_device_train_batch_size=1,
        logging_steps=max(1, args.steps // 4),
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model=model, args=options, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
