"""Attack the command line: bad inputs, kills, full disks, read-only folders, and a server.

``python scripts/attack.py --output FILE.json`` takes about 20 minutes on 2 cores, ``--quick`` under one. It prints a table,
and ends with 1 where something did not hold.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attack_server
from attack_inputs import Case, Place, all_cases
from attack_kills import KILLS, LIMITS, attack_disks, attack_kills
from attack_process import HUNG, Ended, import_everything, run_all, run_one

MIB = 1024.0
"""Within which a bad input must be refused."""
QUICK_EVERY = 40
"""The quick form runs one bad input of so many."""
PARTS = ("inputs", "kills", "disks", "server")


def fault(case: Case, end: Ended) -> str | None:
    """What is wrong with how a bad input ended; None: it was refused as it should be."""
    if "Traceback (most recent call last)" in end.text:
        return "traceback"
    if end.code < 0 or end.seconds > HUNG:
        return "died or hung"
    if "did not foresee" in end.text:
        return "not foreseen"
    if end.code == 0:
        return "wrongly silent"
    if end.code not in case.codes:
        return f"exit code {end.code}"
    if end.seconds > case.seconds:
        return "slow"
    return "memory" if end.mib > MIB else None


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, without locks and what a cache derives from itself."""
    files = sorted(
        path for path in folder.rglob("*") if path.is_file() and path.name != ".lock" and ".decoded" not in path.parts
    )
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def attack_inputs(folder: Path, every: int, at_once: int, only: str | None = None) -> dict[str, Any]:
    """Every bad input; which of them were not refused as they should be."""
    scratch = folder / "scratch"
    scratch.mkdir()
    modules = folder / "modules"
    modules.mkdir()
    (modules / "raises_at_import.py").write_text("raise RuntimeError('no')\n")
    (modules / "exits_at_import.py").write_text("raise SystemExit(0)\n")
    sys.path.append(str(modules))
    place = Place(folder, lambda command: run_one(command, scratch).code)
    place.score_and_train()
    before = digests(place.good)
    cases = [case for case in all_cases(place) if only is None or only in f"{case.kind}: {case.name}"]
    cases = cases[::every]
    found, slowest, slowest_serve, largest, cpu = [], 0.0, 0.0, 0.0, 0.0
    for number, end in run_all([case.command for case in cases], scratch, at_once):
        case, what = cases[number], fault(cases[number], end)
        slowest, largest, cpu = (
            max(slowest, end.seconds * (case.command[0] != "serve")),
            max(largest, end.mib),
            cpu + end.cpu_seconds,
        )
        slowest_serve = max(slowest_serve, end.seconds * (case.command[0] == "serve"))
        if what is not None:
            command = " ".join(case.command).replace(str(folder), "T")
            found.append(
                {"what": what, "case": f"{case.kind}: {case.name}", "command": command}
                | {"code": end.code, "seconds": end.seconds, "cpu_seconds": end.cpu_seconds, "mib": end.mib}
                | {"text": end.text.replace(str(folder), "T")[-600:]}
            )
            print(f"  {what}: {case.kind}: {case.name}", file=sys.stderr, flush=True)
    after = digests(place.good)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    return {
        "cases": len(cases),
        "kinds": dict(Counter(case.kind for case in cases)),
        "faults": dict(Counter(one["what"] for one in found)),
        "found": found,
        "slowest_seconds": slowest,
        "slowest_serve_seconds": slowest_serve,
        "cpu_seconds": round(cpu, 1),
        "largest_mib": largest,
        "inputs_changed": changed,
        "held": not found and not changed,
    }


def table(parts: dict[str, dict[str, Any]]) -> list[str]:
    """What was attacked, how often, and what came of it: lines of Markdown."""
    lines = ["| attack | tried | held | seconds |", "| --- | --- | --- | --- |"]
    for name, part in parts.items():
        if name == "inputs":
            faults = ", ".join(f"{count} {what}" for what, count in part["faults"].items()) or "all refused"
            tried, held = f"{part['cases']} bad command lines", faults
        elif name == "kills":
            tried = ", ".join(f"{part[verb]['kills']} of {verb}" for verb in ("train", "score"))
            held = ", ".join(f"{verb}: {part[verb]['same_bytes']} bit for bit" for verb in ("train", "score"))
        elif name == "disks":
            tried = f"{part['tries']} writes of {part['verbs']} verbs; read-only: {part['read_only']}"
            held = f"{len(part['found'])} faults"
        else:
            tried = f"{part['silent']} silent connections, {sum(part['garbage'].values())} damaged messages"
            held = f"{part['answered']} of {part['asked']} answered, {part['wrong']} wrong"
        lines.append(f"| {name} | {tried} | {held} | {part['seconds']:.0f} |")
    return lines


def main() -> int:
    """0 when everything held."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--output", type=Path, help="write everything there, JSON")
    parser.add_argument("--parts", help=f"apart by commas; default: {','.join(PARTS)}, quick: without the server")
    parser.add_argument("--kills", type=int, help="of each verb; default: 20, quick 1")
    parser.add_argument("--at-once", type=int, default=2, help="bad inputs at a time")
    parser.add_argument("--every", type=int, help="one bad input of so many; default: 1, quick 40")
    parser.add_argument("--only", help="bad inputs whose kind or name holds this")
    options = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "120"}
    makers: dict[str, Callable[[Path], dict[str, Any]]] = {
        "inputs": lambda folder: attack_inputs(
            folder, options.every or (QUICK_EVERY if options.quick else 1), options.at_once, options.only
        ),
        "kills": lambda folder: attack_kills(folder, options.kills or (1 if options.quick else KILLS)),
        "disks": lambda folder: attack_disks(folder, LIMITS[3:4] if options.quick else LIMITS, options.quick),
        "server": lambda _: attack_server.attack(attack_server.Plan()),
    }
    import_everything()
    parts = {}
    names = (
        options.parts.split(",")
        if options.parts
        else [name for name in makers if not options.quick or name != "server"]
    )
    for name in names:
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            parts[name] = makers[name](Path(folder).resolve())
        parts[name]["seconds"] = round(time.monotonic() - begin, 1)
    from qtarget.benchmarks.machine import machine_facts, versions

    result = {"machine": machine_facts(), "versions": versions(), "quick": options.quick, "parts": parts}
    if options.output is not None:
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print("\n".join(table(parts)))
    return 0 if all(part["held"] for part in parts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
