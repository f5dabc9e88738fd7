"""Charts as PNG: what stands where in the SVG stands there in the picture, in light mode's colours."""

import io
import xml.etree.ElementTree as ET

import pytest
from PIL import Image
from rundir import make_run

from treesurgeon.search import charts
from treesurgeon.search.charts import Bar, Chart, Point, document
from treesurgeon.search.page import write_page
from treesurgeon.search.pictures import DENSITY, png

WHITE, INK, BLUE, ORANGE, GREEN = (255, 255, 255), (31, 35, 40), (9, 105, 218), (188, 76, 0), (26, 127, 55)


def drawn(*pictures):
    image = Image.open(io.BytesIO(png(pictures)))
    assert image.size == (
        round(DENSITY * max(p.width for p in pictures)),
        round(DENSITY * sum(p.height for p in pictures)),
    )
    return lambda x, y: image.getpixel((round(DENSITY * x), round(DENSITY * y)))


def chart(inside):
    return Chart(100, 50, "label", inside)


def test_shapes_stand_where_they_are_put():
    at = drawn(
        chart(
            '<rect class="part" x="10" y="5" width="20" height="10"/><circle class="kept" cx="60" cy="20" r="5"/>'
            '<path class="selected" d="M80 10l7 7l-7 7l-7 -7z"/><path class="search" d="M5 40H45V30L55 45"/>'
        ),
        chart('<g transform="translate(50 0)"><rect class="part" x="10" y="5" width="0" height="9"/></g>'),
    )
    assert at(20, 10) == BLUE
    assert at(9, 10) == at(31, 10) == at(60, 60) == WHITE
    assert at(60, 20) == at(80, 17) == GREEN
    assert at(86, 12) == WHITE  # a diamond
    assert at(20, 40) == at(45, 35) == BLUE
    assert at(20, 37) == at(60, 45) == WHITE


def test_dashes_and_what_is_half_transparent():
    at = drawn(chart('<path class="train" d="M0 10H96"/><circle class="dot" cx="50" cy="30" r="5"/>'))
    row = [at(x, 10) for x in range(96)]
    assert (row[2], row[7], row[10], row[15]) == (ORANGE, WHITE, ORANGE, WHITE)  # 5 on, 3 off
    assert [at(x + 8, 10) for x in range(80)] == row[:80]
    faint = at(50, 30)
    assert all(low < value < 255 for low, value in zip(BLUE, faint, strict=True))


def inked(at, left, top, right, bottom):
    return sum(at(x, y) != WHITE for x in range(left, right) for y in range(top, bottom))


def test_text_is_anchored_turned_and_struck_out():
    words = "mmmm"
    at = drawn(chart(charts.text(50, 30, words, "end")))
    assert inked(at, 10, 15, 50, 31) > 50
    assert not inked(at, 52, 0, 100, 50)
    at = drawn(chart(charts.text(50, 30, words, "")))
    assert not inked(at, 0, 0, 49, 50)
    at = drawn(chart(f'<g transform="translate(50 45) rotate(-90)">{charts.text(0, 0, words, "")}</g>'))
    assert inked(at, 40, 5, 51, 45) > 50  # it goes up from where it begins
    assert not inked(at, 53, 0, 100, 50)
    struck = drawn(chart(charts.text(10, 30, ". . . . .", "struck")))
    assert inked(struck, 12, 25, 25, 27) > inked(drawn(chart(charts.text(10, 30, ". . . . .", ""))), 12, 25, 25, 27)


def test_what_is_not_understood_is_refused():
    with pytest.raises(ValueError, match="<ellipse> cannot be drawn"):
        png([chart('<ellipse cx="1"/>')])
    with pytest.raises(ValueError, match="a path with 'C' cannot be drawn"):
        png([chart('<path class="search" d="M0 0C1 1 2 2 3 3"/>')])


def test_names_of_models_stand_beside_each_other_and_inside():
    models = [Point(9, 9.9 - 0.01 * k, "dense fine-tuned" if k == 4 else f"v{k}") for k in range(12)]
    models += [Point(0, 0, "t1"), Point(8.9, 9.9, "t2")]
    root = ET.fromstring(document([charts.pareto([Point(0, 0), Point(9, 9)], models, "x", "y", "l")]))
    named = {model.name for model in models}
    texts = [node for node in root.iter() if node.text in named]
    assert {node.text for node in texts} == named
    boxes = []
    for node in texts:
        x, y, half = float(node.get("x")), float(node.get("y")), charts.CHAR * len(node.text) / 2
        assert x - half >= 0
        assert x + half <= 720
        assert 12 <= y <= 400
        boxes.append((x, y, half))
    for i, (x, y, half) in enumerate(boxes):
        assert all(abs(x - a) >= half + b or abs(y - c) >= 11.9 for a, c, b in boxes[:i])


def test_every_chart_of_a_report_is_drawn(tmp_path):
    made = make_run(tmp_path, transfer=True)
    write_page(made)
    names = {"pareto", "network", "sensitivity", "curves", "depth"}
    assert {path.stem for path in made.glob("*.png")} == {path.stem for path in made.glob("*.svg")} == names
    for name in names:
        image = Image.open(made / f"{name}.png").convert("RGB")
        found = {colour for count, colour in image.getcolors(1 << 20) if count > 50}
        assert {WHITE, BLUE} <= found
    charts_ = [charts.pareto([Point(1, 2)], [Point(2, 1, "v1", True)], "x", "y", "l"), charts.bars("t", [], "l")]
    assert png(charts_)
    assert png([charts.bars("ü × …", [Bar("a" * 99, 0, 0, "0")], "l")])
