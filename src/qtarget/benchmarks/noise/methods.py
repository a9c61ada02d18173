"""What `bench noise` compares: every target, and what people do instead of choosing one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qtarget.core.errors import ConfigError
from qtarget.core.types import WITNESS_FIELDS, Target
from qtarget.registry import get_target

Rows = Literal["noisy", "marked", "marked rows", "filtered", "crossfit", "witness", "witness share", "witness weights"]
Selects = Literal["tail", "peer"]


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: in the table.
        target: the registered target that is trained.
        setting: the one hyper-parameter that is tuned beside the learning rate, or none.
        grid: its values, the default first.
        rows: ``noisy`` as they are; ``marked``: noisy, with the marked tokens left out of the loss (an oracle that is
            told where the noise is); ``filtered``: noisy rows whose mean base surprise is among the lowest ``setting``;
            ``crossfit``: those that a mixture of two puts into the likelier part by their mean NLL under the cross-fit;
            ``marked rows``: those without a mark (an oracle); ``witness``: those that the filter keeps by `surprise`, or by
            `crossfit` where that cannot tell;
            ``witness share``: so many as ``setting`` says, by the rule `crossfit`; ``witness weights``: all of them, each
            weighed by P(right) of the filter that ``witness`` asks.
        selects: what drops a share ``setting`` of each batch as it comes (``qtarget.benchmarks.noise.selection``).
        stops_early: keeps the best of five checkpoints on the noisy validation rows.
    """

    name: str
    target: str = "sft"
    setting: str | None = None
    grid: tuple[float, ...] = (0.0,)
    rows: Rows = "noisy"
    stops_early: bool = False
    selects: Selects | None = None

    @property
    def asks_crossfit(self) -> bool:
        """Whether copies are trained before it."""
        return self.rows in ("crossfit", "witness", "witness share", "witness weights") or bool(
            get_target(self.target).needs.reference & set(WITNESS_FIELDS)
        )

    def build(self, value: float) -> Target:
        """The target with the tuned hyper-parameter."""
        if self.setting is None or self.rows in ("filtered", "witness share") or self.selects:
            return get_target(self.target)
        return get_target(self.target, **{self.setting: value})


def _target(name: str, setting: str | None = None, *grid: float) -> Method:
    return Method(name, name, setting, grid or (0.0,))


PRACTICE = (
    Method("sft"),
    Method("sft, early stopping", stops_early=True),
    Method("sft, filtered rows", setting="share of rows kept", grid=(0.7, 0.5, 0.9), rows="filtered"),
    Method("sft, marks left out", rows="marked"),
    Method("sft, marked rows left out", rows="marked rows"),
    Method("sft, tail dropped", setting="share of a batch dropped", grid=(0.25, 0.1, 0.5), selects="tail"),
    Method("sft, co-teaching", setting="share of a batch dropped", grid=(0.25, 0.1, 0.5), selects="peer"),
)
"""Plain SFT, what is done about noise without a target, and an oracle that nobody has (the other, SFT on the rows before
the noise, is SFT at rate 0)."""

CROSSFIT = (
    _target("crossfit_consensus"),
    Method("sft, rows by cross-fit", rows="crossfit"),
    Method("sft, rows by witness", rows="witness"),
    Method("sft, share by witness", setting="share of rows kept", grid=(0.7, 0.5, 0.9), rows="witness share"),
    Method("crossfit_consensus, rows by witness", "crossfit_consensus", rows="witness"),
    Method("sft, rows weighed by witness", rows="witness weights"),
    Method("crossfit_consensus, rows weighed by witness", "crossfit_consensus", rows="witness weights"),
)
"""What two fine-tunings more buy: copies of the base, trained at the rate of the run on one half of the rows each, judge the
other half. Caution is not tuned: it follows from the noise that the copies find."""

CHOSEN = (
    _target("consensus", "caution", 1.0, 3.0, 0.03),
    _target("target_sft", "eta", 0.3, 0.1, 0.6),
    _target("asft", "kl_weight", 0.05, 0.2, 1.0),
    _target("sft_kl", "kl_weight", 0.3, 0.1, 1.0),
    _target("dft"),
    _target("p_power", "alpha", 0.5, 0.25, 0.75),
    _target("prior_surprise"),
)
"""Targets that stand on the whole map."""

OTHERS = (
    _target("label_smoothing", "smoothing", 0.1, 0.3, 0.6),
    _target("inverse_likelihood", "power", 0.5, 0.25, 1.0),
    _target("profit", "threshold", 0.1, 0.03, 0.3),
    _target("eaft", "alpha", 1.0, 0.5, 2.0),
    _target("talr", "min_weight", 0.01, 0.1, 0.3),
    _target("iw_sft", "temperature", 1.0, 0.5, 0.25),
    _target("rho1", "keep_fraction", 0.6, 0.8, 0.4),
    _target("token_cleaning", "keep_fraction", 0.6, 0.8, 0.4),
    _target("idft", "beta", 1.0, 0.5, 2.0),
    _target("psft", "clip_high", 0.28, 1.0, 3.0),
    _target("gem", "temperature", 0.7, 0.5, 0.9),
    _target("gift", "beta", 20.0, 10.0, 5.0),
    _target("hybrid_distillation", "teacher_weight", 0.5, 0.2, 0.8),
)
"""Targets compared at two points of the map only: see ``NoiseConfig.screen``."""

METHODS = {method.name: method for method in (*PRACTICE, *CHOSEN, *CROSSFIT, *OTHERS)}


def methods(names: tuple[str, ...]) -> tuple[Method, ...]:
    """By name.

    Raises:
        ConfigError: a name is unknown; lists those that are known.
    """
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is unknown; known: {'; '.join(METHODS)}")
    return tuple(METHODS[name] for name in names)
