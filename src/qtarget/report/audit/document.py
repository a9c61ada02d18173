"""All checks of a data set before training, put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.command import command_for
from qtarget.core.errors import DataError
from qtarget.data.checks.audit import audit_rows
from qtarget.data.checks.findings import Finding, in_order
from qtarget.data.checks.text import check_texts
from qtarget.data.checks.tokens import Vocabulary, check_roles, check_tokens
from qtarget.data.checks.weights import check_weights
from qtarget.data.columns import parsed_weight
from qtarget.report.audit.advice import Advice, facts_of, which_target
from qtarget.report.audit.compared import Compared
from qtarget.report.audit.noise import check_noise, knows_rows
from qtarget.report.audit.prior import check_prior
from qtarget.report.audit.scored import check_coverage, score_from_cache
from qtarget.report.audit.witness import check_witness
from qtarget.scoring.cache.reader import ReferenceCache


@dataclass(frozen=True)
class DataAudit:
    """What ``qtarget audit-data`` prints, and writes as JSON (``as_dict``).

    Attributes:
        rows: of the data.
        findings: errors first.
        advice: which target.
        files: of the rows; findings count rows through all of them.
    """

    rows: int
    findings: tuple[Finding, ...]
    advice: Advice
    files: tuple[str, ...] = ()

    @property
    def errors(self) -> int:
        """Findings with severity ``error``."""
        return sum(found.severity == "error" for found in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """``{"rows", "errors", "findings": [Finding.as_dict()], "which_target": Advice.as_dict()}``, and "files"."""
        return {
            "files": list(self.files),
            "rows": self.rows,
            "errors": self.errors,
            "findings": [found.as_dict() for found in self.findings],
            "which_target": self.advice.as_dict(),
        }


def audit_texts(raw: Sequence[Mapping[str, Any]], *, text_field: str = "text") -> DataAudit:
    """The checks that need no tokenizer."""
    message = (
        "tokens, masks, lengths and the base's surprise were not checked: no tokenizer; audit the config that `qtarget init` "
        "writes, or pass --model_name_or_path MODEL"
    )
    unchecked = Finding("tokens_unchecked", "info", len(raw), (), message)
    return _complete(len(raw), [*check_texts(raw, text_field=text_field), *check_weights(raw), unchecked])


def audit_unrendered(
    raw: Sequence[Mapping[str, Any]], findings: Sequence[Finding], *, text_field: str = "text"
) -> DataAudit:
    """The checks that are left where rows cannot be tokenised, for reasons that ``findings`` name."""
    message = "tokens, masks, lengths and the base's surprise were not checked: training stops before, see the errors"
    unchecked = Finding("tokens_unchecked", "info", len(raw), (), message)
    return _complete(len(raw), [*findings, *check_texts(raw, text_field=text_field), unchecked])


def audit_data(
    raw: Sequence[Mapping[str, Any]],
    whole: Sequence[Mapping[str, Any]],
    trained: Sequence[Mapping[str, Any]],
    *,
    tokenizer: Any,
    vocabulary: Vocabulary,
    max_length: int | None,
    keep_end: bool = False,
    chat_template: str | None = None,
    assistant_only: bool = False,
    text_field: str = "text",
    cache: ReferenceCache | None = None,
    witness: ReferenceCache | None = None,
    sided: bool = True,
    teacher: bool = False,
    validation: bool | None = None,
    compared: Compared | None = None,
    more: Sequence[Finding] = (),
) -> DataAudit:
    """Every check, on rows in three states; row i is the same in each.

    Args:
        raw: as the user wrote them.
        whole: tokenised, not cut: ``input_ids`` and ``labels``.
        trained: cut to ``max_length`` as training cuts them; their checksums name them in the cache.
        tokenizer, chat_template, assistant_only: as in training; for the roles of a conversation's tokens.
        cache: of the base, for what it finds surprising; None leaves those checks out.
        witness: of copies that have not seen the rows, beside ``cache``.
        sided: whether to read what lies beside the witness, which a signature does not cover.
        teacher: whether one is at hand.
        validation: whether there are validation rows to compare on; None where nobody knows.
        compared: a finished comparison of these rows and this model.
        more: findings of the caller (of the rendered rows, a cache of another model).
    """
    known = {found.check for found in more}
    findings = [
        *more,
        *audit_rows(whole, max_length=max_length, keep_end=keep_end).findings.values(),
        *check_tokens(whole, vocabulary, max_length=max_length),
        *(
            found
            for found in check_roles(raw, whole, tokenizer, chat_template=chat_template, assistant_only=assistant_only)
            if found.check not in known
        ),
        *(found for found in check_texts(raw, text_field=text_field) if found.check not in known),
    ]
    if cache is None:
        message = (
            "what the base finds surprising, which rows look bad to it and where rows agree against it were not checked: run "
            f"`{command_for('score')}`, then `{command_for('audit-data')}`"
        )
        findings.append(Finding("base_unchecked", "info", len(raw), (), message))
    elif not any(found.check == "outside_vocabulary" for found in findings):
        scored, missing = score_from_cache(trained, cache)
        findings += check_coverage(missing, len(missing) + len(scored.numbers), cache)
        weights = weights_of(raw)
        findings += (noise := check_noise(scored, vocabulary.decode, weights))
        findings += check_prior(scored, vocabulary.decode, known=knows_rows(noise))
        findings += [] if witness is None else check_witness(scored, trained, cache, witness, sided, weights)
    facts = facts_of(in_order(findings), rows=len(raw), teacher=teacher, validation=validation)
    return DataAudit(len(raw), tuple(in_order(findings)), which_target(facts, compared))


def weights_of(raw: Sequence[Mapping[str, Any]]) -> np.ndarray | None:
    """``[rows]`` the ``weight`` of each, 1 without one; None where no row has one, or one is none and another check says so.

    Example:
        >>> weights_of([{"weight": 0.5}, {"weight": None}]), weights_of([{}])
        (array([0.5, 1. ]), None)
    """
    try:
        found = [parsed_weight(row.get("weight"), "weight") for row in raw]
    except DataError:
        return None
    return None if all(one is None for one in found) else np.array([1.0 if one is None else one for one in found])


def _complete(rows: int, findings: Sequence[Finding]) -> DataAudit:
    """An audit without tokens."""
    found = tuple(in_order(findings))
    return DataAudit(rows, found, which_target(facts_of(found, rows=rows, teacher=False)))
