"""A model of the user's own, in a file of a directory that commands are run in."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


def own_model(home: Path, text: str, shape: tuple[int, ...]) -> None:
    """Write `mine.py`, whose module is `Tiny`, and an Orbax checkpoint of random weights beside it."""
    (home / "mine.py").write_text(text)
    namespace: dict = {}
    exec(compile(text, "mine.py", "exec"), namespace)
    variables = namespace["Tiny"]().init(jax.random.key(0), jnp.zeros((1, *shape)))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
