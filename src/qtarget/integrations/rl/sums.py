"""What a trust region did, exact over the tokens and ranks between two log lines."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from qtarget.core.shapes import Tensor
from qtarget.integrations.rl.batch import Samples
from qtarget.integrations.shared.step import TargetOutput

RARE, LIKELY = 0.1, 0.9
"""Probabilities under the sampler that tell rare and likely tokens apart."""
GROUPS = ("positive", "negative", "rare", "likely")
PAIRS = ("divergence/kl_k3", "divergence/mismatch_kl", "divergence/staleness_kl")


class PolicySums:
    """Sums over trained tokens since the last log line.

    Reported, over tokens with an anchor's log-prob: ``ratio/mean``, ``ratio/max``, ``ratio/ess`` (``(sum r)^2 / (n sum r^2)``),
    ``divergence/tv_mean`` and ``tv_max`` (``|pi - mu|``), ``divergence/kl_k3`` (nats; sampled, never negative). Over tokens whose
    advantage is not 0: ``region/weight`` (mean ``w``), ``region/blocked`` (``w = 0``), also among positive and negative
    advantages and rare and likely tokens, ``region/corrective`` (``w < 0``), ``region/pull_on_blocked`` (share of
    ``|A| (1 - pi)`` that is blocked). ``divergence/mismatch_kl`` (sampler to old) and ``staleness_kl`` (old to live) where both
    are known; ``entropy``, ``rollout/unscored_tokens``; ``kl/start`` (nats, the whole vocabulary) over the tokens at which the
    start was asked.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._maxima: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, output: TargetOutput, samples: Samples, advantages: Tensor) -> None:
        """Add one micro-batch.

        Args:
            advantages: as the loss read them, ``[batch, time]``, unshifted.
        """
        assert output.label_log_probs is not None and output.label_weights is not None and output.entropy is not None
        trained = (samples.labels != -100)[:, 1:]
        live, a, entropy = (v[trained].double() for v in (output.label_log_probs, output.label_weights, output.entropy))
        given = advantages[:, 1:][trained].double()
        anchor = live if samples.anchor is None else samples.anchor[:, 1:][trained].double()
        self._total({"tokens": torch.ones_like(live), "entropy": entropy})
        self._total({"unscored": torch.tensor([float(samples.unscored)], dtype=torch.double, device=live.device)})
        self._ratios(live, anchor)
        self._region(live, anchor, a, given)
        if samples.sampler is not None and samples.old is not None:
            sampler, old = (v[:, 1:][trained].double() for v in (samples.sampler, samples.old))
            self._total({"divergence/mismatch_kl": k3(sampler, old), "divergence/staleness_kl": k3(old, live)})
            self._total({"both": torch.ones_like(live)})

    @torch.no_grad()
    def add_start(self, kl: Tensor, labels: Tensor) -> None:
        """Add what a micro-batch's tokens are from the start.

        Args:
            kl: nats, ``[batch, time - 1]``.
            labels: ``[batch, time]``, unshifted.
        """
        trained = (labels != -100)[:, 1:]
        self._total({"kl/start": kl[trained].double(), "from start": trained.double()})

    def _ratios(self, live: Tensor, anchor: Tensor) -> None:
        ratio = (live - anchor).clamp(-20, 20).exp()
        moved = (live.exp() - anchor.exp()).abs()
        self._total({"ratio": ratio, "ratio2": ratio**2, "tv": moved, "divergence/kl_k3": k3(anchor, live)})
        for name, value in (("ratio/max", ratio), ("divergence/tv_max", moved)):
            largest = value.max() if len(value) else value.new_zeros(())
            self._maxima[name] = torch.maximum(self._maxima.get(name, largest), largest)

    def _region(self, live: Tensor, anchor: Tensor, a: Tensor, given: Tensor) -> None:
        weighed = given != 0
        weight = a[weighed] / ((live - anchor).clamp(-20, 20).exp() * given)[weighed]
        blocked, pull = (weight == 0).double(), (given.abs() * (1 - live.exp()))[weighed]
        self._total(
            {
                "weighed": torch.ones_like(weight),
                "weight": weight,
                "blocked": blocked,
                "corrective": (weight < 0).double(),
                "pull": pull,
                "lost": pull * blocked,
            }
        )
        mu = anchor.exp()[weighed]
        for name, among in zip(GROUPS, (given[weighed] > 0, given[weighed] < 0, mu < RARE, mu > LIKELY), strict=True):
            self._total({f"of {name}": among.double(), f"blocked {name}": blocked * among})

    def _total(self, values: dict[str, Tensor]) -> None:
        # stays on the device: reading it at every step would wait for the device
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.sum()

    def flush(self, accelerator: Accelerator, ratios: bool) -> dict[str, float]:
        """The statistics over all ranks, and start again; empty when nothing was added.

        Args:
            ratios: whether there is a trust region to speak of.
        """
        if not self._sums:
            return {}
        # what one rank has, all have: every batch of a run has the same keys
        names = sorted(self._sums)
        total = accelerator.reduce(torch.stack([self._sums[name] for name in names]), reduction="sum")
        s = dict(zip(names, (float(v) for v in total), strict=True))  # pyright: ignore[reportGeneralTypeIssues]
        largest = {name: float(accelerator.gather(v.reshape(1)).max()) for name, v in sorted(self._maxima.items())}  # pyright: ignore[reportAttributeAccessIssue]
        self._sums, self._maxima = {}, {}
        out = {"rollout/unscored_tokens": s["unscored"]}
        if not (n := s["tokens"]):
            return out
        out["entropy"] = s["entropy"] / n
        if s.get("from start"):
            out["kl/start"] = s["kl/start"] / s["from start"]
        if not ratios:
            return out
        out |= {"ratio/mean": s["ratio"] / n, "ratio/ess": s["ratio"] ** 2 / (n * s["ratio2"]), **largest}
        out |= {"divergence/tv_mean": s["tv"] / n, "divergence/kl_k3": s["divergence/kl_k3"] / n}
        for name in PAIRS[1:]:
            if s.get("both"):
                out[name] = s[name] / s["both"]
        return out | _region_shares(s)


def _region_shares(s: dict[str, float]) -> dict[str, float]:
    if not (weighed := s["weighed"]):
        return {}
    out = {f"region/{name}": s[name] / weighed for name in ("weight", "blocked", "corrective")}
    out["region/pull_on_blocked"] = s["lost"] / s["pull"] if s["pull"] else 0.0
    for name in GROUPS:
        if s[f"of {name}"]:
            out[f"region/blocked_{name}"] = s[f"blocked {name}"] / s[f"of {name}"]
    return out


def k3(first: Tensor, second: Tensor) -> Tensor:
    """The k3 estimate of ``KL(first || second)`` at samples of ``first``: ``e^d - 1 - d``, ``d`` the log-ratio."""
    gap = (second - first).clamp(-20, 20)
    return torch.expm1(gap) - gap
