"""Tests compile thousands of small programs and run each a few times: compile them quickly instead of well."""

import os

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
