"""The load-balancing loss of a mixture of experts, for a forward that stops before the head."""

from __future__ import annotations

import sys
from typing import Any

from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qtarget.core.errors import UnsupportedModelError
from qtarget.core.shapes import Tensor


def wants_router_logits(model: PreTrainedModel) -> bool:
    """Whether the model's configuration asks for its routers' loss."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def router_loss(model: PreTrainedModel, backbone: Any, attention_mask: Tensor | None) -> Tensor:
    """The unweighted ``aux_loss`` of the model's own forward.

    Its function is looked up in the module that defines the model; a model without one shares Mixtral's, as in TRL.

    Args:
        backbone: output of ``model.base_model``, asked for router logits.
        attention_mask: of the batch; None where nothing is padded.

    Raises:
        UnsupportedModelError: there are no router logits.
    """
    if getattr(backbone, "router_logits", None) is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} asks for its routers' loss, and its backbone returns no router logits; set "
            "router_aux_loss_coef: 0"
        )
    modules = [sys.modules[kind.__module__] for kind in type(model).__mro__]  # FSDP2 puts a class of its own in front
    found: Any = next((m for m in modules if hasattr(m, "load_balancing_loss_func")), None)
    function: Any = load_balancing_loss_func if found is None else found.load_balancing_loss_func
    text = model.config.get_text_config()
    return function(backbone.router_logits, text.num_experts, text.num_experts_per_tok, attention_mask)
