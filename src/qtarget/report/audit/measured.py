"""What the committed measurements say of one target against plain sft: where it won, where it lost, where nothing shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qtarget.report.audit.evidence import evidence

SHOWN = 3
"""Places that are named; the others are counted."""


def measured(target: str) -> dict[str, Any]:
    """Everything in ``evidence.json`` about a target.

    Returns:
        ``to_sft``: a list of file, what was measured, seeds, and the places ``won``, ``lost`` and ``undecided`` (95 % interval of
        the difference above, below or across 0), each with its mean and interval in points; ``flawed_prior``: the share of a
        planted flaw that it corrects, beside sft's and its own under guard. Both are empty where it was never measured.
    """
    maps = [found for known in evidence()["to_sft"] if (found := _against_sft(known, target))["places"]]
    known = evidence()["flawed_prior"]
    flaws = [
        {"where": flaw["where"]}
        | {
            name: flaw["corrected_percent"][key]
            for name, key in _columns(target).items()
            if key in flaw["corrected_percent"]
        }
        for flaw in known["flaws"]
        if target in flaw["corrected_percent"]
    ]
    return {
        "to_sft": maps,
        "flawed_prior": {"file": known["file"], "seeds": known["seeds"], "flaws": flaws} if flaws else {},
    }


def _columns(target: str) -> dict[str, str]:
    return {"sft": "sft", target: target, "guarded": f"{target}, guarded"}


def _against_sft(known: Mapping[str, Any], target: str) -> dict[str, Any]:
    places = [
        {"where": place["where"], "points": place["points"][target]}
        for place in known["places"]
        if target in place["points"]
    ]
    kinds = {
        "won": [place for place in places if place["points"][1] > 0],
        "lost": [place for place in places if place["points"][2] < 0],
    }
    kinds["undecided"] = [place for place in places if place["points"][1] <= 0 <= place["points"][2]]
    return {key: known[key] for key in ("file", "what", "seeds")} | {"places": len(places)} | kinds


def sentences(found: Mapping[str, Any]) -> list[str]:
    """``measured`` in words, a sentence a fact."""
    out = []
    for part in found["to_sft"]:
        out.append(f"{part['what']} ({part['file']}, {part['seeds']} seeds, {part['places']} places), against sft:")
        for kind, best_first in (("won", True), ("lost", False)):
            if part[kind]:
                out.append(f"  {kind} at {len(part[kind])}: {_named(part[kind], best_first)}")
        if part["undecided"]:
            out.append(f"  no difference that the seeds can show at {len(part['undecided'])}")
    flawed = found["flawed_prior"]
    if flawed:
        out.append(f"a confident flaw of the base ({flawed['file']}, {flawed['seeds']} seeds), share of it corrected:")
        for flaw in flawed["flaws"]:
            shares = ", ".join(f"{name} {value:.0f} %" for name, value in flaw.items() if name != "where")
            out.append(f"  {flaw['where']}: {shares}")
    return out


def _named(places: Sequence[Mapping[str, Any]], best_first: bool) -> str:
    ordered = sorted(places, key=lambda place: place["points"][0], reverse=best_first)
    named = [
        f"{place['points'][0]:+.1f} points ({place['points'][1]:+.1f} .. {place['points'][2]:+.1f}), {place['where']}"
        for place in ordered[:SHOWN]
    ]
    return "; ".join(named) + ("; ..." if len(ordered) > SHOWN else "")
