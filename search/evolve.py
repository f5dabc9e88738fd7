"""NSGA-II on integer genomes, every step a pure function that jits.

K. Deb, A. Pratap, S. Agarwal, T. Meyarivan: "A fast and elitist multiobjective genetic algorithm: NSGA-II",
IEEE Transactions on Evolutionary Computation 6(2), 2002: non-dominated ranks, crowding distance, constrained
domination (section VI), (mu + lambda) survival.

    state = init(key, cardinality, population=64, objectives=2, seeds=space.seeds())
    while state.generation < generations:
        children = ask(state, cardinality)
        state = tell(state, children, *evaluate(children))
    best = front(state)

A genome is `int32[G]`; gene i takes the values 0 to `cardinality[i] - 1`. Objectives are minimised. What
departs from the paper: variation is for integers (uniform crossover; steps of one level, now and then a
fresh draw); clones, by genome or by objectives, go to the last front; candidates may fall into niches, none
of which beats another; and an archive keeps the non-dominated of everything seen, since (mu + lambda)
survival drops front members as soon as the front outgrows the population.

`State` is a pytree of plain arrays, its key included, and the random bits of a generation depend on the key
and the generation alone: saving the state is all that resuming needs. Its individuals lie best first, which
is all that a tournament has to know.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from treesurgeon.engine.errors import TreesurgeonError

Canonical = Callable[[Array], Array]  # genome -> the one that stands for all of the same candidate
Niche = Callable[[Array], Array]  # genome -> int[], what it competes with

RETRIES = 4  # more rounds of mutation, each at twice the rate, for a child that is not new


class EvolveError(TreesurgeonError, ValueError):
    """A population, a seed genome or a result that does not fit the search."""


def itself(genome: Array) -> Array:
    """Every genome is a candidate of its own."""
    return genome


def together(genome: Array) -> Array:
    """All compete with all."""
    return jnp.zeros((), genome.dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scored:
    """Genomes and what they are worth."""

    genomes: Array  # int32[N, G]; -1 throughout in an unused row of the archive
    objectives: Array  # float32[N, M]; inf where nothing is known
    violation: Array  # float32[N]; 0 = feasible, inf where nothing is known


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """A search between two generations."""

    population: Scored  # best first
    archive: Scored  # the non-dominated of all seen; unused rows have violation inf
    key: Array  # uint32[2], raw, so that it can be saved
    generation: Array  # int32[]


def init(
    key: Array,
    cardinality: ArrayLike,
    *,
    population: int,
    objectives: int = 2,
    seeds: ArrayLike | None = None,
    archive: int = 256,
) -> State:
    """A state whose first `ask` returns its first population.

    Args:
        key: any JAX key.
        cardinality: `int[G]`, the number of values of each gene.
        population: individuals a generation.
        objectives: how many numbers each evaluation gives.
        seeds: `int[S, G]`, genomes to start with. The rest of the population are seeds with a part of their
            genes drawn afresh, a different part for each individual. Without seeds every gene is drawn
            uniformly.
        archive: rows of the archive; when more than these are non-dominated, the most crowded go.
    """
    cards = np.asarray(cardinality, np.int32)
    _check(cards, population, seeds)
    starts = None if seeds is None else jnp.asarray(seeds, jnp.int32)
    return _first(key, cards, starts, population, objectives, archive)


@partial(jax.jit, static_argnums=(3, 4, 5))
def _first(key: Array, cards: Array, starts: Array | None, population: int, objectives: int, archive: int) -> State:
    seed, scatter = jax.random.split(key)
    keys = jax.random.split(scatter, population)
    if starts is None:
        genomes = jax.vmap(_draw, (0, None))(keys, cards)
    else:
        genomes = jax.vmap(_scatter, (0, None, None))(keys, starts, cards)
        genomes = jnp.concatenate([starts, genomes])[:population]
    return State(
        population=Scored(genomes, *_unknown(population, objectives)),
        archive=Scored(jnp.full((archive, cards.size), -1, jnp.int32), *_unknown(archive, objectives)),
        key=jax.random.bits(seed, (2,), jnp.uint32),
        generation=jnp.zeros((), jnp.int32),
    )


def ask(
    state: State,
    cardinality: ArrayLike,
    *,
    crossover: float = 0.9,
    mutation: float | None = None,
    reset: float = 0.2,
    canonical: Canonical = itself,
) -> Array:
    """The genomes to evaluate next, `int32[P, G]`; in generation 0 the initial population, without repeats.

    Args:
        state: where the search stands.
        cardinality: `int[G]`, as given to `init`.
        crossover: the share of children with two parents.
        mutation: the chance that a gene changes; 1 / G if None.
        reset: the share of changes that draw the gene afresh; the others move it by one level.
        canonical: where several genomes are one candidate, the one by which that is known; a child is to be a new one.
    """
    parents = state.population.genomes
    size, genes = parents.shape
    known, first = jax.vmap(canonical)(parents), state.generation == 0
    cards = jnp.asarray(cardinality, jnp.int32)
    rate = 1 / genes if mutation is None else mutation
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key, impl="threefry2x32"), state.generation)
    pick, cross, change = jax.random.split(key, 3)
    # binary tournaments: the population lies best first, so the lower number wins
    mothers, fathers = jax.random.randint(pick, (2, size, 2), 0, size).min(-1)
    children = jax.vmap(recombine, (0, 0, 0, None))(
        jax.random.split(cross, size), parents[mothers], parents[fathers], crossover
    )

    def attempt(carry: tuple[Array, Array], now: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        children, stale = carry
        key, rate = now
        mutants = jax.vmap(mutate, (0, 0, None, None, None))(jax.random.split(key, size), children, cards, rate, reset)
        children = jnp.where(stale[:, None], mutants, children)
        new = jax.vmap(canonical)(children)
        stale = (_same(new, known).any(1) & ~first) | _later(_same(new, new))
        return (children, stale), None

    rates = jnp.asarray(np.minimum(rate * 2.0 ** np.arange(1 + RETRIES), 1), jnp.float32)
    keys = jax.random.split(change, 1 + RETRIES)
    stale = _later(_same(known, known)) | ~first
    (children, _), _ = jax.lax.scan(attempt, (jnp.where(first, parents, children), stale), (keys, rates))
    return children


def tell(
    state: State,
    children: Array,
    objectives: ArrayLike,
    violation: ArrayLike,
    *,
    canonical: Canonical = itself,
    niche: Niche = together,
) -> State:
    """The state after the children were evaluated; one with an objective that is not a number is the worst.

    Args:
        state: the state that `ask` was given.
        children: what `ask` returned.
        objectives: `float[P, M]`, all to be minimised.
        violation: `float[P]`, by how much a child breaks the constraints, summed; 0 or less is feasible.
        canonical: as given to `ask`.
        niche: of what meets the constraints, none beats one of another niche, and each has its own extremes.
    """
    values = jnp.asarray(objectives, jnp.float32)
    broken = jnp.asarray(violation, jnp.float32)
    size, wide = state.population.objectives.shape
    if values.shape != (len(children), wide) or broken.shape != (len(children),):
        raise EvolveError(
            f"results for {len(children)} children: expected objectives [{len(children)}, {wide}] and "
            f"violation [{len(children)}], got {list(values.shape)} and {list(broken.shape)}; "
            "check what the evaluation returns"
        )
    values = jnp.where(jnp.isnan(values).any(1, keepdims=True), jnp.inf, values)
    broken = jnp.where(jnp.isnan(broken), jnp.inf, jnp.maximum(broken, 0))
    told = Scored(jnp.asarray(children, jnp.int32), values, broken)
    survivors, _ = select(_join(told, state.population), size, canonical, niche)
    elite, rank = select(_join(state.archive, told), len(state.archive.violation), canonical, niche)
    return State(
        population=survivors,
        archive=_blank(elite, (rank > 0) | jnp.isinf(elite.violation)),
        key=state.key,
        generation=state.generation + 1,
    )


def front(state: State) -> Scored:
    """The archive's used rows as numpy arrays, in lexicographic order of the objectives.

    While nothing feasible was seen, these are the individuals that break the constraints least.
    """
    everything = jax.tree.map(np.asarray, state.archive)
    used = np.flatnonzero(np.isfinite(everything.violation))
    used = used[np.lexsort(everything.objectives[used].T[::-1])]
    return jax.tree.map(lambda leaf: leaf[used], everything)


def everyone(state: State) -> Scored:
    """The archive's used rows and the population as numpy arrays; the front comes first."""
    parts = front(state), jax.tree.map(np.asarray, state.population)
    pool = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return jax.tree.map(lambda leaf: leaf[np.isfinite(pool.violation)], pool)


