"""Truncated finalists: which depths are chosen, what they are, and a search in which one of them is selected."""

import csv
import json
from dataclasses import replace
from functools import partial

import fewer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import leaves_of
from orbax.checkpoint import v1 as ocp

from treesurgeon import engine, models
from treesurgeon.engine.shortened import HEAD
from treesurgeon.models import presets
from treesurgeon.search import Config, RunError, contenders, depth, finalists, hidden, run, truncating
from treesurgeon.search.budget import Budget, make_budget
from treesurgeon.search.evolve import Scored
from treesurgeon.search.exits import ending, make_exit, moved, paths, restricted
from treesurgeon.search.finalists import Pick, part, pick, picked, variant
from treesurgeon.search.latency import Profile
from treesurgeon.search.pipeline import build_space, opened, smallest
from treesurgeon.search.scoring import make_evaluator, with_ends
from treesurgeon.search.setting import prepare
from treesurgeon.search.shortening import shortened
from treesurgeon.search.space import SpaceError, build
from treesurgeon.search.start import starting_points
from treesurgeon.search.state import States
from treesurgeon.search.survey import Cut, survey
from treesurgeon.search.truncating import choose, depth_of, find_exits, truncations

fewer_layers = fewer.fewer_layers
RNG = np.random.default_rng(0)


def cut(at, params, error, macs=100):
    return Cut(at, 8, {"params": params, "macs": macs}, 1, 1 - error, 0.1, (error * (1 - error) / 100) ** 0.5)


WHOLE = cut("before linear", 100, 0.2)


