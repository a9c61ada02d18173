"""Kills at random moments, full disks and read-only folders: what is finished stays, and going on gives the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from attack_inputs import Place, text_lines
from attack_process import Ended, import_everything, run_one, start

from qtarget.data.embedded import load_demonstrations

KILLS = 20
TRAINING = {"max_steps": 12, "save_strategy": "steps", "save_steps": 2, "seed": 17}
LIMITS = (0, 100, 5_000, 100_000, 2_000_000, 7_500_000)
"""Bytes that a file may have where the disk is full; the model has 7 million."""
ROWS = 32


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def content_of_cache(folder: Path) -> dict[str, str]:
    """Digests of what a cache says: its shards. The manifest holds times."""
    return {path.name: digest(path) for path in sorted(folder.rglob("*.parquet"))}


def content_of_run(folder: Path) -> dict[str, str]:
    """Digest of the final weights."""
    return {path.name: digest(path) for path in sorted(folder.glob("*.safetensors"))}


def commands(place: Place) -> dict[str, list[str]]:
    """The two verbs that work for long, each without its output."""
    rows = place.good / "many.jsonl"
    rows.write_bytes(text_lines(*load_demonstrations("train")[:ROWS]))
    config = str(place.write_config("long", place.good, train_file=str(rows), **TRAINING))
    return {
        "train": ["train", config, "--output_dir"],
        "score": ["score", config, "--top-k", "4", "--shard-rows", "2", "--output"],
    }


def attack_kills(folder: Path, count: int) -> dict[str, Any]:
    """Kill ``train`` and ``score`` ``count`` times each, go on, and compare with an undisturbed run."""
    scratch = folder / "scratch"
    scratch.mkdir()
    draw = random.Random(17)
    place = Place(folder, lambda command: run_one(command, scratch).code)
    out: dict[str, Any] = {}
    for verb, words in commands(place).items():
        content = content_of_run if verb == "train" else content_of_cache
        begin = time.monotonic()
        whole = run_one([*words, str(place.out / f"{verb} whole")], scratch)
        seconds = time.monotonic() - begin
        expected = content(place.out / f"{verb} whole")
        if whole.code or not expected:
            raise RuntimeError(f"the undisturbed run ended with {whole.code}:\n{whole.text}")
        tries = [
            one_kill(verb, words, place.out / f"{verb} {n}", scratch, draw.uniform(0.05, seconds)) for n in range(count)
        ]
        for number, tried in enumerate(tries):
            tried["same"] = content(place.out / f"{verb} {number}") == expected
        lost = [t for t in tries if not t["same"] or t["code"] or t["finished_lost"]]
        out[verb] = {
            "kills": count,
            "during_work": sum(t["killed"] for t in tries),
            "with_something_finished": sum(t["finished"] > 0 for t in tries),
            "during_a_write": sum(t["half_written"] > 0 for t in tries),
            "same_bytes": sum(t["same"] for t in tries),
            "finished_lost": sum(t["finished_lost"] for t in tries),
            "undisturbed_seconds": round(seconds, 1),
            "found": lost,
        }
    out["held"] = all(not out[verb]["found"] for verb in ("train", "score"))
    return out


def one_kill(verb: str, words: Sequence[str], output: Path, scratch: Path, after: float) -> dict[str, Any]:
    """Kill a run after so many seconds, see what it left, and go on."""
    place = scratch / f"{output.name} killed"
    place.mkdir()
    pid = start([*words, str(output)], place)
    time.sleep(after)
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    finished = finished_files(output, verb)
    half = list(output.rglob("*.tmp*")) if output.exists() else []
    again = run_one([*words, str(output), *(["--resume", "true"] if verb == "train" else [])], scratch)
    if not killed and verb == "train":
        again = Ended(0, 0.0, 0.0, 0.0, "")  # it was over before: there was nothing to go on with
    gone = what_is_gone(verb, output, finished) if killed else 0
    return {
        "after": round(after, 2), "killed": killed, "finished": len(finished), "half_written": len(half), "code": again.code,
        "finished_lost": gone, "text": again.text[-400:] if again.code else "",
    }  # fmt: skip


def what_is_gone(verb: str, output: Path, finished: dict[str, str]) -> int:
    """Shards that are other bytes now; 1 where training did not go on from its newest whole checkpoint."""
    if verb == "score":
        now = content_of_cache(output)
        return sum(now.get(name) != known for name, known in finished.items())
    newest = max((int(Path(name).name.rpartition("-")[2]) for name in finished), default=None)
    begun = json.loads((output / "train_summary.json").read_text())["resumed_from"] if finished else None
    return int(newest is not None and not str(begun).endswith(f"checkpoint-{newest}"))


def finished_files(output: Path, verb: str) -> dict[str, str]:
    """What a run must not lose: shards; complete checkpoints (which later ones may replace)."""
    if verb == "score":
        return content_of_cache(output)
    return {str(path.parent): "" for path in output.glob("checkpoint-*/qtarget_complete")}


def file_limit(size: int) -> None:
    """No file may grow beyond ``size`` bytes; writing on is an error and no signal."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def writers(place: Place) -> dict[str, list[str]]:
    """Every verb that writes, with ``OUT`` for its output."""
    config, rows, model = str(place.config), str(place.rows), str(place.model)
    return {
        "train": ["train", config, "--save_strategy", "steps", "--save_steps", "1", "--output_dir", "OUT"],
        "score": ["score", config, "--top-k", "4", "--output", "OUT"],
        "inspect": ["inspect", config, "--output", "OUT/page.html", "--json", "OUT/page.json"],
        "audit-data": ["audit-data", config, "--json", "OUT/audit.json"],
        "convert": ["convert", rows, "OUT/rows.jsonl", "--overwrite"],
        "noise": ["noise", rows, "OUT/rows.jsonl", "--kind", "random_tokens", "--rate", "0.5", "--overwrite"],
        "lens": ["lens", "sft", "--output", "OUT/lens.html", "--json", "OUT/lens.json"],
        "report": ["report", str(place.trained), "--output", "OUT/report.html", "--json", "OUT/report.json"],
        "evaluate": ["evaluate", model, "--base", model, "--data", rows, "--limit", "2", "--output", "OUT/evaluation.json"],
        "cache merge": ["cache", "merge", str(place.cache), str(place.other_cache), "--output", "OUT"],
        "cache export": ["cache", "export", str(place.cache), "verl", "--config", config, "--output", "OUT"],
    }  # fmt: skip


