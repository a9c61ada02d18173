"""Who holds a folder: the living keep it, the dead lose it, on this machine and elsewhere."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest

from qtarget.core.errors import ConfigError
from qtarget.storage import locks
from qtarget.storage.locks import LOCK, Owner, began, locked, locked_file, read_owner


@pytest.fixture
def mine(tmp_path) -> Owner:
    """What this process writes into a lock."""
    with locked(tmp_path):
        owner = read_owner(tmp_path / LOCK)
    assert owner is not None
    assert owner.pid == os.getpid()
    return owner


def leave(folder, owner: Owner, age: float = 0) -> None:
    path = folder / LOCK
    path.write_text(json.dumps(asdict(owner)))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_lock_is_gone_afterwards_also_after_an_error(tmp_path):
    def fail():
        with locked(tmp_path):
            raise KeyError((tmp_path / LOCK).exists())

    with pytest.raises(KeyError, match="True"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_another_thread_is_refused_and_the_same_one_may_ask_again(tmp_path):
    said = []

    def other():
        try:
            with locked(tmp_path, again=True):
                said.append("in")
        except ConfigError as error:
            said.append(str(error))

    with locked(tmp_path), locked(tmp_path, again=True):
        with pytest.raises(ConfigError, match="another process is writing"), locked(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert f"process {os.getpid()} on " in said[0]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_gone_and_a_number_given_out_again(tmp_path, mine):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for dead in (replace(mine, pid=gone.pid, began="1"), replace(mine, pid=os.getppid(), began="1")):
        leave(tmp_path, dead)
        with locked(tmp_path):
            pass
    alive = replace(mine, pid=os.getppid(), began=began(os.getppid()))
    leave(tmp_path, alive)
    with pytest.raises(ConfigError, match=f"process {alive.pid} on {alive.host}"), locked(tmp_path):
        pass
    assert read_owner(tmp_path / LOCK) == alive


def test_elsewhere_the_heartbeat_decides(tmp_path, mine, monkeypatch):
    monkeypatch.setattr(locks, "SILENCE", 1.0)
    far = replace(mine, place="another machine", host="far", pid=1)
    leave(tmp_path, far, age=100)
    with locked(tmp_path):  # silent for long: at once
        pass
    leave(tmp_path, far)
    begin = time.monotonic()
    with locked(tmp_path):  # killed just now
        assert 0.8 < time.monotonic() - begin < 20
    leave(tmp_path, far)
    stop = threading.Event()
    beat = threading.Thread(target=lambda: [os.utime(tmp_path / LOCK) for _ in iter(lambda: stop.wait(0.1), True)])
    beat.start()
    try:
        with pytest.raises(ConfigError, match="process 1 on far"), locked(tmp_path):
            pass
    finally:
        stop.set()
        beat.join()
    assert read_owner(tmp_path / LOCK) == far


def test_the_holder_gives_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with locked(tmp_path):
        os.utime(tmp_path / LOCK, (1, 1))
        end = time.monotonic() + 20
        while (tmp_path / LOCK).stat().st_mtime == 1:
            assert time.monotonic() < end
            time.sleep(0.01)


def test_an_empty_lock_of_an_earlier_version_is_no_hindrance(tmp_path):
    (tmp_path / LOCK).touch()
    os.utime(tmp_path / LOCK, (1, 1))
    with locked(tmp_path):
        assert read_owner(tmp_path / LOCK) is not None


def test_of_many_that_find_a_dead_owner_one_gets_in(tmp_path, mine):
    leave(tmp_path, replace(mine, pid=2**22 - 1, began="1"))
    script = (
        "import sys, time\nfrom qtarget.core.errors import ConfigError\nfrom qtarget.storage.locks import locked\n"
        "try:\n    with locked(sys.argv[1]):\n        print('in', flush=True); time.sleep(3)\n"
        "except ConfigError:\n    print('refused')"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = sorted(process.communicate(timeout=120)[0].strip() for process in processes)
    assert said[0] == "in"
    assert set(said[1:]) <= {"refused", "in"}  # one that starts after the first is done may come in
    assert "refused" in said


def test_a_file_is_held_alone_and_others_beside_it_are_free(tmp_path):
    """Another process is refused by number and machine; a second file in the folder is nobody's affair."""
    code = "import sys; from qtarget.storage.locks import locked_file\nwith locked_file(sys.argv[1]): pass"
    with locked_file(tmp_path / "a.json"), locked_file(tmp_path / "b.json"):
        done = [
            subprocess.run(
                [sys.executable, "-c", code, str(tmp_path / name)], capture_output=True, text=True, check=False
            )
            for name in ("a.json", "c.json")
        ]
    assert f"is writing {tmp_path / 'a.json'}: process {os.getpid()} on {platform.node()}" in done[0].stderr
    assert done[1].returncode == 0, done[1].stderr
    assert not list(tmp_path.iterdir())
