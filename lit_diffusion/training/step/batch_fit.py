"""A batch that does not fit into memory, and the largest one that does.

An out-of-memory error names the bytes of the last allocation, which nobody chose; what was chosen
is the size of the batch. So when a training step runs out of memory, its memory is freed, and
smaller parts of the same batch are tried to find the largest one that fits.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import inspect
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from lit_diffusion.training.run.environment import device_name
from lit_diffusion.training.run.trainer import all_callbacks
from lit_diffusion.training.step.batches import standard
from lit_diffusion.training.step.precision import has_bfloat16

__all__ = [
    "BatchFit",
    "lacks_memory",
    "largest_that_fits",
    "say_what_fits",
    "state_ratio",
    "step_fits",
]

#: What oneDNN reports; it then fails at any size.
BROKEN = "could not create a primitive"
#: Words of errors that have no class of their own: of allocators, cuBLAS, cuDNN and oneDNN.
WORDS = (
    "out of memory",
    "DefaultCPUAllocator",
    "bad_alloc",
    "ALLOC_FAILED",
    "unable to find an engine",
    BROKEN,
)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error means that there was no memory left.

    Args:
        error: Any.

    Example:
        >>> lacks_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
        True
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def largest_that_fits(n: int, fits: Callable[[int], bool]) -> int:
    """The largest batch below n that fits, to a sixteenth; 0 if not even one example does.

    By powers of two downwards until one fits, and from there by halves upwards.

    Args:
        n: A batch that does not fit, at least 1.
        fits: Tries a batch of a size.

    Example:
        >>> largest_that_fits(512, lambda size: size <= 360)
        352
    """
    low = 2 ** (n - 1).bit_length() // 2
    while low and not fits(low):
        low //= 2
    high, unit = min(2 * low, n), max(1, low // 16)
    while high - low > unit:
        middle = low + max(unit, (high - low) // 2 // unit * unit)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def step_fits(
    model: Any, batch: dict[str, Any], n: int, context: Callable[[], Any], accumulates: bool
) -> bool:
    """Try the forward and backward pass of the first n examples of a batch.

    No other rank takes part, since gradients are computed and not accumulated. The model is left
    unchanged, except for what a network changes in its own forward pass.

    Args:
        model: The LitDiffusion, in training mode.
        batch: A batch on the CPU.
        n: How many of its examples.
        context: Makes the context of a forward pass, such as autocast's.
        accumulates: Whether gradients of earlier micro-batches are held in the backward pass.
    """
    try:
        _two_steps(model, batch, n, context, accumulates)
        fits = True
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error) or BROKEN in str(error):  # oneDNN then fails at any size
            raise
        _let_go(error)
        fits = False
    _give_back(model.device)
    return fits


def _two_steps(
    model: Any, batch: dict[str, Any], n: int, context: Callable[[], Any], accumulates: bool
) -> None:
    """Two steps: the second finds the gradients of the first, and its fragmented memory."""
    whole = batch["image"].shape[:1]
    part = {
        name: value[:n].to(model.device)
        if isinstance(value, Tensor) and value.shape[:1] == whole
        else value
        for name, value in batch.items()
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients: Any = None
    for _ in range(2):
        with torch.enable_grad(), context():
            cond = model.condition(part)
            loss = model.loss(model.denoiser, part["image"], **cond).loss.mean()
        if not accumulates:
            gradients = None  # as the trainer: before the backward pass
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        del loss
    del gradients


def state_ratio(optimizer: torch.optim.Optimizer) -> float:
    """Bytes that an optimizer keeps per byte of parameters, measured on a small parameter.

    Args:
        optimizer: The optimizer, which is left unchanged.

    Example:
        >>> optimizer = torch.optim.Adam([torch.zeros(3, requires_grad=True)])
        >>> round(state_ratio(optimizer), 2)  # two moments
        2.0
    """
    group = optimizer.param_groups[0]
    small = torch.zeros_like(group["params"][0].new_empty(64, 64)).requires_grad_()
    small.grad = torch.zeros_like(small)
    twin = copy.copy(optimizer)
    twin.state, twin.param_groups = defaultdict(dict), [{**group, "params": [small]}]
    try:
        twin.step()
    except Exception:  # an optimizer that needs more than a gradient
        return 2.0  # as AdamW
    kept = [value for value in twin.state[small].values() if isinstance(value, Tensor)]
    return sum(value.nbytes for value in kept) / small.nbytes


def _let_go(error: BaseException | None) -> None:
    """Clear the frames of an error, which hold all that its step had computed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _callback_of(error: BaseException, callbacks: list[L.Callback]) -> str | None:
    """The callback in whose method an error was raised, by the innermost such frame."""
    kinds = {cls.__name__ for one in callbacks for cls in type(one).__mro__}
    frames = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [name.split(".")[-2] for name in frames if "." in name]
    return next((name for name in reversed(owners) if name in kinds), None)


def _give_back(device: torch.device) -> None:
    gc.collect()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def say_what_fits(error: BaseException, command: str) -> str:
    """One sentence about an out-of-memory error: the note of `BatchFit`, if there is one.

    Args:
        error: An out-of-memory error.
        command: The command of `lit-diffusion` that raised it.
    """
    if notes := getattr(error, "__notes__", None):
        return f"{notes[-1]} (LIT_DIFFUSION_TRACEBACK=1 shows where.)"
    portions = command in ("sample", "evaluate", "encode", "decode")
    remedy = "set --batch_size lower" if portions else "LIT_DIFFUSION_TRACEBACK=1 shows where"
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return f"expected {command} to fit into memory, got out of memory ({reason}): {remedy}."


