"""How often does the certificate claim what is not so, and what does it miss? By simulation, against the naive rule.

    python benchmarks/certificate.py
    python benchmarks/certificate.py --checkpoint resnet20.safetensors --data tfds-dir:PATH     # on real candidates

A large population of images is drawn on which a dense model and five variants, from large to small, are right or
wrong; the error of the smaller variants exceeds the dense model's by exactly ε, or their gap exceeds its gap by exactly
η, so that a claim about them is false and the null is as tight as it can be. They gain some images on the dense model,
or only lose. `certify` is drawn from the population again and again. The naive rule takes the smallest variant whose
error and gap on the same images are within ε and η of the dense model's.

With a checkpoint the candidates are real (see candidates.py): all clean images are the population, `certify` is drawn
from them with replacement, and a claim is judged on all of them. ε is the true excess of one candidate after the other,
so that the null of that candidate is as tight as it can be.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from candidates import Pool, pool
from harness import bars, numbers, publish, wilson

from treesurgeon.search.certificate import certify
from treesurgeon.search.config import Config
from treesurgeon.search.selection import Finalist

EPSILON = 0.02
ROUNDS = 4000
REAL_ROUNDS = 2000
POPULATION = 200_000
DENSE_ERROR = 0.15
GAINED = 0.03  # share of images that a variant gains on the dense model, of all, where it gains any
SIZES = (200, 500, 1000, 2000, 5000)
REAL_SIZES = (250, 500, 1000, 2000, 5000)
WIDEST = 0.05  # the largest excess that is taken for ε
DELTAS = (0.05, 0.1)
VARIANTS = (("v1", 5), ("v2", 4), ("v3", 3), ("v4", 2), ("v5", 1))


@dataclass(frozen=True)
class Case:
    """What a false claim is about: ε or η is exactly what the smaller variants have.

    Attributes:
        name: in the table.
        gained: share of the images that a variant gains on the dense model.
        excess: of the smaller variants' error.
        train: how much less their error on `train` is than the dense model's.
    """

    name: str
    gained: float
    excess: float
    train: float = 0.0


CASES = (
    Case("error", GAINED, EPSILON),
    Case("error, nothing gained", 0.0, EPSILON),
    Case("gap", GAINED, EPSILON / 2, EPSILON / 2),
)


def main() -> None:
    """Print and write the table: synthetic, or with a checkpoint the real one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--checkpoint")
    parser.add_argument("--data")
    parser.add_argument("--answers", type=Path, help="keep the candidates' answers in this .npz, or take them from it")
    options = parser.parse_args()
    if options.checkpoint:
        config = Config(options.model, options.checkpoint, options.data, out="unused", epochs=0)
        real(options.model, "/".join(Path(options.data).parts[-2:]), pool(config, options.answers))
    else:
        synthetic()


def synthetic() -> None:
    """The table of synthetic answers."""
    rows = []
    for case in CASES:
        for delta in DELTAS:
            for count in SIZES:
                false, naive, _ = shares(count, delta, case, good=2)
                _, _, power = shares(count, delta, case, good=5)
                found = (wilson(share, ROUNDS) for share in (false, naive, power))
                rows.append([case.name, f"{delta:g}", f"{count:,}", *found])
                print(rows[-1], flush=True)
    publish(
        "certificate",
        f"False claims of the certificate and of the naive rule, ε = η = {100 * EPSILON:g} points",
        ("tight", "δ", "images of certify", "false claims, certificate", "false claims, naive rule", "power"),
        rows,
        f"Shares of {ROUNDS:,} draws of `certify`, 95 % interval (Wilson), synthetic answers, seed 0: the dense model "
        f"errs on {DENSE_ERROR:.0%}, a variant gains {GAINED:.0%} of the images, or none, and loses as many, or as "
        "many and its excess. False claims: one of three variants whose excess is exactly ε (tight: error), or whose "
        "gap's is exactly η (tight: gap, half of it from `train`), is selected. Power: the smallest of five variants "
        "that are all as good as the dense model is selected.",
    )
    picture([row[1:] for row in rows if row[0] == CASES[0].name], DELTAS[0])


def picture(rows: list[list[str]], delta: float) -> None:
    """The false claims of both rules at a level, as bars."""
    shown = []
    for level, count, *found, _ in rows:
        if float(level) == delta:
            for rule, cell in zip(("certificate", "naive rule"), found, strict=True):
                shown.append((f"{rule}, {count} images", *numbers(cell)))
    title = f"false claims at level δ = {delta:g}, where ε is exactly the excess"
    bars(
        "certificate",
        title,
        sorted(shown, key=lambda bar: bar[0].split(",")[0]),
        "percent of draws, 95 % interval",
        "certificate",
    )


