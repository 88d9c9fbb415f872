"""How fast a training goes, and what it waits for."""

from __future__ import annotations

import re
import sys
from datetime import timedelta
from time import perf_counter
from typing import Any

import lightning as L
import torch
from torch.utils.flop_counter import FlopCounterMode

from lit_diffusion.training.run.messages import warn

__all__ = ["Throughput"]

#: Dense peaks in 10¹² FLOP/s by NVIDIA's and AMD's data sheets, of 16-bit matrix products and of
#: 32-bit ones (TF32 where the device has it). Lightning 2.6 has such a table, too, but not to rely
#: on for the use of a peak: its H200, H100 NVL and A40 are figures with sparsity or of two cards
#: (2.0e15 for an H200 that does 0.99e15), it takes an L40 for an L4 and a laptop's RTX 4090 for a
#: desktop's, and it lacks B200, A30, L40S and AMD's devices.
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
    """Logs what training costs: time, wait for data, use of the device's peak, memory.

    At each log step, of the steps since the one before: `throughput/images_per_s`, over all ranks
    and accumulated micro-batches; `throughput/step_ms`, for one optimizer step;
    `throughput/data_wait`, the share of the time in which this rank waited for the loader, where
    the loader measures it (ours does: an attribute `wait_seconds`, which only grows); and
    `throughput/mfu`, the model's floating-point operations over what the devices could do at their
    peak, where that is known. Validation, checkpoints and the first step do not count. And of the
    whole training so far `throughput/peak_memory_gib`, the most memory in GiB that this rank's
    tensors took on its CUDA device; elsewhere, that its whole process took in RAM.

    Operations are counted once, in one forward and backward pass of the loss over a few examples:
    matrix products, convolutions and attention, a multiplication and its addition as two. The
    model, its gradients and all random numbers stay as they were.

    Args:
        peak_tflops: What one device can do at most in this run's precision, in 10¹² operations a
            second, above 0; None means what the data sheet of the device says, for those that are
            known; for a CPU nothing is, and there is no `mfu`.

    Raises:
        ValueError: If peak_tflops is not above 0.

    References:
        Chowdhery et al. (2022), PaLM, arXiv:2204.02311, appendix B (the use of the peak; here all
        operations that are really made count, so recomputed activations do).
    """

    # The clock of the host alone: nothing waits for the device. At a log step both have met, since
    # `Guard`, which stands before, and the logger have read numbers of the device.
    #
    # Lightning fetches a batch, moves it, and only then calls on_train_batch_start, so no hook is
    # next to the fetching: the loader itself says how long it was waited for. The clock stops when
    # a validation or a checkpoint begins. It starts again at the end of the validation; there is
    # no hook at the end of a checkpoint, so there at the next batch, whose fetching counts.

    def __init__(self, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and not peak_tflops > 0:
            raise ValueError(f"Throughput: peak_tflops must be above 0, got {peak_tflops}.")
        self.peak_tflops = peak_tflops
        self.flops_per_image: float | None = None
        self._forget()

    def _forget(self) -> None:
        """Begin a run: until the first step is done, nothing counts."""
        self._peak: float | None = None  # FLOP/s of all devices
        self._first: tuple[int, float] | None = None  # the first step, and when it was done
        self._last_step = 0
        self._waited = 0.0
        self._reset(None)

    def _reset(self, now: float | None) -> None:
        self._images = self._steps = 0
        self._busy = self._wait = 0.0
        self._since = now  # when the clock was started; None while it stands

    # The clock -------------------------------------------------------------------------------

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to measure."""
        self._forget()
        self._last_step = trainer.global_step
        device, peak = pl_module.device, self.peak_tflops
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        if peak is None and device.type == "cuda":
            peak = _peak(torch.cuda.get_device_name(device), str(trainer.precision))
        self._peak = None if peak is None else peak * 1e12 * trainer.world_size
        self._waited = _wait_seconds(trainer)

    def _pause(self, *args: Any) -> None:
        """Stop the clock until the next batch is fetched."""
        if self._since is not None:
            self._busy += perf_counter() - self._since
            self._since = None

    on_validation_start = on_save_checkpoint = _pause

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock again."""
        if self._first is not None and self._since is None:
            self._since = perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock if it stands; count the operations once, if a peak is known."""
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
                warn(f"Throughput: there is no mfu, since its count failed: {error}")

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a micro-batch; at a log step log."""
        losses = outputs.get("losses") if isinstance(outputs, dict) else None
        if losses is not None:  # a step of one's own may not tell, or have skipped the batch
            self._images += len(losses)
        step = trainer.global_step
        if step == self._last_step:  # a micro-batch of an accumulated step
            return
        self._last_step = step
        self._steps += 1
        now = perf_counter()
        if self._first is None:
            # Until here loaders were started, kernels chosen and graphs compiled.
            self._first = step, now
            self._reset(now)
        elif step % trainer.log_every_n_steps == 0:
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
        """How long the run will take from here, as h:mm:ss; None if that is not known.

        By the mean of the run so far, validations and checkpoints included.

        Args:
            trainer: Knows how many steps there will be.
        """
        step = trainer.global_step
        if self._first is None or trainer.max_steps < 1 or step <= self._first[0]:
            return None
        seconds = (perf_counter() - self._first[1]) / (step - self._first[0])
        return str(timedelta(seconds=round(seconds * (trainer.max_steps - step))))


def _wait_seconds(trainer: L.Trainer) -> float:
    """How long this rank has waited for batches so far; 0 where its loader does not measure it."""
    return float(getattr(trainer.train_dataloader, "wait_seconds", 0.0))


def _peak(device: str, precision: str) -> float | None:
    """Peak of a device in 10¹² FLOP/s, if it is one of the table."""
    column = 0 if precision.startswith(("16", "bf16")) else 1
    if column and not precision.startswith("32"):
        return None
    found = [peak for name, peak in PEAKS.items() if re.search(name, device)]
    return float(found[0][column]) if found else None


def peak_memory(device: torch.device) -> float | None:
    """The most memory so far, in GiB; None where the system does not tell.

    On CUDA that of tensors, without what the allocator keeps for later, and nothing waits for the
    device; elsewhere that of the whole process.

    Args:
        device: Where training happens.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB elsewhere


def count_flops(pl_module: Any, batch: Any) -> float:
    """Floating-point operations of a training step for one image, forward and backward.

    Args:
        pl_module: The LitDiffusion, which stays as it is.
        batch: A batch of the training data, of which a few examples are taken.

    Raises:
        RuntimeError: If nothing was counted, such as in kernels that torch knows nothing of.
    """
    x = batch["image"][:EXAMPLES]
    modes = [(module, module.training) for module in pl_module.modules()]
    parameters = [p for p in pl_module.parameters() if p.requires_grad]
    pl_module.eval()
    for module, _ in modes:
        if getattr(module, "activation_checkpointing", False):
            module.training = True  # of itself alone: it recomputes, and nothing in it drops out
    try:
        with (
            torch.random.fork_rng([x.device] if x.device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager"),
            torch.enable_grad(),
            FlopCounterMode(display=False) as counter,
        ):
            cond = {name: c[: len(x)] for name, c in pl_module.condition(batch).items()}
            loss = pl_module.loss(pl_module.denoiser, x, **cond).loss.mean()
            torch.autograd.grad(loss, parameters, allow_unused=True)
    finally:
        for module, mode in modes:
            module.training = mode
    if not counter.get_total_flops():
        raise RuntimeError("torch found no operation that it can count")
    return counter.get_total_flops() / len(x)
