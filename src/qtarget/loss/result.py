"""What every backend is asked for and what it reports, token by token."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from qtarget.core.coefficients import Differentiated
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.statistics import entropy_of, token_view
from qtarget.core.types import FrozenHead, Reference, Target, TokenView, WeightsScale


@dataclass(frozen=True)
class LossRequest:
    """Supervised tokens only, flat: masked ones are dropped before anything is computed.

    Attributes:
        target: the method.
        labels: ``[tokens]``.
        reference, teacher: frozen models at these tokens, where given.
        rollout, advantages: the policy that sampled these tokens, and how good they were, where they are samples.
        sequence_ids, label_weights: ``[tokens]``, for targets of sequence or batch scope.
        loss_weights: ``[tokens]`` factors on what each token teaches.
        weights_scale: what of a token they multiply.
        want_report: also fill a ``TokenReport``.
    """

    target: Target
    labels: Int[Tensor, " tokens"]
    reference: Reference | FrozenHead | None = None
    teacher: Reference | FrozenHead | None = None
    rollout: Reference | None = None
    advantages: Tensor | None = None
    sequence_ids: Tensor | None = None
    label_weights: Tensor | None = None
    loss_weights: Tensor | None = None
    weights_scale: WeightsScale = "all"
    want_report: bool = False

    @property
    def weighting(self) -> tuple[Tensor | None, WeightsScale]:
        """The weights and what they multiply, as ``Terms.total`` takes them."""
        return self.loss_weights, self.weights_scale

    def view(self, log_probs: Float[Tensor, "tokens vocab"]) -> TokenView:
        """What the target gets to see of these tokens' live log-softmax."""
        return token_view(
            log_probs,
            self.labels,
            self.target.needs,
            self.reference,
            self.teacher,
            self.sequence_ids,
            self.label_weights,
            self.advantages,
            self.rollout,
        )

    def rows(self, index: slice) -> LossRequest:
        """The same request for some of its tokens."""

        def cut(value):
            if isinstance(value, Reference | FrozenHead):
                return value.rows(index)
            return value[index] if isinstance(value, Tensor) else value

        return replace(self, **{f.name: cut(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class TokenReport:
    """Detached numbers of a loss call, one a token, shaped like the labels (zero where masked).

    Attributes:
        losses: the target's loss, nats.
        label_log_probs: live log-prob of the observed token, nats.
        entropy: of the live model, nats.
        correct: 1 where the label is more likely than every other token.
        label_weights: ``a``, the weight of the pull towards the observed token.
        residual_weights: ``b``, the weight of the pull towards the residual distribution.
    """

    losses: Tensor
    label_log_probs: Tensor
    entropy: Tensor
    correct: Tensor
    label_weights: Tensor
    residual_weights: Tensor

    def map(self, function) -> TokenReport:
        """Apply ``function`` to every field."""
        return TokenReport(**{f.name: function(getattr(self, f.name)) for f in fields(self)})

    @staticmethod
    def concatenate(parts: list[TokenReport]) -> TokenReport:
        """Join the reports of consecutive chunks."""
        return TokenReport(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TokenReport)})


@torch.no_grad()
def report(
    logits: Float[Tensor, "tokens vocab"],
    log_probs: Float[Tensor, "tokens vocab"],
    view: TokenView,
    request: LossRequest,
    found: Differentiated,
) -> TokenReport:
    """The report of one run of tokens whose logits, and their log-softmax, are at hand."""
    label, residual = found.pulls(*request.weighting)
    entropy = entropy_of(log_probs) if view.entropy is None else view.entropy
    return TokenReport(
        losses=found.terms.total(*request.weighting),
        label_log_probs=view.label_log_probs.detach(),
        entropy=entropy.detach(),
        # only the label itself is as large: a tie is not correct
        correct=((logits >= logits.gather(-1, request.labels[:, None])).sum(-1) == 1).to(entropy.dtype),
        label_weights=label,
        residual_weights=residual,
    )