QUICK_VERBS = ("train", "convert", "lens")
FOLDERS = ("train", "score", "cache merge", "cache export")


def attack_disks(folder: Path, limits: Sequence[int] = LIMITS, quick: bool = False) -> dict[str, Any]:
    """Every writing verb where files cannot grow, and where the folder is read-only; earlier files must stay."""
    scratch = folder / "scratch"
    scratch.mkdir()
    place = Place(folder, lambda command: run_one(command, scratch).code)
    place.score_and_train()
    tries, found = 0, []
    verbs = {verb: words for verb, words in writers(place).items() if not quick or verb in QUICK_VERBS}
    for verb, words in verbs.items():
        output = place.out / verb.replace(" ", "_")
        earlier = write_earlier(verb, words, output, scratch)
        for limit in limits:
            goal = output if verb not in FOLDERS else place.out / f"{output.name} {limit}"
            end = run_one(into(words, goal), scratch, lambda limit=limit: file_limit(limit))
            tries += 1
            # standard output is a file here, and may not grow either: nothing can be said below a kilobyte
            bad = what_was_lost(earlier, end, refused=limit < 1000, mute=limit < 5000)
            if bad:
                found.append(lost(verb, limit, bad, end))
        read_only = run_read_only(words, output, scratch)
        if read_only is not None:
            tries += 1
            bad = what_was_lost(earlier, read_only, refused=True, mute=False)
            if bad:
                found.append(lost(verb, "read-only", bad, read_only))
    return {
        "verbs": len(verbs), "limits": list(limits), "read_only": "bind mount" if may_unshare() else "skipped: no unshare",
        "tries": tries, "found": found, "held": not found,
    }  # fmt: skip


def lost(verb: str, limit: int | str, what: str, end: Ended) -> dict[str, Any]:
    """A fault, for people."""
    return {"verb": verb, "limit": limit, "what": what, "code": end.code, "text": end.text[-400:]}


def into(words: Sequence[str], output: Path) -> list[str]:
    """A command line with its output put in."""
    return [word.replace("OUT", str(output), 1) if word.startswith("OUT") else word for word in words]


def write_earlier(verb: str, words: Sequence[str], output: Path, scratch: Path) -> dict[Path, str]:
    """Run a verb undisturbed; digests of what it wrote."""
    if verb not in FOLDERS:
        output.mkdir()
    end = run_one(into(words, output), scratch)
    if end.code:
        raise RuntimeError(f"{verb} ended with {end.code} undisturbed:\n{end.text}")
    return {path: digest(path) for path in output.rglob("*") if path.is_file() and path.name != ".lock"}


def what_was_lost(earlier: dict[Path, str], end: Ended, refused: bool, mute: bool) -> str | None:
    """What is wrong after a disk refused; None: nothing."""
    if any(not path.exists() or digest(path) != known for path, known in earlier.items() if end.code):
        return "an earlier file changed"
    if "Traceback (most recent call last)" in end.text:
        return "traceback"
    if end.code not in (0, 2) or (refused and end.code == 0):
        return f"exit code {end.code}"
    if end.code and not mute and len(re.findall(r"(?m)^(?:\w+Error: |`qtarget .* stopped)", end.text)) != 1:
        return "not one error"
    return None


def may_unshare() -> bool:
    """Whether this machine lets us mount in a namespace of our own."""
    unshare = shutil.which("unshare")
    return (
        unshare is not None
        and not subprocess.run([unshare, "-rm", "true"], capture_output=True, check=False).returncode
    )


def run_read_only(words: Sequence[str], output: Path, scratch: Path) -> Ended | None:
    """A command line in a process that sees its output folder read-only; None where that cannot be made."""
    if not may_unshare():
        return None
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
    program = [sys.executable, "-m", "qtarget.cli.main", *into(words, output)]
    begin = time.monotonic()
    command = ["unshare", "-rm", "sh", "-c", mount, str(output), *program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch, timeout=120)
    return Ended(done.returncode, time.monotonic() - begin, 0.0, 0.0, done.stdout + done.stderr)


if __name__ == "__main__":
    import tempfile

    import_everything()
    with tempfile.TemporaryDirectory() as home:
        for part in (lambda at: attack_kills(at, 2), attack_disks):
            with tempfile.TemporaryDirectory(dir=home) as made:
                print(json.dumps(part(Path(made).resolve()), indent=1))
