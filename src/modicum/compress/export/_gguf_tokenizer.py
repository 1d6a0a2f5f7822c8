"""A fast tokenizer in the words of GGUF: tokens, their kinds, merges or scores, and the name of the splitter."""

from __future__ import annotations

import json
from typing import Any

from modicum.errors import ConfigError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
#: how text is split before merging, as tokenizer.json says it -> llama.cpp's name for the same
_SPLITTERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_WORDS % "{1,3}",): "llama-bpe",
    (_WORDS % "",): "qwen2",
}


def write(writer: Any, tokenizer: Any, size: int) -> None:
    """Add the tokenizer to a GGUF writer, padded to `size` tokens.

    Raises:
        ConfigError: no fast tokenizer, another model than byte-pair encoding, or a splitter without a name.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError("a GGUF file needs a fast tokenizer (one with a tokenizer.json)")
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stated["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"a GGUF file needs a byte-pair tokenizer, not {model['type']}")
    tokens, kinds = _tokens(stated, size)
    ranks = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, ranks))
        writer.add_add_space_prefix(_prefixed(stated))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(stated["pre_tokenizer"]))
        writer.add_token_merges(ranks)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a").input_ids
    writer.add_add_bos_token(len(ids) > 1 and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _tokens(stated: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every token, by index."""
    model, found = stated["model"], dict[int, tuple[str, int]]()
    for text, index in model["vocab"].items():
        is_byte = bool(model.get("byte_fallback")) and len(text) == 6 and text.startswith("<0x")
        found[index] = text, _BYTE if is_byte else _NORMAL
    for token in stated["added_tokens"]:
        found[token["id"]] = token["content"], _CONTROL if token["special"] else _USER_DEFINED
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None:
        found[unknown] = found[unknown][0], _UNKNOWN
    size = max(size, *(index + 1 for index in found))
    # a name of its own for rows of the embedding that no token uses
    listed = [found.get(index, (f"<unused {index}>", _UNUSED)) for index in range(size)]
    return [text for text, _ in listed], [kind for _, kind in listed]


def _scores(tokens: list[str], ranks: list[str]) -> list[float]:
    """Scores by which llama.cpp merges in the order of the merges: the earlier, the higher."""
    first: dict[str, int] = {}
    for rank, pair in enumerate(ranks):
        first.setdefault(pair.replace(" ", ""), rank)
    return [-float(first.get(text, len(ranks))) for text in tokens]


def _prefixed(stated: dict[str, Any]) -> bool:
    """Whether a text starts with a space of its own."""
    for part in (stated["normalizer"], stated["pre_tokenizer"]):
        for step in _steps(part):
            if step["type"] == "Prepend" or (
                step["type"] == "Metaspace" and step["prepend_scheme"] != "never"
            ):
                return True
    return False


def _splitter(part: dict[str, Any] | None) -> str:
    # a splitter by words is followed by ByteLevel without an own pattern
    key = tuple(
        step["pattern"]["Regex"] if step["type"] == "Split" and "Regex" in step["pattern"] else step["type"]
        for step in _steps(part)
        if step["type"] != "ByteLevel" or step["use_regex"]
    )
    wrong = [
        step
        for step in _steps(part)
        if step.get("add_prefix_space") or step.get("individual_digits") is False
    ]
    if key not in _SPLITTERS or wrong:
        raise ConfigError(
            f"llama.cpp has no name for how this tokenizer splits text ({json.dumps(part)}); it would split otherwise "
            f"and give the model tokens it was not trained on. Known: {', '.join(_SPLITTERS.values())}"
        )
    return _SPLITTERS[key]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part.get("pretokenizers") or part.get("normalizers") or [part]
