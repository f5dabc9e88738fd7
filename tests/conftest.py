"""Tests compile thousands of small programs and run each a few times: compile them quickly, and the same ones once."""

import os
import tempfile

import quick

quick.settle()
KEPT = "JAX_COMPILATION_CACHE_DIR"  # set it to keep what was compiled for the next time
if KEPT not in os.environ:
    directory = tempfile.TemporaryDirectory(prefix="treesurgeon-compiled-", ignore_cleanup_errors=True)
    os.environ[KEPT] = directory.name  # other processes read it too: those that share the tests, and those they start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
