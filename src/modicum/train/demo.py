"""The demo: three methods on the bundled task, one adapter in four forms that must answer alike, a store, a server.

Every method trains in a process of its own, so that its peak memory is its own: the figure is the resident
memory of the whole process, Python and torch included. The recipes are those of `recipes/demo_*.yaml`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from modicum.data import bundled
from modicum.errors import ModicumError
from modicum.train.recipe import Recipe, make_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from modicum.store.catalogue.lookup import Version

TASK = "notes"
#: what the recipes share; batches are small because the model is
_COMMON: dict[str, Any] = {
    "model": {"name_or_path": "embedded", "dtype": "float32"},
    "data": {"train": f"bundled:{TASK}", "max_length": 96, "max_eval_rows": 200},
    "train": {
        "max_steps": 120, "batch_size": 16, "scheduler": "cosine", "load_best": False, "evaluate_before": False,
        "eval_steps": 1000, "save_steps": 1000, "report_to": "none", "device": "cpu",
    },
}  # fmt: skip
#: method -> (its section of the recipe, learning rate chosen on the validation rows)
METHODS: dict[str, tuple[dict[str, Any], float]] = {
    "lora_xs": ({"r": 32, "alpha": 32}, 1e-2),
    "lora": ({"r": 8, "lora_alpha": 8}, 6e-3),
    # VeRA's projections follow from its seed; saving them would be the whole file
    "vera": ({"r": 256, "save_projection": False}, 1e-1),
}
#: the file of a trained adapter, in the folder of its method
RECORD = "adapter.modicum"
#: the method whose adapter is reloaded, merged and exported
CHECKED = "lora_xs"
#: the store that all adapters end in, below the folder of the demo
STORE = "store"
FORMS = ("in memory", "reloaded", "merged", "exported to LoRA")


@dataclass(frozen=True)
class MethodResult:
    """One line of the demo's table."""

    method: str
    #: trained numbers
    values: int
    #: bytes of the adapter as one file, in either type
    bytes_float32: int
    bytes_bfloat16: int
    #: held-out rows answered exactly right: value, low, high (95 %), n
    after: dict[str, Any]
    loss: float
    steps: int
    #: of training alone, without loading and measuring
    seconds: float
    #: resident memory of the whole process: before the first step, and at its peak while training
    start_bytes: int | None
    peak_bytes: int | None


@dataclass(frozen=True)
class FormResult:
    """How one form of the adapter answers, against the trained model in memory."""

    form: str
    exact_match: float
    #: held-out rows with the same greedy text, and how many there are
    same_texts: int
    rows: int
    #: largest difference of a logit on held-out rows
    max_logit_difference: float
    bytes: int


