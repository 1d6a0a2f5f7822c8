"""One forward pass in which every row names its own adapter, equal to one pass per adapter."""

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modicum import LoraXSConfig
from modicum.models.embedded import path

# made-up adapters that do something without being trained; ranks may differ within a batch
ADAPTERS = {
    "ada": LoraXSConfig(r=16, seed=1, init_weights=False),
    "bob": LoraXSConfig(r=8, seed=2, init_weights=False),
}


def main() -> None:
    """Compare the mixed batch with the same rows one adapter at a time."""
    tokenizer = AutoTokenizer.from_pretrained(path())
    model = AutoModelForCausalLM.from_pretrained(path(), dtype=torch.float32)
    model = get_peft_model(model, ADAPTERS["ada"], adapter_name="ada")
    model.add_adapter("bob", ADAPTERS["bob"])
    model.eval()

    rows = ["ada", "bob", "__base__", "ada"]
    ids = tokenizer("the red fox sleeps", return_tensors="pt")["input_ids"].repeat(len(rows), 1)
    with torch.no_grad():
        mixed = model(ids, adapter_names=rows).logits
        print(f"ada changes the logits by up to {(mixed[0] - mixed[2]).abs().max():.2f}")
        for index, name in enumerate(rows):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model(ids[index : index + 1]).logits
            else:
                model.set_adapter(name)
                alone = model(ids[index : index + 1]).logits
            difference = (mixed[index] - alone[0]).abs().max().item()
            print(f"row {index} ({name}): largest difference {difference:.1e}")
            assert difference < 1e-3


if __name__ == "__main__":
    main()
