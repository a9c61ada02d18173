"""The readable oracle: the target's own formula, differentiated by autograd through full logits."""

from __future__ import annotations

from qtarget.core.coefficients import differentiate
from qtarget.core.shapes import Float, Tensor
from qtarget.loss.result import LossRequest, TokenReport, report


def dense_token_losses(
    logits: Float[Tensor, "tokens vocab"], request: LossRequest
) -> tuple[Float[Tensor, " tokens"], TokenReport | None]:
    """The loss at each supervised token, with its graph, and the report when the request asks for one."""
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    log_probs = wide.log_softmax(-1)
    target = request.target
    view = request.view(log_probs)
    losses = target.losses(view).total(*request.weighting)
    found = differentiate(target, view) if request.want_report else None
    return losses, None if found is None else report(wide.detach(), log_probs.detach(), view, request, found)
