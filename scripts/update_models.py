"""Write the table of architectures in docs/models.md from what the probes say: ``python -m scripts.update_models``."""

from __future__ import annotations

from tests.integrations.architectures import ARCHITECTURES
from tests.integrations.shared.test_packing import PAGE, table_row


def main() -> None:
    lines = PAGE.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| `"))
    after = next(i for i in range(first, len(lines)) if not lines[i].startswith("| `"))
    lines[first:after] = [table_row(name) for name in ARCHITECTURES]
    PAGE.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
