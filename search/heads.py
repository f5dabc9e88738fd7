"""Linear heads on features, fitted without a learning rate: ridge regression and logistic regression.

    head = ridge(x, y_onehot)                  # λ by generalised cross-validation
    head = logistic(x, y, classes, l2=1e-3)    # damped Newton steps, or L-BFGS where there is much to fit
    head = best_head(task, x, y, outputs)      # logistic for classes and labels, ridge for numbers
    error = (head(x_new).argmax(-1) != y_new).mean()

Features are standardised inside, so that one penalty suits them all and float32 is enough; the heads that come out take
features as they are.

G. Golub, M. Heath, G. Wahba: "Generalized cross-validation as a method for choosing a good ridge parameter",
Technometrics 1979. Ridge regression on one-hot targets as a classifier: R. Rifkin, G. Yeo, T. Poggio: "Regularized
least-squares classification", 2003.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from treesurgeon.engine.errors import TreesurgeonError
from treesurgeon.search.tasks import CLASSIFICATION, Task

LAMBDAS = tuple(float(v) for v in np.geomspace(1e-4, 1e2, 13))  # for features of variance 1, of a mean over examples
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
NEWTON = 200  # unknowns at most for Newton's method: the Hessian has so many rows
STEPS = 60
MEMORY = 400  # steps of L-BFGS


class HeadError(TreesurgeonError, ValueError):
    """Features and targets that no head can be fitted to."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LinearHead:
    """`x @ kernel + bias`: kernel float[F, K], bias float[K]; `penalty` is the λ that it was fitted with."""

    kernel: Array
    bias: Array
    penalty: Array

    def __call__(self, x: Any) -> Array:
        """Scores `[N, K]` of features `[N, F]`."""
        return jnp.asarray(x) @ self.kernel + self.bias


def ridge(x: Any, y: Any, lambdas: Sequence[float] = LAMBDAS, held_out: tuple[Any, Any] | None = None) -> LinearHead:
    """The least squares head, |x W + b - y|² / N + λ |W|² over standardised features, at the best λ.

    Args:
        x: features `[N, F]`.
        y: targets `[N, K]`: one-hot classes, or numbers.
        lambdas: the λ to choose from.
        held_out: features and targets of the same kind to choose on by mean squared error; if None, λ is chosen by
            generalised cross-validation.

    Raises:
        HeadError: shapes that do not fit, or features that are not finite.
    """
    x, y = checked(x, y, 2)
    if len(x) < 2:
        raise HeadError("a ridge head needs two examples at least, got one")
    if held_out is not None:
        held_out = checked(*held_out, 2)
    return _ridge(x, y, jnp.asarray(lambdas, jnp.float32), held_out)


@jax.jit
def _ridge(x: Array, y: Array, lambdas: Array, held_out: Any) -> LinearHead:
    count, rank = len(x), min(len(x) - 1, x.shape[1])
    z, centre, scale = standard(x)
    mean = y.mean(0)
    energies, basis = jnp.linalg.eigh(z.T @ z / count)  # ascending
    energies, basis = jnp.maximum(energies[-rank:], 0), basis[:, -rank:]
    turned = basis.T @ (z.T @ (y - mean)) / count

    def fit(penalty: Array) -> Array:
        return basis @ (turned / (energies + penalty)[:, None])

    def cross_validated(penalty: Array) -> Array:
        rest = ((y - mean - z @ fit(penalty)) ** 2).sum(1).mean()
        left = (count - 1 - rank + (penalty / (energies + penalty)).sum()) / count  # 1 - trace of the hat matrix / N
        return rest / left**2

    def held(penalty: Array) -> Array:
        seen, wanted = held_out
        return ((wanted - mean - (seen - centre) / scale @ fit(penalty)) ** 2).sum(1).mean()

    merits = jax.lax.map(cross_validated if held_out is None else held, lambdas)
    best = lambdas[jnp.argmin(jnp.where(jnp.isnan(merits), jnp.inf, merits))]
    return _plain(fit(best), mean, centre, scale, best)


def logistic(
    x: Any,
    y: Any,
    classes: int,
    l2: float = 1e-3,
    *,
    known: Any = None,
    free: Sequence[int] | None = None,
    weights: Any = None,
) -> LinearHead:
    """The multinomial logistic head: mean cross-entropy + l2 / 2 |W|² over standardised features, at its minimum.

    Args:
        x: features `[N, F]`.
        y: classes `[N]`, 0 to `classes - 1`.
        classes: how many there are.
        l2: the penalty; above 0.
        known: logits `[N, classes]` of classes that have a head already; what stands at the free ones does not matter.
        free: the classes that are fitted, in order; by default all. The head has a column for each.
        weights: how much each example counts, `[N]`; by default all the same.

    Raises:
        HeadError: shapes or labels that do not fit, features that are not finite, or a penalty of 0.
    """
    x, y = checked(x, y, 1)
    if not l2 > 0:
        raise HeadError(f"l2 = {l2}: expected a penalty above 0, without which separable classes have no minimum")
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise HeadError(f"y: expected classes 0 to {classes - 1}, got {int(y.min())} to {int(y.max())}")
    columns = tuple(range(classes)) if free is None else tuple(free)
    known = jnp.zeros((len(x), classes)) if known is None else jnp.asarray(known, jnp.float32)
    if known.shape != (len(x), classes):
        raise HeadError(f"known: expected logits {(len(x), classes)}, got shape {known.shape}")
    weights = jnp.ones(len(x)) if weights is None else jnp.asarray(weights, jnp.float32)
    newton = (x.shape[1] + 1) * len(columns) <= NEWTON
    return _logistic(x, y, known, weights / weights.sum(), jnp.asarray(l2, jnp.float32), columns, newton)


