"""The nouns: what is known of a frozen model, what a target may look at, and what a target is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar, Literal, get_args

import torch

from qtarget.command import crossfit_command
from qtarget.core.errors import IncompatibleError, MissingStatisticError, ShapeError
from qtarget.core.products import weighted
from qtarget.core.shapes import Float, Int, Tensor

TailPolicy = Literal["bucket", "spread", "renormalize", "sampled"]
NO_TAIL = ("renormalize", "sampled")
"""Policies under which unlisted tokens have no mass at all."""
Scope = Literal["token", "sequence", "batch"]
WeightsScale = Literal["all", "label"]
"""What a token's loss weight multiplies: all that the token teaches, or its label term alone."""
COUNTED_FIELDS = ("agreement", "reliability", "conflict")
"""Fields of a ``Reference`` that are counted from the training rows (``qtarget.data.agreement``)."""
WITNESS_FIELDS = ("crossfit", "perplexity_ratio", "noise_tokens", "noise_rows")
"""Fields of a ``Reference`` that a cross-fitted cache tells together with the base's (``qtarget.data.crossfit.witness``)."""
DATA_FIELDS = (*COUNTED_FIELDS, *WITNESS_FIELDS)
"""Fields of a ``Reference`` that are known only when all rows are: none of them is of the frozen model alone."""


@dataclass(frozen=True)
class Reference:
    """What is known of a frozen model at each label, and of the data around it; every field but the policy may be absent.

    Attributes:
        label_log_probs: ``[tokens]``, nats; log-probability of the observed token.
        entropy: ``[tokens]``, nats; over the whole vocabulary.
        topk_ids: ``[tokens, k]``; token ids, ``-1`` marks an unused slot.
        topk_log_probs: ``[tokens, k]``, nats, at temperature 1.
        tail_log_mass: ``[tokens]``, nats; log of the probability outside ``topk_ids``.
        log_probs: ``[tokens, vocab]``, nats; the whole distribution, when memory allows.
        agreement: ``[tokens]`` in [0, 1); share of the other rows that say the same (``qtarget.data.agreement``).
        reliability: ``[tokens]`` in [0, 1]; how much of what the rows agree on the frozen model knew, less where they
            contradict it (``prior_reliability`` x (1 - ``conflict``)).
        conflict: ``[tokens]`` in [0, 1]; how far the rows contradict the frozen model (``prior_conflict``).
        crossfit: ``[tokens]`` in [0, 1]; probability of the label under a copy that has not seen the row.
        perplexity_ratio: ``[tokens]`` in [0, 1]; of the copies' perplexity to the frozen model's.
        noise_tokens, noise_rows: ``[tokens]`` in [0, 1]; estimated share of tokens that are noise, and of rows that hold some.
        tail_policy: what stands for the unlisted tokens. ``bucket``: one more outcome. ``spread``: the tail mass,
            uniform over the rest. ``renormalize``: nothing (listed tokens are scaled up to one). ``sampled``: nothing;
            listed tokens were drawn from the whole distribution, and their log-probs are log of count / draws, so only
            targets that are linear in the frozen distribution may use them.

    Leading dimensions follow the labels the reference is used with (``[batch, time]`` or flat).
    """

    label_log_probs: Tensor | None = None
    entropy: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_log_probs: Tensor | None = None
    tail_log_mass: Tensor | None = None
    log_probs: Tensor | None = None
    agreement: Tensor | None = None
    reliability: Tensor | None = None
    conflict: Tensor | None = None
    crossfit: Tensor | None = None
    perplexity_ratio: Tensor | None = None
    noise_tokens: Tensor | None = None
    noise_rows: Tensor | None = None
    tail_policy: TailPolicy = "bucket"

    def __post_init__(self) -> None:
        if self.tail_policy not in get_args(TailPolicy):
            raise IncompatibleError(
                f"tail_policy {self.tail_policy!r} is unknown; expected one of {', '.join(get_args(TailPolicy))}"
            )
        if (self.topk_ids is None) != (self.topk_log_probs is None):
            raise ShapeError("topk_ids and topk_log_probs go together; give both or neither")
        ids, log_probs = self.topk_ids, self.topk_log_probs
        if ids is not None and log_probs is not None and ids.shape != log_probs.shape:
            raise ShapeError(
                f"topk_ids has shape {tuple(ids.shape)}, topk_log_probs {tuple(log_probs.shape)}; they must be equal"
            )

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "... vocab"], labels: Int[Tensor, "..."]) -> Reference:
        """The whole distribution of a frozen model whose logits are at hand (masked labels get the log-prob 0)."""
        if labels.numel() and int(labels.max()) >= logits.shape[-1]:
            raise ShapeError(
                f"labels reach {int(labels.max())}, the vocabulary of the frozen logits ends at {logits.shape[-1] - 1}"
            )
        log_probs = logits.detach().log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        at_label = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
        return cls(label_log_probs=at_label.masked_fill(labels < 0, 0.0), log_probs=log_probs)

    @property
    def has_distribution(self) -> bool:
        """Whether more than single tokens is known: full log-probs, or top-k with its tail mass."""
        sparse = self.topk_ids is not None and (self.tail_log_mass is not None or self.tail_policy in NO_TAIL)
        return self.log_probs is not None or sparse

    def flatten(self, leading: tuple[int, ...]) -> Reference:
        """Merge the leading dimensions (those of the labels) into one ``tokens`` dimension.

        Raises:
            ShapeError: if a field does not start with ``leading``.
        """

        def flat(name: str, value: Tensor) -> Tensor:
            if tuple(value.shape[: len(leading)]) != tuple(leading):
                raise ShapeError(
                    f"reference.{name} has shape {tuple(value.shape)}, but the labels have {tuple(leading)}: "
                    "a reference is aligned with the labels row by row"
                )
            return value.reshape(-1, *value.shape[len(leading) :])

        return self.map_tensors(flat)

    def rows(self, index: Int[Tensor, " kept"] | slice) -> Reference:
        """The same reference for some of its (flat) tokens."""
        return self.map_tensors(lambda _, value: value[index])

    def map_tensors(self, function) -> Reference:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: function(name, value.detach()) for name, value in tensors.items()})

    def resolve(self, labels: Int[Tensor, " tokens"]) -> Reference:
        """Itself; the counterpart of ``FrozenHead.resolve``."""
        return self


