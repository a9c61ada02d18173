"""Score rows with a vLLM server: ``/v1/completions`` with token ids and ``prompt_logprobs``.

Shapes as in vLLM's ``entrypoints/openai/completion/protocol.py`` (API docs of 0.15.0 and 0.20.2; source at commit
002032ee2b18): ``choices[0].prompt_logprobs`` is one entry a token, null at position 0, each mapping token ids (as text) to
``{logprob, rank, decoded_token}``. The label is always listed, beside the k largest where it is not one of them; minus
infinity comes as -9999.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.sources.bounded import NUMBER_BYTES, SMALL_ANSWER, number, token_id
from qtarget.scoring.sources.http import Endpoint, HttpSource, ServedModel, largest, listed_row


class VllmSource(HttpSource):
    """See ``HttpSource``.

    The server must allow as many log-probs as are asked for: ``vllm serve ... --max-logprobs 32`` (its default is 20, -1
    lifts the limit). Candidates are read from the whole distribution (``prompt_logprobs: -1``): exact, and large answers.

    Args:
        model: name under which the model is served.
    """

    engine = "vllm"

    def __init__(self, endpoint: Endpoint, *, model: str | None = None, **kwargs: Any) -> None:
        super().__init__(endpoint, **kwargs)
        self._model = model or self._served()

    def _served(self) -> str:
        listed = self._endpoint.get("/v1/models").get("data")
        try:
            names = [str(entry["id"])[:1000] for entry in listed or []]
        except (TypeError, KeyError, IndexError) as error:
            raise ScoringServerError(f"{self._endpoint.url}/v1/models lists no ids; is this a vLLM server?") from error
        if not names:
            raise ScoringServerError(f"{self._endpoint.url} serves no model; start it with `vllm serve MODEL`")
        return names[0]

    def describe(self) -> ServedModel:
        """The first served model; vLLM does not tell its dtype."""
        version = str(self._endpoint.get("/version").get("version", ""))
        return ServedModel(self._model, self.engine, version, "")

    def tokenize(self, text: str) -> list[int]:
        """See ``HttpSource``."""
        answer = self._endpoint.post("/tokenize", {"model": self._model, "prompt": text, "add_special_tokens": True})
        tokens = answer.get("tokens")
        try:
            if not isinstance(tokens, list):
                raise TypeError("no list")
            return [token_id(token) for token in tokens]
        except (TypeError, ValueError) as error:
            raise ScoringServerError(
                f"{self._endpoint.url}/tokenize answers tokens {str(tokens)[:80]!r}; expected a list of ids; is this a vLLM server?"
            ) from error

    def _score_row(self, ids: np.ndarray, at: np.ndarray, top_k: int, candidate_ids: Sequence[int] | None) -> ScoredRow:
        wanted = top_k if candidate_ids is None else -1
        body = {
            "model": self._model,
            "prompt": ids.tolist(),
            # vLLM refuses 0; the token it makes is not looked at
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": wanted,
        }
        most = SMALL_ANSWER + NUMBER_BYTES * len(ids) * (2 + (self.vocab_size if wanted < 0 else top_k))
        entries = self._entries(self._post(body, top_k, wanted, most), len(ids))
        labels, listed, candidates = [], [], []
        for t in at.tolist():
            numbers = _numbers(entries[t], t, self._endpoint.url)
            if int(ids[t]) not in numbers:
                raise ScoringServerError(
                    f"{self._endpoint.url} lists no log-prob of token {ids[t]} at position {t}; expected the prompt's own "
                    "token in every entry of prompt_logprobs"
                )
            labels.append(numbers[int(ids[t])])
            # a label beside the k largest is the last of k + 1
            listed.append(largest(((value, token) for token, value in numbers.items()), top_k))
            if len(numbers) < top_k:
                raise ScoringServerError(_too_few(self._endpoint.url, len(numbers), top_k, t))
            if candidate_ids is not None:
                if missing := [c for c in candidate_ids if c not in numbers]:
                    raise ScoringServerError(_too_few(self._endpoint.url, len(numbers), self.vocab_size, t, missing))
                candidates.append([numbers[c] for c in candidate_ids])
        asked = None if candidate_ids is None else candidates
        return listed_row(labels, listed, top_k, asked, self.vocab_size, self._endpoint.url)

    def _post(self, body: dict[str, Any], top_k: int, wanted: int, most: int) -> dict[str, Any]:
        try:
            return self._endpoint.post("/v1/completions", body, most=most)
        except ScoringServerError as error:
            # vLLM's words for a limit that its command line alone lifts
            if "greater than max allowed" not in str(error):
                raise
            limit = "-1" if wanted < 0 else str(top_k)
            raise ScoringServerError(f"{error}; start vLLM with --max-logprobs {limit}") from error

    def _entries(self, answer: dict[str, Any], length: int) -> list[Any]:
        try:
            entries = answer["choices"][0]["prompt_logprobs"]
        except (KeyError, IndexError, TypeError) as error:
            raise ScoringServerError(
                f"{self._endpoint.url} answers without choices[0].prompt_logprobs; expected a vLLM server"
            ) from error
        if not isinstance(entries, list) or len(entries) != length:
            found = len(entries) if isinstance(entries, list) else entries
            raise ScoringServerError(f"{self._endpoint.url} answers {found} positions for a row of {length} tokens")
        return entries


def _numbers(entry: Any, position: int, url: str) -> dict[int, float]:
    """Token id -> log-prob of one position."""
    try:
        return {token_id(token): number(value["logprob"]) for token, value in entry.items()}
    except (AttributeError, TypeError, KeyError, ValueError) as error:
        raise ScoringServerError(
            f"{url} answers {str(entry)[:80]!r} at position {position}; expected token ids with their logprob (only position "
            "0 may be null)"
        ) from error


def _too_few(url: str, found: int, wanted: int, position: int, missing: Sequence[int] = ()) -> str:
    without = f", without candidates {list(missing)[:5]}" if missing else ""
    return (
        f"{url} lists {found} log-probs at position {position}{without}; expected {wanted}; start vLLM with "
        f"--max-logprobs {-1 if missing else wanted}, and see that its vocabulary is that of the model named here"
    )
