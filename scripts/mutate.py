"""Which changes of the code would the tests notice? Mutants of four rooms, each against its room's tests.

A mutant is one small change: a comparison moved by one, ``+`` for ``-``, another number, ``and`` for ``or``, a condition turned
round, a statement left out. It is written into a copy of the tree, and the room's tests that reach its lines run with ``-x``, the
quickest first; who passes them all has survived. Which tests reach which lines is traced once. Processes are forked from one that
has imported torch and transformers already (and nothing of ours), so a mutant costs seconds::

    python scripts/mutate.py --sample 30 --seed 0        # 30 mutants a room, benchmarks/results/mutation.json
    python scripts/mutate.py --again                     # the survivors of that file against today's tests
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutation.json"
CONFORMANCE = [f"tests/conformance/test_{name}.py" for name in ("infinite", "targets", "sparse", "weights")]
CACHE = [f"tests/scoring/cache/test_{name}.py" for name in ("schema", "cache", "edges", "sampling", "faults")]
SFT = ["tests/integrations/sft/test_edges.py", "tests/integrations/sft/data", "tests/integrations/sft"]
ROOMS: dict[str, tuple[str, list[str]]] = {
    "core": ("src/qtarget/core", ["src/qtarget/core", "tests/core", *CONFORMANCE, "tests/invariant"]),
    "loss": (
        "src/qtarget/loss",
        ["tests/loss/test_backends.py", "tests/loss/test_shapes.py", *CONFORMANCE, "tests/loss/test_triton.py"],
    ),
    "scoring/cache": ("src/qtarget/scoring/cache", ["src/qtarget/scoring/cache", *CACHE]),
    "integrations/sft": ("src/qtarget/integrations/sft", SFT),
}
USAGE_ERROR = 4
"""Of pytest: no test of such a name."""
CPU_SECONDS = 240
"""Of one mutant: whoever needs more loops, and counts as noticed."""

COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COMPUTED = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}


@dataclass(frozen=True)
class Mutant:
    """One change: ``before``, at a place of a module, becomes ``after``."""

    room: str
    module: str
    line: int
    column: int
    kind: str
    before: str
    after: str

    def apply(self, source: str) -> str:
        """The source with the change, if what stands at the place is still ``before``."""
        lines = source.splitlines(keepends=True)
        start = sum(len(text) for text in lines[: self.line - 1]) + self.column
        assert source.startswith(self.before, start), f"{self.module}:{self.line} has changed"
        return source[:start] + self.after + source[start + len(self.before) :]


def changed_nodes(node: ast.AST) -> list[tuple[str, str]]:
    """Kind and new text of every mutant of one expression."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARED:
        ops = [COMPARED[type(node.ops[0])](), *node.ops[1:]]
        return [("comparison", f"({ast.unparse(ast.Compare(node.left, ops, node.comparators))})")]
    if isinstance(node, ast.BinOp) and type(node.op) in COMPUTED:
        return [("arithmetic", f"({ast.unparse(ast.BinOp(node.left, COMPUTED[type(node.op)](), node.right))})")]
    if isinstance(node, ast.BoolOp):
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return [("boolean", f"({ast.unparse(ast.BoolOp(other, node.values))})")]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        return [("boolean", f"({ast.unparse(node.operand)})")]
    if isinstance(node, ast.IfExp):
        return [("boolean", f"({ast.unparse(ast.IfExp(ast.UnaryOp(ast.Not(), node.test), node.body, node.orelse))})")]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        return [("constant", str(not node.value))]
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return [("constant", repr(node.value + 1))]
    removable = isinstance(node, ast.AugAssign | ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    )
    return [("removal", "pass")] if removable else []


