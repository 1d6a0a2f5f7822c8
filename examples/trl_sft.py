"""LoRA-XS with TRL's SFTTrainer: hand the configuration over as `peft_config`."""

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from modicum import LoraXSConfig
from modicum.models.embedded import path

LINES = ["the red fox sleeps under the old bridge", "a small boat crosses the river at dawn"]


def main() -> None:
    """Train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(path()), help="any causal language model")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", default="example-trl")
    args = parser.parse_args()

    trainer = SFTTrainer(
        model=args.model,
        train_dataset=Dataset.from_dict({"text": LINES * 8}),
        peft_config=LoraXSConfig(r=16, task_type="CAUSAL_LM"),
        args=SFTConfig(
            output_dir=args.output,
            max_steps=args.steps,
            learning_rate=4e-3,
            per_device_train_batch_size=2,
            logging_steps=max(1, args.steps // 4),
            report_to="none",
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    trainer.save_model(args.output)


if __name__ == "__main__":
    main()