@partial(jax.jit, static_argnums=(5, 6))
def _logistic(
    x: Array, y: Array, known: Array, share: Array, l2: Array, columns: tuple[int, ...], newton: bool
) -> LinearHead:
    z, centre, scale = standard(x)
    z = jnp.concatenate([z, jnp.ones((len(z), 1))], 1)
    at = np.array(columns, int)
    decay = jnp.ones((z.shape[1], 1)).at[-1].set(0) * l2  # not the bias

    def logits(w: Array) -> Array:
        return known.at[:, at].set(z @ w)

    def loss(w: Array) -> Array:
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits(w), y) @ share
        return entropy + (decay * w**2).sum() / 2

    start = jnp.zeros((z.shape[1], len(columns)))
    if newton:
        w = _newton(loss, partial(_hessian, z, share, decay, lambda w: jax.nn.softmax(logits(w))[:, at]), start)
    else:
        w = _lbfgs(loss, start)
    return _plain(w[:-1], w[-1], centre, scale, l2)


def _hessian(z: Array, share: Array, decay: Array, probabilities: Callable[[Array], Array], w: Array) -> Array:
    """The second derivatives of the logistic loss, `[F K, F K]`."""
    p = probabilities(w)
    size = z.shape[1] * p.shape[1]
    outer = jnp.einsum("nf,nk->nfk", z, p).reshape(len(z), size)
    between = outer.T @ (share[:, None] * outer)
    own = jax.vmap(lambda weight: (z * (share * weight)[:, None]).T @ z, 1)(p)  # [K, F, F]
    eye = jnp.eye(p.shape[1])
    within = jnp.einsum("kfg,kl->fkgl", own, eye).reshape(size, size)
    penalty = jnp.broadcast_to(decay, w.shape).reshape(-1)
    return within - between + jnp.diag(penalty)


def _newton(loss: Callable[[Array], Array], hessian: Callable[[Array], Array], start: Array) -> Array:
    """Newton's method, damped as much as it takes for the loss to fall (Levenberg and Marquardt)."""
    slope = jax.grad(loss)

    def go_on(state: Any) -> Array:
        _, _, step, damping, steepest = state
        return (step < STEPS) & (damping < 1e4) & (steepest > 1e-6)

    def turn(state: Any) -> Any:
        w, now, step, damping, _ = state
        g, h = slope(w).reshape(-1), hessian(w)
        h = h + damping * jnp.trace(h) / len(h) * jnp.eye(len(h))
        new = w - jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(h), g).reshape(w.shape)
        then = loss(new)  # NaN where rounding made the Hessian indefinite: more damping
        better = then < now
        damping = jnp.where(better, jnp.maximum(damping / 10, 1e-7), damping * 10)
        return jnp.where(better, new, w), jnp.where(better, then, now), step + 1, damping, jnp.abs(g).max()

    first = (start, loss(start), 0, jnp.float32(1e-6), jnp.float32(jnp.inf))
    return jax.lax.while_loop(go_on, turn, first)[0]


def _lbfgs(loss: Callable[[Array], Array], start: Array) -> Array:
    """L-BFGS until the gradient is small or the steps are spent; the best point seen."""
    optimizer = optax.lbfgs()
    value_and_slope = optax.value_and_grad_from_state(loss)

    def go_on(state: Any) -> Array:
        _, _, step, slope, _ = state
        return (step < MEMORY) & (slope > 1e-5)

    def turn(state: Any) -> Any:
        w, memory, step, _, (best, least) = state
        value, g = value_and_slope(w, state=memory)
        best, least = jnp.where(value < least, w, best), jnp.minimum(value, least)
        change, memory = optimizer.update(g, memory, w, value=value, grad=g, value_fn=loss)
        return jnp.asarray(w + change), memory, step + 1, jnp.abs(jnp.asarray(g)).max(), (best, least)

    first = (start, optimizer.init(start), 0, jnp.float32(jnp.inf), (start, jnp.float32(jnp.inf)))
    w, _, _, _, (best, least) = jax.lax.while_loop(go_on, turn, first)
    return jnp.where(loss(w) <= least, w, best)


