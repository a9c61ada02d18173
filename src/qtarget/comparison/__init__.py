"""Which target, and does it help: contenders trained alike on the user's rows, tuned and judged on different ones."""
