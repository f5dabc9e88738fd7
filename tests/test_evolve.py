"""NSGA-II against slow oracles, an exact Pareto front, and itself interrupted."""

from functools import partial

import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treesurgeon.search import evolve

CARDS = np.array([6] * 5 + [2] * 3, np.int32)
WEIGHTS = np.array([1, 2, 3, 4, 5, 7, 11, 13])


@jax.jit
def evaluate(genomes, least=0):
    """Cost against a separable loss: every gene trades one for the other. `least` bounds the cost from below."""
    genomes = jnp.asarray(genomes)
    cost = genomes.sum(-1)
    loss = (jnp.asarray(WEIGHTS) * (jnp.asarray(CARDS) - 1 - genomes) ** 2).sum(-1)
    return jnp.stack([cost, loss], -1).astype(jnp.float32), jnp.maximum(least - cost, 0)


def exact_front(least=0):
    """By dynamic programming over genes: for each cost the least loss, then the non-dominated of these."""
    best = {0: 0}
    for card, weight in zip(CARDS.tolist(), WEIGHTS.tolist(), strict=True):
        found = {}
        for cost, loss in best.items():
            for x in range(card):
                value = loss + weight * (card - 1 - x) ** 2
                found[cost + x] = min(found.get(cost + x, value), value)
        best = found
    points = sorted((c, v) for c, v in best.items() if c >= least)
    return [p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)]


ask = jax.jit(lambda state: evolve.ask(state, CARDS))
tell = jax.jit(evolve.tell)
mutate = jax.jit(jax.vmap(evolve.mutate, (0, 0, None, None, None)))


def step(state, least=0):
    children = ask(state)
    return tell(state, children, *evaluate(children, least))


def start(seed=0, population=16, archive=64, **options):  # one size for most tests: compiling is what takes time
    key = jax.random.key(seed)
    return evolve.init(key, CARDS, population=population, archive=archive, **options)


def identical(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


# --- the sorting, against O(N^3) Python -------------------------------------------------------------------


def better(a, b, va, vb, na=0, nb=0):
    if va > 0 or vb > 0:
        return va < vb
    return na == nb and all(x <= y for x, y in zip(a, b, strict=True)) and any(x < y for x, y in zip(a, b, strict=True))


def slow_ranks(objectives, violation, niches):
    left, rank, level = set(range(len(objectives))), [0] * len(objectives), 0
    while left:
        front = {
            j
            for j in left
            if not any(
                better(objectives[i], objectives[j], violation[i], violation[j], niches[i], niches[j]) for i in left
            )
        }
        for j in front:
            rank[j] = level
        left, level = left - front, level + 1
    return rank


def slow_crowding(objectives, rank, niches):
    """As Deb's pseudocode has it, for every niche by itself."""
    out = [0.0] * len(rank)
    for level, niche in set(zip(rank, niches, strict=True)):
        members = [i for i in range(len(rank)) if rank[i] == level and niches[i] == niche]
        for m in range(objectives.shape[1]):
            members.sort(key=lambda i: (objectives[i, m], i))
            low, high = objectives[members[0], m], objectives[members[-1], m]
            out[members[0]] = out[members[-1]] = np.inf
            for before, i, after in zip(members, members[1:], members[2:], strict=False):
                if high > low:
                    out[i] += (objectives[after, m] - objectives[before, m]) / (high - low)
    return out


scored = st.tuples(
    hnp.arrays(np.float32, (12, 2), elements=st.integers(0, 5).map(float)),
    hnp.arrays(np.float32, 12, elements=st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.5])),
    hnp.arrays(np.int32, 12, elements=st.integers(0, 2)) | st.just(np.zeros(12, np.int32)),
)


@settings(deadline=None, max_examples=40)
@given(scored)
def test_ranks_and_crowding_equal_the_slow_oracle(drawn):
    objectives, violation, niches = drawn
    rank = jax.jit(evolve.ranks)(jax.jit(evolve.dominates)(objectives, violation, niches))
    assert rank.tolist() == slow_ranks(objectives, violation, niches)
    room = jax.jit(evolve.crowding)(objectives, rank, niches)
    np.testing.assert_allclose(room, slow_crowding(objectives, rank.tolist(), niches.tolist()), rtol=1e-6)


def test_crowding_is_finite_or_inf_where_objectives_are_infinite():
    objectives = jnp.asarray([[0.0, jnp.inf], [1.0, 2.0], [jnp.inf, jnp.inf], [0.5, 3.0]])
    assert not jnp.isnan(evolve.crowding(objectives, *jnp.zeros((2, 4), jnp.int32))).any()


def test_a_feasible_individual_dominates_a_better_one_that_is_not():
    values = jnp.asarray([[9.0, 9.0], [1.0, 1.0], [0.0, 0.0]])
    dominates = evolve.dominates(values, jnp.asarray([0.0, 0.5, 2.0]), jnp.zeros(3, jnp.int32))
    assert dominates.tolist() == [[False, True, True], [False, False, True], [False, False, False]]


