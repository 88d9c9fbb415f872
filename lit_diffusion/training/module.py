"""The model in training: one LightningModule for every objective.

    batch {"image": (B, C, H, W) in [−1, 1], "label": (B,), further conditions (B, *)}
      → training_step      drops conditions for guidance, samples t and ε, calls the loss
         → DiffusionLoss   z = diffuse(x, ε, λ); (x̂, ε̂) = denoiser(z, λ, label); ½ w/p · err
      ← {"loss", "logsnr", "eps_mse"}, each detached but the loss, for the callbacks

Each step is a pure function of (seed, step, micro-batch, rank); see `randomness`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from tqdm import tqdm

from lit_diffusion.decoders import Decoder
from lit_diffusion.denoisers import Denoiser, drop_condition
from lit_diffusion.description import find_class, public_path
from lit_diffusion.loss import DiffusionLoss, LossTerms, default_weighting
from lit_diffusion.models.shape import find_shape
from lit_diffusion.nn import UNet
from lit_diffusion.predictions import Prediction, VPrediction
from lit_diffusion.samplers import DDIMSampler, Sampler
from lit_diffusion.schedules import CosineSchedule, NoiseSchedule
from lit_diffusion.times import fixed_times, stratified_times
from lit_diffusion.training.data.reading.class_names import class_names
from lit_diffusion.training.last_weights import MeasuredModule
from lit_diffusion.training.restore.rebuild import own_arguments, rebuild, remember
from lit_diffusion.training.restore.resume import Resume
from lit_diffusion.training.run.checkpoints import (
    ABOUT_DATA,
    CLASS_NAMES,
    MODEL_CLASS,
    load_checkpoint,
    model_class,
)
from lit_diffusion.training.run.trainer import all_callbacks, check_trainer
from lit_diffusion.training.run.weights import (
    RAW,
    refuse_weights_alone,
    take_average,
    use_raw_weights,
    weights_name,
)
from lit_diffusion.training.step import randomness
from lit_diffusion.training.step.accumulation import micro_batch
from lit_diffusion.training.step.batch_fit import BatchFit
from lit_diffusion.training.step.batches import BatchReader, FirstBatch, Numbered, check_keys
from lit_diffusion.training.step.conditions import augmentation, named_conditions
from lit_diffusion.training.step.optimization import OptimizedModule
from lit_diffusion.training.step.parts import (
    check_numbers,
    check_parts,
    keep_schedule,
    turn_on_training,
)
from lit_diffusion.training.step.precision import settle_precision
from lit_diffusion.weightings import Weighting

__all__ = ["LitDiffusion"]


class LitDiffusion(BatchReader, OptimizedModule, MeasuredModule):
    """A diffusion model and its training: network, schedule, weighting, prediction, sampler.

    The loss is ½ E_{λ~p}[w(λ)/p(λ) · mean (ε̂ − ε)²]: `weighting` defines the objective, `schedule`
    only where it is sampled, `prediction` what the network outputs, and `sampler` how images are
    sampled afterwards. Each of them can be changed without the others.

    Args:
        network: Maps (z, logsnr, label, further conditions) to z's shape; None means a `UNet` for
            shape, by default (1, 8, 8).
        schedule: Density p(λ) that training samples from; None means `CosineSchedule()`.
        weighting: Weight w(λ) on the squared error of ε; None means `SigmoidWeighting()`, or with
            a decoder `ELBOWeighting()`.
        num_timesteps: Number T of steps of a discrete chain, which then has the only noise levels;
            None means continuous time.
        decoder: Makes the loss the full bound, with prior and reconstruction; None omits them. A
            schedule with learned ends requires it.
        prediction: What the network outputs; None means `VPrediction()`.
        sampler: Samples images; None means `DDIMSampler()`. Without a schedule of its own it uses
            its default one over the trained range of λ.
        optimizer: Creates the optimizer from the parameters.
        schedule_lr: Learning rate of a learned schedule, which has no weight decay; None means
            that of the optimizer.
        lr_scheduler: Creates the learning-rate schedule from the optimizer, updated at each
            optimizer step; None means a constant rate.
        shape: Channels, height and width of the images; None means those of the network's
            attribute of that name, else those of the first batch.
        label_dropout: Probability, in [0, 1], of dropping an example's label in training, together
            with its further conditions. Guidance needs a model that was trained without them, too.
        conditions: Names of further inputs of the network, which are keys of a batch and arguments
            of the network; None means the network's attribute `conditions`.
        keys: Our names of what a batch has, each with its name there, or its position in a tuple:
            {"image": "pixel_values", "label": "class"}; None means our own names.
        clip_denoised: Clip x̂ to [−1, 1] in sampling: right for images, wrong for latents.
        seed: Seed of all noise in training, validation and sampling; None means 0, and
            on the command line that of seed_everything.

    Raises:
        ValueError: If weighting and prediction assume different data_std, if the sampler leaves
            the trained range of λ, if the schedule learns its ends and there is no decoder, or if
            label_dropout is not a probability, or schedule_lr not above 0, or the network does
            not take a condition, or is built for another shape.
        TypeError: If a part has the wrong type, such as a class instead of an instance.

    References:
        Kingma & Gao (2023), Understanding Diffusion Objectives as the ELBO with Simple Data
        Augmentation, arXiv:2303.00848.

    Example:
        >>> model = LitDiffusion(shape=(1, 8, 8))
        >>> model.sample(2, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 1, 8, 8])
    """

    trained_steps = 0  # optimizer steps behind the weights, known after a fit or a load

    def __init__(
        self,
        network: nn.Module | None = None,
        schedule: NoiseSchedule | None = None,
        weighting: Weighting | None = None,
        prediction: Prediction | None = None,
        sampler: Sampler | None = None,
        num_timesteps: int | None = None,
        decoder: Decoder | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        schedule_lr: float | None = None,
        shape: tuple[int, ...] | None = None,
        label_dropout: float = 0.1,
        conditions: Sequence[str] | None = None,
        keys: dict[str, str | int] | None = None,
        clip_denoised: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        check_numbers(label_dropout, schedule_lr)
        if network is None:
            network = UNet(shape=find_shape(None, shape) or (1, 8, 8))
        schedule = CosineSchedule() if schedule is None else schedule
        weighting = default_weighting(decoder) if weighting is None else weighting
        prediction = VPrediction() if prediction is None else prediction
        sampler = DDIMSampler() if sampler is None else sampler
        check_parts(network, schedule, weighting, prediction, sampler)
        self.denoiser = Denoiser(network, prediction)
        self.loss = DiffusionLoss(schedule, weighting, num_timesteps, decoder)
        self._sampler = sampler
        self.sampler_in_range()  # refuses a sampler that leaves the range
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.schedule_lr, self.label_dropout = schedule_lr, label_dropout
        self._shape = find_shape(network, shape)
        self.conditions, self.keys = named_conditions(network, conditions), check_keys(keys)
        self.clip_denoised, self.seed = clip_denoised, 0 if seed is None else seed
        self._validation = torch.zeros(3, dtype=torch.float64)
        self._numbered, self._first_batch = Numbered(), FirstBatch()
        self.weights = RAW  # or the name of the average that is in the parameters now
        self._resumed: dict[str, Any] = {}  # the checkpoint, until its average is taken
        self.remember(
            network=network,
            schedule=schedule,
            weighting=weighting,
            prediction=prediction,
            sampler=sampler,
            num_timesteps=num_timesteps,
            decoder=decoder,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            schedule_lr=schedule_lr,
            shape=self._shape,
            label_dropout=label_dropout,
            conditions=conditions,
            keys=self.keys,
            clip_denoised=clip_denoised,
            seed=self.seed,
        )

    def remember(self, **arguments: Any) -> None:
        """Keep, as plain data in `hparams`, how this model was made; checkpoints take it along.

        What cannot be described is left out, and `load_from_checkpoint` will ask for it.

        Args:
            **arguments: The arguments of `__init__`, as objects or as configs.
        """
        remember(self, arguments)

    # Training and validation ---------------------------------------------------------------

    def configure_callbacks(self) -> list[L.Callback]:
        """The callbacks that every model adds, unless the trainer has them: BatchFit, Resume."""
        given = {type(one) for one in all_callbacks(self.trainer)}
        return [kind() for kind in (BatchFit, Resume) if kind not in given]

    def setup(self, stage: str) -> None:
        """Check the trainer, settle its precision, and keep a subclass's arguments."""
        if stage == "fit":
            check_trainer(self.trainer)
        settle_precision(self.trainer)
        self.remember(**own_arguments(self, LitDiffusion))
        data = getattr(self.trainer, "datamodule", None)
        self.expect(data)
        if stage == "fit" and self.num_classes is not None and data is not None:
            self.class_names = class_names(data)
        self.kind = getattr(data, "kind", self.kind) if stage == "fit" else self.kind

    def on_fit_start(self) -> None:
        """Refuse to lose the average of a run that is resumed; turn on the training mode."""
        settle = getattr(getattr(self.trainer, "datamodule", None), "settle_normalization", None)
        if settle is not None:
            settle(self)
        left, self._resumed = take_average(self._resumed), {}
        if left is not None:
            raise ValueError(
                "The checkpoint has an average of the weights, which no callback continues: add "
                "EMA to trainer.callbacks, so that it is not lost."
            )
        self.weights, self.validated_step = RAW, -1
        turn_on_training(self)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """The loss of one micro-batch, and the terms behind it."""
        batch = self.standard(batch)
        x = batch["image"]
        trainer, n = self.trainer, len(x)
        place = micro_batch(trainer, batch_idx)
        step, rank, world = self.global_step, self.global_rank, trainer.world_size
        # The times of an optimizer step are one stratified set over its ranks and micro-batches:
        # the offset must not depend on either, and all other noise must.
        offset = torch.tensor(randomness.fraction(self.seed, "offset", step), dtype=torch.float64)
        part, parts = place.index * world + rank, place.count * world
        t = stratified_times(n, offset.to(x.device, non_blocking=True), part, parts)
        randomness.reseed(x.device, self.seed, "step", step, place.index, rank)
        cond = self.condition(batch)
        self._first_batch(self, batch, cond)
        if cond and self.label_dropout > 0:
            cond = drop_condition(
                cond, torch.rand(n, dtype=x.dtype, device=x.device) < self.label_dropout
            )
        cond |= augmentation(self.denoiser.network, batch)
        has_extra = type(self).extra_loss is not LitDiffusion.extra_loss
        eps = torch.randn_like(x)
        terms = self.loss(self.denoiser, x, t=t, eps=eps, with_estimates=has_extra, **cond)
        extra = self.extra_loss(batch, terms) if has_extra else None
        if has_extra and extra is None:  # of this batch: every step logs the same
            extra = terms.loss.new_zeros(())
        loss = self.accumulate(terms, place, extra)
        return {
            "loss": loss,
            "losses": terms.loss.detach(),
            "logsnr": terms.logsnr.detach(),
            "eps_mse": terms.eps_mse.detach(),
        }

    def extra_loss(self, batch: dict[str, Any], terms: LossTerms) -> Tensor | None:
        """A further loss of a training step, for a subclass to define; None for none.

        Its mean is added to that of the diffusion loss, and logged as `train/extra_loss`.

        Args:
            batch: The batch, as `standard` returns it.
            terms: The diffusion loss of each example, with `terms.logsnr`, `terms.z` and the
                estimate `terms.denoised.x`, `terms.denoised.eps`.

        Shapes:
            z, x̂ and ε̂ (B, C, H, W); logsnr (B,); result (B,) or ().
        """
        return None

    def on_validation_epoch_start(self) -> None:
        """Start the sums of a validation."""
        self._validation = torch.zeros(3, dtype=torch.float64, device=self.device)
        self._numbered.start()

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Add the loss of each example at its own fixed λ and ε."""
        batch = self._numbered.next(batch, self.standard(batch))
        x, index = batch["image"], batch["index"]
        noise = randomness.generators(self.seed, "valid", index.tolist())
        terms: LossTerms = self.loss(
            self.denoiser,
            x,
            t=fixed_times(index, batch["total"]),
            generator=noise,
            **self.condition(batch),
        )
        sums = torch.stack([terms.loss.sum(), terms.eps_mse.sum(), terms.loss.new_tensor(len(x))])
        self._validation += sums
        return {"losses": terms.loss, "logsnr": terms.logsnr, "eps_mse": terms.eps_mse}

    def on_validation_epoch_end(self) -> None:
        """Log the means over the whole set, the same whatever the ranks and batches."""
        self._finish("val")

    on_test_epoch_start = on_validation_epoch_start

    def test_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """As in validation."""
        return self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """As in validation."""
        self._finish("test")

    def _finish(self, name: str) -> None:
        self._numbered.start()  # and let the last batch go
        self.validated_step = self.trainer.global_step
        total = self.trainer.strategy.reduce(self._validation, reduce_op="sum")
        # Every rank has the sum already; sync_dist only says that it may be monitored anywhere.
        self.log(f"{name}/loss", (total[0] / total[2]).float(), prog_bar=True, sync_dist=True)
        self.log(f"{name}/eps_mse", (total[1] / total[2]).float(), sync_dist=True)

    def on_predict_epoch_start(self) -> None:
        """Count the examples from 0."""
        self._numbered.start()

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Sample one image for each example, given its class and its other conditions."""
        batch = self._numbered.next(batch, self.standard(batch))
        noise = randomness.generators(self.seed, "sample", batch["index"].tolist())
        cond = dict(self.condition(batch))
        label = cond.pop("label", None)
        return self.sample(len(noise), noise, label, progress=self.watch(), cond=cond)

    # Sampling ------------------------------------------------------------------------------

    def watch(self) -> Callable[[Any], Iterable[Any]]:
        """A progress bar for sampling over more than 100 levels, if the trainer shows bars."""
        long = len(self.sampler.levels()) > 100
        if long and self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None:
            return functools.partial(tqdm, desc="Samples", leave=False)
        return iter

    # Checkpoints ---------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Mark the checkpoint as ours, with how the model was made."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = dict(self.hparams)
        checkpoint[MODEL_CLASS] = public_path(type(self))
        checkpoint[ABOUT_DATA] = self.about_data
        if self.class_names is not None:
            checkpoint[CLASS_NAMES] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Training continues from the raw weights; everything else uses the average."""
        self.set_about_data(checkpoint.get(ABOUT_DATA))
        if self._trainer is None or not self.trainer.training:
            self.weights = weights_name(checkpoint)
            self.trained_steps = checkpoint["global_step"]
            return
        refuse_weights_alone(checkpoint)
        keep_schedule(self, checkpoint["state_dict"])
        use_raw_weights(checkpoint)
        keep_schedule(self, checkpoint["state_dict"])
        self._resumed = checkpoint

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,
        strict: bool = True,
        **arguments: Any,
    ) -> LitDiffusion:
        """Rebuild the model of a checkpoint, with its average weights if it has them.

        The model is in evaluation mode. Training turns on the training mode of every part that
        has something to learn.

        Nothing in the file is executed, and only allowed modules are imported. Called on
        LitDiffusion, it returns an instance of the class that was trained.

        Args:
            checkpoint_path: The file.
            map_location: Device for the weights; None means the CPU.
            strict: Whether every weight must be found.
            **arguments: Replace what the checkpoint says, or supply what it could not keep.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not a checkpoint of this library, lacks an argument, or names a
                class that is not allowed.
        """
        checkpoint = load_checkpoint(checkpoint_path, map_location)
        if cls is LitDiffusion:
            cls = find_class(model_class(checkpoint), LitDiffusion)
        model = rebuild(cls, checkpoint, checkpoint_path, strict, arguments)
        model.trained_steps = checkpoint["global_step"]
        return model
