"""The load-balancing loss of a mixture of experts, for a forward that stops before the head."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from qtarget.core.errors import UnsupportedModelError
from qtarget.core.shapes import Tensor

RouterLoss = Callable[[Any, Tensor | None], Tensor]
"""Of a backbone's output (with ``router_logits``) and the attention mask; unweighted."""


def wants_router_logits(model: PreTrainedModel) -> bool:
    """Whether the model's configuration asks for its routers' loss."""
    return bool(getattr(model.config.get_text_config(), "output_router_logits", False))


def router_loss(model: PreTrainedModel) -> RouterLoss:
    """The function with which this model's own forward computes ``aux_loss``.

    It is looked up in the module that defines the model; a model without one shares Mixtral's, as in TRL.

    Raises:
        UnsupportedModelError: (the function) the backbone returns no router logits.
    """
    text = model.config.get_text_config()
    module = sys.modules[type(model).__module__]  # now: FSDP2 gives the model a class of its own later
    function: Any = getattr(module, "load_balancing_loss_func", load_balancing_loss_func)

    def loss_of(output: Any, attention_mask: Tensor | None) -> Tensor:
        if getattr(output, "router_logits", None) is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} asks for its routers' loss, and its backbone returns no router logits; set "
                "router_aux_loss_coef: 0"
            )
        return function(output.router_logits, text.num_experts, text.num_experts_per_tok, attention_mask)

    return loss_of
