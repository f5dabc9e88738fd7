"""The command line: `treesurgeon search`, `treesurgeon inspect` and `treesurgeon depth`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from treesurgeon.engine import TreesurgeonError
from treesurgeon.models.errors import ModelError
from treesurgeon.search.config import Config
from treesurgeon.search.depth import Depth, depth
from treesurgeon.search.inspecting import Inspection, inspect
from treesurgeon.search.pipeline import run


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Errors of ours take one screen and exit code 2; nothing is overwritten."""
    parser = tyro.extras.SubcommandApp()

    @parser.command(name="search")
    def search(config: Annotated[Config, tyro.conf.arg(name="")]) -> None:
        """Search the smallest good variant of a pretrained Flax model."""
        run(config, lambda line: print(line, flush=True))

    @parser.command(name="inspect")
    def look(options: Annotated[Inspection, tyro.conf.arg(name="")]) -> None:
        """Say what a model could lose: groups, blocks, what is pinned and why, and what each costs."""
        inspect(options, print)

    @parser.command(name="depth")
    def depths(options: Annotated[Depth, tyro.conf.arg(name="")]) -> None:
        """Accuracy against depth: truncate a model at every block, with a head in closed form."""
        depth(options, lambda line: print(line, flush=True))

    try:
        parser.cli(prog="treesurgeon", args=arguments)
    except (TreesurgeonError, ModelError) as error:
        print(f"treesurgeon: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntreesurgeon: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
