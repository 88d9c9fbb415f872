"""Networks of the `diffusers` library, adapted to take λ instead of a timestep.

A diffusers model takes its noise level as a *timestep*, the index of that level on the chain that
it was trained on. Here every network takes λ, so the adapter keeps the levels of the chain and
converts λ to timesteps. The label −1, "no label", which diffusers does not have, becomes one more
row of the model's table of classes. The adapter is then a network like any other.

diffusers is an optional dependency: it is imported when the first such model is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lit_diffusion.models.extras import import_diffusers
from lit_diffusion.schedules import BetaSchedule, NoiseSchedule

__all__ = ["DiffusersNetwork"]


def _unet_arguments(
    shape: tuple[int, int, int], num_classes: int | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a UNet2DModel's config that follow from images and classes."""
    channels, height, width = shape
    factor = 2 ** (len(config.get("block_out_channels", range(4))) - 1)
    if height % factor or width % factor:
        raise ValueError(
            f"DiffusersNetwork: a UNet2DModel with {factor} times coarser features needs sides "
            f"that are multiples of {factor}, got {height}x{width}: give fewer block_out_channels."
        )
    return {
        "sample_size": [height, width],
        "in_channels": channels,
        "out_channels": channels,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
        "class_embed_type": None,
        "time_embedding_type": "positional",  # the other types take integers only
    }


