"""Checks of rows before anything is trained on them: as text, as tokens, and what an audit says."""