@dataclass(frozen=True)
class FrozenHead:
    """A frozen model given by its hidden states and head; its logits exist one chunk at a time.

    Attributes:
        hidden: ``[tokens, width]`` last hidden states, aligned with the labels.
        lm_head_weight: ``[vocab, width]``.
        bias: ``[vocab]`` or absent.
        logit_scale: factor on the logits (Cohere, Granite); 1 for most models.
        logit_softcap: ``c`` of ``c tanh(logits / c)`` (Gemma 2), or absent.
    """

    hidden: Tensor
    lm_head_weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    has_distribution: ClassVar[bool] = True

    def flatten(self, leading: tuple[int, ...]) -> FrozenHead:
        """Merge the leading dimensions (those of the labels) into one ``tokens`` dimension."""
        if tuple(self.hidden.shape[:-1]) != tuple(leading):
            raise ShapeError(
                f"the frozen model's hidden states have shape {tuple(self.hidden.shape)}, but the labels have "
                f"{tuple(leading)}; expected {(*leading, 'width')}"
            )
        return replace(self, hidden=self.hidden.detach().reshape(-1, self.hidden.shape[-1]))

    def rows(self, index: Int[Tensor, " kept"] | slice) -> FrozenHead:
        """The same head for some of its (flat) tokens."""
        return replace(self, hidden=self.hidden[index])

    @torch.no_grad()
    def resolve(self, labels: Int[Tensor, " tokens"]) -> Reference:
        """Full log-probs of these tokens, and their entropy (call it on a chunk)."""
        logits = project(self.hidden, self.lm_head_weight, self.bias, self.logit_scale, self.logit_softcap, exact=True)
        log_probs = logits.log_softmax(-1)
        # ``statistics.entropy_of``, which this module cannot import: it is imported there
        entropy = -(log_probs.exp() * log_probs.masked_fill(log_probs == -torch.inf, 0.0)).sum(-1)
        at_label = log_probs.gather(-1, labels[:, None])[:, 0]
        return Reference(label_log_probs=at_label, entropy=entropy, log_probs=log_probs)


def project(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    bias: Float[Tensor, " vocab"] | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    *,
    exact: bool = False,
) -> Float[Tensor, "tokens vocab"]:
    """Logits ``softcap(scale (h W^T + b))``, at least float32.

    ``exact=True`` multiplies in float32 too: near its teacher a model's soft-target gradient is a difference of close
    numbers, and logits rounded to bfloat16 lose 20 to 200 % of it. The head is then widened a block of rows at a time.
    """
    logits = _exact_product(hidden, weight) if exact else hidden @ weight.T.to(hidden.dtype)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _exact_product(
    hidden: Float[Tensor, "tokens width"], weight: Float[Tensor, "vocab width"]
) -> Float[Tensor, "tokens vocab"]:
    """``h W^T`` in float32 at least, whatever the inputs' dtype and the caller's autocast."""
    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.dtype not in (torch.bfloat16, torch.float16):
            return hidden @ weight.T.to(hidden.dtype)
        block = 8192  # rows of the head widened at once: 8192 x 4096 x 4 bytes = 128 MiB
        wide = hidden.float()
        return torch.cat([wide @ rows.float().T for rows in weight.split(block)], dim=-1)


