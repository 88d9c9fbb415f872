"""k-diffusion's ImageDenoiserModelV1 and Denoiser in a loop like its train.py.

Its config defines the optimizer (AdamW, its parameter groups), the loss and the average with its
warm-up (EMAWarmup, ema_update, a loop over the parameters by name). Clipping to norm 1.
Accelerate, the gradient-noise scale and augmentation are omitted, to its advantage. Our levels;
since it has no middle blocks and no extra ones on the way up, some levels have more.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from peers.task import Task, nearest
from peers.worker import Turns

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of old imports
    import k_diffusion as K


def candidates(task: Task) -> Iterator[dict[str, Any]]:
    """Our levels, each with as many blocks as ours or one more."""
    for more in product(range(2), repeat=len(task.channels)):
        yield {
            "type": "image_v1",
            "input_channels": task.shape[0],
            "mapping_out": 4 * task.channels[0],
            "depths": [task.blocks + n for n in more],
            "channels": list(task.channels),
            "self_attn_depths": list(task.attends),
            "augment_wrapper": False,
            "sigma_data": 0.5,
        }


def config(model: dict[str, Any]) -> dict[str, Any]:
    """Its whole config, all else by default."""
    return K.config.load_config({"model": {**model, "input_size": [32, 32]}})


def build(**model: Any) -> nn.Module:
    """The network of a config."""
    return K.config.make_model(config(model))


def forward(network: nn.Module, z: Tensor) -> Tensor:
    """A call of the network."""
    return network(z, z.new_ones(len(z)))


def train(task: Task, turns: Turns) -> None:
    """Train in turns."""
    chosen, size = nearest(task, candidates(task), build, forward)
    turns.introduce("k-diffusion", size, chosen)
    options = config(chosen)
    network = build(**chosen).to(task.device)
    model = K.config.make_denoiser_wrapper(options)(network)
    averaged = copy.deepcopy(model)
    if task.channels_last:
        network.to(memory_format=torch.channels_last)
    if task.compiled:
        network.compile()
    adam = options["optimizer"]
    optimizer = torch.optim.AdamW(
        network.param_groups(adam["lr"]),
        lr=adam["lr"],
        betas=tuple(adam["betas"]),
        eps=adam["eps"],
        weight_decay=adam["weight_decay"],
    )
    warmup = K.utils.EMAWarmup(
        power=options["ema_sched"]["power"], max_value=options["ema_sched"]["max_value"]
    )
    batches = task.batches()
    for steps in turns:
        for _ in range(steps):
            x = next(batches).to(task.device, non_blocking=True)
            eps = torch.randn_like(x)
            sigma = K.utils.rand_log_normal([len(x)], loc=-1.2, scale=1.2, device=x.device)
            with task.autocast():
                loss = model.loss(x, eps, sigma).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            K.utils.ema_update(model, averaged, warmup.get_value())
            warmup.step()
