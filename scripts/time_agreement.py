"""Time and memory of what `consensus` and the guard count, by the number of rows: a line each, and a JSON of all.

    python scripts/time_agreement.py --rows 10000 --rows 100000 --output benchmarks/results/agreement_size.json

Rows of 200 tokens, all but the first trained, drawn by Zipf's law (exponent 1.3) from 50,000 ids: longer contexts hardly
repeat, which is the hard case. Each size runs in a process of its own; its peak memory holds the interpreter and the rows.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

from qtarget.benchmarks.machine import machine_facts, versions
from qtarget.data.agreement import contexts_of, counted_flat
from qtarget.data.agreement.ngrams import FlatTokens
from qtarget.storage.files import write_json

LENGTH, VOCABULARY, EXPONENT, AT_ONCE = 200, 50_000, 1.3, 10_000


def rows_of(count: int) -> FlatTokens:
    """Synthetic rows."""
    random = np.random.default_rng(0)
    ids = np.empty(count * LENGTH, dtype=np.int32)
    for first in range(0, count, AT_ONCE):
        part = ids[first * LENGTH : (first + AT_ONCE) * LENGTH]
        part[:] = np.minimum(random.zipf(EXPONENT, len(part)), VOCABULARY - 1)
    offsets, mask = np.arange(count + 1) * LENGTH, np.ones(len(ids), dtype=bool)
    mask[offsets[:-1]] = False
    return FlatTokens(ids, mask, offsets)


class OwnMemory:
    """Largest memory that is the process's own, GiB, looked at ten times a second: without the pages of scratch files, which
    the system takes back when it needs them."""

    def __init__(self) -> None:
        self.peak = 0.0
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            said = next(
                line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
            )
            self.peak = max(self.peak, int(said.split()[1]) / 2**20)
            time.sleep(0.1)


def measured(count: int) -> dict[str, float]:
    """One size, in this process."""
    flat = rows_of(count)
    known = np.full(len(flat.rows), -1.0, dtype=np.float32)
    watch = OwnMemory()
    done, wall, cpu = [], time.perf_counter(), time.process_time()
    found = counted_flat(flat, known, frozenset({"agreement", "conflict", "reliability"}), on_done=done.append)
    return {
        "rows": count, "tokens": len(flat.ids), "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1), "contexts": sum(done), "of_at_most": contexts_of(flat),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "peak_own_gib": round(watch.peak, 2),
        "mean_agreement": round(float(found["agreement"].mean()), 6),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, action="append", required=True)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    if options.output is None:
        print(json.dumps(measured(options.rows[0])))
        return
    sizes = []
    for count in options.rows:
        command = [sys.executable, __file__, "--rows", str(count)]
        sizes.append(
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
        )
        print(sizes[-1], flush=True)
        write_json(options.output, {"sizes": sizes, "machine": machine_facts(), "versions": versions()})


if __name__ == "__main__":
    main()
