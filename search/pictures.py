"""A chart as a PNG for slides and papers: the SVG that charts.py writes, drawn with Pillow in light mode's colours.

Only what charts.py writes is understood, and its look comes from `chart.css`; anything else raises. The font is the one
that Pillow carries, so that a picture is the same everywhere.
"""

from __future__ import annotations

import io
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageColor, ImageDraw, ImageFont

from treesurgeon.search.charts import CSS, Chart, document

DENSITY, FINER = 2, 2  # pixels of the file for one of the chart; how much finer it is drawn
SCALE = DENSITY * FINER
BOLD = 600
ANCHORS = {"start": "ls", "middle": "ms", "end": "rs"}
Place = tuple[float, float]
Look = Mapping[str, str]


def png(charts: Sequence[Chart]) -> bytes:
    """Charts one below the other, as the bytes of a PNG file with twice their size in pixels."""
    width, height = max(chart.width for chart in charts), sum(chart.height for chart in charts)
    image = Image.new("RGB", (round(SCALE * width), round(SCALE * height)), _palette()["--paper"])
    y = 0.0
    for chart in charts:
        inside = ET.fromstring(f"<g>{chart.inside}</g>")
        for element in inside:
            _element(image, element, (0, y))
        y += chart.height
    out = io.BytesIO()
    image.reduce(FINER).save(out, "PNG", compress_level=3)
    return out.getvalue()


def write_pictures(directory: Path, name: str, charts: Sequence[Chart]) -> None:
    """Write charts one below the other as `NAME.svg` and `NAME.png`."""
    write_whole(directory / f"{name}.svg", document(charts).encode())
    write_whole(directory / f"{name}.png", png(charts))


