"""Fine-tuning on small shapes, stopped where the model is best on `search`.

    loss = objective(train_apply, temperature=4.0, distill=0.5)
    result = fit(loss, params, trainable, {"x": x, "y": y, "teacher": logits}, recipe, key, evaluate)

An epoch goes over the batches of a fresh permutation, one compiled step each. All batches have one size: the last
one is filled up with the first images of the same permutation, so that an epoch sees every image at least
once and at most `batch_size - 1` of them twice; where `recipe.steps`, or more images that come beside, ask for more
steps, the same permutation starts again. Leaves that are not trainable (batch statistics) have no
gradient and no optimiser state; the values that the forward pass returns for them take their place.

Distillation follows G. Hinton, O. Vinyals, J. Dean: "Distilling the knowledge in a neural network",
arXiv:1503.02531; the schedule I. Loshchilov, F. Hutter: "SGDR", arXiv:1608.03983, without restarts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.tree_util import keystr

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.augment import flip
from treesurgeon.search.room import memory, size_of
from treesurgeon.search.streaming import Feed, Streamed
from treesurgeon.search.tasks import CLASSIFICATION, Task

Params = Any  # a pytree of arrays
Batch = Mapping[str, Array]
TrainApply = Callable[[Params, Array, Array], tuple[Array, Any]]
LossAndUpdates = Callable[[Params, Batch, Array], tuple[Array, Any]]
Evaluate = Callable[[Params], tuple[Any, Any]]

BETWEEN = 8  # one part in so many of the memory may hold what lies between the two programs of a step


class FinetuneError(TreesurgeonError, ValueError):
    """Data, parameters or a recipe that do not fit each other."""


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        epochs: passes over `train`, at most; over what comes beside it, if that takes more steps.
        batch_size: images a step; all of them where there are fewer.
        steps: of an epoch; None takes as many as see every image. More of them go over `train` again.
        beside: images a step of those that come beside `train`.
        optimizer: `sgd` has Nesterov momentum; in both, weight decay leaves norm scales and biases alone.
        learning_rate: its peak; a linear warm-up leads to it and a cosine to 0.
        weight_decay: for `sgd` added to the gradient, for `adamw` decoupled.
        momentum: of `sgd`.
        warmup: share of all steps.
        clip: norm of all gradients above which they are scaled down to it (R. Pascanu et al., ICML 2013); None leaves
            them. Heads fitted in closed form can have weights that are large.
        monitor: what "best on search" goes by; the other number breaks ties.
        patience: stop after so many epochs without a better one; None runs them all.
    """

    epochs: int = 10
    batch_size: int = 128
    steps: int | None = None
    beside: int = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.01
    weight_decay: float = 5e-4
    momentum: float = 0.9
    warmup: float = 0.05
    clip: float | None = None
    monitor: Literal["error", "loss"] = "error"
    patience: int | None = None


@dataclass(frozen=True)
class Epoch:
    """One line of the learning curve; `train_loss` is the mean over the epoch's steps, None before any."""

    number: int
    train_loss: float | None
    search_loss: float
    search_error: float


@dataclass(frozen=True)
class FitResult:
    """The best parameters seen, and how it went; `best_epoch` 0 means that no step improved on the start."""

    params: Params
    history: tuple[Epoch, ...]
    best_epoch: int

    @property
    def merit(self) -> tuple[float, float]:
        """Error and loss of the best epoch, to compare results by; what is not a number comes last."""
        return _merit(self.history[self.best_epoch], Recipe())


