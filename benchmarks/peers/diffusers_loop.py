"""diffusers' UNet2DModel in a loop like its example of unconditional training.

DDPMScheduler.add_noise, the error of ε, AdamW with the example's parameters, clipping to norm 1,
its EMAModel with warm-up. Accelerate and the learning-rate schedule of the example are omitted, to
its advantage. The noise level scales and shifts (resnet_time_scale_shift) and heads are 64 wide,
as in ours, so it is our network layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F

from peers.task import Task, nearest
from peers.worker import Turns


def candidates(task: Task) -> Iterator[dict[str, Any]]:
    """Our levels, with as many groups as they can be parted into, at most its own 32."""
    common = math.gcd(*task.channels)
    down = ["AttnDownBlock2D" if attends else "DownBlock2D" for attends in task.attends]
    yield {
        "sample_size": task.shape[1:],
        "in_channels": task.shape[0],
        "out_channels": task.shape[0],
        "layers_per_block": task.blocks,
        "block_out_channels": task.channels,
        "down_block_types": down,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(down)],
        "add_attention": task.attends[-1],
        "attention_head_dim": min(64, *task.channels),
        "norm_num_groups": max(n for n in range(1, 33) if common % n == 0),
        "resnet_time_scale_shift": "scale_shift",
    }


def forward(network: nn.Module, z: Tensor) -> Tensor:
    """A call of the network."""
    return network(z, z.new_zeros(len(z))).sample


def train(task: Task, turns: Turns) -> None:
    """Train in turns."""
    chosen, size = nearest(task, candidates(task), UNet2DModel, forward)
    turns.introduce("diffusers", size, chosen)
    network = UNet2DModel(**chosen).to(task.device)
    if task.channels_last:
        network.to(memory_format=torch.channels_last)
    if task.compiled:
        network.compile()
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=2e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    average = EMAModel(
        network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    batches = task.batches()
    for steps in turns:
        for _ in range(steps):
            x = next(batches).to(task.device, non_blocking=True)
            eps = torch.randn_like(x)
            t = torch.randint(0, 1000, (len(x),), device=x.device)
            z = scheduler.add_noise(x, eps, t)
            with task.autocast():
                out = network(z, t).sample
            F.mse_loss(out.float(), eps).backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            average.step(network.parameters())
