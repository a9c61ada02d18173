"""A chat template is a program that comes with a model; it gets some seconds a row, and no more."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from qtarget.core.errors import DataError
from qtarget.data.limits import raised

TICK = 0.5
"""Seconds of CPU time between two looks."""


class _Watch:
    """Looks every ``TICK`` whether a template is still rendering the row that it rendered at the last looks."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.tick = seconds, min(TICK, seconds / 2)
        self.frame: FrameType | None = None
        self.spent = 0.0

    def start(self) -> None:
        signal.setitimer(signal.ITIMER_VIRTUAL, self.tick, self.tick)

    def look(self, _: int, frame: FrameType | None) -> None:
        found = _rendering(frame)
        self.spent = self.spent + self.tick if found is not None and found is self.frame else 0.0
        self.frame = found
        if self.spent >= self.seconds:
            self.frame, self.spent = None, 0.0
            raise DataError(
                f"the chat template has rendered one row for {self.seconds:g} s of CPU time; look for a loop in it, or "
                f"{raised('template_seconds', self.seconds * 10)}"
            )


_watches: list[_Watch] = []


def _after_fork() -> None:
    if _watches:  # a child inherits the handler and no timer; rows are tokenised in several processes
        _watches[-1].start()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _rendering(frame: FrameType | None) -> FrameType | None:
    """The outermost frame of a Jinja template on the stack: one a call of ``render``."""
    found = None
    while frame is not None:
        if "__jinja_template__" in frame.f_globals:
            found = frame
        frame = frame.f_back
    return found


@contextmanager
def bounded_templates(seconds: float) -> Iterator[None]:
    """Stop any chat template that renders one row for more than some seconds of CPU time.

    Works in the main thread, where signals arrive, on systems with interval timers; elsewhere nothing is bounded.

    Args:
        seconds: of CPU time of this process, so that a busy machine changes nothing.

    Raises:
        DataError: a template took longer.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread() or _watches:
        yield
        return
    watch = _Watch(seconds)
    before: Any = signal.signal(signal.SIGVTALRM, watch.look)
    signal.siginterrupt(signal.SIGVTALRM, False)  # libraries that wait in a system call go on waiting
    _watches.append(watch)
    watch.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        _watches.pop()
        signal.signal(signal.SIGVTALRM, before or signal.SIG_DFL)
