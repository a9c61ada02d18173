"""Score rows with an SGLang server: ``/generate`` with token ids and ``return_logprob``.

Shapes as in SGLang's ``docs/basic_usage/sampling_params.md`` and ``managers/tokenizer_manager.py`` (0.5.x; docs at commit
0a0dd3590799): ``meta_info.input_token_logprobs`` holds ``[logprob, id, null]`` a token, its first with a null log-prob;
``input_top_logprobs`` and ``input_token_ids_logprobs`` hold a list of such triples a token, null at position 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qtarget.core.errors import ScoringServerError
from qtarget.scoring.cache.rows import ScoredRow
from qtarget.scoring.sources.bounded import NUMBER_BYTES, SMALL_ANSWER, distinct, number, token_id
from qtarget.scoring.sources.http import HttpSource, ServedModel, largest, listed_row


class SglangSource(HttpSource):
    """See ``HttpSource``; candidates are scored by ``token_ids_logprob``."""

    engine = "sglang"

    def describe(self) -> ServedModel:
        """Model path, version and dtype of the server (``auto`` is what its config file says)."""
        model = self._endpoint.get("/model_info", "/get_model_info")
        server = self._endpoint.get("/server_info", "/get_server_info")
        return ServedModel(
            str(model.get("model_path", "")), self.engine, str(server.get("version", "")), str(server.get("dtype", ""))
        )

    def tokenize(self, text: str) -> list[int]:
        """See ``HttpSource``; read off a scored text, as not every version has a tokenizer route."""
        meta = self._meta({"text": text, **_scoring(0, None)})
        entries = _list(meta, "input_token_logprobs", self._endpoint.url)
        try:
            return [token_id(entry[1]) for entry in entries]
        except (TypeError, ValueError, IndexError, KeyError) as error:
            raise ScoringServerError(
                f"{self._endpoint.url} answers {str(entries)[:80]!r} in meta_info.input_token_logprobs; expected [logprob, id, "
                "text] of each token; is this an SGLang server?"
            ) from error

    def _meta(self, body: dict[str, Any], most: int = SMALL_ANSWER) -> dict[str, Any]:
        meta = self._endpoint.post("/generate", body, most=most).get("meta_info")
        if not isinstance(meta, dict):
            raise ScoringServerError(f"{self._endpoint.url} answers without meta_info; expected an SGLang server")
        return meta

    def _score_row(self, ids: np.ndarray, at: np.ndarray, top_k: int, candidate_ids: Sequence[int] | None) -> ScoredRow:
        most = SMALL_ANSWER + NUMBER_BYTES * len(ids) * (2 + top_k + len(candidate_ids or ()))
        meta = self._meta({"input_ids": ids.tolist(), **_scoring(top_k, candidate_ids)}, most)
        url = self._endpoint.url
        own = _list(meta, "input_token_logprobs", url, len(ids))
        top = _list(meta, "input_top_logprobs", url, len(ids)) if top_k else None
        asked = _list(meta, "input_token_ids_logprobs", url, len(ids)) if candidate_ids else None
        labels, listed, candidates = [], [], []
        for t in at.tolist():
            value, token = _pair(own[t], t, url)
            if token != ids[t]:
                raise ScoringServerError(f"{url} scored token {token} at position {t}; the row has {ids[t]} there")
            labels.append(value)
            pairs = [_pair(entry, t, url) for entry in _triples(top[t], t, url)] if top else []
            if len(pairs) < top_k:
                raise ScoringServerError(f"{url} lists {len(pairs)} log-probs at position {t}; expected {top_k}")
            distinct((token for _, token in pairs), t, url)
            listed.append(largest(pairs, top_k))
            known = {k: v for v, k in (_pair(e, t, url) for e in _triples(asked[t], t, url))} if asked else {}
            if missing := [c for c in candidate_ids or () if c not in known]:
                raise ScoringServerError(f"{url} gives no log-prob of candidates {missing[:5]} at position {t}")
            candidates.append([known[c] for c in candidate_ids or ()])
        return listed_row(labels, listed, top_k, None if candidate_ids is None else candidates, self.vocab_size, url)


def _scoring(top_k: int, candidate_ids: Sequence[int] | None) -> dict[str, Any]:
    """The part of a request that asks for numbers of the input and for no new token."""
    body: dict[str, Any] = {
        "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        "return_logprob": True,
        # the default tells log-probs of new tokens alone
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
    }
    return body if not candidate_ids else {**body, "token_ids_logprob": sorted(set(candidate_ids))}


def _list(meta: dict[str, Any], name: str, url: str, length: int | None = None) -> list[Any]:
    value = meta.get(name)
    if not isinstance(value, list) or (length is not None and len(value) != length):
        found = f"{len(value)} positions" if isinstance(value, list) else repr(value)
        raise ScoringServerError(f"{url} answers {found} in meta_info.{name} for a row of {length} tokens")
    return value


def _triples(entry: Any, position: int, url: str) -> list[Any]:
    if not isinstance(entry, list):
        raise ScoringServerError(f"{url} answers {entry!r} at position {position}; only position 0 may be null")
    return entry


def _pair(entry: Any, position: int, url: str) -> tuple[float, int]:
    """Log-prob and id of ``[logprob, id, text]``."""
    try:
        return number(entry[0]), token_id(entry[1])
    except (TypeError, ValueError, IndexError, KeyError) as error:
        raise ScoringServerError(
            f"{url} answers {str(entry)[:80]!r} at position {position}; expected [logprob, id, text] with a number first "
            "(only position 0 may be null)"
        ) from error
