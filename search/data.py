"""The four roles of data, split once: `train`, `search`, `certify`, `test`.

`train` fits; `search` scores candidates and stops fine-tuning; `certify` is opened once, at the end; `test`
is reported once. What the checkpoint was fitted on is not clean, so the last three come only from splits it
has not seen. Where it is unknown what it has seen, the roles still are disjoint, but no claim about a gap can
be made, and `Roles.clean` says so.

The split is a function of the labels and the seed alone: it uses the raw stream of PCG64, which NumPy keeps
the same in every version (NEP 19), and no method whose stream may change.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from treesurgeon.search.sources import BATCH, DataError, Source, default_data_dir, open_source
from treesurgeon.search.stored import check_images, check_scale, per_channel
from treesurgeon.search.streaming import Streamed, normalised, read_stored, room
from treesurgeon.search.tasks import CLASSIFICATION, TASKS, Task

__all__ = ["DataError", "Roles", "Source", "Split", "default_data_dir", "open_source", "sample_images", "split_roles"]

ROLES = ("train", "search", "certify", "test")
SHARES = (0.5, 0.2, 0.1, 0.2)
MANY = 5000  # images that one process decodes before others are worth their start


@dataclass(frozen=True)
class Split:
    """The images of one role, in an order without meaning: any prefix is a random sample.

    Attributes:
        images: `[N, H, W, C]` float32, normalised; an array, or what stands for one that would not fit into memory.
        labels: `[N]` int32; `[N, K]` float32 where an image has several labels, or numbers.
        indices: `[N]` int64, positions in the dataset's splits named by `origin`, laid end to end.
        origin: those splits.
        fingerprint: SHA-256 over the images as stored and their labels, in the dataset's order. It does not
            depend on the normalisation: the same images are the same evidence.
        digests: `[N]` uint64, of each image as stored, whatever its label: 8 bytes of BLAKE2b, alike for bytes and for
            their 255th parts, and whatever size images are scaled to. Empty if unknown.
        task: what the labels are for.
    """

    images: np.ndarray | Streamed
    labels: np.ndarray
    indices: np.ndarray
    origin: tuple[str, ...]
    fingerprint: str
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    task: Task = CLASSIFICATION

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Roles:
    """The four roles, pairwise disjoint.

    Attributes:
        train: what may be fitted on.
        search: what scores candidates.
        certify: opened once.
        test: reported once.
        clean: whether `search`, `certify` and `test` hold nothing the checkpoint was fitted on, as far as it
            was declared. No gap is claimed where it is False.
        label_names: names of the classes, by label; or of the labels, or numbers, of an image.
        doubt: why `clean` is False, in words; empty where it is not.
        twice: images that were left out of a role because it, or one before it, has the same, pixel for pixel.
    """

    train: Split
    search: Split
    certify: Split
    test: Split
    clean: bool
    label_names: tuple[str, ...]
    doubt: str = ""
    twice: Mapping[str, int] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """What the labels are for."""
        return self.train.task

    def map(self, change: Callable[[Split], Split]) -> "Roles":
        """With every split changed."""
        return replace(self, **{role: change(getattr(self, role)) for role in ROLES})

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of each role."""
        return {role: getattr(self, role).fingerprint for role in ROLES}


