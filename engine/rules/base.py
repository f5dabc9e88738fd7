"""What a rule is, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from treesurgeon.engine.aligning import unify
from treesurgeon.engine.axes import Axis, Fixed, Reason, Size, pin, resolve
from treesurgeon.engine.jaxprs import Eqn

Axes: TypeAlias = tuple[Axis, ...]


@dataclass(frozen=True, eq=False)
class Site:
    """An equation as its rule sees it: parameters, shapes, and the axes of its operands (and results, once known).

    `known` gives an operand that depends on nothing as an array, None for others.
    """

    eqn: Eqn
    params: Mapping[str, Any]
    ins: Sequence[Axes]
    in_shapes: Sequence[tuple[Size, ...]]
    out_shapes: Sequence[tuple[Size, ...]]
    outs: Sequence[Axes] = ()
    known: Callable[[int], np.ndarray | None] = lambda _: None

    def why(self, text: str) -> Reason:
        """A reason for pinning that names this equation's source line."""
        return Reason(text, self.eqn.where)

    def unify(self, a: Axis, b: Axis, text: str) -> None:
        """State that two axes keep the same positions; the reason is only made where that is news."""
        a, b = resolve(a), resolve(b)
        if a is not b and not (isinstance(a, Fixed) and isinstance(b, Fixed)):
            unify(a, b, self.why(text))


class Mix(NamedTuple):
    """An operand whose axes `dims` are mixed: removed positions must first hold the operation's identity."""

    operand: int
    dims: tuple[int, ...]
    identity: str  # a key of IDENTITIES


class Contraction(NamedTuple):
    """Sums of products of two operands over the paired axes `lhs` and `rhs`.

    `lhs_out` and `rhs_out` say which axis of the result each remaining axis becomes; `extra` counts the products a
    result element sums besides those (a convolution's window).
    """

    lhs: tuple[int, ...]
    rhs: tuple[int, ...]
    lhs_out: Mapping[int, int]
    rhs_out: Mapping[int, int]
    extra: int = 1


class Kept(NamedTuple):
    """How many positions of an axis a plan keeps, and which, for rules whose parameters hold sizes."""

    size: Callable[[Axis], Size]
    mask: Callable[[Axis], np.ndarray | None]


@dataclass(frozen=True)
class Rule:
    """How a primitive relates axes.

    `axes` unifies the operands' axes and returns the results'. `resize` gives the parameters at a plan's sizes (left
    out where no parameter holds a size). `mixes` lists what is mixed; `contraction` does so for sums of products.
    `positional` results depend on where a position stands (random bits): they are made wide and sliced. `spreads`
    lists the axes of the result along which an operand's values are spread, whose derivative is a sum along them;
    `broadcasts` says that operands may be spread along axes of size 1. `renumber` gives the operands where some of
    them are constant positions, counted in those that a plan keeps.
    """

    axes: Callable[[Site], list[Axes]]
    resize: Callable[[Site, Kept], dict[str, Any]] | None = None
    mixes: Callable[[Site], list[Mix]] | None = None
    contraction: Callable[[Site], Contraction] | None = None
    positional: bool = False
    spreads: Callable[[Site], Sequence[int]] | None = None
    broadcasts: bool = False
    renumber: Callable[[Site, Kept, list[Any]], list[Any]] | None = None


_RULES: dict[str, Rule] = {}


def register(name: str, rule: Rule) -> None:
    """Give the primitive called `name` a rule; a later one replaces an earlier one."""
    _RULES[name] = rule


def lookup(name: str) -> Rule | None:
    """The rule of the primitive called `name`, if it has one."""
    return _RULES.get(name)


def fixed_axes(shape: Sequence[Size], why: Reason) -> Axes:
    """An axis for each size, none of which may change."""
    return tuple(Fixed(n, why) for n in shape)


def pin_all(site: Site, text: str) -> list[Axes]:
    """Pin every axis that an equation touches."""
    why = site.why(text)
    for operand in site.ins:
        for axis in operand:
            pin(axis, why)
    return [fixed_axes(shape, why) for shape in site.out_shapes]


def identity(kind: str, dtype: Any) -> Any:
    """The identity element of a reduction, as a scalar of the dtype."""
    if kind == "zero":
        return np.zeros((), dtype)
    if kind == "one":
        return np.ones((), dtype)
    if dtype == np.bool_:
        return np.asarray(kind != "lowest")
    if kind == "bits":
        return np.bitwise_not(np.zeros((), dtype))
    sign = -1 if kind == "lowest" else 1
    if not jnp.issubdtype(dtype, jnp.integer) and np.isinf(infinite := np.asarray(sign * np.inf, dtype)):
        return infinite
    info = jnp.iinfo(dtype) if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype)
    return np.asarray(info.min if kind == "lowest" else info.max).astype(dtype)


IDENTITIES = ("zero", "one", "lowest", "highest", "bits")  # `bits`: all of them set
