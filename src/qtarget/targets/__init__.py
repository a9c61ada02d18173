"""One published target per file. The file name is the name: ``targets/dft.py``, ``DFT``, ``--target dft``."""
