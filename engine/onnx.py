"""A model as ONNX: a traced function is written node by node with the `onnx` package (`treesurgeon[onnx]`).

What does not depend on the input is computed here and becomes a constant, so that only a small set of primitives is
left to translate (onnx_rules.py). The batch axis stays symbolic.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import export

from treesurgeon.engine.errors import ArtifactError
from treesurgeon.engine.jaxprs import Literal, Program, bind, flatten_program
from treesurgeon.engine.onnx_rules import BATCH, INPUT, RULES, Value, Writer

OPSET, IR = 18, 8  # what runtimes of 2023 and newer read
TOLERANCE = 1e-4  # of the largest output, or of 1
OUTPUT = "y"


def to_onnx(fn: Callable, shape: Sequence[int], dtype: Any = "float32") -> bytes:
    """Serialise `fn(x)`, one array to one array, for `x` of `shape` behind a batch axis of any size.

    What is written is run by onnxruntime on batches of 1 and 3 and must answer as `fn` does.

    Raises:
        ArtifactError: `onnx` or `onnxruntime` is not installed, a primitive has no translation, or answers differ.
    """
    onnx, runtime = require()
    (batch,) = export.symbolic_shape(BATCH)
    x = jax.ShapeDtypeStruct((batch, *shape), dtype)
    program = flatten_program(jax.make_jaxpr(fn)(x))
    if len(program.outputs) != 1:
        raise ArtifactError(f"ONNX export takes functions with one output, this one has {len(program.outputs)}")
    writer = Writer(onnx)
    (out,) = run(writer, program, [INPUT])
    if writer.missing:
        rows = ", ".join(f"{name} ({where})" for name, where in writer.missing.items())
        raise ArtifactError(f"ONNX export has no translation for {rows}: export to stablehlo instead")
    writer.node("Identity", [out], name=OUTPUT)
    entries = [
        onnx.helper.make_tensor_value_info(name, writer.kind(aval.dtype), [BATCH, *aval.shape[1:]])
        for name, aval in ((INPUT, x), (OUTPUT, program.aval(program.outputs[0])))
    ]
    graph = onnx.helper.make_graph(writer.nodes, "model", entries[:1], entries[1:], writer.constants)
    opset = onnx.helper.make_opsetid("", OPSET)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=IR, producer_name="treesurgeon")
    onnx.checker.check_model(model)
    data = model.SerializeToString()
    _compare(fn, runtime.InferenceSession(data, providers=["CPUExecutionProvider"]), shape, dtype)
    return data


def require() -> list[Any]:
    """The packages of the extra `onnx`: `onnx` itself and `onnxruntime`."""
    try:
        return [importlib.import_module(name) for name in ("onnx", "onnxruntime")]
    except ImportError as error:
        raise ArtifactError(f"ONNX export needs {error.name}: pip install 'treesurgeon[onnx]'") from error


def _compare(fn: Callable, session: Any, shape: Sequence[int], dtype: Any) -> None:
    model, rng = jax.jit(fn), np.random.default_rng(0)
    for count in (1, 3):
        x = rng.normal(size=(count, *shape)).astype(dtype)
        want, got = np.asarray(model(x)), session.run(None, {INPUT: x})[0]
        apart = np.abs(got - want).max() if got.shape == want.shape else np.inf
        if not apart <= TOLERANCE * max(1.0, np.abs(want).max()):
            raise ArtifactError(
                f"ONNX export: onnxruntime answers a batch of {count} otherwise than the model, {apart:.2e} apart: "
                "nothing was written; export to stablehlo, and please report this"
            )


def run(writer: Writer, program: Program, inputs: Sequence[Value]) -> list[Value]:
    """Write a program; returns its outputs."""
    env: dict[int, Value] = dict(zip(program.inputs, inputs, strict=True))
    env |= {v: np.asarray(value) for v, value in program.consts.items()}

    def read(operand: Any) -> Value:
        return np.asarray(operand.value, operand.aval.dtype) if isinstance(operand, Literal) else env[operand]

    for eqn in program.eqns:
        ins = [read(operand) for operand in eqn.ins]
        avals = [program.aval(operand) for operand in (*eqn.ins, *eqn.outs)]
        static = all(isinstance(d, int) for aval in avals for d in aval.shape)
        if static and not any(isinstance(v, str) for v in ins):
            outs: list[Value] = [np.asarray(v) for v in bind(eqn, eqn.params, ins)]
        elif eqn.bodies and eqn.name in ("custom_jvp_call", "custom_vjp_call"):
            outs = run(writer, eqn.bodies[0], ins)
        elif eqn.name in RULES:
            found = RULES[eqn.name](writer, eqn, program, *ins)
            outs = [found] if isinstance(found, str) else list(found)
        else:
            writer.missing.setdefault(eqn.name, eqn.where)
            outs = [INPUT] * len(eqn.outs)
        env.update(zip(eqn.outs, outs, strict=True))
    return [read(operand) for operand in program.outputs]