def split_roles(
    source: Source,
    fitted: Sequence[str] | None,
    *,
    num_classes: int | None = None,
    input_shape: Sequence[int] | None = None,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    seed: int = 0,
    shares: Sequence[float] = SHARES,
    caps: Mapping[str, int] | None = None,
    hold: int | None = None,
) -> Roles:
    """Give every image of a dataset one role, and read the images.

    An image that is stored twice has the first of its roles alone: what was fitted or chosen on it would else be judged
    on it, and what is judged counts it once. A role of which nothing would be left keeps its images, and then nothing
    is clean. Where a cap on `train` leaves out images of the fitted splits, these are compared as well if they are in
    memory (npz), or if those that it has show that some are stored twice.

    Args:
        source: an open dataset.
        fitted: the splits the checkpoint was fitted on; `train` comes from them and the rest from the others.
            `()`: it has seen none of this data. None: unknown. In both, all roles come from all splits.
        num_classes: of the model; by default the dataset's.
        input_shape: `(H, W, C)` of the model's input, if known.
        mean: subtracted, a number or one per channel, after uint8 images were scaled to 0..1.
        std: divided by, likewise.
        seed: of the split. Same dataset, same seed: same roles.
        shares: of the images, for `train`, `search`, `certify` and `test`. Where `train` has splits of its own the
            others share the rest, as the last three numbers are to each other.
        caps: the most images of a role, stratified. A cap changes no other role.
        hold: bytes of float32 images of a role that are held in memory; of a larger one images are read when they are
            needed (see streaming.py), where `input_shape` is given. By default a sixteenth of the memory.

    Raises:
        DataError: splits, labels or images that do not fit, or too few of them.
    """
    num_classes = source.num_classes if num_classes is None else num_classes
    _check_arguments(source, shares, caps or {}, seed)
    unfitted = tuple(split for split in source.splits if split not in (fitted or ()))
    if fitted:
        _check_fitted(source, fitted, unfitted)
        origins = {"train": tuple(dict.fromkeys(fitted)), **dict.fromkeys(ROLES[1:], unfitted)}
        plan = {("train",): [1.0], ROLES[1:]: shares[1:]}
    else:
        origins = dict.fromkeys(ROLES, unfitted)
        plan = {ROLES: shares}

    dealt: dict[str, tuple[tuple[str, ...], np.ndarray, np.ndarray]] = {}
    for stream, (roles, weights) in enumerate(plan.items()):
        origin = origins[roles[0]]
        labels = _read_labels(source, origin, num_classes)
        strata = TASKS[source.task].strata(labels)
        order = np.argsort(np.random.PCG64([seed, stream]).random_raw(len(labels)), kind="stable")
        parts = _divide(source, origin, strata, order, roles, weights, caps or {})
        dealt |= {role: (origin, indices, labels[indices]) for role, indices in parts.items()}

    def read(role: str, kept: np.ndarray | slice = slice(None)) -> Split:
        origin, indices, labels = dealt[role]
        return _read_split(source, origin, indices[kept], labels[kept], input_shape, mean, std, hold)

    splits = {role: read(role) for role in ROLES}
    taken = splits["train"].digests
    if fitted and len(taken) < sum(source.splits[split] for split in origins["train"]):
        others = np.concatenate([splits[role].digests for role in ROLES[1:]])
        if source.address is None or np.isin(others, taken).any():  # what `train` leaves out may have more, then
            taken = _digests(source, origins["train"])
    doubt = "it is unknown what the checkpoint was fitted on" if fitted is None else ""
    twice: dict[str, int] = {}
    for before, role in enumerate(ROLES[1:], 1):
        digests = splits[role].digests
        again = np.isin(digests, taken)
        if again.all():
            doubt = f"all images of {role} are, pixel for pixel, images of {' or '.join(ROLES[:before])}"
        elif (again := again | ~_first(digests)).any():
            twice[role], splits[role] = int(again.sum()), read(role, ~again)
        taken = np.concatenate([taken, digests])
    return Roles(**splits, clean=not doubt, label_names=source.label_names, doubt=doubt, twice=twice)


def _first(digests: np.ndarray) -> np.ndarray:
    """Which images have none before them that is the same: `bool[N]`."""
    return np.isin(np.arange(len(digests)), np.unique(digests, return_index=True)[1])


def _digests(source: Source, origin: Sequence[str]) -> np.ndarray:
    """Of all images of some splits."""
    found = []
    for split in origin:
        count = source.splits[split]
        apart = source.address is not None and count > MANY
        for start in range(0, count, BATCH):
            found.append(read_stored(source, split, np.arange(start, min(start + BATCH, count)), apart)[1])
    return np.concatenate(found)


def sample_images(
    source: Source,
    count: int,
    *,
    input_shape: Sequence[int],
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    seed: int = 0,
    roles: Roles | None = None,
    hold: int | None = None,
) -> Split:
    """Up to `count` different images of a dataset, from all its splits alike; their labels are not read, and are 0.

    Args:
        source: an open dataset.
        count: how many.
        input_shape: `(H, W, C)`.
        mean, std: as `split_roles` takes them.
        seed: of the choice.
        roles: images that have a role here, in whatever dataset, are left out, where they are the same pixel for pixel.
        hold: as for `split_roles`.

    Raises:
        DataError: no image is left, or they do not fit.
    """
    total = sum(source.splits.values())
    if not total:
        raise DataError(f"data {source.spec!r}: it has no images (splits: {dict(source.splits) or 'none'})")
    order = np.argsort(np.random.PCG64([seed, 2]).random_raw(total), kind="stable")
    taken = np.concatenate([getattr(roles, role).digests for role in ROLES]) if roles else np.zeros(0, np.uint64)

    def read(chosen: np.ndarray) -> Split:
        labels = np.zeros(len(chosen), np.int32)
        return _read_split(source, tuple(source.splits), chosen, labels, input_shape, mean, std, hold)

    chosen, start = order[:0], 0
    while len(chosen) < count and start < total:
        more = order[start : start + count - len(chosen)]
        start += len(more)
        found = read(more)
        new = ~np.isin(found.digests, taken) & _first(found.digests)
        if new.all() and not len(chosen):
            return found
        chosen, taken = np.append(chosen, more[new]), np.append(taken, found.digests[new])
    if not len(chosen):
        raise DataError(f"data {source.spec!r}: all of its {total:,} images are in train, search, certify or test")
    return read(chosen)


