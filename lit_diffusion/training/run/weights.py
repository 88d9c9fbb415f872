"""Which weights? The raw ones or an average of them: the one place that knows.

    checkpoint["state_dict"]           the weights to sample from: the average, if there is one
    checkpoint["average"]              the name of those weights, such as EMA(decay=0.999)
    checkpoint["current_model_state"]  the raw weights beside an average, to continue training from

A checkpoint without `current_model_state` has one set of weights only. Those it names cannot be
trained further: they were reconstructed after the run, or come from a published model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_diffusion.training.run.checkpoints import MODEL_CLASS

__all__ = [
    "AS_PUBLISHED",
    "RAW",
    "add_average",
    "has_average",
    "named_averages",
    "refuse_weights_alone",
    "take_average",
    "use_raw_weights",
    "weights_alone",
    "weights_in_use",
    "weights_name",
]

RAW = "raw"  # the weights as the optimizer left them
AS_PUBLISHED = "as published"  # weights that were trained elsewhere

_RAW_STATE = "current_model_state"
_SET_ASIDE = "average_model_state"  # in memory only, while a run resumes

Checkpoint = dict[str, Any]


def has_average(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds an average of the weights beside the raw ones.

    Args:
        checkpoint: As `load_checkpoint` returns it.
    """
    return _RAW_STATE in checkpoint


def weights_name(checkpoint: Mapping[str, Any]) -> str:
    """The name of the weights in a checkpoint's `state_dict`.

    Args:
        checkpoint: As `load_checkpoint` returns it.

    Example:
        >>> weights_name({"state_dict": {}})
        'raw'
        >>> weights_name({"state_dict": {}, "average": "EMA(decay=0.9)"})
        'EMA(decay=0.9)'
    """
    unnamed = "an average" if has_average(checkpoint) else RAW  # early checkpoints name none
    return str(checkpoint.get("average", unnamed))


def weights_in_use(module: LightningModule) -> str:
    """The name of the weights that a model has at this moment; a model that keeps none is raw.

    Args:
        module: `LitDiffusion`, whose attribute `weights` is set by whatever replaces its weights.
    """
    return str(getattr(module, "weights", RAW))


def named_averages(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Every average in a checkpoint by its name, the one in `state_dict` first.

    Args:
        checkpoint: As `load_checkpoint` returns it.
    """
    others = checkpoint.get("callbacks", {}).get("Averages", {}).get("averages", [])
    found = {one["name"]: one["weights"] for one in others}
    if has_average(checkpoint) and "average" in checkpoint:
        found = {checkpoint["average"]: checkpoint["state_dict"]} | found
    return found


# Saving ------------------------------------------------------------------------------------------


def add_average(
    checkpoint: Checkpoint, average: Mapping[str, Tensor], raw: Mapping[str, Tensor]
) -> None:
    """Make an average the checkpoint's `state_dict`, and keep the raw weights beside it.

    Args:
        checkpoint: About to be written, with the model's present state in `state_dict`.
        average: Averages of the trained parameters, by their names.
        raw: The raw parameters, where the model's present state is not raw; empty otherwise.
    """
    present = checkpoint["state_dict"]
    checkpoint["state_dict"] = present | dict(average)
    checkpoint[_RAW_STATE] = present | dict(raw)


def weights_alone(
    state: Mapping[str, Tensor],
    name: str,
    step: int,
    hyper_parameters: Mapping[str, Any],
    epoch: int = 0,
    trained_class: str | None = None,
) -> Checkpoint:
    """A checkpoint to sample from and to evaluate, but not to continue training from.

    Args:
        state: The model's whole `state_dict`.
        name: Of these weights.
        step: Optimizer steps of the run that they belong to.
        hyper_parameters: How the model is built, as `LitDiffusion.hparams` holds it.
        epoch: Of that run.
        trained_class: The path of the model's class; None means LitDiffusion.
    """
    named = {} if trained_class is None else {MODEL_CLASS: trained_class}
    return {
        **named,
        "state_dict": dict(state),
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": lightning.__version__,
        "callbacks": {},  # Lightning passes a checkpoint to callbacks only if it has this key
        "average": name,
        LightningModule.CHECKPOINT_HYPER_PARAMS_KEY: dict(hyper_parameters),
    }


# Resuming ----------------------------------------------------------------------------------------


def refuse_weights_alone(checkpoint: Mapping[str, Any]) -> None:
    """Refuse to continue training from a checkpoint that training did not write.

    Args:
        checkpoint: As `load_checkpoint` returns it.

    Raises:
        ValueError: If it has no optimizer state.
    """
    if "optimizer_states" not in checkpoint:
        name = checkpoint.get("average", "no optimizer state")
        raise ValueError(
            f"Expected a checkpoint with optimizer state, got one with weights alone ({name}): to "
            "continue training, use the last.ckpt of its run."
        )


def use_raw_weights(checkpoint: Checkpoint) -> None:
    """Put the raw weights into `state_dict`; the average is set aside for `take_average`.

    Args:
        checkpoint: Of a run that is being resumed.
    """
    if has_average(checkpoint):
        checkpoint[_SET_ASIDE] = checkpoint["state_dict"]
        checkpoint["state_dict"] = checkpoint[_RAW_STATE]


def take_average(checkpoint: Checkpoint) -> dict[str, Tensor] | None:
    """Remove and return the average that `use_raw_weights` set aside; None if there is none.

    The callback that continues the average takes it. If none does, the module refuses to train,
    since the average would be lost.

    Args:
        checkpoint: Of a run that is being resumed.
    """
    average: dict[str, Tensor] | None = checkpoint.pop(_SET_ASIDE, None)
    return average
