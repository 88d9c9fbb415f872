"""The task of all candidates, and how their networks are made equal in size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCHES = 8  # in memory, taken in turn


@dataclass(frozen=True)
class Task:
    """One training for all: the images, our network, and how to compute.

    Args:
        shape: Channels, height and width.
        channels: Features of our network's levels.
        blocks: Residual blocks of a level on the way down.
        attention: Heights of the feature maps with attention.
        batch: Images in a step.
        device: cpu or cuda.
        precision: 32, or bf16 for autocast.
        compiled: Whether the network is compiled.
        channels_last: Whether every network keeps the features of a pixel side by side.
        parameters: Of our network, which the others come near to; 0 while not known.
        flops: Of our network for an image, forward and backward.
    """

    shape: tuple[int, int, int]
    channels: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    batch: int
    device: str
    precision: str
    compiled: bool
    channels_last: bool
    parameters: int = 0
    flops: int = 0

    @property
    def attends(self) -> tuple[bool, ...]:
        """Whether a level has attention, from the finest to the coarsest."""
        height = self.shape[1]
        return tuple((height >> level) in self.attention for level in range(len(self.channels)))

    def batches(self) -> Iterator[Tensor]:
        """Batches in [−1, 1], the same for all, on the host; pinned if there is a GPU."""
        source = torch.Generator().manual_seed(0)
        shape = (self.batch, *self.shape)
        made = [torch.rand(shape, generator=source).mul_(2).sub_(1) for _ in range(BATCHES)]
        return cycle([x.pin_memory() for x in made] if self.device == "cuda" else made)

    def autocast(self) -> AbstractContextManager[Any]:
        """Where the network and its loss are computed."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16")


class Size(NamedTuple):
    """How large a network is.

    Args:
        parameters: That are trained.
        flops: Operations for an image, forward and backward: matrix products, convolutions and
            attention, a multiplication and its addition as two.
    """

    parameters: int
    flops: int


def measure(
    network: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor], task: Task
) -> Size:
    """The size of a network, by one pass of a single image over the CPU.

    Args:
        network: As it was made.
        forward: Calls it with noisy images.
        task: Has the shape of the images.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    # One kind of attention for all devices, of whose products each is counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        out = forward(network, torch.zeros(1, *task.shape))
        torch.autograd.grad(out.sum(), parameters, allow_unused=True)
    return Size(sum(p.numel() for p in parameters), counter.get_total_flops())


def nearest(
    task: Task,
    candidates: Iterable[dict[str, Any]],
    build: Callable[..., nn.Module],
    forward: Callable[[nn.Module, Tensor], Tensor],
    tolerance: float = 0.02,
) -> tuple[dict[str, Any], Size]:
    """The arguments that make a peer's network most like ours, and its size.

    Among those whose parameters are as many as ours, up to the tolerance, it is the one whose
    operations are nearest; if there is none, the one whose parameters are nearest.

    Args:
        task: Has the size of our network.
        candidates: Arguments, each of which a user of the library might choose.
        build: Makes the network from them.
        forward: Calls it with noisy images.
        tolerance: Relative difference of the parameters that is let pass.
    """
    off = []
    for arguments in candidates:
        with FakeTensorMode():  # many, so none is filled with numbers
            count = sum(p.numel() for p in build(**arguments).parameters())
        off.append((abs(count / task.parameters - 1), arguments))
    best = min(off, key=lambda one: one[0])
    chosen = [one for one in off if one[0] <= tolerance] or [best]
    sizes = [(measure(build(**a), forward, task), a) for _, a in chosen]
    size, arguments = min(sizes, key=lambda one: abs(one[0].flops - task.flops))
    return arguments, size
