"""What a data set is, as a few lines of text: sizes, modes, values, classes, bad examples."""

from __future__ import annotations

import textwrap
from collections import Counter
from typing import NamedTuple

from lit_diffusion.training.data.decoding.array_survey import Arrays
from lit_diffusion.training.data.decoding.survey import Files, Pixels
from lit_diffusion.training.run.secrets import without_secrets

__all__ = ["Survey", "subject_lines", "survey_lines"]

FEW = 5
WIDTH = 100


class Survey(NamedTuple):
    """What was found in a data set.

    Attributes:
        title: What the data are called.
        total: Number of training examples, None if unknown.
        train: Name of their split.
        val: What is validated on, in words.
        files: What the image files are.
        pixels: What training sees of them.
        labels: Number of examples of each label, empty without labels.
        label: Column of the labels, None if there is none.
        num_classes: Number of classes, None if the labels are none.
        class_names: Their names, if the data declare them.
        ignored: Names of other files in the folder.
    """

    title: str
    total: int | None
    train: str
    val: str
    files: Files
    pixels: Pixels
    labels: Counter[int]
    label: str | None
    num_classes: int | None
    class_names: tuple[str, ...]
    ignored: tuple[str, ...]


def survey_lines(survey: Survey) -> list[str]:
    """Describe a data set, one line for each subject.

    Args:
        survey: What was found.
    """
    files, pixels = survey.files, survey.pixels
    total = "an unknown number of" if survey.total is None else f"{survey.total:,}"
    lines = [
        ("data", f"{survey.title}: {total} examples in split {survey.train!r}"),
        ("validation", survey.val),
        ("looked at", f"{pixels.looked:,} examples in random order"),
        *(_pictures(files) if files.arrays is None else _arrays(files.arrays)),
        ("values", _values(pixels)),
        ("classes", _classes(survey)),
        ("bad", _bad(pixels)),
    ]
    if survey.ignored:
        shown = ", ".join(survey.ignored[:FEW]) + (", …" if len(survey.ignored) > FEW else "")
        lines.append(("ignored", f"{len(survey.ignored)} other files: {shown}"))
    return [line for subject, text in lines for line in subject_lines(subject, text)]


def subject_lines(subject: str, text: str) -> list[str]:
    """A subject with what is said of it, as lines of at most 100 characters.

    Args:
        subject: A word.
        text: One sentence or several lines.
    """
    begin = f"{subject:<11}"
    lines = [
        textwrap.fill(part, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 13)
        for part in text.splitlines()
    ]
    return [begin + lines[0][11:], *lines[1:]] if lines else []


def _pictures(files: Files) -> list[tuple[str, str]]:
    modes = _counts(files.modes) + _grey(files)
    if files.transparent:
        part = "part of the picture" if 2 * files.transparent > files.read else "left out"
        modes += f"; {files.transparent:,} have transparent pixels: transparency is {part}"
    return [("formats", _counts(files.formats)), ("sizes", _sizes(files)), ("modes", modes)]


def _arrays(arrays: Arrays) -> list[tuple[str, str]]:
    shapes = [f"{_shape(shape)} ({n:,})" for shape, n in arrays.shapes.most_common(FEW)]
    more = ", …" if len(arrays.shapes) > FEW else ""
    likeness = ", ".join(f"{one:.2f}" for one in arrays.likeness)
    return [
        ("arrays", _counts(arrays.dtypes)),
        ("shapes", f"{', '.join(shapes)}{more}; correlation of neighbours by axis: {likeness}"),
    ]


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape))


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.most_common())


def _sizes(files: Files) -> str:
    """The most frequent sizes, and the smallest and the largest."""
    few = [f"{_size(size)} ({n:,})" for size, n in files.sizes.most_common(FEW)]
    if len(files.sizes) <= FEW:
        return ", ".join(few) + ", height × width"
    by_area = sorted(files.sizes, key=lambda size: size[0] * size[1])
    whole = f"{len(files.sizes):,} sizes from {_size(by_area[0])} to {_size(by_area[-1])}"
    if max(files.sizes.values()) == 1:
        return f"{whole}, height × width"
    return f"{', '.join(few)}, …: {whole}, height × width"


def _size(size: tuple[int, int]) -> str:
    return _shape(size)


def _grey(files: Files) -> str:
    if files.grey and set(files.modes) - {"L", "LA", "1"}:
        return "; all of them are grey"
    return ""


def _values(pixels: Pixels) -> str:
    levels = pixels.levels
    if not levels:
        return f"floats: mean {pixels.mean:.4g}, standard deviation {pixels.std:.4g}"
    few = f" (bytes {', '.join(map(str, levels))})" if len(levels) <= 20 else ""
    return (
        f"{len(levels)} grey levels{few}; in [−1, 1]: mean {pixels.mean:.3f}, standard deviation "
        f"{pixels.std:.3f}"
    )


def _classes(survey: Survey) -> str:
    if survey.num_classes is None:
        if survey.label is None:
            return "none"
        return f"none: column {survey.label!r} does not contain numbers of classes"
    names = dict(enumerate(survey.class_names))
    counts = Counter({k: survey.labels.get(k, 0) for k in range(survey.num_classes)})
    ordered = counts.most_common()
    shown = ordered if len(ordered) <= 2 * FEW else [*ordered[:FEW], *ordered[-FEW:]]
    text = [f"{names.get(k, k)} {n:,}" for k, n in shown]
    if len(shown) < len(ordered):
        text.insert(FEW, "…")
    largest, smallest = ordered[0][1], ordered[-1][1]
    balance = (
        "balanced"
        if largest == smallest
        else f"the largest is {largest / smallest:.1f} times the smallest"
        if smallest
        else "one of them is empty"
    )
    if smallest and largest <= 1.1 * smallest:
        balance = "balanced"
    return f"{survey.num_classes} (column {survey.label!r}), {balance}: {', '.join(text)}"


def _bad(pixels: Pixels) -> str:
    """How many examples cannot be used, and why the first few cannot."""
    if not pixels.bad:
        return "none"
    text = [f"{pixels.lost:,} of {pixels.looked:,} cannot be used"]
    text += [f"{without_secrets(name)}: {reason}" for name, reason in pixels.bad[:FEW]]
    text += ["…"] * (len(pixels.bad) > FEW)
    return "\n".join(text)
