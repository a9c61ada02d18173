"""The lock files hold what the project asks for, at the tested versions, every package with a hash."""

from __future__ import annotations

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINNED = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split() if "==" in line
)


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Version and number of hashes of each package of a lock file."""
    found = {}
    for block in re.split(r"\n(?=[a-z0-9])", (ROOT / "requirements" / name).read_text(encoding="utf-8")):
        package, version = re.match(r"([a-z0-9-]+)==([^ ;]+)", block).groups()
        found[package] = (version, block.count("--hash=sha256:"))
    return found


@pytest.mark.parametrize("name", ["cuda.lock", "cpu.lock"])
def test_every_package_is_pinned_with_a_hash_at_the_tested_version(name) -> None:
    packages = locked(name)
    assert len(packages) > 60 and all(hashes > 0 for _, hashes in packages.values())
    assert {p: v for p, (v, _) in packages.items() if p in PINNED and PINNED[p] != v} == {}


@pytest.mark.parametrize("name", ["cuda.lock", "cpu.lock"])
def test_what_the_project_asks_for_is_in_it(name) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = [*PROJECT["project"]["dependencies"], *extras["train"], *extras["ray"], *extras["serve"]]
    packages = locked(name)
    for requirement in map(Requirement, asked):
        if requirement.name in ("qtarget", *(("torch",) if name == "cpu.lock" else ())):
            continue
        assert requirement.specifier.contains(packages[requirement.name][0]), requirement


def test_a_cpu_gets_no_cuda() -> None:
    assert [p for p in locked("cpu.lock") if p.startswith(("nvidia", "cuda", "triton")) or p == "torch"] == []
    assert "torch" in locked("cuda.lock")


def test_build_requirements_are_pinned_and_trl_is_bounded() -> None:
    assert all("==" in requirement for requirement in PROJECT["build-system"]["requires"])
    trl = next(Requirement(r) for r in PROJECT["project"]["optional-dependencies"]["train"] if r.startswith("trl"))
    assert not trl.specifier.contains("1.17.0"), (
        "TRL moves what the trainer stands on from one minor version to the next"
    )


def test_one_version_everywhere() -> None:
    import yaml

    import qtarget

    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"]
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert qtarget.__version__ == PROJECT["project"]["version"] == cited
    assert f"## {cited}" in changes
