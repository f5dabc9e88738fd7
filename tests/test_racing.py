"""Racing against its promise, and the descent that sensitivities suggest against brute force."""

import itertools

import numpy as np

from treesurgeon.search import sensitivity
from treesurgeon.search.racing import References, estimates, judge

RNG = np.random.default_rng(0)


def test_what_is_clearly_beaten_by_something_no_larger_goes():
    base = RNG.exponential(size=400)
    losses = np.stack([base, base + 0.5, base + 0.5, base + RNG.normal(0, 0.1, 400)])
    size = np.array([0.5, 0.6, 0.4, 0.5])
    none = References.empty(4, 400)
    assert judge(size, losses, none, looks=4).tolist() == [True, False, True, True]  # 2 is worse, and smaller


def test_references_beat_as_well_and_only_on_the_images_seen():
    base = RNG.exponential(size=400).astype(np.float32)
    references = References.empty(2, 400).joined(np.array([0.3]), base[None])
    assert judge(np.array([0.5, 0.2]), base[None, :128] + np.ones((2, 1)), references, 4).tolist() == [False, True]


def test_what_is_out_stays_out_of_the_comparison():
    losses = np.stack([np.full(64, np.nan), RNG.exponential(size=64)])
    assert judge(np.array([0.1, 0.5]), losses, References.empty(2, 64), 4).tolist() == [False, True]


def test_equals_are_dropped_no_more_often_than_promised():
    wrong = 0
    for _ in range(400):
        losses = RNG.exponential(size=(8, 512))  # all alike in truth
        going = np.ones(8, bool)
        for n in (128, 256, 384, 512):
            going &= judge(np.ones(8), losses[:, :n], References.empty(8, 512), looks=4, alpha=0.05)
        wrong += 8 - going.sum()
    assert wrong / (400 * 8) < 0.05


def test_references_keep_what_nothing_dominates():
    losses = np.array([[1.0, 1.0], [2.0, 2.0], [0.5, 0.5], [3.0, np.nan]])
    kept = References.empty(2, 2).joined(np.array([0.5, 0.6, 0.9, 0.1]), losses)
    assert sorted(zip(kept.size.round(3), kept.losses.mean(1), strict=True)) == [
        (0.5, 1.0),
        (np.float32(0.9).round(3), 0.5),
    ]
    again = kept.joined(np.array([0.4]), np.array([[0.2, 0.2]]))
    assert again.size.min() == np.float32(0.4)


def test_estimates_allow_for_how_hard_the_seen_images_were():
    easy, hard = np.ones(100), np.full(100, 3.0)
    full = np.concatenate([easy, hard])
    partly = np.concatenate([easy + 1, np.full(100, np.nan)])
    np.testing.assert_allclose(estimates(np.stack([full, partly]), References.empty(1, 200)), [2.0, 3.0])


WIDTHS = {"a": np.array([8, 6, 4, 2]), "b": np.array([4, 3, 2, 1])}


class Toy:
    """A space of two groups and a block, costs that add up."""

    def __init__(self):
        self.groups, self.blocks = ("a", "b"), ("k",)
        self.sizes, self.widths = {"a": 8, "b": 4}, WIDTHS
        self.cardinality = np.array([4, 4, 2], np.int32)

    def dense_genome(self):
        return np.array([0, 0, 1], np.int32)


def cost(genomes):
    a, b = WIDTHS["a"][genomes[:, 0]], WIDTHS["b"][genomes[:, 1]]
    return (10.0 * a + 5 * b + 30 * genomes[:, 2]) / 130


def test_probes_change_one_thing_and_rises_go_through_them():
    space = Toy()
    dense = space.dense_genome()
    probed = sensitivity.probes(space, dense)
    assert ((probed != space.dense_genome()).sum(1) == 1).all()
    assert len(probed) == 3
    widths = space.widths[space.groups[0]]
    energy = np.linspace(1, 0, widths[0] + 1) ** 2
    found = sensitivity.rises(space, dense, probed, np.array([0.1, 0.2, 0.3]), {space.groups[0]: energy})
    at = probed[0, 0]
    np.testing.assert_allclose(found[0], np.maximum(0.1 * energy[widths] / energy[widths[at]], 0), atol=1e-3)
    others = 1 - space.widths[space.groups[1]] / space.widths[space.groups[1]][0]  # nothing was measured of it
    np.testing.assert_allclose(found[1], 0.2 * others / others[probed[1, 1]], atol=1e-3)
    np.testing.assert_allclose(found[2, :2], [0.3, 0])
    assert len(sensitivity.table(space, found)) == 9


def test_the_descent_gets_smaller_and_ends_near_the_best_sum():
    space = Toy()
    rise = np.array([[0, 0.1, 0.4, 1.0], [0, 0.2, 0.5, 1.5], [0.3, 0, 0, 0]])
    path = sensitivity.descend(space, rise, cost, 0.5, space.dense_genome())
    sizes = cost(path)
    assert (np.diff(sizes) < 0).all()
    assert sizes[-1] <= 0.5 < sizes[-2]

    def total(genome):
        return sum(rise[i, value] for i, value in enumerate(genome))

    every = np.array(list(itertools.product(range(4), range(4), range(2))))
    best = min(total(genome) for genome in every[cost(every) <= 0.5])
    assert total(path[-1]) <= best + 0.31  # greedy: one change at most from the best


def test_the_descent_stops_where_nothing_is_left():
    path = sensitivity.descend(Toy(), np.zeros((3, 4)), cost, 0.0, np.array([0, 0, 1]))
    assert path[-1].tolist() == [3, 3, 0]


def energies_of(space):
    """Of the first group: each step down costs the same."""
    widths = space.widths[space.groups[0]]
    return np.interp(np.arange(widths[0] + 1), widths[::-1], np.arange(len(widths))[::-1])


def test_a_later_stage_tries_what_is_left():
    space, start = Toy(), np.array([1, 3, 0])
    probed = sensitivity.probes(space, start)
    assert probed.tolist() == [[2, 3, 0]]
    found = sensitivity.rises(space, start, probed, np.array([0.5]), {space.groups[0]: energies_of(space)})
    np.testing.assert_allclose(found[0], [np.inf, 0, 0.5, 1.0])
    assert found[1, 3] == found[2, 0] == 0
    assert sensitivity.descend(space, found, cost, 0.0, start)[-1].tolist() == [3, 3, 0]


def test_neighbours_are_near_and_small_enough():
    space, start = Toy(), np.array([2, 1, 0])
    rise = np.array([[np.inf, np.inf, 0, 0.3], [np.inf, 0, 0.2, 0.7], [0, np.inf, 0, 0]])
    found = sensitivity.neighbours(space, rise, cost, 0.5, start, 20, np.random.default_rng(0))
    assert (cost(found) <= 0.5).any()
    assert len(np.unique(found, axis=0)) > 2
    assert not (found == start).all(1).any()
