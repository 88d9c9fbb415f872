"""Trained models for inference: loading and sampling need torch only, not Lightning.

    from lit_diffusion import load_pretrained
    model = load_pretrained("exported")              # the folder `lit-diffusion export` wrote
    images = model.sample(16, torch.Generator().manual_seed(0))

A folder holds the weights, model.safetensors, and the arguments of the model, config.json. Both
are plain data, and loading them executes no code. Classes that the config names are imported from
allowed modules only, as for checkpoints (see `description`). The config also has the SHA-256 of
the weights, which is compared: safetensors has no checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lit_diffusion.decoders import Decoder
from lit_diffusion.denoisers import Denoiser
from lit_diffusion.description import build
from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.models.base import SamplingModel, declared_conditions
from lit_diffusion.models.shape import find_shape
from lit_diffusion.nn import UNet
from lit_diffusion.predictions import Prediction
from lit_diffusion.samplers import DDIMSampler, Sampler
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.weightings import Weighting

__all__ = ["Pretrained", "load_pretrained"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class Pretrained(SamplingModel):
    """A trained diffusion model: denoiser, loss and sampler, without training.

    It takes the arguments of `LitDiffusion` that define the model, with the same defaults, and has
    the same state_dict. From the same generators both sample the same images, bit for bit.

    Args:
        network: Maps (z, logsnr, label, further conditions) to z's shape; None means a `UNet` for
            shape, by default (1, 8, 8).
        schedule: Density p(λ) of training, which also defines the range of λ; None means cosine.
        weighting: Weighting w(λ) of training; None means `SigmoidWeighting()`, or with a decoder
            `ELBOWeighting()`.
        prediction: What the network outputs; None means `VPrediction()`.
        sampler: The sampler of images; None means `DDIMSampler()`.
        num_timesteps: Number of steps of a discrete chain; None means continuous time.
        decoder: The decoder of the bound, if the whole bound was trained; None if not.
        shape: Channels, height and width; None means those of the network.
        label_dropout: Probability with which training dropped labels and conditions.
        conditions: Further inputs of the network, by the names of its arguments; None means those
            that it declares.
        clip_denoised: Keep x̂ within [−1, 1] while sampling.

    Example:
        >>> model = Pretrained(shape=(1, 8, 8), sampler=DDIMSampler(steps=2))
        >>> model.sample(3, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        weighting: Weighting | None = None,
        prediction: Prediction | None = None,
        sampler: Sampler | None = None,
        num_timesteps: int | None = None,
        decoder: Decoder | None = None,
        shape: tuple[int, ...] | None = None,
        label_dropout: float = 0.1,
        conditions: Sequence[str] | None = None,
        clip_denoised: bool = True,
    ) -> None:
        super().__init__()
        if network is None:
            network = UNet(shape=find_shape(None, shape) or (1, 8, 8))
        self._shape = find_shape(network, shape)
        self.denoiser = Denoiser(network, prediction)
        self.loss = DiffusionLoss(schedule, weighting, num_timesteps, decoder)
        self._sampler = DDIMSampler() if sampler is None else sampler
        self.conditions = declared_conditions(network) if conditions is None else (*conditions,)
        self.label_dropout = label_dropout
        self.clip_denoised = clip_denoised
        self.sampler_in_range()  # refuses a sampler that leaves the range

    @property
    def network(self) -> nn.Module:
        """The network behind the denoiser."""
        return self.denoiser.network

    @property
    def prediction(self) -> Prediction:
        """What the network outputs."""
        return self.denoiser.prediction

    @property
    def schedule(self) -> NoiseSchedule:
        """The density from which λ was sampled in training."""
        return self.loss.schedule

    @property
    def weighting(self) -> Weighting:
        """What was optimised."""
        return self.loss.weighting

    @property
    def num_timesteps(self) -> int | None:
        """Number of steps of the chain; None means continuous time."""
        return self.loss.num_timesteps

    @property
    def decoder(self) -> Decoder | None:
        """The decoder of the bound, if the whole bound was trained."""
        return self.loss.decoder


def load_pretrained(folder: str | Path) -> Pretrained:
    """Load a model that `lit-diffusion export` wrote, on the CPU and in evaluation mode.

    No code in the folder is executed, and only classes of allowed modules are constructed: those
    of this library, of PyTorch, of installed plug-in packages and of the program itself, and
    those given to `lit_diffusion.description.allow`.

    Args:
        folder: The folder.

    Raises:
        FileNotFoundError: If it is not such a folder.
        ValueError: If it is damaged, or names a class that is not allowed or does not exist.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"Expected a folder that `lit-diffusion export` wrote, got {folder}, which has no "
                f"{name}."
            )
    config = _read(folder / CONFIG)
    _check(folder / WEIGHTS, config.get("sha256"))
    model = _make(folder / CONFIG, config["model"])
    model.class_names = config.get("class_names")
    model.set_about_data(config.get("data"))
    _fill(model, folder / WEIGHTS)
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    """The config of an export."""
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        described = config["model"]
        if described["class_path"] != "lit_diffusion.Pretrained":
            raise KeyError("lit_diffusion.Pretrained")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a config that `lit-diffusion export` wrote: expected JSON with a "
            f"model of class lit_diffusion.Pretrained, got {type(error).__name__}: {error}."
        ) from error
    return config


def _check(path: Path, expected: str | None) -> None:
    """Compare the weights with the SHA-256 that a config has of them, if it has one."""
    if expected is None:  # a folder that somebody assembled by hand
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ValueError(
            f"{path} is damaged, or belongs to another config: expected a file of SHA-256 "
            f"{expected}, got {found}. Copy or download the folder again."
        )


def _make(path: Path, described: dict[str, Any]) -> Pretrained:
    """The model that a config describes, with untrained weights."""
    try:
        model: Pretrained = build(described, Pretrained)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} describes a model that cannot be built: {error}") from error
    return model


def _fill(model: Pretrained, path: Path) -> None:
    """Load the weights of a file into a model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} does not hold the weights of the model beside it, or is damaged: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
