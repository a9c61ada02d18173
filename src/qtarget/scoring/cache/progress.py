"""A bar in supervised tokens, on a terminal; silent elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class PerSecond(ProgressColumn):
    """Mean speed since the start."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        digits = 0 if task.elapsed and task.completed > 10 * task.elapsed else 2
        return Text(f"{task.completed / task.elapsed:,.{digits}f} {self._unit}/s" if task.elapsed else "")


class TokenMeter:
    """Counts scored tokens, or other units of work; use it as a context.

    Args:
        enabled: show a bar, if standard error is a terminal.
        doing: what the bar says is done.
        unit: what is counted.
    """

    def __init__(self, enabled: bool, doing: str = "scoring", unit: str = "tokens") -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn(doing),
            BarColumn(),
            MofNCompleteColumn(),
            PerSecond(unit),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not (enabled and console.is_terminal))
        self._task = self._bar.add_task(doing, start=False, total=None)
        self._total = 0

    def __enter__(self) -> TokenMeter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, total: int) -> None:
        """Begin to count towards ``total`` supervised tokens."""
        self._total = total
        self._bar.update(self._task, total=total)
        self._bar.start_task(self._task)

    def advance(self, tokens: int) -> None:
        """So many more are scored."""
        self._bar.advance(self._task, tokens)

    def skip(self, tokens: int) -> None:
        """So many were scored by an earlier run: there is less to do."""
        self._total -= tokens
        self._bar.update(self._task, total=self._total)
