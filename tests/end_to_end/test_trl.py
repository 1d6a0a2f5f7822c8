"""TRL's SFTTrainer takes a config of ours like any PEFT config."""

from __future__ import annotations

import pytest
import torch
from tests.small_checkpoints import llama, sums, tokenizer

pytest.importorskip("trl")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_supervised_fine_tuning_trains_our_adapter(tmp_path):
    from datasets import load_dataset
    from peft import PeftModel
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    import modicum

    rows = load_dataset("json", data_files=str(sums(tmp_path / "a.jsonl", 16)), split="train")
    model = AutoModelForCausalLM.from_pretrained(llama())
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, bf16=False, logging_steps=1, disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer(),
        peft_config=modicum.LoraXSConfig(r=2, task_type="CAUSAL_LM"),
    )  # fmt: skip
    trained = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 14 * 4
    trainer.train()
    now = dict(trainer.model.named_parameters())
    assert all(not torch.equal(now[name], value) for name, value in trained.items())
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(llama()), tmp_path / "adapter"
    ).eval()
    ids = torch.tensor([[1, 20, 21]])
    torch.testing.assert_close(loaded(input_ids=ids).logits, trainer.model.eval()(input_ids=ids).logits)