@dataclass(frozen=True)
class Outcomes:
    """Live and frozen log-probabilities on the same outcomes: the whole vocabulary, or k tokens and one tail.

    Attributes:
        model: ``[tokens, outcomes]``, nats; the live model, carries the gradient.
        frozen: ``[tokens, outcomes]``, nats; the reference or the teacher.
    """

    model: Tensor
    frozen: Tensor


@dataclass(frozen=True)
class Needs:
    """The statistics a target asks for, beyond the label's log-probability.

    Attributes:
        entropy: entropy of the live model.
        mean_log_prob: mean over the vocabulary of the live log-probs (the uniform residual).
        top_k: how many of the live model's largest log-probs (detached).
        log_probs: the live model's whole log-softmax.
        reference, teacher: fields of the frozen models: ``label_log_probs``, ``log_probs`` or ``distribution``
            (either full log-probs or top-k with tail), and any of ``DATA_FIELDS``.
        advantages: how much better each sample was than expected (rules of ``trust_regions``).
        rollout: ``distribution``, where more than the sampled token of the policy that sampled is compared.
    """

    entropy: bool = False
    mean_log_prob: bool = False
    top_k: int = 0
    log_probs: bool = False
    reference: frozenset[str] = frozenset()
    teacher: frozenset[str] = frozenset()
    advantages: bool = False
    rollout: frozenset[str] = frozenset()

    def __or__(self, other: Needs) -> Needs:
        return Needs(
            self.entropy or other.entropy,
            self.mean_log_prob or other.mean_log_prob,
            max(self.top_k, other.top_k),
            self.log_probs or other.log_probs,
            self.reference | other.reference,
            self.teacher | other.teacher,
            self.advantages or other.advantages,
            self.rollout | other.rollout,
        )

    @property
    def soft(self) -> bool:
        """Whether a second distribution is compared with the live one (then logits must be float32).

        The rollout's is not: it decides whether a token counts and has no gradient of its own.
        """
        return bool({"distribution", "log_probs"} & (self.reference | self.teacher))


@dataclass(frozen=True)
class TokenView:
    """All a target may look at, for a run of supervised tokens. Live fields carry the gradient.

    Attributes:
        label_log_probs: ``[tokens]`` live log-prob of the observed token, nats.
        entropy, mean_log_prob: ``[tokens]``, if asked for.
        top_log_probs: ``[tokens, top_k]`` largest live log-probs, detached, descending.
        log_probs: ``[tokens, vocab]``, if asked for.
        on_reference, on_teacher: live and frozen log-probs on shared outcomes.
        reference, teacher: the frozen numbers themselves.
        sequence_ids: ``[tokens]`` which sequence a token belongs to (sequence and batch scope).
        label_weights: ``[tokens]`` weights computed beforehand over the whole batch (sequence and batch scope).
        advantages: ``[tokens]``, where the tokens are samples of a policy.
        rollout: what the policy that sampled said of them; absent where that is the live model itself.
        on_rollout: live and sampling log-probs on shared outcomes, detached.
        vocab_size: V.
    """

    label_log_probs: Float[Tensor, " tokens"]
    vocab_size: int
    entropy: Tensor | None = None
    mean_log_prob: Tensor | None = None
    top_log_probs: Tensor | None = None
    log_probs: Tensor | None = None
    on_reference: Outcomes | None = None
    on_teacher: Outcomes | None = None
    reference: Reference | None = None
    teacher: Reference | None = None
    sequence_ids: Tensor | None = None
    label_weights: Tensor | None = None
    advantages: Tensor | None = None
    rollout: Reference | None = None
    on_rollout: Outcomes | None = None

    @property
    def label_probs(self) -> Float[Tensor, " tokens"]:
        """``p_y``, detached: as a weight it is a constant (the papers' stop-gradient)."""
        return self.label_log_probs.detach().exp()


@dataclass(frozen=True)
class Terms:
    """A target's loss at each token, in its two parts.

    Attributes:
        label: ``[tokens]`` the pull towards the observed token.
        residual: ``[tokens]`` the pull towards the residual distribution.
    """

    label: Float[Tensor, " tokens"] | None = None
    residual: Float[Tensor, " tokens"] | None = None

    def total(
        self, loss_weights: Float[Tensor, " tokens"] | None = None, weights_scale: WeightsScale = "all"
    ) -> Float[Tensor, " tokens"]:
        """``loss_weights * (label + residual)``, or ``loss_weights * label + residual`` where they scale the label.

        Raises:
            IncompatibleError: label weights were given to a target that never looks at the observed token.
        """
        if loss_weights is not None and weights_scale == "label":
            if self.label is None:
                raise IncompatibleError(NO_LABEL_TO_WEIGH)
            return Terms(weighted(loss_weights, self.label), self.residual).total()
        whole = self.residual if self.label is None else self.label
        assert whole is not None, "a target returns a label term, a residual term, or both"
        if self.label is not None and self.residual is not None:
            whole = self.label + self.residual
        return whole if loss_weights is None else weighted(loss_weights, whole)


