"""Nothing written over, nobody let in, nothing half-written: by what the command line refuses, and what it leaves alone."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("trl")

from qtarget.cli.main import run
from tests import ROOT

TRAIN = {"save_strategy": "steps", "save_steps": 2}


def qtarget(*arguments: object) -> None:
    """Run a verb that must succeed."""
    with pytest.raises(SystemExit) as ended:
        run([str(argument) for argument in arguments])
    assert ended.value.code == 0


def content(folder: Path) -> dict[str, str]:
    """Digest of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refused(capsys):
    """A function that runs a verb that must fail with some words and leave a folder's every byte as it was."""

    def check(words: str, untouched: Path, *arguments: object) -> str:
        before = content(untouched)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run([str(argument) for argument in arguments])
        errors = capsys.readouterr().err
        assert ended.value.code == 2, errors
        assert "Traceback" not in errors
        assert words in errors
        assert content(untouched) == before
        return errors

    return check


@pytest.fixture
def own_model(tmp_path, tiny_model) -> Path:
    """A copy that a failing test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


# -- no verb writes over what it reads, or into what is not its own -------------------------------------------------


def test_no_verb_writes_into_a_model_or_over_its_rows(workspace, tmp_path, own_model, refused):
    config = workspace(model_name_or_path=str(own_model))
    rows = tmp_path / "rows.jsonl"
    link = tmp_path / "link"
    link.symlink_to(own_model, target_is_directory=True)
    for folder, words in (
        (own_model, "is"),
        (own_model / "new", "lies in"),
        (link / "new", "lies in"),
        (tmp_path, "holds"),
    ):
        refused(f" {words} {'' if words == 'holds' else own_model}", tmp_path, "train", config, "--output_dir", folder)
        refused(f" {words} ", tmp_path, "score", config, "--output", folder)
    refused(f"is {rows}, which is read here", tmp_path, "score", config, "--output", rows)
    hard = tmp_path / "hard.html"
    hard.hardlink_to(rows)
    for verb in (["inspect", config], ["audit-data", config]):
        option = "--json" if verb[0] == "audit-data" else "--output"
        refused("which is read here", tmp_path, *verb, option, rows)
        refused("which is read here", tmp_path, *verb, option, hard)
        refused("which is read here", tmp_path, *verb, option, own_model / "page.html")
    noise = ["--kind", "random_tokens", "--rate", 0.2, "--overwrite"]
    refused("which is read here", tmp_path, "noise", rows, hard, *noise)
    refused("holds a model", tmp_path, "lens", "dft", "--output", own_model / "page.html")
    for name in ("held_out.jsonl", "run.yaml"):
        other = tmp_path / f"{name}.html"
        shutil.copy(tmp_path / name, other)
        refused("did not make it", tmp_path, "lens", "dft", "--output", other)
    refused("did not make it", tmp_path, "lens", "dft", "--output", tmp_path / "held_out.jsonl")
    refused("are both", tmp_path, "lens", "dft", "--output", tmp_path / "a.html", "--json", tmp_path / "A.HTML")


def test_caches_runs_and_foreign_folders_are_told_apart(workspace, tmp_path, refused):
    config, cache, out = workspace(**TRAIN), tmp_path / "cache", tmp_path / "out"
    qtarget("score", config, "--output", cache, "--top-k", 4)
    qtarget("train", config)
    assert json.loads((cache / ".qtarget").read_text())["kind"] == "cache"
    assert json.loads((out / ".qtarget").read_text())["kind"] == "run"
    exported, foreign = tmp_path / "exported", tmp_path / "theirs"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    wider = workspace(**TRAIN, model_name_or_path=str(out))
    refused("is read here", tmp_path, "train", wider)
    workspace(**TRAIN)
    for marked in (True, False):  # a version without markers made the same folders
        refused("holds a cache", tmp_path, "train", config, "--output_dir", cache)
        refused("holds a training run", tmp_path, "score", config, "--output", out)
        refused("holds a training run", tmp_path, "demo", "--quick", "--output", out)
        refused("holds a cache", tmp_path, "demo", "--quick", "--output", cache)
        export = ["cache", "export", cache, "axolotl", "--config", config, "--output"]
        refused("which is read here", tmp_path, *export, cache)
        refused("holds a training run", tmp_path, *export, out)
        refused("lies in", tmp_path, "cache", "merge", cache, cache, "--output", cache / "merged")
        refused("holds a cache", tmp_path, "lens", "dft", "--json", cache / "manifest.json")
        refused("training run's own file", tmp_path, "lens", "dft", "--json", out / "train_summary.json")
        refused("holds a cache", tmp_path, "report", out, "--output", tmp_path / "r.html", "--png", cache)
        if marked:
            for folder in (cache, out):
                (folder / ".qtarget").unlink()
    for verb in (
        ["train", config, "--output_dir"],
        ["score", config, "--output"],
        ["demo", "--quick", "--output"],
        export,
    ):
        refused("what qtarget did not write (thesis.tex)", tmp_path, *verb, foreign)
    qtarget(*export, exported)
    imported = ["cache", "import", "axolotl", exported, "--model", "m", "--tokenizer", workspace.__name__, "--output"]
    refused("which is read here", tmp_path, *imported, exported)
    refused("holds a training run", tmp_path, *imported, out)
    qtarget("score", config, "--output", cache, "--top-k", 4)  # of a version without markers: ours, and gone on with
    assert json.loads((cache / ".qtarget").read_text())["kind"] == "cache"


def test_a_config_and_a_log_may_lie_in_the_runs_folder(workspace, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "slurm-1.out").write_text("started")
    config = workspace(max_steps=1)
    qtarget("train", config.rename(out / "run.yaml"), "--train_file", tmp_path / "rows.jsonl")
    assert (out / "train_summary.json").exists()


# -- one writer a folder -------------------------------------------------------------------------------------------


def started(*arguments: object, cwd: Path) -> subprocess.Popen:
    """A verb in a process of its own, which heeds SIGINT also where the tests run in the background."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    return subprocess.Popen(
        [sys.executable, "-m", "qtarget.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until(condition, process: subprocess.Popen, seconds: float = 240) -> None:
    """Wait for a condition while the process lives."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.slow
def test_two_trainings_a_kill_and_two_signals(workspace, tmp_path, refused):
    """The second training is refused by name; a killed one blocks nobody; SIGINT and SIGTERM say how to go on."""
    out = tmp_path / "out"
    config = workspace(save_strategy="steps", save_steps=2, max_steps=100_000, save_total_limit=2, disable_tqdm=True)
    process = started("train", config, cwd=tmp_path)
    until(lambda: list(out.glob("checkpoint-*/qtarget_complete")), process)
    with stopped(process):
        for verb in (["train", config], ["train", config, "--resume", "true"]):
            errors = refused("another process is writing", out, *verb)
            assert f"process {process.pid} on {os.uname().nodename}" in errors
    process.kill()
    process.communicate()
    assert (out / ".lock").exists()
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        begun = max((p.stat().st_mtime_ns for p in out.glob("checkpoint-*/qtarget_complete")), default=0)
        process = started("train", config, "--resume", "true", cwd=tmp_path)
        until(
            lambda begun=begun: any(p.stat().st_mtime_ns > begun for p in out.glob("checkpoint-*/qtarget_complete")),
            process,
        )
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == code
        assert "Traceback" not in errors
        said = [line for line in errors.splitlines() if line.startswith("interrupted")]
        assert len(said) == 1
        assert signal.Signals(number).name in said[0]
        assert "is whole; go on from it with the same command and --resume true" in said[0]
        assert Path(said[0].split(": ")[1].split(" is whole")[0]).is_dir()
        assert not (out / ".lock").exists()


@contextmanager
def stopped(process: subprocess.Popen):
    """Halt a process, so that what it writes stays put meanwhile."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


@pytest.mark.slow
def test_an_interrupted_scoring_goes_on(workspace, tmp_path):
    config, cache = workspace(), tmp_path / "cache"
    rows = [{"prompt": f"{i}+1=", "completion": f"{i + 1}"} for i in range(4000)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("score", config, "--output", cache, "--shard-rows", 5)
    process = started(*command, cwd=tmp_path)
    until(lambda: len(list(cache.glob("shard-*.parquet"))) > 2, process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert f"of 800 shards are finished in {cache}; run the same command again" in errors
    assert "Traceback" not in errors
    finished = {path: path.stat().st_mtime_ns for path in cache.glob("shard-*.parquet")}
    qtarget(*command)
    assert (cache / "manifest.json").exists()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished


# -- resume takes only what belongs to it --------------------------------------------------------------------------


@pytest.fixture
def finished(workspace, tmp_path) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    qtarget("train", workspace(**TRAIN))
    return tmp_path / "out"


def test_another_run_is_not_gone_on_with(workspace, tmp_path, own_model, finished, refused, capsys):
    resume = ("train", workspace(**TRAIN), "--resume", "true")
    refused("target was sft, is dft", tmp_path, *resume, "--target", "dft")
    refused("learning_rate was 0.01, is 0.001", tmp_path, *resume, "--learning_rate", "1e-3")
    refused("seed was 42, is 7", tmp_path, *resume, "--seed", "7")
    refused("rows a step was 4, is 2", tmp_path, *resume, "--per_device_train_batch_size", "2")
    refused("rows was", tmp_path, *resume, "--train_file", tmp_path / "held_out.jsonl")
    from safetensors.torch import load_file, save_file

    weights = load_file(own_model / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, own_model / "model.safetensors", metadata={"format": "pt"})
    refused("model was", tmp_path, *resume, "--model_name_or_path", own_model)
    qtarget(*resume, "--max_steps", 6)  # a longer run is the same run
    qtarget("train", workspace(**TRAIN), "--resume", "force", "--target", "dft", "--max_steps", 8)
    assert json.loads((finished / "train_summary.json").read_text())["resumed_from"] == str(finished / "checkpoint-6")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda c: (c / "model.safetensors").write_bytes((c / "model.safetensors").read_bytes()[:-9]),
            "is damaged: model",
        ),
        (lambda c: (c / "model.safetensors").unlink(), "is damaged: model.safetensors is missing"),
        (lambda c: (c / "trainer_state.json").unlink(), "is damaged: trainer_state.json"),
        (lambda c: (c / "trainer_state.json").write_text('{"global_'), "is damaged: trainer_state.json cannot be read"),
        (
            lambda c: (c / "optimizer.pt").write_bytes((c / "optimizer.pt").read_bytes()[:99]),
            "is damaged: optimizer.pt",
        ),
        (lambda c: (c / "qtarget_complete").write_text("{"), "is damaged: qtarget_complete is not JSON"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_never_forced(workspace, tmp_path, finished, refused, spoil, words):
    spoil(finished / "checkpoint-4")
    for value in ("true", "force"):
        errors = refused(words, tmp_path, "train", workspace(**TRAIN), "--resume", value)
        assert f"go on from {finished / 'checkpoint-2'}" in errors


def test_damage_is_seen_without_the_sizes_of_an_earlier_version(workspace, tmp_path, finished, refused):
    checkpoint = finished / "checkpoint-4"
    (checkpoint / "qtarget_complete").write_text("saved to the end\n")
    qtarget("train", workspace(**TRAIN), "--resume", "true", "--target", "dft")  # it cannot say what it is of
    for name in ("model.safetensors", "optimizer.pt"):
        whole = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        refused(f"is damaged: {name} is cut off", tmp_path, "train", workspace(**TRAIN), "--resume", "true")
        (checkpoint / name).write_bytes(whole)


def test_missing_states_can_be_forced(workspace, tmp_path, finished, refused, caplog):
    checkpoint = finished / "checkpoint-4"
    for name in ("optimizer.pt", "rng_state.pth"):
        (checkpoint / name).unlink()
    config = workspace(**TRAIN, max_steps=5)
    errors = refused("it has no optimizer state, optimizer.pt", tmp_path, "train", config, "--resume", "true")
    assert "it has no random state, rng_state.pth" in errors
    qtarget("train", config, "--resume", "force")
    assert "by force: it has no optimizer state" in caplog.text
    (checkpoint / "qtarget_complete").unlink()  # as a cut-off one, or another trainer's
    explicit = ("train", config, "--output_dir", tmp_path / "new", "--resume_from_checkpoint", checkpoint)
    refused("has no qtarget_complete", finished, *explicit)
    qtarget(*explicit, "--resume", "force")


def test_nothing_to_resume_from_is_said_and_training_starts(workspace, tmp_path, caplog):
    qtarget("train", workspace(max_steps=1), "--resume", "true")
    assert f"resume: {tmp_path / 'out'} holds no checkpoint to go on from; starting at step 0" in caplog.text


def test_a_finished_run_is_not_trained_further(workspace, finished):
    """Transformers would take one step more; a kill before the last save is made good for."""
    before = content(finished)
    (finished / "model.safetensors").unlink()
    (finished / "train_summary.json").unlink()
    qtarget("train", workspace(**TRAIN), "--resume", "true")
    after = content(finished)
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"train_summary.json", "qtarget_config.yaml"}
    assert json.loads((finished / "train_summary.json").read_text())["steps"] == 4


def test_a_replaced_checkpoint_is_kept(workspace, finished):
    before = content(finished / "checkpoint-4")
    qtarget("train", workspace(**TRAIN), "--resume_from_checkpoint", finished / "checkpoint-2")
    assert content(finished / "earlier_checkpoints" / "checkpoint-4-1") == before


# -- all or nothing on disk ----------------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int):
    """No file may grow beyond ``size`` bytes in this process: the kernel refuses as a full disk does."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


@pytest.mark.parametrize("verb", ["lens", "inspect", "audit-data", "noise", "report"])
def test_pages_json_and_rows_are_whole_or_as_they_were(workspace, tmp_path, refused, verb):
    config, pages = workspace(max_steps=2), tmp_path / "pages"
    pages.mkdir()
    page, numbers, picture = pages / "page.html", pages / "numbers.json", pages / "picture.png"
    command: list[object] = {
        "lens": ["lens", "dft", "--output", page, "--json", numbers, "--png", picture],
        "inspect": ["inspect", config, "--output", page, "--json", numbers],
        "audit-data": ["audit-data", config, "--json", numbers],
        "noise": ["noise", tmp_path / "rows.jsonl", pages / "noisy.jsonl", "--kind", "boilerplate", "--rate", 1, "--overwrite"],
        "report": ["report", tmp_path / "out", "--output", page, "--json", numbers, "--png", pages / "figures"],
    }[verb]  # fmt: skip
    if verb == "report":
        qtarget("train", config)
    qtarget(*command)
    assert content(pages)
    with files_of_at_most(0):
        errors = refused("StorageError: cannot write", pages, *command)
    assert "File too large" in errors
    assert "run the same command again" in errors


@pytest.mark.parametrize("at", [0, 400, 4_000, 12_000])
def test_training_on_a_full_disk_is_one_block_and_what_is_saved_stays(workspace, tmp_path, finished, capsys, at):
    """Records, weights, optimizer and random state are refused in turn, as the limit grows."""
    config = workspace(**TRAIN, max_steps=8)
    before = {name: d for name, d in content(finished).items() if name.startswith(("checkpoint", "model", "config"))}
    capsys.readouterr()
    with files_of_at_most(at), pytest.raises(SystemExit) as ended:
        run(["train", str(config), "--resume", "true"])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert "StorageError: cannot write" in errors
    assert "Traceback" not in errors
    after = content(finished)
    assert {name: after.get(name) for name in before} == before
    assert not list(finished.glob("*.tmp"))
    assert {path.name for path in finished.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    qtarget("train", config, "--resume", "true")


def mounts() -> bool:
    """Whether a process may have file systems of its own."""
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=4k none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not mounts(), reason="needs the right to mount in a namespace of its own")
@pytest.mark.parametrize("options", ["size=12k", "ro"])
@pytest.mark.parametrize("verb", ["train", "score", "lens"])
def test_a_really_full_and_a_really_read_only_disk(workspace, tmp_path, verb, options):
    config, disk = workspace(**TRAIN), tmp_path / "disk"
    disk.mkdir()
    command = {
        "train": ["train", config, "--output_dir", disk / "out"],
        "score": ["score", config, "--output", disk / "cache", "--top-k", 20],
        "lens": ["lens", "dft", "--output", disk / "lens.html"],
    }[verb]
    script = f'mount -t tmpfs -o {options} none "{disk}" && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", sys.executable, "-m", "qtarget.cli.main", *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        timeout=300,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert ("Read-only file system" if options == "ro" else "cannot write") in done.stderr
