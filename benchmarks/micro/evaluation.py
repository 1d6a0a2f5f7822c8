"""Several adapters evaluated in shared batches against one after the other, on one loaded base, in one run.

The model is the one inside the package; what is asked is a task of the protocol `llm-adapters` (4 new tokens, greedy
and with 4 beams) and one of `perplexity` (windows of 64 tokens), for adapters of LoRA-XS and PEFT's LoRA on all linear
layers. Both ways run the protocols' own code with batches of 16 rows, take turns, and must give the same answers. Times
are CPU seconds; a ratio above 1 means that shared batches are faster.

    OMP_NUM_THREADS=1 python benchmarks/micro/evaluation.py [--repeats 3] [--small]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, get_peft_model

from modicum import LoraXSConfig
from modicum.evaluate.llm_adapters import Task as Generation
from modicum.evaluate.perplexity import Task as Perplexity
from modicum.evaluate.protocols import Subject
from modicum.evaluate.records import Header, Item, Records, digest_of
from modicum.models.loading import load_base, load_tokenizer, quiet_transformers

if TYPE_CHECKING:
    from modicum.evaluate.protocols import EvaluationTask

RESULT = Path(__file__).parent / "results" / "evaluation.json"
METHODS = {"lora_xs": LoraXSConfig(r=8), "lora": LoraConfig(r=8, target_modules="all-linear")}
ADAPTERS, ITEMS, BATCH = (1, 4, 16), (2, 16), 16
TEXT = "the small dog saw a red bird and ran to the old house where his friend made bread for all of them"


def tasks(folder: Path, items: int) -> dict[str, EvaluationTask]:
    """What is asked: so many questions of many lengths, and as many texts of one window."""
    words = TEXT.split()
    questions = [
        {"id": f"q{n}", "question": " ".join(words[n % 5 : n % 5 + 6 + n % 11]), "answer": "a"}
        for n in range(items)
    ]
    texts = [{"id": f"t{n}", "text": " ".join(words[n % 7 :] + words * 3)} for n in range(items)]
    for name, rows in (("questions", questions), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )
    asked = {
        "data": "questions", "template": "{question}", "reference": "answer", "extract": "choice",
        "answers": ["a", "b"], "max_new_tokens": 4,
    }  # fmt: skip
    windows = Perplexity.Options.model_validate({"data": "texts", "window": 64})
    found: dict[str, EvaluationTask] = {
        name: Generation.prepare(
            name, Generation.Options.model_validate({**asked, "num_beams": beams}), folder, None, None
        )
        for name, beams in (("greedy", 1), ("4 beams", 4))
    }
    return {**found, "perplexity": Perplexity.prepare("perplexity", windows, folder, None, items)}


def model_with(config: Any, adapters: int) -> tuple[Any, tuple[str, ...]]:
    """The embedded model with so many different adapters, and their names."""
    names = tuple(f"a{place}" for place in range(adapters))
    with quiet_transformers():
        model = get_peft_model(load_base("embedded"), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
    for seed, name in enumerate(names):
        model.set_adapter(name)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    model = model.eval()
    return model.to("cuda") if torch.cuda.is_available() else model, names


def run(task: EvaluationTask, subject: Subject, adapters: int) -> list[dict[str, Item]]:
    """The items of each adapter by id."""
    header = Header("", "", "", task.name, "", "", None, "", digest_of(task.ids))
    done = [Records(header) for _ in range(adapters)]
    for batch in task.run(subject, done, BATCH):
        for place, item in batch:
            done[place].append([item])
    return [{one.item: one for one in records.items} for records in done]


def measured(task: EvaluationTask, config: Any, adapters: int, repeats: int) -> dict[str, Any]:
    """Seconds of both ways in turn, one turn of warm-up left out, and how many answers differed."""
    model, names = model_with(config, adapters)
    tokenizer = load_tokenizer("embedded")
    shared = Subject(model, tokenizer, "embedded", "", names if adapters > 1 else ())
    alone = Subject(model, tokenizer, "embedded", "")
    task.bind(alone)
    seconds: dict[str, list[float]] = {"shared": [], "alone": []}
    differing, furthest = 0, 0.0
    for turn in range(repeats + 1):
        started = time.process_time()
        together = run(task, shared, adapters)
        middle = time.process_time()
        one_by_one = []
        for name in names:
            model.set_adapter(name)
            one_by_one += run(task, alone, 1)
        if turn:
            seconds["shared"].append(middle - started)
            seconds["alone"].append(time.process_time() - middle)
        for mine, theirs in zip(together, one_by_one, strict=True):
            differing += sum(mine[name].prediction != theirs[name].prediction for name in mine)
            apart = (abs((mine[name].loss or 0) - (theirs[name].loss or 0)) for name in mine)
            furthest = max(furthest, *apart)
    ratios = [b / a for a, b in zip(seconds["shared"], seconds["alone"], strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "from": min(ratios),
        "to": max(ratios),
        "different_answers": differing,
        "largest_difference_of_losses": furthest,
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="one turn of the smallest cases; writes nothing")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    cases = [(adapters, items) for adapters in ADAPTERS for items in ITEMS]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for method, config in METHODS.items():
            for adapters, items in cases[::2] if options.small else cases:
                for name, task in tasks(Path(folder), items).items():
                    found = measured(task, config, adapters, 1 if options.small else options.repeats)
                    runs.append(
                        {"method": method, "task": name, "adapters": adapters, "items": items, **found}
                    )
                    print(json.dumps(runs[-1]), flush=True)
    if options.small:
        return
    names = list(dict.fromkeys(one["task"] for one in runs))
    rows = [
        [method, adapters, items, *(_shown(runs, method, name, adapters, items) for name in names)]
        for method in METHODS
        for adapters, items in cases
    ]
    note = (
        "Times as fast in shared batches as one adapter after the other (median of turns, smallest and largest): "
        f"embedded model, float32, at most {BATCH} rows a batch, {threads} thread, CPU seconds. With one adapter both "
        f"ways are the same, which shows the noise. Different answers: {sum(one['different_answers'] for one in runs)}."
    )
    table = {"columns": ["method", "adapters", "items each", *names], "rows": rows, "note": note}
    RESULT.write_text(
        json.dumps({"table": table, "threads": threads, "runs": runs}, indent=1) + "\n", encoding="utf-8"
    )


def _shown(runs: list[dict[str, Any]], method: str, task: str, adapters: int, items: int) -> str:
    wanted = {"method": method, "task": task, "adapters": adapters, "items": items}
    (one,) = [one for one in runs if wanted.items() <= one.items()]
    return f"{one['ratio']:.2f} ({one['from']:.2f}–{one['to']:.2f})"


if __name__ == "__main__":
    main()
