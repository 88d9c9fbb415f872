"""Detect NaN or infinite losses and gradients; stop, or skip the step."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.environment import device_name
from lit_diffusion.training.run.folder import from_here
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.saved_config import config_text
from lit_diffusion.training.run.tolerance import may_fail
from lit_diffusion.training.run.trainer import all_callbacks, log_interval, output_folder
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["Guard", "account", "gather", "plain"]

MAX_STEPS = 1000  # without a check, even if fewer are logged: their batches take memory


@dataclass
class _Step:
    """One optimizer step that has not been checked; its tensors are on the device."""

    number: int
    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch
    overflow: Tensor | None = None  # 1 if a gradient is not finite
    batches: list[dict[str, Any]] = field(default_factory=list)


class Guard(L.Callback):
    """Detects NaN or infinite losses and gradients, records the step, and stops or skips it.

    One such gradient turns every weight into NaN, and a checkpoint saved afterwards replaces a
    good one. With `stop` no checkpoint is written from the bad step on, and the run ends with an
    error at the next step that is logged, validated or saved; until then nothing synchronises
    with the device. With `skip` the optimizer omits the step, so that weights and moments do not
    change, and training continues; the host then waits for the device at every step.

    Each event writes non_finite/step-….json in the run folder, with the examples, noise levels λ
    and losses of the step, and beside it the checkpoint from which `lit-diffusion replay` repeats
    the step. In 16-mixed precision the gradient scaler handles infinite gradients, and only the
    loss is checked.

    Args:
        on_non_finite: `stop` the run or `skip` the step; all ranks do the same.
        max_skips: Maximum number of skipped steps in the whole run, at least 1; one more stops it.
            Each of them may keep a checkpoint.

    Raises:
        ValueError: If on_non_finite is neither, or max_skips below 1; during training at a step
            that is not skipped.
    """

    # An unchecked step is an entry of a list that holds references to existing tensors. Only the
    # gradient is checked immediately, on the device, in one pass over it. Buffers that a network
    # changes in its forward pass, such as those of batch norm, are not restored.

    def __init__(
        self, on_non_finite: Literal["stop", "skip"] = "stop", max_skips: int = 10
    ) -> None:
        if on_non_finite not in ("stop", "skip"):
            raise ValueError(f"Guard: on_non_finite must be stop or skip, got {on_non_finite!r}.")
        if max_skips < 1:
            raise ValueError(f"Guard: max_skips must be at least 1, got {max_skips}.")
        self.on_non_finite = on_non_finite
        self.max_skips = max_skips
        self.skips = 0
        self._now = _Step(0)
        self._steps: list[_Step] = []
        self._skipping = ""  # what is not finite in the step that is being skipped
        self._saved: set[int] = set()  # steps at which this run has a checkpoint
        self._folder: Path | None = None
        self._error: str | None = None  # with which the run ends
        self._one = torch.ones(1)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a run without unchecked steps."""
        folder = output_folder(trainer)
        self._folder = None if folder is None else folder / "non_finite"
        self._one = torch.ones(1, device=pl_module.device)
        self._steps, self._saved, self._error, self._skipping = [], set(), None, ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._now = _Step(trainer.global_step)
        if trainer.ckpt_path is not None:
            self._saved.add(trainer.global_step)

    # During a step ---------------------------------------------------------------------------

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss of a micro-batch, the mean over its examples."""
        self._now.losses.append(loss.detach())

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient before it is clipped; with `skip`, discard it if it is bad."""
        self._now.overflow = torch.zeros_like(self._one)
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if gradients and trainer.precision != "16-mixed":
            # The check of GradScaler, here with a scale of 1, which changes nothing. A norm would
            # cost ten times as much, and may overflow where the gradient is finite.
            torch._amp_foreach_non_finite_check_and_unscale_(
                gradients, self._now.overflow, self._one
            )
        if self.on_non_finite == "skip":
            _, self._skipping = self._first(trainer, [self._now])
            if self._skipping:
                self.skips += 1
                optimizer.zero_grad(set_to_none=True)  # without a gradient nothing is updated

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Keep the micro-batch; record a step that was skipped, and check steps when logging."""
        self._now.batches.append(account(outputs, batch))
        if trainer.global_step == self._now.number:  # a micro-batch of an accumulated step
            return
        step, self._now = self._now, _Step(trainer.global_step)
        if self._skipping:
            what, self._skipping = self._skipping, ""
            sentence = self._record(trainer, pl_module, step, what)
            if self.skips > self.max_skips:
                self._error = f"{sentence} {self.max_skips} steps were skipped before it."
                raise ValueError(self._error)
            warn(f"{sentence} Step skipped, {self.skips} of at most {self.max_skips}.")
        elif self.on_non_finite == "stop":
            self._steps.append(step)
            if trainer.global_step % log_interval(trainer) == 0 or len(self._steps) == MAX_STEPS:
                self._check(trainer, pl_module)

    # The check -------------------------------------------------------------------------------

    def _first(self, trainer: L.Trainer, steps: list[_Step]) -> tuple[int, str]:
        """Index of the first bad step and what is not finite in it, the same on every rank."""
        losses = torch.stack([torch.stack([0 * self._one[0], *s.losses]).sum() for s in steps])
        gradients = torch.cat([self._one * 0 if s.overflow is None else s.overflow for s in steps])
        bad = torch.stack([~losses.isfinite(), gradients > 0], 1).float()
        flags: Any = trainer.strategy.reduce(bad, reduce_op="sum")
        for i, (loss, gradient) in enumerate(flags.tolist()):
            if loss or gradient:
                words = [word for word, flag in (("loss", loss), ("gradient", gradient)) if flag]
                return i, " and ".join(words)
        return -1, ""

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if any step so far was bad."""
        if self._error is not None:
            raise ValueError(self._error)
        steps, self._steps = self._steps, []
        i, what = self._first(trainer, steps) if steps else (-1, "")
        if what:
            self._error = self._record(trainer, pl_module, steps[i], what)
            raise ValueError(self._error)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before weights that may be NaN are validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._check(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check the steps after the last logged one."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Check before a checkpoint replaces a good one."""
        self._check(trainer, pl_module)
        self._saved.add(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        return {"skips": self.skips} if self.skips else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the number of skipped steps."""
        self.skips = state_dict["skips"]

    # The record ------------------------------------------------------------------------------

    def _record(self, trainer: L.Trainer, pl_module: Any, step: _Step, what: str) -> str:
        """Write a step to a file, with all that its replay needs; return one line about it."""
        mine = [plain(batch) for batch in step.batches]
        batches = [
            {"rank": rank, "micro_batch": micro, **batch}
            for rank, ranks in enumerate(gather(trainer, mine))
            for micro, batch in enumerate(ranks)
        ]
        verb = "were" if " and " in what else "was"
        line = f"The {what} of step {step.number} {verb} not finite, {_where(batches)}."
        if self._folder is None:
            return line
        path = self._folder / f"step-{step.number:07d}.json"
        if trainer.is_global_zero:
            with may_fail(path):
                self._folder.mkdir(parents=True, exist_ok=True)
                record = {
                    "step": step.number,
                    "not_finite": what,
                    "seed": pl_module.seed,
                    "world_size": trainer.world_size,
                    "accumulate_grad_batches": trainer.accumulate_grad_batches,
                    "device": device_name(pl_module.device),
                    "torch": torch.__version__,
                    "config": self._keep_config(trainer, path.with_suffix(".yaml")),
                    "checkpoint": self._keep_checkpoint(trainer, self._folder, step.number),
                    "batches": batches,
                }
                rows = [f" {json.dumps(name)}: {json.dumps(v)}" for name, v in record.items()]
                write_whole(path, "{\n" + ",\n".join(rows) + "\n}\n")
        trainer.strategy.barrier("non_finite")  # copying a checkpoint takes time
        shown = shlex.quote(str(from_here(path)))
        return f"{line} `lit-diffusion replay {shown}{_plugins(trainer)}` shows its cause."

    def _keep_config(self, trainer: L.Trainer, path: Path) -> str | None:
        """Save the config of this session; the run folder may have several."""
        for callback in all_callbacks(trainer):
            if isinstance(callback, SaveConfigCallback):
                write_whole(path, config_text(callback.parser, callback.config))
                return path.name
        return None

    def _keep_checkpoint(self, trainer: L.Trainer, folder: Path, step: int) -> str | None:
        """Link the last checkpoint before the step, so that it is kept when it is replaced."""
        folders = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks]
        folders.append(folder.parent / "checkpoints")
        paths = [path for folder in folders if folder for path in Path(folder).glob("*.ckpt")]
        if trainer.ckpt_path is not None:
            paths.append(Path(trainer.ckpt_path))
        found = {}
        for path in paths:
            try:
                checkpoint = load_checkpoint(path)
            except (OSError, ValueError):
                continue
            at = checkpoint["global_step"]
            # A folder may hold files of an earlier run, and weights alone cannot be resumed.
            if at in self._saved and at <= step and "optimizer_states" in checkpoint:
                found[at] = path
        if not found:
            return None
        start = folder / f"start-{max(found):07d}.ckpt"
        start.unlink(missing_ok=True)
        try:
            os.link(found[max(found)], start)
        except OSError:  # another file system, or one without links
            shutil.copyfile(found[max(found)], start)
        return start.name


def account(outputs: Any, batch: Any) -> dict[str, Any]:
    """The examples of a micro-batch, their noise levels λ and their losses.

    Args:
        outputs: The result of training_step.
        batch: The batch that it was called with.

    Shapes:
        each (B,), or None if it is not known.
    """
    outputs = outputs if isinstance(outputs, dict) else {}
    index = batch.get("index") if isinstance(batch, dict) else None
    return {"examples": index, "logsnr": outputs.get("logsnr"), "losses": outputs.get("losses")}


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """The values of all ranks, on each of them; a collective.

    Args:
        trainer: Has the number of ranks.
        value: The value of this rank; anything that can be pickled.
    """
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def plain(batch: dict[str, Tensor | None]) -> dict[str, list[Any] | None]:
    """The lists of numbers that JSON can hold: NaN and infinity are strings."""
    return {
        name: None
        if values is None
        else [x if math.isfinite(x) else str(x) for x in values.tolist()]
        for name, values in batch.items()
    }


def _plugins(trainer: L.Trainer) -> str:
    """The flag that names the plug-ins of the run: a replay imports no others."""
    for callback in all_callbacks(trainer):
        if isinstance(callback, SaveConfigCallback) and (found := callback.config.get("plugins")):
            return f" --plugins {found if isinstance(found, str) else ','.join(found)}"
    return ""


def _where(batches: list[dict[str, Any]]) -> str:
    """The examples whose loss is not finite, or the range of λ if only the gradient is not."""
    every = [
        (example, logsnr, loss)
        for batch in batches
        if batch["logsnr"] is not None
        for example, logsnr, loss in zip(
            batch["examples"] or [None] * len(batch["logsnr"]),
            batch["logsnr"],
            batch["losses"] or batch["logsnr"],
            strict=True,
        )
    ]
    bad = [row for row in every if isinstance(row[2], str)]
    if not every:
        return "at unknown λ"
    if not bad:
        levels = [float(row[1]) for row in every]
        return f"at λ from {min(levels):.4g} to {max(levels):.4g}"
    named = [
        f"λ = {float(logsnr):.4g}" + ("" if example is None else f" of example {example}")
        for example, logsnr, _ in bad[:3]
    ]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"at {', '.join(named)}{more} ({len(bad)} of {len(every)} examples)"
