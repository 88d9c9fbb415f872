"""A resumed run: the state of the checkpoint, the settings of the config, and nothing left out."""

from __future__ import annotations

import functools
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, Timer
from torch import Tensor
from torch.optim import Optimizer

from lit_diffusion.training.lightning_internals import count_steps, validate_before_training
from lit_diffusion.training.restore.settings import (
    Settings,
    changes,
    continue_schedule,
    refuse_bad_numbers,
    refuse_other_state,
    settings_of,
    with_own_settings,
)
from lit_diffusion.training.run.messages import inform
from lit_diffusion.training.run.trainer import all_callbacks

__all__ = ["Resume"]

Made = list[tuple[Optimizer, Any]]
# Keys of a checkpoint.
BEGUN = "settings"  # as the run began with them
METRICS = "callback_metrics"


class Resume(L.Callback):
    """Restores the state of a checkpoint and keeps the settings of the config.

    `LitDiffusion` adds it by itself. Moments and positions are the checkpoint's. The learning
    rate and its schedule, the patience of `EarlyStopping` and all other settings are those of the
    resumed run from its first step on, and what differs is reported. `max_time` is the time of
    each job by itself. A checkpoint also has the metrics that callbacks monitor, and a run that is
    resumed from one that was saved before the validation of its step begins with that validation.
    An evaluation is logged at the step of the weights.
    """

    # No hook comes between Lightning's restoring of the optimizers and of the schedules, so the
    # latter's states are kept from it and restored as soon as the optimizer is.

    def __init__(self) -> None:
        self._made: Made = []  # each optimizer with its schedule
        self._now: list[Settings] = []
        self._before: list[Settings] = []
        self._groups: dict[int, Any] = {}  # of each optimizer in the checkpoint
        self._schedules: list[dict[str, Any]] = []
        self._metrics: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._counted = False  # whether an evaluation has set the trainer's steps

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the states that Lightning would restore together with their settings."""
        if trainer.state.fn != "fit":
            return
        self._before = [Settings(**one) for one in checkpoint.get(BEGUN, [])]
        self._metrics = checkpoint.get(METRICS, {})
        if trainer.strategy.lightning_restore_optimizer:
            self._schedules, checkpoint["lr_schedulers"] = checkpoint["lr_schedulers"], []
        states = checkpoint["callbacks"]
        for callback in all_callbacks(trainer):
            state = states.get(callback.state_key)
            if isinstance(callback, Timer) and state is not None:
                states[callback.state_key] = {}
            elif isinstance(callback, EarlyStopping) and state is not None:
                then, now = state["patience"], callback.patience
                states[callback.state_key] = {**state, "patience": now}
                if then != now:
                    inform(
                        f"Note: patience of EarlyStopping was {then} in the checkpoint and is "
                        f"now {now}"
                    )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the settings, and see to it that the states of optimizers do not replace them."""
        schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
        scheduled = [schedule.optimizer for schedule in schedules]
        alone = [one for one in trainer.optimizers if all(one is not o for o in scheduled)]
        self._made = [*zip(scheduled, schedules, strict=True), *((one, None) for one in alone)]
        self._now = [settings_of(*made) for made in self._made]
        for optimizer in trainer.optimizers:
            refuse_bad_numbers(optimizer)
            self._hooks += [
                optimizer.register_load_state_dict_pre_hook(self._keep_settings),
                optimizer.register_load_state_dict_post_hook(
                    functools.partial(self._continue, trainer)
                ),
            ]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the monitored metrics, and a validation that is due."""
        for hook in self._hooks:
            hook.remove()
        metrics = {name: value.to(pl_module.device) for name, value in self._metrics.items()}
        trainer.callback_metrics.update(metrics)
        self._before, self._groups, self._schedules = [], {}, []
        self._metrics, self._hooks = {}, []
        validate_before_training(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the settings that the run began with, and the monitored metrics."""
        checkpoint[BEGUN] = [one._asdict() for one in self._now]
        checkpoint[METRICS] = {
            name: value.detach().cpu()
            for name, value in trainer.callback_metrics.items()
            if not name.startswith("throughput/")  # of the machine, which differ from run to run
        }

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Update `ReduceLROnPlateau` after the first epoch, which Lightning leaves out."""
        if trainer.fit_loop.restarting and trainer.is_last_batch:
            trainer.fit_loop.epoch_loop.update_lr_schedulers("epoch", True)

    def on_fit_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Let the model know its number of steps."""
        pl_module.trained_steps = trainer.global_step

    def _count(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Count the steps behind the weights that are evaluated."""
        if trainer.state.fn != "fit" and trainer.global_step == 0:
            count_steps(trainer, pl_module.trained_steps)
            self._counted = True

    on_validation_start = on_test_start = on_predict_start = _count

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the trainer as it was, so that it may train afterwards."""
        if self._counted:
            count_steps(trainer, 0)
            self._counted = False

    def _keep_settings(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        """What is loaded into an optimizer in place of a state."""
        number = self._numbers(optimizer)[0]
        self._groups[number] = state["param_groups"]
        return with_own_settings(state, self._begun(number), self._now[number])

    def _continue(self, trainer: L.Trainer, optimizer: Optimizer) -> None:
        """Restore the schedules of an optimizer that has just been restored."""
        refuse_other_state(optimizer)
        numbers = self._numbers(optimizer)
        for number in numbers:
            now, before = self._now[number], self._begun(number)
            if before is not None:
                for change in changes(before, now):
                    inform(f"Note: {change}")
            schedule = self._made[number][1]
            if schedule is None or not trainer.strategy.lightning_restore_optimizer:
                continue
            saved = None
            if number < len(self._schedules):
                begun = now if before is None else before
                saved = begun._replace(
                    groups=self._groups[numbers[0]], values=self._schedules[number]
                )
            config = trainer.lr_scheduler_configs[number]
            done = trainer.global_step if config.interval == "step" else trainer.current_epoch
            continue_schedule(schedule, saved, before, now, done // config.frequency)

    def _numbers(self, optimizer: Optimizer) -> list[int]:
        return [number for number, made in enumerate(self._made) if made[0] is optimizer]

    def _begun(self, number: int) -> Settings | None:
        return self._before[number] if number < len(self._before) else None
