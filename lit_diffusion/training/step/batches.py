"""Batches of any loader, in the form that the steps read.

    {"image": x, "label": y, …}, (x, y), (x,) or x
      → named        entries of other names, or of more positions, by `keys`
      → standard    {"image": x, "label": y, …}, bytes as x in [−1, 1]
      → Numbered    the same, with "index", the number of each example in its data set
      → FirstBatch  looks once whether the values are images in [−1, 1]

`DataModule` delivers all of that by itself. A loader of your own may leave the numbers out:
the examples are then counted, in the order in which they come.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.exact import at_least_float32
from lit_diffusion.models import SamplingModel
from lit_diffusion.models.shape import Shape, find_shape
from lit_diffusion.nn import check_shape
from lit_diffusion.training.data.reading.columns import TEXT
from lit_diffusion.training.restore.rebuild import remember
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.step.conditions import check_labels, from_batch, prompt_bytes
from lit_diffusion.training.step.ranks import largest, place

__all__ = ["BatchReader", "FirstBatch", "Numbered", "check_keys", "named", "standard"]

_FORMS = "a dict with 'image', a pair (image, label), or a tensor of images"
_BEYOND = 1.1  # an image that was resized may exceed [−1, 1] by a little


def standard(batch: Any, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch as a dictionary, its images floats; a batch of that form is returned as it is.

    Args:
        batch: A dictionary with "image", and "label" if there are labels; (image, label),
            (image,), or images alone.
        dtype: That of the model; float64 makes the images float64 as well.

    Shapes:
        images (B, C, H, W), floats, or bytes from 0 to 255; labels (B,), integers.

    Raises:
        ValueError: If it has none of these forms, or its images are other integers.

    Example:
        >>> standard((torch.zeros(2, 1, 8, 8), torch.tensor([3, 5])))["label"]
        tensor([3, 5])
    """
    if isinstance(batch, Mapping):
        found = batch if isinstance(batch, dict) else dict(batch)
    elif isinstance(batch, Tensor):
        found = {"image": batch}
    elif isinstance(batch, (tuple, list)) and len(batch) in (1, 2):
        found = dict(zip(("image", "label"), batch, strict=False))
    else:
        raise ValueError(f"Expected a batch that is {_FORMS}, got {_described(batch)}.")
    x = found.get("image")
    if not isinstance(x, Tensor):
        raise ValueError(f"Expected a batch that is {_FORMS}, got {_described(batch)}.")
    if x.dtype == torch.uint8:
        image = x.float().div_(127.5).sub_(1.0)
    elif not x.is_floating_point():
        raise ValueError(
            f"Expected images that are floats in [−1, 1] or bytes, got {x.dtype}: convert them."
        )
    else:
        image = at_least_float32(x)
    if dtype == torch.float64:
        image = image.double()
    return found if image is x else {**found, "image": image}


def check_keys(keys: Mapping[str, str | int] | None) -> dict[str, str | int] | None:
    """The keys of a model, checked.

    Args:
        keys: Our names, each with the name or the position of the entry in a batch of the data.

    Raises:
        ValueError: If they are no such mapping.
    """
    if keys is None:
        return None
    positions = [isinstance(place, int) and not isinstance(place, bool) for place in keys.values()]
    places = [isinstance(place, str) for place in keys.values()]
    if (
        not keys
        or not all(isinstance(name, str) for name in keys)
        or not (all(positions) or all(places))
    ):
        raise ValueError(
            "Expected keys that are names of entries of a batch, as {'image': 'pixel_values'}, or "
            f"positions, as {{'image': 0, 'label': 2}}, got {dict(keys)}."
        )
    return dict(keys)


def named(batch: Any, keys: Mapping[str, str | int]) -> dict[str, Any]:
    """A batch with its entries under our names; of a dictionary, the others keep theirs.

    Args:
        batch: A dictionary, tuple or list.
        keys: Our names, each with the name or the position of the entry in the batch.

    Raises:
        ValueError: If the batch has no such entry; the message lists what it has.

    Example:
        >>> named((torch.zeros(2, 1, 8, 8), "unused", torch.tensor([3, 5])), {"label": 2})
        {'label': tensor([3, 5])}
    """
    if not isinstance(batch, (Mapping, tuple, list)):
        raise ValueError(
            f"Expected a batch with the entries of keys={dict(keys)}, got {_described(batch)}: "
            "leave keys out."
        )
    known: dict[Any, Any] = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
    for name, key in keys.items():
        if key not in known:
            raise ValueError(
                f"Expected an entry {key!r} for {name!r}, which the model's keys name, got "
                f"{_described(batch)}: correct model.keys."
            )
    others = known if isinstance(batch, Mapping) else {}
    return {**others, **{name: known[key] for name, key in keys.items()}}


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a dict with {', '.join(map(repr, batch)) or 'nothing'}"
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


