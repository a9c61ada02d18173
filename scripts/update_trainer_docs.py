"""Do everything that the table in docs/trainer.md lists with TRL's trainer and with ours, and write the table anew.

Names of acts as arguments: only those; the other lines stay.
"""

from __future__ import annotations

import sys

from tests import ROOT
from tests.peers.acts import ACTS, outcome
from tests.peers.test_peers import END, START, committed

PAGE = ROOT / "docs/trainer.md"


def main() -> None:
    chosen = sys.argv[1:] or list(ACTS)
    found = {name: line for name, line in committed().items() if name not in chosen}
    for name in chosen:
        try:
            found[name] = outcome(name)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    lines = [f"| {name} | {found[name]} |" for name in ACTS if name in found]
    table = "\n".join(["", "| what | `QTargetTrainer`, `target: sft` |", "|---|---|", *lines])
    text = PAGE.read_text()
    PAGE.write_text(text[: text.index(START)] + START + table + "\n" + text[text.index(END) :])
    sys.exit(len(lines) != len(ACTS))


if __name__ == "__main__":
    main()
