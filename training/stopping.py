"""Whether somebody wants a training to stop, and how it does."""

import signal
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")


class StoppedError(Exception):
    """Somebody asked to stop, within something whose beginning is no result."""


@dataclass
class Stop:
    """Whether somebody wants the training to stop."""

    signal: int | None = None
    asked: Callable[[], bool] = lambda: False
    training: bool = False
    """Whether there is a state to save."""
    told: Callable[[int, int], None] = lambda _done, _things: None
    """Of every few things that are gone through before the first step: how many are done, and of how many."""

    def __bool__(self) -> bool:
        return self.signal is not None or self.asked()

    def check(self) -> None:
        """Raises:
        StoppedError: somebody asked.
        """
        if self:
            raise StoppedError

    def between(self, things: Collection[T]) -> Iterator[T]:
        """The things, unless somebody asks before the next; who waits is told.

        Args:
            things: a list, or a progress bar over one.

        Raises:
            StoppedError: somebody asked.
        """
        for i, thing in enumerate(things):
            self.check()
            self.told(i, len(things))
            yield thing


def step_of(stop: Stop, bar: Any, *_: Any) -> dict[str, Any]:
    """After each step of a diffusers pipeline: the progress bar, if any, goes on.

    Raises:
        StoppedError: somebody asked.
    """
    stop.check()
    if bar is not None:
        bar.update()
    return {}


@contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask the loop to stop after the step; before the first step, or a second time, they stop at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: Any) -> None:
        stop.signal = number
        if not stop.training:
            raise SystemExit(128 + number)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
