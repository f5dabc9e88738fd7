"""Real candidates for simulations: variants of one checkpoint, from large to small, and what they answer.

The widths follow one global ranking of units, cut to ten shares of the multiply-accumulates; each variant is refitted
as a finalist is, without a gradient step. All of it sees `train` alone, so that every image of `search`, `certify` and
`test` is clean for all of them, and they make up one pool.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search import baselines, ranking
from treesurgeon.search.config import Config
from treesurgeon.search.evaluate import batches
from treesurgeon.search.finalists import prepared
from treesurgeon.search.setting import prepare

SHARES = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4)  # of the dense model's multiply-accumulates
CLEAN = ("search", "certify", "test")


@dataclass(frozen=True)
class Pool:
    """What the dense model and its variants answer on the same clean images.

    Attributes:
        names: the models from large to small, the dense one first.
        params: trainable parameters of each.
        wrong: `bool[models, N]`, which images each gets wrong.
    """

    names: tuple[str, ...]
    params: tuple[int, ...]
    wrong: np.ndarray


def pool(config: Config, kept: Path | None = None) -> Pool:
    """Cut, refit and ask the candidates; `kept` is a file that holds the answers from one call to the next."""
    if kept is not None and kept.exists():
        with np.load(kept) as found:
            return Pool(tuple(found["names"].tolist()), tuple(found["params"].tolist()), found["wrong"])
    setting = prepare(config)
    subject, graph = setting.subject, setting.subject.graph
    scores = engine.normalise(ranking.rank(setting))
    splits = [getattr(setting.roles, role) for role in CLEAN]

    def wrong(infer: Any, variables: Any) -> np.ndarray:
        ask = jax.jit(infer)
        parts = []
        for split in splits:
            answers = [np.asarray(ask(variables, x)).argmax(-1) for x in batches(split, 250).images]
            parts.append(np.concatenate(answers)[: len(split)] != split.labels)
        return np.concatenate(parts)

    names, params = ["dense"], [engine.cost(graph, engine.Plan()).params]
    found = [wrong(subject.infer, subject.variables)]
    for share in SHARES:
        start = time.perf_counter()
        plan = baselines.global_plan(graph, scores, {"macs": share}, least=0.1)
        found.append(wrong(engine.narrow(subject.infer, graph, plan), prepared(setting, subject, plan)))
        names.append(f"{share:.0%}")
        params.append(engine.cost(graph, plan).params)
        print(f"{share:.0%} of the MACs: error {found[-1].mean():.2%}, dense {found[0].mean():.2%}; "
              f"{time.perf_counter() - start:.0f} s", flush=True)  # fmt: skip
    out = Pool(tuple(names), tuple(map(int, params)), np.array(found))
    if kept is not None:
        np.savez(kept, names=out.names, params=out.params, wrong=out.wrong)
    return out
