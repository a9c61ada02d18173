"""The same loss from hidden states, a chunk of logits at a time, with the gradient computed in the forward pass.

The loss is a sum over tokens, so an upstream gradient only scales it: each chunk's logits are turned into their
gradient at once, in place, and multiplied back onto the hidden states and the head. Three matrix products a chunk, two
with a frozen head, one without gradients; nothing of vocabulary size outlives a chunk.

Two ways from logits to gradient. Most targets see the vocabulary through a few columns and sums (``columns.py``): one
pass turns logits into sums and exponentials, and one factor a token those into the gradient, whatever the target. A
target that needs a second distribution over the whole vocabulary, or the whole log-softmax, is differentiated by
autograd (``whole_rows.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch

from qtarget.core.coefficients import differentiate
from qtarget.core.errors import HyperparameterError
from qtarget.core.shapes import Float, Int, Tensor
from qtarget.core.types import FrozenHead, Needs, Reference
from qtarget.loss.columns import ChunkStatistics, Columns, RestGradient, RestSums
from qtarget.loss.gradients import Gradients
from qtarget.loss.head import Head, HeadProducts, LogitGradient, Precision
from qtarget.loss.kernels import pytorch
from qtarget.loss.result import LossRequest, TokenReport
from qtarget.loss.vocabulary import Vocabulary
from qtarget.loss.whole_rows import in_pieces

LOGIT_BYTES = {"cpu": 48 * 2**20}
"""Memory for one chunk's logits, live and frozen; 512 MiB on other devices, where a narrowed copy comes on top."""

FEWEST_TOKENS = {"cpu": 180}
"""Tokens' logits, live and frozen together: fewer starve the products (1,024 on other devices), so they may exceed the memory."""

TOKEN_STEP = {"cpu": 8}
"""A chunk is a multiple of this; 128 on other devices, whose products are made of such tiles."""


def default_chunk_size(vocab: int, frozen: int, itemsize: int, device_type: str) -> int:
    """Tokens a chunk: what fits the memory for logits, live and frozen together, but not too few.

    Args:
        vocab: V.
        frozen: how many frozen heads' logits exist beside it, of half as many tokens (``Plan.frozen_size``).
        itemsize: bytes a logit.
        device_type: ``cpu``, ``cuda``, ...
    """
    fit = LOGIT_BYTES.get(device_type, 512 * 2**20) // (vocab * itemsize)
    # live and half as many frozen tokens a frozen head: size (1 + frozen / 2) is what must fit
    live = max(FEWEST_TOKENS.get(device_type, 1024), fit) * 2 // (2 + frozen)
    step = TOKEN_STEP.get(device_type, 128)
    return live // step * step


