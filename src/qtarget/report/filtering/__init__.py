"""The page of ``qtarget filter``: one document, one page."""