def fit(
    loss_and_updates: LossAndUpdates,
    params: Params,
    trainable: Params,
    data: Mapping[str, Any],
    recipe: Recipe,
    key: Array,
    evaluate: Evaluate,
    *,
    rates: Params | None = None,
    given: Mapping[str, Any] | None = None,
    beside: Mapping[str, Any] | None = None,
) -> FitResult:
    """Minimise a loss on `data`; return the parameters that were best on `search`, the initial ones included.

    Args:
        loss_and_updates: `(params, batch, key) -> (loss, updates)`; updates is None, or a part of the pytree
            (`{"batch_stats": …}`) whose leaves replace those at the same paths.
        params: pytree of arrays, narrow or not.
        trainable: the same pytree with a bool at each leaf.
        data: arrays with one row an image, or what stands for one (`streaming.Streamed`); batches hold the same names.
        recipe: optimiser, schedule, stopping.
        key: drives shuffling and the loss's own randomness.
        evaluate: `params -> (loss, error)` on `search`, in inference mode.
        rates: the same pytree with a number at each leaf, by which its learning rate is multiplied; 1 if None.
        given: what every batch holds besides, as it is: pytrees that have no row for an image.
        beside: other arrays like `data`, with rows of their own; every batch holds `recipe.beside` of these as well.
    """
    parts = [(data, recipe.batch_size), (beside, recipe.beside)] if beside else [(data, recipe.batch_size)]
    rows = [_rows(part) for part, _ in parts]
    sizes = [min(size, count) for (_, size), count in zip(parts, rows, strict=True)]
    steps = recipe.steps or max(-(-count // size) for count, size in zip(rows, sizes, strict=True))
    trained, frozen, join = _divide(jax.tree.map(jnp.asarray, params), trainable)
    _check_real(params, trainable)
    factors = None if rates is None else _divide(rates, trainable)[0]
    optimizer = transformation(recipe, recipe.epochs * steps, _decayed(params, trainable), factors)
    given = dict(given or {})

    def ahead(state: Any, batch: Batch, given: Any, key: Array) -> Any:
        trained, frozen, _ = state

        def loss(trained: Any) -> tuple[Array, Any]:
            return loss_and_updates(join(trained, frozen), {**given, **batch}, key)

        value, back, updates = jax.vjp(loss, trained, has_aux=True)
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise FinetuneError(f"the loss has to be one real number, got {value.dtype}{list(value.shape)}")
        return value, back, updates

    def learn(state: Any, value: Array, back: Any, updates: Any) -> Any:
        trained, frozen, memory = state
        (slopes,) = back(jnp.ones_like(value))
        change, memory = optimizer.update(slopes, memory, trained)
        trained = optax.apply_updates(trained, change)
        frozen = _divide(replace(join(trained, frozen), updates), trainable)[1]
        return trained, frozen, memory

    update = stepping(ahead, learn, memory() / BETWEEN if jax.default_backend() == "cpu" else 0)
    take = jax.jit(lambda arrays, index: {name: array[index] for name, array in arrays.items()})

    @jax.jit
    def schedule(key: Array) -> tuple[list[Array], Array]:
        shuffle, noise = jax.random.split(key)
        keys = [shuffle, jax.random.fold_in(shuffle, 1)]
        orders = [
            jnp.resize(jax.random.permutation(key, count), (steps, size))
            for key, count, size in zip(keys, rows, sizes, strict=False)
        ]
        return orders, jax.random.split(noise, steps)

    def epoch(state: Any, key: Array) -> Any:
        orders, noises = schedule(key)
        feeds = {
            name: Feed(array, np.asarray(order))
            for order, (streamed, _) in zip(orders, held, strict=True)
            for name, array in streamed.items()
        }
        reads = zip(*feeds.values(), strict=True) if feeds else repeat((), steps)
        losses: list[Array] = []
        for *indices, noise, read in zip(*orders, noises, reads, strict=True):
            if feeds and len(losses) > 1:
                losses[-2].block_until_ready()  # no more than two batches are on the device
            batch = dict(zip(feeds, read, strict=True))
            for index, (_, arrays) in zip(indices, held, strict=True):
                batch |= take(arrays, index)
            state, loss = update(state, batch, given, noise)
            losses.append(loss)
        return state, jnp.stack(losses).mean()

    held = [_held(part) for part, _ in parts]  # what is on disk, and what is in memory
    state = trained, frozen, optimizer.init(trained)
    history = [Epoch(0, None, *map(float, evaluate(params)))]
    best, best_epoch = params, 0
    for number in range(1, recipe.epochs + 1):
        now = jax.random.fold_in(key, number)
        state, loss = epoch(state, now)
        current = join(*state[:2])
        history.append(Epoch(number, float(loss), *map(float, evaluate(current))))
        if _merit(history[-1], recipe) < _merit(history[best_epoch], recipe):
            best, best_epoch = current, number
        if recipe.patience is not None and number - best_epoch >= recipe.patience:
            break
    return FitResult(best, tuple(history), best_epoch)


def stepping(
    ahead: Callable[..., tuple[Array, Any, Any]], learn: Callable[..., Any], room: float
) -> Callable[..., tuple[Any, Array]]:
    """`(state, *batch) -> (state, loss)`, a compiled step of fine-tuning; every batch has the shapes of the first.

    XLA's CPU backend computes activations again, and again what they come from, inside of the transpositions that
    gradients of convolutions begin with. Nothing is computed across the border of two programs: for a ResNet-56 they
    are 1.5 to 1.9 times as fast (`benchmarks/stepping.py`). In `lax.scan` these gradients are many times slower still.

    Args:
        ahead: `(state, *batch) -> (loss, back, updates)`, as `jax.vjp` returns them.
        learn: `(state, loss, back, updates) -> state`.
        room: bytes that may lie between the two programs. Where it would be more, or with 0, they are one.
    """

    def joined(ahead: Callable[..., Any], learn: Callable[..., Any]) -> Callable[..., tuple[Any, Array]]:
        def step(state: Any, *batch: Any) -> tuple[Any, Array]:
            value, back, updates = ahead(state, *batch)
            return learn(state, value, back, updates), value

        return step

    whole, first, then = jax.jit(joined(ahead, learn)), jax.jit(ahead), jax.jit(learn)
    apart: bool | None = None

    def update(state: Any, *batch: Any) -> tuple[Any, Array]:
        nonlocal apart
        if apart is None:
            apart = room > 0 and size_of(first.eval_shape(state, *batch)) <= room
        if not apart:
            return whole(state, *batch)
        jax.block_until_ready(state)  # or what lies between would be there for many steps at once
        return joined(first, then)(state, *batch)

    return update


def objective(
    train_apply: TrainApply,
    *,
    task: Task = CLASSIFICATION,
    distill: float = 0.0,
    temperature: float = 4.0,
    augment: Callable[[Array, Array], Array] | None = None,
    teacher: Callable[[Any, Array], Array] | None = None,
    unlabelled: float = 0.5,
    mirror: bool = False,
) -> LossAndUpdates:
    """The task's loss with the labels `y`, mixed with the divergence from the teacher's softened answers.

    Args:
        train_apply: `(params, x, key) -> (logits, updates)`, in training mode.
        task: what labels are for.
        distill: weight of the teacher, 0 to 1; above 0 a batch needs `teacher`, its logits for each image.
        temperature: divides both models' logits in the teacher's term.
        augment: `(key, x) -> x`, what is done to the images of every batch.
        teacher: `(dense, x) -> logits`, where the teacher has to see the augmented images as well; a batch then needs
            `dense`, its parameters, instead of `teacher`. L. Beyer et al.: "Knowledge distillation: a good teacher is
            patient and consistent", CVPR 2022.
        unlabelled: where a batch has `unlabelled` images, and `taught`, the teacher's logits for each of them, they go
            through the model beside the others, and the divergence on them has this weight, 0 to 1; at 1 they alone do.
        mirror: whether they are mirrored at random, which leaves the teacher's answers as they are; `augment` may not.
    """

    def apart(teacher: Array, logits: Array) -> Array:
        return temperature**2 * task.divergence(teacher / temperature, logits / temperature).mean()

    def loss_and_updates(params: Params, batch: Batch, key: Array) -> tuple[Array, Any]:
        x, count = batch["x"], len(batch["x"])
        if augment is not None:
            key, own = jax.random.split(key)
            x = augment(own, x)
        more = batch.get("unlabelled")
        if more is not None and mirror:
            key, own = jax.random.split(key)
            more = flip(own, more)
        if more is not None and unlabelled == 1:  # labels have no say, nor do the images that have them
            logits, updates = train_apply(params, more, key)
            return apart(batch["taught"], logits), updates
        every, updates = train_apply(params, x if more is None else jnp.concatenate([x, more]), key)
        logits = every[:count]
        loss = task.losses(logits, batch["y"]).mean()
        if distill:
            if teacher is not None:
                batch = {**batch, "teacher": teacher(batch["dense"], x)}
            if "teacher" not in batch:
                raise FinetuneError(
                    f"distill = {distill} needs the teacher's logits: pass data['teacher'], [images, classes]"
                )
            loss = (1 - distill) * loss + distill * apart(batch["teacher"], logits)
        if more is not None:
            loss = (1 - unlabelled) * loss + unlabelled * apart(batch["taught"], every[count:])
        return loss, updates

    return loss_and_updates


def transformation(recipe: Recipe, steps: int, decayed: Any, factors: Any = None) -> optax.GradientTransformation:
    """The recipe's optimiser.

    Args:
        recipe: the recipe.
        steps: how many there will be.
        decayed: for each trained leaf, whether weight decay applies.
        factors: for each trained leaf, what its learning rate is multiplied by; 1 if None.
    """
    if recipe.optimizer not in ("sgd", "adamw"):
        raise FinetuneError(f"recipe.optimizer: expected 'sgd' or 'adamw', got {recipe.optimizer!r}")
    rate = optax.warmup_cosine_decay_schedule(
        init_value=recipe.learning_rate / 10,
        peak_value=recipe.learning_rate,
        warmup_steps=min(round(recipe.warmup * steps), max(steps - 1, 0)),
        decay_steps=max(steps, 1),
    )
    if recipe.optimizer == "adamw":
        base = optax.adamw(rate, weight_decay=recipe.weight_decay, mask=decayed)
    else:
        base = optax.chain(
            optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
            optax.sgd(rate, momentum=recipe.momentum, nesterov=True),
        )
    if recipe.clip is not None:
        base = optax.chain(optax.clip_by_global_norm(recipe.clip), base)
    if factors is None or all(factor == 1 for factor in factors):
        return base
    scaled: dict[Any, optax.GradientTransformation] = {str(factor): optax.scale(factor) for factor in factors}
    return optax.chain(base, optax.multi_transform(scaled, [str(factor) for factor in factors]))


def replace(params: Params, updates: Any) -> Params:
    """The pytree with the leaves of `updates`, a part of it, in their places."""
    new = {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(updates)}
    old = {keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    for path, leaf in new.items():
        if path not in old or jnp.shape(old[path]) != jnp.shape(leaf):
            expected = f"shape {list(jnp.shape(old[path]))}" if path in old else "a path of the parameters"
            raise FinetuneError(
                f"updates{path}: expected {expected}, got shape {list(jnp.shape(leaf))}; "
                "train_apply returns logits and the new values of leaves of its parameters"
            )

    def pick(path: Any, leaf: Any) -> Any:
        return jnp.asarray(new[keystr(path)], leaf.dtype) if keystr(path) in new else leaf

    return jax.tree_util.tree_map_with_path(pick, params)


def _divide(params: Params, trainable: Params) -> tuple[list[Any], list[Any], Callable[..., Params]]:
    """Trained leaves, the others, and the function that puts them together again."""
    leaves, structure = jax.tree.flatten(params)
    flags, expected = jax.tree.flatten(trainable)
    if structure != expected:
        raise FinetuneError(f"trainable: expected a bool for each leaf of the parameters, {structure}, got {expected}")
    if not any(flags):
        raise FinetuneError(f"trainable: none of the {len(flags)} leaves is; mark those that may change")

    def join(trained: list[Any], frozen: list[Any]) -> Params:
        a, b = iter(trained), iter(frozen)
        return structure.unflatten([next(a) if flag else next(b) for flag in flags])

    pairs = list(zip(leaves, flags, strict=True))
    return [x for x, flag in pairs if flag], [x for x, flag in pairs if not flag], join


def _check_real(params: Params, trainable: Params) -> None:
    """Refuse to train what has no gradient."""
    for (path, leaf), flag in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(trainable), strict=True):
        if flag and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise FinetuneError(f"trainable{keystr(path)}: {jnp.result_type(leaf)} has no gradient; mark it False")


def _decayed(params: Params, trainable: Params) -> list[bool]:
    """For each trained leaf: is it a kernel? Scales and biases are vectors, or go by those names."""
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.ndim(leaf) > 1 and not keystr(path[-1:], simple=True).lower().endswith(("scale", "bias"))
        ),
        params,
    )
    return _divide(kernels, trainable)[0]


def _merit(epoch: Epoch, recipe: Recipe) -> tuple[float, float]:
    pair = (epoch.search_error, epoch.search_loss)
    first, second = pair if recipe.monitor == "error" else pair[::-1]
    return (np.inf, np.inf) if np.isnan(first) or np.isnan(second) else (first, second)


def _held(data: Mapping[str, Any]) -> tuple[dict[str, Streamed], dict[str, Array]]:
    streamed = {name: array for name, array in data.items() if isinstance(array, Streamed)}
    return streamed, {name: jnp.asarray(array) for name, array in data.items() if name not in streamed}


def _rows(data: Mapping[str, Any]) -> int:
    counts = {name: len(array) for name, array in data.items()}
    if len(set(counts.values())) != 1 or not min(counts.values()):
        raise FinetuneError(f"data: expected arrays with the same number of images, at least 1, got {counts}")
    return next(iter(counts.values()))