@dataclass(frozen=True)
class Plan:
    """How a request is computed; what ``explain_backend`` tells.

    Attributes:
        kernels: module with ``rest_sums`` and ``overwrite_with_gradient``.
        precision: of the live head's products.
        chunk_size: tokens whose logits exist at once.
        whole_vocabulary: why autograd must see whole rows of logits, or empty.
        compiled: whether those rows go through ``torch.compile``.
    """

    kernels: ModuleType
    precision: Precision
    chunk_size: int
    whole_vocabulary: str
    compiled: bool = False

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        head: Head,
        request: LossRequest,
        chunk_size: int | None = None,
        logits_dtype: torch.dtype | None = None,
        kernels: ModuleType = pytorch,
        widest: int | None = None,
        compiled: bool = False,
    ) -> Plan:
        """Decide for these inputs; ``widest`` is the most columns that one process holds.

        Raises:
            HyperparameterError: a chunk size below 1, or logits in another dtype than float32 or the inputs'.
        """
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise HyperparameterError(f"chunk_size={chunk_size}; expected a whole number of tokens, at least 1")
        precision = Precision.of(hidden, head.weight, request.target.needs.soft, logits_dtype)
        if chunk_size is None:
            frozen, columns = len(frozen_heads(request)), widest or head.vocab
            chunk_size = default_chunk_size(columns, frozen, precision.logits.itemsize, hidden.device.type)
        return cls(kernels, precision, chunk_size, whole_vocabulary(request), compiled)

    @property
    def frozen_size(self) -> int:
        """Tokens whose frozen logits exist at once: half a chunk, as they enter one product and the live ones three."""
        return -(-self.chunk_size // 2)


ROLES = ("reference", "teacher", "rollout")
"""Other models that a request may hold."""


def wanted(needs: Needs, role: str) -> bool:
    """Whether the target compares the live distribution with this frozen one."""
    return bool({"distribution", "log_probs"} & getattr(needs, role))


def frozen_heads(request: LossRequest) -> dict[str, FrozenHead]:
    """The frozen models whose logits must be made chunk by chunk."""
    both = {"reference": request.reference, "teacher": request.teacher}
    return {r: m for r, m in both.items() if isinstance(m, FrozenHead) and wanted(request.target.needs, r)}


def whole_vocabulary(request: LossRequest) -> str:
    """Why a few columns and sums are not enough for this request; empty if they are."""
    needs = request.target.needs
    if needs.log_probs:
        return f"{request.target.name} reads the whole log-softmax"
    for role in ROLES:
        model = getattr(request, role)
        if model is None or not wanted(needs, role):
            continue
        if isinstance(model, FrozenHead) or model.log_probs is not None:
            return f"the {role} is a distribution over the whole vocabulary"
        if model.tail_policy == "spread":
            return f"the {role}'s tail is spread over the whole vocabulary"
    return ""


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, run: _Run):
        grads = Gradients.empty(hidden, run.head, ctx.needs_input_grad[:3])
        loss = run(hidden, grads if any(ctx.needs_input_grad[:3]) else None)
        ctx.grads, ctx.dtypes = grads, (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream):
        # backward runs with gradients enabled only under create_graph=True
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the chunked loss has no second derivative (create_graph=True); use backend='dense', which has one"
            )
        if ctx.grads is None:
            raise RuntimeError(
                "the chunked loss hands its gradients out once; call backward(retain_graph=True) before a second "
                "backward pass, or compute the loss again"
            )
        # no public function tells whether retain_graph=True was given
        keep = torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]
        grads = ctx.grads.hand_out(upstream[0], ctx.dtypes, keep)
        if not keep:
            ctx.grads = None
        return (*grads, None)


