"""Random programs (`fuzz`) put to the laws: a few that are always the same; as many as time allows where slow.

In float32 they are only traced; a process with x64 on puts them to the laws.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz
import jax
import pytest
from fuzz import reducing
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from laws import Bench, plans, random_plan

from treesurgeon import engine

HERE = Path(__file__).parent
quiet = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


def environment(**more: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "JAX_COMPILATION_"))}
    path = f"{HERE}:{HERE.parent}/.pkg"
    return env | {"JAX_ENABLE_X64": "1", "XLA_FLAGS": fuzz.FLAGS, "PYTHONPATH": path} | more


@settings(quiet, max_examples=40)
@given(fuzz.programs())
def test_tracing_never_raises_and_cost_is_the_size_of_cut(program):
    if not program.params:
        return
    bench = Bench(program.subject())
    again = engine.trace(bench.fn, bench.params, *bench.args)
    assert fuzz.names(bench.graph) == fuzz.names(again)
    plan = random_plan(bench.graph, 1)
    small = engine.cut(bench.params, bench.graph, plan)
    assert engine.cost(bench.graph, plan).size == sum(x.size for x in jax.tree.leaves(small))


def test_reducing_finds_the_guilty_step(monkeypatch):
    """The laws here are a stand-in: no program may take a sine."""

    def forbidden(program, **_):
        return fuzz.Failure("sine", "a sine") if "jnp.sin(" in program.source() else None

    monkeypatch.setattr(reducing, "check", forbidden)
    programs = (fuzz.generate(seed) for seed in range(200))
    program = next(p for p in programs if forbidden(p) and len(p.steps) > 5)
    small, _ = fuzz.reduce(program, forbidden(program))
    assert len(small.steps) == 1
    assert "jnp.sin(" in small.source()
    assert small.source("case_7") in fuzz.report(small, forbidden(small), 7)


if jax.config.jax_enable_x64:

    @settings(quiet, max_examples=12)
    @given(st.data())
    def test_random_programs(data):
        program = data.draw(fuzz.programs(most=7))
        try:
            failure = fuzz.check(program, lambda graph, _: data.draw(plans(graph)))
        except fuzz.Trivial:
            return
        if failure:
            pytest.fail(fuzz.report(*fuzz.reduce(program, failure, limit=60), 0))

else:

    def test_random_programs_in_float64():
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
        command.append(f"{HERE}/test_fuzz.py::test_random_programs")
        done = subprocess.run(command, cwd=HERE.parent, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "1 passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_many_random_programs(seed, tmp_path):
    out = tmp_path / "found.py"
    command = [sys.executable, "-m", "fuzz", "--seconds", "200", "--seed", str(seed), "--out", str(out), "--extra"]
    done = subprocess.run(command, cwd=HERE.parent, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not out.exists(), out.read_text()


NAMES = """
import json, fuzz
from laws import Bench
found = [fuzz.generate(seed) for seed in range(60)]
print(json.dumps([fuzz.names(Bench(p.subject()).graph) for p in found if p.params]))
"""


@pytest.mark.slow
def test_law_9_on_random_programs():
    def run(seed: str):
        command = [sys.executable, "-c", NAMES]
        return subprocess.Popen(command, env=environment(PYTHONHASHSEED=seed), stdout=subprocess.PIPE)

    first, second = (json.loads(p.communicate()[0].splitlines()[-1]) for p in [run("1"), run("2")])
    assert first == second
