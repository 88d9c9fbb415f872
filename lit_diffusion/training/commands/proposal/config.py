"""A proposed configuration as commented YAML: one file, readable from top to bottom."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from typing import Any

from lit_diffusion.training.commands.proposal.recipe import Recipe, Shape

__all__ = ["config_text"]

TEXT = """\
# A first configuration for {title}, proposed by `lit-diffusion new` from the data.
#   lit-diffusion fit --config {file} --trainer.max_steps 100    # a first look
#   lit-diffusion fit --config {file}
{remarks}name: {name}
seed_everything: 0

data:
{data}
model:
  network:
    class_path: {network}
    init_args:
{arguments}{objective}  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: {lr}, betas: [0.9, 0.99], weight_decay: 0.01, fused: true}}
  lr_scheduler:
    class_path: WarmupDecayLR
    init_args: {{warmup: {warmup}, decay: 0.5}}
  label_dropout: {label_dropout}

trainer:
  max_steps: {steps}        # {passes}
  gradient_clip_val: 1.0
  log_every_n_steps: {log}
  num_sanity_val_steps: 0
  enable_model_summary: false
  callbacks:
    - class_path: EMA
      init_args: {{sigma_rel: 0.1}}    # a share of the run so far, so it fits any length
{likelihood}    - class_path: SampleGrid
      init_args: {{rows: {rows}, columns: {columns}}}
    - class_path: LastCheckpoint
"""
PHOTOGRAPHS = """\
  # Many grey levels: the sigmoid gives little weight to detail that the eye does not see.
  # --config weighting/elbo is the likelihood instead; see docs/guide/choose.md.
  weighting:
    class_path: SigmoidWeighting
    init_args: {bias: 2.0}
  schedule:
    class_path: CosineSchedule
    init_args: {logsnr_min: -15.0, logsnr_max: 15.0}
  prediction: VPrediction
  sampler:
    class_path: DDIMSampler
    init_args: {steps: 50}
"""
LARGE = """\
  # Many grey levels: the sigmoid gives little weight to detail that the eye does not see. Both are
  # shifted by 2 ln(64/side), since the same noise hides less of an image of more than 64 pixels.
  weighting:
    class_path: ShiftedWeighting
    init_args:
      base: {{class_path: SigmoidWeighting, init_args: {{bias: 2.0}}}}
      shift: {shift}
  schedule:
    class_path: ShiftedSchedule
    init_args:
      base:
        class_path: CosineSchedule
        init_args: {{logsnr_min: -15.0, logsnr_max: 15.0}}
      shift: {shift}
  prediction: VPrediction
  sampler:
    class_path: DDIMSampler
    init_args: {{steps: 50}}
"""
BOUND = """\
  # {count} grey levels: the likelihood itself, in all three terms, up to the λ at which
  # neighbouring levels are 16 standard deviations of the noise apart.
  weighting: ELBOWeighting
  decoder:
    class_path: SoftmaxDecoder
    init_args: {{levels: {levels}}}
  schedule:
    class_path: LinearSchedule
    init_args: {{logsnr_min: -10.0, logsnr_max: {logsnr_max}}}
  prediction: VPrediction
  sampler:
    class_path: AncestralSampler
    init_args: {{steps: 50}}
"""
FLOATS = """\
  # Numbers of any range and meaning: flow matching, as a regression with little to choose.
  clip_denoised: false
  weighting: ExponentialWeighting
  schedule:
    class_path: FlowSchedule
    init_args: {logsnr_min: -20.0, logsnr_max: 20.0}
  prediction: FlowPrediction
  sampler:
    class_path: DDIMSampler
    init_args:
      steps: 50
      schedule:
        class_path: FlowSchedule
        init_args: {logsnr_min: -20.0, logsnr_max: 20.0}