class _Run:
    """One pass over all chunks.

    Args:
        head: detached.
        vocabulary: which of its rows are here.
        request: for the supervised tokens.
        kept: their indices among the hidden states' rows, or absent when all are.
        known: sums of an earlier pass over the same tokens.
    """

    def __init__(
        self,
        plan: Plan,
        head: Head,
        vocabulary: Vocabulary,
        request: LossRequest,
        kept: Tensor | None,
        known: RestSums | None,
    ) -> None:
        self.plan, self.head, self.vocabulary = plan, head, vocabulary
        self.request, self.kept, self.known = request, kept, known
        self.reports: list[TokenReport] = []

    def __call__(self, hidden: Float[Tensor, "all width"], grads: Gradients | None) -> Float[Tensor, ""]:
        count, size = len(self.request.labels), self.plan.chunk_size
        hidden = hidden.detach()
        layout = False if self.plan.whole_vocabulary else self.plan.kernels is pytorch
        products = HeadProducts(self.head, self.plan.precision, min(count, size), layout)
        frozen = {role: self._frozen(model) for role, model in frozen_heads(self.request).items()}
        # a sum of thousands of losses in bfloat16 would keep two digits
        loss = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        # the dtypes are ``Precision``'s, which has looked at autocast already; autocast would undo float32 logits
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, max(count, 1), size):  # an empty batch runs once: its report is empty too
                part = slice(start, min(start + size, count))
                index = part if self.kept is None else self.kept[part]
                request, rows_of = self.request.rows(part), hidden[index]
                logits = products.logits(rows_of)
                if self.plan.whole_vocabulary:
                    loss += self._whole_rows(logits, frozen, request, grads is not None)
                    gradient = LogitGradient(logits)
                else:
                    known = None if self.known is None else self.known.rows(part)
                    # over all columns, so before the special ones are set to minus infinity
                    plain = products.logit_sum(rows_of, logits) if request.target.needs.mean_log_prob else None
                    plain = None if plain is None else self.vocabulary.total(plain)
                    value, gradient = self._columns(logits, request, known, plain, grads is not None)
                    loss += value
                if grads is not None:
                    assert gradient is not None
                    grads.add(index, gradient, rows_of, products, self.vocabulary)
        if grads is not None:
            grads.finish()
        return loss

    def _frozen(self, model: FrozenHead) -> HeadProducts:
        """Logits of a frozen model, for as many tokens as ``frozen_size``."""
        precision = Precision.of(model.hidden, model.lm_head_weight, True)
        return HeadProducts(frozen_head(model), precision, min(len(self.request.labels), self.plan.frozen_size), False)

    def _whole_rows(
        self, logits: Float[Tensor, "tokens vocab"], frozen: dict[str, HeadProducts], request: LossRequest, write: bool
    ) -> Float[Tensor, ""]:
        """Loss of one chunk by autograd; with ``write`` its gradient, in place of the logits."""
        loss = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        step = self.plan.frozen_size if frozen else self.plan.chunk_size
        for start in range(0, max(len(logits), 1), step):
            part = slice(start, start + step)
            some = request.rows(part)
            others = {role: products.logits(frozen_heads(some)[role].hidden) for role, products in frozen.items()}
            value, reports = in_pieces(logits[part], others, some, self.head, write, self.plan.compiled)
            loss += value
            self.reports += reports
        return loss

    def _columns(
        self,
        logits: Float[Tensor, "tokens vocab"],
        request: LossRequest,
        known: RestSums | None,
        plain: Float[Tensor, " tokens"] | None,
        write: bool,
    ) -> tuple[Float[Tensor, ""], LogitGradient | None]:
        """Loss of one chunk through special columns and sums; with ``write`` its gradient, in place of the logits."""
        target, needs, vocab = request.target, request.target.needs, self.vocabulary.size
        models: dict[str, Any] = {f"on_{role}": getattr(request, role) for role in ROLES}
        compared = {r: m if wanted(needs, r.removeprefix("on_")) else None for r, m in models.items()}
        # before ``take`` sets columns aside: special ones may be among the largest
        top = self.vocabulary.largest(logits, needs.top_k) if needs.top_k else None
        wide = torch.promote_types(logits.dtype, torch.float32)
        columns = Columns.of(request.labels, compared, wide)
        at_columns = self.vocabulary.take(logits, columns.ids).to(wide)
        values, mine = self._sums(logits, needs.entropy or request.want_report, known, write)
        rest = self.vocabulary.join(mine) if known is None else known
        seen = ChunkStatistics.of(columns, at_columns, replace(rest, plain=plain))
        view = seen.view(
            vocab,
            top,
            models,
            needs,
            sequence_ids=request.sequence_ids,
            label_weights=request.label_weights,
            advantages=request.advantages,
        )
        if not (write or request.want_report):
            return target.losses(view).total(*request.weighting).sum(), None
        found = differentiate(target, view)
        losses = found.terms.total(*request.weighting)
        if request.want_report:
            a, b = found.pulls(*request.weighting)
            self.reports.append(TokenReport(losses, view.label_log_probs, seen.entropy(), seen.correct(), a, b))
        gradient = None
        if write:
            at_columns, rest = seen.gradient(found.combined(*request.weighting), vocab)
            # from logits to ``h W^T + b``; of the rest the soft-cap is undone where its logits are read
            at_columns, rest = at_columns * self.head.chain(seen.logits), rest.scaled(self.head.scale)
            gradient = self._gradient(values, mine.maximum, rest, at_columns, columns)
        return losses.sum(), gradient

    @property
    def exponentials(self) -> bool:
        """Whether logits become exponentials at once, and their gradient a factor a token of those.

        Not in Triton, where exponentials cost nothing; not under a soft-cap, whose derivative needs the logits; not in
        float16, which is too narrow.
        """
        return (
            self.plan.kernels is pytorch and self.head.softcap is None and self.plan.precision.multiply != torch.float16
        )

    def _sums(
        self, logits: Float[Tensor, "tokens vocab"], entropy: bool, known: RestSums | None, write: bool
    ) -> tuple[Float[Tensor, "tokens vocab"], RestSums]:
        """What the gradient will be written into, and the sums over this process's columns."""
        if write and self.exponentials:
            # the first pass found it: one pass less over the logits
            maximum = None if known is None else known.maximum
            return pytorch.exponentiate(logits, self.plan.precision.multiply, entropy=entropy, maximum=maximum)
        return logits, known or self.plan.kernels.rest_sums(logits, entropy=entropy)

    def _gradient(
        self,
        values: Float[Tensor, "tokens vocab"],
        maximum: Float[Tensor, " tokens"],
        rest: RestGradient,
        at_columns: Float[Tensor, "tokens columns"],
        columns: Columns,
    ) -> LogitGradient:
        """Logits, or exponentials of ``z - maximum``, turned into the gradient."""
        if not self.exponentials:
            self.plan.kernels.overwrite_with_gradient(values, rest, self.head.softcap)
            self.vocabulary.put(values, columns.ids, at_columns)
            return LogitGradient(values)
        # the level is added to whole rows as a product of rank one, special columns included
        if rest.level is not None:
            at_columns = at_columns - rest.level[:, None]
        rest = rest.moved(maximum)
        if rest.slope is None:
            values.mul_(rest.factor[:, None].to(values.dtype))
        else:
            pytorch.scale_exponentials(values, rest.factor, rest.slope)
        self.vocabulary.put(values, columns.ids, at_columns)
        return LogitGradient(values, rest.level)


