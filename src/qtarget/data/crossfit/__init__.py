"""Rows judged by copies that have not seen them: who judges whom, and what follows from what they say."""