NO_LABEL_TO_WEIGH = (
    "weights_scale 'label' multiplies the pull towards the observed token, and this target has none; use weights_scale "
    "'all', remove the weights, or choose a target with a label term"
)


class Target(ABC):
    """What distribution each token's model is pulled towards. Subclasses are frozen dataclasses of hyper-parameters.

    Attributes:
        name: the file's name, and the name in configs.
        formula: one line for the table of targets.
        paper: arXiv id or origin.
        scope: what must be seen at once: one token, one sequence, or the whole optimizer batch.
        has_label_term: whether it pulls towards the observed token at all.
        has_residual: whether it pulls towards a residual distribution.
        linear_in_frozen: whether its gradient is linear in the frozen distribution; only then does an unbiased sample of
            that distribution give an unbiased gradient.
        live_weights: whether the weight of its label term is differentiated too, on purpose (psft's ratio).
    """

    name: ClassVar[str]
    formula: ClassVar[str]
    paper: ClassVar[str]
    scope: ClassVar[Scope] = "token"
    has_label_term: ClassVar[bool] = True
    has_residual: ClassVar[bool] = False
    linear_in_frozen: ClassVar[bool] = False
    live_weights: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """The statistics that ``losses`` reads."""
        return Needs()

    @abstractmethod
    def losses(self, x: TokenView) -> Terms:
        """The paper's loss at each token, with the paper's stop-gradients."""


class LabelWeight(Target):
    """A target that only re-weights the observed token: ``-sg(w) log p_y``; the rest stays with the model itself."""

    @abstractmethod
    def label_weights(self, x: TokenView) -> Float[Tensor, " tokens"]:
        """The weight ``w >= 0`` of each token."""

    def losses(self, x: TokenView) -> Terms:
        weights = self.label_weights(x) if x.label_weights is None else x.label_weights
        return Terms(label=-weighted(weights.detach(), x.label_log_probs))


def require(reference: Reference | None, field: str, target: str, role: str = "reference") -> Tensor:
    """The field of a frozen model, or an error that says how to get it.

    Raises:
        MissingStatisticError: the frozen model or its field is absent.
    """
    value = None if reference is None else getattr(reference, field)
    if value is None:
        raise MissingStatisticError(missing_message(target, role, field))
    return value


def missing_message(target: str, role: str, field: str) -> str:
    """One wording for every absent statistic."""
    if role == "rollout":
        return (
            f"target {target!r} compares the live policy with the whole distribution of the one that sampled, which was not "
            "given; pass rollout=qtarget.Reference(topk_ids=..., topk_log_probs=..., tail_log_mass=...), or choose "
            "outcomes='binary', which needs the sampled token's log-prob alone"
        )
    if field in WITNESS_FIELDS:
        return (
            f"target {target!r} needs {role}.{field}, which was not given; pass {role}=qtarget.Reference({field}=...) with numbers "
            f"from qtarget.data.crossfit.witness; in training leave witness unset and `qtarget train` makes it, or "
            f"{crossfit_command()} beside `{role}_cache`"
        )
    if field in DATA_FIELDS:
        return (
            f"target {target!r} needs {role}.{field}, which was not given; pass {role}=qtarget.Reference({field}=...) with numbers "
            "from qtarget.data.agreement; in training they are counted from the rows when "
            f"`{role}_cache` is set (`qtarget score CONFIG.yaml{' --role teacher' if role == 'teacher' else ''}`)"
        )
    if field == "log_probs":
        return (
            f"target {target!r} needs {role}.log_probs, the whole distribution, which no cache holds; pass whole logits, or "
            f"in training set {role}_model_name_or_path and no {role}_cache, so that the model runs live"
        )
    argument = "teacher_logits=... or teacher=" if role == "teacher" else "reference="
    argument += "qtarget.Reference(...), or qtarget.FrozenHead(...) from hidden states"
    option = (" --role teacher" if role == "teacher" else "") + (" --top_k 32" if field == "distribution" else "")
    return (
        f"target {target!r} needs {role}.{field}, which was not given; pass {argument}, "
        f"or in training run `qtarget score CONFIG.yaml{option}` once and set `{role}_cache`"
    )


def sampled_message(target: str, role: str) -> str:
    """Why draws will not do, and what will."""
    return (
        f"target {target!r} is not linear in the {role}'s distribution, so sampled ids would bias its gradient; expected "
        "top-k log-probs with their tail: score with --top_k 32 instead of --sampled, or choose a target that is "
        "linear (distillation, hybrid_distillation, sft_kl, asft, consensus, crossfit_consensus)"
    )
