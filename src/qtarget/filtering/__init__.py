"""Which rows teach and which only harm: evidence a row, whether it separates two kinds at all, and what to keep.

Three doors, from data to decision::

    evidence = qtarget.filtering.row_evidence(ids, masks, label_log_probs)      # numbers a row, from tokens and a cache
    decision = qtarget.filtering.decide(evidence, "auto")                       # keep, posterior, verdict, threshold
    found = qtarget.cli.filter.decide_config(config, "auto")                    # the same for a loaded RunConfig

``decide_config(config: RunConfig, rule: str | dict = config.training.filter) -> Filtered`` needs the config's
``reference_cache`` (scored already), loads no model except for ``gain``, and returns ``Filtered(decision, rows, evidence)``:
``rows`` are the numbers of the judged rows in the training data set (``load_datasets(config)[0]``), in the order of
``decision.keep``. A row without a trained token is not among them. ``dataset.select(found.kept)`` is the filtered data set.

Who only wants a filtered run needs neither: ``filter: auto`` in the config (or ``QTargetConfig(filter="auto",
reference_cache=...)``) leaves the rows out after the cache is attached, so one cache serves filtered and unfiltered runs.
"""
