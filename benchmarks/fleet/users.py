"""A table of users out of real books: one user is one stretch of one book, its rows are short passages in order.

Stretches are spread evenly over the 241 books (95 authors) of the data sets beside the repository, so that users differ
in author, book and scene. Nothing of it is committed.

    python benchmarks/fleet/users.py --data ../shared/data --output build/users.jsonl [--users 2048] [--rows 16]
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

#: characters of a passage: it ends with the sentence that passes the first, or at the second
SHORTEST, LONGEST = 90, 160


def books(data: Path) -> list[dict[str, Any]]:
    with lzma.open(data / "books" / "train.jsonl.xz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def passages(text: str) -> Iterator[str]:
    """Passages of whole sentences within paragraphs; headings and other short lines are left out."""
    for paragraph in re.split(r"\n\s*\n", text):
        words = " ".join(paragraph.split())
        if len(words) < SHORTEST:
            continue
        passage = ""
        for sentence in re.split(r"(?<=[.!?;])\s+", words):
            passage = f"{passage} {sentence}".strip()
            if len(passage) >= SHORTEST:
                yield passage[:LONGEST].rsplit(" ", 1)[0] if len(passage) > LONGEST else passage
                passage = ""


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:48].strip("-")


def users(data: Path, count: int, rows: int) -> Iterator[tuple[str, list[str]]]:
    """(id, passages) of each user: author/title/number of the stretch."""
    shelf = books(data)
    found = [list(passages(book["text"])) for book in shelf]
    room = [len(parts) // rows for parts in found]
    # one stretch of every book in turn, as long as it has another one
    wanted = [0] * len(shelf)
    while sum(wanted) < count:
        able = [at for at in range(len(shelf)) if wanted[at] < room[at]]
        if not able:
            break
        for at in able[: count - sum(wanted)]:
            wanted[at] += 1
    for book, parts, stretches, most in zip(shelf, found, wanted, room, strict=True):
        for at in range(stretches):
            first = at * most // stretches * rows
            name = f"{slug(book['author'])}/{slug(book['title'])}/{at + 1:02}"
            yield name, parts[first : first + rows]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--users", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=16)
    arguments = parser.parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with arguments.output.open("w", encoding="utf-8") as stream:
        for user, texts in users(arguments.data, arguments.users, arguments.rows):
            for text in texts:
                stream.write(json.dumps({"user": user, "text": text}, ensure_ascii=False) + "\n")
    print(f"at most {arguments.users} users of {arguments.rows} rows in {arguments.output}")


if __name__ == "__main__":
    main()
