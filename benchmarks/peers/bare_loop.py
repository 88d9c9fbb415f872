"""Our network and our loss in a hand-written loop: a lower bound on the framework's time.

AdamW in one kernel (fused), gradients clipped to norm 1, the average by one foreach operation.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_diffusion import CosineSchedule, Denoiser, DiffusionLoss, SigmoidWeighting, VPrediction
from lit_diffusion.nn import UNet
from peers.task import Task, measure
from peers.worker import Turns


def arguments(task: Task) -> dict[str, tuple[int, ...] | int]:
    """What our network is built from."""
    return {
        "shape": task.shape,
        "channels": task.channels,
        "blocks": task.blocks,
        "attention": task.attention,
    }


def forward(network: nn.Module, z: Tensor) -> Tensor:
    """A call of the network."""
    return network(z, z.new_zeros(len(z)))


def train(task: Task, turns: Turns) -> None:
    """Train in turns."""
    chosen = arguments(task)
    network = UNet(**chosen, channels_last=task.channels_last)
    turns.introduce("", measure(network, forward, task), chosen)
    network.to(task.device)
    if task.compiled:
        network.compile()
    denoiser = Denoiser(network, VPrediction())
    loss = DiffusionLoss(CosineSchedule(), SigmoidWeighting(bias=2.0)).to(task.device)
    parameters = list(network.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=2e-4, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    batches = task.batches()
    for steps in turns:
        for _ in range(steps):
            x = next(batches).to(task.device, non_blocking=True)
            with task.autocast():
                value = loss(denoiser, x).loss.mean()
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1e-4)
