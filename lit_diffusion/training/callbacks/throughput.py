"""Measure the speed of training, the time spent waiting for data, and the use of the device."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.training.module import LitDiffusion
from lit_diffusion.training.run.messages import warn
from lit_diffusion.training.run.trainer import log_interval
from lit_diffusion.training.step.conditions import augmentation

__all__ = ["Throughput"]

#: Dense peaks in 10¹² FLOP/s from NVIDIA's and AMD's data sheets, for 16-bit matrix products and
#: for 32-bit ones (TF32 if the device has it). The table of Lightning 2.6 is not used, because its
#: H200, H100 NVL and A40 are figures with sparsity or for two cards (2.0e15 for an H200, whose
#: dense peak is 0.99e15), it takes an L40 for an L4 and the RTX 4090 of a laptop for that of a
#: desktop, and it lacks B200, A30, L40S and AMD's devices.
PEAKS = {
    r"\bB200\b": (2250, 1125),
    r"\bH[12]00 NVL\b": (835, 417),
    r"\bH100 PCIe\b": (756, 378),
    r"\bG?H[12]00\b": (989, 494),
    r"\bA100\b": (312, 156),
    r"\bA40\b": (149.7, 74.8),
    r"\bA30\b": (165, 82),
    r"\bA10\b": (125, 62.5),
    r"\bL40S\b": (362, 183),
    r"\bL40\b": (181, 90.5),
    r"\bL4\b": (121, 60),
    r"\bRTX A6000\b": (154.8, 77.4),
    r"\bRTX 4090$": (165, 82.6),
    r"\bRTX 3090$": (71, 35.6),
    r"\bV100-SXM": (125, 15.7),
    r"\bT4\b": (65, 8.1),
    r"\bMI300X\b": (1307, 653.7),
}

EXAMPLES = 8  # of the batch, for which operations are counted


class Throughput(L.Callback):
    """Logs time per step, images per second, waiting for data, FLOPs utilisation, and memory.

    Logged at each log step, for the steps since the previous one:

    - `throughput/images_per_s`, over all ranks and accumulated micro-batches;
    - `throughput/step_ms`, for one optimizer step;
    - `throughput/data_wait`, the fraction of time in which this rank waited for the loader, if
      the loader measures it in an attribute `wait_seconds`, as that of `DataModule` does;
    - `throughput/mfu`, the floating-point operations of the model per second, over the peak of the
      devices, if that is known.

    Validation, checkpoints and the first step are excluded. `throughput/peak_memory_gib` is the
    maximum so far, in GiB, of the memory of this rank's tensors on a CUDA device, and of the
    memory of the whole process elsewhere.

    Operations are counted once, in a forward and backward pass of the loss over a few examples:
    matrix products, convolutions and attention, with a multiplication and its addition as two.
    This changes neither the model nor its gradients nor any random state.

    Args:
        peak_tflops: Peak of one device in the precision of this run, in 10¹² operations per
            second, above 0. None means that of the data sheet of the device, if it is a known
            one; otherwise, as on a CPU, `mfu` is not logged.

    Raises:
        ValueError: If peak_tflops is not above 0.

    References:
        Chowdhery et al. (2022), PaLM, arXiv:2204.02311, appendix B. Unlike there, all operations
        that are executed are counted, including recomputed activations.
    """

    # Only the clock of the host is read: nothing synchronises with the device. At a log step both
    # agree, since `Guard`, which is called before, and the logger have read from the device.
    #
    # Lightning fetches a batch, moves it, and only then calls on_train_batch_start. No hook
    # encloses the fetching, so the loader itself measures it. The clock stops when a validation or
    # a checkpoint begins. It starts again at the end of the validation; since there is no hook at
    # the end of a checkpoint, it then starts at the next batch, including the time to fetch it.

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"Throughput: peak_tflops must be above 0, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self.flops_per_image: float | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin a run, in which nothing counts until the first step is complete."""
        self._peak: float | None = None  # FLOP/s of all devices
        self._first: tuple[int, float] | None = None  # the first step, and when it was complete
        self._last_step = 0
        self._waited = 0.0
        self._reset(None)

    def _reset(self, now: float | None) -> None:
        self._images = self._steps = 0
        self._busy = self._wait = 0.0
        self._since = now  # when the clock was started; None while it is stopped

    # The clock -------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset all measurements, and find the peak of the device."""
        self._forget()
        self._last_step = trainer.global_step
        device, peak = pl_module.device, self.peak_tflops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if peak is None and device.type == "cuda":
            peak = _peak(torch.cuda.get_device_name(device), str(trainer.precision))
        self._peak = None if peak is None else peak * 1e12 * trainer.world_size
        self._waited = _wait_seconds(trainer)

    def _pause(self) -> None:
        """Stop the clock."""
        if self._since is not None:
            self._busy += perf_counter() - self._since
            self._since = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock until the end of the validation."""
        self._pause()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Stop the clock until the next batch is fetched."""
        self._pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        if self._first is not None and self._since is None:
            self._since = perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock if it is stopped; count the operations once, if a peak is known."""
        waited = _wait_seconds(trainer)
        fetched, self._waited = waited - self._waited, waited
        self._wait += fetched
        if self._since is None:
            self._since = perf_counter() - fetched
        if self._peak is not None and self._first is None and self.flops_per_image is None:
            try:
                with trainer.precision_plugin.forward_context():
                    self.flops_per_image = count_flops(pl_module, batch)
            except Exception as error:
                self._peak = None
                warn(f"Throughput: no mfu, since counting operations failed: {error}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch; log the rates at a log step."""
        losses = outputs.get("losses") if isinstance(outputs, dict) else None
        if losses is not None:  # the step of a subclass may return none, or skip a batch
            self._images += len(losses)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        self._steps += 1
        now = perf_counter()
        if self._first is None:
            # The time so far was spent on starting loaders, choosing kernels and compiling.
            self._first = step, now
            self._reset(now)
        elif step % log_interval(trainer) == 0:
            seconds = self._busy + (0.0 if self._since is None else now - self._since)
            rates = self._rates(seconds, trainer.world_size)
            if not hasattr(trainer.train_dataloader, "wait_seconds"):
                del rates["data_wait"]
            if (memory := peak_memory(pl_module.device)) is not None:
                rates["peak_memory_gib"] = memory
            for name, value in rates.items():
                pl_module.log(f"throughput/{name}", value)
            self._reset(now)

    def _rates(self, seconds: float, ranks: int) -> dict[str, float]:
        seconds = max(seconds, 1e-9)
        images = self._images * ranks / seconds
        rates = {"step_ms": seconds / self._steps * 1e3, "data_wait": self._wait / seconds}
        if images:
            rates["images_per_s"] = images
        if images and self._peak is not None and self.flops_per_image is not None:
            rates["mfu"] = images * self.flops_per_image / self._peak
        return rates

    def time_left(self, trainer: L.Trainer) -> str | None:
        """The time until the end of the run, as h:mm:ss; None if it is not known.

        It is estimated from the mean time per step, with validations and checkpoints.

        Args:
            trainer: Has the number of steps.
        """
        step = trainer.global_step
        if self._first is None or trainer.max_steps < 1 or step <= self._first[0]:
            return None
        seconds = (perf_counter() - self._first[1]) / (step - self._first[0])
        return str(timedelta(seconds=round(seconds * (trainer.max_steps - step))))


