"""The most selective units of a selected model: the images of `search` that they answer to most, and where on them.

`engine/selectivity.py` says what selectivity is; `treesurgeon insight` has all units.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from treesurgeon import engine
from treesurgeon.search import report
from treesurgeon.search.activity import Looked, Units, measured
from treesurgeon.search.pictures import write_whole
from treesurgeon.search.strips import ending, strip
from treesurgeon.search.transfer import by_batch

UNITS, EACH = 8, 2  # that are shown, at most: of all, and of one group
IMAGES = 6  # for each


def write_selective(directory: Path, looked: Looked) -> None:
    """Write `selective.csv`, and a picture for each of its rows into `selective/`, by its number from 0."""
    active = jax.jit(engine.unit_activity(looked.infer, looked.graph))
    every = by_batch(lambda x: active(looked.variables, x), looked.split)
    found = [measured(name, every[name], looked) for name in looked.graph.groups if name in every]
    chosen = most_selective(found)
    tops = [units.top(unit, IMAGES) for units, unit in chosen]
    maps = maps_of(looked, [(units.group, unit) for units, unit in chosen], tops)
    shown = looked.split.images * np.asarray(looked.std, np.float32) + np.asarray(looked.mean, np.float32)
    shutil.rmtree(directory / "selective", ignore_errors=True)  # of a run that was killed
    (directory / "selective").mkdir()
    rows = []
    for k, ((units, unit), at, where) in enumerate(zip(chosen, tops, maps, strict=True)):
        picture = strip(shown[at], where)
        write_whole(directory / f"selective/{k}.{ending(picture)}", picture)
        rows.append(
            {
                "group": units.group,
                "unit": unit,
                "selectivity": units.selectivity[unit],
                "class": looked.classes[units.prefers[unit]],
                "top_images": looked.split.indices[at],
                "top_labels": looked.split.labels[at],
                "maps": where is not None,
            }
        )
    report.write_table(directory / "selective.csv", report.SELECTIVE_COLUMNS, rows)


def most_selective(found: Sequence[Units]) -> list[tuple[Units, int]]:
    """Groups with one of their units, the most selective first; none that is never active."""
    ranked = sorted(
        ((units, unit) for units in found for unit in range(len(units.selectivity)) if units.activity[:, unit].any()),
        key=lambda entry: -entry[0].selectivity[entry[1]],
    )
    out: list[tuple[Units, int]] = []
    taken: Counter[str] = Counter()
    for units, unit in ranked:
        if taken[units.group] < EACH and len(out) < UNITS:
            taken[units.group] += 1
            out.append((units, unit))
    return out


def maps_of(looked: Looked, units: Sequence[tuple[str, int]], tops: Sequence[np.ndarray]) -> list[np.ndarray | None]:
    """Where each unit is active on its images, `[N, h, w]`; None where its positions are no plane."""
    if not units:
        return []
    names = {name for name, _ in units}
    read = engine.activity_maps(looked.infer, looked.graph)

    @jax.jit
    def look(variables: Any, x: Any) -> Any:
        found = read(variables, x)
        return {name: found[name] for name in names}

    filled = [np.resize(at, IMAGES) for at in tops]  # one program for all
    found = [look(looked.variables, looked.split.images[at])[name] for (name, _), at in zip(units, filled, strict=True)]
    shape = looked.split.images.shape[1:3]
    return [
        as_plane(np.asarray(values)[: len(at), ..., unit], shape)
        for values, at, (_, unit) in zip(found, tops, units, strict=True)
    ]


def as_plane(values: np.ndarray, image: tuple[int, ...]) -> np.ndarray | None:
    """Values `[N, *positions]` as `[N, h, w]`; positions in a row are a plane if one formed as the images fits."""
    if values.ndim == 3:
        return values
    if values.ndim != 2:
        return None
    count = values.shape[1]
    height = round((count * image[0] / image[1]) ** 0.5)
    fits = height > 1 and height * round(height * image[1] / image[0]) == count
    return values.reshape(len(values), height, -1) if fits else None
