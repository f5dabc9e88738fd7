"""ONNX's nodes for JAX's primitives: one row of `RULES` each; see onnx.py."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from treesurgeon.engine.jaxprs import Eqn, Program

INPUT, BATCH = "x", "batch"
WHOLE = np.iinfo(np.int64).max  # the end of a slice that runs to the end

Value = Any  # a numpy array where it is known, else the name of an ONNX value


class Writer:
    """Nodes and constants of an ONNX graph, and the primitives that have no translation."""

    def __init__(self, onnx: Any):
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.missing: dict[str, str] = {}
        self.count = 0

    def kind(self, dtype: Any) -> int:
        """ONNX's number of a dtype."""
        return self.onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))

    def name_of(self, value: Value) -> str:
        """The name of a value; one that is known becomes a constant."""
        if isinstance(value, str):
            return value
        self.count += 1
        self.constants.append(self.onnx.numpy_helper.from_array(np.array(value, order="C"), f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, ins: Sequence[Value], name: str = "", **attributes: Any) -> str:
        """Append a node of one output; returns the output's name."""
        self.count += 1
        out = name or f"v{self.count}"
        self.nodes.append(self.onnx.helper.make_node(op, [self.name_of(v) for v in ins], [out], **attributes))
        return out

    def refuse(self, eqn: Eqn, why: str) -> list[str]:
        """Report an equation whose parameters have no translation."""
        self.missing.setdefault(f"{eqn.name} with {why}", eqn.where)
        return [INPUT] * len(eqn.outs)

    def transpose(self, value: Value, perm: Sequence[int]) -> Value:
        """Axes in another order."""
        if isinstance(value, str):
            return value if list(perm) == sorted(perm) else self.node("Transpose", [value], perm=list(perm))
        return np.transpose(value, perm)

    def reshape(self, value: Value, shape: Sequence[Any]) -> str:
        """At most one axis of the shape may depend on the batch."""
        return self.node("Reshape", [value, np.array([d if isinstance(d, int) else -1 for d in shape], np.int64)])

    def expand(self, value: Value, shape: Sequence[Any]) -> str:
        """Repeat along axes of size 1; those that depend on the batch must be the batch itself."""
        if not all(isinstance(d, int) for d in shape):
            batch = self.node("Shape", [INPUT], start=0, end=1)
            parts = [np.array([d], np.int64) if isinstance(d, int) else batch for d in shape]
            return self.node("Expand", [value, self.node("Concat", parts, axis=0)])
        return self.node("Expand", [value, np.array(shape, np.int64)])


Rule = Callable[..., Any]  # (writer, equation, its program, *operands) -> a name, or one for each result


def _op(op: str) -> Rule:
    return lambda w, eqn, program, *ins: w.node(op, ins)


def _with(op: str, make: Callable[[Any], Value], first: bool = False) -> Rule:
    """`op(x, constant)`, or the other way round, for a constant made from the dtype."""

    def rule(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
        one = np.asarray(make(eqn), program.aval(eqn.outs[0]).dtype)
        return w.node(op, [one, x] if first else [x, one])

    return rule


def _chain(*ops: Rule) -> Rule:
    def rule(w: Writer, eqn: Eqn, program: Program, *ins: Value) -> Any:
        for op in ops:
            ins = (op(w, eqn, program, *ins),)
        return ins[0]

    return rule


def _reduce(op: str) -> Rule:
    return lambda w, eqn, program, x: w.node(op, [x, np.array(eqn.params["axes"], np.int64)], keepdims=0)


def _reduce_logical(op: str) -> Rule:
    def rule(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
        found = w.node(op, [w.node("Cast", [x], to=w.kind("int32")), np.array(eqn.params["axes"])], keepdims=0)
        return w.node("Cast", [found], to=w.kind(bool))

    return rule


def _argument(op: str) -> Rule:
    def rule(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
        found = w.node(op, [x], axis=eqn.params["axes"][0], keepdims=0)
        return w.node("Cast", [found], to=w.kind(eqn.params["index_dtype"]))

    return rule


def _reshape(w: Writer, eqn: Eqn, program: Program, x: Value) -> Any:
    shape = program.aval(eqn.outs[0]).shape
    if sum(not isinstance(d, int) for d in shape) > 1:
        return w.refuse(eqn, "two axes that depend on the batch")
    return w.reshape(x, shape)


def _broadcast(w: Writer, eqn: Eqn, program: Program, x: Value) -> Any:
    shape, places = program.aval(eqn.outs[0]).shape, eqn.params["broadcast_dimensions"]
    enters = program.aval(eqn.ins[0]).shape
    fitted = [1] * len(shape)
    for axis, size in zip(places, enters, strict=True):
        fitted[axis] = size
    wider = [axis for axis, size in enumerate(shape) if fitted[axis] is not size and fitted[axis] != size]
    if any(not isinstance(shape[axis], int) and str(shape[axis]) != BATCH for axis in wider):
        return w.refuse(eqn, "an axis that is a multiple of the batch")
    out = w.reshape(x, fitted)
    return w.expand(out, shape) if wider else out


def _slice(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
    steps = eqn.params["strides"] or (1,) * len(eqn.params["start_indices"])
    rows = zip(eqn.params["start_indices"], eqn.params["limit_indices"], program.aval(eqn.ins[0]).shape, strict=True)
    ends = [(start, WHOLE if end is size or end == size else end) for start, end, size in rows]
    return _sliced(w, x, ends, steps)


def _sliced(w: Writer, x: Value, ends: Sequence[tuple[int, int]], steps: Sequence[int]) -> str:
    table = np.array([(*end, axis, step) for axis, (end, step) in enumerate(zip(ends, steps, strict=True))], np.int64)
    return w.node("Slice", [x, *table.T])


def _reverse(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
    axes = np.array(eqn.params["dimensions"], np.int64)
    return w.node("Slice", [x, -np.ones_like(axes), np.full_like(axes, -WHOLE), axes, -np.ones_like(axes)])


def _pad(w: Writer, eqn: Eqn, program: Program, x: Value, fill: Value) -> Any:
    low, high, inside = zip(*eqn.params["padding_config"], strict=True)
    if any(inside):
        return w.refuse(eqn, "padding between elements")
    cut = [(max(-lo, 0), hi if hi < 0 else WHOLE) for lo, hi in zip(low, high, strict=True)]
    x = _sliced(w, x, cut, [1] * len(cut)) if min(*low, *high) < 0 else x
    return w.node("Pad", [x, np.maximum([*low, *high], 0).astype(np.int64), fill])


def _gather(w: Writer, eqn: Eqn, program: Program, x: Value, indices: Value) -> Any:
    """One window, or single positions of some axes, which are laid end to end, and all of the others."""
    numbers, sizes = eqn.params["dimension_numbers"], program.aval(eqn.ins[0]).shape
    axes, collapsed = numbers.start_index_map, numbers.collapsed_slice_dims
    if isinstance(indices, str) or numbers.operand_batching_dims:
        return w.refuse(eqn, "indices that are computed")
    if indices.ndim == 1:
        starts = dict(zip(axes, indices.tolist(), strict=True))
        windows = [(starts.get(axis, 0), taken) for axis, taken in enumerate(eqn.params["slice_sizes"])]
        out = _windowed(w, x, windows, sizes)
        return w.node("Squeeze", [out, np.array(collapsed, np.int64)]) if collapsed else out
    if set(axes) != set(collapsed):
        return w.refuse(eqn, "several windows")
    extent = tuple(sizes[axis] for axis in axes)
    places = np.moveaxis(indices, -1, 0)
    if not all(isinstance(n, int) for n in extent) or (places < 0).any() or (np.array(extent) <= places.T).any():
        return w.refuse(eqn, "indices out of bounds, or into the batch")
    rest = [axis for axis in range(len(sizes)) if axis not in axes]
    rows = w.reshape(w.transpose(x, [*axes, *rest]), [int(np.prod(extent)), *(sizes[axis] for axis in rest)])
    out = w.node("Gather", [rows, np.ravel_multi_index(tuple(places), extent)], axis=0)
    looked = iter(range(indices.ndim - 1))
    kept = iter(range(indices.ndim - 1, indices.ndim - 1 + len(rest)))
    order = range(indices.ndim - 1 + len(rest))
    return w.transpose(out, [next(kept) if place in numbers.offset_dims else next(looked) for place in order])


def _dynamic_slice(w: Writer, eqn: Eqn, program: Program, x: Value, *starts: Value) -> Any:
    if any(isinstance(start, str) for start in starts):
        return w.refuse(eqn, "a start that is computed")
    windows = zip(map(int, starts), eqn.params["slice_sizes"], strict=True)
    return _windowed(w, x, list(windows), program.aval(eqn.ins[0]).shape)


def _windowed(w: Writer, x: Value, windows: Sequence[tuple[int, Any]], sizes: Sequence[Any]) -> str:
    """A window `(start, length)` of each axis, moved inside where it reaches beyond."""
    ends = [
        (0, WHOLE) if taken is size or taken == size else (at := min(max(start, 0), size - taken), at + taken)
        for (start, taken), size in zip(windows, sizes, strict=True)
    ]
    return _sliced(w, x, ends, [1] * len(ends))


def _split(w: Writer, eqn: Eqn, program: Program, x: Value) -> list[str]:
    starts = np.cumsum([0, *eqn.params["sizes"]])
    axes = np.array([eqn.params["axis"]], np.int64)
    pairs = pairwise(starts)
    return [w.node("Slice", [x, np.array([a], np.int64), np.array([b], np.int64), axes]) for a, b in pairs]


def _unstack(w: Writer, eqn: Eqn, program: Program, x: Value) -> list[str]:
    along = eqn.params["axis"]
    return [w.node("Gather", [x, np.array(i, np.int64)], axis=along) for i in range(len(eqn.outs))]


def _stack(w: Writer, eqn: Eqn, program: Program, *ins: Value) -> str:
    along = eqn.params["axis"]
    new = np.array([along], np.int64)
    return w.node("Concat", [w.node("Unsqueeze", [x, new]) for x in ins], axis=along)


def _select(w: Writer, eqn: Eqn, program: Program, which: Value, *cases: Value) -> Any:
    if len(cases) != 2 or program.aval(eqn.ins[0]).dtype != bool:
        return w.refuse(eqn, "a predicate that is a number")
    return w.node("Where", [which, cases[1], cases[0]])


def _dot(w: Writer, eqn: Eqn, program: Program, x: Value, y: Value) -> str:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    ranks = [len(program.aval(operand).shape) for operand in eqn.ins]
    if not left_batch and (tuple(left), tuple(right)) == ((ranks[0] - 1,), (0,)) and ranks[1] == 2:
        return w.node("MatMul", [x, y])
    letters = iter(string.ascii_lowercase)
    a = [next(letters) for _ in range(ranks[0])]
    b = [""] * ranks[1]
    for i, j in zip((*left, *left_batch), (*right, *right_batch), strict=True):
        b[j] = a[i]
    b = [letter or next(letters) for letter in b]
    free = [letter for i, letter in enumerate(a) if i not in (*left, *left_batch)]
    free += [letter for j, letter in enumerate(b) if j not in (*right, *right_batch)]
    out = [a[i] for i in left_batch] + free
    return w.node("Einsum", [x, y], equation=f"{''.join(a)},{''.join(b)}->{''.join(out)}")


def _convolution(w: Writer, eqn: Eqn, program: Program, x: Value, kernel: Value) -> Any:
    p, dims = eqn.params, eqn.params["dimension_numbers"]
    if p["batch_group_count"] != 1 or any(d != 1 for d in p["lhs_dilation"]):
        return w.refuse(eqn, "a dilated input or groups in the batch")
    low, high = zip(*p["padding"], strict=True)
    out = w.node(
        "Conv",
        [w.transpose(x, dims.lhs_spec), w.transpose(kernel, dims.rhs_spec)],
        strides=list(p["window_strides"]),
        pads=[*low, *high],
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return w.transpose(out, np.argsort(dims.out_spec).tolist())


def _pool(op: str) -> Rule:
    def rule(w: Writer, eqn: Eqn, program: Program, x: Value) -> Any:
        p = eqn.params
        rows = zip(p["window_dimensions"], p["window_strides"], p["padding"], p["window_dilation"], strict=True)
        windows = list(rows)
        spatial = [axis for axis, row in enumerate(windows) if row != (1, 1, (0, 0), 1)]
        others = [axis for axis in range(len(windows)) if axis not in spatial]
        dilated = any(d != 1 for d in p["base_dilation"]) or (op != "MaxPool" and any(row[3] != 1 for row in windows))
        if dilated or len(others) != 2 or not 1 <= len(spatial) <= 3:
            return w.refuse(eqn, f"the window {p['window_dimensions']}")
        kernel, strides, pads, dilations = zip(*(windows[axis] for axis in spatial), strict=True)
        low, high = zip(*pads, strict=True)
        shape: dict[str, Any] = {"kernel_shape": list(kernel), "strides": list(strides), "pads": [*low, *high]}
        more: dict[str, Any] = {"dilations": list(dilations)} if op == "MaxPool" else {"count_include_pad": 1}
        out = w.node(op, [w.transpose(x, others + spatial)], **shape, **more)
        if op != "MaxPool":  # the mean of each window, times its size
            out = w.node("Mul", [out, np.asarray(np.prod(kernel), program.aval(eqn.outs[0]).dtype)])
        return w.transpose(out, np.argsort(others + spatial).tolist())

    return rule


def _cast(w: Writer, eqn: Eqn, program: Program, x: Value) -> str:
    return w.node("Cast", [x], to=w.kind(program.aval(eqn.outs[0]).dtype))


_IDENTITY = _op("Identity")
_ELEMENTWISE = {
    "add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow", "neg": "Neg",
    "abs": "Abs", "exp": "Exp", "log": "Log", "tanh": "Tanh", "sqrt": "Sqrt", "logistic": "Sigmoid", "erf": "Erf",
    "floor": "Floor", "ceil": "Ceil", "sign": "Sign", "sin": "Sin", "cos": "Cos", "and": "And", "or": "Or",
    "not": "Not", "eq": "Equal", "lt": "Less", "gt": "Greater", "le": "LessOrEqual", "ge": "GreaterOrEqual",
}  # fmt: skip
RULES: dict[str, Rule] = {
    **{name: _op(op) for name, op in _ELEMENTWISE.items()},
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier", "device_put"), _IDENTITY),
    "ne": _chain(_op("Equal"), _op("Not")),
    "rsqrt": _chain(_op("Sqrt"), _op("Reciprocal")),
    "square": lambda w, eqn, program, x: w.node("Mul", [x, x]),
    "integer_pow": _with("Pow", lambda eqn: eqn.params["y"]),
    "erfc": _chain(_op("Erf"), _with("Sub", lambda eqn: 1, first=True)),
    "log1p": _chain(_with("Add", lambda eqn: 1), _op("Log")),
    "expm1": _chain(_op("Exp"), _with("Sub", lambda eqn: 1)),
    "clamp": lambda w, eqn, program, low, x, high: w.node("Min", [w.node("Max", [x, low]), high]),
    "select_n": _select,
    "convert_element_type": _cast,
    "reshape": _reshape,
    "squeeze": lambda w, eqn, program, x: w.node("Squeeze", [x, np.array(eqn.params["dimensions"], np.int64)]),
    "broadcast_in_dim": _broadcast,
    "transpose": lambda w, eqn, program, x: w.transpose(x, eqn.params["permutation"]),
    "concatenate": lambda w, eqn, program, *ins: w.node("Concat", ins, axis=eqn.params["dimension"]),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "split": _split,
    "stack": _stack,
    "unstack": _unstack,
    "rev": _reverse,
    "pad": _pad,
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_or": _reduce_logical("ReduceMax"),
    "reduce_and": _reduce_logical("ReduceMin"),
    "argmax": _argument("ArgMax"),
    "argmin": _argument("ArgMin"),
    "reduce_window_max": _pool("MaxPool"),
    "reduce_window_sum": _pool("AveragePool"),
    "conv_general_dilated": _convolution,
    "dot_general": _dot,
}
