"""Where images and labels come from: `digits`, `tfds:NAME`, `tfds-dir:PATH`, `npz:PATH`, `folder:PATH`. No network.

A source knows its splits and reads them by index; which image serves which purpose is `data.py`'s matter.
"""

import contextlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from treesurgeon.engine import TreesurgeonError
from treesurgeon.engine.errors import first_line
from treesurgeon.search.folders import Folder
from treesurgeon.search.tasks import TaskName, guess_task

BATCH = 1000  # records decoded at a time
MOST_CLASSES = 100_000  # a larger label is taken for a mistake
FORMS = "digits, tfds:NAME, tfds-dir:PATH, npz:PATH or folder:PATH"


class DataError(TreesurgeonError):
    """A dataset that is absent, unreadable, or does not fit the model."""


@dataclass(frozen=True)
class Address:
    """How to open a dataset again, in another process; see `open_source`."""

    spec: str
    data_dir: str | None
    shape: tuple[int, ...] | None
    task: TaskName | None = None
    labelled: bool = True

    def open(self) -> "Source":
        """Open it."""
        return open_source(self.spec, self.data_dir, self.shape, self.task, self.labelled)


@dataclass(frozen=True)
class Source:
    """A dataset that is there, and how to read it.

    Attributes:
        spec: as given to `open_source`; error messages begin with it.
        splits: the number of images of each split.
        label_names: names of the classes, by label; or of the labels, or numbers, of an image.
        read_labels: `split -> [N]`, whole numbers, in the dataset's order; `[N, K]` where an image has several labels,
            0 or 1, or numbers, floating point.
        read_images: `(split, ascending indices [n]) -> [n, H, W, C]`, or `[n, H, W]` for a single channel, as
            stored: uint8, or floating point.
        named: whether `label_names` are names that somebody gave, not numbers that were counted.
        address: how to open it again; None where its images are in memory anyway.
        read_digests: `(split, ascending indices [n]) -> uint64[n]`, of images before they were scaled; None where they
            are not.
        task: what the labels are for.
    """

    spec: str
    splits: Mapping[str, int]
    label_names: tuple[str, ...]
    read_labels: Callable[[str], np.ndarray]
    read_images: Callable[[str, np.ndarray], np.ndarray]
    named: bool = False
    address: Address | None = None
    task: TaskName = "classification"
    read_digests: Callable[[str, np.ndarray], np.ndarray] | None = None

    @property
    def num_classes(self) -> int:
        """How many classes, labels or numbers the dataset names: the outputs of a model for it."""
        return len(self.label_names)


def default_data_dir() -> Path:
    """Where TFDS keeps datasets: `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`."""
    return Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def open_source(
    spec: str,
    data_dir: str | Path | None = None,
    shape: Sequence[int] | None = None,
    task: TaskName | None = None,
    labelled: bool = True,
) -> Source:
    """Open a dataset that is on this machine.

    Args:
        spec: `digits`: scikit-learn's, prepared at the first use. `tfds:NAME`, `tfds:NAME/CONFIG:VERSION`: a
            TFDS dataset prepared below `data_dir`. `tfds-dir:PATH`: the directory with its
            `dataset_info.json`. `npz:PATH`: arrays `x_train, y_train, x_test, y_test` (any `x_SPLIT,
            y_SPLIT`), or `x, y` as one split named "all"; images `[N, H, W, C]` or `[N, H, W]`, uint8
            (scaled to 0..1 later) or floating point (taken as they are); labels `[N]`, integers, or strings, which
            then are the classes' names, or `[N, K]` of 0 and 1 where an image has several, or floating-point numbers
            `[N]` or `[N, K]`; and `label_names`, strings, where the classes, labels or numbers have names.
            `folder:PATH`: image files of 8 or 16 bits a channel in a folder for each class, `PATH/CLASS/*.png` (one
            split, "all") or `PATH/SPLIT/CLASS/*.png`.
        data_dir: by default `default_data_dir()`.
        shape: `(H, W)` or `(H, W, C)` to which the images of a folder are scaled and cropped; those of other sources
            stay as they are.
        task: what the labels are for, if not what they look like.
        labelled: False asks for images alone: labels may be missing, and none are read. Of an npz `x`, or every
            `x_SPLIT`, is enough, and of a folder images at any depth.

    Raises:
        DataError: it is not there, or cannot be read; the message says what to run.
    """
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    found = _open(spec, root, shape, labelled)
    if labelled:
        found = _settled(found, task)
    if spec.startswith("npz:"):
        return found
    where = None if data_dir is None else str(data_dir)
    return replace(found, address=Address(spec, where, None if shape is None else tuple(shape), task, labelled))


