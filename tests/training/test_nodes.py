"""Several nodes: here they are processes on loopback, started as on a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from resume import repeatable

from lit_diffusion.training.run.checkpoints import load_checkpoint

CONFIGS = Path(__file__).parents[2] / "configs"
JOB = [
    "fit", "--config", str(CONFIGS / "digits.yaml"),
    "--config", str(CONFIGS / "with" / "ddp.yaml"),
    "--config", str(CONFIGS / "with" / "adaptive.yaml"), "--trainer.callbacks.every_n_steps=2",
    "--model.network.channels=[8,8]", "--model.network.attention=[]", "--data.batch_size=8",
    "--data.steps_per_epoch=3", "--data.val_examples=16", "--trainer.max_steps=6",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--model.sampler.steps=2",
    "--trainer.log_every_n_steps=1",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def result(folder):
    (path,) = folder.glob("runs/digits/*/checkpoints/last.ckpt")
    return load_checkpoint(path), repeatable(path.parents[1] / "metrics.csv")


@pytest.mark.slow
def test_two_nodes_are_two_ranks(tmp_path):
    nodes, one = tmp_path / "nodes", tmp_path / "one"
    nodes.mkdir()
    one.mkdir()
    port = free_port()
    started = []
    for node in range(2):
        words = [
            *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
            *(f"--node_rank={node}", "--master_addr=127.0.0.1", f"--master_port={port}"),
            *("-m", "lit_diffusion", *JOB, "--trainer.num_nodes=2", "--trainer.devices=1"),
        ]
        with (nodes / f"log-{node}.txt").open("w") as log:
            started.append(
                subprocess.Popen(words, cwd=nodes, env=ENVIRONMENT, stdout=log, stderr=log)
            )
    codes = [process.wait(timeout=300) for process in started]
    logs = [(nodes / f"log-{node}.txt").read_text() for node in range(2)]
    assert codes == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    # The first node alone speaks, and there is one run folder.
    assert "Run folder" in logs[0]
    assert "Run folder" not in logs[1]
    words = [sys.executable, "-m", "lit_diffusion", *JOB, "--trainer.devices=2"]
    done = warm.run(words, cwd=one, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (ours, rows), (theirs, other_rows) = result(nodes), result(one)
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(ours[key][name], theirs[key][name]) for name in theirs[key])
    assert rows == other_rows


DYING = """
import os
from lit_diffusion.training.module import LitDiffusion

step = LitDiffusion.training_step

def die(self, batch, batch_idx):
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if attempt < 2 and self.global_step == 4 + attempt and self.global_rank == 0:
        os._exit(9)
    return step(self, batch, batch_idx)

LitDiffusion.training_step = die
from lit_diffusion.__main__ import main
main()
"""


@pytest.mark.slow
def test_torchrun_relaunches_a_job_more_than_once(tmp_path):
    (tmp_path / "job.py").write_text(DYING)
    words = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        *("--max_restarts=2", "job.py", *JOB, "--trainer.devices=2", "--ckpt_path=last"),
    ]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("last.ckpt, step 3.") == 2
    assert result(tmp_path)[0]["global_step"] == 6