def write_whole(path: Path, content: bytes) -> None:
    """Write a file in one step, so that nobody meets half of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_bytes(content)
    beside.replace(path)


def _element(image: Image.Image, element: ET.Element, origin: Place, angle: float = 0) -> None:
    """Draw one, at an origin and turned by so many degrees; only text can be turned."""
    draw = ImageDraw.Draw(image, "RGBA")
    look = _look(element.tag, frozenset(element.get("class", "").split()))
    number = partial(_number, element)
    if element.tag == "g":
        x, y, angle = _moved(element.get("transform", ""))
        for child in element:
            _element(image, child, (origin[0] + x, origin[1] + y), angle)
    elif element.tag == "text":
        at = (origin[0] + number("x"), origin[1] + number("y"))
        _text(image, element.text or "", at, look, angle)
    elif element.tag == "rect" and not number("width"):
        pass
    elif element.tag == "rect":
        x, y = origin[0] + number("x"), origin[1] + number("y")
        right, bottom = x + number("width"), y + number("height")
        _shape(draw, [(x, y), (right, y), (right, bottom), (x, bottom), (x, y)], look)
    elif element.tag == "circle":
        x, y, radius = origin[0] + number("cx"), origin[1] + number("cy"), number("r")
        box = [SCALE * v for v in (x - radius, y - radius, x + radius, y + radius)]
        draw.ellipse(box, _colour(look, "fill"), _colour(look, "stroke"), round(SCALE * float(look["stroke-width"])))
    elif element.tag == "path":
        _shape(draw, [(origin[0] + x, origin[1] + y) for x, y in _points(element.get("d", ""))], look)
    else:
        raise ValueError(f"a chart with <{element.tag}> cannot be drawn as PNG: teach pictures.py, or leave it out")


def _shape(draw: ImageDraw.ImageDraw, points: Sequence[Place], look: Look) -> None:
    """A filled outline, or a line."""
    scaled = [(SCALE * x, SCALE * y) for x, y in points]
    fill, stroke = _colour(look, "fill"), _colour(look, "stroke")
    if fill and len(points) > 2:
        draw.polygon(scaled, fill)
    if stroke and len(points) > 1:
        width = max(round(SCALE * float(look["stroke-width"])), 1)
        dashes = [SCALE * float(length) for length in look.get("stroke-dasharray", "").split()]
        for part in _dashed(scaled, dashes) if dashes else [scaled]:
            draw.line(part, stroke, width, joint="curve")


def _dashed(points: Sequence[Place], dashes: Sequence[float]) -> list[list[Place]]:
    """The parts of a line that a pattern of dash and gap leaves."""
    parts, k, left = [[points[0]]], 0, dashes[0]
    for (x, y), end in pairwise(points):
        length = ((end[0] - x) ** 2 + (end[1] - y) ** 2) ** 0.5
        done = 0.0
        while length - done > left:
            done += left
            at = (x + (end[0] - x) * done / length, y + (end[1] - y) * done / length)
            if k % 2 == 0:
                parts[-1].append(at)
            else:
                parts.append([at])
            k += 1
            left = dashes[k % len(dashes)]
        left -= length - done
        if k % 2 == 0:
            parts[-1].append(end)
    return parts


def _text(image: Image.Image, words: str, at: Place, look: Look, angle: float) -> None:
    """A line of text; turned about where it is anchored."""
    font = _font(SCALE * float(look["font-size"].removesuffix("px")))
    anchor, colour = ANCHORS[look.get("text-anchor", "start")], ImageColor.getrgb(look["fill"])
    thick = SCALE / 8 if look.get("font-weight") == str(BOLD) else 0
    x, y = SCALE * at[0], SCALE * at[1]
    if angle:
        radius = round(font.getlength(words)) + SCALE
        mask = Image.new("L", (2 * radius, 2 * radius))
        ImageDraw.Draw(mask).text((radius, radius), words, 255, font, anchor, stroke_width=thick)
        turned = mask.rotate(-angle, Image.Resampling.BICUBIC)
        image.paste(colour, (round(x) - radius, round(y) - radius), turned)
        return
    draw = ImageDraw.Draw(image)
    draw.text((x, y), words, colour, font, anchor, stroke_width=thick)
    if "line-through" in look.get("text-decoration", ""):
        left, _, right, _ = draw.textbbox((x, y), words, font, anchor)
        middle = y - 0.3 * font.size
        draw.line([(left, middle), (right, middle)], colour, round(SCALE))


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    """The font that Pillow carries; it reads it anew each time."""
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


# --- SVG and CSS ------------------------------------------------------------------------------------------------------


def _points(path: str) -> list[Place]:
    """The corners of a path of M, L, H, V, l and z."""
    out: list[Place] = []
    for letter, rest in re.findall(r"([A-Za-z])([^A-Za-z]*)", path):
        values = [float(value) for value in re.findall(r"-?[\d.]+", rest)]
        x, y = out[-1] if out else (0.0, 0.0)
        if letter in "ML":
            out.append((values[0], values[1]))
        elif letter == "l":
            out.append((x + values[0], y + values[1]))
        elif letter == "H":
            out.append((values[0], y))
        elif letter == "V":
            out.append((x, values[0]))
        elif letter == "z":
            out.append(out[0])
        else:
            raise ValueError(f"a path with {letter!r} cannot be drawn as PNG: teach pictures.py")
    return out


def _moved(transform: str) -> tuple[float, float, float]:
    """Where `translate(x y) rotate(degrees)` puts things."""
    moves = dict(re.findall(r"(\w+)\(([^)]*)\)", transform))
    x, y = map(float, moves.get("translate", "0 0").split())
    return x, y, float(moves.get("rotate", 0))


def _number(element: ET.Element, name: str) -> float:
    return float(element.get(name, 0))


@cache
def _palette() -> dict[str, str]:
    """The variables of light mode."""
    return dict(re.findall(r"(--\w+): ([^;]+);", CSS.split("}")[0]))


@cache
def _look(tag: str, classes: frozenset[str]) -> Look:
    """What `chart.css` says of an element, variables filled in."""
    found = {"font-size": "12px", "stroke-width": "1", "fill": _palette()["--ink"]}
    for selector, body in re.findall(r"\.chart ([\w.-]+) \{([^}]*)\}", CSS):
        name, *needs = selector.split(".")
        if (not name or name == tag) and set(needs) <= classes:
            found |= dict(re.findall(r"([\w-]+): ([^;]+?) *(?:;|$)", body))
    return {name: re.sub(r"var\((--\w+)\)", lambda match: _palette()[match[1]], value) for name, value in found.items()}


def _colour(look: Look, name: str) -> tuple[int, int, int, int] | None:
    """Red, green, blue and how opaque; None where nothing is painted."""
    if look.get(name, "none") == "none":
        return None
    red, green, blue, *alpha = ImageColor.getrgb(look[name])
    opaque = float(look.get("opacity", 1)) * float(look.get(f"{name}-opacity", 1))
    return red, green, blue, round((alpha[0] if alpha else 255) * opaque)
