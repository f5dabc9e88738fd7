"""What a configuration refers to: data and model, opened and checked before anything is written."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from treesurgeon import engine, models
from treesurgeon.search.augment import check_augment
from treesurgeon.search.config import AUTO, Config, RunError
from treesurgeon.search.data import ROLES, Roles, Split, open_source, sample_images, split_roles
from treesurgeon.search.exits import Exit
from treesurgeon.search.finetune import FitResult, Recipe
from treesurgeon.search.metrics import pick_metric
from treesurgeon.search.policy import EVERYTHING, Policy, make_policy, overruled
from treesurgeon.search.room import roomy
from treesurgeon.search.selection import limits
from treesurgeon.search.shortening import without_stack
from treesurgeon.search.streaming import Streamed
from treesurgeon.search.subject import Subject, on_device, open_subject
from treesurgeon.search.tasks import CLASSIFICATION, TASKS, Units
from treesurgeon.search.transfer import Labels, NewHead, adapted, match_labels, rescaled, with_new_head

SOURCE_IMAGES = 1000  # at most
CALIBRATION = 256  # images that units are ranked on
BATCH, SMALLEST_BATCH, STEPS_AN_EPOCH = 128, 16, 16  # of fine-tuning, where nothing else is said
STEPS, TAUGHT_STEPS, MOST_EPOCHS = 80, 800, 30  # to labels; where more unlabelled images are learnt from
BESIDE = 32  # unlabelled images a step
HELD = 5  # one unlabelled image in so many, at most, is held out to judge fine-tuning by
DISTILL = 0.5  # weight of the teacher's answers, where nothing else is said


@dataclass(frozen=True, eq=False)
class Setting:
    """What a configuration refers to, opened and checked.

    Attributes:
        config: the configuration; what the data says of task and metric is filled in.
        subject: the dense model; with a new head, where the labels are not the checkpoint's. Numbers are standardised.
        roles: the data; labels that are numbers are standardised.
        mean, std: what images are normalised with.
        budget: absolute limits.
        checkpoint: SHA-256 of the variables as the checkpoint holds them.
        fitted: splits that the checkpoint was fitted on; None where that is unknown.
        head: what replaced the checkpoint's head, if anything did.
        recipe: how finalists are fine-tuned.
        policy: which leaves that changes, and how fast.
        source_images: `[N, H, W, C]`, normalised, like those that the checkpoint was trained on; None where not given.
        units: of labels that are numbers, and of what the saved model returns.
        original: the model as the checkpoint has it, where its head and its statistics were replaced.
        unlabelled: images without a role, like those of `train`; their labels mean nothing.
        taught: what the dense model answers to them, `[N, outputs]`, once that is known; see unlabelled.py.
        teacher: the dense model fine-tuned, once it is, where finalists learn from it or are compared with it; see
            teaching.py.
        answered: what the teacher answers to `train`, `[N, outputs]`; None where it sees the images of each batch.
        policies: other ways to fine-tune, by what they say: configuration, policy and recipe.
        exits: points at which candidates may end, once they are chosen; see exits.py.
    """

    config: Config
    subject: Subject
    roles: Roles
    mean: tuple[float, ...]
    std: tuple[float, ...]
    budget: Mapping[str, float]
    checkpoint: str
    fitted: tuple[str, ...] | None
    recipe: Recipe
    head: NewHead | None = None
    policy: Policy = EVERYTHING
    source_images: np.ndarray | None = None
    units: Units | None = None
    original: Subject | None = None
    unlabelled: Split | None = None
    taught: np.ndarray | None = None
    teacher: FitResult | None = None
    answered: np.ndarray | None = None
    policies: Mapping[str, tuple[Config, Policy, Recipe]] = field(default_factory=dict)
    exits: tuple[Exit, ...] = ()

    @property
    def tries(self) -> dict[str, Setting]:
        """The setting with each way to fine-tune, that of the options as given first."""
        others = {
            name: replace(self, config=config, policy=policy, recipe=recipe, policies={})
            for name, (config, policy, recipe) in self.policies.items()
        }
        return {"": self, **others}

    def calibration(self, count: int) -> np.ndarray:
        """Up to so many images for what needs no labels: those of `train`, then unlabelled ones, `[N, H, W, C]`.

        The last of these: the first ones score candidates, and judge fine-tuning.
        """
        return calibration(self.roles, self.unlabelled, count)

    @property
    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the images of each role, and of those without one."""
        unlabelled = {"unlabelled": self.unlabelled.fingerprint} if self.unlabelled else {}
        return self.roles.fingerprints | unlabelled

    @property
    def labelled(self) -> Recipe:
        """The recipe where no unlabelled images come beside `train`: as many steps, an epoch goes once over `train`."""
        recipe, images = self.recipe, len(self.roles.train)
        steps = math.ceil(images / min(recipe.batch_size, images))
        longer = (recipe.steps or steps) / steps
        patience = recipe.patience and math.ceil(recipe.patience * longer)
        return replace(recipe, steps=None, epochs=math.ceil(recipe.epochs * longer), patience=patience)

    @property
    def distill(self) -> float:
        """Weight of the fine-tuned dense model's answers in the loss of finalists; 0 where there is no fine-tuning."""
        config = self.config
        default = DISTILL if config.baselines or self.tuned_reference else 0.0
        return (default if config.distill is None else config.distill) if self.recipe.epochs else 0.0

    @property
    def tuned_reference(self) -> bool:
        """Whether variants are compared with the dense model as it is fine-tuned, and not as it is."""
        wanted = self.config.reference or ("fine-tuned" if self.head else "dense")
        return wanted == "fine-tuned" and self.recipe.epochs > 0

    @property
    def mirrored(self) -> bool:
        """Whether mirror images mean the same."""
        return self.config.augment != "none"

    @property
    def images(self) -> dict[str, int]:
        """How many images have each role, and how many none."""
        unlabelled = {"unlabelled": len(self.unlabelled)} if self.unlabelled else {}
        return {role: len(getattr(self.roles, role)) for role in ROLES} | unlabelled

    @property
    def scored(self) -> int:
        """How many images score a candidate."""
        more = scarce(self.config, self.roles, self.unlabelled)
        return min(self.config.search_images, len(self.roles.search)) + more

    @property
    def held(self) -> int:
        """How many unlabelled images, the first ones, are held out of fine-tuning to judge it beside `search`."""
        return held_out(self.config, self.roles, self.unlabelled)

    @property
    def judges(self) -> str:
        """What tells the best epoch of a model that learns from unlabelled images, and a shortlist apart, in words."""
        return f"search and {self.held:,} unlabelled images" if self.held else "search"


