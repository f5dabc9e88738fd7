"""Images side by side as one small picture, and below each, where a unit is active on it."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

SIDE = 64  # pixels, about: small images are enlarged to at least this, large ones reduced to it
GAP, GREY = 2, 128  # between images, to be seen on light and on dark
HEAT, COVERS = np.array([240.0, 100, 30]), 0.8  # where a unit is most active: the colour, and how much of it


def strip(images: Any, maps: Any = None) -> bytes:
    """A PNG, or a JPEG where large images were reduced.

    Args:
        images: `[N, H, W, 1 or 3]`, 0 to 1.
        maps: how active a unit is on each, `[N, h, w]`, any scale; a second row shows the images in grey under them.
    """
    images = np.asarray(images, np.float32)
    if images.shape[-1] not in (1, 3):
        images = images.mean(-1, keepdims=True)
    pixels = np.round(255 * np.clip(images, 0, 1)).astype(np.uint8)
    pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
    height, width = pixels.shape[1:3]
    large = min(height, width) > SIDE
    if large:
        size = (round(width * SIDE / height), SIDE)
        pixels = np.stack([np.asarray(Image.fromarray(each).resize(size)) for each in pixels])
    else:
        times = -(-SIDE // height)
        pixels = pixels.repeat(times, 1).repeat(times, 2)
    rows = [_row(pixels)]
    if maps is not None:
        rows.append(_row(_heated(pixels, np.asarray(maps, np.float32))))
    out = io.BytesIO()
    picture = Image.fromarray(np.concatenate(rows))
    picture.save(out, *(("JPEG",) if large else ("PNG",)), quality=85, optimize=True)
    return out.getvalue()


def _heated(pixels: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """Images in grey, and a colour over them where the maps are high; all on one scale."""
    shares = maps / max(float(maps.max()), 1e-30)
    size = (pixels.shape[2], pixels.shape[1])
    large = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.BILINEAR)) for each in shares]
    cover = COVERS * np.clip(np.stack(large), 0, 1)[..., None]
    return np.round(pixels.mean(-1, keepdims=True) * (1 - cover) + HEAT * cover).astype(np.uint8)


def _row(pixels: np.ndarray) -> np.ndarray:
    framed = np.pad(pixels, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=GREY)
    return np.concatenate(list(framed), 1)


def ending(picture: bytes) -> str:
    """What the name of its file ends with."""
    return "png" if picture.startswith(b"\x89PNG") else "jpg"


def address(picture: bytes) -> str:
    """A picture as an address that holds it."""
    kind = "png" if ending(picture) == "png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
