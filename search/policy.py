"""Which leaves fine-tuning changes, and how fast: a frozen prefix, and learning rates that fall towards the inputs.

Depth goes by the dataflow and not by names (`engine.levels`): what comes before the first block is level 0, the first
block is level 1, and what comes after the last one, the head, is the last.

Rates by depth: K. Clark et al.: "ELECTRA", ICLR 2020; H. Bao et al.: "BEiT", ICLR 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, get_args

import jax

from treesurgeon import engine
from treesurgeon.engine import Graph
from treesurgeon.search.config import AugmentName, Config, OptimizerName, RunError
from treesurgeon.search.subject import Subject


@dataclass(frozen=True)
class Policy:
    """What fine-tuning does with each leaf, by path.

    Attributes:
        frozen: leaves that stay as they are, running statistics included.
        rates: of the other trainable leaves, a factor on the learning rate; 1 where there is none.
    """

    frozen: frozenset[str] = frozenset()
    rates: Mapping[str, float] = field(default_factory=dict)

    def leaves(self, graph: Graph, variables: Any) -> tuple[Any, Any]:
        """Two pytrees like the variables: a bool, whether the leaf is trained, and a factor on its learning rate."""

        def trained(path: Any, _: Any) -> bool:
            name = engine.path_name(path)
            return graph.leaves[name].trainable and name not in self.frozen

        def rate(path: Any, _: Any) -> float:
            return self.rates.get(engine.path_name(path), 1.0)

        mapped = jax.tree_util.tree_map_with_path
        return mapped(trained, variables), mapped(rate, variables)


EVERYTHING = Policy()


def _one_of(*names: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in names:
            raise ValueError(text)
        return text

    return read


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split("+"))
    if "" in names:
        raise ValueError(text)
    return names


# What a policy may say otherwise, how that is read, and what is expected.
OPTIONS: Mapping[str, tuple[Callable[[str], Any], str]] = MappingProxyType(
    {
        "freeze": (_names, "levels or paths"),
        "layer-decay": (float, "a number"),
        "learning-rate": (float, "a number"),
        "weight-decay": (float, "a number"),
        "clip": (float, "a number"),
        "optimizer": (_one_of(*get_args(OptimizerName)), f"one of {', '.join(get_args(OptimizerName))}"),
        "patience": (int, "a whole number"),
        "augment": (_one_of(*get_args(AugmentName)), f"one of {', '.join(get_args(AugmentName))}"),
    }
)


def overruled(config: Config, policy: str) -> Config:
    """The configuration as one of its `policies` has it: `freeze=2+stem,learning-rate=0.001`.

    Raises:
        RunError: it is not of that form, or a value is out of range.
    """
    changes: dict[str, Any] = {}
    for part in policy.split(","):
        name, _, text = (piece.strip() for piece in part.partition("="))
        if name not in OPTIONS:
            raise RunError(f"--policies {policy}: {name!r} is none of {', '.join(OPTIONS)}; expected option=value")
        read, expected = OPTIONS[name]
        try:
            changes[name.replace("-", "_")] = read(text)
        except ValueError:
            raise RunError(f"--policies {policy}: {name} = {text!r}: expected {expected}") from None
    made = replace(config, **changes, policies=())
    try:
        made.check()
    except RunError as error:
        raise RunError(f"--policies {policy}: {error}") from error
    return made


def make_policy(subject: Subject, freeze: Sequence[str], decay: float) -> Policy:
    """The policy of a configuration.

    Args:
        subject: the model.
        freeze: a number of levels from the input on, or prefixes of paths of leaves (`params/` may be left out).
        decay: what the rate of a level is multiplied by for each level that comes after it.

    Raises:
        RunError: a prefix that no leaf has, more levels than there are, or nothing is left to train.
    """
    graph = subject.graph
    x = jax.ShapeDtypeStruct((1, *subject.spec.input_shape), subject.spec.input_dtype)
    levels = engine.levels(subject.infer, graph, x) if freeze or decay != 1 else {}
    frozen = frozenset(path for given in freeze for path in _frozen(given, levels))
    trained = {path for path, leaf in graph.leaves.items() if leaf.trainable} - frozen
    if not trained:
        raise RunError(f"--freeze {' '.join(freeze)} leaves nothing to train: freeze less, or pass --epochs 0")
    last = max(levels.values(), default=0)
    rates = {path: decay ** (last - levels[path]) for path in sorted(trained) if levels and decay != 1}
    return Policy(frozen, rates)


def held(train: Callable, frozen: Collection[str]) -> Callable:
    """`train` without updates of the running statistics of frozen layers.

    Its forward pass normalises by the batch as ever: what stays is what inference goes by.
    """
    if not frozen:
        return train

    def apply(variables: Any, x: Any, key: Any) -> tuple[Any, Any]:
        out, updates = train(variables, x, key)
        old = engine.named_leaves(variables)
        kept = jax.tree_util.tree_map_with_path(
            lambda path, new: old[engine.path_name(path)] if engine.path_name(path) in frozen else new, updates
        )
        return out, kept

    return apply


def _frozen(given: str, levels: Mapping[str, int]) -> list[str]:
    if given.isdigit():
        count, there = int(given), max(levels.values()) + 1
        if count > there:
            raise RunError(f"--freeze {given}: the model has {there} levels: what comes before the first block, "
                           f"its blocks, and its head")  # fmt: skip
        return [path for path, level in levels.items() if level < count]
    wanted = given.strip("/")
    found = [path for path in levels if _under(wanted, path)]
    if not found:
        modules = dict.fromkeys("/".join(path.split("/")[1:-1]) or path for path in levels)
        raise RunError(
            f"--freeze {given}: no parameter's path begins so; expected a number of levels or a path such as "
            f"{', '.join(list(modules)[:4])}"
        )
    return found


def _under(wanted: str, path: str) -> bool:
    """Whether a path, or what follows its collection, is the wanted one or lies under it."""
    parts, prefix = path.split("/"), wanted.split("/")
    return any(parts[start : start + len(prefix)] == prefix for start in (0, 1))
