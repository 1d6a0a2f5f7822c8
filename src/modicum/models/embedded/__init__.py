"""The embedded base model: a small Llama that ships with the package, for demos, tests and docs.

`path()` is all that `AutoModelForCausalLM.from_pretrained` needs. README.md in the folder is its model card.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path


def path() -> Path:
    """The folder of the embedded base model (config, weights, tokenizer, card); imports no torch."""
    return Path(str(importlib.resources.files(__name__)))
