"""The model up to a point, with a head of its own: a linear one in closed form, or one with a hidden layer.

Where the labels have nothing in common with the checkpoint's, that is where a search starts from: the dense layers
after the last pool are about the checkpoint's classes, so they go, and `search` says whether a hidden layer, and how
wide a one, should take their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import engine
from treesurgeon.engine.shortened import ENTRY
from treesurgeon.search import hidden
from treesurgeon.search.data import Roles
from treesurgeon.search.heads import LinearHead, best_head
from treesurgeon.search.hidden import HiddenHead
from treesurgeon.search.subject import Subject
from treesurgeon.search.transfer import Labels, NewHead, adapted, by_batch, check_classes, feature_finder


def shortened(
    subject: Subject, at: str, roles: Roles, images: np.ndarray, widths: Sequence[int], seed: int, classes: int
) -> tuple[Subject, LinearHead, HiddenHead | None]:
    """The model up to a point, its running statistics estimated anew, with a head fitted to `train`.

    Args:
        subject: the model.
        at: the point.
        roles: `train` fits heads, `search` compares them.
        images: what running statistics are estimated from, `[N, H, W, C]`; none leave them.
        widths: that a hidden layer may have.
        seed: of its initial values.
        classes: outputs of the head.

    Returns:
        the model with a linear head; that head; and one with a hidden layer, where it is better on `search`.
    """
    train, short = roles.train, adapted(blank(subject, at, classes), images)
    features_of = feature_finder(short.infer, short.graph, short.variables)
    z = features_of(train)
    linear = best_head(train.task, z, train.labels, classes)
    widths, deep = sorted(set(widths) - {0}), None
    if widths:
        heads = hidden.hidden(z, train.labels, classes, widths, seed, train.task)
        deep = hidden.choose(linear, heads, features_of(roles.search), roles.search.labels, train.task)
    assert isinstance(short.module, engine.Shortened)
    variables = short.module.with_head(short.variables, linear.kernel, linear.bias)
    return replace(short, variables=variables), linear, deep


def without_stack(
    subject: Subject,
    labels: Labels,
    roles: Roles,
    images: np.ndarray,
    widths: Sequence[int],
    seed: int,
) -> tuple[Subject, NewHead] | None:
    """The model without the dense layers between its last pool and its head, and a head for these labels instead.

    None where there are no such layers. Arguments are those of `shortened`.
    """
    stack = engine.dense_stack(subject.infer, subject.graph, subject.spec.example)
    if not stack:
        return None
    check_classes(labels, roles)
    at, kernels = stack
    linear, head, deep = shortened(subject, at, roles, images, widths, seed, len(labels.names))
    made, train = truncated(linear, at, deep) if deep else linear, roles.train
    infer = jax.jit(made.infer)
    logits = by_batch(lambda x: infer(made.variables, x), train)
    told = NewHead(
        engine.find_head(made.infer, made.graph, made.spec.example).kernel,
        (),
        tuple(labels.names),
        None if deep else float(head.penalty),
        head.kernel.shape[0],
        len(train),
        1 - float(np.mean(train.task.wrong(logits, train.labels))),
        train.task.answered,
        kernels,
        made.spec.hidden,
    )
    return made, told


def blank(subject: Subject, at: str, classes: int) -> Subject:
    """The model up to a point, with a linear head of zeros."""
    x = subject.spec.example
    features = jax.eval_shape(engine.truncate(subject.infer, subject.graph, at, x), subject.variables, x)
    zeros = LinearHead(jnp.zeros((features.shape[-1], classes)), jnp.zeros(classes), jnp.float32(0))
    return truncated(subject, at, zeros)


def truncated(subject: Subject, at: str, head: LinearHead | HiddenHead) -> Subject:
    """The model up to a point, with this head; of a model that is cut in depth already a part of that."""
    if isinstance(subject.module, engine.Shortened) and at == ENTRY:
        at = subject.module.at
    layer = (head.inner, head.offset) if isinstance(head, HiddenHead) else None
    spec = replace(subject.spec, at=at, outputs=head.kernel.shape[1], hidden=len(head.kernel) if layer else 0)
    module = spec.cut(subject.module)
    assert isinstance(module, engine.Shortened)
    variables = module.with_head(module.take(subject.variables), head.kernel, head.bias, layer)
    there = engine.named_leaves(variables)
    momenta = {path: value for path, value in subject.momenta.items() if path in there}
    return Subject(spec, module, variables, spec.outputs, momenta)