def _check_arguments(source: Source, shares: Sequence[float], caps: Mapping[str, int], seed: int) -> None:
    if len(shares) != len(ROLES) or not min(shares) > 0 or not abs(sum(shares) - 1) < 1e-6:
        raise DataError(
            f"data {source.spec!r}: expected --shares above 0 of train, search, certify and test with sum 1, "
            f"got {' '.join(map(str, shares))}"
        )
    if not set(caps) <= set(ROLES) or min(caps.values(), default=1) < 1:
        raise DataError(f"data {source.spec!r}: expected caps of at least 1 for roles {ROLES}, got {dict(caps)}")
    if seed < 0:
        raise DataError(f"data {source.spec!r}: expected a seed of at least 0, got {seed}")
    if not any(source.splits.values()):
        raise DataError(f"data {source.spec!r}: it has no images (splits: {dict(source.splits) or 'none'})")


def _check_fitted(source: Source, fitted: Sequence[str], unfitted: Sequence[str]) -> None:
    there = ", ".join(f"{split} ({size})" for split, size in source.splits.items())
    absent = [split for split in fitted if split not in source.splits]
    if absent:
        raise DataError(
            f"data {source.spec!r}: no split {', '.join(map(repr, absent))}, on which the checkpoint is said "
            f"to be fitted (a model of the zoo says so by itself); the dataset has {there}. Name the one it was fitted "
            "on with --fitted-split, or pass --fitted-split none if it has seen none of these images"
        )
    if not any(source.splits[split] for split in unfitted):
        raise DataError(
            f"data {source.spec!r}: the checkpoint was fitted on every split there is ({there}), so nothing "
            "is left to judge it on. Add a split it has not seen, or correct --fitted-split"
        )


def _read_labels(source: Source, origin: Sequence[str], num_classes: int) -> np.ndarray:
    """Labels `[N]` of these splits end to end, all of them within `0..num_classes-1`, or rows `[N, num_classes]`."""
    parts = []
    for split in origin:
        if source.splits[split] == 0:
            raise DataError(f"data {source.spec!r}: split {split!r} is empty; leave it out or fill it")
        labels = source.read_labels(split)
        if source.task != "classification":
            _check_rows(f"data {source.spec!r}, split {split!r}", labels, num_classes, source.task)
            parts.append(labels)
            continue
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"data {source.spec!r}, split {split!r}: expected one integer label per image, got "
                f"{labels.dtype} of shape {list(labels.shape)}; encode the classes as 0, 1, …"
            )
        bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
        if bad.size:
            raise DataError(
                f"data {source.spec!r}, split {split!r}: expected labels 0 to {num_classes - 1}, since the "
                f"model has {num_classes} classes, got {labels[bad[0]]} at index {bad[0]} ({bad.size} of "
                f"{labels.size} labels out of range). "
                + (
                    "Labels start at 0: relabel"
                    if labels[bad[0]] < 0
                    else "Choose a model with more classes, or relabel"
                )
            )
        parts.append(labels.astype(np.int32))
    return np.concatenate(parts)


def _check_rows(where: str, labels: np.ndarray, outputs: int, task: str) -> None:
    """Refuse rows of labels, or numbers, that a model of so many outputs cannot be judged by."""
    if labels.shape[1] != outputs:
        raise DataError(
            f"{where}: expected {outputs} labels for each image, since the model has {outputs} outputs, got "
            f"{labels.shape[1]}. Choose another model, or --head fit"
        )
    bad = ~np.isfinite(labels) if task == "regression" else (labels != 0) & (labels != 1)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        wanted = "finite numbers" if task == "regression" else "0 or 1 (or --task regression)"
        raise DataError(
            f"{where}: expected {wanted}, got {labels[row, column]} in row {row}, column {column} "
            f"({bad.any(1).sum()} of {len(labels)} rows); mend or remove them"
        )


