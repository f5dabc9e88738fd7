"""The configuration of a search: what `treesurgeon search` takes, and what `config.json` holds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from treesurgeon.engine import CRITERIA, TreesurgeonError
from treesurgeon.search.data import SHARES
from treesurgeon.search.metrics import METRICS, Metric, MetricName
from treesurgeon.search.tasks import TaskName

Criterion = Literal[
    "l1",
    "l2",
    "fpgm",
    "lamp",
    "norm_scale",
    "taylor",
    "fisher",
    "activation",
    "apoz",
    "reconstruction",
    "selectivity",
    "random",
]
AugmentName = Literal["none", "flip", "flip-crop"]
OptimizerName = Literal["sgd", "adamw"]
AUTO = "auto"


class RunError(TreesurgeonError, ValueError):
    """A run that cannot start, go on, or be read."""


@dataclass(frozen=True)
class Config:
    """Search the smallest good variant of a pretrained Flax model.

    Run the same command again to go on where a killed run stopped.
    """

    model: str
    """A model of the zoo (resnet56, vgg16, digits_cnn, …), or package.module:factory that returns a linen module."""
    checkpoint: str
    """An Orbax directory, or a .safetensors, .msgpack or .pth file (torchvision's and timm's names are read for the
    zoo's models)."""
    data: str
    """digits, tfds:NAME (prepared), tfds-dir:PATH, npz:PATH (x_train, y_train, x_test, y_test, label_names), or
    folder:PATH (PATH/CLASS/*.png or PATH/SPLIT/CLASS/*.png)."""
    out: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """The run's directory. Default: runs/MODEL."""

    macs: float | None = None
    """Budget on multiply-accumulates: a share of the dense model's (up to 1), or a number for one image."""
    params: float | None = None
    """Budget on trainable parameters: a share of the dense model's (up to 1), or a number."""
    activation_bytes: float | None = None
    """Budget on the bytes that convolutions and dense layers write: a share of the dense model's, or for one image."""
    latency: float | None = None
    """Budget on the milliseconds that a batch takes on this device: a share of the dense model's (up to 1), or a
    number. Finalists are timed."""
    memory: float | None = None
    """Budget on the peak bytes of the compiled model: a share of the dense model's (up to 1), or a number."""
    latency_batch: int = 32
    """Images in the batch that is timed."""
    task: TaskName | Literal["auto"] = AUTO
    """What labels are for: classification (one class an image), multilabel (rows of 0 and 1), or regression
    (floating-point numbers; whole ones only if it is said here). Default: by the labels."""
    metric: MetricName | Literal["auto"] = AUTO
    """What models are judged by: accuracy, balanced_accuracy, f1 (macro), auroc (one class against the rest, macro), or
    cross_entropy; for several labels label_accuracy, f1, auroc or cross_entropy; for numbers r2. Errors are 1 less the
    metric; cross-entropy is one itself, in nats. Default: the first of these."""
    epsilon: float = 0.01
    """By how much the selected variant's error may exceed the dense model's: 0.01 is a point, or nats. `certify` has to
    show it; where nothing is certified, the error in cross-validation, or on `search`, goes by it."""
    eta: float = 0.02
    """By how much its gap (that error less the error on `train`) may exceed the dense model's, likewise."""
    gap_max: float | None = None
    """How large its gap may be, whatever the dense model's is, likewise; then `eta` says nothing."""
    delta: float = 0.05
    """Chance at most that the certificate makes a false claim."""
    reference: Literal["dense", "fine-tuned"] | None = None
    """The dense model that variants are compared with: as it is, or fine-tuned to the labels as they are. Default: as
    it is; fine-tuned where the labels ask for a new head, with which nobody would use it as it is."""
    certify: bool = True
    """Whether the finalists are tested on `certify`, which can be opened once; otherwise it stays closed."""
    cv_folds: int = 5
    """Folds of the cross-validation on `search` and `certify` that takes the certificate's place where `certify` has
    too few images for epsilon."""
    cv_repeats: int = 4
    """How often it is repeated, with other folds."""

    fitted_split: tuple[str, ...] = ()
    """Splits that the checkpoint was trained on (`none`: it has seen none of this data). Default: the zoo's."""
    mean: tuple[float, ...] = ()
    """Subtracted from images in 0 to 1, one number or one a channel. Default: the zoo's, else 0."""
    std: tuple[float, ...] = ()
    """Divides images, likewise. Default: the zoo's, else 1."""
    image_size: tuple[int, ...] = ()
    """Side, or height and width, to which the images of folder: are scaled and cropped. Default: what the zoo's model
    takes, else as they are."""
    head: Literal["auto", "keep", "fit"] = "auto"
    """Labels that are not the checkpoint's: by default the head is replaced where their number differs, or their names
    where both are known, rows of classes that both name are carried over, and the others fitted to `train`. Where both
    name none, the dense layers after the last pool go as well, and the new head has a hidden layer (see --head-widths)
    where `search` says so. `keep` takes the labels for the checkpoint's, `fit` fits every row, of the last layer
    alone."""
    source_labels: tuple[str, ...] = ()
    """Names of the checkpoint's classes, in their order. Default: the zoo's."""
    source_data: str = ""
    """Images like those that the checkpoint was trained on, if possible not the very same, as for --data: a two-sample
    test then says whether the inputs are shifted. By default the checkpoint's norm statistics are compared."""
    unlabelled: str = ""
    """More images like those that the model is meant for, as for --data: labels are not looked at. Norm statistics and
    kernels are fitted to them as to those of `train`, and fine-tuning learns the dense model's answers to them. Where
    `search` has fewer images than --search-images, candidates are scored by these answers as well, and up to a fifth of
    the images is held out of fine-tuning, to tell its best epoch. Images that have a role already are left out, if they
    are the same pixel for pixel. An npz may hold `x` alone, a folder images at any depth."""
    unlabelled_images: int = 5000
    """Of these, how many are used at most."""
    unlabelled_weight: float | None = None
    """Weight in the fine-tuning loss of the dense model's answers to them, 0 to 1. Default: their share of the images,
    so that every image counts alike; 1 where they are at least ten times as many as those of `train` and the dense
    model is fine-tuned to the labels (see --distill): finalists learn from its answers alone then."""
    shares: tuple[float, float, float, float] = SHARES
    """How the images are dealt out to `train`, `search`, `certify` and `test`. Where --fitted-split gives `train` its
    own, the others share the rest likewise."""
    max_train: int = 5000
    """Images of `train` that are used, at most."""
    data_dir: str = ""
    """Where TFDS datasets are. Default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""

    population: int = 16
    """Candidates a generation."""
    generations: int = 12
    """Generations."""
    search_images: int = 512
    """Images of `search`, and of --unlabelled where these are fewer, that score a candidate; the finalists are measured
    on all of `search` and nothing else."""
    calibration_images: int = 128
    """Images of `train`, then of --unlabelled, to which each candidate's norm statistics and kernels are fitted; 0
    keeps the checkpoint's."""
    reconstruct: Literal["kernels", "maps", "none"] = "maps"
    """How candidates make up for removed units, by least squares: with kept units in their place, so that a population
    shares its kernels, or each with kernels of its own, as finalists do (slower, and nearer to what they will be)."""
    refit_images: int = 2048
    """Images of `train`, then of --unlabelled, to which the finalists' kernels and norm statistics are fitted before
    any fine-tuning."""
    chunk: int | None = None
    """Candidates that are evaluated as one batch. Default: by the memory there is, 1 for `kernels`."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """In what candidates are scored; finalists are always measured in the checkpoint's own precision."""
    criterion: Criterion = "l2"
    """What ranks the units of a group."""
    criteria: tuple[str, ...] = ()
    """Several to choose from, for each group: the one whose better half of the units, alone, moves the answers least.
    Default: `criterion` for all groups."""
    protect: tuple[str, ...] = ("first-stage",)
    """Groups and blocks that stay as they are, by name; `first-stage` is worked out, `none` protects nothing."""
    multiple: int | None = None
    """Round widths to multiples of this. Default: by the size of the group."""

    finalists: int = 3
    """Variants that are cut, fine-tuned and compared."""
    shortlist: int | None = None
    """With a budget: candidates that are cut and refitted first; those with the lowest loss on `search` then become the
    finalists, after the better half of them, if that is more, has been fine-tuned for an epoch. Default: as many as
    finalists."""
    truncations: int | None = None
    """Points at which candidates may end, by a new head, where a linear one on the features does as well as at full
    depth: a gene of the search. The model up to each, with all that it has, is a finalist besides, if it is within the
    budget. Default: 2 where the labels ask for a new head, else none."""
    head_widths: tuple[int, ...] = (16, 64)
    """Widths of a hidden layer that a new head may have, in a truncated model or where dense layers go; one that is
    better than a linear head on `search`, beyond what chance explains, is taken. 0: always a linear head."""
    epochs: int | None = None
    """Epochs of fine-tuning for each finalist; the one that is best on `search` is kept (and on unlabelled images that
    are held out, see --unlabelled). 0 only re-estimates statistics. Default: 2, and where `train` is small as many as
    make 80 steps, but no more than 30. With --unlabelled an epoch goes over the larger of both; where there are
    more of these it is 800 steps instead of 80, and baselines that have labels alone take as many."""
    learning_rate: float = 0.01
    """Peak learning rate of fine-tuning, which a warm-up leads to and a cosine to 0."""
    optimizer: OptimizerName = "sgd"
    """Of fine-tuning: SGD with Nesterov momentum, or AdamW, which wants a lower --learning-rate."""
    patience: int | None = None
    """Stop fine-tuning a model after so many epochs without a better one (after as many steps, where --unlabelled makes
    epochs longer). Default: run them all."""
    batch_size: int | None = None
    """Images a step of fine-tuning. Default: 128, and where `train` is small about a sixteenth of it, at least 16."""
    clip: float = 5.0
    """Norm of the gradients of a step above which they are scaled down to it; 0 leaves them."""
    weight_decay: float = 5e-4
    """Weight decay of fine-tuning; norm scales and biases are left alone."""
    layer_decay: float = 1.0
    """Learning rates by depth: each level (what comes before the first block, every block, the head, as data flow
    through them) learns at so many times the rate of the next. 1: all alike."""
    freeze: tuple[str, ...] = ()
    """What fine-tuning leaves as it is, running statistics included: the first so many levels, or prefixes of
    parameter paths, such as `layer1_0`."""
    augment: AugmentName = "none"
    """What is done to the images of a batch: `flip` mirrors them at random, `flip-crop` moves them as well."""
    policies: tuple[str, ...] = ()
    """Other ways to fine-tune, such as `freeze=4` or `layer-decay=0.7,weight-decay=0.01`: each finalist, and the dense
    model beside them, is fine-tuned by each of these as well as by the options as given, and kept as it is best on
    `search`. Of freeze (several with +), layer-decay, learning-rate, weight-decay, clip, optimizer, patience and
    augment."""
    distill: float | None = None
    """Weight in the fine-tuning loss, 0 to 1, of what the dense model answers, once it is fine-tuned itself: the
    baseline is trained before the finalists then, and teaches them. Default: 0.5 where baselines are trained or
    it is the --reference, else 0."""
    baselines: bool = True
    """Whether to train what the selected variant has to beat, on the same data for as many steps: the dense model
    fine-tuned (with --unlabelled once more, on these as well), dense and selected from scratch, and a linear head on
    the dense model's features. They are reported beside it, and no choice goes by them but for --reference. Without
    epochs none are."""
    pictures: bool = True
    """Whether the report shows images of `search` that the selected model's most selective units answer to."""
    formats: bool = True
    """Whether the selected model is written in every format of `treesurgeon export` and timed beside the dense one, for
    the card; the files are not kept."""
    scratch_epochs: int | None = None
    """Epochs of those from scratch. Default: as many as the finalists'."""
    scratch_learning_rate: float = 0.1
    """Their peak learning rate."""
    seed: int = 0
    """Seed of everything: the split, the search, fine-tuning."""

    @classmethod
    def like(cls, options: Any, **changes: Any) -> Config:
        """With what the options of another command have in common with it, and these changes."""
        ours = {field.name for field in dataclasses.fields(cls)}
        theirs = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
        return cls(**{name: value for name, value in theirs.items() if name in ours} | changes)

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return Path(self.out or f"runs/{self.model.replace(':', '.')}").absolute()

    @property
    def budget(self) -> dict[str, float]:
        """The budgets that were given on what follows exactly from a variant's widths and blocks."""
        return {k: v for k in ("macs", "params", "activation_bytes") if (v := getattr(self, k)) is not None}

    @property
    def measured(self) -> dict[str, float]:
        """The budgets that were given on what is measured."""
        return {k: v for k in ("latency", "memory") if (v := getattr(self, k)) is not None}

    @property
    def judged_by(self) -> Metric:
        """The metric, which is known once the data was opened (`metrics.pick_metric`)."""
        return METRICS[self.metric]

    @property
    def fitted(self) -> tuple[str, ...] | None:
        """The declared splits: None where nothing was said, () where the checkpoint has seen none."""
        return () if self.fitted_split == ("none",) else self.fitted_split or None

    @property
    def statistics_images(self) -> int:
        """Images of `train`, then unlabelled, that norm statistics are estimated from; 0 keeps the checkpoint's."""
        return self.refit_images if self.calibration_images else 0

    def check(self) -> None:
        """Refuse values out of range."""
        least = {
            "population": 2, "generations": 1, "search_images": 1, "calibration_images": 0, "chunk": 1,
            "finalists": 1, "refit_images": 1, "epochs": 0, "batch_size": 1, "max_train": 1, "seed": 0,
            "unlabelled_images": 1, "latency_batch": 1, "cv_folds": 2, "cv_repeats": 1,
            "epsilon": 0, "weight_decay": 0, "clip": 0, "scratch_epochs": 1, "truncations": 0, "patience": 1,
        }  # fmt: skip
        for name, bound in least.items():
            if getattr(self, name) is not None and not getattr(self, name) >= bound:
                raise RunError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {bound}")
        if len(self.image_size) > 2 or any(side < 1 for side in self.image_size):
            raise RunError("--image-size takes a side, or a height and a width, of at least 1")
        shares = (self.distill or 0, self.unlabelled_weight or 0)
        if not self.learning_rate > 0 or not all(0 <= share <= 1 for share in shares):
            raise RunError("--learning-rate must be above 0, --distill and --unlabelled-weight from 0 to 1")
        if min(self.head_widths, default=0) < 0:
            raise RunError("--head-widths takes numbers of units, or 0 for a linear head")
        if not self.scratch_learning_rate > 0 or not 0 < self.layer_decay <= 1:
            raise RunError("--scratch-learning-rate must be above 0, and --layer-decay above 0 and at most 1")
        for option, names in (("criterion", (self.criterion,)), ("criteria", self.criteria)):
            if unknown := [name for name in names if name not in CRITERIA]:
                raise RunError(f"--{option} {unknown[0]}: expected one of {', '.join(CRITERIA)}")
        if len(set(self.criteria)) < len(self.criteria):
            raise RunError(f"--criteria {' '.join(self.criteria)}: one of them is named twice")
        if self.unlabelled_weight is not None and not self.unlabelled:
            raise RunError("--unlabelled-weight is about the images of --unlabelled, which is not given")
        if self.metric not in (AUTO, *METRICS):
            raise RunError(f"--metric {self.metric}: expected one of {', '.join(METRICS)}")
        if not self.eta > 0:
            raise RunError(f"--eta {self.eta}: expected more than 0: no test shows that two gaps are the same")
        if self.reference == "fine-tuned" and self.epochs == 0:
            raise RunError("--reference fine-tuned: with --epochs 0 nothing is fine-tuned")
        if self.gap_max is not None and not self.gap_max > 0:
            raise RunError(f"--gap-max {self.gap_max}: expected more than 0: no test shows that there is no gap at all")
        if not 0 < self.delta < 1:
            raise RunError(f"--delta {self.delta}: expected a number between 0 and 1, such as 0.05")
        for name, value in (self.budget | self.measured).items():
            if not value > 0:
                raise RunError(
                    f"--{name.replace('_', '-')} {value}: expected a share of the dense model's (up to 1) or a number "
                    f"above 1"
                )


def identity(config: Config, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two runs the same run: the configuration without its place, and what it was applied to."""
    entries = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "data_dir")}
    return json.loads(json.dumps({**entries, **extra}))


def claim(config: Config, content: Mapping[str, Any]) -> None:
    """Make the run's directory with its `config.json`, or accept the one that is there if it is the same run's."""
    path = config.directory / "config.json"
    if path.exists():
        try:
            there = dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise RunError(
                f"{path} cannot be read ({error}): move the directory away, or choose another --out"
            ) from error
        differ = sorted(k for k in there.keys() | content.keys() if there.get(k) != content.get(k))
        if differ:
            rows = [f"  {k}: there {there.get(k)!r}, now {content.get(k)!r}" for k in differ[:8]]
            raise RunError(
                f"{config.directory} holds a run of another configuration; choose another --out, or move it away\n"
                + "\n".join(rows)
            )
        return
    beside = path.with_name(".config.json")  # a kill may leave it
    if config.directory.is_dir() and set(config.directory.iterdir()) - {beside}:
        raise RunError(f"{config.directory} is not empty and holds no run: choose another --out")
    config.directory.mkdir(parents=True, exist_ok=True)
    beside.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    beside.replace(path)
