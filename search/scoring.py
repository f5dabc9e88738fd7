"""What scores the candidates of a run: the devices of this process, of several, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from treesurgeon.search.chunking import fitting_chunk
from treesurgeon.search.evaluate import Batches, Evaluator, batches
from treesurgeon.search.mesh import CANDIDATE, DATA, choose_shape, make_mesh, parse_shape
from treesurgeon.search.pool import Pool
from treesurgeon.search.setting import Setting
from treesurgeon.search.sharding import Layout, describe_layout, pick_layout
from treesurgeon.search.space import Space
from treesurgeon.search.sweep import Sweep
from treesurgeon.search.unlabelled import scoring
from treesurgeon.search.workers import Crew, RemoteEvaluator, RemoteSweep

SWEEP_IMAGES = 128  # of those that score candidates
# Images that a single change is calibrated on. On ResNet-56 rises from 64 are as near to those from 256 calibration and
# 512 scoring images as rises from 128 are: a standard deviation of the logarithms of 0.17, rank correlation 0.98.
SWEEP_CALIBRATION = 64
SCORED_AT_ONCE = 128  # images of a batch


def chunk_size(setting: Setting) -> int:
    """Candidates that are evaluated as one batch; it does not depend on how many devices there are."""
    config = setting.config
    size = min(SCORED_AT_ONCE, setting.scored)
    return config.chunk or (
        1 if config.reconstruct == "kernels" else fitting_chunk(setting.subject, size, config.population)
    )


def pick_mesh(setting: Setting, pool: Pool) -> Mesh:
    """The devices of a search: as asked for, else all of them, in the shape that is fastest."""
    if pool.mesh:
        return make_mesh(parse_shape(pool.mesh))
    size = min(SCORED_AT_ONCE, setting.scored)
    pieces, shown = -(-setting.config.population // chunk_size(setting)), -(-setting.scored // size)
    return make_mesh(choose_shape(jax.device_count(), pieces, shown))


def lay_out(setting: Setting, pool: Pool) -> Layout:
    """The devices of a search, and how the model lies on them."""
    return pick_layout(pick_mesh(setting, pool), pool.shard, setting.subject.variables)


def hire(setting: Setting, space: Space, pool: Pool, say: Callable[[str], None]) -> Crew:
    """Ray workers for all that takes long."""
    crew = Crew(pool.ray, pool.workers, say)
    say(f"{crew.count} Ray workers")
    crew.hire(
        setting,
        partial(make_evaluator, space=space, chunk=chunk_size(setting)),
        partial(make_sweep, space=space),
    )
    return crew


def scored(setting: Setting) -> Batches:
    """The images that candidates are scored on."""
    return batches(scoring(setting), SCORED_AT_ONCE, setting.scored)


def make_scorer(
    setting: Setting, space: Space, layout: Layout | None = None, crew: Crew | None = None
) -> Evaluator | RemoteEvaluator:
    """What scores candidates, here or with a crew."""
    if crew:
        return RemoteEvaluator(crew, scored(setting), chunk_size(setting))
    return make_evaluator(setting, space, layout)


def with_ends(setting: Setting, space: Space) -> Space:
    """The space of the whole depth, and of candidates that end at one of the exits."""
    before = tuple((each.groups, each.blocks) for each in setting.exits)
    return replace(space, exits=tuple(each.point for each in setting.exits), before=before)


def make_evaluator(setting: Setting, space: Space, layout: Layout | None = None, chunk: int | None = None) -> Evaluator:
    """What scores the candidates of a space, on devices of this process."""
    config, space = setting.config, with_ends(setting, space)
    one = jax.jit(space.decode)(space.dense_genome())
    count = config.calibration_images
    calibration = jnp.asarray(setting.calibration(count)) if count else None
    return Evaluator(
        setting.subject,
        one,
        calibration,
        scored(setting),
        chunk=chunk or config.chunk,
        population=config.population,
        reconstruct=config.reconstruct,
        precision=config.precision,
        layout=layout,
        exits=setting.exits,
    )


def make_sweep(setting: Setting, space: Space, layout: Layout | None = None, crew: Crew | None = None) -> Sweep:
    """What tries single changes."""
    config = setting.config
    count = min(config.calibration_images, SWEEP_CALIBRATION)
    calibration = jnp.asarray(setting.calibration(count)) if count else None
    data = batches(scoring(setting), SWEEP_IMAGES, SWEEP_IMAGES)
    given = setting.subject, space, calibration, data
    options: Any = {"chunk": config.chunk, "reconstruct": config.reconstruct, "layout": layout}
    return RemoteSweep(crew, *given, **options) if crew else Sweep(*given, **options)


def describe(setting: Setting, evaluator: Evaluator | RemoteEvaluator, say: Callable[[str], None]) -> None:
    """Say how candidates are scored, and where devices will have nothing to do."""
    together = "one candidate" if evaluator.chunk == 1 else f"{evaluator.chunk} candidates"
    text = f"{evaluator.count} images score a candidate, {together} at a time"
    pieces, places = -(-setting.config.population // evaluator.chunk), 1
    if isinstance(evaluator, RemoteEvaluator):
        places = evaluator.crew.count
        say(text)
    else:
        where = "kept in memory" if evaluator.cached else "computed for each generation"
        size = evaluator.frontier_bytes / 2**20
        say(f"{text}; what comes before the first change is {where} ({size:.1f} MB a batch)")
        places, columns = evaluator.mesh.shape[CANDIDATE], evaluator.mesh.shape[DATA]
        if evaluator.mesh.size > 1:
            say(f"{evaluator.mesh.size} devices: {places} along candidates, {columns} along images")
        where = describe_layout(evaluator.layout, setting.subject.variables)
        if where:
            say(where)
    if pieces < places:
        say(
            f"a generation is {pieces} chunks of {evaluator.chunk} candidates, so that some of {places} have nothing "
            f"to do: a smaller --chunk or a larger --population gives them work"
        )
