"""A frozen model behind HTTP: ``qtarget serve`` on mosec, and the source that asks it.

::

    client -> gateway (token, size, /info, /metrics) -> mosec: Ingest -> Score -> Egress
                  |                                        ^
              supervisor: starts it, notices crashes and hangs, starts it again
"""