def distinct(found: Scored, canonical: Canonical = itself) -> Scored:
    """Every candidate once, by its canonical genome."""
    found = replace(found, genomes=jax.jit(jax.vmap(canonical))(jnp.asarray(found.genomes)))
    _, first = np.unique(np.asarray(found.genomes), axis=0, return_index=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[np.sort(first)], found)


# --- survival ---------------------------------------------------------------------------------------------


def select(pool: Scored, count: int, canonical: Canonical = itself, niche: Niche = together) -> tuple[Scored, Array]:
    """The best `count` of a pool, best first, with their ranks: by front, then by crowding distance."""
    genomes, niches = jax.vmap(canonical)(pool.genomes), jax.vmap(niche)(pool.genomes)
    rank = ranks(dominates(pool.objectives, pool.violation, niches))
    alike = _same(pool.objectives, pool.objectives) & (pool.violation[:, None] == pool.violation)
    alike &= niches[:, None] == niches
    rank = jnp.where(_later(alike | _same(genomes, genomes)), len(rank), rank)
    best = jnp.lexsort((-crowding(pool.objectives, rank, niches), rank))[:count]
    return jax.tree.map(lambda leaf: leaf[best], pool), rank[best]


def dominates(objectives: Array, violation: Array, niches: Array) -> Array:
    """`bool[N, N]`: does the row's individual dominate the column's, constraints first (Deb's rule)?"""
    ours, theirs = objectives[:, None], objectives[None, :]
    better = (ours <= theirs).all(-1) & (ours < theirs).any(-1)
    v = jnp.maximum(violation, 0)
    feasible = (v[:, None] == 0) & (v[None, :] == 0)
    return (v[:, None] < v[None, :]) | (feasible & better & (niches[:, None] == niches))


