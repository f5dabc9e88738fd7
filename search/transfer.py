"""Labels that are not the checkpoint's: the model with a head for the labels of the data.

The head is found in the traced function (`engine.find_head`), so this works on any module whose logits are one dense
layer on features. Rows of classes that both label lists name are carried over; the others are fitted in closed form on
`train` (see heads.py), with those in place. From then on the model is one like any other. Where labels are several for
an image, or numbers, all rows are fitted.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from treesurgeon import engine, models
from treesurgeon.engine import Head
from treesurgeon.search.data import DataError, Roles, Split
from treesurgeon.search.heads import LinearHead, best_head
from treesurgeon.search.sources import Source
from treesurgeon.search.subject import Subject, SubjectError
from treesurgeon.search.tasks import CLASSIFICATION, Units

COUNTS = ("num_classes", "classes", "n_classes", "num_labels")  # how a factory may call the number of classes
BATCH = 250
EXACT = 1e-3  # of the largest logit: how far the module with its new head may be from features @ kernel + bias


@dataclass(frozen=True)
class Labels:
    """How the labels of the data relate to those of the checkpoint.

    Attributes:
        names: of the data's classes.
        replaced: whether the head has to be replaced.
        carried: the data's classes that the checkpoint knows by name, and their numbers there.
    """

    names: tuple[str, ...]
    replaced: bool
    carried: Mapping[int, int] = field(default_factory=dict)


def match_labels(
    source: Source,
    count: int,
    theirs: Sequence[str] | None,
    head: Literal["auto", "keep", "fit"] = "auto",
) -> Labels:
    """Compare the labels of a dataset with those of a checkpoint.

    Args:
        source: the dataset. Names that it made up by counting are not compared.
        count: classes of the checkpoint, its outputs.
        theirs: their names, by number; None where they are not known.
        head: `auto` replaces the head where the counts differ, or the names where both are known, or where those of
            its classes are and the labels are none; `keep` takes the labels for the checkpoint's; `fit` replaces every
            row.

    Raises:
        SubjectError: there is not a name for each class of the checkpoint.
    """
    ours = source.label_names
    if theirs is not None and len(theirs) != count:
        raise SubjectError(
            f"the checkpoint has {count} classes and {len(theirs)} names ({', '.join(theirs[:4])}, …): give one for "
            f"each, in their order, with --source-labels"
        )
    of_classes = source.task == CLASSIFICATION.name
    known = theirs is not None and source.named and of_classes
    differ = len(ours) != count or (known and ours != tuple(theirs or ())) or (theirs is not None and not of_classes)
    if head == "keep" or (head == "auto" and not differ):
        return Labels(ours, False)
    places = {name: k for k, name in enumerate(theirs or ())} if known and head == "auto" else {}
    return Labels(ours, True, {i: places[name] for i, name in enumerate(ours) if name in places})


@dataclass(frozen=True)
class NewHead:
    """What replaced the checkpoint's head.

    Attributes:
        kernel: the path of its kernel.
        carried: names of the classes whose rows were carried over.
        fitted: names of the others.
        penalty: of the logistic regression; None where nothing was fitted.
        features: how many there are.
        images: of `train`, how many it was fitted to.
        train_accuracy: on these, share of right answers; in general one less the mean of `Task.wrong`.
        answered: what that is, in words.
        dropped: paths of the kernels of dense layers that went with the checkpoint's head.
        hidden: units of a hidden layer that came instead, 0 for none.
    """

    kernel: str
    carried: tuple[str, ...]
    fitted: tuple[str, ...]
    penalty: float | None
    features: int
    images: int
    train_accuracy: float
    answered: str = CLASSIFICATION.answered
    dropped: tuple[str, ...] = ()
    hidden: int = 0

    @property
    def sentence(self) -> str:
        """What was done, for the run's output."""

        def named(names: Sequence[str]) -> str:
            return ", ".join(names[:12]) + (f", … ({len(names)})" if len(names) > 12 else "")

        text = "the labels are not the checkpoint's"
        if self.dropped:
            text += (
                f" in any part: its dense layers after the last pool go ({named(self.dropped)}; --head fit keeps them)"
            )
        layer = f", with a hidden layer of {self.hidden}" if self.hidden else ""
        text += f": new head {self.kernel} on {self.features} features{layer}; "
        if self.carried:
            text += f"carried over: {named(self.carried)}; "
        if self.fitted:
            how = "" if self.hidden else " in closed form"
            text += f"fitted{how} to {self.images:,} images of train: {named(self.fitted)}; "
        return text + f"{self.train_accuracy:.2%} {self.answered} on train"


def adapted(subject: Subject, images: np.ndarray) -> Subject:
    """The model with its running statistics estimated anew from images `[N, H, W, C]`; none of them leave it."""
    if not len(images) or not subject.momenta:
        return subject
    estimate = jax.jit(engine.reestimate(subject.train, subject.momenta))
    return replace(subject, variables=estimate(subject.variables, jnp.asarray(images), jax.random.key(0)))


