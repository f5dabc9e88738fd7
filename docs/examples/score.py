"""Score a file of images with `model.stablehlo`, batch by batch: jax and numpy, none of the model's code.

    python docs/examples/score.py runs/demo/selected images.npy scores.csv

`images.npy` holds `[N, H, W, C]`, uint8 (0 to 255) or float in 0 to 1, and may be larger than memory.
"""

import argparse
import csv
import json
from pathlib import Path

import jax
import numpy as np
from jax import export


def score(selected: Path, images: Path, out: Path, batch: int = 256) -> int:
    """Write label and probability of every image to a CSV file; returns how many there are."""
    manifest = json.loads((selected / "manifest.json").read_text())
    mean, std = (np.float32(manifest["normalisation"][name]) for name in ("mean", "std"))
    call = jax.jit(export.deserialize(bytearray((selected / "model.stablehlo").read_bytes())).call)
    stored = np.load(images, mmap_mode="r")
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "label", "probability"])
        for start in range(0, len(stored), batch):
            x = np.asarray(stored[start : start + batch])
            x = x.astype(np.float32) / (255 if x.dtype == np.uint8 else 1)
            full = np.resize((x - mean) / std, (batch, *x.shape[1:]))  # one batch size, so that one program is compiled
            chances = np.asarray(jax.nn.softmax(call(full)))[: len(x)]
            for i, row in enumerate(chances, start):
                writer.writerow([i, manifest["labels"][row.argmax()], f"{row.max():.4f}"])
    return len(stored)


def main() -> None:
    """Score a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("selected", "images", "out"):
        parser.add_argument(name, type=Path)
    options = parser.parse_args()
    print(f"{score(options.selected, options.images, options.out)} images scored, see {options.out}")


if __name__ == "__main__":
    main()
