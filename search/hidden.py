"""Heads with a hidden layer: which width the task needs, from one training of all widths at once.

Every width and penalty is a row of one population, trained side by side (`vmap`) with the units that a row does not
have masked: one program. Each row keeps the step that was best on a held-out fifth; `search` then says which width is
enough, by the rule of one standard error, and whether any is better than a linear head beyond what chance explains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from treesurgeon.search.heads import LinearHead, checked, standard
from treesurgeon.search.tasks import CLASSIFICATION, Task

PENALTIES = (0.01, 0.3, 3.0)  # decoupled weight decay (I. Loshchilov, F. Hutter, ICLR 2019)
STEPS, EVERY = 600, 20  # of training, and between looks at what is held out
BATCH = 512
RATE = 3e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class HiddenHead:
    """`relu(x @ inner + offset) @ kernel + bias`.

    Attributes:
        inner, offset: of the hidden layer, `float[F, H]` and `float[H]`.
        kernel, bias: of the last one, `float[H, K]` and `float[K]`.
    """

    inner: Array
    offset: Array
    kernel: Array
    bias: Array

    @property
    def width(self) -> int:
        """Hidden units."""
        return self.kernel.shape[0]

    def __call__(self, x: Any) -> Array:
        """Scores `[N, K]` of features `[N, F]`."""
        return jax.nn.relu(jnp.asarray(x) @ self.inner + self.offset) @ self.kernel + self.bias


def hidden(
    x: Any, y: Any, classes: int, widths: Sequence[int], seed: int = 0, task: Task = CLASSIFICATION
) -> list[HiddenHead]:
    """A head for each width, at the penalty that is best, by the task's loss, on a fifth of the examples.

    Their order must have no meaning: the first ones are held out.

    Args:
        x: features `[N, F]`.
        y: classes `[N]`; labels, or standardised numbers, `[N, K]`.
        classes: how many there are.
        widths: of the hidden layer.
        seed: of the initial values and the batches.
        task: what the targets are for.

    Raises:
        HeadError: shapes that do not fit, or features that are not finite.
    """
    x, y = checked(x, y, np.ndim(y))
    z, centre, scale = standard(x)
    rows = [(width, penalty) for width in widths for penalty in PENALTIES]
    masks = jnp.array([np.arange(max(widths)) < width for width, _ in rows], jnp.float32)
    penalties = jnp.array([penalty for _, penalty in rows], jnp.float32)
    held = max(len(x) // 5, 1)
    train, test = ((z[held:], y[held:]), (z[:held], y[:held])) if len(x) > held else ((z, y), (z, y))
    losses, found = jax.device_get(_train(train, test, masks, penalties, jax.random.key(seed), classes, task))
    centre, scale = jax.device_get((centre, scale))
    out = []
    for i, width in enumerate(widths):
        at = i * len(PENALTIES) + int(np.nanargmin(losses[i * len(PENALTIES) : (i + 1) * len(PENALTIES)]))
        inner, offset, kernel, bias = (leaf[at] for leaf in found)
        inner = inner[:, :width] / scale[:, None]  # 0 for what never changes
        out.append(HiddenHead(inner, offset[:width] - centre @ inner, kernel[:width], bias))
    return out


@partial(jax.jit, static_argnums=(5, 6))
def _train(train: Any, test: Any, masks: Array, penalties: Array, key: Array, classes: int, task: Task) -> Any:
    """Held-out losses `[R]` and the weights `[R, …]` of every row, each at its best step."""
    (z, y), width = train, masks.shape[1]
    size = min(BATCH, len(z))

    def one(mask: Array, penalty: Array) -> Any:
        first, second, draws = jax.random.split(key, 3)
        inner = jax.nn.initializers.he_normal()(first, (z.shape[1], width))
        kernel = jax.random.normal(second, (width, classes)) / jnp.sqrt(mask.sum())
        start = (inner, jnp.zeros(width), kernel, jnp.zeros(classes))
        optimizer = optax.adamw(
            optax.cosine_decay_schedule(RATE, STEPS), weight_decay=penalty, mask=(True, False, True, False)
        )

        def loss(weights: Any, x: Array, y: Array) -> Array:
            inner, offset, kernel, bias = weights
            logits = (jax.nn.relu(x @ inner + offset) * mask) @ kernel + bias
            return task.losses(logits, y).mean()

        def step(state: Any, key: Array) -> Any:
            weights, memory = state
            at = jax.random.randint(key, (size,), 0, len(z))
            slope = jax.grad(loss)(weights, z[at], y[at])
            change, memory = optimizer.update(slope, memory, weights)
            return (optax.apply_updates(weights, change), memory), None

        def look(state: Any, keys: Array) -> Any:
            running, least, best = state
            running, _ = jax.lax.scan(step, running, keys)
            now = loss(running[0], *test)
            best = jax.tree.map(lambda new, old: jnp.where(now < least, new, old), running[0], best)
            return (running, jnp.minimum(jnp.nan_to_num(now, nan=jnp.inf), least), best), None

        keys = jax.random.split(draws, STEPS).reshape(STEPS // EVERY, EVERY)
        (_, least, best), _ = jax.lax.scan(look, ((start, optimizer.init(start)), loss(start, *test), start), keys)
        return least, best

    return jax.vmap(one)(masks, penalties)


def choose(
    linear: LinearHead, heads: Sequence[HiddenHead], x: np.ndarray, y: np.ndarray, task: Task = CLASSIFICATION
) -> HiddenHead | None:
    """The narrowest head that is as good as the best one, as far as so many examples tell; None where that is linear.

    Args:
        linear: the linear head.
        heads: from narrow to wide.
        x, y: features `[N, F]` and targets of `search`.
        task: what the targets are for.
    """
    wrong = [np.asarray(task.wrong(np.asarray(head(x)), y), float) for head in (linear, *heads)]
    best = min(wrong, key=np.sum)
    for head, own in zip((None, *heads), wrong, strict=True):
        apart = own - best
        if apart.sum() <= math.sqrt((apart**2).sum()):  # one standard error of the sum, were they equally good
            return head
    raise AssertionError("the best is as good as itself")
