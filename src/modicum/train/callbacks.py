"""What is measured and shown while training."""

from __future__ import annotations

import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from transformers import TrainerCallback

from modicum.evaluate.resources import ResourceFile, together
from modicum.train import artifacts

if TYPE_CHECKING:
    from pathlib import Path

    from modicum.data.sampling import EpochSampler

Show = Literal["auto", "bar", "lines", "none"]


class Meter(TrainerCallback):
    """Measures the time of every step, without evaluation, saving and the wait for data."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._began = 0.0
        self._tokens_before: int | None = None
        self.tokens = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        del args, control, kwargs
        if self._tokens_before is None:
            self._tokens_before = int(state.num_input_tokens_seen)
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock, once the device has caught up."""
        del args, control, kwargs
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._began)
        self.tokens = int(state.num_input_tokens_seen) - (self._tokens_before or 0)

    def summary(self) -> dict[str, float | int | None]:
        """Steps, seconds per step (median and mean) and tokens (without padding) per second."""
        total = sum(self.seconds)
        return {
            "steps": len(self.seconds),
            "seconds_per_step_median": median(self.seconds) if self.seconds else None,
            "seconds_per_step_mean": total / len(self.seconds) if self.seconds else None,
            "tokens_per_second": self.tokens / total if total else None,
            "tokens": self.tokens,
        }


class ResourceLog(TrainerCallback):
    """Measures, within a `with` block, what a run takes, together with what it took before it was interrupted.

    Every process keeps a `ResourceFile` of its own beside the checkpoints of `folder`, which goes when they go.
    """

    def __init__(self, folder: Path, processes: Any) -> None:
        self._alone = processes.num_processes == 1
        path = folder / artifacts.CHECKPOINTS / f"resources-{processes.process_index}.json"
        # the counters of a processor are those of the machine: one of its processes reads them
        self._file = ResourceFile(path, processor=processes.local_process_index == 0)

    def __enter__(self) -> Self:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def total(self) -> dict[str, Any]:
        """What all processes took so far, all interrupted attempts included; see `Resources.as_dict`."""
        mine = self._file.total()
        if self._alone:
            return mine
        from accelerate.utils import gather_object

        return together(gather_object([mine]))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write down what was taken so far, with every checkpoint."""
        del args, state, control, kwargs
        self._file.note()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write down what was taken so far, now and then."""
        del args, state, control, kwargs
        self._file.note_now_and_then()


class EpochSetter(TrainerCallback):
    """Tells the sampler which epoch begins, after a restart too."""

    def __init__(self, sampler: EpochSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch; within an epoch that is continued, `state.epoch` has a fraction."""
        del args, control, kwargs
        self._sampler.set_epoch(int(state.epoch or 0))


class Progress(TrainerCallback):
    """Shows training on stderr: a bar on a terminal, else one line per log and evaluation."""

    def __init__(self, show: Show, title: str = "") -> None:
        self._bar = show == "bar" or (show == "auto" and sys.stderr.isatty())
        self._title = title
        self._progress: Any = None
        self._task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        del args, control, kwargs
        if state.is_world_process_zero and self._bar:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._progress = Bar(console=Console(stderr=True), transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self._title or "train", total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        del args, control, kwargs
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show losses and metrics."""
        del args, control, kwargs
        # the summary at the end has no news
        if not state.is_world_process_zero or not logs or "train_loss" in logs:
            return
        shown = {
            key.removeprefix("eval_"): value
            for key, value in logs.items()
            if not key.endswith(
                ("_runtime", "_per_second", "epoch", "num_input_tokens_seen", "_preparation_time")
            )
        }
        words = " ".join(
            f"{key} {value:.4g}" for key, value in shown.items() if isinstance(value, (int, float))
        )
        kind = "eval " if any(key.startswith("eval_") for key in logs) else ""
        line = f"{self._title} step {state.global_step}/{state.max_steps} {kind}{words}".strip()
        if self._progress is not None:
            self._progress.console.print(line, highlight=False)
        else:
            sys.stderr.write(line + "\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        del args, state, control, kwargs
        self.close()

    def close(self) -> None:
        """Close the bar if it is open; also after an error."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
