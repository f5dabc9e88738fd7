"""Laws 1 to 7 and 9 on the zoo and on every model, at the precision of the process.

`test_laws_x64.py` runs this file again in processes with x64 on; there the odd programs are included.
"""

import json
import os
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import jax
import pytest
import zoo
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from laws import Bench, plans, random_plan
from regressions import REGRESSIONS
from subjects import SUBJECTS as MODELS

CASES = {name: case.subject for name, case in {**zoo.ZOO, **zoo.ODD, **REGRESSIONS}.items()}
SUBJECTS = ChainMap(MODELS, CASES)

quiet = settings(
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


# What runs in float32 by default; all of them run in float64 (test_laws_x64.py).
BASIC = {
    "dense_chain", "layer_norm", "softmax_units", "activations", "dropout", "half_precision", "shuffled_by_index",
    "mlp", "resnet20",
}  # fmt: skip
# Where narrowing twice is tried by default.
TWICE = {
    "dense_chain", "conv_grouped", "layer_norm", "residual", "residual_zero_padded", "dense_net", "flatten_dense",
    "heads", "chain_of_one_width", "nested_residuals", "mlp", "digits_cnn",
}  # fmt: skip


def hold(bench: Bench, examples: int) -> None:
    """Laws 1 to 5 and 7; with few examples, the laws about `vmap` on the zoo and the models in inference only."""
    bench.law1()
    name, graph = bench.subject.name, bench.graph
    drawn = []

    @settings(quiet, max_examples=examples)
    @given(st.data())
    def under_plans(data):
        drawn.append(data.draw(plans(graph)))
        smallest = len(drawn) == 1 and (graph.groups or graph.blocks)  # Hypothesis draws it first
        if examples < 3 and smallest and name not in zoo.ZOO:
            return
        bench.law2_and_5(drawn[-1])
        bench.law3(drawn[-1])
        bench.law7(drawn[-1])

    under_plans()
    if examples < 3 and (name in zoo.ODD or name.endswith("-train") or not graph.groups):
        return
    bench.law4(drawn[-2:])
    bench.law3_in_a_population(drawn[-1])
    bench.law5_transforms()


def narrow_twice(bench: Bench, examples: int) -> None:
    seen = []

    @settings(quiet, max_examples=examples)
    @given(st.data())
    def under_plans(data):
        first = data.draw(plans(bench.graph, least=2))
        seen.append(first)
        if len(seen) > 1 or examples == 1:  # the first that Hypothesis draws is the smallest
            bench.law6(first, lambda graph: data.draw(plans(graph)))

    under_plans()
    if len(seen) == 1 < examples:  # Hypothesis stops early where there are few plans
        bench.law6(seen[0], lambda graph: random_plan(graph, 1))


def marked(names, fast):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(SUBJECTS, BASIC))
def test_laws(name):
    hold(Bench(SUBJECTS[name]), 2)


@pytest.mark.parametrize("name", marked(SUBJECTS, TWICE if jax.config.jax_enable_x64 else {"dense_chain"}))
def test_narrowing_twice_is_narrowing_once(name):
    narrow_twice(Bench(SUBJECTS[name]), 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SUBJECTS)
def test_laws_under_many_plans(name, seed):
    bench = Bench(SUBJECTS[name], seed)
    hold(bench, 12)
    narrow_twice(bench, 12)


@pytest.mark.parametrize("name", ["dense_chain", "residual", "dropout", "activations"])
def test_narrow_without_jit(name):
    bench = Bench(SUBJECTS[name])
    bench.law2_and_5(random_plan(bench.graph, 3))
    bench.law5_transforms(eager=True)


NAMES = """
import json, sys
from test_laws import SUBJECTS
from laws import Bench
graphs = {name: Bench(SUBJECTS[name]).graph for name in list(SUBJECTS)[:: int(sys.argv[1])]}
print(json.dumps({name: [list(g.groups), list(g.blocks), str(g)] for name, g in graphs.items()}))
"""


@pytest.mark.parametrize("every", [20, pytest.param(1, marks=pytest.mark.slow)])
def test_law_9_names_are_the_same_in_every_process(every):
    here = Path(__file__).parent

    def run(seed: str):
        env = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": f"{here}:{here.parent}/.pkg"}
        return subprocess.Popen([sys.executable, "-c", NAMES, str(every)], env=env, stdout=subprocess.PIPE)

    outs = [json.loads(p.communicate()[0].splitlines()[-1]) for p in [run("1"), run("2")]]
    assert outs[0] == outs[1]
    assert list(outs[0]) == list(SUBJECTS)[::every]


def test_precision_of_the_process():
    assert Bench(SUBJECTS["dense_chain"]).params["a"]["w"].dtype.itemsize == (8 if jax.config.jax_enable_x64 else 4)
