"""Short passages written by this project that teach copying, listing and looking things up.

Books and stories rarely ask a small model to repeat a word it has just read.  Some rows of
such passages are enough for it to learn to, and they are the only ones that use the chat markers,
so that the chat template of the embedded model means something to it.
"""

# ruff: noqa: SIM905 - a line of words is easier to read and to extend than a list of strings

from __future__ import annotations

import random

NAMES = (
    "Anna Ben Clara David Ella Felix Grace Henry Ida Jonas Kate Leo Mara Nina Oscar Paula "
    "Quinn Rosa Simon Tara Uma Victor Wanda Yusuf Zoe"
).split()
COLOURS = "red blue green yellow black white brown grey pink purple orange silver".split()
PLACES = "garden kitchen market school station harbour library forest office hall".split()
NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

Exercise = tuple[str, str]


def _repeat(rng: random.Random, words: list[str]) -> Exercise:
    chosen = rng.sample(words, rng.randint(2, 7))
    order = rng.choice(("Say these words again", "Repeat after me", "Copy this line"))
    return f"{order}: {' '.join(chosen)}", " ".join(chosen)


def _chant(rng: random.Random, words: list[str]) -> Exercise:
    # The same words many times over: nothing else teaches copying in so few steps.
    times = rng.randint(2, 6)
    line = " ".join(rng.sample(words, rng.randint(3, 60 // times)))
    return f"Say it {NUMBERS[times - 1]} times: {line}", "\n".join([line] * times)


def _pick(rng: random.Random, words: list[str]) -> Exercise:
    chosen = rng.sample(words, rng.randint(3, 6))
    place, at = rng.choice((("first", 0), ("second", 1), ("third", 2), ("last", -1)))
    return f"Here is a list: {', '.join(chosen)}. Which word is the {place} one?", chosen[at]


def _join(rng: random.Random, words: list[str]) -> Exercise:
    chosen = rng.sample(words, rng.randint(2, 5))
    mark = rng.choice((", ", " and ", "; ", " - ", "\n"))
    return f"There was a {', then a '.join(chosen)}. Make a list of them.", mark.join(chosen)


def _owner(rng: random.Random, words: list[str]) -> Exercise:
    people = rng.sample(NAMES, rng.randint(2, 3))
    things = rng.sample(words, len(people))
    colours = rng.sample(COLOURS, len(people))
    rows = list(zip(people, colours, things, strict=True))
    text = " ".join(f"{p} has a {c} {t}." for p, c, t in rows)
    person, colour, thing = rng.choice(rows)
    question, answer = rng.choice(
        (
            (f"What does {person} have?", f"a {colour} {thing}"),
            (f"Who has the {thing}?", person),
            (f"What colour is the {thing}?", colour),
        )
    )
    return f"{text} {question}", answer


def _count(rng: random.Random, words: list[str]) -> Exercise:
    person, thing, place = rng.choice(NAMES), rng.choice(words), rng.choice(PLACES)
    number, day = rng.randrange(len(NUMBERS)), rng.choice(DAYS)
    text = f"On {day} {person} saw {NUMBERS[number]} of the {thing} kind at the {place}."
    question, answer = rng.choice(
        (
            ("How many?", NUMBERS[number]),
            ("How many, as a figure?", str(number + 1)),
            ("Where?", f"at the {place}"),
            ("When?", f"on {day}"),
            ("Who?", person),
            ("What kind?", thing),
        )
    )
    return f"{text} {question}", answer


def _fields(rng: random.Random, words: list[str]) -> Exercise:
    number = rng.randrange(len(NUMBERS))
    thing = f"{rng.choice(COLOURS)} {rng.choice(words)}"
    facts = {
        "name": rng.choice(NAMES),
        "number": str(number + 1),
        "thing": thing,
        "place": rng.choice(PLACES),
        "day": rng.choice(DAYS),
    }
    text = rng.choice(
        (
            "{name} wants {n} {thing} from the {place} on {day}.",
            "On {day} there were {n} {thing} in the {place}, and {name} saw them.",
            "The {place} has {n} {thing} for {name} since {day}.",
            "{name} took {n} {thing} to the {place}, it was a {day}.",
            "In the {place} {name} asked about {n} {thing} for {day}.",
        )
    ).format(n=NUMBERS[number], **facts)
    asked = rng.sample(list(facts), rng.randint(1, 4))
    return f"{text} Write down: {', '.join(asked)}.", ", ".join(facts[name] for name in asked)


def _case(rng: random.Random, words: list[str]) -> Exercise:
    word = rng.choice(words)
    if rng.random() < 0.5:
        return f"Write {word} with a capital letter.", word.capitalize()
    return f"Write {word.capitalize()} without a capital letter.", word


def _replace(rng: random.Random, words: list[str]) -> Exercise:
    chosen = rng.sample(words, rng.randint(3, 6))
    old, new = rng.choice(chosen), rng.choice(words)
    answer = " ".join(new if word == old else word for word in chosen)
    return f"In the line: {' '.join(chosen)}: put {new} for {old}.", answer


KINDS = (_repeat, _chant, _chant, _chant, _pick, _join, _owner, _count, _fields, _fields, _case, _replace)


def passages(words: list[str], count: int, seed: int) -> list[str]:
    """`count` passages made from `words`; about half of them in the form of the chat template."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        pairs = [rng.choice(KINDS)(rng, words) for _ in range(rng.randint(1, 3))]
        if rng.random() < 0.5:
            made.append("<|eos|>".join(f"<|user|>{q}<|assistant|>{a}" for q, a in pairs))
        else:
            made.append("\n\n".join(f"{q}\n{a}" for q, a in pairs))
    return made
