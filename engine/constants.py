"""What a program computes from nothing: tables, indices, bases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from treesurgeon.engine.flow import is_contraction
from treesurgeon.engine.jaxprs import Eqn, Literal, Program, bind, is_key, is_sized, standing_at


def _broadcast(eqn: Eqn, x: np.ndarray) -> np.ndarray:
    shape, dims = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    wide = [1] * len(shape)
    for d, n in zip(dims, x.shape, strict=True):
        wide[d] = n
    return np.broadcast_to(x.reshape(wide), shape)


# What indices go through: each would be a program to compile for every shape, which takes longer than all the rest.
BY_HAND: dict[str, Callable[..., np.ndarray]] = {
    "lt": lambda _, a, b: a < b,
    "add": lambda _, a, b: a + b,
    "select_n": lambda _, which, *cases: np.choose(which.astype(int), cases),
    "convert_element_type": lambda _, x: x,
    "broadcast_in_dim": _broadcast,
}


class Constants:
    """The values of a program that depend on nothing: made when something reads them.

    `makers` has the equation that computes each value, `known` those at hand, which is added to.
    """

    def __init__(self, program: Program, makers: Mapping[int, int], known: dict[int, Any]):
        self.program, self.makers, self.known = program, makers, known
        self.env: dict[int, Any] = dict(program.consts)

    def traced(self, v: int) -> Any:
        """The value, computed where it is needed: XLA folds and fuses it; products of constants are computed here."""
        eqns = self.program.eqns
        missing = self._missing(v, self.env)
        if any(is_contraction(eqns[i]) for i in missing) and (known := self.concrete(v)) is not None:
            self.env[v] = known
            return known
        for i in missing:
            eqn = eqns[i]
            with standing_at(eqn):
                self.env.update(zip(eqn.outs, bind(eqn, eqn.params, self._read(eqn, self.env)), strict=True))
        return self.env[v]

    def concrete(self, v: int) -> np.ndarray | jax.Array | None:
        """The value as an array at hand; None where the program belongs to a trace under way or has symbolic sizes."""
        known = self.known
        for i in self._missing(v, known):
            eqn = self.program.eqns[i]
            avals = [self.program.avals[w] for w in eqn.outs]
            values = self._read(eqn, known)
            if any(isinstance(x, Tracer) for x in values) or any(not is_sized(aval) for aval in avals):
                return None
            if eqn.name == "pvary":  # of what is the same everywhere; see `varying_alike`
                known[eqn.outs[0]] = values[0]
                continue
            if eqn.name in BY_HAND and all(self.program.aval(w).dtype.kind in "iub" for w in eqn.ins):
                found = BY_HAND[eqn.name](eqn, *map(np.asarray, values))
                known[eqn.outs[0]] = np.asarray(found).astype(avals[0].dtype)
                continue
            with jax.ensure_compile_time_eval():
                known.update(zip(eqn.outs, bind(eqn, eqn.params, values), strict=True))
        return None if isinstance(known[v], Tracer) else known[v] if is_key(known[v]) else np.asarray(known[v])

    @staticmethod
    def _read(eqn: Eqn, env: Mapping[int, Any]) -> list[Any]:
        return [v.value if isinstance(v, Literal) else env[v] for v in eqn.ins]

    def inputs(self, v: int) -> list[int]:
        """The inputs of the program that a value is computed from and that are not known."""
        return [w for w in self._behind(v, self.known) if w not in self.makers]

    def _missing(self, v: int, env: Mapping[int, Any]) -> list[int]:
        """The equations to run, in order, before `v` is known."""
        return sorted({self.makers[w] for w in self._behind(v, env)})

    def _behind(self, v: int, env: Mapping[int, Any]) -> set[int]:
        """The values that must be known before `v` is, and that are not."""
        found: set[int] = set()
        todo = [v]
        while todo:
            w = todo.pop()
            if w not in env and w not in found:
                found.add(w)
                if w in self.makers:
                    todo += [u for u in self.program.eqns[self.makers[w]].ins if isinstance(u, int)]
        return found
