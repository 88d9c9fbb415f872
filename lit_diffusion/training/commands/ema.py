"""The command `ema`: write another average of a run's weights (post-hoc EMA)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_diffusion.averaging import PowerProfile, Snapshot, reconstruct
from lit_diffusion.training.commands.shell.choices import (
    name_checkpoint,
    resolve_checkpoint,
    run_of,
)
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.run.checkpoints import (
    ABOUT_DATA,
    CLASS_NAMES,
    WholeCheckpointIO,
    load_checkpoint,
    model_class,
)
from lit_diffusion.training.run.snapshots import (
    Magnitudes,
    Stored,
    folder_of,
    magnitudes,
    mix,
    read_snapshots,
)
from lit_diffusion.training.run.weights import named_averages, weights_alone

__all__ = ["Available", "Average", "ema"]

#: Largest error of a reconstruction, relative to the average's distance from the weights.
LIMIT = 0.05


class Average(NamedTuple):
    """An average that was written as a checkpoint."""

    name: str
    step: int
    path: Path
    note: str  # how accurate it is

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}{self.note}\n{self.path}"


class Available(NamedTuple):
    """The averages that a run has, and those that can be reconstructed."""

    step: int  # of the checkpoint
    followed: list[str]
    snapshots: dict[str, list[int]]  # the steps of the snapshots of each average
    reach: str  # "": there are no snapshots

    def __str__(self) -> str:
        followed = ", ".join(self.followed) or "none"
        lines = [f"In the checkpoint, of step {self.step}: {followed}"]
        for name, steps in self.snapshots.items():
            lines.append(f"Snapshots of {name} at step {', '.join(map(str, steps))}")
        return "\n".join([*lines, self.reach or "No snapshots."])


def ema(
    run: str | Path,
    sigma_rel: float | None = None,
    decay: float | None = None,
    step: int | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    root: str | Path | None = None,
) -> Average | Available:
    """Write another average of a run's weights as a checkpoint (post-hoc EMA), or list them.

    The average is reconstructed from the snapshots of the callback Averages, or taken from the
    checkpoint if it is there. Without sigma_rel and decay the averages of the run are listed.

    Args:
        run: A run folder, a checkpoint in it, or `last` for the newest run.
        sigma_rel: Relative width, in (0, 0.2887].
        decay: Constant decay of an average that the run has kept.
        step: With sigma_rel: use the last snapshot up to this step; the newest by default.
        out: The checkpoint, a .ckpt file; RUN/checkpoints/sigma_rel-…-step-….ckpt by default.
        name: With `last`: only runs of this name.
        root: With `last`: the folder of all runs; runs/ by default.

    Raises:
        ValueError: If the average cannot be reconstructed from the snapshots, or the run has none.
    """
    if sigma_rel is not None and decay is not None:
        raise UsageError(f"expected one of --sigma_rel and --decay, got {sigma_rel} and {decay}.")
    if out is not None and Path(out).suffix != ".ckpt":
        raise UsageError(f"--out must end in .ckpt, got {out}.")
    path = resolve_checkpoint(run, name, root)
    found_run = run_of(path)
    if found_run is None:
        raise UsageError(f"expected a run folder or a checkpoint in one, got {path}.")
    run, checkpoint = found_run, load_checkpoint(path)
    name_checkpoint(path, checkpoint["global_step"])
    stored = read_snapshots(run)
    if sigma_rel is None and decay is None:
        return _available(checkpoint, stored)
    found = _followed(run, checkpoint, sigma_rel, decay, step)
    if found is None:
        assert sigma_rel is not None  # a constant decay is found or refused
        found = _reconstructed(run, stored, sigma_rel, step)
    kind = f"decay-{decay}" if sigma_rel is None else f"sigma_rel-{sigma_rel}"
    if out is None:  # in the run folder, where `evaluate` finds the run's config
        out = run / "checkpoints" / f"{kind}-step-{found.step:07d}.ckpt"
    _write(checkpoint, found, Path(out))
    return Average(found.name, found.step, Path(out), found.note)


class _Weights(NamedTuple):
    """The weights of an average, before they are written."""

    name: str
    step: int
    weights: dict[str, Tensor]
    note: str


def _followed(
    run: Path,
    checkpoint: dict[str, Any],
    sigma_rel: float | None,
    decay: float | None,
    step: int | None,
) -> _Weights | None:
    """The average in the checkpoint; None if it must be reconstructed."""
    followed = named_averages(checkpoint)
    wanted = f"EMA(decay={decay})" if sigma_rel is None else str(PowerProfile(sigma_rel))
    name = next((n for n in followed if n == wanted or n.startswith(f"{wanted[:-1]},")), None)
    if decay is not None and (name is None or step is not None):
        raise UsageError(
            "an average of constant decay cannot be reconstructed from snapshots: expected one "
            f"in the checkpoint of {run}, without --step. It has "
            f"{', '.join(followed) or 'none'}, not {wanted}."
        )
    if name is None or step is not None:
        return None
    return _Weights(name, checkpoint["global_step"], followed[name], ", as kept during training")


def _usable(stored: list[Stored], step: int) -> list[Stored]:
    """The snapshots up to a step whose averages began at the same step as its earliest."""
    begin = min(one.begin for one in stored if one.step == step)
    return [one for one in stored if one.step <= step and one.begin == begin]


class _Fit:
    """The average of a width at the time of the last snapshot, from all of them."""

    def __init__(self, sigma_rel: float, stored: list[Stored], sizes: Magnitudes) -> None:
        target = Snapshot(PowerProfile(sigma_rel), stored[-1].snapshot.updates)
        found = reconstruct(target, [one.snapshot for one in stored], sizes.noise)
        distance = target.updates / (2 * target.profile.power + 1)  # squared, in steps
        beyond = found.error**2 - sizes.noise / distance  # without the error of a snapshot itself
        self.mixture, self.error = found.weights.tolist(), found.error
        self.within_reach = beyond <= LIMIT**2
        share = (distance * sizes.step / sizes.weights) ** 0.5 if sizes.weights else 0.0
        self.expected, self.misfit = share * found.error, share * found.misfit


def _reach(stored: list[Stored], sizes: Magnitudes) -> str:
    """The widths that can be reconstructed accurately enough."""
    tried = {round(0.005 * 1.1**i, 4) for i in range(43)} | {0.2886}
    tried |= {one.snapshot.profile.sigma_rel for one in stored}
    good = [
        sigma_rel for sigma_rel in sorted(tried) if _Fit(sigma_rel, stored, sizes).within_reach
    ]
    return f"{good[0]:g} to {good[-1]:g}"


def _reconstructed(
    run: Path, stored: list[Stored], sigma_rel: float, upto: int | None
) -> _Weights:
    """Reconstruct an average from the snapshots up to a step."""
    if not stored:
        raise UsageError(
            f"there are no snapshots in {folder_of(run)}: they are written by the callback "
            "Averages, which --config with/ema adds to a run."
        )
    steps = [one.step for one in stored if upto is None or one.step <= upto]
    if not steps:
        raise UsageError(
            f"there is no snapshot up to step {upto}: the first of {run} is of step "
            f"{stored[0].step}."
        )
    step = steps[-1]
    stored = _usable(stored, step)
    sizes = magnitudes(stored)
    found = _Fit(sigma_rel, stored, sizes)
    if not found.within_reach:
        raise UsageError(
            f"sigma_rel={sigma_rel} cannot be reconstructed from the snapshots up to step {step}: "
            f"the error would be {found.error:.0%} of its distance from the weights, "
            f"{LIMIT:.0%} is allowed. Possible is {_reach(stored, sizes)}."
        )
    files = len({one.path for one in stored})
    late = f", from step {stored[-1].begin}" if stored[-1].begin else ""
    name = f"EMA(sigma_rel={sigma_rel}, post hoc, {files} snapshots{late})"
    note = (
        f"; relative error about {found.expected:.1e} "
        f"({found.misfit:.1e} without the rounding of the snapshots)"
    )
    return _Weights(name, step, mix(stored, found.mixture), note)


def _write(checkpoint: dict[str, Any], average: _Weights, out: Path) -> None:
    """Write a checkpoint of the same model with these weights; the rest of its state stays."""
    state, weights = checkpoint["state_dict"], average.weights
    strange = [key for key, value in weights.items() if key not in state]
    strange += [key for key in weights if key in state and weights[key].shape != state[key].shape]
    if strange:
        raise UsageError(
            f"the snapshots do not belong to the model of the checkpoint: it has no {strange[0]} "
            f"of shape {tuple(weights[strange[0]].shape)}."
        )
    key = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    new = weights_alone(
        state | weights,
        average.name,
        average.step,
        checkpoint[key],
        checkpoint["epoch"],
        model_class(checkpoint),
    )
    new |= {name: checkpoint[name] for name in (CLASS_NAMES, ABOUT_DATA) if name in checkpoint}
    WholeCheckpointIO().save_checkpoint(new, out)


def _available(checkpoint: dict[str, Any], stored: list[Stored]) -> Available:
    """The averages of a run, and the widths that can be reconstructed."""
    profiles = dict.fromkeys(one.snapshot.profile for one in stored)
    snapshots = {
        str(profile): [one.step for one in stored if one.snapshot.profile == profile]
        for profile in profiles
    }
    reach = ""
    if stored:
        usable = _usable(stored, stored[-1].step)
        widths = _reach(usable, magnitudes(usable))
        reach = f"Possible at step {stored[-1].step}: sigma_rel {widths}"
    return Available(checkpoint["global_step"], list(named_averages(checkpoint)), snapshots, reach)