def _divide(
    source: Source,
    origin: Sequence[str],
    labels: np.ndarray,
    order: np.ndarray,
    roles: Sequence[str],
    weights: Sequence[float],
    caps: Mapping[str, int],
) -> dict[str, np.ndarray]:
    """Deal the images of each class, or stratum, out to the roles; each role's indices in the order of `order`."""
    dealt: dict[str, list[np.ndarray]] = {role: [] for role in roles}
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < len(roles):
            name = source.label_names[label] if label < source.num_classes else label
            what = f"class {name!r}" if source.task == "classification" else "it"
            raise DataError(
                f"data {source.spec!r}: {what} has {len(members)} images in {'+'.join(origin)}, "
                f"expected at least one for each of {', '.join(roles)}. Add images, or leave the class out"
            )
        ends = np.cumsum(_apportion(len(members), weights))[:-1]
        for role, part in zip(roles, np.split(members, ends), strict=True):
            dealt[role].append(part)

    place = np.argsort(order)
    chosen = {}
    for role, classes in dealt.items():
        sizes = [len(part) for part in classes]
        cap = caps.get(role, sum(sizes))
        if cap < len(classes):
            raise DataError(
                f"data {source.spec!r}: expected a cap on {role} of at least {len(classes)}, an image of "
                f"each class, got {cap}"
            )
        if cap < sum(sizes):
            sizes = _apportion(cap, sizes)
        indices = np.concatenate([part[:size] for part, size in zip(classes, sizes, strict=True)])
        chosen[role] = indices[np.argsort(place[indices])]
    return chosen


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers of sum `total`, as the weights by largest remainders, none below 1."""
    quota = total * np.asarray(weights, np.float64) / np.sum(weights)
    sizes = np.maximum(np.floor(quota + 1e-9).astype(int), 1)
    while sizes.sum() < total:
        sizes[np.argmax(quota - sizes)] += 1
    while sizes.sum() > total:
        sizes[np.argmax(np.where(sizes > 1, sizes - quota, -np.inf))] -= 1
    return sizes.tolist()


def _read_split(
    source: Source,
    origin: tuple[str, ...],
    indices: np.ndarray,
    labels: np.ndarray,
    input_shape: Sequence[int] | None,
    mean: Sequence[float],
    std: Sequence[float],
    hold: int | None,
) -> Split:
    """Read images in the dataset's order, batch by batch; put them, normalised, in the order of `indices`."""
    size = 4 * len(indices) * math.prod(input_shape or ())
    streamed = bool(source.address and input_shape) and size > (room() if hold is None else hold)
    shape, images = input_shape, np.zeros(0, np.float32)  # allocated when the first batch shows the shape
    offset = scale = np.zeros(0, np.float32)
    digest = hashlib.sha256()
    digests = np.empty(len(indices), np.uint64)
    position = np.argsort(indices)  # position[k]: where the k-th image of the dataset's order goes
    ascending = indices[position]
    start = 0
    for split in origin:
        inside = np.flatnonzero((ascending >= start) & (ascending < start + source.splits[split]))
        for k in range(0, len(inside), BATCH):
            batch = inside[k : k + BATCH]
            local = ascending[batch] - start
            raw, digests[position[batch]] = read_stored(source, split, local, apart=streamed)
            where = f"data {source.spec!r}, split {split!r}"
            check_images(where, raw, local, shape, max(std, default=1) < 1)
            check_scale(where, raw, source)
            if not scale.size:
                shape = raw.shape[1:]
                images = np.empty((0 if streamed else len(indices), *shape), np.float32)
                offset, scale = per_channel(where, mean, std, raw.shape[-1])
                digest.update(f"{raw.dtype} {raw.shape[1:]}".encode())
            digest.update(np.ascontiguousarray(raw).tobytes())
            if not streamed:
                images[position[batch]] = normalised(raw, offset, scale)
        start += source.splits[split]
    digest.update(np.ascontiguousarray(labels[position], "<i4" if labels.ndim == 1 else "<f4").tobytes())
    if streamed:
        assert source.address
        sizes = tuple((split, source.splits[split]) for split in origin)
        images = Streamed(source.address, sizes, indices, tuple(input_shape or ()), offset, scale)
    return Split(images, labels, indices, origin, digest.hexdigest(), digests, TASKS[source.task])