def walk(node: ast.AST):
    """All nodes whose change could matter: no annotations, docstrings, messages, assertions or decorators."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "msg") or isinstance(value, ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            skipped = (ast.Assert, ast.JoinedStr, ast.ImportFrom, ast.Import)
            if isinstance(child, ast.AST) and not isinstance(child, skipped):
                yield from [child] if isinstance(child, ast.Raise) else walk(child)


def mutants_of(room: str, module: str) -> list[Mutant]:
    """Every mutant of one module."""
    source = (ROOT / module).read_text(encoding="utf-8")
    found = []
    for node in walk(ast.parse(source)):
        for kind, after in changed_nodes(node):
            before = ast.get_source_segment(source, node)
            if before:
                place = (node.lineno, len(source.splitlines()[node.lineno - 1].encode()[: node.col_offset].decode()))
                found.append(Mutant(room, module, *place, kind, before, after))
    return found


def sampled(rooms: list[str], count: int, seed: int) -> tuple[list[Mutant], dict[str, int]]:
    """So many mutants of each room, and how many each has."""
    chosen, sizes = [], {}
    for room in rooms:
        modules = sorted((ROOT / ROOMS[room][0]).rglob("*.py"))
        every = [m for module in modules for m in mutants_of(room, str(module.relative_to(ROOT)))]
        sizes[room] = len(every)
        chosen += random.Random(f"{seed}:{room}").sample(every, min(count, len(every)))
    return chosen, sizes


def preload() -> None:
    """What takes long to import, and nothing of ours: a fork has it at once."""
    os.environ.setdefault("TRITON_INTERPRET", "1")  # as tests/conftest.py does, before Triton's first import
    for name in (
        "datasets",
        "hypothesis",
        "jaxtyping",
        "beartype",
        "peft",
        "pyarrow.parquet",
        "pytest",
        "torch",
        "transformers",
    ):
        __import__(name)
    import trl.trainer.sft_trainer  # noqa: F401


class Tracer:
    """A pytest plugin that notes which lines of ours each test runs, in this process, and how long it takes."""

    def __init__(self, sources: Path) -> None:
        self.sources, self.reached = str(sources), {}

    def pytest_runtest_protocol(self, item, nextitem):
        from _pytest.runner import runtestprotocol

        lines, begun = defaultdict(set), time.process_time()

        def line(frame, event, _):
            lines[frame.f_code.co_filename].add(frame.f_lineno)
            return line

        def call(frame, event, _):
            return line(frame, event, _) if frame.f_code.co_filename.startswith(self.sources) else None

        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        sys.settrace(call)
        try:
            runtestprotocol(item, nextitem=nextitem)
        finally:
            sys.settrace(None)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        found = {name.removeprefix(self.sources).lstrip("/"): sorted(at) for name, at in lines.items()}
        self.reached[item.nodeid] = {"seconds": time.process_time() - begun, "lines": found}
        return True


def run(tree: Path, tests: list[str], log: Path, traced: Path | None = None) -> tuple[int, float]:
    """Exit status of the tests in this tree, and their CPU time, in a forked process; with ``traced`` it notes what they reach."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            limit = CPU_SECONDS * (4 if traced else 1)
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            os.chdir(tree)
            sys.path[:0] = [str(tree), str(tree / "src")]
            os.environ["PYTHONPATH"] = f"{tree}/src:{tree}"
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            import pytest

            present = [test for test in tests if (tree / test.split("::")[0]).exists()]
            tracer = Tracer(tree)
            status = int(
                pytest.main(["-x", "-q", "-p", "no:cacheprovider", *present], plugins=[tracer] if traced else [])
            )
            if traced:
                traced.write_text(json.dumps(tracer.reached))
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)  # what tests left running
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return os.waitstatus_to_exitcode(status), spent


def trace(tree: Path, room: str, folder: Path) -> dict[str, dict]:
    """By test: CPU seconds, and the lines of ours that it reaches; read again where it was written before."""
    path = folder / f"{room.replace('/', '-')}.json"
    if not path.exists():
        status, seconds = run(tree, ROOMS[room][1], path.with_suffix(".log"), path)
        assert status == 0, f"the tests of {room} fail without a mutant; see {path.with_suffix('.log')}"
        print(f"{room}: {seconds:.0f} s of CPU without a mutant, traced", flush=True)
    return json.loads(path.read_text())


def tests_of(mutant: Mutant, source: str, reached: dict[str, dict]) -> list[str]:
    """The tests that reach a mutant's lines, or its module where it stands outside functions; the quickest first."""
    lines = set(range(mutant.line, mutant.line + mutant.before.count("\n") + 1))
    functions = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef))
    inside = any(f.body[0].lineno <= mutant.line <= (f.end_lineno or 0) for f in functions)

    def touches(found: dict) -> bool:
        here = found["lines"].get(mutant.module)
        return here is not None and (not inside or not lines.isdisjoint(here))

    return sorted((t for t, found in reached.items() if touches(found)), key=lambda t: reached[t]["seconds"])


