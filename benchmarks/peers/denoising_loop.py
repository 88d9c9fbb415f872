"""denoising-diffusion-pytorch with its own Trainer, whose `train()` runs every step.

Adam, clipping to norm 1 and autocast by accelerate, its average by ema-pytorch, here after every
step instead of every tenth, as in the others. Flash attention as in its README, with the dim and
dim_mults chosen here; all its levels have attention, linear where ours have none. The batches come
from memory instead of its folder of images, already in [−1, 1].
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet
from torch import Tensor, nn

from peers.task import Task, nearest
from peers.worker import Turns


def candidates(task: Task) -> Iterator[dict[str, Any]]:
    """Widths in eights, with levels in proportion to ours; heads of its width or of ours."""
    first = task.channels[0]
    for dim in range(max(8, first // 2 // 8 * 8), 2 * first + 1, 8):
        for head in (32, 64):
            yield {
                "dim": dim,
                "dim_mults": tuple(max(1, wide // first) for wide in task.channels),
                "channels": task.shape[0],
                "full_attn": task.attends,
                "attn_dim_head": head,
                "flash_attn": True,
            }


def forward(network: nn.Module, z: Tensor) -> Tensor:
    """A call of the network."""
    return network(z, z.new_zeros(len(z)))


def train(task: Task, turns: Turns) -> None:
    """Train in turns."""
    chosen, size = nearest(task, candidates(task), Unet, forward)
    turns.introduce("denoising-diffusion-pytorch", size, chosen)
    if task.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    network = Unet(**chosen)
    if task.channels_last:
        network.to(memory_format=torch.channels_last)
    if task.compiled:
        network.compile()
    diffusion = GaussianDiffusion(network, image_size=task.shape[1:], auto_normalize=False)
    with tempfile.TemporaryDirectory() as folder:
        for i in range(100):  # it wants a hundred images, and never opens them
            Path(folder, f"{i}.png").touch()
        trainer = Trainer(
            diffusion.to(task.device),
            folder,
            train_batch_size=max(16, task.batch),  # of its own loader
            train_lr=2e-4,
            ema_update_every=1,
            save_and_sample_every=10**12,
            amp=task.precision == "bf16",
            mixed_precision_type="bf16",
            calculate_fid=False,
            results_folder=folder,
        )
        trainer.dl = task.batches()
        for steps in turns:
            trainer.train_num_steps = trainer.step + steps
            trainer.train()
