"""The demo, the same in a plain loop, and what they share."""

import os

# OpenMP's threads spin at every barrier: beside other work that made a step 40 times slower. Read when torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # a few microseconds: libgomp
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # milliseconds: LLVM's and Intel's
