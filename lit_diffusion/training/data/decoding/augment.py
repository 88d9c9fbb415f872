"""Augmentation that does not leak: images are moved at random, and the network is told how.

Turned and enlarged images are further examples for a small data set, but a model that simply
trains on them makes such images as well. Here the numbers a that describe what was done are an
input of the network (see `nn.augment`), and a = 0, nothing, is what all sampling and measuring
asks for. Each image has its own map of the plane, with the origin in its middle,

    x ↦ T · A · R · S · F x    flip F, scale S, rotation R, anisotropy A, translation T

and the nine numbers, zero where nothing was done:

    a₀, a₁    1 if mirrored left to right, top to bottom
    a₂        the scale is 2^(scaling·a₂)
    a₃, a₄    cos φ − 1 and sin φ of the angle of the rotation
    a₅, a₆    stretched by 2^(anisotropy·r) along the angle θ and as much compressed across it;
              (r cos 2θ, r sin 2θ), so that equal numbers are equal maps (θ and θ + π are the same)
    a₇, a₈    moved by translation·a of the width, of the height

The numbers are a function of (seed, epoch, example) alone. They travel with the batch, and the
images are moved where the network is, as floats: on a GPU this costs next to nothing, and no grey
level is rounded. An image to which nothing was done keeps every bit, and so does a mirrored one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample

from lit_diffusion.training.data.reading.order import AUGMENT, uniform

if TYPE_CHECKING:
    from lit_diffusion.training.data.module import DataModule

__all__ = ["NUMBERS", "Augment"]

NUMBERS = 9  # that describe one augmentation
FINER = 2  # samples along each side of a pixel, against aliasing where an image is shrunk


@dataclasses.dataclass(frozen=True)
class Augment:
    """Random changes of the training images that the network is told of, and so do not leak.

    For small data sets, on which a model would otherwise overfit. Each change but the mirroring is
    made with the same probability, independently of the others. The defaults are those of the
    paper for CIFAR-10, apart from `y_flip`, which is 0.06 there.

    Args:
        probability: With which an image is scaled, and so on for each change, 0 to 1.
        x_flip: Probability of mirroring an image left to right, 0 to 1.
        y_flip: Probability of mirroring it top to bottom, 0 to 1.
        scaling: Standard deviation of the scale's binary logarithm, 0 to 1; 0 for none.
        rotation: Largest angle in degrees to either side, 0 to 180; 0 for none.
        anisotropy: Standard deviation of the binary logarithm of the stretch, 0 to 1; 0 for none.
        translation: Standard deviation of the way, as a share of the side, 0 to 1; 0 for none.

    Raises:
        ValueError: If a number is out of its range, or nothing is ever changed.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, Appendix F.2.
    """

    probability: float = 0.12
    x_flip: float = 0.5
    y_flip: float = 0.0
    scaling: float = 0.2
    rotation: float = 180.0
    anisotropy: float = 0.2
    translation: float = 0.125

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            most = 180 if name == "rotation" else 1
            if not 0 <= value <= most:
                raise ValueError(f"data.augment.{name} must be from 0 to {most}, got {value}")
        moves = self.probability and any(
            (self.scaling, self.rotation, self.anisotropy, self.translation)
        )
        if not (moves or self.x_flip or self.y_flip):
            raise ValueError(
                "data.augment changes no image, got probability 0 or nothing to do with it; set "
                "data.augment to null for none"
            )

    def describe(
        self, seed: int, epochs: Sequence[int] | npt.NDArray[Any], indices: npt.ArrayLike
    ) -> Tensor:
        """The numbers that say what is to be done to each example.

        Args:
            seed: Of the run.
            epochs: Epoch of each example.
            indices: Index of each example in its split.

        Shapes:
            epochs (B,); indices (B,); result (B, 9), float32.
        """
        u = uniform(seed, epochs, indices, AUGMENT, 12)
        chosen = u[:, 2:6] < self.probability
        normal = torch.special.ndtri(u[:, 6:10])
        turn = math.radians(self.rotation) * (2 * u[:, 10] - 1)
        twice = 2 * math.pi * u[:, 11]
        found = torch.stack(
            [
                u[:, 0] < self.x_flip,
                u[:, 1] < self.y_flip,
                normal[:, 0] * (chosen[:, 0] & (self.scaling > 0)),
                (turn.cos() - 1) * chosen[:, 1],
                turn.sin() * chosen[:, 1],
                normal[:, 1] * twice.cos() * (chosen[:, 2] & (self.anisotropy > 0)),
                normal[:, 1] * twice.sin() * (chosen[:, 2] & (self.anisotropy > 0)),
                normal[:, 2] * (chosen[:, 3] & (self.translation > 0)),
                normal[:, 3] * (chosen[:, 3] & (self.translation > 0)),
            ],
            dim=1,
        )
        return found.float() + 0.0  # −0 would be a sign without a meaning

    def __call__(self, x: Tensor, augment: Tensor) -> Tensor:
        """Move images as the numbers say.

        What lies outside of an image is its mirror image. Bicubic interpolation at four points of
        each pixel, whose mean is taken.

        Args:
            x: Images in [−1, 1].
            augment: From `describe`.

        Shapes:
            x (B, C, H, W), floats; augment (B, 9); result (B, C, H, W), in [−1, 1].
        """
        chosen = augment.bool()[:, :, None, None, None]
        x = torch.where(chosen[:, 0], x.flip(3), x)
        x = torch.where(chosen[:, 1], x.flip(2), x)
        moved = chosen[:, 2:].any(dim=1)
        if x.device.type == "cpu":  # elsewhere the choice would wait for the device
            rows = moved.flatten().nonzero()[:, 0]
            return x.index_copy(0, rows, self._moved(x[rows], augment[rows])) if len(rows) else x
        return torch.where(moved, self._moved(x, augment), x)

    def _moved(self, x: Tensor, augment: Tensor) -> Tensor:
        """The images after scale, rotation, anisotropy and translation."""
        height, width = x.shape[2:]
        side = x.new_tensor([width, height])
        columns, rows = (
            (torch.arange(FINER * n, dtype=x.dtype, device=x.device) + 0.5) / FINER - n / 2
            for n in (width, height)
        )
        place = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), dim=-1)
        shift = self.translation * augment[:, 7:].to(x.dtype) * side
        source = (place - shift[:, None, None]) @ self._inverse(augment.to(x.dtype)).mT[:, None]
        grid = source * (2 / side)
        finer = grid_sample(x, grid, "bicubic", "reflection", align_corners=False)
        return avg_pool2d(finer, FINER).clamp(-1, 1)

    def _inverse(self, augment: Tensor) -> Tensor:
        """(A R S)⁻¹ = S⁻¹ Rᵀ A⁻¹, (B, 2, 2), on (column, row)."""
        _, _, scale, cos, sin, along, across, _, _ = augment.unbind(dim=1)
        cos = cos + 1
        back = torch.stack([cos, sin, -sin, cos], dim=1).view(-1, 2, 2)
        # A = 2^(anisotropy·M) with M = [[a₅, a₆], [a₆, −a₅]] = r · a reflection, M² = r².
        r = torch.hypot(along, across)
        power = math.log(2) * self.anisotropy * r
        slope = -power.sinh() / r.clamp(min=torch.finfo(r.dtype).tiny)
        along, across = slope * along, slope * across
        squeeze = torch.stack(
            [power.cosh() + along, across, across, power.cosh() - along], dim=1
        ).view(-1, 2, 2)
        return torch.exp2(-self.scaling * scale)[:, None, None] * back @ squeeze


def settings_of(augment: Augment | None) -> dict[str, Any] | None:
    """The arguments as plain data, None for no augmentation.

    Args:
        augment: The augmentation.
    """
    return None if augment is None else dataclasses.asdict(augment)


def check_first(data: DataModule, like: npt.NDArray[Any]) -> None:
    """Raise an error if floats are to be mirrored or augmented, or bytes to be normalised.

    Args:
        data: Has the arguments.
        like: An example.

    Raises:
        ValueError: If they are.
    """
    if data.horizontal_flip and like.dtype.kind == "f":
        raise ValueError(
            "data.horizontal_flip mirrors images, and these are floats: the mirror image of a "
            "latent is not the latent of the mirror image; set it to false"
        )
    if data.normalize is not None and like.dtype.kind != "f":
        raise ValueError(
            "data.normalize is for floats, and these are bytes, which always become [−1, 1], got "
            f"{data.normalize}; leave it out"
        )
    if data.augment is not None and (like.ndim != 3 or like.dtype != np.uint8):
        raise ValueError(
            f"data.augment moves images of bytes (C, H, W), got {like.dtype} of shape "
            f"{like.shape}; set data.augment to null"
        )
