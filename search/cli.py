"""The command line: `treesurgeon search`, `inspect`, `depth`, `report`, `compare` and `verify`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from treesurgeon.engine import TreesurgeonError
from treesurgeon.models.errors import ModelError
from treesurgeon.search.compare import Comparison, compare
from treesurgeon.search.conclusion import Outcome
from treesurgeon.search.config import Config
from treesurgeon.search.depth import Depth, depth
from treesurgeon.search.hosts import lead
from treesurgeon.search.inspecting import Inspection, inspect
from treesurgeon.search.page import write_page
from treesurgeon.search.pipeline import run
from treesurgeon.search.pool import Pool
from treesurgeon.search.report import show
from treesurgeon.search.verify import Verification, verify

STOPPED = 130  # as a shell reports Ctrl-C


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors of ours take one screen and exit code 2; nothing is overwritten."""
    parser = tyro.extras.SubcommandApp()

    @parser.command(name="search")
    def search(
        config: Annotated[Config, tyro.conf.arg(name="")],
        pool: Annotated[Pool, tyro.conf.arg(name="")] = Pool(),  # noqa: B008  it is frozen
        quiet: Annotated[bool, tyro.conf.arg(help="Say nothing on the way, only the outcome.")] = False,
        as_json: Annotated[
            bool, tyro.conf.arg(name="json", help="The outcome as JSON on stdout, the way to it on stderr.")
        ] = False,
    ) -> None:
        """Search the smallest good variant of a pretrained Flax model."""
        try:
            outcome = run(config, _sayer(quiet, as_json), pool)
        except KeyboardInterrupt:
            print(f"\ntreesurgeon: stopped; {_resuming(config.directory)}", file=sys.stderr)
            sys.exit(STOPPED)
        if lead():
            _tell(outcome, as_json)

    @parser.command(name="inspect")
    def look(options: Annotated[Inspection, tyro.conf.arg(name="")]) -> None:
        """Say what a model could lose: groups, blocks, what is pinned and why, and what each costs."""
        inspect(options, print)

    @parser.command(name="depth")
    def depths(options: Annotated[Depth, tyro.conf.arg(name="")]) -> None:
        """Accuracy against depth: truncate a model at every block, with a head in closed form."""
        depth(options, lambda line: print(line, flush=True))

    @parser.command(name="report")
    def report(run: tyro.conf.Positional[Path]) -> None:
        """Write report.html, and its plots, into the directory of a complete run.

        Args:
            run: The run's directory.
        """
        print(f"wrote {write_page(run)}")

    @parser.command(name="compare")
    def beside(options: Annotated[Comparison, tyro.conf.arg(name="")]) -> None:
        """Put complete runs side by side: what each selected, its cost, its accuracy, its certificate."""
        compare(options, print)

    @parser.command(name="verify")
    def again(options: Annotated[Verification, tyro.conf.arg(name="")]) -> None:
        """Measure a selected model again and compare it with its manifest: exit code 0 if they agree, else 1."""
        if not verify(options, print):
            sys.exit(1)

    try:
        parser.cli(prog="treesurgeon", args=arguments)
    except (TreesurgeonError, ModelError) as error:
        print(f"treesurgeon: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntreesurgeon: stopped", file=sys.stderr)
        sys.exit(STOPPED)


def _sayer(quiet: bool, as_json: bool) -> Callable[[str], None]:
    if quiet:
        return lambda line: None
    return lambda line: print(line, file=sys.stderr if as_json else sys.stdout, flush=True)


def _tell(outcome: Outcome, as_json: bool) -> None:
    if not as_json:
        show(outcome.lines, title=f"metric: {outcome.lines[0].metric.name}")
        print(f"{outcome.sentence}\nsaved {outcome.path}")
        return
    models = [{**vars(line), "metric": line.metric.name, "gap": line.gap} for line in outcome.lines]
    found = {"verdict": outcome.verdict, "selected": str(outcome.path), "models": models}
    print(json.dumps(found, indent=1))


def _resuming(directory: Path) -> str:
    if not (directory / "config.json").exists():
        return "nothing was written yet"
    if (directory / "selected").exists():
        return f"the selected model is saved; treesurgeon report {directory} writes its report"
    return f"finished generations are saved in {directory}: run the same command again to go on"


if __name__ == "__main__":
    main()
