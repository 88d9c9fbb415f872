"""A rank that dies or fails ends the whole job, soon and with a message, whoever started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 20  # seconds; the docs promise 10, and this machine may have others to serve

SPY = '''
"""Says that it is there; then one rank fails when told, and the others wait for ever."""
import os, time
from pathlib import Path
import lightning as L


class Spy(L.Callback):
    """Waits.

    Args:
        waits: Whether the ranks hang after the third step, or train on.
    """

    def __init__(self, waits: bool = True) -> None:
        self.waits = waits

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3:
            unfinished = Path(f".rank-{trainer.global_rank}")
            unfinished.write_text(str(os.getpid()))
            unfinished.rename(f"rank-{trainer.global_rank}")
        while trainer.global_step >= 3:
            if Path(f"fail-{trainer.global_rank}").exists():
                raise ValueError("this example is broken")
            if not self.waits:
                break
            time.sleep(0.05)
'''

WORDS = [
    "-m", "lit_diffusion", "fit", "--config", ROOT / "configs" / "digits.yaml",
    "--trainer.max_steps=1000000", "--trainer.accelerator=cpu", "--trainer.strategy=ddp",
    "--trainer.devices=2", "--trainer.enable_progress_bar=false", "--data.batch_size=4",
    "--model.network.channels=[8,8]", "--model.network.attention=[]", "--plugins=rank_spy",
    "--trainer.callbacks=rank_spy.Spy",
]  # fmt: skip


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes as Linux lists them")
@pytest.mark.parametrize(
    ("launcher", "victim", "how", "waits"),
    [
        ("lightning", 1, "dies", True),
        ("lightning", 0, "dies", True),
        ("lightning", 1, "fails", True),
        ("lightning", 0, "fails", False),
        ("torchrun", 0, "dies", True),
        ("torchrun", 1, "fails", False),
    ],
)
def test_one_ends_all(tmp_path, launcher, victim, how, waits):
    (tmp_path / "rank_spy.py").write_text(SPY)
    command = [sys.executable]
    if launcher == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
        command += ["--nproc-per-node=2", sys.executable]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    out = tmp_path / "out.txt"
    with out.open("w") as file:
        job = subprocess.Popen(
            list(map(str, [*command, *WORDS, f"--trainer.callbacks.waits={waits}"])),
            cwd=tmp_path, stdout=file, stderr=file, env=environment,
        )  # fmt: skip
    files = [tmp_path / f"rank-{rank}" for rank in (0, 1)]
    pids = []
    try:
        assert until(lambda: all(f.exists() for f in files), 120), out.read_text()[-3000:]
        pids = [int(file.read_text()) for file in files]
        start = time.monotonic()
        if how == "dies":
            os.kill(pids[victim], signal.SIGKILL)
        else:
            (tmp_path / f"fail-{victim}").touch()
        assert until(lambda: job.poll() is not None and not any(map(alive, pids)), LIMIT), (
            out.read_text()[-3000:]
        )
        print(f"{launcher}, rank {victim} {how}: {time.monotonic() - start:.1f} s")
    finally:
        for pid in [job.pid, *pids]:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    assert job.returncode != 0
    text = out.read_text()
    cause = "died without a word" if how == "dies" else "failed with ValueError: this example is"
    assert f"rank {victim} {cause}" in text
    assert f"rank {1 - victim} ends, too." in text
    if how == "fails":
        assert "lit-diffusion: error: this example is broken" in text


def test_one_rank_has_nobody_to_watch(tmp_path):
    from test_module import tiny_data, tiny_model, trainer

    from lit_diffusion.training import RankWatch

    watch = RankWatch()
    trainer(tmp_path, max_steps=1, callbacks=[watch]).fit(tiny_model(), tiny_data())
    assert watch._watch is None


def test_a_stranger_at_the_port_is_no_rank():
    import socket
    import threading

    from lit_diffusion.training.callbacks.rank_watch import _accept, _serve

    server, token = _serve(), b"0123456789abcdef"
    port = server.getsockname()[1]

    def call(words):
        with socket.create_connection(("localhost", port)) as stranger:
            stranger.sendall(words)
            time.sleep(0.2)

    def strangers_and_a_rank():
        call(b"GET / HTTP/1.1 and so on")
        call(b"short")
        call(token + (1).to_bytes(4, "big"))

    caller = threading.Thread(target=strangers_and_a_rank)
    caller.start()
    ((peer, rank),) = _accept(server, token, 1).items()
    assert rank == 1
    peer.close()
    caller.join()