class Numbered:
    """The batches of one evaluation, each with the numbers of its examples.

    Where a batch has no "index", the examples are counted: the n-th example of rank r of R has the
    number n·R + r, the same in each evaluation. The step takes each batch with `next`; callbacks
    ask for the same batch again and get the same answer.
    """

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        """Count from 0 again."""
        self._seen = 0
        self._given: Any = None
        self._answer: dict[str, Any] = {}

    def next(self, given: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """Add what a batch lacks: "index", and "total", which is None if unknown.

        Args:
            given: The batch as the loader gave it, by which it is recognised.
            batch: The same, as `standard` returns it.
        """
        numbered = {"total": None, **batch}
        if "index" not in batch:
            x = batch["image"]
            rank, world = place()
            number = self._seen + torch.arange(len(x), device=x.device)
            self._seen += len(x)
            numbered |= {"index": number * world + rank, "total": None}
        total = numbered["total"]
        if isinstance(total, Tensor):
            numbered["total"] = int(total.flatten()[0])  # one for all, or one for each example
        self._given, self._answer = given, numbered
        return numbered

    def __call__(self, given: Any, batch: dict[str, Any]) -> dict[str, Any]:
        """The same for a batch that may be the present one.

        Args:
            given: As for `next`.
            batch: As for `next`.
        """
        return self._answer if given is self._given else self.next(given, batch)


class FirstBatch:
    """A look at the first batch of training, which waits for the device once.

    Images outside of [−1, 1] can be trained on but not sampled if the model clips. Images in
    [0, 1] can be both, but are probably a mistake.
    """

    def __init__(self) -> None:
        self._seen = False

    def __call__(self, model: SamplingModel, batch: dict[str, Any], cond: dict[str, Any]) -> None:
        """Check a batch, if it is the first; a collective.

        Args:
            model: The model.
            batch: As `standard` returns it.
            cond: Its conditions, as `LitDiffusion.condition` returns them.

        Raises:
            ValueError: If its images exceed [−1, 1] and the model clips, or if the network knows
                classes and the batch has no labels.
        """
        if self._seen:
            return
        self._seen = True
        if model.num_classes is not None and "label" not in cond:
            raise ValueError(
                f"Expected labels, for the network has num_classes={model.num_classes}, got a "
                f"batch with {', '.join(batch)}: add labels (data.label_key names their column), "
                "or build the network without num_classes."
            )
        x = batch["image"].detach()
        low, high = largest(torch.stack([-x.min(), x.max()]).float()).tolist()
        low = -low
        came = f"got values from {low:.4g} to {high:.4g} in the first batch"
        if model.clip_denoised and max(-low, high) > _BEYOND:
            raise ValueError(
                f"Expected images in [−1, 1], {came}: {_remedy(low, high)}; for data that are not "
                "in [−1, 1], such as latents, set clip_denoised=False."
            )
        if 0 <= low < high <= _BEYOND:
            warn(f"Expected x in [−1, 1], {came}: scale them by 2 x − 1 if they are in [0, 1].")


def _remedy(low: float, high: float) -> str:
    """How to scale values of a range to [−1, 1]."""
    if low < 0:
        return "scale them"
    return "scale them by x / 127.5 − 1" if high <= 255 else "scale them by their largest value"


def _strings(value: Any) -> bool:
    return isinstance(value, Sequence) and all(isinstance(one, str) for one in value)


class BatchReader(SamplingModel, L.LightningModule):
    """A model in training that reads the batches of any loader."""

    _numbered: Numbered
    keys: dict[str, str | int] | None = None
    shapes: tuple[Shape, ...] = ()  # of the data, where they have several

    def expect(self, data: Any) -> None:
        """Take examples of all shapes that some data have, if they have several.

        Args:
            data: With an attribute `shapes`; without it, examples have the model's shape only.

        Raises:
            ValueError: If the network does not take one of them.
        """
        self.shapes = tuple(map(tuple, getattr(data, "shapes", ())))
        for shape in self.shapes:
            try:
                check_shape(self.denoiser.network, shape)
            except ValueError as problem:
                raise ValueError(f"The data have examples of several shapes: {problem}") from None

    def standard(self, batch: Any) -> dict[str, Any]:
        """A batch of any loader in the form that every step reads.

        Args:
            batch: A dictionary with "image", a pair (image, label), or images alone; with `keys`,
                a dictionary or tuple that has their entries. Its texts may be strings.

        Raises:
            ValueError: If it has another form, or its images another shape than the model's.
        """
        batch = batch if self.keys is None else named(batch, self.keys)
        found = standard(batch, torch.float64 if self.dtype == torch.float64 else torch.float32)
        came = tuple(found["image"].shape[1:])
        if self._shape is None:  # nothing else has said
            self._shape = find_shape(None, came)
            remember(self, {"shape": came})
        if came not in (self.shapes or (self.shape,)):
            raise ValueError(
                f"Expected images of shape {self.shape}, for which the model is built, got "
                f"{came} in a batch: build the network with shape={came}, or convert the "
                "images."
            )
        if TEXT in self.conditions and _strings(found.get(TEXT)):
            texts = prompt_bytes(self, found[TEXT]).to(found["image"].device)
            found = {**found, TEXT: texts}
        return found

    def numbered(self, batch: Any) -> dict[str, Any]:
        """The same, with the "index" and "total" that the step of an evaluation uses.

        Args:
            batch: As for `standard`.
        """
        return self._numbered(batch, self.standard(batch))

    def condition(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """The conditions of a batch, by the names of the network's arguments.

        These are the label, if the network knows classes, and `conditions`. A model that computes
        them from something else, such as an encoded text, overrides this.

        Args:
            batch: A batch of the data.

        Raises:
            ValueError: If a condition is not in the batch, or a label is no class of the network
                (checked on the CPU only).
        """
        cond = from_batch(self.conditions, batch)
        if self.num_classes is None or "label" not in batch:
            return cond
        label = batch["label"]
        check_labels(label, self.num_classes)
        return {"label": label, **cond}