def _settled(source: Source, task: TaskName | None) -> Source:
    """The dataset with its labels taken for what they are for."""
    if task is None:
        _refuse_ambiguous(source)
    elif task != "regression" and _are_marks(source):
        source = replace(source, task="multilabel")
    return source if task in (None, source.task) else _recast(source, task)


def _are_marks(source: Source) -> bool:
    """Whether rows of floating-point numbers are all 0 or 1, and could be labels."""
    if source.task != "regression" or not any(source.splits.values()):
        return False
    every = _every_label(source)
    return every.shape[1] > 1 and bool(((every == 0) | (every == 1)).all())


def _every_label(source: Source) -> np.ndarray:
    return np.concatenate([source.read_labels(split) for split in source.splits])


def _are_classes(source: Source) -> bool:
    """Whether rows could be classes all the same: whole numbers stored as floating-point ones, or one-hot."""
    if not source.splits:
        return False
    every = _every_label(source)
    if source.task == "regression":
        return every.shape[1] == 1 and bool((every == np.round(every)).all() and (every >= 0).all())
    return every.shape[1] > 1 and bool((every.sum(1) == 1).all() and ((every == 0) | (every == 1)).all())


def _refuse_ambiguous(source: Source) -> None:
    if _are_marks(source):
        raise DataError(
            f"data {source.spec!r}: the labels are rows of 0 and 1, stored as floating-point ones: pass --task "
            "multilabel if an image has those with a 1, --task classification if it has just one, or --task regression"
        )
    if source.task == "classification" or not _are_classes(source):
        return
    what = "whole numbers, stored as floating-point ones" if source.task == "regression" else "rows with a single 1"
    raise DataError(
        f"data {source.spec!r}: the labels are {what}: pass --task classification if they are classes, or --task "
        f"{source.task}"
    )


def _recast(source: Source, task: TaskName) -> Source:
    """The dataset with its labels taken for something else than what they look like."""
    if task == "classification" and _are_classes(source):

        def numbered(split: str) -> np.ndarray:
            rows = source.read_labels(split)
            return (rows[:, 0] if source.task == "regression" else rows.argmax(1)).astype(np.int32)

        several = source.task == "multilabel"
        names = source.label_names if several else _count_names(_every_label(source)[:, 0].astype(int))
        return replace(source, label_names=names, read_labels=numbered, task=task, named=several and source.named)
    if task != "regression":
        words = {"classification": "whole numbers [N], or one-hot", "multilabel": "rows of 0 and 1, [N, K]"}[task]
        raise DataError(f"data {source.spec!r}: --task {task} needs labels that are {words}; these are {source.task}")

    if source.named and source.task == "classification":
        raise DataError(
            f"data {source.spec!r}: --task regression needs numbers for labels; these are named classes, "
            f"{', '.join(source.label_names[:4])}"
        )

    def numbers(split: str) -> np.ndarray:
        return source.read_labels(split).astype(np.float32).reshape(source.splits[split], -1)

    names = source.label_names if source.task == "multilabel" else ("value",)
    return replace(source, label_names=names, read_labels=numbers, task=task)


