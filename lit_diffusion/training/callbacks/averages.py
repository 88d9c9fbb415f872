"""Averages of the weights beside the one that a run is judged by."""

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

__all__ = ["Averages"]


class Averages(L.Callback):
    """Follows the weights by several averages at once, and keeps snapshots to make others from.

    How long to average is not known before a run, and too late to choose after it; from snapshots
    of two power averages `lit-diffusion ema` makes that of any width at any of their steps. The
    averages themselves are in every checkpoint. What validation and samples use is `EMA`'s.

    Args:
        stds: Relative widths σ of power averages, each in (0, 0.2887]. They are in the snapshots.
        decays: Constant decays, each in [0, 1). They are in the checkpoints only.
        snapshot_every_n_steps: Optimizer steps between the first snapshots, in averages/ of the
            run folder; from the tenth on they stand a tenth of their step apart. The last step
            has one, too. Each takes two bytes a weight and width. 0 for none.

    Raises:
        ValueError: If a number is outside its range, there is none, or one twice.

    References:
        Karras et al. (2023), Analyzing and Improving the Training Dynamics of Diffusion Models,
        arXiv:2312.02696, section 3.
    """

    # It reads the weights in training only, where they are the raw ones, and writes to nothing
    # but its own tensors. A snapshot is written before the checkpoint of its step, so a run that
    # is killed in between writes the same file again.

    def __init__(
        self,
        stds: Sequence[float] = (0.05, 0.1),
        decays: Sequence[float] = (),
        snapshot_every_n_steps: int = 100,
    ) -> None:
        self.stds, self.decays = list(stds), list(decays)
        self.snapshot_every_n_steps = snapshot_every_n_steps
        profiles = [*map(PowerProfile, self.stds), *map(ConstantProfile, self.decays)]
        if not profiles or len(set(profiles)) < len(profiles):
            raise ValueError(
                "Averages: at least one sigma_rel or decay, each once, "
                f"got stds={self.stds} and decays={self.decays}."
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
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: every rank asks
        self._run = (
            None if trainer.fast_dev_run or not self.snapshot_every_n_steps else Path(folder)
        )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, and remove snapshots that the run, resumed before them, makes again."""
        step = self._last_step = trainer.global_step
        late = [str(one.profile) for one in self._averages if step > one.updates == 0]
        if late:
            warn(
                f"Averages: the checkpoint does not have {', '.join(late)}; from step {step} on "
                "the weights are averaged."
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
        """Follow the weights, once for each optimizer step, and write what is due."""
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
        """Write the end, unless it is written."""
        if self._run is not None and self._written < trainer.global_step:
            self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        """Put the power averages into a file; if that cannot be, the run goes on."""
        self._written = step = trainer.global_step
        powers = [one for one in self._averages if isinstance(one.profile, PowerProfile)]
        if self._run is None or not trainer.is_global_zero or not powers:
            return
        try:
            path = write_snapshot(self._run, step, list(self._weights), powers)
        except OSError as error:
            warn(f"{error} Training goes on.")
        else:
            if path is None:
                warn(f"Averages: no snapshot at step {step}, it would not be finite.")

    def state_dict(self) -> dict[str, Any]:
        """Every average, with its name and how many updates it has seen."""
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
        """Remember the averages until the parameters are on their device."""
        self._loaded = state_dict["averages"]
