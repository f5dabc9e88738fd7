"""The report: what it shows is what the run's files say, nothing in them becomes code, and it works in a browser."""

import base64
import csv
import hashlib
import json
import re
import shutil
import tomllib
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from browser import BROWSER, browser
from rundir import HOSTILE, make_run

from treesurgeon.search import charts, report
from treesurgeon.search.charts import Plane, Point
from treesurgeon.search.cli import main
from treesurgeon.search.config import RunError
from treesurgeon.search.metrics import METRICS
from treesurgeon.search.page import write_page
from treesurgeon.search.panels import AXES, before_and_after, overfitting
from treesurgeon.search.records import TABLES, open_run

VOID = {"meta", "link", "br", "img", "input", "hr", "wbr"}


class Reader(HTMLParser):
    """Elements with their attributes and their text; fails where they are not closed in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.found, self._open = [], []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))
        if tag not in VOID:
            self._open.append(self.found[-1])

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        for _, _, text in self._open:
            text.append(data)

    def all(self, tag):
        return [(attrs, "".join(text)) for name, attrs, text in self.found if name == tag]


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read(directory):
    return Reader(write_page(directory).read_text(encoding="utf-8"))


@pytest.fixture
def made(tmp_path):
    return make_run(tmp_path)


def test_headings_tables_and_pictures_are_named(made):
    page = read(made)
    assert [text for _, text in page.all("h1")] == ["digits_cnn, pruned"]
    identities = {attrs["id"] for attrs, _ in page.all("h2")}
    assert {attrs["aria-labelledby"] for attrs, _ in page.all("section")} == identities
    assert {attrs["href"][1:] for attrs, _ in page.all("a") if attrs["href"][0] == "#"} == identities
    assert len(page.all("table")) == len(page.all("caption")) >= 8
    assert all(attrs.get("scope") in ("col", "row") for attrs, _ in page.all("th"))
    assert all(attrs["aria-label"] for attrs, _ in page.all("svg"))
    assert [attrs["lang"] for attrs, _ in page.all("html")] == ["en"]
    for attrs, _ in page.all("a"):
        if not attrs["href"].startswith("#"):
            assert (made / attrs["href"]).is_file()


def test_nothing_is_asked_from_outside(tmp_path):
    text = write_page(make_run(tmp_path, transfer=True)).read_text()
    assert "http" not in text.replace("http-equiv", "")
    page = Reader(text)
    assert not any(name in ("link", "iframe", "object") for name, *_ in page.found)
    sources = [attrs["src"] for _, attrs, _ in page.found if "src" in attrs]
    assert [source.partition(";")[0] for source in sources] == ["data:image/png", "data:image/jpeg"]
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = [attrs["content"] for attrs, _ in page.all("meta") if "http-equiv" in attrs]
    (script,) = [body for attrs, body in page.all("script") if "type" not in attrs]
    assert policy.startswith("default-src 'none'")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy


@pytest.mark.parametrize("budget", [None, 0.5])
def test_the_data_of_the_plot_are_those_of_the_tables(tmp_path, budget):
    made = make_run(tmp_path, budget=budget)
    page = read(made)
    (data,) = [json.loads(body) for attrs, body in page.all("script") if "type" in attrs]
    table = rows(made / "candidates.csv")
    assert len(data["candidates"]) == len(table) == 40
    blocks = rows(made / "blocks.csv")
    for found, row in zip(data["candidates"], table, strict=True):
        for name in ("candidate", "generation", "params", "macs", "activation_bytes", "error"):
            assert found[name] == float(row[name])
        assert found["loss"] == (None if row["loss"] == "inf" else float(row["loss"]))
        assert found["within"] == (row["violation"] == "0.0")
        assert found["kept"] == [int(n) for n in row["kept"].split()]
        genes = row["genome"].split()[-2:]
        kept = [block["block"] for block, gene in zip(blocks[1:], genes, strict=True) if gene == "1"]
        assert sorted(data["blocks"][i] for i in found["dropped"]) == sorted({b["block"] for b in blocks[1:]} - {*kept})
    assert data["axes"] == {name: AXES[name] for name in AXES if name not in ("latency", "memory")}
    assert [m["error"] for m in data["models"]] == [1 - float(row["search"]) for row in rows(made / "results.csv")]
    over = sum(row["violation"] != "0.0" for row in table)
    assert (f"{over} more were over the budget" in "".join(t for _, t in page.all("p"))) == bool(over)
    chosen = [text for attrs, text in page.all("option") if "selected" in attrs]
    assert chosen == [AXES["macs" if budget else "params"], AXES["error"]]


@pytest.mark.parametrize(("metric", "noun"), [("f1", "F1 error (1 - macro F1)"), ("cross_entropy", "cross-entropy")])
def test_other_metrics_have_an_axis_of_their_own(made, metric, noun):
    path = made / "selected/manifest.json"
    path.write_text(path.read_text().replace('"metric": "accuracy"', f'"metric": "{metric}"'))
    table = rows(made / "results.csv")
    for i, row in enumerate(table):
        row["wrong"] = str(0.125 * i)
    report.write_table(made / "results.csv", report.RESULT_COLUMNS, table)
    page = read(made)
    (data,) = [json.loads(body) for attrs, body in page.all("script") if "type" in attrs]
    assert data["axes"]["error"] == "share of wrong answers on search"
    assert METRICS[metric].noun == noun
    assert data["axes"]["judged"] == f"{noun} on search (finished models)"
    assert [model["error"] for model in data["models"]] == [0, 0.125, 0.25, 0.375]
    scores = [float(row["search"]) for row in table]
    assert [model["judged"] for model in data["models"]] == [1 - s if metric == "f1" else s for s in scores]
    assert not any("judged" in candidate for candidate in data["candidates"])
    assert "judged" in [attrs["value"] for attrs, _ in page.all("option")]
    svg = (made / "pareto.svg").read_text()
    assert "share of wrong answers on search</text>" in svg
    assert svg.count('class="model"') + svg.count('class="selected"') == 4


def test_tables_say_what_the_files_say(made):
    page = read(made)
    cells = [text for _, text in page.all("td")]
    for row in rows(made / "results.csv"):
        for split in ("train", "search", "test"):
            value, low, high = (100 * float(row[split + end]) for end in ("", "_low", "_high"))
            assert f"{value:.2f}%{low:.2f} to {high:.2f}" in cells
    assert "20 of 64" in cells  # the plan of the manifest
    assert [text for _, text in page.all("del")] == ["layer1/conv", "layer1"]
    for row in rows(made / "pinned.csv"):
        assert row["reason"] in cells
    values = [text for _, text in page.all("dd")]
    assert {"c0ffee", "3.11", "first-stage", *open_run(made).manifest["data"]["fingerprints"].values()} <= {*values}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("passed", "Certificate: passed"),
        ("fails", "Certificate: fails"),
        ("not certified", "Not certified"),
        ("nothing smaller passed", "nothing smaller passed"),
    ],
)
def test_the_verdict_comes_with_its_certificate(tmp_path, status, words):
    made = make_run(tmp_path, status=status)
    assert open_run(made).status == status
    found = [text for attrs, text in read(made).all("p") if attrs.get("class", "").startswith("badge")]
    assert len(found) == 1
    assert words in found[0]
    compared = [text for _, text in read(made).all("caption") if text.startswith("Cross-validation")]
    assert len(compared) == (status == "not certified")
    assert ("+1.20 points" in [text for _, text in read(made).all("td")]) == bool(compared)


def test_what_to_quote_comes_first(made):
    heads = [text for _, text in read(made).all("th")]
    assert heads.index("model") + 1 == heads.index("test") < heads.index("search") < heads.index("parameters")


def test_baselines_a_new_head_and_depths(tmp_path):
    made = make_run(tmp_path, transfer=True)
    page = read(made)
    assert "linear probe; ahead of v1 by so much" in [text for _, text in page.all("td")]
    said = [text for _, text in page.all("p")]
    assert "On test 2 baselines are better." in said
    assert "Domain shift: the inputs are shifted." in said
    assert any("over: cat; fitted in closed form: hat." in text for text in said)
    (data,) = [json.loads(body) for attrs, body in page.all("script") if "type" in attrs]
    assert [model["name"] for model in data["models"]] == ["dense", "v1", "v2", "v3"]
    (caption,) = [text for _, text in page.all("caption") if "against depth" in text]
    assert caption.startswith("Accuracy against depth")
    cells = [text for _, text in page.all("td")]
    assert {"80.00%", "1k (33%)", "30k (100%)", "+40.00"} <= {*cells}
    alts = [attrs["alt"] for attrs, _ in page.all("img")]
    assert alts[0] == "Unit 0 of layer0/conv is most active on: hat, cat; below, where on them"
    assert alts[1] == "Unit 1 of layer1/conv is most active on: hat, cat"
    assert "layer1/conv, unit 1: prefers hat, selectivity 0.88" in [text for _, text in page.all("figcaption")]
    assert {"500,000", "1,250,000", "2.50×"} <= {*cells}  # a format: bytes, the dense model's, how much faster
    marked = [text for attrs, text in page.all("tr") if attrs.get("class") == "marked"]
    assert any(text.startswith("layer2") for text in marked)  # the best on search
    manifest = json.loads((made / "selected/manifest.json").read_text())
    del manifest["baselines"], manifest["head"]  # as an older version wrote it
    (made / "selected/manifest.json").write_text(json.dumps(manifest))
    (made / "shift.json").unlink()
    assert not any("baselines" in text for _, text in read(made).all("p") if text.startswith("On test"))


def test_hostile_names_stay_text(tmp_path):
    made = make_run(tmp_path, extra=HOSTILE, transfer=True)
    page = read(made)
    assert [sorted(attrs) for attrs, _ in page.all("img")] == [["alt", "class", "src"]] * 2
    assert len(page.all("script")) == 2
    assert not any(key.startswith("on") for _, attrs, _ in page.found for key in attrs)
    (data,) = [json.loads(body) for attrs, body in page.all("script") if "type" in attrs]
    assert data["groups"][0]["name"] == "layer0/conv" + HOSTILE
    assert data["models"][1]["name"] == "v1" + HOSTILE
    text = "".join(page.found[0][2])
    for name in ("digits_cnn", "layer0/conv", "an axis of the output", "0.10", "Certified, as it were.", "passes",
                 "ahead of v1 by so much", "cat", "the inputs are shifted", "layer2"):  # fmt: skip
        assert name + HOSTILE in text
    for name in ("pareto", "network", "sensitivity", "curves"):
        tags = {element.tag.rpartition("}")[2] for element in ET.parse(made / f"{name}.svg").iter()}
        assert tags <= {"svg", "style", "g", "title", "text", "path", "rect", "circle"}


def test_a_run_without_fine_tuning(tmp_path):
    made = make_run(tmp_path, epochs=0)
    assert any("not fine-tuned" in text for _, text in read(made).all("p"))
    assert not (made / "curves.svg").exists()
    assert not any(attrs["href"].startswith("curves.svg") for attrs, _ in read(made).all("a"))


@pytest.mark.parametrize(
    ("train", "search", "start"),
    [
        ([None, 0.5, 0.4, 0.3, 0.2], [0.9, 0.5, 0.4, 0.5, 0.6], 3),
        ([None, 0.5, 0.4, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6, 0.5], None),
        ([None, 0.5, 0.4, 0.5, 0.6], [0.9, 0.5, 0.4, 0.5, 0.6], None),  # both rise: it diverges
        ([None, 0.5, 0.4], [0.9, 0.5, 0.51], None),  # level
        ([None, 0.5, 0.4], [0.3, 0.5, 0.6], 1),
        ([None], [0.3], None),
    ],
)
def test_where_overfitting_starts(train, search, start):
    assert overfitting(train, search) == start


def test_curves_say_what_chose_the_epoch(made):
    table = [
        row | {"judges": f"search and {len(row['variant'])} unlabelled images"} for row in rows(made / "curves.csv")
    ]
    report.write_table(made / "curves.csv", report.CURVE_COLUMNS, table)
    write_page(made)
    drawn = ["".join(element.itertext()) for element in ET.parse(made / "curves.svg").iter()]
    heads = [text for _, text in read(made).all("th")]
    for words in {row["judges"] for row in table}:
        assert f"epoch (line: {words.removesuffix(' images')}, dashes: training)" in drawn
        assert f"loss on {words}" in heads


def test_curves_that_diverge_are_drawn_as_far_as_they_go():
    nan = float("nan")
    chart = charts.curves("v1", [None, 2.0, None, nan], [1.0, 3.0, nan, nan], 0, None, "label")
    assert "nan" not in chart.inside
    assert chart.inside.count("<circle") == 1
    assert "<circle" not in charts.curves("v1", [None], [nan], 0, None, "label").inside


def test_planes_map_numbers_to_pixels():
    plane = Plane.around([1, 3], [10, 20], (200, 100))
    x, y = plane.at(1, 10)
    assert plane.left <= x < plane.at(3, 10)[0] <= 200 - plane.right
    assert plane.top <= plane.at(1, 20)[1] < y <= 100 - plane.bottom
    assert charts.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert charts.ticks(-3, 13) == [0, 5, 10]
    one = Plane.around([5.0], [0.0], (200, 100))  # a single candidate
    assert all(abs(value) < 1000 for value in one.at(5, 0))
    points = [Point(1, 5), Point(2, 5), Point(3, 1), Point(0, 9), Point(4, 2)]
    assert charts.front(points) == [Point(0, 9), Point(1, 5), Point(3, 1)]


def test_the_page_is_part_of_the_package():
    root = Path(__file__).parents[1]
    package_data = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    beside = {path.name for path in (root / "search").iterdir() if path.suffix in (".html", ".css", ".js")}
    assert beside == set(package_data["treesurgeon.search"])


# --- runs that cannot be read -----------------------------------------------------------------------------------------


def damage(made, how):
    if how == "absent":
        return made / "nowhere"
    if how == "selected":
        return made / "selected"
    if how == "empty":
        (made / "new").mkdir()
        return made / "new"
    if how == "unfinished":
        shutil.rmtree(made / "selected")
    elif how == "older":
        (made / "curves.csv").unlink()
    elif how == "columns":
        (made / "groups.csv").write_text("group,size\nconv,8\n")
    elif how == "short":
        path = made / "pinned.csv"
        path.write_text(path.read_text() + "half a line")
    elif how == "no dense":
        path = made / "results.csv"
        path.write_text(path.read_text().replace("dense,", "dens,"))
    elif how == "number":
        path = made / "results.csv"
        path.write_text(path.read_text().replace("0.947", "o.947"))
    elif how == "widths":
        path = made / "groups.csv"
        path.write_text(path.read_text().replace(",1\n", ",one\n"))
    elif how == "json":
        (made / "config.json").write_text("{")
    elif how == "list":
        (made / "environment.json").write_text("[]")
    return made


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "is not a directory"),
        ("empty", "holds no run: it has no config.json"),
        ("selected", "one level up"),
        ("unfinished", "is not finished: run the same search again"),
        ("older", r"curves.csv is missing"),
        ("columns", r"groups.csv: expected the columns group, size, widths, criterion, blocks, got group, size"),
        ("short", r"pinned.csv, line 5: expected 2 fields"),
        ("no dense", "exactly one row of the dense model"),
        ("number", "expected a number in a table of the run, got 'o.947'"),
        ("widths", "expected whole numbers in a table of the run, got 'one'"),
        ("json", r"config.json cannot be read"),
        ("list", r"environment.json does not hold a JSON object"),
    ],
)
def test_clear_errors(made, capsys, how, message):
    directory = damage(made, how)
    with pytest.raises(RunError, match=message):
        write_page(directory)
    with pytest.raises(SystemExit) as caught:
        main(["report", str(directory)])
    assert caught.value.code == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (made / "report.html").exists()


def test_every_table_is_read(made):
    assert set(open_run(made).tables) == set(TABLES) == {path.stem for path in made.glob("*.csv")}


# --- side by side -----------------------------------------------------------------------------------------------------


def test_compare_puts_runs_side_by_side(tmp_path, capsys):
    for name, status in (("a", "passed"), ("b", "fails"), ("c", "not certified")):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, status=status)
    main(["compare", *(str(tmp_path / name) for name in "abc")])
    head, _, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "selected", "params", "MACs", "train", "search", "test", "gap", "certificate"]
    for name, line, ending in zip("abc", lines[:6:2], ("passed", "fails", "not certified"), strict=True):
        assert line.startswith(f"{name} ")
        assert line.endswith(f" {ending}")
        assert "200.00 k (67%)" in line
        assert "93.50% (90.99% to 95.35%)" in line
    assert all("dense" in line for line in lines[1:6:2])
    assert sum("Certified, as it were." in line for line in lines) == 3
    assert not any("different sets of images" in line for line in lines)
    path = tmp_path / "b/selected/manifest.json"
    path.write_text(path.read_text().replace("testtest", "tesstest", 1))
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "tested on 2 different sets of images" in capsys.readouterr().out


def test_compare_says_which_directory_is_no_run(made, tmp_path, capsys):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(made), str(tmp_path / "nothing")])
    assert caught.value.code == 2
    assert f"{tmp_path / 'nothing'} holds no run" in capsys.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not BROWSER, reason="no Chromium here (Debian: chromium-headless-shell)")


@needs_browser
def test_the_plot_answers_to_mouse_keys_and_axes(made, tmp_path_factory):
    path = write_page(made)
    with browser(tmp_path_factory.mktemp("profile")) as page:
        page.open(path)
        assert page.run("document.querySelectorAll('#plot circle').length") == 40
        detail = "document.getElementById('detail').innerText"
        assert page.run(detail) == ""
        x, y = page.run(
            "(() => { document.getElementById('plot').scrollIntoView();"
            "const b = document.querySelector('#plot circle').getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        page.point(x, y)
        first = page.run(detail)
        number, generation = map(int, re.match(r"Candidate (\d+) of generation (\d+)", first).groups())
        row = next(
            r
            for r in rows(made / "candidates.csv")
            if (int(r["candidate"]), int(r["generation"])) == (number, generation)
        )
        groups = rows(made / "groups.csv")
        gone = [i for i, gene in zip((1, 2), row["genome"].split()[-2:], strict=True) if gene == "0"]
        for i, (group, kept) in enumerate(zip(groups, row["kept"].split(), strict=True)):
            told = f"{group['group']} {kept} of {group['size']}" in first
            assert told == (kept != group["size"] and i not in gone)
        page.run("document.getElementById('plot').focus()")
        page.key("Home")
        seen = {page.run(detail)}
        for _ in range(43):  # 40 candidates and 4 models
            page.key("ArrowRight")
            seen.add(page.run(detail))
        assert len(seen) == 44
        page.key("ArrowRight")
        assert page.run(detail) in seen
        before = page.run("document.querySelector('#plot svg').innerHTML")
        page.run(
            "(() => { const s = document.getElementById('axis-x'); s.value = 'macs';"
            "s.dispatchEvent(new Event('change')) })()"
        )
        after = page.run("document.querySelector('#plot svg').innerHTML")
        assert after != before
        assert AXES["macs"] in after
        page.run(
            "(() => { const s = document.getElementById('axis-x'); s.value = 'generation';"
            "s.dispatchEvent(new Event('change')) })()"
        )
        assert page.run("document.querySelectorAll('#plot .model, #plot .selected').length") == 0
        assert page.requests == [path.absolute().as_uri()]
        assert page.errors == []


@needs_browser
def test_the_page_fits_and_runs_nothing_foreign(tmp_path, tmp_path_factory):
    path = write_page(make_run(tmp_path, extra=HOSTILE, groups=30, blocks=9))
    with browser(tmp_path_factory.mktemp("profile")) as page:
        for width, dark in ((1280, False), (360, True)):
            page.open(path, width, dark=dark)
            assert page.run("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
            assert page.run("document.querySelectorAll('img').length") == 0
            page.run("document.getElementById('plot').focus()")
            page.key("ArrowDown")
            assert HOSTILE in page.run("document.getElementById('detail').textContent")
            paper = page.run("getComputedStyle(document.body).backgroundColor")
            assert paper == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        assert {*page.requests} == {path.absolute().as_uri()}
        assert page.errors == []


def test_a_model_that_is_cut_in_depth_and_calls_what_is_left_otherwise(tmp_path):
    make_run(tmp_path, groups=3, blocks=3)
    path = tmp_path / "selected/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["plan"] = {"keep": {"another": [0, 1]}, "drop": ["block"]}
    groups = {"layer0/conv": "layer0/conv", "layer1/conv": "another"}
    manifest["left"] = {"at": "layer1", "groups": groups, "blocks": {"layer0": "block", "layer1": "layer1"}}
    path.write_text(json.dumps(manifest))
    text = re.sub(r"<[^>]*>", " ", before_and_after(open_run(tmp_path)))
    said = " ".join(text.split())
    assert "cut in depth, behind layer1: its head" in said
    assert "layer0/conv 16 of 16" in said
    assert re.search(r"layer1/conv 2 of \d+", said)
    assert "layer2/conv dropped" in said
    assert "2 of 3 are layer0 dropped layer1 layer2 dropped" in said
