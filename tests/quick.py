"""Settings under which tests compile quickly instead of well; read when jax is imported and makes its first array."""

import os
from importlib.metadata import version

OLD = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)
FLAGS = "--xla_cpu_use_fusion_emitters=false" if OLD else ""  # an XLA that does not know a flag ends the process


def settle() -> None:
    """Set what is not set."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    os.environ.setdefault("XLA_FLAGS", FLAGS)