def best_logistic(
    x: Any,
    y: Any,
    classes: int,
    penalties: Sequence[float] = PENALTIES,
    *,
    known: Any = None,
    free: Sequence[int] | None = None,
) -> LinearHead:
    """`logistic` with the penalty that is best, by cross-entropy, on a fifth of the examples, then fitted to all.

    Their order must have no meaning: the first ones are held out.

    Args:
        x, y, classes, known, free: as `logistic` takes them.
        penalties: to choose from.
    """
    x, y = checked(x, y, 1)
    known = np.zeros((len(x), classes), np.float32) if known is None else np.asarray(known, np.float32)
    held = max(len(x) // 5, 1)
    columns = np.arange(classes) if free is None else np.asarray(free, int)
    losses = []
    rest = np.arange(len(x)) >= held
    for l2 in penalties if len(penalties) > 1 and rest.any() else ():
        head = logistic(x, y, classes, l2, known=known, free=free, weights=rest)
        losses.append(float(_held_loss(head, x[:held], y[:held], known[:held], columns)))
    best = penalties[int(np.nanargmin(losses))] if losses else penalties[0]
    return logistic(x, y, classes, best, known=known, free=free)


@jax.jit
def _held_loss(head: LinearHead, x: Array, y: Array, known: Array, columns: Array) -> Array:
    logits = known.at[:, columns].set(head(x))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def best_binary(x: Any, y: Any, penalties: Sequence[float] = PENALTIES) -> LinearHead:
    """A logistic head for each of several labels, all with the penalty that is best as `best_logistic` finds it.

    Args:
        x: features `[N, F]`.
        y: labels `[N, K]`, 0 or 1.
        penalties: to choose from.
    """
    x, y = checked(x, y, 2)
    held = max(len(x) // 5, 1)
    rest = jnp.arange(len(x)) >= held
    losses = []
    for l2 in penalties if len(penalties) > 1 and len(x) > held else ():
        head = _binary(x, y, rest / rest.sum(), jnp.float32(l2))
        losses.append(float(optax.sigmoid_binary_cross_entropy(head(x[:held]), y[:held]).mean()))
    best = penalties[int(np.nanargmin(losses))] if losses else penalties[0]
    return _binary(x, y, jnp.full(len(x), 1 / len(x)), jnp.float32(best))


@jax.jit
def _binary(x: Array, y: Array, share: Array, l2: Array) -> LinearHead:
    """Each label is a class beside one whose logit is 0."""
    newton = x.shape[1] + 1 <= NEWTON
    known = jnp.zeros((len(x), 2))

    def one(label: Array) -> LinearHead:
        return _logistic(x, label.astype(jnp.int32), known, share, l2, (1,), newton)

    each = jax.lax.map(one, y.T)
    return LinearHead(each.kernel[:, :, 0].T, each.bias[:, 0], l2)


def best_head(
    task: Task, x: Any, y: Any, outputs: int, *, known: Any = None, free: Sequence[int] | None = None
) -> LinearHead:
    """The linear head for a task: logistic for classes (`known`, `free`: see `logistic`) and labels, else ridge."""
    if task == CLASSIFICATION:
        return best_logistic(x, y, outputs, known=known, free=free)
    return best_binary(x, y) if task.name == "multilabel" else ridge(x, y)


def quick_head(task: Task, x: Any, y: Any, outputs: int) -> LinearHead:
    """A least squares head, whatever the task: to one-hot classes, labels of -1 and 1, or numbers."""
    if task == CLASSIFICATION:
        return ridge(x, np.eye(outputs, dtype=np.float32)[y])
    return ridge(x, 2 * y - 1 if task.name == "multilabel" else y)


@jax.jit
def standard(x: Array) -> tuple[Array, Array, Array]:
    """Features of mean 0 and variance 1, the means and the deviations; what never changes becomes 0."""
    centre = x.mean(0)
    deviation = jnp.sqrt(((x - centre) ** 2).mean(0))
    still = deviation <= 1e-6 * jnp.maximum(jnp.abs(centre), 1e-30) + 1e-30
    scale = jnp.where(still, 1, deviation)
    return jnp.where(still, 0, x - centre) / scale, centre, jnp.where(still, jnp.inf, scale)


def _plain(w: Array, bias: Array, centre: Array, scale: Array, penalty: Array) -> LinearHead:
    """The head that takes features as they are."""
    kernel = w / scale[:, None]
    return LinearHead(kernel, bias - centre @ kernel, penalty)


def checked(x: Any, y: Any, rank: int) -> tuple[Array, Array]:
    """Features and targets (`rank` 2) or classes (1) as float32 and int32 arrays, or a `HeadError`."""
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32 if rank == 2 else jnp.int32)
    if x.ndim != 2 or y.ndim != rank or len(x) != len(y) or not len(x):
        raise HeadError(
            f"expected features [N, F] and targets {'[N, K]' if rank == 2 else '[N]'} of as many examples, got "
            f"{x.shape} and {y.shape}"
        )
    if not bool(jnp.isfinite(x).all()):
        raise HeadError(
            "the features hold NaN or infinity: the checkpoint does not suit these images; look at --mean and --std"
        )
    return x, y
