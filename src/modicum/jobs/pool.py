"""Tasks, what becomes of them, and what everything that runs them has in common."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from modicum.errors import ModicumError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator


@dataclass(frozen=True)
class Task:
    """One piece of work: a function of a module and plain arguments, called in another process."""

    key: Hashable
    call: Callable[..., Any]
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of a task: its value, or why there is none."""

    key: Hashable
    value: Any = None
    error: str | None = None
    #: where the error came from
    trace: str = ""

    def result(self, what: str) -> Any:
        """The value; `what` the task was, for messages.

        Raises:
            ModicumError: there is none.
        """
        if self.error is not None:
            raise ModicumError(f"{what}: {self.error}") from RuntimeError(self.trace or self.error)
        return self.value


class Pool(ABC):
    """Runs up to `count` tasks at a time, with `threads` threads each. Within a `with` block; leaving it ends them."""

    count: int
    threads: int
    #: how much of a machine's memory (of a GPU's, where there is one) a task may take
    share: float

    @property
    def free(self) -> bool:
        """Whether another task can be started."""
        return self.running < self.count

    @property
    def busy(self) -> bool:
        """Whether any task is running."""
        return self.running > 0

    @property
    @abstractmethod
    def running(self) -> int:
        """How many tasks were started and not waited for."""

    @abstractmethod
    def start(self, task: Task) -> None:
        """Returns when `task` is under way; there has to be room for it."""

    @abstractmethod
    def wait(self) -> list[Outcome]:
        """What has ended since; waits for the first one."""

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *error: object) -> None: ...

    def outcomes(self, tasks: Iterable[Task]) -> Iterator[Outcome]:
        """What becomes of `tasks`, in the order in which they end; one is taken when there is room for it."""
        waiting = iter(tasks)
        while True:
            while self.free and (task := next(waiting, None)) is not None:
                self.start(task)
            if not self.busy:
                return
            yield from self.wait()


def attempt(call: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str | None, str]:
    """The value of a call, or what it raised in words and where that came from."""
    try:
        return call(*arguments), None, ""
    except ModicumError as error:
        return None, str(error), traceback.format_exc()
    except Exception as error:  # noqa: BLE001, whatever it is, other tasks go on
        return None, f"{type(error).__name__}: {error}", traceback.format_exc()
