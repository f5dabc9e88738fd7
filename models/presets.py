"""The zoo's presets, and how a model's name or `package.module:factory` becomes a linen module."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType, ModuleType
from typing import Any

from flax import linen as nn

from treesurgeon.models.convnext import SIZES as convnext_sizes
from treesurgeon.models.convnext import convnext
from treesurgeon.models.densenet import DEPTHS as densenet_depths
from treesurgeon.models.densenet import densenet
from treesurgeon.models.digits_cnn import digits_cnn
from treesurgeon.models.efficientnet import efficientnet
from treesurgeon.models.errors import ModelSpecError, UnknownModelError
from treesurgeon.models.imagenet_resnet import STAGES as imagenet_depths
from treesurgeon.models.imagenet_resnet import imagenet_resnet
from treesurgeon.models.mixer import SIZES as mixer_sizes
from treesurgeon.models.mixer import mixer
from treesurgeon.models.mlp import mlp
from treesurgeon.models.mobilenet import VERSIONS as mobilenet_versions
from treesurgeon.models.mobilenet import mobilenet
from treesurgeon.models.resnet import DEPTHS, resnet
from treesurgeon.models.swin import SIZES as swin_sizes
from treesurgeon.models.swin import swin
from treesurgeon.models.vgg import STAGES, vgg
from treesurgeon.models.vit import SIZES as vit_sizes
from treesurgeon.models.vit import vit


@dataclass(frozen=True)
class Preset:
    """What the zoo knows about a model and about the checkpoints published for it.

    Attributes:
        name: what `get` and `resolve` take.
        factory: builds the module; keyword arguments override `num_classes`, widths, ….
        input_shape: `(H, W, C)` of one image.
        num_classes: of the factory's default.
        mean: subtracted from images in 0..1, one number per channel.
        std: divided by, one number per channel.
        fitted_splits: the dataset splits that its checkpoints were trained on; None where unknown.
        checkpoint_layout: which name tables of `torch_names.LAYOUTS` read checkpoints with PyTorch's names; None where
            there are none, and checkpoints are read under Flax's names only.
        labels: names of the classes that its checkpoints answer with, by number; None where the zoo does not know them.
    """

    name: str
    factory: Callable[..., nn.Module]
    input_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fitted_splits: tuple[str, ...] | None
    checkpoint_layout: str | None
    labels: tuple[str, ...] | None = None


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = tuple("0123456789")


def _presets() -> list[Preset]:
    cifar, train = (32, 32, 3), ("train",)
    digits = ((8, 8, 1), 10, (0.0,), (1.0,))
    # Normalisation of github.com/akamaster/pytorch_resnet_cifar10.
    resnet_norm = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # Normalisation of github.com/chenyaofo/pytorch-cifar-models.
    vgg_norm = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    imagenet = ((224, 224, 3), 1000, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return [
        Preset("mlp", mlp, *digits, None, "mlp", DIGITS),
        Preset("digits_cnn", digits_cnn, *digits, train, "digits_cnn", DIGITS),
        *(Preset(f"vgg{d}", partial(vgg, d), cifar, 10, *vgg_norm, train, "vgg", CIFAR10) for d in STAGES),
        *(Preset(f"resnet{d}", partial(resnet, d), cifar, 10, *resnet_norm, train, "resnet", CIFAR10) for d in DEPTHS),
        *(Preset(f"resnet{d}", partial(imagenet_resnet, d), *imagenet, train, "resnet") for d in imagenet_depths),
        *(Preset(f"mobilenet_{v}", partial(mobilenet, v), *imagenet, train, "mobilenet") for v in mobilenet_versions),
        Preset("efficientnet_b0", efficientnet, *imagenet, train, None),
        *(Preset(f"densenet{d}", partial(densenet, d), *imagenet, train, "densenet") for d in densenet_depths),
        *(Preset(f"convnext_{s}", partial(convnext, s), *imagenet, train, "convnext") for s in convnext_sizes),
        *(Preset(f"swin_{s}", partial(swin, s), *imagenet, train, None) for s in swin_sizes),
        *(Preset(f"mixer_{s}16", partial(mixer, s), *imagenet, train, None) for s in mixer_sizes),
        *(Preset(f"vit_{s}", partial(vit, s), *imagenet, train, "vit") for s in vit_sizes),
    ]


ZOO: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _presets()})


def get(name: str) -> Preset:
    """Return the zoo's preset of that name.

    Raises:
        UnknownModelError: no such name; the message lists those there are.
    """
    if name not in ZOO:
        raise UnknownModelError(
            f"no model named {name!r} in the zoo; it has {', '.join(ZOO)}. "
            "For a model of your own write package.module:factory"
        )
    return ZOO[name]


def resolve(spec: str, **kwargs: Any) -> nn.Module:
    """Build the linen module that `spec` names; the same spec and arguments build the same module again.

    Args:
        spec: a name of the zoo (`resnet56`), or `package.module:factory`, where `factory` returns a linen
            module or is a linen class. The current directory is searched as well.
        **kwargs: passed to the factory.

    Raises:
        UnknownModelError: no such name, module or attribute.
        ModelSpecError: importing or calling it raised, or gave something else than a linen module.
    """
    factory = find(spec)
    if isinstance(factory, nn.Module) and not kwargs:
        return factory
    if isinstance(factory, nn.Module) or not callable(factory):
        raise ModelSpecError(
            f"model {spec!r}: expected a function that returns a flax.linen module, got "
            f"{type(factory).__name__}{' and arguments for it' if kwargs else ''}"
        )
    try:
        module = factory(**kwargs)
    except Exception as error:
        given = ", ".join(f"{k}={v!r}" for k, v in kwargs.items())
        raise ModelSpecError(
            f"model {spec!r}: its factory, called with ({given}), raised {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module):
        raise ModelSpecError(
            f"model {spec!r}: expected its factory to return a flax.linen module, got "
            f"{type(module).__module__}.{type(module).__name__}"
        )
    return module


def find(spec: str) -> Any:
    """What `spec` names (see `resolve`), not called: a factory, a class, or a module.

    Raises:
        UnknownModelError: no such name, module or attribute.
        ModelSpecError: importing it raised.
    """
    if ":" not in spec:
        return get(spec).factory
    module_name, _, attribute = spec.partition(":")
    return _attribute(_import(module_name, spec), attribute, spec)


def _import(name: str, spec: str) -> ModuleType:
    if not name or not all(part.isidentifier() for part in name.split(".")):
        raise UnknownModelError(f"model {spec!r}: expected package.module:factory, and {name!r} is no module's name")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # a console script does not search it; last, so that it shadows nothing
        importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UnknownModelError(
                f"model {spec!r}: no module named {error.name!r}; looked in {os.getcwd()} and on PYTHONPATH. "
                "Install the package, or run from the directory that holds it"
            ) from error
        raise ModelSpecError(f"model {spec!r}: importing {name} needs {error.name!r}, which is not there") from error
    except Exception as error:
        raise ModelSpecError(f"model {spec!r}: importing {name} raised {type(error).__name__}: {error}") from error


def _attribute(module: ModuleType, attribute: str, spec: str) -> Any:
    if hasattr(module, attribute):
        return getattr(module, attribute)
    public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    listed = ", ".join(public[:12]) + (f", … and {len(public) - 12} more" if len(public) > 12 else "")
    raise UnknownModelError(
        f"model {spec!r}: module {module.__name__} has no {attribute!r}; it has {listed or 'no functions'}"
    )
