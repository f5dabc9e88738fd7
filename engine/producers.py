"""Which axes of which leaves make units: the axes of kernels that survive a contraction with data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.flow import Kinds, kernel_operand, shared_kernels
from treesurgeon.engine.masks import labels
from treesurgeon.engine.rules import lookup
from treesurgeon.engine.rules.base import Axes
from treesurgeon.engine.sites import leaf_axis
from treesurgeon.engine.solve import Solution


def made_axes(analysis: Analysis, leaf_axes: Sequence[Axes]) -> set[tuple[int, int]]:
    """The (leaf number, axis) pairs along which kernels make units of a group, those inside loops included.

    Where a group stands on several axes of a kernel, the axis is followed through reshapes and transposes; where that
    does not work either, the leaf's axes are taken to end as the kernel's do.
    """
    shared = shared_kernels(analysis.program, analysis.kinds).values
    inputs = analysis.program.inputs
    out: set[tuple[int, int]] = set()

    def visit(solution: Solution, kinds: Kinds, dead: Callable[[int], bool], main: bool) -> None:
        for i, eqn in enumerate(solution.program.eqns):
            if dead(i):
                continue
            for body, inner in zip(solution.bodies.get(i, ()), kinds.bodies.get(i, ()), strict=False):
                visit(body, inner, lambda _: False, False)
            kernel, rule = kernel_operand(eqn, kinds), lookup(eqn.name)
            if kernel is None or rule is None or rule.contraction is None:
                continue
            contraction = rule.contraction(solution.site(i))
            kept = contraction.rhs_out if eqn.ins[1] == kernel else contraction.lhs_out
            axes = solution.of(kernel)
            behind = kinds.leaves[kernel] or ()
            whole = main and shared[kernel] and len(behind) == 1
            for leaf in behind:
                for d in kept:
                    held = [k for k, axis in enumerate(leaf_axes[leaf]) if labels(axis) & labels(axes[d])]
                    if len(held) > 1:
                        exact = leaf_axis(solution, kernel, inputs[leaf], d) if whole else None
                        last = d + len(leaf_axes[leaf]) - len(axes)
                        held = [exact] if exact is not None else [k for k in held if k == last] or held
                    out.update((leaf, k) for k in held)

    visit(analysis.solution, analysis.kinds, lambda i: analysis.uses.eqns[i] is None, True)
    return out
