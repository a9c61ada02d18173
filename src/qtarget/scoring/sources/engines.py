"""Which engine runs the frozen model, by name: connected, checked, and what the manifest says of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qtarget.core.errors import ConfigError, ScoringServerError
from qtarget.scoring.cache.plan import tool_versions
from qtarget.scoring.cache.schema import fingerprint_model
from qtarget.scoring.sources.canary import TOLERANCE, check_model, check_tokenizer
from qtarget.scoring.sources.distributed import Load, RaySource
from qtarget.scoring.sources.http import Endpoint, HttpSource
from qtarget.scoring.sources.local import Connection, LocalSource, local_connection
from qtarget.scoring.sources.mosec import MosecSource, mosec_connection
from qtarget.scoring.sources.sglang import SglangSource
from qtarget.scoring.sources.vllm import VllmSource

EngineName = Literal["local", "ray", "mosec", "vllm", "sglang"]
FOREIGN: dict[str, type[HttpSource]] = {"vllm": VllmSource, "sglang": SglangSource}
SERVED = ("mosec", *FOREIGN)
"""Engines behind a URL: ours (`qtarget serve`), and others'."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EngineChoice:
    """Who scores.

    Attributes:
        name: ``local``, ``ray``, or the kind of server.
        url: of a server.
        ray_address: of a running Ray cluster; absent: one is started on this machine.
        workers: Ray's processes, each with a copy of the model.
        concurrency: rows under way at a server.
        trust_server: do not compare a server's numbers with a local forward, for models that fit nowhere here; the
            tokenizer is compared all the same.
        vocab_size: rows of the served model's head, where that model is not loaded here.
        canary_tolerance: nats, mean over the canary's tokens.

    Raises:
        ConfigError: a server without a URL, or a URL without a server.
    """

    name: EngineName = "local"
    url: str | None = None
    ray_address: str | None = None
    workers: int = 1
    concurrency: int = 32
    trust_server: bool = False
    vocab_size: int | None = None
    canary_tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        if self.name not in get_args(EngineName):
            raise ConfigError(f"engine {self.name!r} is unknown; expected one of {', '.join(get_args(EngineName))}")
        if self.is_server != (self.url is not None):
            raise ConfigError(
                f"engine {self.name!r} and url {self.url!r} do not go together; expected a URL for {', '.join(SERVED)} alone"
            )

    @property
    def is_server(self) -> bool:
        """Whether rows go over HTTP."""
        return self.name in SERVED


def detect_engine(url: str) -> EngineName:
    """The kind of server at a URL, by the owner that it names in ``/v1/models``; ours tells in ``/info``.

    Raises:
        ScoringServerError: nobody answers, or no engine of ours.
    """
    answer = Endpoint(url, timeout=30).get("/v1/models", "/info")
    try:
        owner = answer.get("engine") or answer["data"][0]["owned_by"]
    except (TypeError, IndexError, KeyError) as error:
        raise ScoringServerError(f"{url} does not say what it is; expected one of {', '.join(SERVED)}") from error
    name = "mosec" if owner == "qtarget" else owner
    if name not in SERVED:
        raise ScoringServerError(f"{url} is a server of {owner!r}; expected one of {', '.join(SERVED)}")
    return name


def connect(
    choice: EngineChoice,
    model: Any,
    *,
    model_id: str,
    tokenizer: Any,
    load: Load | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    tokens_per_batch: int = 8192,
    on_tokens: Callable[[int], None] | None = None,
) -> Connection:
    """Make a source ready, and make sure that it is the model it is taken for.

    Args:
        model: the frozen model; of a trusted server, any model with its vocabulary.
        model_id: name or path, for people.
        tokenizer: that made the rows.
        load: gives the model in Ray's workers.
        logit_scale, logit_softcap, tokens_per_batch: see ``LocalSource``.
        on_tokens: called with the number of tokens that are done.

    Raises:
        ConfigError: Ray without ``load``.
        ScoringServerError: the server is not what it should be.
        MissingDependencyError: Ray is not installed.
    """
    options: dict[str, Any] = {
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
        "tokens_per_batch": tokens_per_batch,
    }
    if choice.name == "local":
        return local_connection(model, model_id=model_id, on_tokens=on_tokens, **options)
    if choice.is_server:
        return _connect_server(choice, model, model_id, tokenizer, on_tokens, (logit_scale, logit_softcap))
    if load is None:
        raise ConfigError("engine 'ray' loads the model in every worker; give the model by name or path")
    fingerprint = fingerprint_model(model)
    source = RaySource(
        load,
        fingerprint=fingerprint,
        vocab_size=model.get_output_embeddings().weight.shape[0],
        workers=choice.workers,
        address=choice.ray_address,
        **options,
    )
    dtype = str(model.dtype).removeprefix("torch.")
    # the same engine as in one process: a folder begun by one may be finished by the other
    return Connection(source, model_id, fingerprint, dtype, "transformers", tool_versions()["transformers"])


def _connect_server(
    choice: EngineChoice,
    model: Any,
    model_id: str,
    tokenizer: Any,
    on_tokens: Callable[[int], None] | None,
    head: tuple[float, float | None],
) -> Connection:
    if choice.name == "mosec":
        ours = MosecSource(str(choice.url), concurrency=choice.concurrency, on_tokens=on_tokens)
        return mosec_connection(ours, model, tokenizer, model_id=model_id, trust_server=choice.trust_server)
    source = FOREIGN[choice.name](
        Endpoint(str(choice.url)),
        vocab_size=choice.vocab_size or model.get_output_embeddings().weight.shape[0],
        concurrency=choice.concurrency,
        on_tokens=on_tokens,
    )
    served = source.describe()
    # before the numbers: of other tokens they would say nothing
    ids = check_tokenizer(source, tokenizer)
    if choice.trust_server:
        fingerprint = f"unverified: {served.name}"
        logger.warning(
            "%s is trusted to serve %s: its tokenizer agrees, its numbers were not compared", choice.url, served.name
        )
    else:
        fingerprint = fingerprint_model(model)
        scale, softcap = head
        here = LocalSource(model, logit_scale=scale, logit_softcap=softcap)
        report = check_model(source, ids, here, model_id, tolerance=choice.canary_tolerance)
        logger.info(
            "%s serves %s: log-probs of %d canary tokens agree within %.2g nats on average, %.2g at most",
            *(choice.url, model_id, report.tokens, report.mean, report.largest),
        )
    name = served.name if choice.trust_server else model_id
    return Connection(source, name, fingerprint, served.dtype or "unknown", source.engine, served.version)
