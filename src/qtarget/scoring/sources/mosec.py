"""Score rows with ``qtarget serve``: binary both ways, several rows a request, several requests under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np

from qtarget.core.errors import DataError, HyperparameterError, MissingDependencyError, ScoringServerError
from qtarget.scoring.cache.rows import IntArray, ScoredRow, check_request
from qtarget.scoring.cache.schema import fingerprint_model, fingerprint_tokenizer
from qtarget.scoring.sources.bounded import SMALL_ANSWER, Answer
from qtarget.scoring.sources.http import (
    MASS_SLACK,
    Cut,
    Endpoint,
    Retries,
    ServedModel,
    refuse_failure,
    require_log_probs,
)
from qtarget.scoring.sources.identity import WIRE_VERSION, Identity
from qtarget.scoring.sources.local import Connection

ROWS_PER_REQUEST = 8
"""Rows a request, few enough that answers come back while later ones are scored; the server batches requests anyhow."""

CANARY_TOLERANCE = 0.02
"""Nats, at each token: the served and the first numbers come from the same weights and dtype; batching moves a log-prob of
a bfloat16 model by up to 8e-3."""

ENGINE = "qtarget"
RETRIES = Retries()


class MosecSource:
    """A model behind ``qtarget serve``; connecting checks the wire on a canary row.

    Args:
        url: of the server, as it prints it.
        token: bearer token, if the server wants one; default: the environment variable QTARGET_API_KEY.
        timeout: seconds a single answer may take.
        retries: of 408, 429, 502, 503, 504, lost connections and cut answers.
        concurrency: requests under way.
        on_tokens: called with the number of wanted tokens of each request that is done.

    Attributes:
        identity: what the server says of its model: fingerprints, dtype, versions, limits.

    Raises:
        ScoringServerError: nobody answers, another kind or version of server, a token is missing, or the canary's numbers
            are not the ones that the model gave.
        MissingDependencyError: msgspec is not installed.

    Example:
        .. code-block:: python

            source = MosecSource("http://127.0.0.1:8100")
            (row,) = source.score([[5, 9, 3]], top_k=2)
    """

    engine = ENGINE

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 600.0,
        retries: Retries = RETRIES,
        concurrency: int = 16,
        on_tokens: Callable[[int], None] | None = None,
    ) -> None:
        try:
            from qtarget.scoring.sources import wire
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                f"a qtarget server needs {error.name} here; run `pip install msgspec`"
            ) from error
        self._wire = wire
        self._endpoint = Endpoint(url, timeout=timeout, retries=retries, key=token)
        self._concurrency = concurrency
        # the canary's tokens are none of the caller's
        self._on_tokens = None
        self.identity = self._read_identity()
        self._check_canary()
        self._on_tokens = on_tokens

    @property
    def vocab_size(self) -> int:
        """Rows of the served model's head."""
        return self.identity.vocab_size

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def describe(self) -> ServedModel:
        """Who answers there."""
        found = self.identity
        return ServedModel(found.model_id, ENGINE, found.versions["qtarget"], found.dtype)

    def score(
        self,
        token_ids: Sequence[IntArray],
        top_k: int,
        candidate_ids: Sequence[int] | None = None,
        *,
        positions: Sequence[IntArray] | None = None,
    ) -> list[ScoredRow]:
        """See ``qtarget.scoring.Source``.

        Raises:
            ScoringServerError: the server fails after all attempts, or serves other weights than at the start.
            DataError, HyperparameterError: see ``check_request``; or more than the server's limits allow.
        """
        rows, places = check_request(token_ids, top_k, candidate_ids, positions, self.vocab_size)
        listed = None if candidate_ids is None else [int(c) for c in candidate_ids]
        groups = self._groups(rows, places, top_k, 0 if listed is None else len(listed))

        def ask(group: list[int]) -> list[ScoredRow]:
            return self._ask([rows[i] for i in group], [places[i] for i in group], top_k, listed)

        out: dict[int, ScoredRow] = {}
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="scoring")
        try:
            for group, scored in zip(groups, pool.map(ask, groups), strict=True):
                out |= dict(zip(group, scored, strict=True))
                if self._on_tokens:
                    self._on_tokens(sum(len(places[i]) for i in group))
        finally:
            pool.shutdown(cancel_futures=True)
        return [out[i] for i in range(len(rows))]

    def _ask(
        self, rows: list[np.ndarray], places: list[np.ndarray], top_k: int, candidate_ids: list[int] | None
    ) -> list[ScoredRow]:
        def parse(response: Answer, where: str) -> tuple[str, list[ScoredRow]]:
            refuse_failure(response, where)
            kind = response.headers.get("content-type", "")
            if kind.split(";")[0] != self._wire.CONTENT_TYPE:
                raise ScoringServerError(
                    f"{where} answers {kind or 'no content type'}, expected {self._wire.CONTENT_TYPE}: "
                    f"{response.text[:80]!r}; is this the URL that `qtarget serve` printed?"
                )
            count = None if candidate_ids is None else len(candidate_ids)
            try:
                return self._wire.unpack_answer(response.content, [len(at) for at in places], top_k, count)
            except self._wire.MalformedError as error:
                raise Cut(str(error)) from error

        body = self._wire.pack_request(rows, places, top_k, candidate_ids)
        headers = {"content-type": self._wire.CONTENT_TYPE}
        tokens, listed = sum(map(len, places)), len(candidate_ids or ())
        most = SMALL_ANSWER + self._wire.answer_bytes(tokens, top_k, listed)
        model, scored = self._endpoint.exchange("POST", "/score", parse, most=most, content=body, headers=headers)
        # every answer says which weights made it: the server may have been replaced behind its URL
        if model != self.identity.model_fingerprint:
            raise ScoringServerError(
                f"{self._endpoint.url} serves other weights than when it was connected: fingerprint {model}, expected "
                f"{self.identity.model_fingerprint}; serve the first model again, or score into another folder"
            )
        for row in scored:
            check_numbers(row, self.vocab_size, f"{self._endpoint.url}/score")
        return scored

    def _groups(
        self, rows: Sequence[np.ndarray], places: Sequence[np.ndarray], top_k: int, candidates: int
    ) -> list[list[int]]:
        """Rows of each request, within the server's limits and of similar length.

        Raises:
            DataError, HyperparameterError: one row alone is beyond them.
        """
        limits = self.identity.limits
        for name, value in (("top_k", top_k), ("candidates", candidates)):
            if value > getattr(limits, name):
                raise HyperparameterError(
                    f"{name} {value} exceeds the server's {getattr(limits, name)}; start it with --max-{name.replace('_', '-')}"
                )
        groups: list[list[int]] = []
        totals = np.zeros(3, dtype=np.int64)
        most = np.array([limits.tokens, limits.answer_bytes, limits.body_bytes])
        # longest first: rows of similar length share a request, so the server pads little
        for index in sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i)):
            tokens, wanted = len(rows[index]), len(places[index])
            # four bytes a number; 512 more than covers a row's length and count and the map's field names
            size = np.array(
                [tokens, self._wire.answer_bytes(wanted, top_k, candidates), 4 * (tokens + wanted + candidates) + 512]
            )
            if tokens > limits.row_tokens or (size > most).any():
                raise DataError(
                    f"row {index} of {tokens} tokens is beyond the server's limits ({limits.row_tokens} tokens a row, "
                    f"{limits.answer_bytes} bytes an answer); cut it, ask for a smaller top_k, or start the server with more"
                )
            full = not groups or len(groups[-1]) >= min(ROWS_PER_REQUEST, limits.rows)
            if full or (totals + size > most).any():
                groups.append([])
                totals[:] = 0
            groups[-1].append(index)
            totals += size
        return groups

    # -- connecting ----------------------------------------------------------------------------------------------

    def _read_identity(self) -> Identity:
        value = self._endpoint.get("/info")
        if value.get("engine") != ENGINE or value.get("wire_version") != WIRE_VERSION:
            raise ScoringServerError(
                f"{self._endpoint.url}/info is engine {value.get('engine')!r}, wire version {value.get('wire_version')!r}; "
                f"expected {ENGINE!r}, {WIRE_VERSION}: the URL that `qtarget serve` printed, of the same release"
            )
        try:
            return Identity.parse(value)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ScoringServerError(
                f"{self._endpoint.url}/info is unreadable ({error}); install the server's qtarget here"
            ) from error

    def _check_canary(self) -> None:
        """The row that the model scored before there was a server, scored through everything."""
        (scored,) = self.score([np.array(self.identity.canary_ids)], 0)
        there, expected = scored.label_log_probs, np.array(self.identity.canary_log_probs, np.float32)
        apart = float(np.abs(there - expected).max(initial=0.0)) if there.shape == expected.shape else np.inf
        if not apart <= CANARY_TOLERANCE:
            raise ScoringServerError(
                f"{self._endpoint.url} does not answer what its model computes: the canary row's log-probs differ by up to "
                f"{apart:.3g} nats, expected at most {CANARY_TOLERANCE}; start the server again"
            )

    def require(self, **expected: Any) -> None:
        """Refuse a server whose ``/info`` says something else.

        Args:
            expected: fields of ``Identity`` and their values, such as ``model_fingerprint``.

        Raises:
            ScoringServerError: names the fields, found and expected.
        """
        if unknown := set(expected) - {field.name for field in fields(Identity)}:
            raise TypeError(f"{sorted(unknown)} are no fields of Identity")
        wrong = {name: value for name, value in expected.items() if getattr(self.identity, name) != value}
        if wrong:
            listed = "; ".join(
                f"{name} is {getattr(self.identity, name)!r}, expected {v!r}" for name, v in wrong.items()
            )
            raise ScoringServerError(
                f"{self._endpoint.url} serves {self.identity.model_id}, which is another model: {listed}; serve the model "
                "that the configuration names"
            )


