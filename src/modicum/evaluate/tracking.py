"""Experiment trackers: what a run or an evaluation found, sent through the trackers' own clients.

Where it goes is the clients' own business: `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `TRACKIO_DIR`,
`TRACKIO_SPACE_ID`, `WANDB_MODE` and so on mean what their documentation says.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import sys
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, final

from modicum.errors import ConfigError, MissingExtraError, not_among

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

#: the trackers by name, and how each is installed
TRACKERS = {
    "mlflow": "modicum[tracking]",
    "trackio": "modicum[tracking]",
    "tensorboard": "modicum[tracking]",
    "wandb": "wandb",
}


@dataclass(frozen=True)
class Findings:
    """What is sent: numbers by name (`validation/loss`), the facts they depend on, and files that belong to them."""

    numbers: Mapping[str, float]
    facts: Mapping[str, Any] = field(default_factory=dict)
    files: Sequence[Path] = ()


def ensure_trackers(names: Sequence[str]) -> None:
    """Returns if the clients of all trackers `names` are installed.

    Raises:
        ConfigError: names of no tracker. MissingExtraError: all that are not installed, with what to install.
    """
    unknown = [fault for name in names for fault in not_among("report_to", name, list(TRACKERS))]
    if unknown:
        raise ConfigError("; ".join(unknown))
    missing = [name for name in names if not _is_installed(name)]
    if missing:
        extras = " ".join(dict.fromkeys(TRACKERS[name] for name in missing))
        raise MissingExtraError(
            f"the client of {' and '.join(missing)} is not installed: pip install {extras}"
        )


def publish(names: Sequence[str], title: str, findings: Findings, folder: Path | None = None) -> None:
    """Send `findings` to the trackers `names`, as a run of its own called `title`; a tracker that fails is warned of.

    `folder`: where tensorboard's files go; without it where its own client puts them, below `runs`.
    """
    for name in names:
        tracker = tracker_of(name, folder)

        def send(tracker: Tracker = tracker) -> None:
            tracker.begin(title)
            tracker.send(findings)

        attempt(name, send)
        attempt(name, tracker.end)


def attempt(name: str, action: Callable[[], Any]) -> bool:
    """Whether `action`, a call of a tracker's client, went well; if not, a warning says why, and work goes on."""
    try:
        with said_aside():
            action()
    except Exception as error:  # noqa: BLE001 - whatever a client raises, the work it watches is worth more
        words = str(error).strip().partition("\n")[0][:300]
        warnings.warn(
            f"{name} does not take the results: {type(error).__name__}: {words}. The work goes on without it; "
            "all numbers are in the folder of the results too",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@contextlib.contextmanager
def said_aside() -> Iterator[None]:
    """What clients print goes to stderr: stdout is for results alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def flat(values: Mapping[str, Any], path: str = "", between: str = "/") -> dict[str, Any]:
    """Nested `values` as one mapping with names like `validation/loss`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{path}{between}{key}" if path else str(key)
        found |= flat(value, name, between) if isinstance(value, dict) else {name: value}
    return found


def numbers_of(values: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers among nested `values`, by names like `validation/loss`."""
    return {
        name: value
        for name, value in flat(values).items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def tracker_of(name: str, folder: Path | None = None) -> Tracker:
    """The tracker called `name`; `folder` is where tensorboard writes."""
    return Tensorboard(folder) if name == "tensorboard" else _BY_NAME[name]()


class Tracker(ABC):
    """One client: `begin` a run, `send` findings to the run that is open, `end` it."""

    @abstractmethod
    def begin(self, title: str) -> None:
        """Open a run."""

    @abstractmethod
    def send(self, findings: Findings, step: int | None = None) -> None:
        """Add `findings` to the run that is open, as those of `step`."""

    @abstractmethod
    def end(self, failed: bool = False) -> None:
        """Close the run that is open, if there is one."""

    @abstractmethod
    def integration(self) -> Any:
        """The tracker's callback for the Trainer, by Transformers."""


@final
class MLflow(Tracker):
    """MLflow: numbers are metrics, facts parameters, files artifacts."""

    def begin(self, title: str, run_id: str | None = None) -> None:
        """Open a run, or the run `run_id` again; within a run of the caller one below it."""
        import mlflow

        # MLFLOW_EXPERIMENT_NAME and MLFLOW_TRACKING_URI are read by the client
        mlflow.start_run(run_id=run_id, run_name=title, nested=self.active() is not None)

    def send(self, findings: Findings, step: int | None = None) -> None:
        """Log metrics, parameters and artifacts."""
        import mlflow

        # the names that MLflow takes, as Transformers has them too
        named = {re.sub(r"[^0-9A-Za-z_\-. :/]", "_", name): v for name, v in findings.numbers.items()}
        mlflow.log_metrics(named, step=step)
        facts = {name: _short(value, 6000) for name, value in findings.facts.items()}
        items = list(facts.items())
        # as many as one request takes
        for at in range(0, len(items), 100):
            mlflow.log_params(dict(items[at : at + 100]))
        for file in findings.files:
            mlflow.log_artifact(str(file))

    def end(self, failed: bool = False) -> None:
        """End the run, once all that was sent has arrived."""
        import mlflow

        if self.active() is None:
            return
        try:
            # what failed is not waited for: its server may be what failed
            if not failed:
                mlflow.flush_async_logging()
        finally:
            mlflow.end_run("FAILED" if failed else "FINISHED")

    def integration(self) -> Any:
        """Transformers' callback, which opens a run where none is open."""
        return _integration("mlflow")

    @staticmethod
    def active() -> str | None:
        """The id of the run that is open, None without one."""
        import mlflow

        run = mlflow.active_run()
        return None if run is None else run.info.run_id


@final
class Trackio(Tracker):
    """Trackio: numbers are logged, facts are the run's config, files artifacts."""

    #: the project, for Trackio has no default
    project: ClassVar[str] = "modicum"

    def begin(self, title: str) -> None:
        """Open a run, or the one of that name again."""
        import trackio

        trackio.init(project=self.project_name(), name=title, resume="allow")

    def send(self, findings: Findings, step: int | None = None) -> None:
        """Log numbers, config and artifacts."""
        import trackio

        # the client sends the config with the first numbers, and never again
        trackio.config.update(dict(findings.facts))
        if findings.numbers:
            trackio.log(dict(findings.numbers), step=step)
        for file in findings.files:
            trackio.log_artifact(file, type="results")

    def end(self, failed: bool = False) -> None:
        """Finish the run."""
        del failed
        import trackio

        trackio.finish()

    def integration(self) -> Any:
        """Transformers' callback."""
        return _integration("trackio")

    @classmethod
    def project_name(cls) -> str:
        """`TRACKIO_PROJECT`, or `modicum`."""
        return os.environ.get("TRACKIO_PROJECT") or cls.project


@final
class Tensorboard(Tracker):
    """Tensorboard: numbers are scalars, facts one text; it keeps no files."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._writer: Any = None

    def begin(self, title: str) -> None:
        """Open a file of events."""
        from torch.utils.tensorboard import SummaryWriter

        del title
        self._writer = SummaryWriter(str(self._folder) if self._folder else None)

    def send(self, findings: Findings, step: int | None = None) -> None:
        """Write scalars and text."""
        for name, value in findings.numbers.items():
            # as float64: bytes are more than a float32 can count
            self._writer.add_scalar(name, value, step, new_style=True, double_precision=True)
        if findings.facts:
            lines = [f"| {name} | {value} |" for name, value in findings.facts.items()]
            self._writer.add_text("facts", "\n".join(["| | |", "|-|-|", *lines]), step)

    def end(self, failed: bool = False) -> None:
        """Close the file."""
        del failed
        if self._writer is not None:
            self._writer.close()

    def integration(self) -> Any:
        """Transformers' callback, writing to a file of events opened here."""
        from transformers.integrations.integration_utils import TensorBoardCallback

        self.begin("")
        return TensorBoardCallback(self._writer)


@final
class Wandb(Tracker):
    """Weights & Biases: numbers are the run's summary, facts its config, files are saved."""

    def begin(self, title: str) -> None:
        """Open a run."""
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.init(project=os.environ.get("WANDB_PROJECT", "modicum"), name=title)

    def send(self, findings: Findings, step: int | None = None) -> None:
        """Update summary and config, and save the files."""
        del step
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.config.update(dict(findings.facts), allow_val_change=True)
        wandb.run.summary.update(dict(findings.numbers))
        for file in findings.files:
            wandb.save(str(file), base_path=str(file.parent))

    def end(self, failed: bool = False) -> None:
        """Finish the run."""
        import wandb  # pyright: ignore[reportMissingImports]

        wandb.finish(exit_code=int(failed))

    def integration(self) -> Any:
        """Transformers' callback."""
        return _integration("wandb")


_BY_NAME: dict[str, Callable[[], Tracker]] = {"mlflow": MLflow, "trackio": Trackio, "wandb": Wandb}


def _integration(name: str) -> Any:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    return get_reporting_integration_callbacks([name])[0]()


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _short(value: Any, limit: int) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