def _open(spec: str, root: Path, shape: Sequence[int] | None, labelled: bool) -> Source:
    kind, _, rest = spec.partition(":")
    if spec == "digits":
        from treesurgeon.search import digits  # imports TFDS and scikit-learn: seconds, and only here

        return _tfds_source(spec, digits.prepare(root), labelled)
    if kind == "tfds" and rest:
        return _tfds_source(spec, _find_prepared(spec, rest, root), labelled)
    if kind == "tfds-dir" and rest:
        return _tfds_source(spec, Path(rest).expanduser().absolute(), labelled)
    if kind == "npz" and rest:
        return _npz_source(spec, Path(rest).expanduser().absolute(), labelled)
    if kind == "folder" and rest:
        path = Path(rest).expanduser().absolute()
        found = Folder(path, lambda text: DataError(f"data {spec!r}: {text}"), shape, labelled)
        splits = {split: len(files) for split, files in found.files.items()}
        digests = None if shape is None else found.digests
        return Source(spec, splits, found.names, found.labels, found.images, named=True, read_digests=digests)
    raise DataError(f"data {spec!r}: expected {FORMS}")


def _find_prepared(spec: str, name: str, root: Path) -> Path:
    """Where TFDS prepared a dataset earlier: `root/NAME[/CONFIG]/VERSION`, the newest version.

    TFDS itself is not asked: for what is not there it goes to the network, and waits.
    """
    base, _, version = name.partition(":")
    found = [
        info.parent for info in sorted((root / base).glob("*/dataset_info.json")) if version in ("", info.parent.name)
    ]
    if found:
        return max(found, key=lambda path: [int(n) for n in path.name.split(".") if n.isdigit()])
    below = (root / base).glob("*/*/dataset_info.json")
    configs = sorted({info.parent.parent.relative_to(root).as_posix() for info in below})
    if configs:
        raise DataError(f"data {spec!r}: name a config, one of {', '.join('tfds:' + c for c in configs)}")
    prepared = [p.name for p in sorted(root.glob("*")) if p.is_dir() and next(p.rglob("dataset_info.json"), None)]
    raise DataError(
        f"data {spec!r}: not prepared below {root} (which holds {', '.join(prepared) or 'no dataset'}), "
        f"and nothing is downloaded here. Where there is a network, run\n"
        f"  tfds build {base} --file_format=array_record --data_dir={root}\n"
        "or name another data directory, or give the dataset's own directory as tfds-dir:PATH"
    )


def _tfds_source(spec: str, path: Path, labelled: bool = True) -> Source:
    if not (path / "dataset_info.json").is_file():
        inside = sorted(p.parent for p in path.glob("**/dataset_info.json")) if path.is_dir() else []
        hint = f"; did you mean {inside[-1]}?" if inside else ""
        raise DataError(
            f"data {spec!r}: expected a prepared TFDS dataset, a directory with dataset_info.json, got "
            f"{'one without it' if path.is_dir() else 'no such directory'} at {path}{hint}"
        )
    import tensorflow_datasets as tfds  # takes seconds to import

    try:
        builder: Any = tfds.builder_from_directory(path)
        features = builder.info.features
    except Exception as error:  # a damaged directory raises many types
        raise DataError(
            f"data {spec!r}: {path} cannot be opened ({type(error).__name__}: {first_line(error)}); prepare it again"
        ) from error
    if builder.info.file_format != tfds.core.FileFormat.ARRAY_RECORD:
        stored = getattr(builder.info.file_format, "value", builder.info.file_format)
        raise DataError(
            f"data {spec!r}: expected array_record files, which can be read by index, got {stored}; run\n"
            f"  tfds convert_format --dataset_dir={path} --out_file_format=array_record"
        )
    splits = {name: int(info.num_examples) for name, info in builder.info.splits.items()}
    keys = _feature_keys(spec, builder.info, 2 if labelled else 1)
    image, label = keys[0], keys[-1]

    def read(split: str, indices: Sequence[int], key: str, decoders: Any) -> list[Any]:
        try:
            with _quiet_absl():
                records = builder.as_data_source(split, decoders=decoders)
                return [record[key] for record in records.__getitems__(indices)]
        except Exception as error:  # damaged files raise many types, RuntimeError and ValueError among them
            raise DataError(
                f"data {spec!r}: records {indices[0]} to {indices[-1]} of split {split!r} cannot be read "
                f"({type(error).__name__}: {first_line(error)}); prepare the dataset again"
            ) from error

    def read_images(split: str, indices: np.ndarray) -> np.ndarray:
        images = read(split, indices.tolist(), image, None)
        shapes = sorted({np.shape(i) for i in images})
        if len(shapes) > 1:
            raise DataError(
                f"data {spec!r}: expected images of one shape in split {split!r}, got "
                f"{', '.join(map(str, map(list, shapes[:4])))}; resize them when the dataset is prepared"
            )
        return np.stack(images)

    if not labelled:
        return Source(spec, splits, (), _no_labels(splits), read_images)
    several = isinstance(features[label], tfds.features.Sequence)  # of classes
    names: Any = getattr(features[label].feature if several else features[label], "names", None)
    if several and names is None:
        raise DataError(f"data {spec!r}: expected labels {label!r} that are a class, or a sequence of named classes")
    skip_images = {image: tfds.decode.SkipDecoding()}  # pyright: ignore[reportCallIssue]

    def read_labels(split: str) -> np.ndarray:
        total = splits[split]
        starts = range(0, total, BATCH)
        batches = [range(start, min(start + BATCH, total)) for start in starts]
        found = [value for batch in batches for value in read(split, batch, label, skip_images)]
        if several:
            return np.array([np.isin(np.arange(len(names)), value) for value in found], np.float32)
        return np.array(found)

    named = names is not None
    if several:
        return Source(spec, splits, tuple(names), read_labels, read_images, named, task="multilabel")
    if names is None:
        labels = [read_labels(split) for split in splits if splits[split]]
        every = np.concatenate(labels) if labels else np.zeros(0, int)
        if every.ndim == 2 or guess_task(every) == "regression":
            source = Source(spec, splits, (), read_labels, read_images)
            return _of_rows(source, every)
        names = _count_names(every)
    return Source(spec, splits, tuple(names), read_labels, read_images, named)