@dataclass(frozen=True, eq=False)
class Opened:
    """Model and data as they are; `labels` says how the classes of the one relate to those of the other."""

    config: Config
    subject: Subject
    roles: Roles
    labels: Labels
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fitted: tuple[str, ...] | None


def open_parts(config: Config, hold: int | None = None) -> Opened:
    """Open the data and the model, and check that they fit each other but for their labels; see `prepare`."""
    preset = models.get(config.model) if ":" not in config.model else None
    size = config.image_size * 2 if len(config.image_size) == 1 else config.image_size
    wanted = (*(size or preset.input_shape[:2]), preset.input_shape[2]) if preset else size or None
    source = open_source(config.data, config.data_dir or None, wanted, None if config.task == AUTO else config.task)
    metric = pick_metric(config.metric, TASKS[source.task])
    config = replace(config, task=source.task, metric=metric.name)
    if "selectivity" in (config.criterion, *config.criteria) and source.task != CLASSIFICATION.name:
        raise RunError(f"--criterion selectivity is about classes, and these labels are for {source.task}: use another")
    split = next((name for name, size in source.splits.items() if size), None)
    if split is None:
        raise RunError(f"--data {config.data}: no split has an image")
    shape = preset.input_shape if preset else source.read_images(split, np.array([0])).shape[1:]
    subject = open_subject(config.model, config.checkpoint, (*shape, 1) if len(shape) == 2 else shape)
    mean = config.mean or (preset.mean if preset else (0.0,))
    std = config.std or (preset.std if preset else (1.0,))
    fitted = config.fitted if config.fitted_split or preset is None else preset.fitted_splits
    theirs = config.source_labels or (preset.labels if preset else None)
    labels = match_labels(source, subject.num_classes, theirs, config.head)
    roles = split_roles(
        source,
        fitted,
        num_classes=len(labels.names) if labels.replaced else subject.num_classes,
        input_shape=subject.spec.input_shape,
        mean=mean,
        std=std,
        seed=config.seed,
        shares=config.shares,
        caps={"train": config.max_train},
        hold=hold,
    )
    seen = {role: getattr(roles, role).labels for role in ROLES}
    for role in ("train", "test"):
        if not np.ptp(seen[role], axis=0).any():
            alike = "of one class; a classifier needs two" if roles.task == CLASSIFICATION else "labelled alike"
            raise RunError(f"--data {config.data}: all images of {role} are {alike}")
    metric.check(seen, roles.label_names)
    return Opened(config, subject, roles, labels, tuple(mean), tuple(std), fitted)


def prepare(config: Config, hold: int | None = None) -> Setting:
    """Open the data and the model, replace the head where the labels ask for it, and check the budget.

    Args:
        config: the run's.
        hold: bytes of images of a role that are held in memory, see `split_roles`.
    """
    config.check()
    opened = open_parts(config, hold)
    with roomy(opened.subject.variables):
        return _fitted_together(replace(opened, subject=on_device(opened.subject)), hold)


