"""The settings of optimizers and schedules, which a resumed run takes from its own config.

torch saves settings together with state: `load_state_dict` restores lr and weight_decay beside the
moments, and T_max beside the position. A resumed run needs the state of the checkpoint and the
settings of its own config. To tell them apart, a checkpoint also has the values as they were when
its run began:

    a value is restored from the checkpoint if training has changed it and the config has not.

The learning rate after n steps is then that of a new schedule after n steps, which is found by
taking them, except where it depends on more than the step (`ReduceLROnPlateau`).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

__all__ = [
    "Settings",
    "changes",
    "continue_schedule",
    "merged",
    "refuse_bad_numbers",
    "refuse_other_state",
    "settings_of",
    "with_own_settings",
]

Values = dict[str, Any]
#: What a learning-rate schedule sets in the parameter groups of its optimizer.
SCHEDULED = ("lr", "initial_lr", "momentum", "betas")


class Settings(NamedTuple):
    """The values of an optimizer and of its learning-rate schedule.

    Args:
        optimizer: Name of the class.
        groups: The parameter groups, without the parameters.
        schedule: Name of the class; empty if there is no schedule.
        values: The state of the schedule.
    """

    optimizer: str
    groups: list[Values]
    schedule: str = ""
    values: Values = {}  # noqa: RUF012 — never changed


def settings_of(optimizer: Optimizer, schedule: Any = None) -> Settings:
    """The values of an optimizer and its schedule at this moment, as plain data.

    Args:
        optimizer: The optimizer.
        schedule: Its learning-rate schedule, or None.
    """
    groups = [
        _copied({key: value for key, value in group.items() if key != "params"})
        for group in optimizer.param_groups
    ]
    if schedule is None:
        return Settings(type(optimizer).__name__, groups)
    values = _copied(schedule.state_dict())
    return Settings(type(optimizer).__name__, groups, type(schedule).__name__, values)


def merged(saved: Values, before: Values, now: Values) -> Values:
    """What training has changed and the config has not, from a checkpoint; the rest as it is now.

    Args:
        saved: Values in the checkpoint.
        before: The same when its run began.
        now: Values of this run before its first step.

    Example:
        >>> before, saved = {"patience": 3, "best": 9.0}, {"patience": 3, "best": 1.0}
        >>> merged(saved, before, {"patience": 5, "best": 9.0})
        {'patience': 5, 'best': 1.0}
    """
    added = {key: value for key, value in saved.items() if key not in now and key not in before}
    return added | {
        key: saved[key] if key in saved and key in before and _same(before[key], value) else value
        for key, value in now.items()
    }


def with_own_settings(state: Values, before: Settings | None, now: Settings) -> Values:
    """The state of an optimizer in a checkpoint, with the settings of this run.

    Args:
        state: The state, which stays as it is.
        before: Of the checkpoint's run when it began; None if that is not known.
        now: Of this run before its first step.
    """
    saved = state["param_groups"]
    begun = [_unscheduled(group) for group in saved] if before is None else before.groups
    if not len(saved) == len(begun) == len(now.groups):
        return state  # torch says what is wrong
    groups = [
        {**merged(*three), "params": three[0]["params"]}
        for three in zip(saved, begun, now.groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def continue_schedule(
    schedule: Any,
    saved: Settings | None,
    before: Settings | None,
    now: Settings,
    steps: int,
) -> None:
    """Set a learning-rate schedule to a position, with the rates of its optimizer.

    Args:
        schedule: As it was made; its optimizer has been restored `with_own_settings`.
        saved: The values in the checkpoint; None if it has no such schedule.
        before: Of the checkpoint's run when it began; None if that is not known.
        now: Of this run before its first step.
        steps: How often it has been updated, if the checkpoint does not count that.

    Raises:
        ValueError: If the schedule has no such position.
    """
    alike = saved is not None and saved.schedule == now.schedule
    if _needs_metric(schedule):
        if saved is not None and alike and before is not None:
            schedule.load_state_dict(merged(saved.values, before.values, now.values))
            _keep_reduction(schedule.optimizer, saved, before, now)
        elif saved is not None and alike:
            schedule.load_state_dict(saved.values)
    elif saved is not None and _same(before, now) and not _has_functions(schedule):
        schedule.load_state_dict(saved.values)  # the optimizer has its rates already
    else:
        counted = _updates(saved.values) if saved is not None and alike else None
        _repeat(schedule, now, steps if counted is None else counted)


def _repeat(schedule: Any, now: Settings, steps: int) -> None:
    """Take the steps of a schedule again, which is exact where it is a function of the step."""
    groups = schedule.optimizer.param_groups
    restored = [dict(group) for group in groups]
    for group, begin in zip(groups, now.groups, strict=True):
        group.update(_copied(begin))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has taken none
            for _ in range(steps):
                schedule.step()
    except ValueError as error:
        raise ValueError(
            f"{now.schedule} ends before step {steps}, from which this run would continue: give "
            f"it more steps. ({error})"
        ) from error
    for group, kept, begin in zip(groups, restored, now.groups, strict=True):
        for key, value in begin.items():
            if key not in SCHEDULED and _same(group[key], value):
                group[key] = kept[key]


def _keep_reduction(
    optimizer: Optimizer, saved: Settings, before: Settings, now: Settings
) -> None:
    """Reduce a changed learning rate by the factor by which the former one has been reduced."""
    for groups in zip(
        optimizer.param_groups, saved.groups, before.groups, now.groups, strict=True
    ):
        group, late, early, new = groups
        if early["lr"] != new["lr"] and early["lr"]:
            group["lr"] = new["lr"] * (late["lr"] / early["lr"])


def changes(before: Settings, now: Settings) -> Iterator[str]:
    """What differs between the settings of a checkpoint's run and this run's, a phrase for each.

    Args:
        before: Of the checkpoint's run when it began.
        now: Of this run before its first step.

    Example:
        >>> import torch
        >>> before, now = (torch.optim.SGD([torch.zeros(1)], lr=lr) for lr in (0.1, 0.2))
        >>> print(*changes(settings_of(before), settings_of(now)))
        lr was 0.1 in the checkpoint and is now 0.2
    """
    if before.optimizer != now.optimizer:
        yield _changed("the optimizer", before.optimizer, now.optimizer)
    for number, groups in enumerate(zip(before.groups, now.groups, strict=False)):
        which = f" of parameter group {number}" if number else ""
        yield from _differences(_unscheduled(groups[0]), _unscheduled(groups[1]), which)
    if before.schedule != now.schedule:
        kinds = (before.schedule or "none", now.schedule or "none")
        yield _changed("the learning-rate schedule", *kinds)
    else:
        yield from _differences(before.values, now.values, f" of {now.schedule}")


def _differences(before: Values, now: Values, which: str) -> Iterator[str]:
    for key, value in now.items():
        if key == "_schedulers":
            parts = zip(before.get(key, []), value, strict=False)
            for number, pair in enumerate(parts):
                yield from _differences(*pair, f"{which}, part {number}")
        elif key in before and not _same(before[key], value) and _is_argument(key):
            yield _changed(f"{key.strip('_')}{which}", before[key], value)


def _is_argument(key: str) -> bool:
    """Whether a value of a schedule was given to it, and not computed from the learning rate."""
    return key == "_milestones" or not (key.startswith("_") or key in ("base_lrs", "min_lrs"))


def _changed(name: str, before: Any, now: Any) -> str:
    return f"{name} was {before} in the checkpoint and is now {now}"


def refuse_bad_numbers(optimizer: Optimizer) -> None:
    """Refuse settings that are not finite and rates below 0, of which torch accepts some.

    Args:
        optimizer: The optimizer.

    Raises:
        ValueError: If there is such a number.
    """
    name = type(optimizer).__name__
    for group in optimizer.param_groups:
        for key, value in group.items():
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, float) and not abs(number) < float("inf"):
                    raise ValueError(f"{name}: {key} must be finite, got {value}.")
        if not 0 <= float(group["lr"]) < float("inf"):
            raise ValueError(f"{name}: lr must be at least 0 and finite, got {group['lr']}.")


def refuse_other_state(optimizer: Optimizer) -> None:
    """Refuse a restored state that lacks what the optimizer needs: that of another kind.

    What it needs is seen in a step with a parameter of the same shape.

    Args:
        optimizer: Its state has been loaded.

    Raises:
        ValueError: If something is missing.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not (kept := optimizer.state.get(parameter)):
                continue
            like = torch.zeros_like(parameter, requires_grad=True)
            like.grad = torch.zeros_like(parameter)
            twin = copy.copy(optimizer)
            twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": [like]}]
            try:
                twin.step()
            except Exception:  # it needs more than a gradient
                return
            needed = {key for key, value in twin.state[like].items() if value is not None}
            if missing := needed - kept.keys():
                raise ValueError(
                    f"The checkpoint's optimizer is another: {type(optimizer).__name__} needs "
                    f"{', '.join(sorted(missing))}, got {', '.join(kept)}. Set it back, or start "
                    "a new run with --init_from, which takes the weights alone."
                )
            break  # the others of the group are alike


