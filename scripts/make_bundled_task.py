"""Writes the bundled task `notes`: a short message becomes a one-line note.

    python scripts/make_bundled_task.py

    Could we have three red hats for Friday?   ->   order; three; red hats; Friday

A message belongs to one of five kinds and names a number of things and a day.  Half of the
validation and test rows have a template, a quarter a thing, and a quarter both, that no training
row has; no message of one split occurs in another.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from bundled_templates import (
    CLOSINGS,
    DAYS,
    GREETINGS,
    NAMES,
    NUMBERS,
    QUALITIES,
    TEMPLATE_SPLITS,
    TEMPLATES,
    THINGS,
)

FOLDER = Path("src/modicum/data/bundled/notes")
SEED = 7
ROWS = {"train": 1600, "validation": 200, "test": 400}
PROMPT = "{message}\nNote:"
COMPLETION = " {kind}; {number}; {thing}; {day}"


def things_of(split: str) -> list[str]:
    """The things that only this split uses: every sixth validates, the one after it tests."""
    places = {"validation": {4}, "test": {5}, "train": {0, 1, 2, 3}}[split]
    return [thing for index, thing in enumerate(THINGS) if index % 6 in places]


def message(rng: random.Random, template: str, things: list[str]) -> tuple[str, str, str, str]:
    """The message, its thing, its number and its day."""
    word, thing = rng.choice(NUMBERS), rng.choice(things)
    if rng.random() < 0.6:
        thing = f"{rng.choice(QUALITIES)} {thing}"
    day, other = rng.sample(DAYS, 2)
    text = template.format(x=f"{word} {thing}", d=day, e=other)
    for little in ("today", "tomorrow", "tonight"):
        text = text.replace(f"on {little}", little).replace(f"On {little}", little.capitalize())
    closing = rng.choice(CLOSINGS).format(name=rng.choice(NAMES))
    text = rng.choice(GREETINGS) + text[0].upper() + text[1:] + closing
    return text, thing, word, day


def rows(split: str, count: int, seen: set[str], rng: random.Random) -> list[dict[str, str]]:
    """`count` rows with messages that are not in `seen`, which grows by them."""
    made: list[dict[str, str]] = []
    kinds = list(TEMPLATES)
    while len(made) < count:
        place = len(made)
        kind = kinds[place % len(kinds)]
        fresh = place // len(kinds) % 4
        # 0 and 1: new template, 2: new thing, 3: both (for the training split they are the same).
        template_split = "train" if fresh == 2 else split
        thing_split = "train" if fresh < 2 else split
        template = rng.choice(TEMPLATES[kind][TEMPLATE_SPLITS[template_split]])
        text, thing, number, day = message(rng, template, things_of(thing_split))
        if text in seen:
            continue
        seen.add(text)
        completion = COMPLETION.format(kind=kind, number=number, thing=thing, day=day)
        made.append({"prompt": PROMPT.format(message=text), "completion": completion})
    rng.shuffle(made)
    return made


def write(folder: Path) -> None:
    """Writes one JSONL file for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    seen: set[str] = set()
    for split, count in ROWS.items():
        lines = [json.dumps(row) for row in rows(split, count, seen, random.Random(f"{SEED} {split}"))]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    """Reads the options and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