def ranks(dominated: Array) -> Array:
    """`int32[N]`: 0 for what nothing dominates, 1 for what only those dominate, and so on."""

    def peel(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rank, level = carry
        beaten = (dominated & (rank < 0)[:, None]).any(0)
        return jnp.where((rank < 0) & ~beaten, level, rank), level + 1

    start = jnp.full(dominated.shape[0], -1, jnp.int32), jnp.zeros((), jnp.int32)
    return jax.lax.while_loop(lambda carry: (carry[0] < 0).any(), peel, start)[0]


def crowding(objectives: Array, rank: Array, niches: Array) -> Array:
    """`float32[N]`: the room around each within its front and niche; inf at the ends of any objective."""

    def along(values: Array) -> Array:
        order = jnp.lexsort((values, niches, rank))
        v, r, n = values[order], rank[order], niches[order]
        change = (r[1:] != r[:-1]) | (n[1:] != n[:-1])
        end = jnp.append(True, change) | jnp.append(change, True)
        part = jnp.cumsum(jnp.append(0, change))
        low = jax.ops.segment_min(v, part, len(v))[part]
        high = jax.ops.segment_max(v, part, len(v))[part]
        room = (jnp.append(v[1:], v[-1]) - jnp.append(v[0], v[:-1])) / (high - low)
        room = jnp.where(jnp.isfinite(room), room, 0)  # a front with no extent, or with infinities in it
        return jnp.zeros_like(values).at[order].set(jnp.where(end, jnp.inf, room))

    return sum((along(objectives[:, m]) for m in range(objectives.shape[1])), start=jnp.zeros(len(rank)))


# --- variation, of one individual -------------------------------------------------------------------------


def recombine(key: Array, mother: Array, father: Array, chance: float) -> Array:
    """Uniform crossover with the given chance; otherwise the mother."""
    whether, which = jax.random.split(key)
    other = jax.random.bernoulli(which, 0.5, mother.shape) & jax.random.bernoulli(whether, chance)
    return jnp.where(other, father, mother)


def mutate(key: Array, genome: Array, cardinality: Array, rate: ArrayLike, reset: float) -> Array:
    """Each gene changes with chance `rate`: by one level, reflected at the ends (a bit flips), or afresh."""
    change, kind, step, draw = jax.random.split(key, 4)
    move = jnp.where(jax.random.bernoulli(step, 0.5, genome.shape), 1, -1)
    move = jnp.where((genome + move < 0) | (genome + move >= cardinality), -move, move)
    near = jnp.clip(genome + move, 0, cardinality - 1)
    value = jnp.where(jax.random.bernoulli(kind, reset, genome.shape), _draw(draw, cardinality), near)
    return jnp.where(jax.random.bernoulli(change, rate, genome.shape), value, genome)


def _draw(key: Array, cardinality: ArrayLike) -> Array:
    return jax.random.randint(key, np.shape(cardinality), 0, cardinality, jnp.int32)


def _scatter(key: Array, seeds: Array, cardinality: ArrayLike) -> Array:
    """One of the seeds with a random share of its genes drawn afresh."""
    which, share, where, draw = jax.random.split(key, 4)
    base = seeds[jax.random.randint(which, (), 0, len(seeds))]
    fresh = jax.random.bernoulli(where, jax.random.uniform(share), base.shape)
    return jnp.where(fresh, _draw(draw, cardinality), base)


# --- small parts ------------------------------------------------------------------------------------------


def _same(rows: Array, others: Array) -> Array:
    return (rows[:, None] == others[None, :]).all(-1)


def _later(alike: Array) -> Array:
    """True where an earlier row is like this one."""
    return jnp.tril(alike, -1).any(1)


def _join(first: Scored, second: Scored) -> Scored:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, second)


