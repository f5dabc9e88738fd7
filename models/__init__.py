"""The model zoo: plain Flax linen modules whose widths are arguments, and the checkpoints they read.

```python
from treesurgeon import models

preset = models.get("resnet56")                       # factory, input shape, normalisation
module = models.resolve("resnet56", num_classes=10)   # or "package.module:factory"
variables = models.load_checkpoint("resnet56.safetensors", preset, template)
```

A model is written down as `{"model": spec, "kwargs": {...}}`, and `resolve(spec, **kwargs)` builds it again.
Reading order: `mlp.py`, `resnet.py`, `presets.py`, `weights.py`; then, of the transformers, `attention.py` and
`vit.py` before the others. `rebuilding.py` reads a family's widths off a pruned
checkpoint.
"""

from treesurgeon.models.bert import BERT, bert
from treesurgeon.models.convnext import ConvNeXt, convnext
from treesurgeon.models.densenet import DenseNet, densenet
from treesurgeon.models.digits_cnn import DigitsCNN, digits_cnn
from treesurgeon.models.efficientnet import EfficientNet, efficientnet
from treesurgeon.models.errors import CheckpointError, ModelError, ModelSpecError, UnknownModelError
from treesurgeon.models.gpt import GPT, gpt
from treesurgeon.models.imagenet_resnet import ImageNetResNet, imagenet_resnet
from treesurgeon.models.llama import Llama, llama
from treesurgeon.models.lstm import LSTMTagger, lstm_tagger
from treesurgeon.models.mixer import Mixer, mixer
from treesurgeon.models.mlp import MLP, mlp
from treesurgeon.models.mobilenet import MobileNet, mobilenet
from treesurgeon.models.presets import ZOO, Preset, find, get, resolve
from treesurgeon.models.rebuilding import at_widths, rebuild
from treesurgeon.models.resnet import ResNet, resnet
from treesurgeon.models.swin import Swin, swin
from treesurgeon.models.unet import UNet, unet
from treesurgeon.models.vgg import VGG, vgg
from treesurgeon.models.vit import ViT, vit
from treesurgeon.models.weights import load_checkpoint

__all__ = [
    "BERT",
    "GPT",
    "MLP",
    "VGG",
    "ZOO",
    "CheckpointError",
    "ConvNeXt",
    "DenseNet",
    "DigitsCNN",
    "EfficientNet",
    "ImageNetResNet",
    "LSTMTagger",
    "Llama",
    "Mixer",
    "MobileNet",
    "ModelError",
    "ModelSpecError",
    "Preset",
    "ResNet",
    "Swin",
    "UNet",
    "UnknownModelError",
    "ViT",
    "at_widths",
    "bert",
    "convnext",
    "densenet",
    "digits_cnn",
    "efficientnet",
    "find",
    "get",
    "gpt",
    "imagenet_resnet",
    "llama",
    "load_checkpoint",
    "lstm_tagger",
    "mixer",
    "mlp",
    "mobilenet",
    "rebuild",
    "resnet",
    "resolve",
    "swin",
    "unet",
    "vgg",
    "vit",
]
