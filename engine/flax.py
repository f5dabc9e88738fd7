"""The one file that knows Flax."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
from flax.core import meta, unfreeze


def from_linen(module: nn.Module, variables: Mapping[str, Any], **apply_kwargs: Any) -> tuple[Callable, dict[str, Any]]:
    """A linen module as a pure function of its variables.

    Args:
        module: the module.
        variables: what `module.init` returned, or a checkpoint of it: `{"params": …, "batch_stats": …}`.
        apply_kwargs: keyword arguments that every call passes on to `module.apply` (`train=False`, `method=…`).

    Returns:
        `fn(variables, *args, **kwargs)`, which is `module.apply`, and the variables as plain dicts of arrays.
    """
    params = meta.unbox(unfreeze(dict(variables)))

    def fn(params: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return module.apply(params, *args, **{**apply_kwargs, **kwargs})

    return fn, dict(params)