def survives(mutant: Mutant, tree: Path, reached: dict[str, dict] | list[str]) -> tuple[bool, float]:
    """Whether the tests that reach the mutant (or the given ones) pass, and their CPU time."""
    path = tree / mutant.module
    source = path.read_text(encoding="utf-8")
    tests = reached if isinstance(reached, list) else tests_of(mutant, source, reached)
    if not tests:
        return True, 0.0
    path.write_text(mutant.apply(source), encoding="utf-8")
    try:
        status, seconds = run(tree, tests, tree / "mutant.log")
        if status == USAGE_ERROR:  # the mutant changed the names of tests
            status, seconds = run(tree, ROOMS[mutant.room][1], tree / "mutant.log")
        return status == 0, seconds
    finally:
        path.write_text(source, encoding="utf-8")


def copied() -> Path:
    """A copy of what the tests need."""
    tree = Path(tempfile.mkdtemp(prefix="mutants-")) / "tree"
    ignored = shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", ".venv", ".hypothesis")
    shutil.copytree(ROOT, tree, ignore=ignored)
    return tree


def table(found: list[dict], sizes: dict[str, int]) -> dict[str, dict[str, int]]:
    """By room: mutants there are, tried, noticed, survivors with and without a reason."""
    rooms = {}
    for room in dict.fromkeys(entry["room"] for entry in found):
        here = [entry for entry in found if entry["room"] == room]
        alive = [entry for entry in here if entry["survived"]]
        explained = sum(bool(entry.get("reason")) for entry in alive)
        rooms[room] = {
            "mutants": sizes[room],
            "tried": len(here),
            "noticed": len(here) - len(alive),
            "survived_with_reason": explained,
            "survived_without": len(alive) - explained,
        }
    return rooms


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rooms", nargs="*", default=list(ROOMS), choices=list(ROOMS))
    parser.add_argument("--sample", type=int, default=30, help="mutants a room")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=20, help="CPU time after which no further mutant is begun")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--again", action="store_true", help="run the output file's survivors again")
    parser.add_argument(
        "--traced", type=Path, help="folder that keeps what tests reach, for another run of the same tree"
    )
    parser.add_argument("--tests", nargs="*", help="with --again: these test files, whatever they reach")
    args = parser.parse_args()
    preload()
    tree, spent = copied(), 0.0
    folder = args.traced or tree.parent
    folder.mkdir(exist_ok=True)
    reached = {} if args.tests else {room: trace(tree, room, folder) for room in args.rooms}
    if args.again:
        saved = json.loads(args.output.read_text())
        found, sizes = saved["mutants_tried"], {room: row["mutants"] for room, row in saved["rooms"].items()}
        todo = [entry for entry in found if entry["survived"] and entry["room"] in args.rooms]
    else:
        mutants, sizes = sampled(args.rooms, args.sample, args.seed)
        random.Random(args.seed).shuffle(mutants)
        found, todo = [], [asdict(mutant) for mutant in mutants]
    for entry in todo:
        if spent > 60 * args.minutes:
            break
        begun = time.monotonic()
        mutant = Mutant(**{name: entry[name] for name in Mutant.__dataclass_fields__})
        entry["survived"], seconds = survives(mutant, tree, args.tests or reached[mutant.room])
        spent += seconds
        if not args.again:
            found.append(entry)
        word = "SURVIVED" if entry["survived"] else "noticed "
        where = f"{mutant.module.removeprefix('src/qtarget/')}:{mutant.line}"
        times = f"{seconds:5.1f} s CPU {time.monotonic() - begun:5.1f} s"
        print(f"{word} {times}  {where}  {mutant.before!r} -> {mutant.after!r}", flush=True)
        value = {
            "seed": args.seed, "sample_per_room": args.sample, "cpu_seconds": round(spent), "rooms": table(found, sizes),
            "kinds": dict(Counter(e["kind"] for e in found)), "mutants_tried": found,
        }  # fmt: skip
        if args.again:
            value |= {key: saved[key] for key in ("seed", "sample_per_room", "cpu_seconds", "kinds")}
        args.output.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(tree.parent)


if __name__ == "__main__":
    main()