def _of_rows(source: Source, every: np.ndarray, names: Sequence[str] = ()) -> Source:
    """A dataset whose images have several labels, or numbers: they are read as rows of float32."""
    task, count = guess_task(every), 1 if every.ndim == 1 else every.shape[1]
    if names and len(names) != count:
        raise DataError(f"data {source.spec!r}: expected a name for each of {count} labels, got {', '.join(names)}")
    if task == "multilabel" and every.dtype.kind not in "iub":
        raise DataError(f"data {source.spec!r}: expected labels of 0 and 1, got {every.dtype}")
    counted = ("value",) if count == 1 else tuple(map(str, range(count)))

    def rows(split: str) -> np.ndarray:
        return source.read_labels(split).reshape(-1, count).astype(np.float32)

    return replace(source, label_names=tuple(names) or counted, read_labels=rows, named=bool(names), task=task)


def _no_labels(splits: Mapping[str, int]) -> Callable[[str], np.ndarray]:
    return lambda split: np.zeros(splits[split], np.int32)


def _feature_keys(spec: str, info: Any, count: int) -> Sequence[str]:
    """Names of the image and of the label, or of the first alone: the supervised keys, else those called so."""
    keys = info.supervised_keys or ("image", "label")
    if len(keys) != 2 or not all(isinstance(key, str) and key in info.features for key in keys[:count]):
        wanted = "supervised keys (image, label), or features of these names"
        raise DataError(
            f"data {spec!r}: expected {wanted if count == 2 else 'a feature image'}, got {keys} and features "
            f"{list(info.features)}"
        )
    return keys[:count]


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
    """Hold back TFDS's advice to install OpenCV, which it logs as a warning."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _npz_source(spec: str, path: Path, labelled: bool = True) -> Source:
    if not path.is_file():
        raise DataError(f"data {spec!r}: expected a .npz file, got no such file: {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {name: loaded[name] for name in loaded.files} if hasattr(loaded, "files") else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"data {spec!r}: {path} cannot be read as npz ({type(error).__name__}: "
            f"{first_line(error).split('. ')[0]}); "
            "write it with np.savez(path, x_train=…, y_train=…, x_test=…, y_test=…)"
        ) from error
    if arrays is None:
        raise DataError(f"data {spec!r}: expected an .npz of several arrays, got a single .npy array: {path}")

    pairs = {"all": ("x", "y")} if {"x", "y"} & arrays.keys() else {}
    names = dict.fromkeys(n[2:] for n in arrays if n.startswith(("x_", "y_")))
    pairs |= {name: (f"x_{name}", f"y_{name}") for name in names}
    if not labelled:
        arrays |= {y: np.zeros(len(arrays[x]), int) for x, y in pairs.values() if x in arrays and arrays[x].ndim}
    absent = [key for pair in pairs.values() for key in pair if key not in arrays]
    if absent or not pairs:
        raise DataError(
            f"data {spec!r}: expected arrays x_train, y_train, x_test, y_test, or x and y, got "
            f"{', '.join(arrays) or 'none'}{'; missing: ' + ', '.join(absent) if absent else ''}"
        )
    for x, y in pairs.values():
        if len(arrays[y].shape) == 2 and arrays[y].shape[1] == 1:  # Keras writes labels as a column
            arrays[y] = arrays[y][:, 0]
        if arrays[x].ndim not in (3, 4) or arrays[y].ndim > 2 or arrays[y].shape[:1] != arrays[x].shape[:1]:
            raise DataError(
                f"data {spec!r}: expected images {x} [N, H, W, C] or [N, H, W] and labels {y} [N], or [N, K] where "
                f"an image has several, got {list(arrays[x].shape)} and {list(arrays[y].shape)}"
            )
    given = tuple(map(str, np.atleast_1d(arrays.get("label_names", np.array([])))))
    if len(set(given)) != len(given):
        raise DataError(f"data {spec!r}: expected label_names that differ, one for each class, got {', '.join(given)}")
    targets = [y for _, y in pairs.values()]
    kinds = {(guess_task(arrays[y]), arrays[y].shape[1:]) for y in targets}
    if len(kinds) > 1:
        each = ", ".join(f"{y} {arrays[y].dtype} {list(arrays[y].shape)}" for y in targets)
        raise DataError(f"data {spec!r}: expected labels of one kind in all splits, got {each}")
    source = Source(
        spec,
        splits={split: len(arrays[x]) for split, (x, _) in pairs.items()},
        label_names=given,
        read_labels=lambda split: arrays[pairs[split][1]],
        read_images=lambda split, indices: arrays[pairs[split][0]][indices],
        named=bool(given),
    )
    if kinds != {("classification", ())}:
        return _of_rows(source, np.concatenate([arrays[y] for y in targets]), given)
    given = _encode(spec, arrays, targets, given)
    names = given or _count_names(np.concatenate([arrays[y] for y in targets]))
    return replace(source, label_names=names, named=bool(given))


def _encode(spec: str, arrays: dict[str, np.ndarray], labels: Sequence[str], names: tuple[str, ...]) -> tuple[str, ...]:
    """Labels that are strings become numbers, in place; returns the classes' names, sorted where none were given."""
    texts = [name for name in labels if arrays[name].dtype.kind in "US"]
    for name in texts:
        arrays[name] = np.char.decode(arrays[name], "utf-8") if arrays[name].dtype.kind == "S" else arrays[name]
    if not texts:
        return names
    if len(texts) != len(labels):
        raise DataError(f"data {spec!r}: expected labels of one kind, got strings only in {', '.join(texts)}")
    found = np.unique(np.concatenate([arrays[name] for name in texts])).tolist()
    names = names or tuple(found)
    if unknown := sorted(set(found) - set(names)):
        raise DataError(f"data {spec!r}: label {unknown[0]!r} is not one of label_names: {', '.join(names)}")
    number = {text: i for i, text in enumerate(names)}
    for name in texts:
        arrays[name] = np.array([number[text] for text in arrays[name].tolist()], int)
    return names


def _count_names(labels: np.ndarray) -> tuple[str, ...]:
    """Names "0", "1", … up to the largest label (wrong labels are reported where they are used)."""
    if labels.size == 0 or not np.issubdtype(labels.dtype, np.integer):
        return ()
    return tuple(str(i) for i in range(min(int(labels.max()) + 1, MOST_CLASSES)))