def _fitted_together(opened: Opened, hold: int | None) -> Setting:
    """Model and data, with a head for the data's labels."""
    config, subject, roles, head, units = opened.config, opened.subject, opened.roles, None, None
    like = {"input_shape": subject.spec.input_shape, "mean": opened.mean, "std": opened.std, "seed": config.seed}
    theirs = unlabelled = None
    if config.source_data:
        source = open_source(config.source_data, config.data_dir or None, subject.spec.input_shape, labelled=False)
        theirs = np.asarray(sample_images(source, SOURCE_IMAGES, **like).images)
    if config.unlabelled:
        source = open_source(config.unlabelled, config.data_dir or None, subject.spec.input_shape, labelled=False)
        unlabelled = sample_images(source, config.unlabelled_images, **like, roles=roles, hold=hold)
        unlabelled = replace(unlabelled, task=roles.task)
    checkpoint = fingerprint(subject.variables)
    if config.task == "regression":
        units = Units.of(roles.train.labels)
        roles = roles.map(lambda split: replace(split, labels=units.standardised(split.labels)))
    if opened.labels.replaced:  # first the statistics, as every variant will have them: the head is fitted to these
        images = calibration(roles, unlabelled, config.statistics_images)
        subject, made = adapted(subject, images), None
        if config.head == AUTO and not opened.labels.carried:
            made = without_stack(subject, opened.labels, roles, images, config.head_widths, config.seed)
        subject, head = made or with_new_head(subject, opened.labels, roles)
    elif units:
        subject = rescaled(subject, units.inverse())
    dense = engine.cost(subject.graph, engine.Plan())._asdict()
    budget = limits(config.budget, dense)
    learnt = len(unlabelled or ()) - held_out(config, roles, unlabelled)

    def ways(config: Config) -> tuple[Config, Policy, Recipe]:
        """How a configuration fine-tunes; what follows from the data is filled in."""
        check_augment(config.augment, subject.spec.input_shape)
        recipe = make_recipe(config, len(roles.train), learnt)
        config = replace(config, epochs=recipe.epochs, batch_size=recipe.batch_size)
        return config, make_policy(subject, config.freeze, config.layer_decay), recipe

    others = {name: ways(overruled(config, name)) for name in config.policies}
    config, policy, recipe = ways(config)
    parts = roles, opened.mean, opened.std, budget, checkpoint, opened.fitted, recipe
    original = opened.subject if head else None
    return Setting(config, subject, *parts, head, policy, theirs, units, original, unlabelled, policies=others)


def calibration(roles: Roles, unlabelled: Split | None, count: int) -> np.ndarray:
    """See `Setting.calibration`."""
    images = np.asarray(roles.train.images[:count])
    more = count - len(images)
    return np.concatenate([images, unlabelled.images[-more:]]) if unlabelled and more else images


def scarce(config: Config, roles: Roles, unlabelled: Split | None) -> int:
    """How many unlabelled images stand in for those of `search` that are wanted and not there."""
    if not unlabelled or isinstance(roles.search.images, Streamed):  # many images, then
        return 0
    return min(len(unlabelled), max(0, config.search_images - len(roles.search)))


def held_out(config: Config, roles: Roles, unlabelled: Split | None) -> int:
    """See `Setting.held`."""
    return min(scarce(config, roles, unlabelled), len(unlabelled or ()) // HELD)


def make_recipe(config: Config, images: int, unlabelled: int = 0) -> Recipe:
    """How finalists are fine-tuned on so many images: few of them take smaller batches and more epochs.

    Every step takes a batch of unlabelled images besides; an epoch goes once over the larger part of both. Answers of
    another model are learnt for longer than labels, without overfitting to them: L. Beyer et al.: "Knowledge
    distillation: a good teacher is patient and consistent", CVPR 2022.
    """
    size = config.batch_size or min(BATCH, max(SMALLEST_BATCH, 1 << (images // STEPS_AN_EPOCH).bit_length() >> 1))
    steps = max(math.ceil(images / size), math.ceil(unlabelled / BESIDE))
    wanted = TAUGHT_STEPS if unlabelled > images else STEPS
    epochs = min(MOST_EPOCHS, max(2, math.ceil(wanted / steps)))
    return Recipe(
        steps=steps,
        beside=BESIDE,
        epochs=epochs if config.epochs is None else config.epochs,
        batch_size=size,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        clip=config.clip or None,
        patience=config.patience,
    )


def fingerprint(tree: Any) -> str:
    """SHA-256 over the leaves of a pytree, names and shapes included."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