def check_numbers(row: ScoredRow, vocab_size: int, url: str) -> None:
    """Refuse what no model says, before it is stored.

    Raises:
        ScoringServerError: a log-prob is above zero or NaN, an entropy is impossible, an id is outside the vocabulary or listed
            twice, or probabilities sum to more than one.
    """
    again = "start the server again, or see who answers there"
    for values in (row.label_log_probs, row.topk_log_probs, row.tail_log_mass, row.candidate_log_probs):
        if values is not None:
            require_log_probs(values, url)
    highest = np.log(vocab_size) + MASS_SLACK
    if row.entropy is not None and not ((row.entropy >= -MASS_SLACK) & (row.entropy <= highest)).all():
        raise ScoringServerError(f"{url} gives an entropy outside 0 to log({vocab_size}), or NaN; {again}")
    if row.topk_ids is None or row.topk_log_probs is None or not row.topk_ids.size:
        return
    ids = np.sort(row.topk_ids, axis=1)
    if ids.min() < 0 or ids.max() >= vocab_size or (ids[:, 1:] == ids[:, :-1]).any():
        raise ScoringServerError(f"{url} lists an id outside 0 to {vocab_size - 1}, or one twice; {again}")
    mass = np.exp(row.topk_log_probs.astype(np.float64)).sum(-1)
    if row.tail_log_mass is not None:
        mass += np.exp(row.tail_log_mass.astype(np.float64))
    if mass.max() > 1 + MASS_SLACK:
        raise ScoringServerError(f"{url} lists probabilities that sum to {mass.max():.4g}; expected at most 1; {again}")


def mosec_connection(
    source: MosecSource, model: Any, tokenizer: Any, *, model_id: str, trust_server: bool = False
) -> Connection:
    """A connected server, once it is known to serve this model with this tokenizer.

    Args:
        model: the frozen model as it is here.
        trust_server: take the server's word for the weights; the tokenizer is compared all the same.
        model_id: for the manifest, where the weights are compared.

    Raises:
        ScoringServerError: it does not.
    """
    expected: dict[str, Any] = {"tokenizer_fingerprint": fingerprint_tokenizer(tokenizer)}
    if not trust_server:
        expected["model_fingerprint"] = fingerprint_model(model)
    source.require(**expected)
    found = source.identity
    name = found.model_id if trust_server else model_id
    return Connection(source, name, found.model_fingerprint, found.dtype, ENGINE, found.versions["qtarget"])
