"""Maintain several averages of the weights, and save snapshots to construct others from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.averaging import ConstantProfile, PowerProfile, Profile, RunningAverage
from lit_diffusion.training.callbacks.ema import name_of, trained_weights
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.snapshots import folder_of, next_step, write_snapshot
from lit_diffusion.training.run.trainer import output_folder

__all__ = ["Averages"]


class Averages(L.Callback):
    """Maintains several averages of the weights, θ̄ ← θ̄ + (1 − d)(θ − θ̄), and saves snapshots.

    The best averaging length is not known before a run, and an average cannot be computed after
    it. From snapshots of two power averages, `lit-diffusion ema` constructs the average of any
    width at any of their steps. The averages themselves are in every checkpoint. Validation and
    samples use the average of `EMA`, not these.

    Args:
        sigma_rels: Relative widths of power averages, each in (0, 0.2887]; saved in the
            snapshots.
        decays: Constant decays d, each in [0, 1); saved in the checkpoints only.
        snapshot_every_n_steps: Optimizer steps between the first ten snapshots, which are written
            to averages/ in the run folder; later ones follow at intervals of a tenth of their
            step, and the last step has one. Each takes two bytes per weight and width. 0 for none.

    Raises:
        ValueError: If a number is outside its range or repeated, or there is none.

    References:
        Karras et al. (2023), Analyzing and Improving the Training Dynamics of Diffusion Models,
        arXiv:2312.02696, section 3.
    """

    # The weights are read only during training, when they are the raw ones. A snapshot is written
    # before the checkpoint of its step, so a run that is killed in between and resumed writes the
    # same file again.

    def __init__(
        self,
        sigma_rels: Sequence[float] = (0.05, 0.1),
        decays: Sequence[float] = (),
        snapshot_every_n_steps: int = 100,
    ) -> None:
        self.sigma_rels, self.decays = list(sigma_rels), list(decays)
        self.snapshot_every_n_steps = snapshot_every_n_steps
        profiles = [*map(PowerProfile, self.sigma_rels), *map(ConstantProfile, self.decays)]
        if not profiles or len(set(profiles)) < len(profiles):
            raise ValueError(
                "Averages: expected at least one std or decay, none repeated, "
                f"got sigma_rels={self.sigma_rels} and decays={self.decays}."
            )
        if snapshot_every_n_steps < 0:
            raise ValueError(
                "Averages: snapshot_every_n_steps must be at least 0, got "
                f"{snapshot_every_n_steps}."
            )
        self._profiles: list[Profile] = profiles
        self._weights: dict[str, Tensor] = {}
        self._averages: list[RunningAverage] = []
        self._loaded: list[dict[str, Any]] = []
        self._run: Path | None = None
        self._last_step = 0
        self._due = 0
        self._written = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Create the averages on the parameters' device, or take them from the checkpoint."""
        self._weights = trained_weights(pl_module)
        weights = list(self._weights.values())
        kept, self._loaded = {one["profile"]: one for one in self._loaded}, []
        self._averages = []
        for profile in self._profiles:
            known = kept.get(str(profile), {"updates": 0, "weights": {}})
            average = RunningAverage(profile, weights, known["updates"])
            begin = [known["weights"].get(name, w) for name, w in self._weights.items()]
            torch._foreach_copy_(average.values, begin)
            self._averages.append(average)
        folder = output_folder(trainer)
        self._run = folder if self.snapshot_every_n_steps else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, and remove later snapshots, which the resumed run will write again."""
        step = self._last_step = trainer.global_step
        late = [str(one.profile) for one in self._averages if step > one.updates == 0]
        if late:
            warn(
                f"Averages: the checkpoint does not contain {', '.join(late)}; averaging starts "
                f"at step {step}."
            )
        if self._run is None:
            return
        self._due = next_step(step, self.snapshot_every_n_steps)
        if trainer.is_global_zero:
            for path in folder_of(self._run).glob("step-*.safetensors"):
                if path.stem.removeprefix("step-").isdigit() and int(path.stem[5:]) > step:
                    path.unlink()
            for path in folder_of(self._run).glob(".step-*.tmp"):  # of a process that was killed
                path.unlink()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Update the averages at each optimizer step, and write a snapshot if one is due."""
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        weights = list(self._weights.values())
        for average in self._averages:
            average.update(weights)
        if self._run is not None and step >= self._due:
            self._write(trainer)
            self._due = next_step(step, self.snapshot_every_n_steps)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write a snapshot of the last step, unless there is one."""
        if self._run is not None and self._written < trainer.global_step:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        """Write the power averages; if that fails, the run continues with a warning."""
        self._written = step = trainer.global_step
        powers = [one for one in self._averages if isinstance(one.profile, PowerProfile)]
        if self._run is None or not trainer.is_global_zero or not powers:
            return
        try:
            path = write_snapshot(self._run, step, list(self._weights), powers)
        except OSError as error:
            warn(f"{error} Training continues.")
        else:
            if path is None:
                warn(f"Averages: no snapshot at step {step}, since a weight is not finite.")

    def state_dict(self) -> dict[str, Any]:
        """Every average, with its name and its number of updates."""
        return {
            "averages": [
                {
                    "profile": str(one.profile),
                    "name": name_of(one.profile, one.updates, self._last_step),
                    "updates": one.updates,
                    "weights": dict(zip(self._weights, one.values, strict=True)),
                }
                for one in self._averages
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the averages until the parameters are on their device."""
        self._loaded = state_dict["averages"]
