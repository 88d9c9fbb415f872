"""Sample images from a denoiser and a sampler, within the range of λ of training.

Both `LitDiffusion`, a model in training, and `Pretrained`, a trained one, inherit this class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.denoisers import ClippedDenoiser, Denoiser, GuidedDenoiser
from lit_diffusion.exact import at_least_float32
from lit_diffusion.gaussian import Generators, noise_like
from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.models.shape import Shape
from lit_diffusion.nn import check_shape
from lit_diffusion.nn.embeddings import TEXT
from lit_diffusion.nn.text import TextEncoder, once, text_bytes
from lit_diffusion.normalization import Normalization
from lit_diffusion.samplers import Sampler
from lit_diffusion.schedules import NoiseSchedule

__all__ = ["SamplingModel", "declared_conditions"]


def declared_conditions(network: nn.Module) -> tuple[str, ...]:
    """The further conditions that a network declares: its `conditions`, and `text` if it has one.

    Args:
        network: The network; one without these attributes declares none.

    Example:
        >>> from lit_diffusion.nn import ByteTransformer, UNet
        >>> declared_conditions(UNet(conditions={"age": 1}, text=ByteTransformer(length=32)))
        ('age', 'text')
    """
    named = tuple(getattr(network, "conditions", None) or ())
    reads = isinstance(getattr(network, "text", None), TextEncoder)
    return (*named, TEXT) if reads else named


class SamplingModel(nn.Module):
    """A model that samples images, with or without classes, conditions and guidance.

    A subclass sets these attributes in its `__init__`.

    Attributes:
        denoiser: (z, λ) → (x̂, ε̂).
        loss: The training loss; its schedule has the range of λ.
        conditions: Further inputs of the network, by the names of its arguments.
        label_dropout: Probability with which training dropped labels and conditions.
        clip_denoised: Keep x̂ within [−1, 1] while sampling.
        class_names: Names of the classes, by their numbers; None if the data did not name them.
        kind: What an example is: image, signal, volume, points, vector or latents.
        normalization: Turns the data into x; None if the data were not normalised.
    """

    denoiser: Denoiser
    loss: DiffusionLoss
    conditions: tuple[str, ...]
    label_dropout: float
    clip_denoised: bool
    class_names: list[str] | None = None
    kind: str = "image"
    normalization: Normalization | None = None
    _shape: Shape | None
    _sampler: Sampler

    @property
    def shape(self) -> Shape:
        """Channels, height and width of the images.

        Raises:
            ValueError: If neither the network nor an argument nor a batch has said so far.
        """
        if self._shape is None:
            raise ValueError(
                "Expected a model that knows the shape of its images, got one whose network has "
                "no attribute shape and that has seen no batch: give the model "
                "shape=(channels, height, width)."
            )
        return self._shape

    def shape_of_size(self, size: int | Sequence[int] | None = None) -> Shape:
        """The shape of samples of another size than that of training.

        Args:
            size: Height and width of images, depth, height and width of volumes, or the length of
                series; None means the size of training.

        Raises:
            ValueError: If the data have another number of axes, or the network does not take it.
        """
        if size is None:
            return self.shape
        sides = (size,) if isinstance(size, int) else tuple(size)
        channels, *trained = self.shape
        if len(sides) != len(trained) or any(side < 1 for side in sides):
            usual = f"such as {'x'.join(map(str, trained))}" if trained else "since they have none"
            raise ValueError(
                f"Expected a size of {len(trained)} positive sides, {usual}, for a model of "
                f"examples of shape {self.shape}, got {'x'.join(map(str, sides))}."
            )
        shape = (channels, *sides)
        if shape != self.shape:
            check_shape(self.denoiser.network, shape)
        return shape

    @property
    def about_data(self) -> dict[str, Any]:
        """Of what kind the data are and how they were normalised, as plain data to be stored."""
        normalization = self.normalization
        return {
            "kind": self.kind,
            "normalization": None if normalization is None else normalization.description,
        }

    def set_about_data(self, about: Mapping[str, Any] | None) -> None:
        """Take what `about_data` returned; None means images.

        Args:
            about: As it was stored.
        """
        about = about or {}
        self.kind = about.get("kind", "image")
        stored = about.get("normalization")
        self.normalization = None if stored is None else Normalization(**stored)

    def restored(self, x: Tensor) -> Tensor:
        """Samples in the unit of the data: x · scale + shift, or x if these were not normalised.

        Args:
            x: Samples, as from `sample`.

        Shapes:
            x and result (n, C, *).
        """
        return x if self.normalization is None else self.normalization.restore(x)

    @property
    def num_classes(self) -> int | None:
        """Number of classes the network knows; None if it takes no labels."""
        return getattr(self.denoiser.network, "num_classes", None)

    @property
    def sampler(self) -> Sampler:
        """The model's own sampler, within the present range of λ."""
        return self.sampler_in_range()

    def sampler_in_range(self, sampler: Sampler | None = None) -> Sampler:
        """A sampler whose noise levels are within the range of λ that this model is trained on.

        Args:
            sampler: None means the model's own.

        Raises:
            ValueError: If its schedule leaves that range.
        """
        sampler = self._sampler if sampler is None else sampler
        schedule: NoiseSchedule = self.loss.schedule
        low, high = schedule.ends
        if sampler.schedule is None:
            own = sampler.default_schedule(low, high)
            return dataclasses.replace(sampler, schedule=own)  # type: ignore[type-var]
        first, last = (float(level) for level in sampler.levels()[[0, -1]])
        if first < low - 1e-6 or last > high + 1e-6:
            raise ValueError(
                f"The sampler visits λ from {first:.6g} to {last:.6g}, but the model is trained "
                f"on [{low:.6g}, {high:.6g}] only: restrict its schedule to that range."
            )
        return sampler

    def check_guidance(self, guidance: float) -> None:
        """Refuse guidance of a model that has learned nothing to guide away from.

        Args:
            guidance: Strength of classifier-free guidance; 1 for none.

        Raises:
            ValueError: If the model has neither classes nor conditions, or training never dropped
                them.
        """
        if guidance == 1:
            return
        if self.num_classes is None and not self.conditions:
            raise ValueError(
                f"Guidance needs classes or other conditions, and this model has none, got "
                f"guidance={guidance:g}: set it to 1."
            )
        if self.label_dropout == 0:
            raise ValueError(
                f"Guidance needs a model that was trained without its conditions as well, got "
                f"guidance={guidance:g} and label_dropout=0: set guidance to 1, or train with "
                "label_dropout=0.1."
            )

    @torch.inference_mode()
    def sample(
        self,
        n: int,
        generator: Generators = None,
        label: Tensor | Sequence[int] | int | None = None,
        sampler: Sampler | None = None,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        progress: Callable[[Any], Iterable[Any]] = iter,
        cond: Mapping[str, Tensor | Sequence[str]] | None = None,
        size: int | Sequence[int] | None = None,
    ) -> Tensor:
        """Sample images.

        Args:
            n: Number of images.
            generator: Source of all noise: None, one, or one for each image.
            label: Class of each image, or one for all; −1 for none; None samples them uniformly.
            sampler: The sampler; None means the model's own.
            guidance: Strength of classifier-free guidance; 1 for none. It needs a model that was
                trained with dropped conditions.
            guidance_interval: Apply guidance only for λ in this interval; None means everywhere.
            progress: Wraps the list of steps, such as tqdm.
            cond: The further conditions, by name; a text may be a list of n strings.
                `drop_condition` makes dropped ones.
            size: Height and width, such as (48, 64), or the length of series, for a network that
                takes other sizes than that of training; None means that of training.

        Shapes:
            label (n,); each condition (n, *); result (n, C, *), float: images in [−1, 1], other
            data as the model reads them, see `restored`.

        Raises:
            ValueError: If labels are given to a model without classes, a condition is missing or
                unknown, there are not n of each, or the model cannot be guided or does not take
                the size.
        """
        first = at_least_float32(next(self.parameters(), torch.empty(0)))  # there may be none
        z = first.new_zeros(n, *self.shape_of_size(size))
        device = z.device
        given = self._conditions(z, cond)
        if self.num_classes is not None:
            given["label"] = self._labels(n, label, generator).to(device)
        elif label is not None:
            raise ValueError("This model was trained without classes: leave label out.")
        denoiser: nn.Module = self.denoiser
        if guidance != 1:
            self.check_guidance(guidance)
            denoiser = GuidedDenoiser(denoiser, guidance, guidance_interval)
        if self.clip_denoised:
            denoiser = ClippedDenoiser(denoiser)
        training = self.training
        self.eval()
        try:
            chosen = self.sampler_in_range(sampler)
            with once(self.denoiser):  # texts are the same at each level
                x = chosen(denoiser, noise_like(z, generator), generator, progress, **given)
        finally:
            self.train(training)
        return x.clamp(-1, 1) if self.clip_denoised else x

    def _conditions(
        self, z: Tensor, cond: Mapping[str, Tensor | Sequence[str]] | None
    ) -> dict[str, Tensor]:
        """The further conditions, checked to have one row for each image."""
        given = {
            name: value if isinstance(value, Tensor) else text_bytes(value)
            for name, value in (cond or {}).items()
        }
        if given.keys() - {"dropped"} != set(self.conditions):
            raise ValueError(
                f"This model takes {', '.join(self.conditions) or 'no further conditions'}, got "
                f"{', '.join(given) or 'none'}: give cond, a tensor of {len(z)} rows for each."
            )
        for name, value in given.items():
            if value.ndim < 1 or len(value) != len(z):
                raise ValueError(
                    f"Expected {len(z)} rows of {name!r}, one for each image, got shape "
                    f"{tuple(value.shape)}."
                )
        return {name: value.to(z.device) for name, value in given.items()}

    def _labels(
        self, n: int, label: Tensor | Sequence[int] | int | None, generator: Generators
    ) -> Tensor:
        """One label for each image; labels are sampled before the noise."""
        classes = self.num_classes
        assert classes is not None
        if label is None:
            # Φ of a normal variable is uniform, and `noise_like` takes one generator per image.
            normal = noise_like(torch.zeros(n, 1, dtype=torch.float64), generator)[:, 0]
            label = (torch.special.ndtr(normal) * classes).long().clamp(max=classes - 1)
        label = torch.as_tensor(label)
        label = label.repeat(n) if label.ndim == 0 else label
        if len(label) != n or bool((label < -1).any() | (label >= classes).any()):
            raise ValueError(
                f"Expected {n} labels from 0 to {classes - 1} (−1 for none), "
                f"got {len(label)}: {label.unique().tolist()}."
            )
        return label