def frozen_head(model: FrozenHead) -> Head:
    """The head of a frozen model."""
    head = Head(model.lm_head_weight, model.bias, model.logit_scale, model.logit_softcap)
    return head.check(model.hidden.shape[-1]).detach()


@torch.no_grad()
def label_statistics(
    hidden: Float[Tensor, "all width"],
    head: Head,
    labels: Int[Tensor, " tokens"],
    kept: Tensor | None = None,
    *,
    precision: Precision | None = None,
    kernels: ModuleType = pytorch,
    vocabulary: Vocabulary | None = None,
) -> tuple[Reference, RestSums]:
    """Label log-probs and entropies of a model given by hidden states and head, and the sums behind them.

    Args:
        hidden: ``[all, width]``.
        head: of the same model.
        labels: ``[tokens]`` of the supervised ones.
        kept: ``[tokens]`` their indices in ``hidden``; absent when all are.
        precision: the default is exact (float32 logits).
        kernels: see ``Plan``.
        vocabulary: which rows of the head are here; all by default.
    """
    vocabulary = vocabulary or Vocabulary(head.vocab)
    precision = precision or Precision.of(hidden, head.weight, True)
    head, hidden = head.detach(), hidden.detach()
    size = default_chunk_size(vocabulary.widest, 0, precision.logits.itemsize, hidden.device.type)
    products = HeadProducts(head, precision, min(size, len(labels)), kernels is pytorch)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = [torch.empty(len(labels), dtype=wide, device=hidden.device) for _ in range(5)]
    with torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = products.logits(hidden[part if kept is None else kept[part]])
            columns = Columns.of(labels[part], {}, wide)
            at_columns = vocabulary.take(logits, columns.ids).to(wide)
            seen = ChunkStatistics.of(columns, at_columns, vocabulary.join(kernels.rest_sums(logits, entropy=True)))
            numbers = (seen.label_log_probs(), seen.entropy(), seen.rest.maximum, seen.rest.exp, seen.rest.exp_x)
            for whole, value in zip(out, numbers, strict=True):
                assert value is not None
                whole[part] = value
    return Reference(label_log_probs=out[0], entropy=out[1]), RestSums(*out[2:])


def frozen_label_statistics(model: FrozenHead, labels: Int[Tensor, " tokens"]) -> Reference:
    """What a frozen model says about each label: log-prob and entropy."""
    return label_statistics(model.hidden, frozen_head(model), labels)[0]


def chunked_loss_sum(
    hidden: Float[Tensor, "all width"],
    head: Head,
    vocabulary: Vocabulary,
    request: LossRequest,
    plan: Plan,
    kept: Int[Tensor, " tokens"] | None = None,
    known: RestSums | None = None,
) -> tuple[Float[Tensor, ""], TokenReport | None]:
    """Summed loss of the supervised tokens, differentiable once in hidden states, head weight and bias.

    Frozen heads (``requires_grad=False``) skip the weight gradient; where nothing requires a gradient, none is computed.
    """
    run = _Run(plan, head.detach(), vocabulary, request, kept, known)
    inputs = (hidden, head.weight, head.bias)
    if not torch.is_grad_enabled():  # inside apply, parameters would still claim to need gradients
        inputs = tuple(None if value is None else value.detach() for value in inputs)
    loss = _ChunkedLoss.apply(*inputs, run)
    return loss, TokenReport.concatenate(run.reports) if run.reports else None  # pyright: ignore[reportReturnType]
