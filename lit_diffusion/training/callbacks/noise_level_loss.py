"""Record errors and losses by noise level during training."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.gaussian import diffuse, noise_like
from lit_diffusion.training.last_weights import Measures, has_validation
from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.dashboard import show
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.noise_levels import (
    NoiseLevels,
    plot_noise_levels,
    read_table,
    table_text,
)
from lit_diffusion.training.run.tolerance import may_fail, thinned
from lit_diffusion.training.run.trainer import output_folder
from lit_diffusion.training.run.whole_file import write_whole
from lit_diffusion.training.step import randomness
from lit_diffusion.training.step.conditions import augmentation

__all__ = ["NoiseLevelLoss"]

MOST = 100  # steps in the file and the figure


class NoiseLevelLoss(Measures):
    """Records the ε-error at each noise level, E[mean (ε̂ − ε)² | λ], in bins of λ.

    A mean loss hides which noise levels contribute to it. Resolved over λ it shows which levels
    are learned, which are sampled too rarely, and where training and validation diverge. The
    ε-error does not depend on prediction, schedule and weighting, so `lit-diffusion compare` can
    plot several runs together.

    noise_levels.csv in the run folder has means and variances of ε-error and loss and the density
    of λ, for the training steps since the last validation and for the validation, which uses
    fixed noise and the average weights of an `EMA`; noise_levels.png shows them. Both keep at most
    100 steps: of more, every second of the older half is left out. Non-finite losses
    are counted separately and reported. Between two validations nothing synchronises with the
    device, and training is bit-identical with and without this callback. Without validation data
    there is a record of the training steps at the end of each epoch, and at the end of the fit.

    Args:
        bins: Number of bins of equal width over the range of λ at the start of the run, at least
            1. If the range is learned, λ outside of it count in the outermost bins.
        probe_every_n_steps: Optimizer steps between two measurements of the gradient norm of the
            ε-error at the centre of each bin; each costs as much as `bins` training steps on
            probe_examples. 0 for never.
        probe_examples: Examples of the batch over which that gradient is averaged, at least 1.

    Raises:
        ValueError: If a number is too small, or a checkpoint has another number of bins.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848; Nichol & Dhariwal (2021), arXiv:2102.09672.
    """

    # One tensor holds all sums: a row for the count and each sum of training and validation, and
    # one for the gradient. Its columns are the bins twice, first for finite losses and then for
    # the others, so that NaN can be counted without synchronising with the device. It is a plain
    # attribute, which DDP does not touch. Each rank has its own. The sum over the ranks is written
    # and saved; after resuming rank 0 continues from the sum and the others from zero, for any
    # number of ranks.

    def __init__(
        self, bins: int = 40, probe_every_n_steps: int = 0, probe_examples: int = 16
    ) -> None:
        if bins < 1 or probe_examples < 1 or probe_every_n_steps < 0:
            raise ValueError(
                "NoiseLevelLoss: bins and probe_examples must be at least 1 and "
                "probe_every_n_steps at least 0, "
                f"got {bins}, {probe_examples} and {probe_every_n_steps}."
            )
        self.bins = bins
        self.probe_every_n_steps = probe_every_n_steps
        self.probe_examples = probe_examples
        self._ends = (0.0, 1.0)
        self._sums = torch.zeros(11, 2 * bins, dtype=torch.float64)
        self._written = 0  # records in the file that the last checkpoint knows of
        self._until: int | None = None  # the step of the last of them
        self._folder: Path | None = None
        self._records: list[tuple[NoiseLevels, str]] | None = None  # with their rows
        self._last_step = 0
        self._recorded_step = -1
        self._validates = True
        self._loaded: dict[str, Any] | None = None
        self._trainer: L.Trainer | None = None

    # During the run --------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Set up the bins, or restore those of the checkpoint."""
        start, self._loaded = self._loaded or {}, None
        if start.get("bins", self.bins) != self.bins:
            raise ValueError(
                f"NoiseLevelLoss: expected bins={start['bins']} as in the checkpoint, got "
                f"{self.bins}: set bins to {start['bins']} to continue its sums."
            )
        low, high = start.get("ends") or pl_module.loss.schedule.ends
        self._ends = low, high
        self._written, self._until = start.get("written", 0), start.get("until")
        self._sums = torch.zeros(11, 2 * self.bins, dtype=torch.float64, device=pl_module.device)
        if start and trainer.is_global_zero:
            self._sums.copy_(start["sums"])
        self._trainer = trainer
        self._folder = output_folder(trainer)
        self._records = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._last_step = trainer.global_step
        self._recorded_step = -1
        self._validates = has_validation(trainer)

    def _add(self, rows: Tensor, outputs: dict[str, Tensor]) -> None:
        """Add examples to their bins, without synchronising with the device."""
        low, high = self._ends
        error, loss = outputs["eps_mse"].double(), outputs["losses"].double()
        where = (outputs["logsnr"].double() - low) * (self.bins / (high - low))
        bad = ~torch.isfinite(error + loss + where)
        # Cast to an integer, even NaN can be clamped into the range.
        column = where.long().clamp_(0, self.bins - 1) + bad * self.bins
        values = [torch.ones_like(error), error, error.square(), loss, loss.square()]
        rows.index_add_(1, column, torch.stack(values))

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch, and at every n-th optimizer step measure the gradient norms."""
        if outputs:  # the step of a subclass may have skipped the batch
            self._add(self._sums[:5], outputs)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        every = self.probe_every_n_steps
        # On rank 0 only, for its own batch: there is no collective, so the others need not wait.
        if every and step % every == 0 and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                norms = self.gradient_norms(pl_module, batch)
            finite = norms.isfinite()
            self._sums[10, : self.bins] += norms.where(finite, torch.zeros_like(norms))
            self._sums[10, self.bins :] += finite

    def gradient_norms(self, model: LitDiffusion, batch: Any) -> Tensor:
        """‖∇θ mean (ε̂ − ε)²‖ at the centre of each bin, averaged over the first examples.

        The noise is a function of the place in the batch, the same for each bin and at each step.
        Gradients, random state and modes of the model do not change.

        Args:
            model: The model.
            batch: A batch of the training data.

        Shapes:
            result (bins,), float64.
        """
        batch = model.standard(batch)
        x, denoiser = batch["image"][: self.probe_examples], model.denoiser
        told = model.condition(batch) | augmentation(denoiser.network, batch)
        cond = {name: c[: len(x)] for name, c in told.items()}
        generators = randomness.generators(model.seed, "probe", list(range(len(x))))
        eps = noise_like(x, generators)
        parameters = [p for p in denoiser.parameters() if p.requires_grad]
        modes = [(module, module.training) for module in denoiser.modules()]
        low, high = self._ends
        norms = []
        denoiser.eval()
        try:
            with (
                torch.random.fork_rng([x.device] if x.device.type == "cuda" else []),
                torch.enable_grad(),
            ):
                for i in range(self.bins):
                    centre = low + (i + 0.5) * (high - low) / self.bins
                    logsnr = x.new_full((len(x),), centre, dtype=torch.float64)
                    error = denoiser(diffuse(x, eps, logsnr), logsnr, **cond).eps - eps
                    found = torch.autograd.grad(
                        error.square().mean(), parameters, allow_unused=True
                    )
                    kept = [gradient for gradient in found if gradient is not None]
                    norms.append(torch.nn.utils.get_total_norm(kept).double())
        finally:
            for module, mode in modes:
                module.training = mode
        return torch.stack(norms)

    def _watches(self, trainer: L.Trainer, model: Any) -> bool:
        """Whether this validation is part of a training run."""
        return (trainer.state.fn == "fit" or model.finishing) and not trainer.sanity_checking

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, in a hook where the averaged weights are in use."""
        if self._watches(trainer, pl_module) and outputs:
            self._add(self._sums[5:10], outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the records of both stages, and reset the sums."""
        if self._watches(trainer, pl_module):
            self._record(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the record of a complete epoch, where there are no validations."""
        if not self._validates and trainer.is_last_batch:
            self._record(trainer)

    def measure_last(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write the steps since the last record; a resumed run replaces it by that of more."""
        if self._recorded_step != trainer.global_step:
            self._record(trainer)

    def _record(self, trainer: L.Trainer) -> None:
        """Write the records of both stages, and reset the sums; a collective."""
        total = self._total().cpu()
        self._sums.zero_()
        self._recorded_step = trainer.global_step
        if trainer.is_global_zero and self._write(trainer, total):
            self._written, self._until = len(self._records or ()), trainer.global_step

    # The file --------------------------------------------------------------------------------

    def _total(self) -> Tensor:
        """The sums over all ranks; a collective."""
        if self._trainer is None:
            return self._sums.clone()
        return self._trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")

    def _write(self, trainer: L.Trainer, total: Tensor) -> bool:
        """Append the new records to the file and plot all of them; return whether it was done."""
        edges = torch.linspace(*self._ends, self.bins + 1, dtype=torch.float64)
        norms = total[10, : self.bins] / total[10, self.bins :]
        unknown = torch.full_like(norms, torch.nan)
        stages = (("train", total[:5], norms), ("val", total[5:10], unknown))
        new = [
            NoiseLevels.of_sums(trainer.global_step, stage, edges, sums, gradient_norm)
            for stage, sums, gradient_norm in stages
            if sums[0].sum() > 0
        ]
        for record in new:
            _report(record)
        if not new or self._folder is None:
            return False
        path = self._folder / "noise_levels.csv"
        if self._records is None:
            self._records = self._earlier(path)
        # The last weights of a run that is resumed at its end are measured once more.
        again = {(record.step, record.stage) for record in new}
        every = [one for one in self._records if (one[0].step, one[0].stage) not in again]
        every += [(record, table_text([record])) for record in new]
        kept = {*thinned(list(dict.fromkeys(record.step for record, _ in every)), MOST)}
        self._records = [one for one in every if one[0].step in kept]
        with may_fail(path):
            text = "".join(text for _, text in self._records)
            write_whole(path, table_text([], header=True) + text)
        picture = path.with_suffix(".png")
        with may_fail(picture):
            save_figure(plot_noise_levels([record for record, _ in self._records]), picture)
            show(trainer, "noise_levels", picture)
        return True

    def _earlier(self, path: Path) -> list[tuple[NoiseLevels, str]]:
        """The records that the checkpoint knows of; a resumed run makes the later ones again."""
        if not path.is_file() or not self._written:
            return []
        lines = iter(path.read_text().splitlines(keepends=True)[1:])
        every = [(record, "".join(islice(lines, self.bins))) for record in read_table(path)]
        if self._until is None:  # of a checkpoint that counts them
            return every[: self._written]
        return [one for one in every if one[0].step <= self._until]

    def state_dict(self) -> dict[str, Any]:
        """The bins, the sums over all ranks, and the number and last step of written records."""
        return {
            "bins": self.bins,
            "ends": list(self._ends),
            "sums": self._total().cpu(),
            "written": self._written,
            "until": self._until,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the sums until the model is on its device."""
        self._loaded = state_dict


def _report(record: NoiseLevels) -> None:
    """Warn about the noise levels of non-finite losses."""
    bad = record.not_finite.nonzero()[:, 0]
    if len(bad):
        low, high = float(record.edges[bad[0]]), float(record.edges[bad[-1] + 1])
        warn(
            f"NoiseLevelLoss: {int(record.not_finite.sum())} losses up to step {record.step} "
            f"({record.stage}) were NaN or infinite, at λ between {low:.4g} and {high:.4g}; "
            "they are counted in noise_levels.csv and excluded from its means."
        )
