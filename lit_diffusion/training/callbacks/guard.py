"""What a run does when a number stops being one."""

from __future__ import annotations

import json
import math
import os
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
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["Guard", "account", "gather", "plain"]

KEPT = 1000  # steps whose λ's are remembered at most, however seldom is logged


@dataclass
class _Step:
    """One optimizer step as it was, on the device: nobody has looked at it yet."""

    number: int
    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch
    overflow: Tensor | None = None  # 1 if a gradient is not finite
    batches: list[dict[str, Any]] = field(default_factory=list)


class Guard(L.Callback):
    """Ends or mends a run whose loss or gradient is NaN or infinite, and writes down the step.

    One such gradient turns every weight into NaN, and a checkpoint that is saved afterwards
    replaces a good one. With `stop` no checkpoint is written from the bad step on, and the run
    ends with an error at the next step that is logged, validated or saved: until then nothing
    waits for the device. With `skip` the optimizer leaves the step out, weights and moments stay
    as they are, and training goes on; the host then waits for the device at every step.

    Each event leaves non_finite/step-….json in the run folder, with the examples, λ's and losses
    of the step, and beside it the checkpoint from which `lit-diffusion replay` goes there again.
    In 16-mixed precision infinite gradients are the scaler's business, and only the loss counts.

    Args:
        on_non_finite: `stop`, or `skip` the step; all ranks do the same.
        max_skips: Steps that may be skipped in the whole run, at least 1; one more stops it.
            Each of them may keep a checkpoint.

    Raises:
        ValueError: If on_non_finite is neither, or max_skips below 1; in training at a step that
            is not skipped.
    """

    # A step is a row in a list until a look, and the tensors in it are those that were there
    # anyway; only the gradient is checked at once, in one pass over it. Buffers that a network
    # changes in its forward pass, such as those of batch norm, are beyond reach.

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
        self._skipping = ""  # what is wrong with the step that is being left out
        self._saved: set[int] = set()  # steps at which this run has a checkpoint
        self._folder: Path | None = None
        self._verdict: str | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Agree on the folder."""
        folder = trainer.log_dir  # a collective: every rank asks
        if folder is None:
            folder = trainer.default_root_dir
        self._folder = None if trainer.fast_dev_run else Path(folder) / "non_finite"
        self._one = torch.ones(1, device=pl_module.device)
        self._steps, self._saved, self._verdict, self._skipping = [], set(), None, ""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note the step, which a resumed run knows only by now."""
        self._now = _Step(trainer.global_step)
        if trainer.ckpt_path is not None:
            self._saved.add(trainer.global_step)

    # Along a step ----------------------------------------------------------------------------

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Keep the loss of a micro-batch, the mean over its examples."""
        self._now.losses.append(loss.detach())

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Check the gradient, before it is clipped; if steps are skipped, decide."""
        self._now.overflow = torch.zeros_like(self._one)
        gradients = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if gradients and trainer.precision != "16-mixed":
            # What GradScaler does before a step, here with a scale of 1, which changes nothing. A
            # norm costs ten times as much, and overflows where the gradient does not.
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
        """Remember a micro-batch; after a skipped step write it down, at a log step look."""
        self._now.batches.append(account(outputs, batch))
        if trainer.global_step == self._now.number:  # a micro-batch of an accumulated step
            return
        step, self._now = self._now, _Step(trainer.global_step)
        if self._skipping:
            what, self._skipping = self._skipping, ""
            told = self._tell(trainer, pl_module, step, what)
            if self.skips > self.max_skips:
                self._verdict = f"{told} {self.max_skips} steps were skipped before it."
                raise ValueError(self._verdict)
            warn(f"{told} Step skipped, {self.skips} of at most {self.max_skips}.")
        elif self.on_non_finite == "stop":
            self._steps.append(step)
            if trainer.global_step % trainer.log_every_n_steps == 0 or len(self._steps) == KEPT:
                self._look(trainer, pl_module)

    # The look --------------------------------------------------------------------------------

    def _first(self, trainer: L.Trainer, steps: list[_Step]) -> tuple[int, str]:
        """The first bad one of some steps and what is bad in it; the same on every rank."""
        losses = torch.stack([torch.stack([0 * self._one[0], *s.losses]).sum() for s in steps])
        gradients = torch.cat([self._one * 0 if s.overflow is None else s.overflow for s in steps])
        bad = torch.stack([~losses.isfinite(), gradients > 0], 1).float()
        flags: Any = trainer.strategy.reduce(bad, reduce_op="sum")
        for i, (loss, gradient) in enumerate(flags.tolist()):
            if loss or gradient:
                words = [word for word, flag in (("loss", loss), ("gradient", gradient)) if flag]
                return i, " and ".join(words)
        return -1, ""

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop if a step since the last look was bad, or if one was before."""
        if self._verdict is not None:
            raise ValueError(self._verdict)
        steps, self._steps = self._steps, []
        i, what = self._first(trainer, steps) if steps else (-1, "")
        if what:
            self._verdict = self._tell(trainer, pl_module, steps[i], what)
            raise ValueError(self._verdict)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look before weights that may be NaN are validated."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look at what came after the last log step."""
        self._look(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Look before a file is written, which would take the place of a good one."""
        self._look(trainer, pl_module)
        self._saved.add(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were skipped."""
        return {"skips": self.skips} if self.skips else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.skips = state_dict["skips"]

    # The file --------------------------------------------------------------------------------

    def _tell(self, trainer: L.Trainer, pl_module: Any, step: _Step, what: str) -> str:
        """Write a step down, with what its replay needs; return one line about it."""
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
                "checkpoint": self._keep_checkpoint(trainer, step.number),
                "batches": batches,
            }
            lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items()]
            write_whole(path, "{\n" + ",\n".join(lines) + "\n}\n")
        trainer.strategy.barrier("non_finite")  # a copied checkpoint takes its time
        return f"{line} `lit-diffusion replay {path}` shows where it comes from."

    def _keep_config(self, trainer: L.Trainer, path: Path) -> str | None:
        """The config that is in force: the run folder may have several by now."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SaveConfigCallback):
                write_whole(path, callback.parser.dump(callback.config, skip_none=False))
                return path.name
        return None

    def _keep_checkpoint(self, trainer: L.Trainer, step: int) -> str | None:
        """The last checkpoint before the step; a link keeps it when a later one replaces it."""
        folders = [getattr(c, "dirpath", None) for c in trainer.checkpoint_callbacks]
        folders.append(self._folder.parent / "checkpoints")  # type: ignore[union-attr]
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
            # A folder may hold files of an earlier run, and weights alone do not go on.
            if at in self._saved and at <= step and "optimizer_states" in checkpoint:
                found[at] = path
        if not found:
            return None
        start = self._folder / f"start-{max(found):07d}.ckpt"  # type: ignore[operator]
        start.unlink(missing_ok=True)
        try:
            os.link(found[max(found)], start)
        except OSError:  # another file system, or one without links
            shutil.copyfile(found[max(found)], start)
        return start.name


def account(outputs: Any, batch: Any) -> dict[str, Any]:
    """What to remember of a micro-batch: which examples, at which λ, with which losses.

    Args:
        outputs: What training_step returned.
        batch: What it was given.

    Shapes:
        each (B,); None for what is not known.
    """
    outputs = outputs if isinstance(outputs, dict) else {}
    index = batch.get("index") if isinstance(batch, dict) else None
    return {"examples": index, "logsnr": outputs.get("logsnr"), "losses": outputs.get("losses")}


def gather(trainer: L.Trainer, value: Any) -> list[Any]:
    """The values of all ranks, on each of them: a collective.

    Args:
        trainer: Knows how many ranks there are.
        value: This rank's, anything that can be pickled.
    """
    values = [value]
    if trainer.world_size > 1:
        values = [None] * trainer.world_size
        torch.distributed.all_gather_object(values, value)
    return values


def plain(batch: dict[str, Tensor | None]) -> dict[str, list[Any] | None]:
    """As JSON has it: numbers in all their digits, and words for those that are none."""
    return {
        name: None
        if values is None
        else [x if math.isfinite(x) else str(x) for x in values.tolist()]
        for name, values in batch.items()
    }


def _where(batches: list[dict[str, Any]]) -> str:
    """The examples whose loss is not finite, or the range of λ if the gradient alone is not."""
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