def with_new_head(subject: Subject, labels: Labels, roles: Roles) -> tuple[Subject, NewHead]:
    """The model with a head for these labels.

    Raises:
        SubjectError: the model's head cannot be replaced; the message says what to do.
        DataError: a class that has to be fitted has no image in `train`.
    """
    classes, train, task = len(labels.names), roles.train, roles.task
    head = replaceable(subject)
    free = check_classes(labels, roles)
    x = head_features(subject, train)
    kernel, bias = head_arrays(subject.variables, head)
    new_kernel, new_bias = np.zeros((x.shape[1], classes), np.float32), np.zeros(classes, np.float32)
    for ours, his in labels.carried.items():
        new_kernel[:, ours], new_bias[ours] = kernel[:, his], bias[his]
    logits = x @ new_kernel + new_bias
    penalty = None
    if free:
        fitted = best_head(task, x, train.labels, classes, known=logits, free=free)
        new_kernel[:, free], new_bias[free] = fitted.kernel, fitted.bias
        penalty = float(fitted.penalty)
    new = put_head(subject, head, LinearHead(jnp.asarray(new_kernel), jnp.asarray(new_bias), jnp.float32(0)), x, train)
    right = 1 - float(np.mean(task.wrong(x @ new_kernel + new_bias, train.labels)))
    told = NewHead(
        head.kernel,
        tuple(labels.names[i] for i in labels.carried),
        tuple(labels.names[i] for i in free),
        penalty,
        x.shape[1],
        len(train),
        right,
        task.answered,
    )
    return new, told


def check_classes(labels: Labels, roles: Roles) -> list[int]:
    """The classes whose rows have to be fitted; each needs an image."""
    train, classes = roles.train, len(labels.names)
    free = [i for i in range(classes) if i not in labels.carried]
    seen = np.bincount(train.labels, minlength=classes) if roles.task == CLASSIFICATION else np.ones(classes)
    if empty := [labels.names[i] for i in free if not seen[i]]:
        raise DataError(
            f"class {empty[0]!r} has no image in train, so that no head can be fitted to it ({len(empty)} such "
            f"classes): number the classes that there are from 0, raise --max-train, or, if the labels are the "
            f"checkpoint's, pass --head keep"
        )
    return free


def in_units(subject: Subject, variables: Any, units: Units) -> Any:
    """Variables of a model, or of a variant of it, whose head then returns `offset + scale * (what it returned)`."""
    head = replaceable(subject)

    def one(path: Any, leaf: Any) -> Any:
        name, scale = engine.path_name(path), np.asarray(units.scale, np.float32)
        if name == head.kernel:
            return leaf * jnp.asarray(scale.reshape([-1 if d == head.classes else 1 for d in range(leaf.ndim)]))
        return leaf * scale + np.asarray(units.offset, np.float32) if name == head.bias else leaf

    return jax.tree_util.tree_map_with_path(one, variables)


def rescaled(subject: Subject, units: Units) -> Subject:
    """The model with its head in other units.

    Raises:
        SubjectError: the head cannot be changed, or something follows it.
    """
    variables = in_units(subject, subject.variables, units)
    x = jax.random.normal(jax.random.key(0), (4, *subject.spec.input_shape), subject.spec.input_dtype)
    before, after = (np.asarray(jax.jit(subject.infer)(v, x), np.float64) for v in (subject.variables, variables))
    wanted = np.asarray(units.offset) + np.asarray(units.scale) * before
    if np.abs(after - wanted).max() > EXACT * max(np.abs(wanted).max(), 1):
        raise SubjectError(
            f"something follows the head of {subject.spec.model}: return the numbers as its last layer does"
        )
    return replace(subject, variables=variables)


def replaceable(subject: Subject) -> Head:
    """The model's head, if it can be replaced."""
    x = jax.ShapeDtypeStruct((1, *subject.spec.input_shape), subject.spec.input_dtype)
    head = engine.find_head(subject.infer, subject.graph, x)
    shape = subject.graph.leaves[head.kernel].shape
    rest = [n for d, n in enumerate(shape) if d not in (*head.inputs, head.classes)]
    why = None
    if head.shared:
        why = "its kernel is read elsewhere as well"
    elif head.bias is None:
        why = "it has no bias of its own"
    elif any(n != 1 for n in rest):
        why = f"it is a convolution with a window of {'×'.join(map(str, rest))}"
    if why:
        raise SubjectError(
            f"the head of {subject.spec.model}, {head.kernel}, cannot be replaced: {why}. Give the model a dense layer "
            f"with a bias as its last one, or data with the checkpoint's labels (--head keep)"
        )
    return head