@dataclass(frozen=True)
class ServedUser:
    """What a user of the server was answered."""

    user: str
    model: str
    answer: str
    #: whether the model answered the same offline
    as_offline: bool


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo found."""

    task: str
    summary: str
    before: dict[str, Any]
    methods: tuple[MethodResult, ...]
    forms: tuple[FormResult, ...]
    #: whether all forms give the same texts
    same: bool
    seconds: float
    threads: int
    #: a held-out prompt, the wanted text, and what was answered before and after
    example: dict[str, str] = field(default_factory=dict)
    #: what the store holds at the end
    stored: tuple[Version, ...] = ()
    #: what two users of a server on it were answered to the same prompt; nothing without the extra `serve`
    served: tuple[ServedUser, ...] = ()
    prompt: str = ""

    @property
    def right(self) -> bool:
        """Whether everything answers as it should, and every user of the server otherwise."""
        answers = {user.answer for user in self.served}
        return self.same and all(user.as_offline for user in self.served) and len(answers) == len(self.served)


def demo_recipe(method: str, *, quick: bool = False) -> Recipe:
    """The recipe of `recipes/demo_METHOD.yaml`; `quick` cuts it to a few steps and rows, for tests."""
    options, rate = METHODS[method]
    values = json.loads(json.dumps(_COMMON))
    values["method"] = {"name": method, **options}
    values["train"]["learning_rate"] = rate
    values["output"] = f"runs/demo_{method}"
    if quick:
        values["train"]["max_steps"] = 3
        values["data"] |= {"max_rows": 48, "max_eval_rows": 8}
    return make_recipe(values)


def run_demo(
    folder: Path,
    *,
    methods: Sequence[str] = tuple(METHODS),
    quick: bool = False,
    tell: Callable[[str], None] = lambda _: None,
) -> DemoResult:
    """Train, measure, save, reload, merge, export, store, and serve; everything stays in `folder`.

    `methods` has to hold `CHECKED`, whose adapter is taken through all forms.

    Raises:
        ModicumError: a step failed; the message is that of the process that ran it.
    """
    began = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    trained = {}
    for method in methods:
        tell(f"training {method} …")
        recipe = demo_recipe(method, quick=quick).with_values(output=str(folder / method))
        trained[method] = _work("train", folder / method, recipe=recipe)
    recipe = demo_recipe(CHECKED, quick=quick).with_values(output=str(folder / CHECKED))
    tell("loading the saved adapter in a new process, merging it, exporting it, loading both …")
    reloaded = _work("reload", folder / CHECKED, recipe=recipe)
    forms = _compare(folder / CHECKED, {**trained[CHECKED]["forms"], **reloaded["forms"]})
    lines = tuple(
        MethodResult(**{key: found[key] for key in MethodResult.__dataclass_fields__})
        for found in trained.values()
    )
    stored = _store(folder, lines)
    asked: dict[str, Any] = {"served": [], "prompt": ""}
    if importlib.util.find_spec("uvicorn") and importlib.util.find_spec("fastapi"):
        tell("serving the store to two users …")
        asked = _work("serve", folder, recipe=recipe)
    return DemoResult(
        task=TASK,
        summary=bundled.task(TASK).summary,
        before=reloaded["before"],
        methods=lines,
        forms=forms,
        same=all(form.same_texts == form.rows for form in forms),
        seconds=time.perf_counter() - began,
        threads=trained[CHECKED]["threads"],
        example={**reloaded["example"], "after": forms_texts(folder / CHECKED, FORMS[0])[0]},
        stored=stored,
        served=tuple(ServedUser(**user) for user in asked["served"]),
        prompt=asked["prompt"],
    )


def forms_texts(folder: Path, form: str) -> list[str]:
    """The greedy texts of one form of the adapter on the held-out rows."""
    return json.loads((folder / f"{slug(form)}.texts.json").read_text(encoding="utf-8"))


def slug(form: str) -> str:
    """The name of a form in file names."""
    return form.replace(" ", "_")


def _compare(folder: Path, found: dict[str, dict[str, Any]]) -> tuple[FormResult, ...]:
    texts = {form: forms_texts(folder, form) for form in FORMS}
    logits = {form: np.load(folder / f"{slug(form)}.logits.npy") for form in FORMS}
    first = FORMS[0]
    return tuple(
        FormResult(
            form=form,
            exact_match=found[form]["exact_match"],
            same_texts=sum(a == b for a, b in zip(texts[form], texts[first], strict=True)),
            rows=len(texts[first]),
            max_logit_difference=float(np.abs(logits[form] - logits[first]).max()),
            bytes=found[form]["bytes"],
        )
        for form in FORMS
    )


def _store(folder: Path, methods: Sequence[MethodResult]) -> tuple[Version, ...]:
    """What a store holds once every adapter is put into it, `CHECKED` as the one in production."""
    from modicum.store import Store, read_source

    with Store(folder / STORE, create=True) as store:
        for one in methods:
            metrics = {"exact_match": one.after["value"], "loss": one.loss}
            record = read_source(folder / one.method / RECORD).record
            store.put(f"demo/{one.method}", record, metrics=metrics, tags=[TASK])
        store.promote(f"demo/{CHECKED}")
        return tuple(store.ls())


def _work(job: str, folder: Path, *, recipe: Recipe) -> dict[str, Any]:
    """What a new process finds; see `demo_worker`."""
    folder.mkdir(parents=True, exist_ok=True)
    described = folder / f"{job}.job.json"
    described.write_text(
        json.dumps(
            {"job": job, "folder": str(folder), "recipe": recipe.model_dump(mode="json", exclude_unset=True)}
        )
    )
    result = folder / f"{job}.result.json"
    result.unlink(missing_ok=True)
    done = subprocess.run(  # noqa: S603 - our own module, no shell
        [sys.executable, "-m", "modicum.train.demo_worker", str(described)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode or not result.is_file():
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        raise ModicumError(f"the step {job!r} of the demo failed: {' / '.join(last) or 'no message'}")
    return json.loads(result.read_text(encoding="utf-8"))
