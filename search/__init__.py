"""The search for the smallest good variant of a pretrained model.

    from treesurgeon.search import Config, run

    outcome = run(Config(model="resnet56", checkpoint="resnet56.safetensors", data="tfds-dir:cifar10/1.0.0", macs=0.5))

Reading order: `config.py`, `pipeline.py`, `space.py`, `evolve.py`, `evaluate.py`, `finalists.py`, `selection.py`.
"""

from treesurgeon.search.conclusion import Outcome
from treesurgeon.search.config import Config, RunError
from treesurgeon.search.data import DataError, Roles, Split, open_source, split_roles
from treesurgeon.search.pipeline import run
from treesurgeon.search.selection import Finalist, Rule, Verdict, WithinMargins

__all__ = [
    "Config",
    "DataError",
    "Finalist",
    "Outcome",
    "Roles",
    "Rule",
    "RunError",
    "Split",
    "Verdict",
    "WithinMargins",
    "open_source",
    "run",
    "split_roles",
]
