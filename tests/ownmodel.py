"""A model of the user's own, in a file of a directory that commands are run in."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp


def own_model(home: Path, text: str, shape: tuple[int, ...], name: str = "mine") -> None:
    """Write a file, whose module is `Tiny`, and an Orbax checkpoint of random weights beside it.

    Tests that import it themselves need a name of their own: a process imports one file of a name.
    """
    (home / f"{name}.py").write_text(text)
    namespace: dict = {}
    exec(compile(text, f"{name}.py", "exec"), namespace)
    variables = namespace["Tiny"]().init(jax.random.key(0), jnp.zeros((1, *shape)))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
