"""`folder:PATH`: images in a sub-folder for each class, `PATH/CLASS/*.png`, or for each split and class,
`PATH/SPLIT/CLASS/*.png`. The folders' names are the classes' names, in alphabetical order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from treesurgeon.engine.errors import first_line
from treesurgeon.search.digests import image_digest

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

Fail = Callable[[str], Exception]


class Folder:
    """The images below a directory.

    Attributes:
        names: of the classes.
        files: for each split, its images in order, each with its label.
    """

    def __init__(self, root: Path, fail: Fail, shape: Sequence[int] | None = None, labelled: bool = True):
        """List the images; nothing is decoded yet.

        Args:
            root: the directory.
            fail: makes the error of a message.
            shape: `(H, W)` or `(H, W, C)` to which images are scaled and cropped; by default they stay as they are.
            labelled: whether folders are classes; otherwise all images below are one split, of no class.
        """
        self.fail, self.shape, self.modes = fail, None if shape is None else tuple(shape), {}
        self.seen: dict[Path, int] = {}
        if not root.is_dir():
            raise fail(f"expected a directory, got {'a file' if root.exists() else 'nothing'} at {root}")
        if not labelled:
            self.names, found = (), (file for folder in (root, *_below(root)) for file in _images(folder))
            self.files = {"all": [(path, 0) for path in found]}
            if not self.files["all"]:
                raise fail(f"expected images below {root}, got none ({_readable()} are read)")
            return
        folders = _folders(root)
        if any(_images(folder) for folder in folders):
            splits = {"all": folders}
        else:
            splits = {folder.name: _folders(folder) for folder in folders}
        self.names = tuple(sorted({folder.name for classes in splits.values() for folder in classes}))
        self.files = {
            split: [(path, self.names.index(folder.name)) for folder in classes for path in _images(folder)]
            for split, classes in splits.items()
        }
        self.files = {split: files for split, files in self.files.items() if files}
        if not self.files:
            raise fail(
                f"expected {root}/CLASS/*.png or {root}/SPLIT/CLASS/*.png, got no image there ({_readable()} are read)"
            )

    def labels(self, split: str) -> np.ndarray:
        """Labels `[N]`."""
        return np.array([label for _, label in self.files[split]])

    def images(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Images `[n, H, W, C]` uint8."""
        paths = [self.files[split][i][0] for i in indices]
        images = [self._decode(path) for path in paths]
        first = images[0].shape
        for path, image in zip(paths, images, strict=True):
            if image.shape != first:
                raise self.fail(
                    f"expected images of one size, got {list(first[:2])} of {paths[0]} and {list(image.shape[:2])} of "
                    f"{path}; pass --image-size"
                )
        return np.stack(images)

    def digests(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Digests `uint64[n]` of the images before they are scaled: by these they are known again at another size."""
        paths = [self.files[split][i][0] for i in indices]
        for path in paths:
            if path not in self.seen:
                self._decode(path)
        return np.array([self.seen[path] for path in paths], np.uint64)

    def _decode(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path) as file:
                image = ImageOps.exif_transpose(file)
                mode = "I;16" if file.format == "PPM" and image.mode == "I" else image.mode
                if mode.startswith("I;16"):  # Pillow would clip it at 255
                    image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
                image = image.convert(self._mode())
        except Exception as error:  # a damaged image raises many types
            raise self.fail(
                f"{path} cannot be decoded ({type(error).__name__}: {first_line(error)}); mend or remove it"
            ) from error
        if mode in ("I", "F"):
            raise self.fail(f"{path}: expected 8 or 16 bits a channel, got 32, whose range is unknown; convert it")
        self.seen[path] = image_digest(_pixels(image))
        if self.shape is not None and image.size != (size := (self.shape[1], self.shape[0])):
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return _pixels(image)

    def _mode(self) -> str:
        """Grey or colour: as the model takes them, else as the first image is."""
        if self.shape is not None and len(self.shape) == 3:
            return "L" if self.shape[2] == 1 else "RGB"
        if "mode" not in self.modes:
            path, _ = next(iter(self.files.values()))[0]
            with Image.open(path) as image:
                self.modes["mode"] = "L" if image.mode.split(";")[0] in ("1", "L", "I", "F") else "RGB"
        return self.modes["mode"]


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.uint8).reshape(*image.size[::-1], -1)


def _readable() -> str:
    return ", ".join(suffix[1:] for suffix in SUFFIXES)


def _below(root: Path) -> list[Path]:
    """All folders below one, at any depth, in order."""
    return [found for folder in _folders(root) for found in (folder, *_below(folder))]


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())
