"""What a selected variant has to beat: other ways to spend the same data, reported beside it.

| baseline | starts from | is fitted |
|---|---|---|
| dense fine-tuned | the checkpoint | as the finalists are, to the labels alone; before them, where it teaches them |
| dense, unlabelled too | the checkpoint | as the finalists are, to what they learn about the images of `--unlabelled` |
| dense from scratch | random weights | for as many epochs, or `--scratch-epochs` |
| *selected* from scratch | random weights at its small shapes | likewise |
| linear probe | the checkpoint | a linear head on its features, without a learning rate; nothing else |

With enough data they can win. As for a finalist, the epoch that is best on `search` is kept; `test` then says how they
compare with the variant, image by image, and no choice goes by that. Intervals are for each baseline
by itself. Where the dense model as fine-tuned is what variants are compared with (frozen.py), that is on other images.

A pruned architecture from scratch: Z. Liu et al.: "Rethinking the value of network pruning", ICLR 2019.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import engine
from treesurgeon.engine import StructureError
from treesurgeon.search.heads import HeadError, best_head
from treesurgeon.search.metrics import Metric
from treesurgeon.search.paired import interval
from treesurgeon.search.selection import PLAIN
from treesurgeon.search.setting import Setting
from treesurgeon.search.subject import Subject, SubjectError
from treesurgeon.search.transfer import head_features, put_head, replaceable
from treesurgeon.search.tuning import Tuned, best_tuned, tune

LEVEL = 0.95  # of intervals
PROBE = "linear probe"


@dataclass(frozen=True)
class Contrast:
    """A baseline and the selected model on the same images of `test`.

    Attributes:
        what: the baseline in words.
        params: its parameters, a share of the dense model's.
        difference: of the errors, the baseline's less the selected model's; below 0 the baseline is better.
        low, high: an interval for it, of level `LEVEL`.
    """

    what: str
    params: float
    difference: float
    low: float
    high: float


def train(setting: Setting, selected: Tuned, whole: Tuned, say: Callable[[str], None]) -> dict[str, tuple[Tuned, str]]:
    """The baselines by name, each with what it is in words; none where they were not asked for.

    Args:
        setting: the run's.
        selected: the frozen model that was selected.
        whole: the dense model.
        say: told how it goes.
    """
    config = setting.config
    if not config.baselines:
        return {}
    if not setting.recipe.epochs:
        say("no baselines are trained, as no finalist is (--epochs 0)")
        return {}
    plain = setting.labelled.epochs
    epochs = config.scratch_epochs or plain
    tuned = "" if setting.teacher else f"{_epochs(plain)} of the dense model, "
    say(
        f"training baselines to compare {selected.name} with: {tuned}{_epochs(epochs)} from scratch, a linear probe "
        "(--no-baselines leaves them out)"
    )
    out = {}

    def add(
        name: str, what: str, like: Tuned, variables: Any, fit: Callable[..., Tuned] = best_tuned, **how: Any
    ) -> None:
        start = replace(like, name=name, variables=variables, fitted=None, trail=(), policy="")
        out[name] = fit(setting, start, say, **how), what

    words = "the dense model, fine-tuned"
    if teacher := setting.teacher:
        out[PLAIN] = replace(whole, name=PLAIN, variables=teacher.params, fitted=teacher), words
    else:
        add(PLAIN, words, whole, whole.variables)
    if setting.unlabelled:
        words = "the dense model, fine-tuned on the unlabelled images as well"
        add("dense, unlabelled too", words, whole, whole.variables, unlabelled=True)
    how = {"epochs": epochs, "learning_rate": config.scratch_learning_rate}
    words = f"from random weights, {_epochs(epochs)}"
    add(
        "dense from scratch",
        f"the dense architecture {words}",
        whole,
        scratch(whole.subject, whole.plan, config.seed),
        tune,
        **how,
    )
    try:
        variables = probe(setting)
    except (SubjectError, StructureError, HeadError) as error:
        say(f"no linear probe: {error}")
    else:
        out[PROBE] = replace(whole, name=PROBE, variables=variables), "a linear head on the dense model's features"
    if selected.name not in (whole.name, PLAIN):
        start = scratch(selected.subject, selected.plan, config.seed)
        add(f"{selected.name} from scratch", f"its architecture {words}", selected, start, tune, **how)
    return out


def scratch(subject: Subject, plan: engine.Plan, seed: int) -> Any:
    """Random variables at the shapes of a plan.

    The dense module's initial values, cut; kernels are then scaled up by the square root of what they lost of their
    inputs, so that they are as initialisers by fan-in make them at the small shapes.
    """
    graph = subject.graph
    x = jnp.zeros((1, *subject.spec.input_shape), subject.spec.input_dtype)
    small = engine.cut(jax.jit(subject.module.init)(jax.random.key(seed), x), graph, plan)
    made = {(member.path, member.axis) for group in graph.groups.values() for member in group.members if member.makes}

    def scaled(path: Any, leaf: Any) -> Any:
        name = engine.path_name(path)
        dense = graph.leaves[name]
        if leaf.ndim < 2 or not dense.trainable or not np.ptp(np.asarray(leaf, np.float32)):
            return leaf  # scales and biases start alike
        axes = zip(dense.shape, leaf.shape, strict=True)
        lost = math.prod(n / kept for d, (n, kept) in enumerate(axes) if (name, d) not in made)
        return leaf * jnp.asarray(math.sqrt(lost), leaf.dtype)

    return jax.tree_util.tree_map_with_path(scaled, small)


def probe(setting: Setting) -> Any:
    """The dense model's variables with a linear head fitted to `train`.

    Raises:
        SubjectError, StructureError: the model's head cannot be replaced.
        HeadError: its features are not finite.
    """
    subject, data = setting.subject, setting.roles.train
    head = replaceable(subject)
    features = head_features(subject, data)
    fitted = best_head(data.task, features, data.labels, subject.num_classes)
    return put_head(subject, head, fitted, features, data).variables


def contrast(metric: Metric, baseline: Any, selected: Any, what: str, params: float) -> Contrast:
    """Compare a baseline with the selected model, both as the metric observed them on `test`."""
    found, opposite = metric.compare(baseline, selected), metric.compare(selected, baseline)
    low, high = interval(found.p_value, opposite.p_value, metric.reach, LEVEL)
    return Contrast(what, params, found.difference, low, high)


def sentence(metric: Metric, selected: str, params: float, found: Mapping[str, Contrast]) -> str:
    """Whether a baseline is ahead of the selected model on `test`, in words.

    Args:
        metric: what errors are of.
        selected: the selected model's name.
        params: its parameters, a share of the dense model's.
        found: the baselines by name.
    """
    if not found:
        return ""

    def size(name: str) -> str:
        return f"with {found[name].params:.0%} of the parameters against {params:.0%}"

    ahead = sorted((name for name in found if found[name].difference < 0), key=lambda name: found[name].difference)
    sure = [name for name in ahead if found[name].high < 0]
    if sure:
        each = [f"{name} by {_by(metric, found[name], -1)}, {size(name)}" for name in sure]
        verb = "a baseline is" if len(sure) == 1 else f"{len(sure)} baselines are"
        return f"On test {verb} better than {selected}: {'; '.join(each)}."
    if ahead:
        each = [f"{name} by {_by(metric, found[name], -1)}, {size(name)}" for name in ahead]
        return f"On test these are ahead of {selected}, which may be chance: {'; '.join(each)}."
    near = min(found, key=lambda name: found[name].difference)
    apart = f"behind by {_by(metric, found[near], 1)}" if found[near].difference else "level with it"
    return f"On test none of the {len(found)} baselines is ahead of {selected}; the nearest is {near}, {apart}."


def record(metric: Metric, selected: str, params: float, found: Mapping[str, Contrast]) -> dict[str, Any]:
    """What the manifest says of the baselines; see `sentence`."""
    return {
        "sentence": sentence(metric, selected, params, found),
        "level": LEVEL,
        "found": {name: {**asdict(each), "remark": _remark(metric, selected, each)} for name, each in found.items()},
    }


def _remark(metric: Metric, selected: str, found: Contrast) -> str:
    """A baseline in a few words, for a table."""
    if not found.difference:
        return f"{found.what}; level with {selected} on test"
    ahead = found.difference < 0
    apart = _by(metric, found, -1 if ahead else 1)
    return f"{found.what}; {'ahead of' if ahead else 'behind'} {selected} by {apart} on test"


def _by(metric: Metric, found: Contrast, sign: int) -> str:
    """How far apart two models are, with the interval, both with this sign."""
    low, high = sorted(sign * metric.scale * end for end in (found.low, found.high))
    digits = 2 if metric.rising else 4
    interval = f"{LEVEL:.0%} interval {low:+.{digits}f} to {high:+.{digits}f}"
    return f"{metric.amount(sign * found.difference)} ({interval})"


def _epochs(count: int) -> str:
    return f"{count} epoch" + "s" * (count != 1)
