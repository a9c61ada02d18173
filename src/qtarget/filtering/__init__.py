"""Which rows teach and which only harm: evidence a row, whether it separates two kinds at all, and what to keep.

From arrays to a decision::

    rows = ScoredRows.of(ids, masks, label_log_probs, entropy)     # one array a row each, from tokens and a cache
    decision = decide(rows, "auto")                                # or {"rule": "surprise", "keep": 0.6}
    decision.keep, decision.posterior, decision.verdict, decision.threshold, decision.summary

For a loaded config there is ``qtarget.cli.filter.decide_config(config, wanted) -> Filtered(decision, rows)``: it needs the
config's ``reference_cache`` (scored already), loads no model, and names in ``rows.numbers`` the judged rows of the training
data set (``load_datasets(config)[0]``) in the order of ``decision.keep``. A row without a trained token is not among them.

Who only wants a filtered run needs neither: ``filter: auto`` in the config (``QTargetConfig(filter="auto",
reference_cache=...)``) leaves the rows out after the cache is attached, so one cache serves filtered and unfiltered runs;
``trainer.preparation.filtered`` is the decision's record.
"""

from qtarget.filtering.decision import RULES, Decision, Filter, decide
from qtarget.filtering.evidence import WITNESSES, ScoredRows, Witness

__all__ = ["RULES", "WITNESSES", "Decision", "Filter", "ScoredRows", "Witness", "decide"]
