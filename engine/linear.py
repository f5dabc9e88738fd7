"""Contractions with a kernel as plain products of matrices: what a least-squares fit of the kernel needs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax

from treesurgeon.engine.jaxprs import Eqn

Choose = Callable[[int], np.ndarray]  # how many rows there are -> those to look at


class Linear(Protocol):
    """A contraction of data with a kernel, as one product of matrices for each group of a grouped convolution."""

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's axes that the result has, in the result's order."""
        ...

    def places(self, rank: int) -> tuple[int, ...]:
        """The axes of a result of this rank that are `outputs`."""
        ...

    def features(self, x: Any, kernel: Any, choose: Choose) -> Any:
        """Rows of what is multiplied with the kernel: `[groups, rows, inputs]`."""
        ...

    def results(self, y: Any) -> Any:
        """The result as rows: `[rows, outputs]`, group by group."""
        ...

    def matrices(self, kernel: Any) -> Any:
        """The kernel: `[groups, inputs, outputs of the group]`."""
        ...

    def kernel(self, matrices: Any, like: Any) -> Any:
        """The inverse of `matrices`, in the layout of the kernel `like`."""
        ...


def linear(eqn: Eqn, kernel_at: int, params: Mapping[str, Any], shape: Sequence[int]) -> Linear | None:
    """An equation with a kernel of this shape as products of matrices, if it is one that can be seen so."""
    if eqn.name == "dot_general" and not any(params["dimension_numbers"][1]):
        return Dot(kernel_at, params["dimension_numbers"][0], len(shape))
    if eqn.name == "conv_general_dilated" and kernel_at == 1 and params["batch_group_count"] == 1:
        return Convolution(params)
    return None


@dataclass(frozen=True)
class Dot:
    """A `dot_general` without batch axes."""

    kernel_at: int
    summed: tuple[tuple[int, ...], tuple[int, ...]]
    rank: int

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's axes that the result has."""
        return tuple(d for d in range(self.rank) if d not in self.summed[self.kernel_at])

    def places(self, rank: int) -> tuple[int, ...]:
        """The last ones, or the first where the kernel is the left operand."""
        n = len(self.outputs)
        return tuple(range(n)) if self.kernel_at == 0 else tuple(range(rank - n, rank))

    def features(self, x: Any, kernel: Any, choose: Choose) -> Any:
        """The data's other axes as rows."""
        summed = self.summed[1 - self.kernel_at]
        rows = x.transpose(*(d for d in range(x.ndim) if d not in summed), *summed)
        rows = rows.reshape(-1, math.prod(x.shape[d] for d in summed))
        return rows[choose(len(rows))][None]

    def results(self, y: Any) -> Any:
        """The kernel's axes come last, or first where the kernel is the left operand."""
        n = len(self.outputs)
        if self.kernel_at == 0:
            y = y.transpose(*range(n, y.ndim), *range(n))
        return y.reshape(-1, math.prod(y.shape[y.ndim - n :]))

    def matrices(self, kernel: Any) -> Any:
        """Summed axes first."""
        order = (*self.summed[self.kernel_at], *self.outputs)
        inputs = math.prod(kernel.shape[d] for d in self.summed[self.kernel_at])
        return kernel.transpose(order).reshape(1, inputs, -1)

    def kernel(self, matrices: Any, like: Any) -> Any:
        """Axes back in their places."""
        order = (*self.summed[self.kernel_at], *self.outputs)
        return matrices.reshape([like.shape[d] for d in order]).transpose(np.argsort(order))


@dataclass(frozen=True)
class Convolution:
    """A `conv_general_dilated`: windows are cut out of the padded input by strided slices."""

    params: Mapping[str, Any]

    @property
    def outputs(self) -> tuple[int, ...]:
        """The kernel's output features."""
        return (self.params["dimension_numbers"].rhs_spec[0],)

    def places(self, rank: int) -> tuple[int, ...]:
        """The axis of features."""
        return (self.params["dimension_numbers"].out_spec[1],)

    def features(self, x: Any, kernel: Any, choose: Choose) -> Any:
        """The windows of the input."""
        p, spec = self.params, self.params["dimension_numbers"]
        x = x.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
        edges = zip(p["padding"], p["lhs_dilation"], strict=True)
        x = lax.pad(x, np.zeros((), x.dtype), [(0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in edges), (0, 0, 0)])
        window = [kernel.shape[d] for d in spec.rhs_spec[2:]]
        reach = [(k - 1) * d for k, d in zip(window, p["rhs_dilation"], strict=True)]
        strides = p["window_strides"]
        counts = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
        chosen = choose(x.shape[0] * math.prod(counts))
        number, *place = np.unravel_index(chosen, (x.shape[0], *counts))
        first = number  # of each window, in the input's places counted through
        for at, stride, size in zip(place, strides, x.shape[1:-1], strict=True):
            first = first * size + at * stride
        flat = x.reshape(-1, x.shape[-1])
        taps = []
        for tap in itertools.product(*map(range, window)):
            offset = 0
            for t, d, size in zip(tap, p["rhs_dilation"], x.shape[1:-1], strict=True):
                offset = offset * size + t * d
            taps.append(flat[first + offset])
        groups = p["feature_group_count"]
        rows = jnp.stack(taps, 1).reshape(len(chosen), len(taps), groups, -1)
        return rows.transpose(2, 0, 1, 3).reshape(groups, len(chosen), -1)

    def results(self, y: Any) -> Any:
        """Features last."""
        spec = self.params["dimension_numbers"].out_spec
        return y.transpose(spec[0], *spec[2:], spec[1]).reshape(-1, y.shape[spec[1]])

    def matrices(self, kernel: Any) -> Any:
        """Places of the window, then input features."""
        spec, groups = self.params["dimension_numbers"].rhs_spec, self.params["feature_group_count"]
        wide = kernel.transpose(*spec[2:], spec[1], spec[0])
        wide = wide.reshape(-1, groups, wide.shape[-1] // groups)
        return wide.transpose(1, 0, 2)

    def kernel(self, matrices: Any, like: Any) -> Any:
        """Axes back in their places."""
        spec = self.params["dimension_numbers"].rhs_spec
        order = (*spec[2:], spec[1], spec[0])
        return matrices.transpose(1, 0, 2).reshape([like.shape[d] for d in order]).transpose(np.argsort(order))
