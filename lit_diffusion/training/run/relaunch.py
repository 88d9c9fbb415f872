"""Ranks that torchrun has started again after one of them died.

    torchrun --max-restarts 2 …   attempt 0 → a rank dies → attempt 1, all ranks anew → …

The ranks of an attempt find each other through a store that the agent of torchrun keeps between
attempts. torch (2.11 to 2.15 at least) leaves the addresses of the last attempt in it, so that the
first rank of the next one connects to a process that is gone, and every relaunch fails. Here each
attempt has keys of its own.
"""

from __future__ import annotations

import os
from typing import Any

from torch import distributed as dist

__all__ = ["join_relaunched"]


def join_relaunched(trainer: Any) -> None:
    """Connect the ranks of a relaunched job; otherwise the trainer does it, later.

    Args:
        trainer: Of Lightning, before it starts.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not (attempt and kept and dist.is_available()) or dist.is_initialized():
        return
    if trainer.world_size < 2:
        return
    strategy = trainer.strategy
    backend = getattr(strategy, "process_group_backend", None)
    if backend is None:
        backend = "nccl" if strategy.root_device.type == "cuda" else "gloo"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    store = dist.TCPStore(host, port, world, is_master=False)
    keys = dist.PrefixStore(f"attempt_{attempt}", store)
    dist.init_process_group(backend, store=keys, world_size=world, rank=rank)