def _dit_arguments(
    shape: tuple[int, int, int], num_classes: int | None, config: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of a DiTTransformer2DModel's config that follow from images and classes."""
    channels, height, width = shape
    patch = config.get("patch_size", 2)
    if height != width or height % patch:
        raise ValueError(
            "DiffusersNetwork: a DiTTransformer2DModel needs square images whose side is a "
            f"multiple of patch_size={patch}, got {height}x{width}."
        )
    return {
        "sample_size": height,
        "in_channels": channels,
        "out_channels": channels,
        "num_embeds_ada_norm": num_classes or 0,  # it adds a row for "no label" itself
    }


_MODELS = {"UNet2DModel": _unet_arguments, "DiTTransformer2DModel": _dit_arguments}


class DiffusersNetwork(nn.Module):
    """A U-Net or a DiT of diffusers as a network: model(z, timestep(λ), label).

    For published weights, for comparisons, and as a network that is known to work. The model is
    made from the name of its class and its config, as in a config.json of diffusers; entries that
    follow from the images and their classes are filled in.

    The timestep is the index of λ on a chain of `timesteps` levels: exactly i at the i-th level,
    linear in λ between two levels, and extrapolated linearly beyond both ends, so that no two λ
    share one. The default is DDPM's chain, on which λ from 9.2 to −10.1 is 0 to 999.

    Args:
        model: UNet2DModel or DiTTransformer2DModel.
        config: Arguments of that class, such as block_out_channels; None means its defaults,
            which make a large network.
        num_classes: Number of classes, for a class-conditional network; None for none. The
            model's table of classes gets one more row, for "no label".
        shape: (C, H, W) of the images.
        schedule: The chain to whose levels timesteps refer; None means DDPM's, `BetaSchedule()`.
        timesteps: Number of levels of the chain, at least 2.

    Shapes:
        z (B, C, H, W), logsnr (B,), label (B,) int64 in [−1, num_classes) or None → (B, C, H, W).
        Label −1 means "no label", None means all −1.

    Raises:
        ModuleNotFoundError: If diffusers is not installed.
        ValueError: If there is no such model, if its config does not fit the model or the images,
            or if the chain has fewer than two levels.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239; Peebles & Xie
        (2022), Scalable Diffusion Models with Transformers, arXiv:2212.09748.
    """

    def __init__(
        self,
        model: str = "UNet2DModel",
        config: dict[str, Any] | None = None,
        num_classes: int | None = None,
        shape: tuple[int, int, int] = (1, 8, 8),
        schedule: NoiseSchedule | None = None,
        timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if model not in _MODELS:
            raise ValueError(
                f"DiffusersNetwork: expected a model of {' or '.join(_MODELS)}, got {model!r}."
            )
        if timesteps < 2:
            raise ValueError(f"DiffusersNetwork: timesteps must be at least 2, got {timesteps}.")
        channels, height, width = shape
        self.model = model
        self.config = {} if config is None else dict(config)
        self.num_classes = num_classes
        self.shape = (channels, height, width)
        self.schedule = BetaSchedule() if schedule is None else schedule
        self.timesteps = timesteps
        self.network = self._made()
        t = torch.linspace(1, 0, timesteps, dtype=torch.float64)
        # Networks get λ in float32; the table is rounded to it, so that a level of the chain has
        # exactly its own timestep. It is not a buffer, which a model in bfloat16 would round.
        self._rising = self.schedule.logsnr(t).detach().float()

    def _made(self) -> nn.Module:
        # Published files also name their class and version. A null is passed on: it may differ
        # from the default.
        given = {k: v for k, v in self.config.items() if not k.startswith("_")}
        follows = _MODELS[self.model](self.shape, self.num_classes, given)
        for name, value in follows.items():
            if name != "sample_size" and given.get(name, value) != value:
                raise ValueError(
                    f"DiffusersNetwork: for images of shape {self.shape} and "
                    f"num_classes={self.num_classes} expected {name}={value} in the config of "
                    f"{self.model}, got {given[name]!r}; leave it out."
                )
        try:
            made: nn.Module = getattr(import_diffusers(), self.model)(**(given | follows))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"DiffusersNetwork: {self.model} cannot be made from this config: {error}"
            ) from error
        for part in made.modules():
            # Labels are dropped by label_dropout, as for every network, not a second time here.
            if hasattr(part, "token_drop"):
                part.dropout_prob = 0.0  # type: ignore[assignment]
        return made

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless the model takes images of this shape.

        A UNet2DModel takes all sides that it can halve. A DiTTransformer2DModel has a table of the
        places of its own image, and takes no other.

        Args:
            shape: (C, H, W).

        Raises:
            ValueError: If it does not.
        """
        if tuple(shape) == self.shape:
            return
        if self.model != "UNet2DModel" or len(shape) != 3 or shape[0] != self.shape[0]:
            kind = "any size" if self.model == "UNet2DModel" else f"the size {self.shape[1:]}"
            raise ValueError(
                f"this {self.model} takes images of {self.shape[0]} channels and {kind}, got "
                f"{tuple(shape)}."
            )
        channels, height, width = shape
        _unet_arguments((channels, height, width), self.num_classes, self.config)

    def timestep(self, logsnr: Tensor) -> Tensor:
        """The index of λ on the chain, 0 at its cleanest level.

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), float32.
        """
        if self._rising.device != logsnr.device:
            self._rising = self._rising.to(logsnr.device)
        rising, logsnr = self._rising, logsnr.float()
        after = torch.searchsorted(rising, logsnr).clamp(1, len(rising) - 1)
        start, end = rising[after - 1], rising[after]
        return len(rising) - after - (logsnr - start) / (end - start)

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Map noisy images to a prediction of the same shape and type."""
        if self.num_classes is None and label is not None:
            raise ValueError(
                "this DiffusersNetwork was built without classes (num_classes=None) but got a "
                "label; give num_classes, or pass no label."
            )
        none = self.num_classes or 0  # the row for "no label", after those of the classes
        if label is None:
            label = torch.full((len(z),), none, device=z.device)
        label = torch.where(label < 0, none, label)
        if self.num_classes is None and self.model == "UNet2DModel":
            label = None  # it has no table of classes
        out: Tensor = self.network(z, self.timestep(logsnr), label).sample
        return out.to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments except for the modules, which are shown as submodules."""
        return (
            f"model={self.model!r}, num_classes={self.num_classes}, "
            f"shape={self.shape}, timesteps={self.timesteps}"
        )
