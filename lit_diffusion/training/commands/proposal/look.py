"""A first look at a data set: what is in it, and how a data module would read it.

headers of a sample  →  shape, mode and fit  →  the data module  →  pixels, bad examples
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from lit_diffusion.training.commands.proposal.kinds import propose_kind
from lit_diffusion.training.commands.proposal.recipe import (
    Shape,
    data_arguments,
    propose_classes,
    propose_shape,
    shape_of_arrays,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data.decoding.array_survey import Arrays
from lit_diffusion.training.data.decoding.survey import (
    Files,
    Pixels,
    sample_of,
    survey_files,
    survey_pixels,
)
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading.bad_examples import Bad
from lit_diffusion.training.data.reading.held_out import HELD_OUT
from lit_diffusion.training.data.reading.layout import Layout, count_labels, find_layout
from lit_diffusion.training.data.reading.source import Example, Source
from lit_diffusion.training.reporting.survey import Survey

__all__ = ["Look", "look"]


class Look(NamedTuple):
    """What a data set is, and how to read it.

    Attributes:
        survey: What was found.
        shape: Proposed for the images.
        data: Arguments of the data module.
    """

    survey: Survey
    shape: Shape
    data: dict[str, Any]


def look(where: dict[str, Any], title: str, looks: int, fast: bool, size: int | None) -> Look:
    """Look at a data set.

    Args:
        where: The arguments of the data module that name it.
        title: What it is called.
        looks: Number of examples to look at.
        fast: Whether there is an accelerator.
        size: Side of the images, None to propose one.

    Raises:
        FileNotFoundError: If there is no such data set.
        ValueError: If it has no usable images.
    """
    layout = find_layout(**where)
    source = layout.open(layout.train)
    examples = sample_of(source, looks)
    total = source.total if source.total is not None or len(examples) == looks else len(examples)
    files = survey_files(examples, layout.splits.paths)
    _check_images(files, title, len(examples))
    if files.arrays is None:
        shape = propose_shape(files, fast, size)
    else:
        _check_arrays(files.arrays, title, size)
        shape = shape_of_arrays(files.arrays, propose_kind(files.arrays))
    labels = _labels(layout, source, examples)
    validated = Counter[int]()
    if layout.label is not None and layout.val is not None:
        validated = count_labels(layout.open(layout.val), layout.label) or validated
    num_classes = propose_classes(labels + validated, layout.class_names, total or len(examples))
    label = None if num_classes is None else layout.label
    data = where | _named(layout) | data_arguments(shape, label, layout.val, total)
    if "val_share" in data and not _holds_out(data):
        data.pop("val_share")
        data["val_split"] = None
    pixels = _pixels(data, layout.train, examples)
    if share := _bad_share(pixels):
        data["max_bad_share"] = share
    survey = Survey(
        title=title,
        total=total,
        train=layout.train,
        val=_validation(data),
        files=files,
        pixels=pixels,
        labels=labels,
        label=layout.label,
        num_classes=num_classes,
        class_names=layout.class_names,
        ignored=_ignored(where["path"], layout),
    )
    return Look(survey, shape, data)


def _check_arrays(arrays: Arrays, path: str, size: int | None) -> None:
    """Raise an error unless most arrays have one shape, which is not to be changed."""
    if size is not None:
        raise UsageError(f"--size is the side of pictures, and {path} holds arrays: leave it out.")
    if 2 * max(arrays.shapes.values()) <= arrays.shapes.total():
        few = ", ".join(" × ".join(map(str, shape)) for shape, _ in arrays.shapes.most_common(3))
        raise UsageError(
            f"{path} holds arrays of {len(arrays.shapes):,} shapes, such as {few}: cut or pad "
            "them to one."
        )


def _check_images(files: Files, path: str, looked: int) -> None:
    """Raise an error unless there is an image or an array."""
    if not files.read and files.arrays is None:
        raise UsageError(
            f"none of the {looked:,} examples of {path} looked at is an image that can be read."
        )


def _labels(layout: Layout, source: Source, examples: list[Example | Bad]) -> Counter[int]:
    """Count the labels of all examples, or of those looked at if reading all is the only way."""
    if layout.label is None:
        return Counter()
    known = count_labels(source, layout.label)
    if known is None:
        found = [one.label for one in examples if isinstance(one, Example)]
        known = Counter(label for label in found if isinstance(label, int))
    return known


def _named(layout: Layout) -> dict[str, Any]:
    """The arguments that name splits and columns, where they are not the default ones."""
    found = {"train_split": layout.train, "image_key": layout.image}
    usual = {"train_split": "train", "image_key": "image"}
    return {key: value for key, value in found.items() if value != usual[key]}


def _holds_out(data: dict[str, Any]) -> bool:
    """Whether the share holds out an example that can be used: of few, it may hold out none."""
    try:
        instantiate(DataModule, data | {"streaming": True}).open_split(HELD_OUT)
    except ValueError:
        return False
    return True


def _validation(data: dict[str, Any]) -> str:
    """What a data module validates on, in words."""
    if "val_share" in data:
        return f"about {data['val_share']:.0%} of them, held out"
    return "none" if data["val_split"] is None else f"split {data['val_split']!r}"


def _pixels(data: dict[str, Any], train: str, examples: list[Any]) -> Pixels:
    """Look at examples through the data module of the proposal.

    Raises:
        UsageError: If none can be used.
    """
    data = {key: value for key, value in data.items() if key != "val_share"}  # look at all
    module = instantiate(DataModule, data | {"streaming": True})
    pixels = survey_pixels(module.open_split(train), examples)
    if not len(pixels.images):
        name, reason = pixels.bad[0]
        raise UsageError(
            f"none of the {pixels.looked:,} images looked at can be used; {name}: {reason}"
        )
    return pixels


def _bad_share(pixels: Pixels) -> float | None:
    """The share of bad examples to allow, if the usual hundredth would end the run."""
    share = pixels.lost / max(pixels.looked, pixels.lost)
    return None if share <= 0.005 else min(1.0, round(2 * share + 0.01, 2))


def _ignored(path: str, layout: Layout) -> tuple[str, ...]:
    """The names of files in a local folder that are no part of the data set."""
    if not Path(path).is_dir():
        return ()
    used = {file for files in layout.splits.files.values() for file in files}
    suffixes = {Path(file).suffix.lower() for file in used}
    found = (
        Path(folder, name) for folder, _, names in sorted(os.walk(path)) for name in sorted(names)
    )
    return tuple(
        str(file.relative_to(path))
        for file in found
        if str(file) not in used or file.suffix.lower() not in suffixes
    )
