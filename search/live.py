"""How a search shows that it goes on: a view that is kept up to date on a terminal, plain lines anywhere else.

Whoever does the work says lines, and `Generation`s among them, which are lines as well: on paper they look as they
always did, a view takes them apart.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import TextIO

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from treesurgeon.search.evolve import Scored

SHOWN = 6  # members of the front
BAR = 40  # characters
PER_SECOND = 4  # how often the view is drawn


class Generation(str):
    """A finished generation, as the line that is printed of it.

    Attributes:
        done, total: generations.
        candidates: a second.
        images: candidate-images that were scored a second.
        left: seconds, if the generations to come take as long as this one.
        front: size, a share of the dense model's, and loss of the feasible members of the front, by size.
        measure: what the size is of.
    """

    done: int
    total: int
    candidates: float
    images: float
    left: float
    front: tuple[tuple[float, float], ...]
    measure: str

    def __new__(
        cls, front: Scored, done: int, total: int, measure: str, took: float, candidates: int, images: int
    ) -> Generation:
        """From what a generation left behind; it took so many seconds for so many candidates and candidate-images."""
        feasible = front.violation == 0
        found = [(float(size), float(loss)) for size, loss in np.asarray(front.objectives)[feasible, :2]]
        found.sort()
        left = (total - done) * took
        text = f"generation {done:>3}/{total}  {candidates / took:5.1f} candidates/s  {images / took:6,.0f} images/s  "
        text += f"{left:4.0f} s left  "
        if found:
            size, loss = min(found, key=lambda member: member[1])
            text += f"front {len(found):>3}, best loss {loss:.4f} at {share(size)} of dense's {measure}"
        else:
            text += "nothing within the budget yet"
        self = super().__new__(cls, text)
        self.done, self.total, self.left, self.measure, self.front = done, total, left, measure, tuple(found)
        self.candidates, self.images = candidates / took, images / took
        return self


def share(size: float) -> str:
    """In per cent, with a decimal where there are few."""
    return f"{size:.0%}" if size > 0.095 else f"{size:.1%}"


class View:
    """On a terminal: what was said scrolls by, and below it stands how far the search is.

    with View(console) as say:
        run(config, say)
    """

    def __init__(self, console: Console):
        self._console = console
        self._at: Generation | None = None
        self._spinner = Spinner("dots")
        self._start = self._since = time.monotonic()
        self._live = Live(console=console, refresh_per_second=PER_SECOND, transient=True, get_renderable=self._draw)

    def __enter__(self) -> Callable[[str], None]:
        self._live.start()
        return self._say

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def _say(self, line: str) -> None:
        if not isinstance(line, Generation):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)
            return
        self._at, self._since = (line, time.monotonic()) if line.done < line.total else (None, self._since)
        if line.done == line.total:  # the view is for what is going on: what is over is a line like the others
            self._console.print(str(line), markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> Group | Spinner:
        now = time.monotonic()
        gone = f"{clock(now - self._start)} since the start"
        if self._at is None:
            self._spinner.update(text=gone)
            return self._spinner
        at = self._at
        left = max(at.left - (now - self._since), 0)
        head = Table.grid(padding=(0, 2))
        head.add_row(
            f"generation {at.done + 1} of {at.total}",
            ProgressBar(total=at.total, completed=at.done, width=BAR),
            f"{gone}, about {clock(left)} of generations left",
        )
        rates = Text(f"{at.candidates:.1f} candidates/s, {at.images:,.0f} images/s")
        return Group(head, rates, *_front(at))


def _front(at: Generation) -> list[Text]:
    """The best so far, and members of the front spread over its sizes."""
    if not at.front:
        return [Text("nothing within the budget yet")]
    size, loss = min(at.front, key=lambda member: member[1])
    spread = np.unique(np.linspace(0, len(at.front) - 1, SHOWN).round().astype(int))
    members = "   ".join(f"{share(at.front[i][0])} {at.front[i][1]:.4f}" for i in spread)
    return [
        Text(f"best loss {loss:.4f} at {share(size)} of dense's {at.measure}", style="bold green"),
        Text(f"front of {len(at.front)}, size and loss: {members}"),
    ]


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def lines(file: TextIO | None) -> Iterator[Callable[[str], None]]:
    """Anywhere else: a line for each thing said, at once; without a file, none."""
    yield lambda line: None if file is None else print(line, file=file, flush=True)


def telling(quiet: bool = False, as_json: bool = False) -> AbstractContextManager[Callable[[str], None]]:
    """What a search says its lines to, `with telling() as say: run(config, say)`.

    Args:
        quiet: say nothing.
        as_json: stdout is for the outcome: plain lines to stderr.
    """
    if quiet:
        return lines(None)
    if as_json:
        return lines(sys.stderr)
    console = Console(file=sys.stdout)
    if console.is_terminal and not console.is_dumb_terminal:
        return View(console)
    return lines(sys.stdout)
