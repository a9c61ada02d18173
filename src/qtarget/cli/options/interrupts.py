"""SIGINT and SIGTERM: one line about what is safe and how to go on, then exit code 130 or 143."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

NOTHING_KEPT = "earlier files are as they were; run the same command again"
EXIT = 128
"""A shell's convention: this, plus the signal's number."""

_words: list[Callable[[], str]] = []
_received: list[int] = []
_owner: list[int] = []  # the process that handles signals: a forked worker has its parent's handlers


class Interrupted(BaseException):
    """A signal asked for the end; no ``except Exception`` on the way swallows it."""


@contextmanager
def on_interrupt(words: Callable[[], str]) -> Iterator[None]:
    """Say ``words()`` where a signal ends the block: what is safe, and how to go on."""
    _words.append(words)
    try:
        yield
    finally:
        if not _received:  # else the line is still to be said
            _words.remove(words)


@contextmanager
def signals_end_it() -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM raises ``Interrupted``, and a second one ends the process at once.

    In a thread that is not the first one nothing changes, as Python has it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = [
        n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN
    ]  # as under nohup
    earlier = {number: signal.signal(number, _handle) for number in watched}
    _owner[:] = [os.getpid()]
    try:
        yield
    except BaseException as error:
        if not _received or os.getpid() not in _owner:
            raise
        leave(error)
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def _handle(number: int, frame: FrameType | None) -> None:
    if os.getpid() not in _owner:  # a terminal's SIGINT is the parent's matter, and SIGTERM ends a worker quietly
        if number == signal.SIGTERM:
            os._exit(EXIT + number)
        return
    if _received:
        os._exit(EXIT + number)
    _received.append(number)
    raise Interrupted(number)


def leave(error: BaseException) -> NoReturn:
    """Say what is safe, once for all processes of a run, and exit. What a library made of the signal is not shown."""
    number = _received[0]
    if os.environ.get("RANK", "0") == "0":
        try:
            words = _words[-1]() if _words else NOTHING_KEPT
        except Exception:  # whatever was looked at is in the middle of something
            words = NOTHING_KEPT
        print(f"\ninterrupted ({signal.Signals(number).name}): {words}", file=sys.stderr, flush=True)
    _received.clear()
    _words.clear()
    raise SystemExit(EXIT + number) from error