def shares(count: int, delta: float, case: Case, good: int) -> tuple[float, float, float]:
    """How often a variant beyond ε or η is certified, is chosen naively, and how often the smallest is certified.

    Args:
        count, delta: of `certify`, and the level.
        case: what the variants after the first `good` ones are.
        good: how many are as good as the dense model, the larger ones.
    """
    rng = np.random.default_rng(0)
    dense = rng.random(POPULATION) < DENSE_ERROR
    wrong, train = {"dense": dense}, {}
    for k, (name, _) in enumerate(VARIANTS):
        wrong[name], train[name] = dense.copy(), -case.train if k >= good else 0.0
        wrong[name][rng.choice(np.flatnonzero(dense), round(case.gained * POPULATION), replace=False)] = False
        lost = round((case.gained + (case.excess if k >= good else 0)) * POPULATION)
        wrong[name][rng.choice(np.flatnonzero(~dense), lost, replace=False)] = True
    bad = {name for name, _ in VARIANTS[good:]}
    models = [Finalist(name, {"params": size}, train[name], 0.0) for name, size in VARIANTS]
    whole = Finalist("dense", {"params": 6}, 0.0, 0.0)
    false = naive = power = 0
    for _ in range(ROUNDS):
        drawn = rng.integers(0, POPULATION, count)
        seen = {name: values[drawn] for name, values in wrong.items()}
        found = certify(
            models,
            whole,
            lambda f, seen=seen: seen[f.name],
            epsilon=EPSILON,
            eta=EPSILON,
            delta=delta,
            measure="params",
        )
        above = {name: seen[name].mean() - seen["dense"].mean() for name, _ in VARIANTS}
        within = [n for n, _ in VARIANTS if above[n] <= EPSILON and above[n] - train[n] <= EPSILON]
        false += found.selected in bad
        naive += bool(within) and within[-1] in bad
        power += found.selected == VARIANTS[-1][0]
    return false / ROUNDS, naive / ROUNDS, power / ROUNDS


def real(model: str, data: str, found: Pool) -> None:
    """The table of real candidates."""
    excess = {name: float(w.mean() - found.wrong[0].mean()) for name, w in zip(found.names, found.wrong, strict=True)}
    params = dict(zip(found.names, found.params, strict=True))
    margins = {name: value for name, value in excess.items() if 0 < value <= WIDEST}
    models = [Finalist(name, {"params": params[name]}, 0.0, 0.0) for name in found.names[1:]]
    dense = Finalist("dense", {"params": params["dense"]}, 0.0, 0.0)
    rng, rows = np.random.default_rng(0), []
    for count in REAL_SIZES:
        tally = {(delta, tight): Counter() for delta in DELTAS for tight in margins}
        for _ in range(REAL_ROUNDS):
            drawn = found.wrong[:, rng.integers(0, found.wrong.shape[1], count)]
            seen = dict(zip(found.names, drawn, strict=True))
            above = dict(zip(found.names, drawn.mean(1) - drawn[0].mean(), strict=True))
            for (delta, tight), total in tally.items():
                total.update(_outcome(models, dense, seen, above, excess, margins[tight], delta, params))
        for (delta, tight), total in tally.items():
            best = min((n for n in excess if excess[n] < margins[tight]), key=params.__getitem__)
            rows.append(
                [
                    f"{delta:g}",
                    f"{100 * margins[tight]:.2f}",
                    f"{count:,}",
                    *(wilson(total[key] / REAL_ROUNDS, REAL_ROUNDS) for key in ("false", "naive", "power")),
                    *(f"{100 * total[key] / REAL_ROUNDS / params['dense']:.1f}" for key in ("size", "naive size")),
                    f"{100 * params[best] / params['dense']:.1f}",
                ]
            )
            print(rows[-1], flush=True)
    rows.sort(key=lambda row: (row[0], float(row[1])))
    errors = ", ".join(f"{name} {100 * excess[name]:+.2f}" for name in found.names[1:])
    publish(
        f"certificate-{model}",
        f"False claims of the certificate and of the naive rule on variants of {model}",
        (
            "δ",
            "ε (points)",
            "images of certify",
            "false claims, certificate",
            "false claims, naive rule",
            "power",
            "size, certificate",
            "size, naive rule",
            "size, smallest within ε",
        ),
        rows,
        f"Shares of {REAL_ROUNDS:,} draws of `certify` (with replacement) from {found.wrong.shape[1]:,} clean images "
        f"of {data}, 95 % interval (Wilson), seed 0. {len(models)} variants at shares of the dense model's multiply-"
        "accumulates, cut and refitted without a gradient step; their excess over its error of "
        f"{100 * found.wrong[0].mean():.2f} % on all images, in points: {errors}. ε is the excess of one of them, so "
        "that claiming that one is false by a hair. False claims: a variant whose excess is ε or more passes "
        "(certificate), or is taken (naive rule). Power: the smallest variant whose excess is below ε is certified. "
        "Sizes are parameters in percent of the dense model's, means over the draws; what is smaller than the last "
        "column is bought with false claims.",
    )


def _outcome(
    models: list[Finalist],
    dense: Finalist,
    seen: dict[str, np.ndarray],
    above: dict[str, float],
    excess: dict[str, float],
    epsilon: float,
    delta: float,
    params: dict[str, int],
) -> dict[str, int]:
    """What the certificate and the naive rule make of one draw."""
    made = certify(models, dense, lambda f: seen[f.name], epsilon=epsilon, eta=1.0, delta=delta, measure="params")
    bad = {name for name in excess if excess[name] >= epsilon}
    naive = min((name for name in above if above[name] <= epsilon), key=params.__getitem__)
    return {
        "false": any(step.passed and step.name in bad for step in made.steps),
        "naive": naive in bad,
        "power": made.selected == min(excess.keys() - bad, key=params.__getitem__),
        "size": params[made.selected],
        "naive size": params[naive],
    }


if __name__ == "__main__":
    main()
