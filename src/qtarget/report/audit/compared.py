"""A finished comparison of the same rows and model, as advice repeats it: evidence of the user's own, before all other."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qtarget.command import command_for
from qtarget.core.errors import counted, inflected


@dataclass(frozen=True)
class Compared:
    """What `qtarget compare` found, beside the run that is looked at.

    Attributes:
        file: its ``comparison.json``, as it is found from here.
        finding: the verdict's sentence.
        take: the contender; None where nothing could be told.
        options: keys and values of the run that was taken, where this config has others.
        output_dir: for that run.
        helps: whether what was taken is better than the untrained base.
        others: keys in which the comparison's runs differ from this config.
        filtered: whether a contender left rows out.
    """

    file: str
    finding: str
    take: str | None
    options: Mapping[str, str]
    output_dir: str
    helps: bool = True
    others: tuple[str, ...] = ()
    filtered: bool = True

    def in_audit(self, bad_rows: int = 0, rule: str = "auto") -> str:
        """The verdict, and what to do.

        Args:
            bad_rows: that look bad by a filter's rule.
        """
        doubt = ""
        if bad_rows and not self.filtered:
            options = ("--filters", f"none,{rule}", "--output", str(Path(self.file).parent), "--resume")
            doubt = f" No contender left rows out, and {counted(bad_rows, 'row')} of these {inflected(bad_rows, 'look')} bad: "
            doubt += f"`{command_for('compare', *options)}` tries it."
        return f"{self._verdict()} {self._step()}{doubt}"

    def in_training(self) -> str:
        """The verdict, and in what this run is another one."""
        if self.take is None or not self.options:
            return self._verdict()
        given = " ".join(f"--{key} {shlex.quote(value)}" for key, value in self.options.items())
        return f"{self._verdict()} What was taken differs from this run: `{given}`."

    def _verdict(self) -> str:
        under = f", of runs with other {', '.join(self.others)}" if self.others else ""
        return f"Compared on your validation rows ({self.file}{under}): {self.finding}."

    def _step(self) -> str:
        if self.take is None:
            return "So there is no verdict: compare again, with another --metric, into another --output."
        if not self.helps:
            return "Look at the rows before you train on them: the findings above, `qtarget inspect`."
        options = [part for key, value in self.options.items() for part in (f"--{key}", value)]
        command = command_for("train", *options, "--output_dir", self.output_dir)
        return f"Train {self.take}: `{command}`."
