"""The model that a config names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qtarget.cli.options.config import RunConfig


def set_model_arguments(config: RunConfig) -> None:
    """Hand the keys of ModelConfig on to ``from_pretrained``, as TRL's own script does.

    Raises:
        ConfigError: there is no such model, it is an adapter, or it is not whole.
    """
    from qtarget.storage.models import check_whole, refuse_adapter

    model, training = config.model, config.training
    refuse_adapter(str(model.model_name_or_path))
    remote = {"revision": model.model_revision, "trust_remote_code": training.trust_remote_code}
    # names and shapes alone, so that a name which leads nowhere is told in our words before TRL loads the model
    check_whole(
        "model_name_or_path", str(model.model_name_or_path), allow_new_weights=training.allow_new_weights, **remote
    )
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        "trust_remote_code": training.trust_remote_code,
    } | (training.model_init_kwargs or {})  # pyright: ignore[reportOperatorIssue]
