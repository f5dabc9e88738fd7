"""What a search shows: a view on a terminal (a real one, of a pair), lines anywhere else."""

import contextlib
import io
import os
import pty
import sys
import threading

import numpy as np
import pytest
from rich.console import Console

from treesurgeon.search.evolve import Scored
from treesurgeon.search.live import Generation, View, clock, telling

FRONT = Scored(
    np.zeros((4, 2), np.int32),
    np.array([[0.25, 0.9], [0.5, 0.4], [0.75, 0.3], [0.1, 0.01]], np.float32),
    np.array([0, 0, 0, 0.2], np.float32),
)


def generation(done, front=FRONT):
    return Generation(front, done, 4, "params", took=2.0, candidates=6, images=3000)


def test_a_generation_is_a_line():
    assert str(generation(1)) == (
        "generation   1/4    3.0 candidates/s   1,500 images/s     6 s left  "
        "front   3, best loss 0.3000 at 75% of dense's params"
    )
    small = Scored(FRONT.genomes, FRONT.objectives * np.array([0.01, 1], np.float32), FRONT.violation)
    assert generation(4, small).endswith("best loss 0.3000 at 0.7% of dense's params")
    nothing = Scored(FRONT.genomes, FRONT.objectives, np.ones(4, np.float32))
    assert generation(4, nothing).endswith("0 s left  nothing within the budget yet")


@contextlib.contextmanager
def terminal():
    """The file of a terminal's end, and what came out at the other when it is closed."""
    master, slave = pty.openpty()
    seen = bytearray()

    def read():
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while chunk := os.read(master, 4096):
                seen.extend(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with os.fdopen(slave, "w", encoding="utf-8") as file:
            yield file, seen
    finally:
        reader.join()
        os.close(master)


def test_on_a_terminal_the_view_is_kept_up_to_date(monkeypatch):
    for name in ("NO_COLOR", "CI", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    with terminal() as (file, seen):
        monkeypatch.setattr(sys, "stdout", file)
        with telling() as say:
            assert file.isatty()
            say("searching [3] groups")
            for done in range(1, 5):
                say(generation(done))
                say.__self__._live.refresh()
        file.flush()
    text = seen.decode()
    assert text.count("searching [3] groups") == 1  # brackets are no markup
    for words in ("since the start", "generation 2 of 4", "generation 4 of 4", "of generations left", "━"):
        assert words in text, words
    assert "3.0 candidates/s, 1,500 images/s" in text
    assert "best loss 0.3000 at 75% of dense's params" in text
    assert "front of 3, size and loss: 25% 0.9000   50% 0.4000   75% 0.3000" in text
    assert "generation   1/4" not in text
    assert text.count("generation   4/4") == 1
    assert "\x1b[2K" in text  # lines are erased and drawn again
    assert text.rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in text[text.rindex("generation   4/4") :]  # the cursor


def test_a_view_ends_with_an_error():
    with terminal() as (file, seen), pytest.raises(KeyboardInterrupt), View(Console(file=file, force_terminal=True)):
        raise KeyboardInterrupt
    assert b"\x1b[?25h" in seen


@pytest.mark.parametrize("dumb", [False, True])
def test_anywhere_else_there_are_lines(dumb, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("TTY_INTERACTIVE", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (file, seen):
        out = file if dumb else io.StringIO()
        monkeypatch.setattr(sys, "stdout", out)
        with telling() as say:
            say("one")
            say(generation(2))
        text = "" if dumb else out.getvalue()
    text = (text or seen.decode()).replace("\r\n", "\n")
    assert text == f"one\n{generation(2)}\n"


@pytest.mark.parametrize(("quiet", "as_json", "want"), [(True, False, ""), (True, True, ""), (False, True, "one\n")])
def test_quiet_says_nothing_and_json_says_it_elsewhere(quiet, as_json, want, capsys):
    with telling(quiet, as_json) as say:
        say("one")
    out, err = capsys.readouterr()
    assert (out, err) == ("", want)


def test_clock():
    assert [clock(s) for s in (0, 59.9, 61, 3723)] == ["0:00", "0:59", "1:01", "1:02:03"]
