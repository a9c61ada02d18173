"""What a user gets from the built wheel: contents, the core alone, and the demo from an empty folder.

python scripts/check_release.py dist

Makes two virtual environments, so it needs the package index and some minutes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = (
    "import sys, torch, qtarget; logits = torch.zeros(2, 5); "
    "assert abs(float(qtarget.target_loss(logits, torch.tensor([0, 1]), 'sft')) - 1.609438) < 1e-5; "
    "assert not {'transformers', 'trl', 'typer'} & set(sys.modules)"
)


def wheel_files(wheel: Path) -> set[str]:
    """Names in the wheel, from the package on."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected_files() -> set[str]:
    """Every file of the package that git knows."""
    listed = subprocess.run(["git", "ls-files", "src/qtarget"], cwd=ROOT, capture_output=True, text=True, check=True)
    return {name.removeprefix("src/") for name in listed.stdout.split()}


def check_contents(wheel: Path) -> None:
    """Nothing of the package is missing, nothing else is in it."""
    found = {name for name in wheel_files(wheel) if ".dist-info/" not in name}
    if missing := expected_files() - found:
        raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(missing)[:9])}: see package-data in pyproject.toml")
    if more := found - expected_files():
        raise SystemExit(f"{wheel.name} holds {', '.join(sorted(more)[:9])}, which git does not know")


def install(folder: Path, requirement: str) -> Path:
    """A virtual environment with the wheel; its ``bin``."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin/pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", requirement], check=True)
    return folder / "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dist", type=Path)
    [wheel] = parser.parse_args().dist.absolute().glob("*.whl")
    check_contents(wheel)
    print("contents: as git has them")
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty")
        empty.mkdir()
        core = install(Path(folder, "core"), str(wheel))
        subprocess.run([core / "python", "-c", CORE], cwd=empty, check=True)
        print("the core alone: imports and computes a loss")
        train = install(Path(folder, "train"), f"{wheel}[train]")
        subprocess.run([train / "qtarget", "demo", "--quick", "--output", "demo"], cwd=empty, check=True)
        print("with [train]: the demo runs from an empty folder")


if __name__ == "__main__":
    main()
