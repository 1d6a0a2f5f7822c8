"""Texts, tokenizer and token streams for pre-training the embedded base model."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from embedded_exercises import passages

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|eos|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Share of every source in the training rows.  The stories come twice, as released (lower-cased)
# and with capitals put back, so that a repeated story is at least spelt differently.
MIXTURE = {
    "books": 0.58,
    "stories_lower": 0.05,
    "stories_cased": 0.10,
    "shakespeare": 0.02,
    "exercises": 0.25,
}


def _read(path: Path) -> str:
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read()


def _books(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in _read(path).split("\n") if line]


def _stories(path: Path) -> list[str]:
    """The stories: one line break between stories, an empty line between paragraphs."""
    text = re.sub(r"\n{2,}", "\x00", _read(path))
    return [story.replace("\x00", "\n\n").strip() for story in text.split("\n") if story.strip()]


def _capital_words(texts: Iterable[str], least: int) -> set[str]:
    """The words that are mostly capitalised in the middle of a sentence (`least` times or more)."""
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(re.findall(r"(?<=[a-z,] )[A-Za-z]+\b", text))
    words = {word for word in seen if word[0].isupper() and word[1:].islower()}
    return {word.lower() for word in words if seen[word] >= least and seen[word] > 4 * seen[word.lower()]}


def _recase(story: str, capitals: set[str]) -> str:
    """The story with capitals at the starts of sentences, in names and in "I"."""
    story = re.sub(r"\bi\b", "I", story)
    story = re.sub(r"[a-z]+", lambda m: m[0].capitalize() if m[0] in capitals else m[0], story)
    return re.sub(r"(^|[.!?]\"? |\n|(?<=[,.!?:] )\"|^\")([a-z])", lambda m: m[1] + m[2].upper(), story)


def training_texts(data: Path, seed: int) -> dict[str, list[str]]:
    """The documents of every source of `MIXTURE`."""
    books = _books(data / "books/train.jsonl.xz")
    lower = _stories(data / "tinystories/train.txt.gz")
    sample = _read(data / "tinystories/sample_cased.txt.gz")
    capitals = _capital_words([sample], 2) | _capital_words(books[::4], 20)
    capitals -= _lower_words(sample)
    counts = Counter(re.findall(r"\b[a-z]{3,12}\b", " ".join(lower) + " ".join(books[::16])))
    words = sorted(word for word, n in counts.items() if n >= 20)
    play = re.split(r"\n\n(?=[A-Z][A-Za-z ]+:\n)", _read(data / "tinyshakespeare/train.txt.gz"))
    return {
        "books": books,
        "stories_lower": lower,
        "stories_cased": [_recase(story, capitals) for story in lower],
        # A scene of forty speeches: long enough to fill a context, short enough to shuffle.
        "shakespeare": ["\n\n".join(play[i : i + 40]) for i in range(0, len(play), 40)],
        "exercises": passages(words, 80_000, seed),
    }


def _lower_words(sample: str) -> set[str]:
    """The words that the cased sample also writes small inside a sentence."""
    return set(re.findall(r"(?<=[a-z,] )[a-z]+\b", sample))


def held_out_texts(data: Path) -> dict[str, list[str]]:
    """The documents that no training row contains, by corpus; long ones are cut to save time."""
    return {
        "books": [book[:12_000] for book in _books(data / "books/valid.jsonl.xz")],
        "tinystories": _stories(data / "tinystories/valid.txt.gz")[:120],
        "tinyshakespeare": [_read(data / "tinyshakespeare/val.txt.gz")],
        "wikitext2": [_read(data / "wikitext2/valid.txt.gz")[:100_000]],
    }


def train_tokenizer(texts: dict[str, list[str]], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `size` entries with the markers of `SPECIAL` first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [*texts["books"][::8], *texts["stories_lower"][::2], *texts["stories_cased"]]
    tokenizer.train_from_iterator(sample, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        model_max_length=512,
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    """One stream of tokens: every text between `<|bos|>` and `<|eos|>`."""
    backend, stream = tokenizer.backend_tokenizer, []
    for start in range(0, len(texts), 64):
        for row in backend.encode_batch(texts[start : start + 64]):
            ids = np.asarray(row.ids, dtype=np.uint16)
            stream += [np.asarray([1], np.uint16), ids, np.asarray([2], np.uint16)]
    return np.concatenate(stream)


@dataclass
class Rows:
    """Rows of tokens from several streams: a source is drawn, then its next unseen piece.

    Which row comes next depends only on `seed` and on `drawn`, the number of tokens already
    taken from every source, so a resumed run goes on where the interrupted one stopped.
    """

    streams: dict[str, np.ndarray]
    seed: int
    drawn: dict[str, int] = field(default_factory=dict)

    def batch(self, rows: int, length: int) -> np.ndarray:
        """(rows, length + 1) tokens."""
        rng = random.Random(f"{self.seed}-{sum(self.drawn.values())}")
        names = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=rows)
        return np.stack([self._piece(name, length) for name in names]).astype(np.int64)

    def _piece(self, name: str, length: int) -> np.ndarray:
        stream = self.streams[name]
        taken = self.drawn.get(name, 0)
        self.drawn[name] = taken + length
        pieces = len(stream) // length - 1
        epoch, index = divmod(taken // length, pieces)
        rng = np.random.default_rng([self.seed, epoch, length, *name.encode()])
        # Another cut in every pass: a repeated text is not the same row twice.
        shift = int(rng.integers(length))
        start = int(rng.permutation(pieces)[index]) * length + shift
        return stream[start : start + length + 1]