@pytest.mark.parametrize(
    ("cuts", "want"),
    [
        # One standard error of 0.2 on 100 images is 0.04; b is beaten by the smaller a.
        ([cut("a", 30, 0.23), cut("b", 40, 0.235), cut("c", 50, 0.22), WHOLE], ["a", "c"]),
        ([cut("a", 30, 0.25), cut("c", 50, 0.22), WHOLE], ["c"]),
        ([cut("a", 30, 0.5), cut("c", 50, 0.4), WHOLE], ["c"]),  # none is as good: the nearest
        ([cut("a", 30, 0.1), cut("b", 40, 0.09), cut("c", 50, 0.08), WHOLE], ["a", "b"]),
        ([cut("a", 100, 0.1), WHOLE], []),  # nothing is saved
        ([WHOLE], []),
    ],
)
def test_the_smallest_depths_that_are_enough_are_chosen(cuts, want):
    assert [found.point for found in choose(cuts, 2)] == want


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint of random weights and images that shallow features tell apart."""
    return furnished(tmp_path_factory.mktemp("truncating"))


def furnished(home):
    variables = models.resolve("digits_cnn").init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    ocp.save(str(home / "checkpoint"), jax.tree.map(np.asarray, variables))
    kinds = RNG.random((3, 8, 8, 1))
    y = np.arange(900) % 3
    x = (kinds[y] + 0.2 * RNG.normal(size=(900, 8, 8, 1))).astype(np.float32)
    np.savez(home / "three.npz", x_all=x, y_all=y, label_names=np.array(["one", "two", "three"]))
    return home


def config(place, **changes):
    given = {"model": "digits_cnn", "checkpoint": str(place / "checkpoint"), "data": f"npz:{place / 'three.npz'}",
             "out": str(place / "out"), "fitted_split": ("none",), "shares": (0.2, 0.2, 0.3, 0.3),
             "population": 4, "generations": 1, "search_images": 32, "calibration_images": 8, "refit_images": 32,
             "finalists": 1, "epochs": 1, "reconstruct": "none", "epsilon": 0.1, "eta": 0.1,
             "baselines": False, "formats": False}  # fmt: skip
    return Config(**{**given, **changes})


@pytest.fixture(scope="module")
def setting(place):
    """Nothing is estimated anew."""
    return prepare(config(place, calibration_images=0))


def whole(limits=None):
    return Budget(None, limits or {}, {}, {})


@pytest.fixture(scope="module")
def exits(setting):
    """Where candidates may end: the second point and the first."""
    first, second, *_ = survey(setting.subject, setting.roles, 3)
    given = setting.roles, np.zeros(0), (), 0, 3
    made = [shortened(setting.subject, cut.point, *given) for cut in (second, first)]
    return tuple(make_exit(setting.subject, *each, setting.roles.train.images) for each in made)


def test_a_head_is_fitted_to_what_stands_at_the_point(setting, exits):
    cuts = survey(setting.subject, setting.roles, 3)
    assert [found.point for found in cuts] == list(
        engine.points(setting.subject.infer, setting.subject.graph, setting.subject.spec.example)
    )
    sizes = [found.params for found in cuts]
    assert sizes == sorted(sizes)
    assert sizes[-1] == engine.cost(setting.subject.graph, engine.Plan()).params
    subject = exits[0].subject(setting.subject)
    assert engine.cost(subject.graph, engine.Plan())._asdict() == cuts[1].cost
    old, new = leaves_of(setting.subject.variables), leaves_of(subject.variables)
    for path in new.keys() - {f"params/{HEAD}/kernel", f"params/{HEAD}/bias"}:
        np.testing.assert_array_equal(new[path], old[path])
    roles = setting.roles
    right = np.asarray(subject.infer(subject.variables, roles.search.images)).argmax(1) == roles.search.labels
    assert right.mean() > 0.9
    # It can be trained from scratch, at its own shapes.
    fresh = contenders.scratch(subject, engine.Plan(), 0)
    assert jax.tree.map(np.shape, fresh) == jax.tree.map(np.shape, subject.variables)
    assert np.isfinite(subject.infer(fresh, roles.search.images[:2])).all()
    kernel = f"params/{HEAD}/kernel"
    assert leaves_of(fresh)[kernel].std() == pytest.approx(1 / np.sqrt(len(new[kernel])), rel=0.3)


def test_a_hidden_layer_where_it_is_better_and_within_the_budget(place, setting, tmp_path, monkeypatch):
    monkeypatch.setattr(hidden, "choose", lambda linear, heads, x, y, task: heads[0])
    said = []
    made = replace(setting, config=config(place, truncations=1, out=str(tmp_path)))
    made = replace(made, exits=find_exits(made, engine.Plan(), States(tmp_path / "state"), said.append))
    (end,) = made.exits
    monkeypatch.setattr(truncating, "choose", None)  # it was chosen: a resumed run does not do it again
    (again,) = find_exits(made, engine.Plan(), States(tmp_path / "state"), lambda line: None)
    assert again.point == end.point
    assert said[-1] == f"{end.point}: a head with 16 hidden units is better on search than a linear one"
    deep = variant(made, "t1", Pick(end.point, engine.Plan()))
    assert deep.subject.spec.hidden == 16
    assert depth_of(deep) == f"up to {end.point}, a hidden layer of 16"
    right = np.asarray(deep.infer(deep.variables, setting.roles.search.images)).argmax(1) == setting.roles.search.labels
    assert right.mean() > 0.9
    tight = replace(made, budget={"params": deep.cost["params"] - 1})
    linear = variant(tight, "t1", Pick(end.point, engine.Plan()))
    assert linear.subject.spec.hidden == 0
    assert linear.cost["params"] < deep.cost["params"]


def ended(setting, exits):
    """A setting and its space, whose candidates may end early."""
    setting = replace(setting, exits=exits)
    scores = {name: RNG.random(group.size) for name, group in setting.subject.graph.groups.items()}
    return setting, with_ends(setting, build(setting.subject.graph, scores))


def test_a_space_with_exits(setting, exits):
    setting, space = ended(setting, exits)
    assert space.cardinality[-1] == 3
    dense = space.dense_genome()
    assert dense[-1] == 0
    assert space.end(dense) == ""
    genome = space.encode(drop=space.blocks[:1])
    genome[-1] = 2
    assert space.end(genome) == exits[1].point
    assert space.to_plan(genome) == engine.Plan(drop=frozenset(space.blocks[:1]))
    masks = space.stacked(np.stack([dense, genome]))
    assert masks["exit"].tolist() == [0, 2]
    assert masks["blocks"][space.blocks[0]].tolist() == [True, False]
    halves = space.encode({name: size // 2 for name, size in space.sizes.items()}, space.blocks)
    for end in range(3):
        halves[-1] = end
        same = np.asarray(space.canonical(jnp.asarray(halves)))
        assert same[-1] == end
        behind = same != halves
        names = np.array([*space.groups, *space.blocks])[behind[:-1]]
        part = exits[end - 1].subject(setting.subject).graph if end else setting.subject.graph
        assert not set(names) & (part.groups.keys() | part.blocks.keys())
        assert (same[behind] == dense[behind]).all()
        left = set(np.array([*space.groups, *space.blocks])[~behind[:-1]])
        assert left <= part.groups.keys() | part.blocks.keys()
    assert behind.any()  # at the first point
    genome[-1] = 3
    with pytest.raises(SpaceError, match="where it ends"):
        space.to_plan(genome)


def test_candidates_that_end_early_are_scored_and_cost_as_what_they_become(setting, exits):
    """In one program with all others: against each of them cut, narrowed and run alone."""
    setting, space = ended(replace(setting, config=replace(setting.config, calibration_images=0)), exits)
    genomes = np.stack([RNG.integers(0, space.cardinality) for _ in range(6)]).astype(np.int32)
    genomes[:, -1] = np.arange(6) % 3
    masks = space.stacked(genomes)
    evaluator = make_evaluator(setting, space)
    losses, wrong, _ = evaluator(masks)
    assert evaluator.compiled == 1
    ends = [each.subject(setting.subject).graph for each in exits]
    budget = Budget(setting.subject.graph, {}, {}, {}, ends)
    found = jax.jit(budget.costs)(masks)
    search = setting.roles.search
    for i, genome in enumerate(genomes):
        subject, plan = part(setting, picked(space, genome))
        assert (subject is setting.subject) == (genome[-1] == 0)
        expected = engine.cost(subject.graph, plan)._asdict()
        assert {name: float(value[i]) for name, value in found.items()} == pytest.approx(expected)
        small = engine.cut(subject.variables, subject.graph, plan)
        logits = engine.narrow(subject.infer, subject.graph, plan)(small, search.images[:32])
        np.testing.assert_array_equal(wrong[i] > 0, np.asarray(logits).argmax(1) != search.labels[:32])
        assert np.isfinite(losses[i]).all()


def test_costs_beyond_int32_where_a_part_has_nothing_to_prune():
    def fn(p, x):
        return jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]

    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, "float32")
    leaves = {"a": shape(3000, 1000), "b": shape(1000, 40), "c": shape(40, 3)}
    x = shape(1000, 3000)
    graph = engine.trace(fn, leaves, x)
    end = engine.trace(lambda p, x: x @ p["a"], {"a": leaves["a"]}, x)
    assert not end.groups
    units = jax.tree.map(lambda mask: np.stack([mask, mask]), graph.masks(engine.Plan())["units"])
    masks = {"units": units, "blocks": {}, "exit": np.int32([0, 1])}
    found = jax.jit(Budget(graph, {}, {}, {}, [end]).costs)(masks)
    exact = [engine.cost(each, engine.Plan()).macs for each in (graph, end)]
    assert exact[1] == 3 * 10**9
    np.testing.assert_allclose(np.asarray(found["macs"], float), exact, rtol=1e-6)


@pytest.mark.parametrize("reestimated", [False, True])
def test_heads_move_towards_what_they_answer_to_the_dense_model(setting, exits, reestimated):
    """The target stays where it is, whatever statistics candidates have."""
    setting, space = ended(setting, exits)
    subject, x = setting.subject, jnp.asarray(setting.roles.train.images)
    own = subject.variables
    if reestimated:
        own = jax.jit(engine.reestimate(subject.train, subject.momenta))(own, x, jax.random.key(0))
    genome = space.encode({name: size // 2 for name, size in space.sizes.items()})
    masks = jax.tree.map(lambda leaf: leaf[0], space.stacked(genome[None]))
    heads = jax.jit(partial(moved, subject, exits))({**masks, "maps": {}}, own, x)
    test = setting.roles.test.images
    for i, end in enumerate(exits, 1):
        want = engine.features(subject.infer, subject.graph)(subject.variables, test)[end.point] @ end.linear.kernel
        here = {**masks, "exit": np.int32(i)}
        answers = [ending(subject, exits)(own, here, given, test) for given in ({}, heads)]
        off = [np.abs(answer - end.linear.bias - want).mean() for answer in answers]
        assert off[1] < 0.5 * off[0]
    if reestimated:
        return
    dense = jax.tree.map(lambda leaf: leaf[0], space.stacked(space.dense_genome()[None]))
    same = moved(subject, exits, {**dense, "maps": {}}, subject.variables, x)
    for end in exits:
        kernel, bias = (same[path] for path in paths(end))
        np.testing.assert_allclose(kernel, end.linear.kernel, atol=1e-5)
        np.testing.assert_allclose(bias, end.linear.bias, atol=1e-5)


def test_finalists_are_picked_of_every_end(setting, exits):
    setting, space = ended(replace(setting, config=replace(setting.config, finalists=1)), exits)
    ends = [each.subject(setting.subject).graph for each in exits]
    budget = Budget(setting.subject.graph, {"params": 1e9}, {"params": 1e6}, {}, ends)
    halves = space.encode({name: size // 2 for name, size in space.sizes.items()})
    genomes = np.array([halves] * 4 + [space.dense_genome()])
    genomes[1:4, -1] = 1, 2, 2
    genomes[4, -1] = 1  # with all units: a truncation, which is a finalist anyway
    losses = np.array([0.9, 0.3, 0.5, 0.4, 0.1])
    front = Scored(genomes, np.stack([np.ones(5), losses], 1), np.zeros(5))
    found = [genome for genome, _ in pick(setting, space, budget, front, lambda line: None)]
    np.testing.assert_array_equal(found, genomes[[0, 1, 3]])
    assert len(pick(setting, space, budget, Scored(genomes[4:], front.objectives[4:], np.zeros(1)), print)) == 0


def test_an_early_end_meets_a_measured_budget_where_the_whole_depth_does_not(setting, exits, monkeypatch):
    setting, space = ended(replace(setting, config=replace(setting.config, finalists=1)), exits)
    ends = [each.subject(setting.subject).graph for each in exits]
    budget = Budget(setting.subject.graph, {"latency": 2.0}, {"latency": 9.0}, {"latency": np.zeros(1)}, ends)
    halves = space.encode({name: size // 2 for name, size in space.sizes.items()})
    genomes = np.array([halves] * 4)
    genomes[:, -1] = 0, 1, 2, 2
    front = Scored(genomes, np.stack([np.ones(4), np.array([0.1, 0.2, 0.4, 0.3])], 1), np.zeros(4))
    ms = {"": 8.0, exits[0].point: 4.0, exits[1].point: 1.5}

    def profile(infer, *_):
        model = infer.__self__
        return Profile(ms["" if model is setting.subject else model.spec.at], 1)

    monkeypatch.setattr(finalists, "profile_plan", profile)
    said = []
    ((genome, measured),) = pick(setting, space, budget, front, said.append)
    np.testing.assert_array_equal(genome, genomes[3])
    assert measured == {"latency": 1.5}
    failed = "1 of 1 candidates were not within the budget as measured: latency {} at least"
    assert said[:2] == [failed.format(8), failed.format(4)]
    front, space = Scored(genomes[:1, :-1], front.objectives[:1], np.zeros(1)), replace(space, exits=())
    with pytest.raises(RunError, match=r"none of the candidates .* met the budget \(latency 2\) when measured"):
        pick(setting, space, replace(budget, ends=()), front, said.append)


def test_where_nothing_meets_a_measured_budget_a_resumed_run_knows_it(setting, exits, tmp_path, monkeypatch):
    setting, space = ended(setting, exits)
    budget = Budget(setting.subject.graph, {"latency": 1.0}, {}, {"latency": np.zeros(1)})
    halves = space.encode({name: size // 2 for name, size in space.sizes.items()})[None]
    given = setting, space, budget, Scored(halves, np.ones((1, 2)), np.zeros(1)), States(tmp_path / "state"), print
    monkeypatch.setattr(finalists, "pick", lambda *_: [])  # truncations may be within it
    assert finalists.picked_once(*given) == []
    monkeypatch.setattr(finalists, "pick", None)
    assert finalists.picked_once(*given) == []


def test_a_search_starts_at_every_exit(setting, exits):
    setting, space = ended(setting, exits)
    path = np.stack([space.dense_genome(), space.encode(dict.fromkeys(space.groups, 8))])

    def costs(genomes):
        size = np.asarray([-len(space.to_plan(genome).keep) for genome in genomes])
        return {"macs": size, "params": size}

    for limits in ({}, {"params": 0.5}):
        found = starting_points(setting.config, space, whole(limits), path, path, costs)
        assert set(found[: setting.config.population, -1]) == {0, 1, 2}
        assert found[0, -1] == 0


@pytest.mark.slow
def test_a_truncation_is_selected_saved_and_loaded(place):
    said = []
    outcome = run(config(place), said.append)
    assert any("depths tried with linear heads" in str(line) for line in said)
    with (place / "out" / "front.csv").open() as file:
        front = {row["variant"]: row for row in csv.DictReader(file)}
    assert {"v1", "t1"} <= front.keys()
    assert front["t1"]["description"].startswith("up to ")
    with (place / "out" / "candidates.csv").open() as file:
        candidates = list(csv.DictReader(file))
    assert {bool(row["up_to"]) for row in candidates} == {True, False}  # they compete
    for row in candidates:
        assert ("0" in row["kept"].split()) == bool(row["up_to"])
    assert len({(row["genome"], row["up_to"]) for row in candidates}) == len(candidates)  # each is another model
    model = engine.load(outcome.path)
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["selected"].startswith("t"), manifest["verdict"]
    assert manifest["certificate"]["passed"]
    assert manifest["model"]["at"]
    setting = prepare(config(place))
    logits = np.asarray(model(setting.roles.test.images))
    right = (logits.argmax(1) == setting.roles.test.labels).mean()
    assert right == pytest.approx(manifest["metrics"][manifest["selected"]]["test_accuracy"])
    page = (place / "out" / "report.html").read_text()
    assert "cut in depth" in page
    again = run(config(place), said.append)  # it is complete, and shown from its manifest
    assert again.sentence == outcome.sentence
    assert said[-1].startswith("this run is complete")


@pytest.fixture
def deep(tmp_path, monkeypatch):
    """The same with a stage more, and a budget that is too low for the whole depth."""
    preset = presets.get("digits_cnn")
    factory = partial(preset.factory, stages=((16, 16), (48,)), residual=(0, 48))
    monkeypatch.setattr(presets, "ZOO", {**presets.ZOO, preset.name: replace(preset, factory=factory)})
    return furnished(tmp_path)


@pytest.mark.slow
def test_a_budget_that_only_an_early_end_meets(deep, tmp_path):
    with pytest.raises(RunError, match=r"budget of 1,000 cannot be met, the smallest variant .* has 1,371; raise"):
        opened(config(deep, params=1000, truncations=0), None)
    with pytest.raises(RunError, match=r"cannot be met, the smallest variant of the space has 227; raise"):
        opened(config(deep, params=2), None)
    setting = opened(config(deep, params=1000, out=str(tmp_path)), None)
    states = States(tmp_path / "state")
    exits = find_exits(setting, smallest(setting), states, lambda line: None)
    assert {end.point for end in exits} <= {"before stage1_1", "stage1_1"}
    made = replace(setting, exits=exits)
    scores = {name: RNG.random(group.size) for name, group in setting.subject.graph.groups.items()}
    budget = make_budget(made, build_space(made, scores), states, lambda line: None)
    assert budget.limits == {"params": pytest.approx(1000)}
    with pytest.raises(RunError, match="cannot be met"):
        make_budget(setting, build_space(made, scores), states, lambda line: None)


@pytest.mark.slow
def test_a_search_for_a_budget_that_only_an_early_end_meets(deep, tmp_path):
    outcome = run(config(deep, params=1000, out=str(tmp_path / "out")))
    manifest = json.loads((outcome.path / "manifest.json").read_text())
    assert manifest["model"]["at"] in ("before stage1_1", "stage1_1")
    assert manifest["metrics"][manifest["selected"]]["params"] <= 1000


def test_truncations_within_the_budget_become_finalists(place, setting, exits, tmp_path, monkeypatch):
    recipe, said = replace(setting.recipe, epochs=0), []
    made = replace(setting, exits=exits, config=replace(setting.config, epochs=0), recipe=recipe)
    states = States(tmp_path / "state")
    second, first = truncations(made, whole(), states, said.append)
    assert [second.name, first.name] == ["t1", "t2"]
    assert not second.plan.keep
    test = setting.roles.test
    logits = np.asarray(second.infer(second.variables, test.images))
    assert (logits.argmax(1) == test.labels).mean() > 0.6
    spec, saved = second.subject.spec, tmp_path / "saved"
    engine.save(saved, spec, second.variables, second.plan, module=second.subject.module)
    np.testing.assert_allclose(engine.load(saved)(test.images), logits, rtol=1e-5, atol=1e-5)
    (only,) = truncations(made, whole({"params": first.cost["params"]}), states, said.append)
    assert (only.name, only.cost) == ("t1", first.cost)
    tight = Budget(setting.subject.graph, {"memory": 1.0}, {}, {"memory": np.zeros(1)})
    assert truncations(made, tight, states, said.append) == []
    assert said[-1] == f"{depth_of(first)} is not within the budget as measured"
    monkeypatch.setattr(truncating, "profile", None)  # it was measured: a resumed run does not do it again
    assert truncations(made, tight, states, said.append) == []


def test_what_a_plan_says_about_a_part_of_the_model(setting):
    graph = setting.subject.graph
    first = next(iter(graph.groups))
    block = next(iter(graph.blocks))
    plan = engine.Plan({first: np.arange(graph.groups[first].size), "elsewhere": np.arange(2)}, frozenset({block, "x"}))
    assert restricted(plan, graph, graph) == engine.Plan({}, frozenset({block}))


def test_a_model_that_cannot_be_cut_anywhere(place, setting, monkeypatch):
    said = []
    for module in (truncating, depth):
        monkeypatch.setattr(module, "survey", lambda *_: [])
    given = config(place)
    assert find_exits(setting, engine.Plan(), States(place / "none"), said.append) == ()
    assert said == ["no truncation: the model has no boundary of blocks"]
    with pytest.raises(RunError, match="digits_cnn: it has no boundary of blocks"):
        depth.depth(depth.Depth(given.model, given.checkpoint, given.data, fitted_split=("none",)), said.append)


@pytest.mark.slow
def test_none_where_they_are_not_asked_for(place):
    said = []
    run(config(place, truncations=0, out=str(place / "none"), epochs=0, certify=False), said.append)
    assert not any("depths tried" in str(line) for line in said)
