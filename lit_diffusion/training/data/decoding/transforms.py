"""Transforms: how pictures of other sizes and modes become images of one shape, as stated.

A list of transforms is data: names of classes with their arguments, from a config. They are
applied in order to each decoded picture, C × H × W bytes, and what comes out must have the shape
of the images. Nothing else is ever changed.

A random transform is a function of (seed, epoch, example): before it is applied, torch's, Python's
and NumPy's generators are seeded by a hash of the three, and afterwards they are restored. So
neither workers nor ranks nor a resumption make a difference, and nothing else that is random does.
`Fit` crops at a place that is such a hash itself, without the cost of seeding.

Statistics, references and validation see the *fixed* transforms only. In memory those before the
first random one are applied once, when the pictures are decoded, and the rest at each access.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from lit_diffusion.training.data.decoding.repeatable import (
    PICTURES,
    check_repeatable,
    fractions,
    is_own,
    restored_generators,
    seed_generators,
)
from lit_diffusion.training.data.decoding.transform_classes import (
    Given,
    describe_all,
    make,
)
from lit_diffusion.training.data.reading.bad_examples import one_line
from lit_diffusion.training.data.reading.columns import MisfitError

__all__ = ["Fit", "Transforms"]

CHANNELS = {"L": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # of PIL's modes of bytes


@dataclasses.dataclass(frozen=True)
class Fit:
    """Resizes a picture to the size of the images, and crops or pads what does not fit.

    Resizing is bilinear or bicubic with antialiasing, by torch on bytes, within one grey level of
    what PIL gives. A picture of the right size is not touched. Smaller ones are enlarged.

    Args:
        mode: `center_crop`: the picture just covers the image, its middle is taken;
            `random_crop`: the same with a part at random, in training, and the middle elsewhere;
            `pad`: the picture just fits in, the rest is filled; `squash`: height and width are
            scaled each by its own factor.
        interpolation: `bilinear` or `bicubic`.
        fill: Byte of the pixels that `pad` adds, 0 to 255.
        size: (height, width); by default those of data.shape.

    Raises:
        ValueError: If an argument is out of its range.
    """

    mode: Literal["center_crop", "pad", "squash", "random_crop"] = "center_crop"
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    fill: int = 0
    size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        choices = {
            "mode": ("center_crop", "pad", "squash", "random_crop"),
            "interpolation": ("bilinear", "bicubic"),
        }
        for name, allowed in choices.items():
            if (given := getattr(self, name)) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")
        if not isinstance(self.fill, int) or not 0 <= self.fill <= 255:
            raise ValueError(f"fill must be a byte, 0 to 255, got {self.fill!r}")
        if self.size is not None:
            whole = isinstance(self.size, list | tuple) and len(self.size) == 2
            if not whole or not all(isinstance(s, int) and s > 0 for s in self.size):
                raise ValueError(f"size must be [height, width], got {self.size!r}")
            object.__setattr__(self, "size", tuple(self.size))

    @property
    def random(self) -> bool:
        """Whether it uses random numbers."""
        return self.mode == "random_crop"

    def __call__(self, picture: Tensor, place: Sequence[float] | None = None) -> Tensor:
        """Return the picture in its new size.

        Args:
            picture: Bytes.
            place: Of a random crop, from 0, the top and the left, up to 1; None for a random one.

        Shapes:
            picture (C, h, w); result (C, height, width).
        """
        assert self.size is not None
        height, width = self.size
        h, w = picture.shape[1:]
        if (h, w) == (height, width):
            return picture
        if self.mode == "squash":
            return self._resized(picture, height, width)
        if self.mode == "pad":
            scale = min(height / h, width / w)
            part = self._resized(
                picture,
                *(max(1, min(s, round(scale * n))) for s, n in zip(self.size, (h, w))),  # noqa: B905
            )
            top, left = (height - part.shape[1]) // 2, (width - part.shape[2]) // 2
            rest = (left, width - part.shape[2] - left, top, height - part.shape[1] - top)
            return pad(part, rest, value=self.fill)
        scale = max(height / h, width / w)
        whole = self._resized(picture, max(height, round(scale * h)), max(width, round(scale * w)))
        more = (whole.shape[1] - height, whole.shape[2] - width)
        if self.random:
            place = torch.rand(2, dtype=torch.float64).tolist() if place is None else place
            top, left = int(place[0] * (more[0] + 1)), int(place[1] * (more[1] + 1))
        else:
            top, left = more[0] // 2, more[1] // 2
        return whole[:, top : top + height, left : left + width]

    def _resized(self, picture: Tensor, height: int, width: int) -> Tensor:
        if picture.shape[1:] == (height, width):
            return picture
        # Three channels of one pixel each fail in torch (2.15), as if laid out otherwise.
        apart = height == width == 1
        batch = picture[:, None] if apart else picture[None]
        made = interpolate(batch, (height, width), mode=self.interpolation, antialias=True)
        return made[:, 0] if apart else made[0]


class Step(NamedTuple):
    """One transform: its name, the function, whether it is random, whether the user wrote it."""

    name: str
    apply: Callable[[Any], Any]
    random: bool
    own: bool = False


class Transforms:
    """A list of transforms in order, each a function from bytes to bytes.

    Args:
        steps: The transforms.
        description: The same as plain data.
        seed: Of the run.
    """

    def __init__(
        self, steps: Sequence[Step] = (), description: Sequence[Any] = (), seed: int = 0
    ) -> None:
        self.steps = tuple(steps)
        self.description = list(description)
        self.seed = seed
        self.seeded = any(step.random and not isinstance(step.apply, Fit) for step in steps)
        self._unproven = PICTURES if any(step.own for step in steps) else 0

    @classmethod
    def of(cls, given: Sequence[Given] | None, shape: tuple[int, ...], seed: int) -> Transforms:
        """Make the transforms that a config lists.

        Args:
            given: Names of classes, or {class_path, init_args}; None for no transforms.
            shape: (C, H, W) of the images.
            seed: Of the run.

        Raises:
            ValueError: If one is not allowed, does not exist or has wrong arguments.
        """
        own: dict[str, type] = {"Fit": Fit}
        listed = list(given or ())
        made_all = [make(one, f"data.transform[{k}]", own) for k, one in enumerate(listed)]
        steps, description = [], describe_all(listed, own)
        for number, (made, name, is_random) in enumerate(made_all):
            if isinstance(made, Fit):
                made = (
                    made if made.size else dataclasses.replace(made, size=(shape[-2], shape[-1]))
                )
                arguments = dataclasses.asdict(made) | {"size": list(made.size or ())}
                description[number]["init_args"] = arguments  # also the defaults
            steps.append(Step(name, made, is_random, is_own(made)))
        return cls(steps, description, seed)

    def __bool__(self) -> bool:
        return bool(self.steps)

    def fixed(self) -> Transforms:
        """Return the transforms without the random ones; a random crop of `Fit` is central."""
        steps, description = [], []
        for step, described in zip(self.steps, self.description, strict=True):
            if isinstance(step.apply, Fit) and step.random:
                central = dataclasses.replace(step.apply, mode="center_crop")
                steps.append(Step(step.name, central, False))
                arguments = described["init_args"] | {"mode": "center_crop"}
                description.append(described | {"init_args": arguments})
            elif not step.random:
                steps.append(step)
                description.append(described)
        return Transforms(steps, description, self.seed)

    def divided(self) -> tuple[Transforms, Transforms]:
        """Return the transforms before the first random one, and the rest."""
        k = next((k for k, step in enumerate(self.steps) if step.random), len(self.steps))
        return (
            Transforms(self.steps[:k], self.description[:k], self.seed),
            Transforms(self.steps[k:], self.description[k:], self.seed),
        )

    def __call__(self, picture: Tensor, epoch: int = 0, index: int = 0) -> Tensor:
        """Apply all transforms to one picture; between `isolated`, if generators are seeded.

        Args:
            picture: Bytes.
            epoch: In which it is used.
            index: Of its example in the split.

        Shapes:
            picture (C, h, w); result (C, h, w), of any size.

        Raises:
            MisfitError: If one fails, or its result is no picture of bytes.
            NotRepeatableError: If one of the user's would not be repeated by a resumed run.
        """
        if self.seeded:
            seed_generators(self.seed, epoch, index)
        proving, self._unproven = self._unproven > 0, max(0, self._unproven - 1)
        for number, step in enumerate(self.steps):
            if proving and step.own:
                check_repeatable(step, picture)
            try:
                if step.random and isinstance(step.apply, Fit):
                    found = step.apply(picture, fractions(self.seed, epoch, index, number))
                else:
                    found = step.apply(picture)
            except Exception as error:  # they raise anything
                raise MisfitError(
                    f"a picture to which {step.name} of data.transform applies, got "
                    f"{_times(picture.shape)} and {one_line(error)}; change data.transform"
                ) from error
            picture = _bytes_of(found, step.name)
        return picture.contiguous()

    def check(self, picture: Tensor, shape: tuple[int, ...]) -> None:
        """Raise an error if the result of the last transform has not the shape of the images.

        Args:
            picture: The result.
            shape: (C, H, W) of the images.

        Raises:
            MisfitError: If it has another.
        """
        if picture.shape == shape:
            return
        last = (
            f"after {self.steps[-1].name}" if self.steps else "and no transform outside training"
        )
        if picture.shape[1:] != shape[1:]:
            remedy = "put Fit last in data.transform (random transforms act in training only)"
            remedy += "; with data.buckets no transform may change the size of a picture"
        else:
            remedy = "set data.mode to the colours of the images, or data.shape"
        raise MisfitError(
            f"an image of channels × height × width {_times(shape)}, got {_times(picture.shape)} "
            f"{last}; {remedy}"
        )

    def batch(
        self, pictures: Tensor, epochs: Sequence[int], indices: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """Apply all transforms to each picture of a batch.

        Args:
            pictures: Bytes.
            epochs: Epoch of each.
            indices: Index of each in its split.
            shape: (C, H, W) of the images, which the results must have.

        Shapes:
            pictures (B, C, h, w); epochs (B,); indices (B,); result (B, C, H, W).

        Raises:
            ValueError: If one fails, or a result is no picture of bytes of this shape.
        """
        made = []
        with self.isolated():
            for picture, epoch, index in zip(pictures, epochs, indices, strict=True):
                try:
                    made.append(self(picture, epoch, index))
                    self.check(made[-1], tuple(shape))
                except MisfitError as problem:
                    raise ValueError(f"example {index}: expected {problem}") from problem
        return torch.stack(made)

    def isolated(self) -> contextlib.AbstractContextManager[None]:
        """Restore all generators afterwards, if they are seeded for a transform."""
        return restored_generators() if self.seeded else contextlib.nullcontext()


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _bytes_of(found: Any, name: str) -> Tensor:
    """Return the result of a transform as bytes (C, H, W), or say what is wrong with it."""
    if type(found) is Tensor and found.dtype == torch.uint8 and found.dim() == 3 and found.numel():
        return found
    from PIL import Image

    wanted = f"{name} of data.transform to return a picture of bytes (C, H, W)"
    if isinstance(found, Image.Image):
        if found.mode not in CHANNELS:
            raise MisfitError(f"{wanted}, got one of mode {found.mode}; change data.transform")
        return tensor_of(found)
    if not isinstance(found, Tensor):
        raise MisfitError(f"{wanted}, got {type(found).__name__}; change data.transform")
    if found.dtype != torch.uint8:
        raise MisfitError(
            f"{wanted}, got {found.dtype}; leave out what converts to floats or normalises: bytes "
            "become x in [−1, 1] on the device"
        )
    if found.dim() != 3 or not found.numel():
        raise MisfitError(f"{wanted}, got shape {tuple(found.shape)}; change data.transform")
    return found.as_subclass(Tensor)


def tensor_of(picture: Any) -> Tensor:
    """Return a picture of PIL, of one of the modes in CHANNELS, as bytes (C, H, W).

    Args:
        picture: The picture.
    """
    array = np.array(picture)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def converted(picture: Tensor, mode: str) -> Tensor:
    """Return a picture in another colour mode, as PIL converts it.

    Args:
        picture: Bytes of 1 (L), 2 (LA), 3 (RGB) or 4 (RGBA) channels.
        mode: L, RGB or RGBA.

    Shapes:
        picture (c, H, W); result (C, H, W).
    """
    from PIL import Image

    if len(picture) == CHANNELS[mode]:
        return picture
    array = picture.permute(1, 2, 0).numpy() if len(picture) > 1 else picture[0].numpy()
    return tensor_of(Image.fromarray(np.ascontiguousarray(array)).convert(mode))


def library_versions() -> list[str]:
    """The versions of the libraries that change pictures, on which single bytes may depend."""
    return [f"{name} {version(name)}" for name in ("pillow", "torch", "torchvision")]


def protocol_of(data: Any) -> dict[str, Any]:
    """What a number must say of how its images were made; empty if nothing was changed.

    Args:
        data: An `DataModule`, or any other.
    """
    transforms: Transforms | None = getattr(data, "transforms", None)
    kind = getattr(data, "kind", "image")
    found: Mapping[str, Any] = {
        "kind": None if kind == "image" else kind,
        "normalize": getattr(data, "normalize", None),
        "mode": getattr(data, "mode", None),
        "transform": transforms.fixed().description if transforms else None,
        "val_share": getattr(data, "val_share", None),
        "buckets": [[*size] for size in getattr(getattr(data, "buckets", None), "sizes", ())],
    }
    return {name: value for name, value in found.items() if value}
