"""Programs that once broke a law, most of them found by `fuzz.py` and made small: more odd programs, as in `zoo.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from laws import Subject, arr
from zoo import Case

REGRESSIONS: dict[str, Case] = {}


def case(params: Any, *args: Any, **kw: Any):
    """Register a function, as in `zoo.py`."""

    def add(fn: Callable) -> Callable:
        assert fn.__name__ not in REGRESSIONS
        REGRESSIONS[fn.__name__] = Case(Subject(fn.__name__, fn, params, args, kw))
        return fn

    return add


@case({"a": arr(5, 6)}, arr(3, 5))
def argsort_over_the_batch(p, x):
    return jnp.argsort(x @ p["a"], axis=0).sum(1)


@case({"a": arr(5, 6), "b": arr(5, 6)}, arr(3, 5))
def sort_carries_another_group(p, x):
    return lax.sort_key_val(x @ p["a"], x @ p["b"], dimension=0)[1].sum(1)


@case({"a": arr(5, 6)}, arr(3, 5))
def complex_mean(p, x):
    return jnp.abs((x @ p["a"] + 1j).mean(1))


@case({"a": arr(5, 6), "b": arr(6, 6)}, arr(3, 5))
def block_before_stop_gradient(p, x):
    """A `while` has no derivative: one that flows past the block would be asked for."""
    u = x @ p["a"]
    v = lax.stop_gradient(u + jnp.tanh(u @ p["b"]))
    return lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, v + s[1]), (0, v))[1].sum(1)


@case({"a": arr(4, 4)}, arr(2, 4))
def mask_of_the_input(p, x):
    """The mask is no signal, yet x reaches the result through it as well."""
    return jnp.where(x > 0, jnp.sin(x @ p["a"]), 0.5).max(1)


@case({"a": arr(4, 4)}, arr(2, 4))
def cond_on_the_input(p, x):
    h = jnp.tanh(x)
    return lax.cond(h.sum() > 0, lambda a: a @ p["a"], lambda a: a * 0.5, h).max(1)
