"""The command `lit-diffusion ema`: another average of the weights of a run, as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_diffusion.averaging import PowerProfile, Snapshot, reconstruct
from lit_diffusion.training.commands.parsing import DiffusionParser, fail
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO, load_checkpoint
from lit_diffusion.training.run.snapshots import (
    Scatter,
    Stored,
    folder_of,
    mix,
    read_snapshots,
    scatter,
)
from lit_diffusion.training.run.weights import named_averages, weights_alone

__all__ = ["ema"]

#: What an average may be off by, of its distance from the weights, beside the rounding of a file.
LIMIT = 0.05


def ema(argv: list[str]) -> str:
    """Write an average of a run's weights as a checkpoint; return what it is and where.

    Args:
        argv: The command line after `ema`.
    """
    parser = DiffusionParser(
        prog="lit-diffusion ema",
        description="Make another average of a run's weights, from the snapshots that the "
        "callback Averages left, or out of its checkpoint. Without --sigma_rel and --decay: list "
        "what there is.",
    )
    parser.add_argument("--run", type=str, required=True, help="The run folder.")
    parser.add_argument(
        "--sigma_rel", type=float | None, default=None, help="Relative width, in (0, 0.2887]."
    )
    parser.add_argument(
        "--decay", type=float | None, default=None, help="A constant decay that was followed."
    )
    parser.add_argument(
        "--step",
        type=int | None,
        default=None,
        help="With --sigma_rel: at the last snapshot up to this step; the newest by default.",
    )
    parser.add_argument(
        "--out",
        type=str | None,
        default=None,
        help="The checkpoint, a .ckpt; RUN/checkpoints/sigma_rel-…-step-….ckpt by default.",
    )
    config = parser.parse_args(argv)
    run = Path(config.run)
    checkpoint = _checkpoint(run)
    stored = read_snapshots(run)
    if config.sigma_rel is None and config.decay is None:
        return _listing(run, checkpoint, stored)
    if config.sigma_rel is not None and config.decay is not None:
        fail(f"one of --sigma_rel and --decay, got {config.sigma_rel} and {config.decay}.")
    if config.out is not None and Path(config.out).suffix != ".ckpt":
        fail(f"--out must end in .ckpt, got {config.out}.")
    wanted = f"EMA(decay={config.decay})"
    if config.sigma_rel is not None:
        wanted = str(PowerProfile(config.sigma_rel))
    followed = named_averages(checkpoint)
    name = next((n for n in followed if n == wanted or n.startswith(f"{wanted[:-1]},")), None)
    if config.decay is not None and (name is None or config.step is not None):
        fail(
            f"a constant decay is not made from snapshots: expected one that the checkpoint of "
            f"{run} has, without --step. It has {', '.join(followed) or 'none'}, not {wanted}."
        )
    if name is not None and config.step is None:
        step, weights = checkpoint["global_step"], followed[name]
        told = f"{name} at step {step}, as it was followed"
    else:
        step, name, weights, told = _reconstructed(run, stored, config.sigma_rel, config.step)
    kind = (
        f"sigma_rel-{config.sigma_rel}"
        if config.sigma_rel is not None
        else f"decay-{config.decay}"
    )
    out = run / "checkpoints" / f"{kind}-step-{step:07d}.ckpt"  # where `evaluate` knows the run
    out = out if config.out is None else Path(config.out)
    _write(checkpoint, weights, name, step, out)
    return f"{told}\n{out}"


def _checkpoint(run: Path) -> dict[str, Any]:
    """The newest checkpoint of a run, which says what the weights belong to."""
    if not run.is_dir():
        fail(f"--run must be the folder of a run, and there is none at {run}.")
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        fail(f"expected {path}, which says how the model is made; it is not there.")
    return load_checkpoint(path)


def _usable(stored: list[Stored], step: int) -> list[Stored]:
    """Those up to a step that began when the earliest of that step did: one clock for all."""
    begin = min(one.begin for one in stored if one.step == step)
    return [one for one in stored if one.step <= step and one.begin == begin]


class _Fit:
    """The average of a width at the time of the last snapshot, from all of them."""

    def __init__(self, sigma_rel: float, stored: list[Stored], sizes: Scatter) -> None:
        target = Snapshot(PowerProfile(sigma_rel), stored[-1].snapshot.updates)
        found = reconstruct(target, [one.snapshot for one in stored], sizes.noise)
        distance = target.updates / (2 * target.profile.power + 1)  # squared, in steps
        beyond = found.error**2 - sizes.noise / distance  # a snapshot itself is off by that much
        self.mixture, self.error = found.weights.tolist(), found.error
        self.within_reach = beyond <= LIMIT**2
        share = (distance * sizes.step / sizes.weights) ** 0.5 if sizes.weights else 0.0
        self.expected, self.misfit = share * found.error, share * found.misfit


def _reach(stored: list[Stored], sizes: Scatter) -> str:
    """The widths that can be made well enough."""
    tried = {round(0.005 * 1.1**i, 4) for i in range(43)} | {0.2886}
    tried |= {one.snapshot.profile.sigma_rel for one in stored}
    good = [
        sigma_rel for sigma_rel in sorted(tried) if _Fit(sigma_rel, stored, sizes).within_reach
    ]
    return f"{good[0]:g} to {good[-1]:g}"


def _reconstructed(
    run: Path, stored: list[Stored], sigma_rel: float, upto: int | None
) -> tuple[int, str, dict[str, Tensor], str]:
    """Step, name, weights and a description of an average that was not followed."""
    if not stored:
        fail(
            f"there are no snapshots in {folder_of(run)}; the callback Averages writes them, "
            "which --config configs/with/ema.yaml adds to a run."
        )
    steps = [one.step for one in stored if upto is None or one.step <= upto]
    if not steps:
        fail(f"there is no snapshot up to step {upto}: the first of {run} is of {stored[0].step}.")
    step = steps[-1]
    stored = _usable(stored, step)
    sizes = scatter(stored)
    found = _Fit(sigma_rel, stored, sizes)
    if not found.within_reach:
        fail(
            f"sigma_rel={sigma_rel} is out of reach of the snapshots up to step {step}: it would "
            f"be off by {found.error:.0%} of its distance from the weights, {LIMIT:.0%} are "
            f"allowed. Within reach are {_reach(stored, sizes)}."
        )
    files = len({one.path for one in stored})
    late = f", from step {stored[-1].begin}" if stored[-1].begin else ""
    name = f"EMA(sigma_rel={sigma_rel}, post hoc, {files} snapshots{late})"
    told = (
        f"{name} at step {step}; relative error about {found.expected:.1e} "
        f"({found.misfit:.1e} without the rounding of the snapshots)"
    )
    return step, name, mix(stored, found.mixture), told


def _write(
    checkpoint: dict[str, Any], weights: dict[str, Tensor], name: str, step: int, out: Path
) -> None:
    """Write a checkpoint of the same model with these weights; the rest of its state stays."""
    state = checkpoint["state_dict"]
    strange = [key for key, value in weights.items() if key not in state]
    strange += [key for key in weights if key in state and weights[key].shape != state[key].shape]
    if strange:
        fail(
            f"the snapshots are of another model than the checkpoint: it has no {strange[0]} of "
            f"shape {tuple(weights[strange[0]].shape)}."
        )
    key = LightningModule.CHECKPOINT_HYPER_PARAMS_KEY
    new = weights_alone(state | weights, name, step, checkpoint[key], checkpoint["epoch"])
    WholeCheckpointIO().save_checkpoint(new, out)


def _listing(run: Path, checkpoint: dict[str, Any], stored: list[Stored]) -> str:
    """What averages a run has, and which can be made."""
    followed = ", ".join(named_averages(checkpoint)) or "none"
    lines = [f"In the checkpoint, of step {checkpoint['global_step']}: {followed}"]
    for profile in dict.fromkeys(one.snapshot.profile for one in stored):
        steps = [str(one.step) for one in stored if one.snapshot.profile == profile]
        lines.append(f"Snapshots of {profile} at step {', '.join(steps)}")
    if stored:
        usable = _usable(stored, stored[-1].step)
        reach = _reach(usable, scatter(usable))
        lines.append(f"Within reach at step {stored[-1].step}: sigma_rel {reach}")
    else:
        lines.append("No snapshots.")
    return "\n".join(lines)
