"""The verdict of ``qtarget compare``: intervals over rows and seeds, one document, one page."""
