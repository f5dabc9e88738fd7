"""The dense layers between the last pool and the head, which are about the classes that a model was trained on."""

from __future__ import annotations

from typing import NamedTuple

from treesurgeon.engine.analysis import Analysis
from treesurgeon.engine.flow import kernel_leaves, kernel_operand
from treesurgeon.engine.jaxprs import Operand, is_float
from treesurgeon.engine.retrace import Retraced
from treesurgeon.engine.sites import live_eqns

SCALINGS = {"mul", "div", "select_n"}  # what dropout is made of


class Stack(NamedTuple):
    """Dense layers that follow each other.

    Attributes:
        value: what feeds them.
        module: that of the first one.
        kernels: their paths.
    """

    value: int
    module: str
    kernels: tuple[str, ...]


def find_stack(found: Retraced) -> Stack | None:
    """The dense layers between the last pool and the head, if there are any.

    A pool is what takes a value with spatial axes, behind the first contraction, to one without them. What feeds the
    stack is the pool's input, which is then averaged, where that is only flattened (and dropout follows, in training).
    """
    analysis = found.analysis
    program, kinds, signal = analysis.program, analysis.kinds, signal_of(analysis)

    def spatial(v: Operand) -> bool:
        return v in signal and sum(n != 1 for n in program.aval(v).shape[1:]) > 1

    live = live_eqns(analysis)
    layers = [i for i in live if kernel_leaves(program, i, kinds)]
    pools = [i for i in live if any(map(spatial, program.eqns[i].ins)) and not any(map(spatial, program.eqns[i].outs))]
    dense = [i for i in layers if pools and i > pools[-1] > layers[0]][:-1]  # the last one is the head
    if not dense or any(program.eqns[i].bodies for i in dense):
        return None
    first = program.eqns[dense[0]]
    value = next(v for v in first.ins if v != kernel_operand(first, kinds))
    pool = program.eqns[pools[-1]]
    if pool.name == "reshape" and _unscaled(analysis, signal, value) in pool.outs:
        value = pool.ins[0]
    assert isinstance(value, int)
    leaves = [min(kernel_leaves(program, i, kinds)) for i in dense]
    return Stack(value, analysis.modules[leaves[0]], tuple(found.paths[leaf] for leaf in leaves))


def _unscaled(analysis: Analysis, signal: set[int], v: Operand) -> Operand:
    """What a value was before each entry got a factor, or a zero in its place, that does not depend on it."""
    program, makers = analysis.program, analysis.solution.makers
    while isinstance(v, int) and v in makers:
        eqn = program.eqns[makers[v]]
        carried = [w for w in eqn.ins if w in signal]
        if eqn.name not in SCALINGS or len(carried) != 1 or program.aval(carried[0]).shape != program.aval(v).shape:
            break
        v = carried[0]
    return v


def signal_of(analysis: Analysis) -> set[int]:
    """The values that carry activations, as in blocks.py: from floating-point inputs, or parameters had a part in."""
    program, kinds = analysis.program, analysis.kinds
    out = {v for v in program.inputs if kinds.data[v] and is_float(program.avals[v])}
    for eqn in program.eqns:
        if any(v in out for v in eqn.ins) or any(kinds.of(v)[1] for v in eqn.ins):
            out |= {v for v in eqn.outs if kinds.data[v] and is_float(program.avals[v])}
    return out
