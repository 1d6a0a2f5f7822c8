"""What tests of folders that quantizing and sparsifying write have in common: text, what folders hold, stopped runs."""

from __future__ import annotations

import json
import math

import torch
from safetensors.torch import load_file
from tests import small_checkpoints as small
from transformers import AutoModelForCausalLM, AutoTokenizer

from modicum.compress.calibration import evaluation_sequences

LENGTH = 24


def write_text(file):
    words = ["the cat sat", "on 12 mats", "and (some) dogs", "ran; far away", "to Rome!"]
    file.write_text("\n".join(words[n * n % 5] + words[n % 3] for n in range(90)), encoding="utf-8")
    return file


def perplexity(folder, text, **loading):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **loading).eval()
    ids = evaluation_sequences(text, AutoTokenizer.from_pretrained(folder), 10, LENGTH).ids
    with torch.no_grad():
        return math.exp(sum(float(model(input_ids=row, labels=row).loss) for row in ids.split(1)) / len(ids))


def saved(model, folder):
    model.save_pretrained(folder)
    small.tokenizer().save_pretrained(folder)
    return folder


def tensors_of(folder):
    return {
        key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()
    }


def files_of(folder):
    """Content of all files, without what depends on the clock."""
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    (name,) = (name for name in found if name.endswith("_report.json"))
    report = json.loads(found.pop(name))
    report["seconds"] = report["output"] = None
    for layer in report["layers"]:
        layer["seconds"] = None
    return found, report


class Stop(Exception):  # noqa: N818 - not an error
    pass


def stop_at(step):
    def progress(done, _total, _name):
        if done == step:
            raise Stop

    return progress
