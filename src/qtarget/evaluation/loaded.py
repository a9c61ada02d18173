"""A contender as it is evaluated: its tokenizer, and its model as soon as somebody needs it."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from qtarget.core.errors import DataError, QTargetError
from qtarget.evaluation.contenders import Contender
from qtarget.integrations.shared.saved.ends import adopt_saved
from qtarget.storage.models import context_of, load_named, load_whole

if TYPE_CHECKING:
    from qtarget.evaluation.evaluate import RowSet


class Loaded:
    """A contender's tokenizer, and its model as soon as somebody needs it."""

    def __init__(self, contender: Contender, trust_remote_code: bool = False) -> None:
        self.contender, self._trust = contender, trust_remote_code
        self.tokenizer, self.notes = load_tokenizer(contender, trust_remote_code)

    @cached_property
    def model(self) -> Any:
        """On the device that there is."""
        from accelerate import PartialState

        from qtarget.storage.models import check_vocabulary

        model = load_contender(self.contender, self._trust)
        check_vocabulary(model, self.tokenizer, self.contender.name)
        return model.to(PartialState().device)

    @cached_property
    def context(self) -> int | None:
        """Positions of the model."""
        from transformers import AutoConfig

        from qtarget.storage.models import adapter_base

        name = adapter_base(self.contender.model) or self.contender.model
        config = load_named(AutoConfig, self.contender.name, name, **self._options)
        return context_of(config)

    @cached_property
    def generation_config(self) -> Any:
        """Of a model that is not loaded here, or None where it has none."""
        from transformers import GenerationConfig

        try:
            return GenerationConfig.from_pretrained(self.contender.model, **self._options)
        except (OSError, ValueError):
            return None

    @property
    def _options(self) -> dict[str, Any]:
        return model_options(self.contender, self._trust)

    def ready_rows(self, rows: RowSet) -> Any:
        """The rows as training would have them (see ``qtarget.integrations.sft.rows``)."""
        from jinja2 import TemplateError

        from qtarget.integrations.sft.rows import training_rows_of

        model = self.model
        try:
            return training_rows_of(model, self.tokenizer, rows.dataset, self.contender.settings)
        except QTargetError:
            raise
        except (TypeError, ValueError, KeyError, TemplateError) as error:  # a chat template may raise any of them
            raise DataError(
                f"{rows.file} cannot be tokenised for {self.contender.name}: {type(error).__name__}: {error}; does its chat "
                "template take rows of this form?"
            ) from error

    def forget(self) -> None:
        """Give the model's memory back."""
        import torch

        if self.__dict__.pop("model", None) is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()


def load_contender(contender: Contender, trust_remote_code: bool = False) -> Any:
    """The model; of an adapter its base with the adapter on it.

    Raises:
        ConfigError: it cannot be loaded, or is not whole.
    """
    from qtarget.storage.models import adapter_base, loading

    options, key = model_options(contender, trust_remote_code), "model"
    recorded = adapter_base(contender.model)
    if recorded is None or contender.base in (None, recorded):
        model = load_whole(key, contender.model, **options)
    else:
        model = load_whole(
            "base", str(contender.base), **options
        )  # the recorded one was moved, or is another on purpose
        with loading("adapter", contender.model):
            model.load_adapter(contender.model)
    if recorded is not None:
        adopt_saved(model, contender.model)
    return model


def model_options(contender: Contender, trust_remote_code: bool) -> dict[str, Any]:
    """For ``from_pretrained``."""
    options: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    return options | ({"revision": contender.revision} if contender.revision else {})


def load_tokenizer(contender: Contender, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """The tokenizer of a contender, and what is to be said about it.

    A base gets its run's, which may have the chat template that the base lacks; its own where the two have other tokens.

    Raises:
        ConfigError: there is none.
    """
    from transformers import AutoTokenizer

    options = model_options(contender, trust_remote_code)
    tokenizer = load_named(AutoTokenizer, "tokenizer", contender.tokenizer, **options)
    if contender.tokenizer == contender.model or contender.base is not None:
        return tokenizer, []
    try:
        own = AutoTokenizer.from_pretrained(contender.model, **options)
    except (OSError, ValueError):
        return tokenizer, [f"it has no tokenizer of its own; that of {contender.tokenizer} is used"]
    if own.get_vocab() == tokenizer.get_vocab():
        return tokenizer, []
    return own, [f"its own tokenizer is used: that of {contender.tokenizer} has other tokens"]
