"""How often does the certificate claim what is not so, and what does it miss? By simulation, against the naive rule.

    python benchmarks/certificate.py

A large population of images is drawn on which a dense model and five variants, from large to small, are right or
wrong; the error of the smaller variants exceeds the dense model's by exactly ε, so that a claim about them is false
and the null is as tight as it can be. `certify` is drawn from the population again and again. The naive rule takes the
smallest variant whose error on the same images is within ε of the dense model's.
"""

from __future__ import annotations

import numpy as np
from harness import publish, wilson

from treesurgeon.search.certificate import certify
from treesurgeon.search.selection import Finalist

EPSILON = 0.02
ROUNDS = 4000
POPULATION = 200_000
DENSE_ERROR = 0.15
GAINED = 0.03  # share of images that a variant gains on the dense model, of all
SIZES = (200, 500, 1000, 2000, 5000)
VARIANTS = (("v1", 5), ("v2", 4), ("v3", 3), ("v4", 2), ("v5", 1))


def main() -> None:
    """Print and write the table."""
    rows = []
    for delta in (0.05, 0.1):
        for count in SIZES:
            false, naive, _ = shares(count, delta, excess=(0.0, 0.0, EPSILON, EPSILON, EPSILON))
            _, _, power = shares(count, delta, excess=(0.0,) * 5)
            rows.append(
                [f"{delta:g}", f"{count:,}", wilson(false, ROUNDS), wilson(naive, ROUNDS), wilson(power, ROUNDS)]
            )
            print(rows[-1], flush=True)
    publish(
        "certificate",
        f"False claims of the certificate and of the naive rule, ε = {100 * EPSILON:g} points",
        ("δ", "images of certify", "false claims, certificate", "false claims, naive rule", "power"),
        rows,
        f"Shares of {ROUNDS:,} draws of `certify`, 95 % interval (Wilson), synthetic answers, seed 0: the dense model "
        f"errs on {DENSE_ERROR:.0%}, a variant gains {GAINED:.0%} of the images and loses as many, or as many and ε. "
        "False claims: one of three variants whose excess is exactly ε is selected. Power: the smallest of five "
        "variants that are all as good as the dense model is selected.",
    )


def shares(count: int, delta: float, excess: tuple[float, ...]) -> tuple[float, float, float]:
    """How often a variant beyond ε is certified, is chosen naively, and how often the smallest is certified."""
    rng = np.random.default_rng(0)
    dense = rng.random(POPULATION) < DENSE_ERROR
    wrong = {"dense": dense}
    for (name, _), more in zip(VARIANTS, excess, strict=True):
        wrong[name] = dense.copy()
        wrong[name][rng.choice(np.flatnonzero(dense), round(GAINED * POPULATION), replace=False)] = False
        lost = round((GAINED + more) * POPULATION)
        wrong[name][rng.choice(np.flatnonzero(~dense), lost, replace=False)] = True
    bad = {name for (name, _), more in zip(VARIANTS, excess, strict=True) if more >= EPSILON}
    models = [Finalist(name, {"params": size}, 0.0, 0.0) for name, size in VARIANTS]
    whole = Finalist("dense", {"params": 6}, 0.0, 0.0)
    false = naive = power = 0
    for _ in range(ROUNDS):
        drawn = rng.integers(0, POPULATION, count)
        seen = {name: values[drawn] for name, values in wrong.items()}
        found = certify(
            models, whole, lambda f, seen=seen: seen[f.name], epsilon=EPSILON, eta=1.0, delta=delta, measure="params"
        )
        within = [n for n, _ in VARIANTS if seen[n].mean() - seen["dense"].mean() <= EPSILON]
        false += found.selected in bad
        naive += bool(within) and within[-1] in bad
        power += found.selected == VARIANTS[-1][0]
    return false / ROUNDS, naive / ROUNDS, power / ROUNDS


if __name__ == "__main__":
    main()
