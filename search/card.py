"""The card of the selected model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from treesurgeon.search import report
from treesurgeon.search.crossval import Estimate
from treesurgeon.search.selection import PLAIN, title
from treesurgeon.search.setting import Setting


def card(
    setting: Setting,
    outcome: Mapping[str, Any],
    lines: Sequence[report.Line],
    estimates: Mapping[str, Estimate],
    baselines: str,
) -> str:
    """The text of README.md in the directory of the selected model."""
    config, metric = setting.config, setting.config.judged_by
    shape = ", ".join(map(str, setting.subject.spec.input_shape))
    told = f"{baselines}\n\n" if baselines else ""
    told += f"Before the search: {setting.head.sentence}.\n\n" if setting.head else ""
    if setting.unlabelled:
        count = len(setting.unlabelled) - setting.held
        told += f"The variants also learnt from {count:,} images of `{config.unlabelled}`, without labels.\n\n"
    return f"""# {config.model}, pruned

{outcome["sentence"]}

{report.markdown(lines)}

{told}{metric.description}, on the roles of `{config.data}`. `test` was never used for a choice: quote that column. The
gap is what is lost of it from `train` to `search`, in {metric.unit}.
{_estimates(setting, estimates)}
```python
from treesurgeon.engine import load

model = load("selected")
logits = model(x)   # x: float32 [N, {shape}], (image in 0..1 - mean) / std
```

{_outputs(setting)}mean {", ".join(map(str, setting.mean))}; std {", ".join(map(str, setting.std))}.
`model.stablehlo` is the same function without the code:
`jax.export.deserialize(open("selected/model.stablehlo", "rb").read()).call(x)`.
"""


def _outputs(setting: Setting) -> str:
    """What the model returns, where that is no logits of classes."""
    names = ", ".join(setting.roles.label_names)
    said = {
        "multilabel": f"It returns the log-odds of {names}.\n\n",
        "regression": f"It returns {names}, in the units of the data.\n\n",
    }
    return said.get(setting.roles.task.name, "")


def _estimates(setting: Setting, estimates: Mapping[str, Estimate]) -> str:
    """What cross-validation found, for the card."""
    metric = setting.config.judged_by
    rows = [
        f"- {name}: {metric.amount(found.difference, sign=True)} ({metric.amount(found.low, sign=True)} to "
        f"{metric.amount(found.high, sign=True)})"
        for name, found in estimates.items()
    ]
    dense = title(PLAIN if setting.tuned_reference else "dense")
    head = f"\n**Not certified.** The {metric.noun} less {dense}'s, in cross-validation:\n\n"
    return head + "\n".join(rows) + "\n" if rows else ""
