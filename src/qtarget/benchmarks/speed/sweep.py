"""Time against the number of tokens and memory against tokens and vocabulary, saved after every point."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qtarget.benchmarks.machine import machine
from qtarget.benchmarks.speed.losses import SpeedConfig, run_speed
from qtarget.benchmarks.speed.memory import MEMORY, NAIVE_LIMIT, measured_peak, naive_bytes
from qtarget.core.errors import ConfigError


@dataclass(frozen=True)
class SweepConfig:
    """Which points.

    Attributes:
        shapes: pairs of vocabulary and width.
        time_tokens: numbers of tokens timed at each shape; empty for none.
        memory_tokens: numbers of tokens whose memory is measured at each shape; empty for none.
        vocabs: vocabularies whose memory is measured with ``vocab_tokens`` tokens and the first shape's width.
        vocab_tokens: see there.
        losses: whose memory is measured.
        dtype, device, rounds, top_k, seed: as in ``SpeedConfig``.
    """

    shapes: tuple[tuple[int, int], ...] = ((49_152, 576), (151_936, 896))
    time_tokens: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    memory_tokens: tuple[int, ...] = (512, 2048, 8192, 65_536)
    vocabs: tuple[int, ...] = (8192, 16_384, 32_768, 65_536, 131_072)
    vocab_tokens: int = 2048
    losses: tuple[str, ...] = MEMORY
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 5
    top_k: int = 64
    seed: int = 0

    def at(self, tokens: int, vocab: int, width: int) -> SpeedConfig:
        """One point."""
        return SpeedConfig(
            tokens, width, vocab, self.dtype, self.device, self.rounds, self.top_k, "few", peers=False, seed=self.seed
        )

    def time_points(self) -> list[SpeedConfig]:
        """Where time is measured."""
        return [self.at(n, *shape) for shape in self.shapes for n in self.time_tokens]

    def memory_points(self) -> list[tuple[str, SpeedConfig]]:
        """Where memory is measured, small ones first."""
        shapes = [(n, *shape) for shape in self.shapes for n in self.memory_tokens]
        shapes += [(self.vocab_tokens, vocab, self.shapes[0][1]) for vocab in self.vocabs]
        points = [self.at(*shape) for shape in sorted(set(shapes), key=lambda s: s[0] * s[1] * s[2])]
        return [(loss, point) for point in points for loss in self.losses]


def previous(path: Path, config: SweepConfig) -> dict[str, list[dict[str, Any]]]:
    """The points of an earlier run on this machine.

    Raises:
        ConfigError: they were measured elsewhere, or otherwise.
    """
    if not path.exists() or not path.stat().st_size:
        return {"time": [], "memory": []}
    found = json.loads(path.read_text())
    same = ("dtype", "device", "rounds", "top_k", "seed")
    now = {**machine(config.device), **{name: getattr(config, name) for name in same}}
    then = {**found["machine"], **{name: found["config"][name] for name in same}}
    differing = [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]
    if differing:
        raise ConfigError(
            f"--resume {path}: {'; '.join(differing)}; points cannot be compared: choose another --output"
        )
    return {"time": found["time"], "memory": found["memory"]}


def shape_of(config: SpeedConfig) -> dict[str, int]:
    """What tells one point from another."""
    return {"tokens": config.tokens, "vocab": config.vocab, "width": config.width}


def holds(points: list[dict[str, Any]], wanted: dict[str, Any]) -> bool:
    """Whether a point is there already."""
    return any(all(point[key] == value for key, value in wanted.items()) for point in points)


def run_sweep(
    config: SweepConfig,
    done: dict[str, list[dict[str, Any]]],
    say: Callable[[str], None],
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measure every point that is not ``done``; ``save`` gets all results so far after each.

    Returns:
        ``config``, ``machine``, ``time`` (points with the ``rows`` of ``run_speed``) and ``memory`` (points with ``loss``
        and either ``beyond_inputs`` and ``gradients`` in MB, or ``computed``: the MB that naive cross entropy would hold,
        where that is too much to run).
    """
    results: dict[str, Any] = {"config": asdict(config), "machine": machine(config.device), **done}
    for loss, point in config.memory_points():
        here = {"loss": loss, **shape_of(point)}
        if holds(results["memory"], here):
            continue
        if loss == "naive" and naive_bytes(point) > NAIVE_LIMIT:
            numbers = {"computed": naive_bytes(point) / 1e6}
            say(f"naive, N={point.tokens} V={point.vocab}: not run, needs about {numbers['computed'] / 1e3:.0f} GB")
        else:
            numbers = measured_peak(loss, point)
            beyond = numbers["beyond_inputs"] - numbers["gradients"]
            say(f"{loss}, N={point.tokens} V={point.vocab}: {beyond:.0f} MB beyond inputs and gradients")
        results["memory"].append({**here, **numbers})
        save(results)
    for point in config.time_points():
        if holds(results["time"], shape_of(point)):
            continue
        say(f"timing N={point.tokens} V={point.vocab}")
        results["time"].append({**shape_of(point), "rows": run_speed(point)["rows"]})
        save(results)
    return results
