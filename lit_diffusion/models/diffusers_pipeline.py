"""Import published models of the `diffusers` library.

The folder of a pipeline holds a network and a *scheduler*, which is the chain that the network was
trained on together with a sampler. Each part has its equivalent here::

    diffusers                                        lit_diffusion
    UNet2DModel(sample, timestep)                    DiffusersNetwork(z, logsnr)
    betas                                            a schedule of its N levels, num_timesteps
    prediction_type epsilon, sample, v_prediction    EpsPrediction, XPrediction, VPrediction
    DDPMScheduler, variance fixed_small or _large    AncestralSampler, variance 0 or 1
    DDIMScheduler, use_clipped_model_output          DDIMSampler
    clip_sample                                      clip_denoised

From the same noise both sample the same images, up to rounding, where the pipeline's settings are
those of the table. Three settings of a DDIMScheduler are not followed, and a warning at import
names them: with clip_sample, diffusers keeps the ε̂ of the network beside the clipped x̂, and ours
is recomputed from it (their use_clipped_model_output=True); with set_alpha_to_one=False their
last step ends at the first level of the chain, and ours in x̂; with timestep_spacing "linspace"
theirs steps to other levels than those of the next call.

A chain that ends in pure noise (rescale_betas_zero_snr) ends here at λ = −80, where the share of
the signal, 4e−18, is less than the rounding of any number here.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lit_diffusion.models.diffusers_network import DiffusersNetwork
from lit_diffusion.models.extras import import_diffusers
from lit_diffusion.models.pretrained import Pretrained
from lit_diffusion.predictions import EpsPrediction, Prediction, VPrediction, XPrediction
from lit_diffusion.samplers import AncestralSampler, DDIMSampler, Sampler
from lit_diffusion.schedules import BetaSchedule, NoiseSchedule, TableSchedule, chain_levels
from lit_diffusion.weightings import ELBOWeighting

__all__ = ["from_diffusers"]

_PREDICTIONS: dict[str, Callable[[], Prediction]] = {
    "epsilon": EpsPrediction,
    "sample": XPrediction,
    "v_prediction": VPrediction,
}
_VARIANCES = {"fixed_small": 0.0, "fixed_small_log": 0.0, "fixed_large": 1.0}
_PURE_NOISE = -80.0  # in place of −∞
_DDIM_STEPS = 50  # the default of diffusers' own pipeline


def from_diffusers(folder: str | Path) -> Pretrained:
    """Import a published unconditional model: its U-Net, its chain and its sampler.

    The result can be evaluated like any other model: the bound on its own chain, and samples from
    any sampler. The weighting is that of the bound, w = 1, because a pipeline does not record the
    weighting of its training. A `DDPMScheduler` becomes an `AncestralSampler` over all levels; any
    other scheduler of a chain becomes a `DDIMSampler` over the 50 levels that diffusers' DDIM
    visits; a warning names the settings of a `DDIMScheduler` that it does not follow.

    Args:
        folder: The folder of a pipeline, with unet/ and scheduler/ in it or with both configs at
            the top level. `hf download NAME --local-dir FOLDER` fetches one from the Hub.

    Raises:
        ModuleNotFoundError: If diffusers is not installed.
        FileNotFoundError: If it is not such a folder.
        ValueError: If it is not an unconditional UNet2DModel of a chain of betas, or if its
            sampler has no equivalent here.
    """
    folder = Path(folder)
    unet = _read(folder, "unet", "config.json")
    if unet.get("_class_name") != "UNet2DModel" or unet.get("num_class_embeds") is not None:
        raise ValueError(
            f"{folder}: expected an unconditional UNet2DModel, got {unet.get('_class_name')} "
            f"with num_class_embeds={unet.get('num_class_embeds')}."
        )
    if not unet.get("sample_size"):
        raise ValueError(f"{folder}: expected the size of the images as sample_size, got none.")
    scheduler = _scheduler(_read(folder, "scheduler", "scheduler_config.json"))
    schedule = _schedule(scheduler)
    trained = import_diffusers().UNet2DModel.from_pretrained(
        _place(folder, "unet", "config.json").parent, low_cpu_mem_usage=False
    )
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (trained.config.in_channels, height, width)
    network = DiffusersNetwork(
        config={k: v for k, v in trained.config.items() if not k.startswith("_")},
        shape=shape,
        schedule=schedule,
        timesteps=len(scheduler.betas),
    )
    network.network.load_state_dict(trained.state_dict())
    return Pretrained(
        network=network,
        schedule=schedule,
        weighting=ELBOWeighting(),
        prediction=_prediction(scheduler),
        sampler=_sampler(scheduler, schedule),
        num_timesteps=len(scheduler.betas) - 1,
        shape=shape,
        clip_denoised=_clip(scheduler),
    ).eval()


def _place(folder: Path, part: str, name: str) -> Path:
    """The file of a config: in the folder of its part or, in old pipelines, at the top."""
    inner = folder / part / name
    return inner if inner.is_file() else folder / name


def _read(folder: Path, part: str, name: str) -> dict[str, Any]:
    path = _place(folder, part, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"Expected the folder of a diffusers pipeline, with {part}/{name}, got {folder}; "
            "`hf download NAME --local-dir FOLDER` fetches one from the Hub."
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError(f"a {type(config).__name__}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: expected a config of diffusers, got {error}.") from error
    return config


def _scheduler(config: dict[str, Any]) -> Any:
    """The scheduler that a config describes, which must have betas."""
    diffusers = import_diffusers()
    name = str(config.get("_class_name"))
    cls = getattr(diffusers, name, None)
    known = isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin)
    scheduler = cls.from_config(config) if known else None  # type: ignore[union-attr]
    if not hasattr(scheduler, "betas"):
        raise ValueError(
            f"Expected the scheduler of a chain of betas, such as DDPM's, got {name}."
        )
    return scheduler


def _schedule(scheduler: Any) -> NoiseSchedule:
    """The levels of the chain: by a known formula if one gives them, else as a table."""
    levels = torch.tensor(_levels(scheduler), dtype=torch.float64)
    first, last = scheduler.config.get("beta_start", 0), scheduler.config.get("beta_end", 0)
    known: list[NoiseSchedule] = [TableSchedule()]
    if 0 < first < last < 1:
        known.append(BetaSchedule(first, last, len(levels)))
    for schedule in known:
        own = schedule.logsnr(torch.linspace(0, 1, len(levels), dtype=torch.float64))
        if torch.allclose(own, levels, rtol=0, atol=1e-4):  # betas come in float32
            return schedule
    return TableSchedule(tuple(levels.tolist()))


def _levels(scheduler: Any) -> tuple[float, ...]:
    """The levels of the chain, the last of which may be pure noise."""
    betas = scheduler.betas
    if betas[-1] != 1:
        return chain_levels(betas)
    if scheduler.config.get("prediction_type", "epsilon") == "epsilon":
        raise ValueError(
            "Expected a prediction_type of sample or v_prediction for a chain that ends in pure "
            "noise, where ε says nothing of x, got epsilon."
        )
    return (*chain_levels(betas[:-1]), _PURE_NOISE)


def _prediction(scheduler: Any) -> Prediction:
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise ValueError(f"Expected a prediction_type of {', '.join(_PREDICTIONS)}, got {kind!r}.")
    return _PREDICTIONS[kind]()


def _sampler(scheduler: Any, schedule: NoiseSchedule) -> Sampler:
    """The sampler: DDPM's over all levels, or DDIM's over the levels that diffusers visits."""
    diffusers, length = import_diffusers(), len(scheduler.betas)
    if isinstance(scheduler, diffusers.DDPMScheduler):
        kind = scheduler.config.variance_type
        if kind not in _VARIANCES:
            raise ValueError(
                f"Expected a variance_type of {', '.join(_VARIANCES)}, got {kind!r}: networks "
                "that also output variances are not supported."
            )
        return AncestralSampler(length, schedule, _VARIANCES[kind])
    ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
    if isinstance(scheduler, diffusers.DDIMScheduler):
        _name_differences(scheduler.config)
    ddim.set_timesteps(min(_DDIM_STEPS, length))
    t = ddim.timesteps.flip(0).double() / (length - 1)
    return DDIMSampler(len(t), TableSchedule(tuple(schedule.logsnr(t).tolist())))


def _name_differences(config: Any) -> None:
    """Warn of the settings of a DDIMScheduler that our sampler does not follow."""
    differences = {
        "clip_sample=True (here ε̂ is recomputed from the clipped x̂)": config.clip_sample,
        "set_alpha_to_one=False (here the last step ends in x̂)": not config.set_alpha_to_one,
        "timestep_spacing='linspace' (here a step ends at the level of the next call)": (
            config.timestep_spacing == "linspace"
        ),
    }
    if found := [name for name, holds in differences.items() if holds]:
        warnings.warn(
            "The imported DDIMSampler will not sample quite the images of the pipeline: it does "
            f"not follow {'; '.join(found)}.",
            stacklevel=4,
        )


def _clip(scheduler: Any) -> bool:
    """Whether x̂ is clipped to [−1, 1] while sampling."""
    config = scheduler.config
    clip_denoised = bool(config.get("clip_sample", False))
    if config.get("thresholding") or (
        clip_denoised and config.get("clip_sample_range", 1.0) != 1.0
    ):
        raise ValueError(
            "Expected x̂ to be clipped at 1 or not at all, got "
            f"clip_sample_range={config.get('clip_sample_range')} and "
            f"thresholding={config.get('thresholding')}."
        )
    return clip_denoised