class BatchFit(L.Callback):
    """Reports the largest batch that fits when memory runs out, and what else would help.

    `LitDiffusion` adds it by itself. The error is raised unchanged but for a note, which
    tracebacks show and the command line prints in its place.
    """

    # Other ranks wait in the collective that this one has not reached, until the search is over
    # and this process ends with the error.

    def __init__(self) -> None:
        self._batch: Any = None  # of the current step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch of the step."""
        self._batch = batch

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Drop it: an error from here on is not the step's."""
        self._batch = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Add the note."""
        batch, self._batch = self._batch, None
        if not lacks_memory(exception):
            return
        callback = _callback_of(exception, all_callbacks(trainer))
        _let_go(exception)
        reason = str(exception).strip().partition("\n")[0]
        stage, device = trainer.state.stage, pl_module.device
        room = f"the memory of {device_name(device)}"
        if device.type == "cuda":
            memory = torch.cuda.get_device_properties(device).total_memory
            room = f"{memory / 2**30:.1f} GiB of {device_name(device)}"
        got = f"to fit into {room}, got out of memory"
        with contextlib.suppress(ValueError):  # of a step that reads batches of its own form
            batch = None if batch is None else standard(move_data_to_device(batch, "cpu"))
        if callback is None and trainer.training and isinstance(batch, dict) and "image" in batch:
            n = len(batch["image"])
            try:
                found = self._search(trainer, pl_module, batch)
            except Exception:  # a failing search must not replace the error
                found = None
            advice = _advice(n, found, trainer.accumulate_grad_batches)
            how = " (tried without compiling)" if found and _is_compiled(pl_module) else ""
            advice += how + _thrift(trainer, pl_module)
            note = f"expected a batch of {n} images {got}{advice}."
        else:
            doing = (
                "a part of training" if stage is None or trainer.training else f"`{stage.value}`"
            )
            lower = "data.batch_size"
            if callback is not None:
                doing, lower = callback, "its batch_size, rows, columns or probe_examples"
            note = f"expected {doing} {got} ({reason}): set {lower} lower."
        exception.add_note(note)

    def _search(self, trainer: L.Trainer, model: Any, batch: dict[str, Any]) -> int | None:
        """The largest batch that fits; None if one rank cannot search alone."""
        shares = any(isinstance(module, nn.SyncBatchNorm) for module in model.modules())
        if shares or not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            return None
        model.zero_grad()
        _give_back(model.device)

        @contextlib.contextmanager
        def context() -> Iterator[None]:
            with contextlib.ExitStack() as stack:
                if _is_compiled(model):  # or each size would be compiled anew
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                yield stack.enter_context(trainer.precision_plugin.forward_context())

        def fits(n: int) -> bool:
            return step_fits(model, batch, n, context, trainer.accumulate_grad_batches > 1)

        n, cuda = len(batch["image"]), [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(cuda):
            try:
                moments = _reserve(trainer.optimizers)
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                return 0
            found = n if fits(n) else largest_that_fits(n, fits)
            del moments
        return found


def _reserve(optimizers: list[torch.optim.Optimizer]) -> list[Tensor]:
    """Allocate what the optimizers will allocate in their first step, unless it is past."""
    return [
        torch.empty(round(state_ratio(optimizer) * p.nbytes), dtype=torch.uint8, device=p.device)
        for optimizer in optimizers
        if not optimizer.state
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def _is_compiled(model: nn.Module) -> bool:
    return any(module._compiled_call_impl is not None for module in model.modules())


def _advice(n: int, fits: int | None, accumulated: int) -> str:
    """What to do about a batch of n; equal parts of it, accumulated, make the same steps."""
    if fits is None:
        return ": set data.batch_size lower"
    if fits == 0:
        return ", and not even one fits: take a smaller network"
    if fits == n:
        return (
            ", although as many fit when their step is tried again alone: something else takes "
            "the memory, such as another program; set data.batch_size a little lower"
        )
    parts = next(k for k in range(2, n + 1) if n % k == 0 and n // k <= fits)
    same = f"{n // parts} and trainer.accumulate_grad_batches={parts * accumulated} for the same"
    if n // parts == fits:
        ways = f"{same} steps"
    elif n // parts >= fits / 2:
        ways = f"{fits}, or {same} steps"
    else:  # the largest such part of n is very small
        ways = f"{fits}"
    return f"; the largest that fits is {fits}: set data.batch_size={ways}"


def _thrift(trainer: L.Trainer, model: Any) -> str:
    """Further ways to save memory that this run does not use yet."""
    ways = []
    if any(
        getattr(module, "activation_checkpointing", None) is False
        and "activation_checkpointing" in inspect.signature(type(module)).parameters
        for module in model.denoiser.network.modules()
    ):
        ways.append("activation_checkpointing of the network")
    if (
        trainer.precision == "32-true"
        and model.device.type != "cpu"
        and has_bfloat16(model.device)
    ):
        ways.append("trainer.precision=bf16-mixed")
    return f"; less memory is taken by {' and by '.join(ways)}" if ways else ""
