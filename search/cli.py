"""The command line: `treesurgeon search`, `inspect`, `depth`, `insight`, `report`, `compare` and `verify`."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import tyro

from treesurgeon.engine import TreesurgeonError
from treesurgeon.models.errors import ModelError
from treesurgeon.search.compare import Comparison, compare
from treesurgeon.search.conclusion import Outcome
from treesurgeon.search.config import Config
from treesurgeon.search.config_file import defaults, named_in, write
from treesurgeon.search.depth import Depth, depth
from treesurgeon.search.exporting import Export, export
from treesurgeon.search.hosts import lead
from treesurgeon.search.insight import Insight, insight
from treesurgeon.search.inspecting import Inspection, inspect
from treesurgeon.search.live import telling
from treesurgeon.search.page import write_page
from treesurgeon.search.pipeline import run
from treesurgeon.search.pool import Pool
from treesurgeon.search.report import show
from treesurgeon.search.room import give_virtual_devices_threads
from treesurgeon.search.verify import Verification, verify

STOPPED = 130  # as a shell reports Ctrl-C
CLOSED = 141  # as of a process that SIGPIPE ended
HERE = Pool()  # the devices of this machine
_AGAIN = "and run the same command again"
FIXES = {
    errno.ENOSPC: f"the disk is full: make room, {_AGAIN}",
    errno.EDQUOT: f"your quota is used up: make room, {_AGAIN}",
    errno.EFBIG: f"files may not be that large here: raise the limit, {_AGAIN}",
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: f"see to its permissions, {_AGAIN}",
    errno.EPERM: f"see to its permissions, {_AGAIN}",
    errno.ENOTDIR: "choose another place",
    errno.EEXIST: "choose another place",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors of ours take one screen and exit code 2; nothing is overwritten."""
    give_virtual_devices_threads()
    try:
        _command(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except (TreesurgeonError, ModelError) as error:
        print(f"treesurgeon: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # nobody reads on, as with `| head`; what Python flushes at its end has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED)
    except OSError as error:
        if error.errno not in FIXES:
            raise
        print(f"treesurgeon: {error.strerror}: {error.filename or 'a file'}; {FIXES[error.errno]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        _stop("stopped")


def _stop(text: str) -> NoReturn:
    """End after Ctrl-C; a second one ends at once, whatever is still being written."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(STOPPED))
    print(f"\ntreesurgeon: {text}", file=sys.stderr)
    sys.exit(STOPPED)


def _command(arguments: Sequence[str]) -> None:
    if list(arguments) == ["--version"]:
        print(f"treesurgeon {version('treesurgeon')}")
        return
    parser = tyro.extras.SubcommandApp()
    from_file = defaults(named_in(arguments) if list(arguments[:1]) == ["search"] else None)

    @parser.command(name="search")
    def search(
        config: Annotated[Config, tyro.conf.arg(name="")] = from_file,
        pool: Annotated[Pool, tyro.conf.arg(name="")] = HERE,
        config_file: Annotated[
            Path | None,
            tyro.conf.arg(
                name="config",
                metavar="FILE",
                help="A .toml or .yaml file of these options, with underscores; flags come before what it says.",
            ),
        ] = None,
        print_config: Annotated[
            bool, tyro.conf.arg(help="Write the options in effect to stdout as TOML, and do nothing else.")
        ] = False,
        quiet: Annotated[bool, tyro.conf.arg(help="Say nothing on the way, only the outcome.")] = False,
        as_json: Annotated[
            bool, tyro.conf.arg(name="json", help="The outcome as JSON on stdout, the way to it on stderr.")
        ] = False,
    ) -> None:
        """Search the smallest good variant of a pretrained Flax model."""
        if print_config:
            config.check()
            print(write(config), end="")
            return
        try:
            with telling(quiet, as_json) as say:
                outcome = run(config, say, pool)
        except KeyboardInterrupt:
            _stop(f"stopped; {_resuming(config.directory)}")
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

    @parser.command(name="insight")
    def answers(options: Annotated[Insight, tyro.conf.arg(name="")]) -> None:
        """Say what the units of a model answer to: class selectivity, directions, pictures."""
        insight(options, lambda line: print(line, flush=True))

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

    @parser.command(name="export")
    def away(options: Annotated[Export, tyro.conf.arg(name="")]) -> None:
        """Write a selected model as StableHLO, ONNX, safetensors, msgpack or Orbax."""
        export(options, print)

    parser.cli(prog="treesurgeon", args=arguments)


def _tell(outcome: Outcome, as_json: bool) -> None:
    if not as_json:
        show(outcome.lines, title=f"metric: {outcome.lines[0].metric.name}")
        print("\n".join(filter(None, [outcome.sentence, outcome.baselines, f"saved {outcome.path}"])))
        return
    models = [{**vars(line), "metric": line.metric.name, "gap": line.gap} for line in outcome.lines]
    found = {
        "verdict": outcome.verdict,
        "selected": str(outcome.path),
        "models": models,
        "baselines": outcome.baselines,
    }
    print(json.dumps(found, indent=1))


def _resuming(directory: Path) -> str:
    if not (directory / "config.json").exists():
        return "nothing was written yet"
    if (directory / "selected").exists():
        return f"the selected model is saved; treesurgeon report {directory} writes its report"
    return f"finished generations are saved in {directory}: run the same command again to go on"


if __name__ == "__main__":
    main()