def test_what_several_genomes_stand_for_is_tried_once():
    """Here the last three genes mean nothing while the first is 0."""

    def canonical(genome):
        return jnp.where((genome[0] == 0) & (jnp.arange(len(CARDS)) > 4), 0, genome)

    alike = np.zeros((8, len(CARDS)), np.int32)
    alike[:, 5:] = [[i // 4, i // 2 % 2, i % 2] for i in range(8)]
    state = start(seeds=alike, population=8)
    told = evolve.tell(state, alike, *evaluate(alike), canonical=canonical)
    assert len(evolve.front(told).genomes) == 1
    found = evolve.distinct(evolve.everyone(told), canonical)
    assert found.genomes.tolist() == [[0] * len(CARDS)]
    children = [tuple(row) for row in np.asarray(jax.vmap(canonical)(evolve.ask(told, CARDS, canonical=canonical)))]
    assert len(set(children)) == len(children)
    assert (0,) * len(CARDS) not in children


def test_none_beats_one_of_another_niche():
    """The first gene is the niche; the second objective goes by it alone."""
    state = start()
    apart = jax.jit(partial(evolve.tell, niche=lambda genome: genome[0]))
    for _ in range(4):
        children = ask(state)
        values, _ = evaluate(children)
        state = apart(state, children, jnp.stack([values[:, 0], children[:, 0].astype(jnp.float32)], 1), np.zeros(16))
    found = evolve.front(state)
    assert set(found.genomes[:, 0].tolist()) == set(range(CARDS[0]))
    assert len(found.genomes) == CARDS[0]  # the smallest of each


def test_clones_come_last_and_the_first_of_them_is_kept():
    genomes = jnp.asarray([[1], [1], [2], [3]])
    objectives = jnp.asarray([[0.0, 1.0], [0.0, 1.0], [5.0, 5.0], [0.0, 1.0]])  # 3: a clone by its objectives
    pool = evolve.Scored(genomes, objectives, jnp.zeros(4))
    best, rank = evolve.select(pool, 4)
    assert best.genomes[:, 0].tolist() == [1, 2, 1, 3]
    assert rank.tolist() == [0, 1, 4, 4]


# --- variation --------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31 - 1))
def test_mutation_stays_in_range_flips_bits_and_steps_by_one(seed):
    keys = jax.random.split(jax.random.key(seed), 64)
    genomes = jax.random.randint(jax.random.key(seed + 1), (64, 8), 0, CARDS)
    moved = mutate(keys, genomes, CARDS, 1.0, 0.0)
    assert (abs(moved - genomes) == 1).all()  # for bits: always flipped
    fresh = mutate(keys, genomes, CARDS, 1.0, 1.0)
    for out in (moved, fresh):
        assert ((out >= 0) & (out < CARDS)).all()
    assert (mutate(keys, genomes, CARDS, 0.0, 0.5) == genomes).all()


def test_fresh_draws_reach_every_value():
    genomes = jax.vmap(evolve.mutate, (0, None, None, None, None))(
        jax.random.split(jax.random.key(0), 400), jnp.zeros(8, jnp.int32), CARDS, 1.0, 1.0
    )
    assert [len(np.unique(column)) for column in np.asarray(genomes).T] == CARDS.tolist()


def test_a_child_has_each_gene_from_one_of_its_parents_and_from_both():
    mothers, fathers = jnp.zeros((200, 8), jnp.int32), jnp.ones((200, 8), jnp.int32)
    keys = jax.random.split(jax.random.key(0), 200)
    children = jax.vmap(evolve.recombine, (0, 0, 0, None))(keys, mothers, fathers, 0.5)
    mixed = (children.sum(1) > 0) & (children.sum(1) < 8)
    assert 0.35 < mixed.mean() < 0.65
    assert not jax.vmap(evolve.recombine, (0, 0, 0, None))(keys, mothers, fathers, 0.0).any()


def test_children_are_new():
    state = start()
    for _ in range(3):
        state = step(state)
    children = np.asarray(ask(state))
    known = set(map(tuple, np.asarray(state.population.genomes).tolist()))
    rows = set(map(tuple, children.tolist()))
    assert len(rows) == len(children)
    assert not rows & known


# --- the search -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("least", [0, 12])
def test_it_finds_the_exact_front(least):
    state = start(population=48)
    for _ in range(150):
        state = step(state, least=least)
    found = set(map(tuple, evolve.front(state).objectives.tolist()))
    truth = set(exact_front(least))
    assert len(truth) > 10
    assert all(cost >= least for cost, _ in found)
    assert len(found & truth) >= 0.9 * len(truth)


def test_random_draws_alone_do_not_find_it():
    """The same number of evaluations without selection: the convergence test above can fail."""
    genomes = jax.random.randint(jax.random.key(0), (48 * 150, 8), 0, CARDS)
    found = set(map(tuple, np.asarray(evaluate(genomes)[0]).tolist()))
    assert len(found & set(exact_front())) < 0.5 * len(exact_front())


@pytest.mark.parametrize("least", [0, 20])
def test_the_archive_is_the_non_dominated_of_all_that_was_seen(least):
    """With a population far smaller than the front."""
    state = start()
    seen = {}
    for _ in range(60):
        children = ask(state)
        objectives, violation = evaluate(children, least)
        rows = zip(objectives.tolist(), violation.tolist(), strict=True)
        seen.update({tuple(o): float(v) for o, v in rows})
        state = tell(state, children, objectives, violation)
    points = list(seen.items())
    expected = {a for a, va in points if not any(better(b, a, vb, va) for b, vb in points)}
    assert set(map(tuple, evolve.front(state).objectives.tolist())) == expected
    if not least:
        assert len(expected) > 16


def test_a_full_archive_keeps_the_ends_of_the_front():
    state, best = start(archive=6), np.full(2, np.inf)
    for _ in range(20):
        children = ask(state)
        objectives, violation = evaluate(children)
        best = np.minimum(best, np.asarray(objectives).min(0))
        state = tell(state, children, objectives, violation)
    assert evolve.front(state).objectives.shape == (6, 2)
    assert (evolve.front(state).objectives.min(0) == best).all()


@pytest.mark.slow
def test_jitted_and_plain_runs_are_the_same_bit_for_bit():
    state = step(step(start()))
    children = evolve.ask(state, CARDS)
    assert identical(children, ask(state))
    assert identical(step(state), evolve.tell(state, children, *evaluate(children)))


def test_a_run_resumed_from_numpy_is_the_same_bit_for_bit():
    whole = start()
    for _ in range(6):
        whole = step(whole)
    part = start()
    for _ in range(3):
        part = step(part)
    leaves, structure = jax.tree.flatten(part)
    part = structure.unflatten([np.array(leaf) for leaf in leaves])
    for _ in range(3):
        part = step(part)
    assert identical(whole, part)
    assert not identical(whole, start(seed=1))


def test_generations_compile_once():
    state = step(start())
    before = ask._cache_size(), tell._cache_size()
    for _ in range(3):
        state = step(state)
    assert (ask._cache_size(), tell._cache_size()) == before


def test_the_first_generation_is_the_seeds_and_their_neighbourhood():
    seeds = [[0] * 8, [1] * 8]
    state = start(seeds=seeds)
    first = ask(state)
    assert first.shape == (16, 8)
    assert first[:2].tolist() == seeds
    assert ((first >= 0) & (first < CARDS)).all()
    assert len(np.unique(first, axis=0)) > 8
    assert (start(seeds=seeds * 20).population.genomes.shape) == (16, 8)


def test_what_is_not_a_number_is_the_worst():
    state = start()
    children = ask(state)
    objectives = np.array([[np.nan, 0.0], [1.0, 1.0], [2.0, 2.0], *[[0.0, 0.0]] * 13])
    violation = np.array([0.0, 0.0, -1.0, *[np.nan] * 13])
    state = tell(state, children, objectives, violation)
    assert (state.population.genomes[0] == children[1]).all()
    assert evolve.front(state).objectives.tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda: start(population=1), "population: expected 2 or more, got 1"),
        (lambda: start(seeds=[[0] * 7]), r"seeds: expected \[S, 8\] genomes, got shape \[1, 7\]"),
        (lambda: start(seeds=[[0] * 7 + [2]]), r"seeds\[0\], gene 7: expected 0 to 1, got 2"),
        (lambda: evolve.init(jax.random.key(0), [], population=4), "at least one gene"),
        (
            lambda: evolve.tell(start(), jnp.zeros((16, 8)), jnp.zeros((16, 3)), jnp.zeros(16)),
            r"expected objectives \[16, 2\].*got \[16, 3\]",
        ),
    ],
)
def test_errors(action, message):
    with pytest.raises(evolve.EvolveError, match=message):
        action()


def test_everyone_is_the_front_and_then_the_population_each_once():
    def scored(genomes, objectives, violation):
        return evolve.Scored(np.array(genomes, np.int32), np.array(objectives, np.float32), np.array(violation, "f"))

    inf = np.inf
    state = evolve.State(
        population=scored([[1], [3], [2]], [[1, 1], [2, 3], [inf, inf]], [0, 0, inf]),
        archive=scored([[1], [0], [-1]], [[1, 1], [0.5, 2], [inf, inf]], [0, 0, inf]),
        key=np.zeros(2, np.uint32),
        generation=np.int32(1),
    )
    found = evolve.distinct(evolve.everyone(state))
    assert found.genomes.tolist() == [[0], [1], [3]]
    assert found.objectives.tolist() == [[0.5, 2], [1, 1], [2, 3]]