def _unscheduled(group: Values) -> Values:
    """A parameter group with the learning rate from which a schedule starts."""
    kept = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
    return {**kept, "lr": group.get("initial_lr", group["lr"])}


def _needs_metric(schedule: Any) -> bool:
    """Whether a schedule depends on what was measured, and so not on the step alone."""
    wanted = inspect.signature(schedule.step).parameters.values()
    return isinstance(schedule, ReduceLROnPlateau) or any(
        one.default is one.empty and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)
        for one in wanted
    )


def _has_functions(value: Any) -> bool:
    """Whether a schedule has functions, of which two cannot be compared."""
    if isinstance(value, LRScheduler):
        return any(_has_functions(v) for k, v in vars(value).items() if k != "optimizer")
    if isinstance(value, list | tuple):
        return any(map(_has_functions, value))
    return callable(value)


def _updates(values: Values) -> int | None:
    """How often a schedule has been updated; None if its state does not say."""
    while "last_epoch" not in values and values.get("_schedulers"):
        values = values["_schedulers"][0]
    return values.get("last_epoch")


def _copied(value: Any) -> Any:
    """A copy that later steps do not change; of what is not plain data, the name of its class."""
    if isinstance(value, Mapping):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_copied, value))
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value if isinstance(value, int | float | str | None) else type(value).__name__


def _same(one: Any, other: Any) -> bool:
    one, other = (v.tolist() if isinstance(v, Tensor) else v for v in (one, other))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(_same(v, other[key]) for key, v in one.items())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)
