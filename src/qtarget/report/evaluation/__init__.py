"""The verdict of ``qtarget evaluate``: one document, one page."""