"""
COMMENTS = {
    "shape": "{axes}: {why}",
    "normalize": "for training; samples are in the units of the data",
    "mode": "all images are converted to it",
    "val_share": "of the examples, held out for validation",
    "streaming": "decode once, and train from memory",
    "max_bad_share": "more bad examples than this end the run",
}
AXES = {
    "image": "channels, height, width",
    "signal": "channels, length",
    "volume": "channels, depth, height, width",
    "points": "coordinates, points",
    "vector": "numbers",
    "latents": "channels, height, width",
}
NETWORK = {
    "attention": "sizes of the feature maps that have it",
    "dropout": "few examples",
    "fourier": "waves as long as the grey levels",
    "positions": "a set has no order",
}
FLIP = "  # horizontal_flip: true    # where a mirror image is as good an example: not for text\n"


def config_text(
    *,
    title: str,
    file: str,
    name: str,
    remarks: list[str],
    data: Mapping[str, Any],
    shape: Shape,
    recipe: Recipe,
    num_classes: int | None,
    total: int | None,
) -> str:
    """The text of a config.

    Args:
        title: What the data are called.
        file: Name of the config's file.
        name: Of the runs.
        remarks: Sentences for its head.
        data: Arguments of the data module.
        shape: Of the images.
        recipe: Network, objective and length.
        num_classes: Number of classes, None for none.
        total: Number of training examples, None if unknown.
    """
    arguments = dict(recipe.arguments)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    lines = [_line(6, key, value, NETWORK.get(key, "")) for key, value in arguments.items()]
    seen = recipe.steps * recipe.batch_size
    validates = data.get("val_split") is not None or "val_share" in data
    columns = num_classes if num_classes is not None and num_classes <= 10 else 8
    return TEXT.format(
        title=_scalar(title),
        file=_word(file),
        name=_scalar(name),
        remarks="".join(f"# {line}\n" for line in remarks),
        data=_data(data, shape, recipe),
        network=recipe.network,
        arguments="".join(lines),
        objective=_objective(shape, recipe),
        lr=f"{recipe.lr:.1e}",
        warmup=recipe.steps // 100,
        label_dropout=0.0 if num_classes is None else 0.1,
        steps=recipe.steps,
        passes="" if total is None else f"each example is seen about {seen / total:,.0f} times",
        log=50 if recipe.steps > 10_000 else 25,
        likelihood="    - Likelihood\n" if recipe.levels is not None and validates else "",
        rows=4,
        columns=columns,
    )


def _data(data: Mapping[str, Any], shape: Shape, recipe: Recipe) -> str:
    lines = []
    values = {**data, "batch_size": recipe.batch_size, "steps_per_epoch": recipe.every}
    comments = COMMENTS | {"steps_per_epoch": "an epoch is only the interval between validations"}
    for key, value in values.items():
        lines.append(
            _line(
                2, key, value, comments.get(key, "").format(axes=AXES[shape.kind], why=shape.why)
            )
        )
    return "".join(lines) + (
        FLIP if shape.kind == "image" and "horizontal_flip" not in values else ""
    )


def _line(indent: int, key: str, value: Any, comment: str) -> str:
    line = f"{' ' * indent}{key}: {_scalar(value)}"
    return f"{line:<28} # {comment}\n" if comment else f"{line}\n"


def _objective(shape: Shape, recipe: Recipe) -> str:
    if shape.kind != "image":
        return FLOATS
    side = max(shape.shape[1:])
    if recipe.levels is None:
        if side <= 64:
            return PHOTOGRAPHS
        return LARGE.format(shift=round(2 * math.log(64 / side), 2))
    levels = recipe.levels if isinstance(recipe.levels, int) else [*recipe.levels]
    count = levels if isinstance(levels, int) else len(levels)
    return BOUND.format(count=count, levels=levels, logsnr_max=recipe.logsnr_max)


def _scalar(value: Any) -> str:
    """A value in YAML, on one line: JSON is YAML, and its quotes hold any text."""
    plain = isinstance(value, str) and value.isidentifier() and value.isascii()
    reserved = isinstance(value, str) and value.lower() in (
        "null",
        "true",
        "false",
        "yes",
        "no",
        "on",
        "off",
        "y",
        "n",
    )
    return str(value) if plain and not reserved else json.dumps(value, ensure_ascii=False)


def _word(file: str) -> str:
    return shlex.quote(file)
