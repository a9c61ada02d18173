"""``python -m qtarget``, as launchers of several processes want it."""

from qtarget.cli.main import run

if __name__ == "__main__":
    run()
