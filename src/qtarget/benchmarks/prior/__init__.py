"""``qtarget bench prior``: is a flawed prior amplified, and what does the guard mend."""
