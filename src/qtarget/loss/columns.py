"""A few columns by hand, the rest by one number: the algebra between vocabulary-sized sums and gradient.

A token's *special columns* are its label and the ids listed by a frozen model's top k. They are read, set to minus
infinity, and everything else of the vocabulary enters through a handful of sums (``RestSums``): so the mass outside
the ids is summed and never ``1 - sum``, and nothing cancels. From the target's coefficients follow the gradient at
every special column, and for the rest one row formula (``RestGradient``). All tensors here are ``[tokens, columns]``.

Log-probs are ``(z - max) - log sum exp(z - max)``: exact for logits of any size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qtarget.core.outcomes import ABSENT, frozen_outcomes, listed_once
from qtarget.core.shapes import Bool, Float, Int, Tensor
from qtarget.core.types import Outcomes, Reference, TokenView


@dataclass(frozen=True)
class RestSums:
    """Sums over the columns that were not set aside; ``x = z - maximum``.

    Attributes:
        maximum: ``[tokens]`` largest logit of the rest, ``-1e30`` where nothing is left.
        exp: ``[tokens]`` ``sum exp(x)``.
        exp_x: ``[tokens]`` ``sum exp(x) x`` (entropy), if asked for.
        plain: ``[tokens]`` ``sum z`` over *all* columns (uniform residual), if asked for.
    """

    maximum: Float[Tensor, " tokens"]
    exp: Float[Tensor, " tokens"]
    exp_x: Tensor | None = None
    plain: Tensor | None = None

    def rows(self, index: slice) -> RestSums:
        """The same sums for some of the tokens."""
        return RestSums(*(None if v is None else v[index] for v in (self.maximum, self.exp, self.exp_x, self.plain)))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True)
class RestGradient:
    """Gradient by the logits of the rest: ``exp(z - shift) (factor + slope (z - shift)) + level``."""

    shift: Float[Tensor, " tokens"]
    factor: Float[Tensor, " tokens"]
    slope: Tensor | None = None
    level: Tensor | None = None

    def scaled(self, scale: float) -> RestGradient:
        """The gradient by what is multiplied by ``scale`` to give the logits."""
        if scale == 1.0:
            return self
        slope, level = (None if v is None else v * scale for v in (self.slope, self.level))
        return RestGradient(self.shift, self.factor * scale, slope, level)

    def moved(self, shift: Float[Tensor, " tokens"]) -> RestGradient:
        """The same with another shift: ``exp(z - shift)`` at hand may be one process's, the formula all processes'."""
        if shift is self.shift:
            return self
        # exp(z - old) = exp(z - new) exp(by), and z - old = (z - new) + by
        by = shift - self.shift
        if self.slope is None:
            return RestGradient(shift, self.factor * by.exp(), None, self.level)
        factor = (self.factor + self.slope * by) * by.exp()
        return RestGradient(shift, factor, self.slope * by.exp(), self.level)


@dataclass(frozen=True)
class Listed:
    """One frozen model's listed ids among the special columns.

    Attributes:
        columns: which of the special columns they are.
        valid: ``[tokens, k]`` false for unused slots and for an id that an earlier slot names.
        member: ``[tokens, columns]`` whether a column's id is listed (meaningful at first occurrences).
        frozen: ``[tokens, k + 1]`` the frozen log-probs of the ids and the tail.
    """

    columns: slice
    valid: Bool[Tensor, "tokens k"]
    member: Bool[Tensor, "tokens columns"]
    frozen: Float[Tensor, "tokens k_1"]


@dataclass(frozen=True)
class Columns:
    """The special columns of a run of tokens, the label first.

    Attributes:
        ids: ``[tokens, columns]``; an unused slot repeats the label.
        owner: ``[tokens, columns]`` the first column with the same id.
        first: ``[tokens, columns]`` whether a column is its own owner.
        listed: by role (``on_reference``, ``on_teacher``, ``on_rollout``).
    """

    ids: Int[Tensor, "tokens columns"]
    owner: Int[Tensor, "tokens columns"]
    first: Bool[Tensor, "tokens columns"]
    listed: dict[str, Listed]

    @classmethod
    def of(cls, labels: Int[Tensor, " tokens"], frozen: dict[str, Reference | None], dtype: torch.dtype) -> Columns:
        """The label, and the top k of every other model in ``frozen`` (``on_reference``, ``on_teacher``, ``on_rollout``)."""
        slots = [labels[:, None]]
        spans: dict[str, slice] = {}
        for role, model in frozen.items():
            if model is not None and model.topk_ids is not None:
                start = sum(s.shape[-1] for s in slots)
                slots.append(torch.where(model.topk_ids < 0, labels[:, None], model.topk_ids))
                spans[role] = slice(start, start + slots[-1].shape[-1])
        ids = torch.cat(slots, dim=-1)
        owner = first_occurrence(ids) if len(slots) > 1 else torch.zeros_like(ids)
        first = owner == torch.arange(ids.shape[-1], device=ids.device)
        listed = {}
        for role, span in spans.items():
            model = frozen[role]
            assert model is not None and model.topk_ids is not None
            valid = listed_once(model.topk_ids)
            hits = torch.zeros_like(ids).scatter_add_(-1, owner[:, span], valid.long())
            like = torch.empty((), dtype=dtype, device=ids.device)
            listed[role] = Listed(span, valid, hits > 0, frozen_outcomes(model, valid, like))
        return cls(ids, owner, first, listed)

    def rest_only(self, values: Float[Tensor, "tokens columns"], fill: float) -> Float[Tensor, "tokens columns"]:
        """``values`` at first occurrences, ``fill`` elsewhere: each id counts once."""
        return values.masked_fill(~self.first, fill)


def first_occurrence(ids: Int[Tensor, "tokens columns"]) -> Int[Tensor, "tokens columns"]:
    """For each column, the first column of its row with the same id."""
    ascending, order = ids.sort(dim=-1, stable=True)
    position = torch.arange(ids.shape[-1], device=ids.device).expand_as(ids)
    starts = torch.ones_like(ids, dtype=torch.bool)
    starts[:, 1:] = ascending[:, 1:] != ascending[:, :-1]
    start = torch.where(starts, position, 0).cummax(dim=-1).values
    return torch.empty_like(ids).scatter_(-1, order, order.gather(-1, start))


@dataclass(frozen=True)
class ChunkStatistics:
    """What is known of a run of tokens once its logits have been read.

    Attributes:
        columns: the special columns, and ``logits`` ``[tokens, columns]`` there.
        rest: sums over everything else.
        maximum, sum: ``[tokens]``; ``p = exp(z - maximum) / sum``.
        tails: by role, ``log`` of the mass outside the listed ids, as ``log p`` (minus infinity where there is none).
    """

    columns: Columns
    logits: Float[Tensor, "tokens columns"]
    rest: RestSums
    maximum: Float[Tensor, " tokens"]
    sum: Float[Tensor, " tokens"]
    tails: dict[str, Tensor]

    @classmethod
    def of(cls, columns: Columns, logits: Float[Tensor, "tokens columns"], rest: RestSums) -> ChunkStatistics:
        """Join the special columns and the rest."""
        maximum = torch.maximum(rest.maximum, logits.amax(-1))
        x = logits - maximum[:, None]
        rest_log_sum = (rest.maximum - maximum) + rest.exp.log()

        def log_mass(among: Bool[Tensor, "tokens columns"]) -> Float[Tensor, " tokens"]:
            joined = torch.cat([x.masked_fill(~among, -torch.inf), rest_log_sum[:, None]], dim=-1)
            return joined.logsumexp(-1)

        # at least 1, as the maximum is one of its terms; tails are summed as logarithms, as they may underflow
        total = columns.rest_only(x.exp(), 0.0).sum(-1) + (rest.maximum - maximum).exp() * rest.exp
        tails = {role: log_mass(columns.first & ~at.member) - total.log() for role, at in columns.listed.items()}
        return cls(columns, logits, rest, maximum, total, tails)

    @property
    def log_sum(self) -> Float[Tensor, " tokens"]:
        """``log p = (z - maximum) - log_sum``."""
        return self.sum.log()

    @property
    def log_probs(self) -> Float[Tensor, "tokens columns"]:
        """Live log-probs at the special columns."""
        return (self.logits - self.maximum[:, None]) - self.log_sum[:, None]

    @property
    def rest_scale(self) -> Float[Tensor, " tokens"]:
        """``exp(maximum of the rest - log normaliser)``: turns ``exp(z - maximum of the rest)`` into ``p``."""
        return (self.rest.maximum - self.maximum).exp() / self.sum

    def label_log_probs(self) -> Float[Tensor, " tokens"]:
        """``log p_y``."""
        return self.log_probs[:, 0]

    def entropy(self) -> Float[Tensor, " tokens"]:
        """``-sum p log p`` in nats."""
        assert self.rest.exp_x is not None
        x = self.rest.maximum - self.maximum
        of_rest = (x - self.log_sum).exp() * (self.rest.exp_x + x * self.rest.exp)  # sum p (z - maximum)
        # a banned token has p = 0, and 0 times minus infinity is NaN
        log_probs = self.log_probs.masked_fill(self.logits == -torch.inf, 0.0)
        at_columns = self.columns.rest_only(self.log_probs.exp() * (log_probs + self.log_sum[:, None]), 0.0)
        return self.log_sum - of_rest - at_columns.sum(-1)

    def correct(self) -> Float[Tensor, " tokens"]:
        """1 where the label is more likely than every other token."""
        others = self.columns.rest_only(self.logits, -torch.inf)[:, 1:]
        best = torch.cat([others, self.rest.maximum[:, None]], dim=-1).amax(-1)
        return (self.logits[:, 0] > best).to(best.dtype)

    def mean_log_prob(self, vocab: int) -> Float[Tensor, " tokens"]:
        """Mean over the vocabulary of the live log-probs."""
        assert self.rest.plain is not None
        return self.rest.plain / vocab - self.maximum - self.log_sum

    def outcomes(self, role: str) -> Outcomes | None:
        """Live and frozen log-probs on the ids that the frozen model lists, and the tail."""
        at = self.columns.listed.get(role)
        if at is None:
            return None
        log_probs = self.log_probs[:, at.columns].masked_fill(~at.valid, ABSENT)
        tail = self.tails[role]
        tail = tail.masked_fill(tail == -torch.inf, ABSENT)
        return Outcomes(torch.cat([log_probs, tail[:, None]], dim=-1), at.frozen)

    def gradient(self, weights: dict[str, Tensor], vocab: int) -> tuple[Float[Tensor, "tokens columns"], RestGradient]:
        """Gradient by the logits at the special columns, and the formula for the rest.

        Args:
            weights: coefficient of each statistic (``coefficients.Differentiated.combined``).
            vocab: V.
        """
        log_probs, scale = self.log_probs, self.rest_scale
        probs = (self.logits - self.maximum[:, None]).exp() / self.sum[:, None]  # the logarithm would round it again
        on_p = torch.zeros_like(self.maximum)
        own = torch.zeros_like(self.logits)
        factor = torch.zeros_like(on_p)
        if (c := weights.get("label_log_probs")) is not None:
            own[:, 0] += c
            on_p -= c
        for role, at in self.columns.listed.items():
            if (c := weights.get(role)) is None:
                continue
            # the frozen model lists every live token: there is no tail to differentiate
            empty = self.tails[role] == -torch.inf
            listed, tail = c[:, :-1].masked_fill(~at.valid, 0.0), c[:, -1].masked_fill(empty, 0.0)
            own.scatter_add_(-1, self.columns.owner[:, at.columns], listed)
            on_p -= listed.sum(-1) + tail
            log_tail = self.tails[role].masked_fill(empty, 0.0) + self.log_sum
            # p / s in one exponential: both may underflow where their ratio does not
            factor += tail * ((self.rest.maximum - self.maximum) - log_tail).exp()
            outside = (log_probs - (log_tail - self.log_sum)[:, None]).exp().masked_fill(at.member, 0.0)
            own += tail[:, None] * outside
        slope = level = None
        if (c := weights.get("entropy")) is not None:
            entropy = self.entropy()
            finite = log_probs.masked_fill(log_probs == -torch.inf, 0.0)
            own -= c[:, None] * probs * (finite + entropy[:, None])
            slope = -c * scale
            factor += slope * ((self.rest.maximum - self.maximum) - self.log_sum + entropy)
        if (c := weights.get("mean_log_prob")) is not None:
            level = c / vocab
            on_p -= c
            own += level[:, None]
        value = own.addcmul_(probs, on_p[:, None])
        return value.gather(-1, self.columns.owner), RestGradient(
            self.rest.maximum, factor + on_p * scale, slope, level
        )

    def view(
        self, vocab: int, top_logits: Tensor | None, frozen: dict[str, Reference | None], needs, **fixed
    ) -> TokenView:
        """What a target gets to see."""
        top = None if top_logits is None else (top_logits - self.maximum[:, None]) - self.log_sum[:, None]
        return TokenView(
            label_log_probs=self.label_log_probs(),
            vocab_size=vocab,
            entropy=self.entropy() if needs.entropy else None,
            mean_log_prob=self.mean_log_prob(vocab) if needs.mean_log_prob else None,
            top_log_probs=top,
            on_reference=self.outcomes("on_reference"),
            on_teacher=self.outcomes("on_teacher"),
            on_rollout=self.outcomes("on_rollout"),
            reference=frozen["on_reference"],
            teacher=frozen["on_teacher"],
            rollout=frozen["on_rollout"],
            **fixed,
        )
