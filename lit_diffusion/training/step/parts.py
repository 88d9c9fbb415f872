"""Checks of the parts of a model: that each is of its kind, and that they agree."""

from __future__ import annotations

from typing import Any

from torch import nn

from lit_diffusion.predictions import EDMPrediction, Prediction
from lit_diffusion.samplers import Sampler
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.weightings import Weighting

__all__ = ["check_data_std", "check_numbers", "check_parts", "keep_schedule", "turn_on_training"]


def check_parts(
    network: nn.Module,
    schedule: NoiseSchedule,
    weighting: Weighting,
    prediction: Prediction,
    sampler: Sampler,
) -> None:
    """Refuse parts of another kind, and parts that contradict each other.

    Args:
        network: A module.
        schedule: A noise schedule.
        weighting: A weighting.
        prediction: What the network outputs.
        sampler: A sampler.

    Raises:
        TypeError: If a part is of another kind, such as a class that was not called.
        ValueError: If weighting and prediction assume different standard deviations of the data,
            or the schedule learns its ends and the sampler has a schedule with fixed ends.
    """
    for part, family in (
        (schedule, NoiseSchedule),
        (weighting, Weighting),
        (prediction, Prediction),
        (sampler, Sampler),
        (network, nn.Module),
    ):
        if not isinstance(part, family):
            raise TypeError(
                f"LitDiffusion: expected an instance of {family.__name__}, got {part!r}; "
                "if this is a class, call it."
            )
    check_data_std(weighting, prediction)
    if schedule.learns_ends and sampler.schedule is not None:
        raise ValueError(
            f"{type(schedule).__name__} learns its ends, but {type(sampler).__name__} has a "
            "schedule with fixed ends: leave out the sampler's schedule, so that it follows."
        )


def check_data_std(weighting: Weighting, prediction: Prediction) -> None:
    """Refuse a weighting and a prediction that assume different deviations of the data.

    Args:
        weighting: The weighting of the loss.
        prediction: What the network outputs.

    Raises:
        ValueError: If an EDM prediction and a part of the weighting differ in data_std.
    """
    if not isinstance(prediction, EDMPrediction):
        return
    for part in weighting.modules():
        assumed = getattr(part, "data_std", prediction.data_std)
        if assumed != prediction.data_std:
            raise ValueError(
                f"{type(part).__name__} assumes data_std={assumed} and {prediction} another: "
                "give both the same."
            )


def check_numbers(label_dropout: float, schedule_lr: float | None) -> None:
    """Refuse numbers outside of their range.

    Args:
        label_dropout: A probability.
        schedule_lr: A learning rate, or None.

    Raises:
        ValueError: If one is out of its range.
    """
    if not 0 <= label_dropout <= 1:
        raise ValueError(f"label_dropout must be in [0, 1], got {label_dropout}.")
    if schedule_lr is not None and not 0 < schedule_lr < float("inf"):
        raise ValueError(f"schedule_lr must be above 0, got {schedule_lr}.")


def turn_on_training(model: nn.Module) -> None:
    """Put a model that is in evaluation mode as a whole into training mode, for its dropout.

    `load_from_checkpoint` leaves it so. A part whose parameters are all frozen, such as an encoder
    of texts, stays as it is, and so does everything if the model is in training mode: then the
    parts that are not have been chosen.

    Args:
        model: The model.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False)).eval()
        >>> turn_on_training(model)
        >>> [part.training for part in model]
        [True, False]
    """
    if model.training:
        return
    model.training = True
    for part in model.children():
        parameters = list(part.parameters())
        if not parameters or any(p.requires_grad for p in parameters):
            turn_on_training(part)


def keep_schedule(model: nn.Module, state: dict[str, Any]) -> None:
    """Let a resumed run keep its own schedule, where the checkpoint has one of another kind.

    A schedule only chooses where the integral is sampled, so it may differ from the checkpoint's.

    Args:
        model: Has the schedule, as `loss.schedule`.
        state: The checkpoint's state of the model, which is changed in place.
    """
    prefix = "loss.schedule."
    own = {k: v for k, v in model.state_dict().items() if k.startswith(prefix)}
    kept = [name for name in state if name.startswith(prefix)]
    if own.keys() != set(kept):
        for name in kept:
            del state[name]
        state.update(own)