def _wait_seconds(trainer: L.Trainer) -> float:
    """Seconds that this rank has waited for batches; 0 if its loader does not measure them."""
    return float(getattr(trainer.train_dataloader, "wait_seconds", 0.0))


def _peak(device: str, precision: str) -> float | None:
    """Peak of a device in 10¹² FLOP/s; None if it is not in the table."""
    column = 0 if precision.startswith(("16", "bf16")) else 1
    if column and not precision.startswith("32"):
        return None
    found = [peak for name, peak in PEAKS.items() if re.search(name, device)]
    return float(found[0][column]) if found else None


def peak_memory(device: torch.device) -> float | None:
    """The maximum of the used memory so far, in GiB; None if the system does not report it.

    On CUDA it is the memory of tensors, without what the allocator reserves; elsewhere that of
    the whole process. Nothing synchronises with the device.

    Args:
        device: The device of the model.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def count_flops(model: LitDiffusion, batch: Any) -> float:
    """Count the floating-point operations of a training step per image, forward and backward.

    Args:
        model: The model, which does not change.
        batch: A batch of the training data, of which a few examples are used.

    Raises:
        RuntimeError: If no operation was counted, as in kernels that torch does not know, or the
            number is another for each size of the images.
    """
    if len(model.shapes) > 1:
        raise RuntimeError("the data have images of several sizes, each with a number of its own")
    batch = model.standard(batch)
    x = batch["image"][:EXAMPLES]
    modes = [(module, module.training) for module in model.modules()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    for module, _ in modes:
        if getattr(module, "activation_checkpointing", False):
            module.training = True  # itself only: it recomputes, and its parts drop nothing out
    try:
        with (
            torch.random.fork_rng([x.device] if x.device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            told = model.condition(batch) | augmentation(model.denoiser.network, batch)
            cond = {name: c[: len(x)] for name, c in told.items()}
            loss = model.loss(model.denoiser, x, **cond).loss.mean()
            torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    if not counter.get_total_flops():
        raise RuntimeError("torch found no operation that it can count")
    return counter.get_total_flops() / len(x)
