"""``qtarget audit-data``: what the base says of the rows, and which target the evidence supports."""
