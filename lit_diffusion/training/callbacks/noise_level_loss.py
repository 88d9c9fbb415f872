"""Record errors and losses by noise level during training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lit_diffusion.gaussian import diffuse, noise_like
from lit_diffusion.training import randomness
from lit_diffusion.training.run.dashboard import show
from lit_diffusion.training.run.figures import save_figure
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.noise_levels import (
    NoiseLevels,
    plot_noise_levels,
    read_table,
    table_text,
)
from lit_diffusion.training.run.whole_file import write_whole

__all__ = ["NoiseLevelLoss"]


class NoiseLevelLoss(L.Callback):
    """Records the ε-error at each noise level, E[mean (ε̂ − ε)² | λ], in bins of λ.

    A mean loss hides where it comes from; over λ one sees which noise levels are learned, which
    are sampled too rarely, and where training and validation diverge. The ε-error does not depend
    on prediction, schedule and weighting, so `lit-diffusion compare` can plot runs together.

    In the run folder noise_levels.csv gets the means and variances of ε-error and loss and the
    density of λ, of training since the last validation and of the validation, which uses fixed
    noise and the average weights of an `EMA`; noise_levels.png shows them. Losses that are not
    finite are counted apart and reported. Between two validations nothing waits for the device,
    and training is bit for bit what it is without this callback.

    Args:
        bins: Number of bins, equally wide, over the model's range of λ as it is at the start;
            at least 1. What a learned range puts beyond counts in the outermost bins.
        probe_every_n_steps: Optimizer steps between two measurements of the norm of the ε-error's
            gradient at the centre of each bin, each as costly as `bins` training steps of
            probe_examples; 0 for never.
        probe_examples: Examples of the batch whose mean gradient is measured, at least 1.

    Raises:
        ValueError: If a number is below its least, or a checkpoint has another number of bins.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848; Nichol & Dhariwal (2021), arXiv:2102.09672.
    """

    # One buffer: a row for the count and each sum of training and validation, and one for the
    # gradient. Its columns are the bins twice, first for finite losses and then for the others,
    # so that NaN needs no look at the device. It is a plain attribute, which DDP leaves alone.
    # Each rank has its own; they are summed when they are written, and when they are saved, after
    # which rank 0 goes on from the sum and the others from zero, however many there are.

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
        self._folder: Path | None = None
        self._records: list[NoiseLevels] | None = None
        self._last_step = 0
        self._loaded: dict[str, Any] | None = None
        self._trainer: L.Trainer | None = None

    # Along the run ---------------------------------------------------------------------------

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set up the bins, or restore those of the checkpoint."""
        start, self._loaded = self._loaded or {}, None
        if start.get("bins", self.bins) != self.bins:
            raise ValueError(
                f"NoiseLevelLoss: the checkpoint has sums over {start['bins']} bins, and "
                f"bins={self.bins}: set bins to {start['bins']} to go on with them."
            )
        low, high = start.get("ends") or pl_module.loss.schedule.ends
        self._ends = low, high
        self._written = start.get("written", 0)
        self._sums = torch.zeros(11, 2 * self.bins, dtype=torch.float64, device=pl_module.device)
        if start and trainer.is_global_zero:
            self._sums.copy_(start["sums"])
        self._trainer = trainer
        folder = trainer.log_dir  # a collective: every rank asks
        self._folder = None if folder is None or trainer.fast_dev_run else Path(folder)
        self._records = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the step, which a resumed run knows only now."""
        self._last_step = trainer.global_step

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
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Add a micro-batch, and at every n-th optimizer step measure the gradient."""
        if outputs:  # a step of one's own may have skipped the batch
            self._add(self._sums[:5], outputs)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        every = self.probe_every_n_steps
        # Rank 0 alone, for its own batch: no collective is in it, so the others need not know.
        if every and step % every == 0 and trainer.is_global_zero:
            with trainer.precision_plugin.forward_context():
                norms = self.gradient_norms(pl_module, batch)
            finite = norms.isfinite()
            self._sums[10, : self.bins] += norms.where(finite, torch.zeros_like(norms))
            self._sums[10, self.bins :] += finite

    def gradient_norms(self, pl_module: Any, batch: dict[str, Tensor]) -> Tensor:
        """‖∇θ mean (ε̂ − ε)²‖ at the centre of each bin, of the mean over the first examples.

        The noise belongs to the example's place in the batch: it is the same for each bin and at
        each step. Gradients, random state and modes of the model are left as they were.

        Args:
            pl_module: The LitDiffusion whose network it is.
            batch: A batch of the training data.

        Shapes:
            result (bins,), float64.
        """
        x, denoiser = batch["image"][: self.probe_examples], pl_module.denoiser
        cond = {name: c[: len(x)] for name, c in pl_module.condition(batch).items()}
        generators = randomness.generators(pl_module.seed, "probe", list(range(len(x))))
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

    def _watches(self, trainer: L.Trainer) -> bool:
        """Whether this validation is one of a training."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add a batch, in a hook where the average weights are in place."""
        if self._watches(trainer) and outputs:
            self._add(self._sums[5:10], outputs)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write both stages, and reset the sums."""
        if not self._watches(trainer):
            return
        total = self._total().cpu()
        self._sums.zero_()
        if trainer.is_global_zero and self._write(trainer, total):
            self._written = len(self._records or ())

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write what came after the last validation; a run that goes on from here replaces it."""
        total = self._total().cpu()
        if trainer.is_global_zero:
            self._write(trainer, total)

    # The file --------------------------------------------------------------------------------

    def _total(self) -> Tensor:
        """The sums over all ranks: a collective."""
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
        text = table_text([], header=True)
        if self._records is None:
            # Only now is it certain that there is something to put in the later records' place.
            known = self._written if path.is_file() else 0
            self._records = read_table(path)[:known] if known else []
            if known:
                lines = path.read_text().splitlines(keepends=True)
                text = "".join(lines[: 1 + known * self.bins])
        elif self._records:
            text = path.read_text()
        self._records += new
        self._folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, text + table_text(new))
        picture = path.with_suffix(".png")
        save_figure(plot_noise_levels(self._records), picture)
        show(trainer, "noise_levels", picture)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The bins, the sums over all ranks, and how many records are written."""
        return {
            "bins": self.bins,
            "ends": list(self._ends),
            "sums": self._total().cpu(),
            "written": self._written,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Hold the sums until their device is known."""
        self._loaded = state_dict


def _report(record: NoiseLevels) -> None:
    """Warn about the noise levels of non-finite losses."""
    bad = record.not_finite.nonzero()[:, 0]
    if len(bad):
        low, high = float(record.edges[bad[0]]), float(record.edges[bad[-1] + 1])
        warn(
            f"NoiseLevelLoss: {int(record.not_finite.sum())} losses up to step {record.step} "
            f"({record.stage}) were NaN or infinite, at λ between {low:.4g} and {high:.4g}; "
            "they are counted in noise_levels.csv and left out of its means."
        )