def head_features(subject: Subject, split: Split) -> np.ndarray:
    """What feeds the model's head, `[N, F]`, for all images of a split."""
    return feature_finder(subject.infer, subject.graph, subject.variables)(split)


def feature_finder(infer: Callable[[Any, Any], Any], graph: engine.Graph, variables: Any) -> Callable[..., np.ndarray]:
    """`features_of(split)`: what feeds the head of a model, `[N, F]`, for all images of any split, compiled once."""
    find = engine.features(infer, graph)
    last = jax.jit(lambda v, x: list(find(v, x).values())[-1])
    return lambda split: by_batch(lambda x: last(variables, x), split)


def by_batch(compute: Callable[[Any], Any], split: Split) -> Any:
    """A pytree of arrays for all images of a split, computed in batches of one size."""
    count = len(split)
    size = min(BATCH, count)
    parts = []
    for start in range(0, count, size):
        at = np.arange(start, start + size) % count
        parts.append(jax.tree.map(np.asarray, compute(split.images[at])))
    return jax.tree.map(lambda *found: np.concatenate(found)[:count], *parts)


def head_arrays(variables: Any, head: Head) -> tuple[np.ndarray, np.ndarray]:
    """Kernel `[F, K]` and bias `[K]` of a head."""
    leaves = engine.named_leaves(variables)
    kernel = np.asarray(leaves[head.kernel], np.float32)
    order = [*head.inputs, *(d for d in range(kernel.ndim) if d not in (*head.inputs, head.classes)), head.classes]
    assert head.bias is not None
    return kernel.transpose(order).reshape(-1, kernel.shape[head.classes]), np.asarray(leaves[head.bias], np.float32)


def put_head(subject: Subject, head: Head, new: LinearHead, features: np.ndarray, split: Split) -> Subject:
    """The model with another head, of any number of classes.

    Args:
        subject: the model.
        head: where its head is.
        new: the head, on features as they are.
        features: what feeds the head for the images of `split`, `[N, F]`.
        split: some images: the new model has to return `new(features)` for them.

    Raises:
        SubjectError: the module cannot be built for so many classes, or something follows its head.
    """
    classes = new.kernel.shape[1]
    spec, module = subject.spec, subject.module
    if classes != subject.num_classes:
        spec = replace(spec, kwargs={**spec.kwargs, count_argument(spec.model): classes})
        module = spec.build(allow_import=True)
    assert head.bias is not None
    leaves = subject.graph.leaves
    shape = [classes if d == head.classes else n for d, n in enumerate(leaves[head.kernel].shape)]
    order = [*head.inputs, *(d for d in range(len(shape)) if d not in (*head.inputs, head.classes)), head.classes]
    kernel = np.asarray(new.kernel).reshape([shape[d] for d in order]).transpose(np.argsort(order))
    arrays = {head.kernel: kernel, head.bias: np.asarray(new.bias)}

    def one(path: Any, leaf: Any) -> Any:
        name = engine.path_name(path)
        return jnp.asarray(arrays[name], leaf.dtype) if name in arrays else leaf

    variables = jax.tree_util.tree_map_with_path(one, subject.variables)
    expected = {path: (x.shape, x.dtype) for path, x in engine.named_leaves(spec.template(module)).items()}
    got = {path: (x.shape, x.dtype) for path, x in engine.named_leaves(variables).items()}
    if wrong := sorted(path for path in expected.keys() | got.keys() if expected.get(path) != got.get(path)):
        raise SubjectError(
            f"{spec.model}, built for {classes} classes, differs from the checkpoint in more than its head "
            f"{head.kernel}: {', '.join(wrong[:4])}. Its argument for the number of classes may change the last layer "
            f"alone"
        )
    made = replace(subject, spec=spec, module=module, variables=variables, num_classes=classes)
    few = min(len(split), 64)
    logits = np.asarray(jax.jit(made.infer)(variables, split.images[:few]))
    wanted = np.asarray(new(features[:few]))
    if logits.shape != wanted.shape or np.abs(logits - wanted).max() > EXACT * max(np.abs(wanted).max(), 1):
        raise SubjectError(
            f"{spec.model} does not return what its head {head.kernel} makes of its features: something follows it, "
            f"such as a softmax or a temperature. Return the logits"
        )
    return made


def count_argument(model: str) -> str:
    """The argument by which a model's factory takes the number of classes.

    Raises:
        SubjectError: it has none.
    """
    factory = models.find(model)
    takes = inspect.signature(factory).parameters if callable(factory) else {}
    for name in COUNTS:
        if name in takes and takes[name].kind is not inspect.Parameter.POSITIONAL_ONLY:
            return name
    raise SubjectError(
        f"{model} cannot be built for another number of classes: give its factory an argument `{COUNTS[0]}`, the "
        f"length of the logits, with the checkpoint's number as its default"
    )