def _blank(rows: Scored, unused: Array) -> Scored:
    return Scored(
        genomes=jnp.where(unused[:, None], -1, rows.genomes),
        objectives=jnp.where(unused[:, None], jnp.inf, rows.objectives),
        violation=jnp.where(unused, jnp.inf, rows.violation),
    )


def _unknown(rows: int, objectives: int) -> tuple[Array, Array]:
    return jnp.full((rows, objectives), jnp.inf, jnp.float32), jnp.full(rows, jnp.inf, jnp.float32)


def _check(cards: np.ndarray, population: int, seeds: ArrayLike | None) -> None:
    if cards.ndim != 1 or cards.size == 0 or (cards < 1).any():
        raise EvolveError(f"cardinality: expected at least one gene with 1 or more values each, got {cards}")
    if population < 2:
        raise EvolveError(f"population: expected 2 or more, got {population}; crossover needs two parents")
    if seeds is None:
        return
    given = np.asarray(seeds)
    if given.ndim != 2 or given.shape[1] != cards.size or not len(given):
        raise EvolveError(f"seeds: expected [S, {cards.size}] genomes, got shape {list(given.shape)}")
    if ((given < 0) | (given >= cards)).any():
        row, gene = np.argwhere((given < 0) | (given >= cards))[0]
        raise EvolveError(
            f"seeds[{row}], gene {gene}: expected 0 to {cards[gene] - 1}, got {given[row, gene]}; "
            "make seeds with the space that gave the cardinality"
        )
