"""Experiment trackers of a training run: their Transformers integrations, and the run's final numbers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import TYPE_CHECKING, Any, Self, final

from transformers import TrainerCallback

from modicum.evaluate.tracked import measures
from modicum.evaluate.tracking import (
    Findings,
    MLflow,
    Trackio,
    attempt,
    ensure_trackers,
    flat,
    numbers_of,
    publish,
    said_aside,
    tracker_of,
)
from modicum.store.atomic import write_text
from modicum.train import artifacts

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from modicum.train.recipe import Recipe

LOGS = "logs"
#: below `checkpoints`: the MLflow run that a run which is resumed goes on with
_MLFLOW_RUN = "mlflow-run"


def chosen(recipe: Recipe) -> list[str]:
    """The trackers of `recipe`; tensorboard, where it is installed, when the recipe does not say.

    Raises:
        MissingExtraError: the client of one is not installed.
    """
    wanted = recipe.train.report_to
    if wanted is None:
        return ["tensorboard"] if importlib.util.find_spec("tensorboard") else []
    ensure_trackers(wanted)
    return list(wanted)


def name_run(arguments: Any, folder: Path) -> None:
    """Give the Trainer's `arguments`, in place, the names under which trackers list the run."""
    arguments.run_name = str(folder)
    arguments.project = Trackio.project_name()


class Trackers:
    """Within a `with` block, the open runs of a recipe's trackers; what fails is warned of once and left out.

    `sweep`: the sweep that the run belongs to, which the trackers can group by.
    """

    def __init__(self, recipe: Recipe, *, main: bool, sweep: str | None = None) -> None:
        self._folder = recipe.folder
        facts = {
            **flat(recipe.model_dump(mode="json", exclude_unset=True), "recipe", "."),
            "modicum.recipe_digest": recipe.digest(),
            "modicum.method": recipe.method.name,
            **({"modicum.sweep": sweep} if sweep else {}),
        }
        self.callbacks = [_Guarded(name, recipe.folder, facts) for name in chosen(recipe)] if main else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for one in self.callbacks:
            one.close(failed=error[0] is not None)

    def finish(self, report: dict[str, Any]) -> None:
        """Send what `report` says at the end: metrics, trained values, stored bytes, resources, and the recipe."""
        names = ("trained_values", "stored_bytes", "resources", "train_loss", "best_step")
        numbers = numbers_of({**report["metrics"], **{name: report[name] for name in names}})
        findings = Findings(numbers, files=[self._folder / artifacts.RECIPE, self._folder / artifacts.REPORT])
        for one in self.callbacks:
            one.send(findings, report["steps"])


def publish_sweep(recipe: Recipe, summary: dict[str, Any]) -> None:
    """Send what a sweep found, as a run of its own named by its folder."""
    names = ("best_learning_rate", "trained_values", "stored_bytes", "resources")
    metrics = {split: measures(found) for split, found in summary["metrics"].items() if found}
    numbers = numbers_of({**metrics, **{name: summary[name] for name in names}})
    facts = {
        "modicum.recipe_digest": summary["recipe_digest"],
        "modicum.method": summary["method"],
        "modicum.sweep": str(recipe.folder),
        "interval": summary["interval"],
    }
    files = [recipe.folder / artifacts.RECIPE, recipe.folder / "summary.json"]
    findings = Findings(numbers, facts, files)
    publish(chosen(recipe), str(recipe.folder), findings, recipe.folder / LOGS)


@final
class _Guarded(TrainerCallback):
    """A tracker's own callback, that may fail, and whose run stays open until the final numbers are sent.

    It is not told of predictions, which it would file under the name of the validation.
    """

    def __init__(self, name: str, folder: Path, facts: dict[str, Any]) -> None:
        self._name, self._folder, self._facts = name, folder, facts
        self._tracker = tracker_of(name, folder / LOGS)
        self._inner: Any = None
        self._lost = False
        #: whether the run is ours to end; one that the caller has open is the caller's
        self._ours = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the run, or the one of an earlier attempt again."""

        def begin() -> None:
            self._inner = self._tracker.integration()
            open_before = self._reopen()
            self._ours = True
            self._inner.on_train_begin(args, state, control, **kwargs)
            if isinstance(self._tracker, MLflow):
                self._ours = self._tracker.active() != open_before
                # or it ends whatever run is open when it is collected
                self._inner._auto_end_run = False  # noqa: SLF001
                if self._ours:
                    write_text(self._run_file, f"{self._tracker.active()}\n")
            self._tracker.send(Findings({}, self._facts))

        self._attempt(begin)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log losses and metrics."""
        self._attempt(lambda: self._inner.on_log(args, state, control, **kwargs))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the tracker does with checkpoints."""
        self._attempt(lambda: self._inner.on_save(args, state, control, **kwargs))

    def send(self, findings: Findings, step: int) -> None:
        """Add `findings` to the run."""
        self._attempt(lambda: self._tracker.send(findings, step))

    def close(self, *, failed: bool) -> None:
        """End the run, if it was begun; also of a tracker that failed, or the next run's numbers would go there."""
        if not self._ours:
            return
        if self._lost:
            with contextlib.suppress(Exception), said_aside():
                self._tracker.end(failed=True)
        else:
            self._attempt(lambda: self._tracker.end(failed))

    @property
    def _run_file(self) -> Path:
        return self._folder / artifacts.CHECKPOINTS / _MLFLOW_RUN

    def _reopen(self) -> str | None:
        """Opens the MLflow run of an earlier attempt; the id of the run that the caller has open."""
        if not isinstance(self._tracker, MLflow):
            return None
        active = self._tracker.active()
        if active is None and self._run_file.is_file() and "MLFLOW_RUN_ID" not in os.environ:
            self._tracker.begin(str(self._folder), self._run_file.read_text(encoding="utf-8").strip())
        return active

    def _attempt(self, action: Callable[[], None]) -> None:
        self._lost = self._lost or not attempt(self._name, action)
