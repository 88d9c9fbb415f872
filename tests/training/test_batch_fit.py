"""A batch that does not fit: the sentence, the search behind it, and memory that runs out."""

import gc
import os
import re
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
from test_module import tiny_data, trainer
from torch import nn

from lit_diffusion.nn import DiT, UNet
from lit_diffusion.training import Guard, LastCheckpoint, LitDiffusion, SampleGrid
from lit_diffusion.training.step.batch_fit import (
    BatchFit,
    lacks_memory,
    largest_that_fits,
    state_ratio,
    step_fits,
)

ROOT = Path(__file__).parents[2]


class Narrow(nn.Module):
    """A device that has room for so many images at a time.

    Args:
        shape: (C, H, W).
        room: Most images.
        after: Calls before it becomes narrow.
        evaluating: Whether it is narrow in evaluation instead of training.
    """

    def __init__(self, room=24, after=0, evaluating=False):
        super().__init__()
        self.shape = (1, 8, 8)
        self.room, self.after, self.evaluating = room, after, evaluating
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.calls, self.held, self.seen = 0, [], []

    def forward(self, z, logsnr):
        out = self.layer(z)
        self.calls += 1
        self.seen.append((len(z), sum(one() is not None for one in self.held)))
        if self.evaluating != self.training and self.calls > self.after and len(z) > self.room:
            self.held.append(weakref.ref(out))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return out


def model(network, **arguments):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        return LitDiffusion(network=network, shape=(1, 8, 8), **arguments)


def fail(folder, network, batch_size=64, kind=torch.OutOfMemoryError, **arguments):
    """The note on the error of a training."""
    run = trainer(folder, **{"max_steps": 4, **arguments})
    data = tiny_data(batch_size=batch_size, val_examples=70)
    with pytest.raises(kind) as caught:
        run.fit(model(network), data)
    [note] = caught.value.__notes__
    assert "\n" not in note
    return note


# The search ------------------------------------------------------------------------------------


def test_the_search_finds_the_largest_to_a_sixteenth():
    for n in (1, 2, 3, 7, 16, 100, 127, 512, 513):
        for room in range(n):
            tried = []

            def fits(size, room=room, tried=tried):
                tried.append(size)
                return size <= room

            found = largest_that_fits(n, fits)
            assert found <= room < found + max(1, found / 16 + 1)
            assert found == 0 or found in tried
            assert all(0 < size < n for size in tried)
            assert len(tried) <= n.bit_length() + 5
            assert found == room or room >= 32


@pytest.mark.parametrize(
    ("optimizer", "ratio"),
    [
        (torch.optim.AdamW, 2),
        (lambda p: torch.optim.AdamW(p, fused=True), 2),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), 3),
        (torch.optim.SGD, 0),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), 1),
        (torch.optim.LBFGS, 2),  # cannot be tried: it asks for the loss
    ],
)
def test_what_an_optimizer_will_keep(optimizer, ratio):
    made = optimizer([torch.zeros(3, 5, requires_grad=True)])
    torch.optim.lr_scheduler.ConstantLR(made)
    before = made.param_groups[0]["params"][0]
    assert state_ratio(made) == pytest.approx(ratio, abs=0.01)
    assert not made.state
    assert made.param_groups[0]["params"][0] is before
    assert before.grad is None


def test_a_trial_leaves_no_trace():
    trained = model(Narrow(room=5)).train()
    images = {"image": torch.randn(8, 1, 8, 8), "index": torch.arange(8), "total": 8}
    weights = {name: value.clone() for name, value in trained.state_dict().items()}

    def trial(n):
        return step_fits(trained, images, n, torch.enable_grad, accumulates=False)

    assert [trial(n) for n in (4, 5, 6, 8)] == [True, True, False, False]
    assert all(p.grad is None for p in trained.parameters())
    assert all(torch.equal(value, weights[n]) for n, value in trained.state_dict().items())
    trained.denoiser.network.layer = nn.Conv2d(3, 3, 1)  # that is no lack of memory
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        trial(4)


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (MemoryError(), True),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_lack_memory(error, lacks):
    assert lacks_memory(error) is lacks


# The sentence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 2])
def test_the_sentence_names_the_largest_batch(tmp_path, after):
    network = Narrow(room=24, after=after)
    note = fail(tmp_path, network)
    assert note == (
        "expected a batch of 64 images to fit into the memory of cpu, got out of memory; the "
        "largest that fits is 24: set data.batch_size=24, or 16 and "
        "trainer.accumulate_grad_batches=4 for the same steps."
    )
    # When the search began nothing of the failed step was there, nor of a failed trial later.
    assert len(network.held) > 2
    assert all(alive == 0 for _, alive in network.seen)
    assert max(size for size, _ in network.seen) == 64


def test_the_named_batch_trains(tmp_path):
    network = Narrow(room=24)
    size = int(re.search(r"data\.batch_size=(\d+)", fail(tmp_path, network))[1])
    run = trainer(tmp_path, max_steps=2)
    run.fit(model(network), tiny_data(batch_size=size))
    assert run.global_step == 2


@pytest.mark.parametrize(
    ("batch_size", "room", "accumulated", "words"),
    [
        (64, 32, 1, "is 32: set data.batch_size=32 and trainer.accumulate_grad_batches=2 for"),
        (64, 40, 3, "is 40: set data.batch_size=40, or 32 and trainer.accumulate_grad_batches=6"),
        (61, 40, 1, "is 40: set data.batch_size=40."),  # a prime has no equal parts
        (2, 1, 1, "is 1: set data.batch_size=1 and trainer.accumulate_grad_batches=2 for"),
        (64, 0, 1, "out of memory, and not even one fits: take a smaller network."),
        (1, 0, 1, "out of memory, and not even one fits: take a smaller network."),
    ],
)
def test_what_to_do(tmp_path, batch_size, room, accumulated, words):
    arguments = {"accumulate_grad_batches": accumulated}
    assert words in fail(tmp_path, Narrow(room), batch_size, **arguments)


def test_memory_that_others_took_is_not_the_batch(tmp_path):
    class Once(Narrow):
        def forward(self, z, logsnr):
            self.room = 0 if self.calls == 0 else 64
            return super().forward(z, logsnr)

    note = fail(tmp_path, Once())
    assert "although as many fit when their step is tried again alone" in note


@pytest.mark.slow
def test_what_takes_less_memory(tmp_path, monkeypatch):
    def no_room(self, z, *args):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    networks = {
        UNet: {"channels": (8,), "attention": ()},
        DiT: {"depth": 1, "width": 8, "heads": 1},
    }
    for kind, arguments in networks.items():
        monkeypatch.setattr(kind, "forward", no_room)
        note = fail(tmp_path, kind((1, 8, 8), **arguments), batch_size=2)
        assert note.endswith("less memory is taken by activation_checkpointing of the network.")
        spared = kind((1, 8, 8), **arguments, activation_checkpointing=True)
        note = fail(tmp_path, spared, batch_size=2)
        assert note.endswith("take a smaller network.")


def test_the_moments_of_the_first_step_are_kept_free(tmp_path, monkeypatch):
    """Memory that an optimizer has not taken yet is not there for the batch."""
    from lit_diffusion.training.step import batch_fit

    taken = []

    class Wide(Narrow):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.wide = nn.Parameter(torch.zeros(1000, 100))

        def forward(self, z, logsnr):
            live = [o for o in gc.get_objects() if type(o) is torch.Tensor]
            taken.append(sum(o.nbytes for o in live if o.dtype == torch.uint8 and o.dim() == 1))
            return super().forward(z, logsnr) + 0 * self.wide.sum()

    for after, expected in ((0, 800_000), (2, 0)):  # later the moments are there
        taken.clear()
        fail(tmp_path, Wide(room=1, after=after), batch_size=2)
        assert taken[-1] == pytest.approx(expected, abs=20_000)  # the state of a generator, too
    monkeypatch.setattr(batch_fit, "state_ratio", lambda optimizer: 1e13)
    assert "not even one fits" in fail(tmp_path, Wide(room=1), batch_size=2)


def test_out_of_a_step_there_is_no_batch_to_name(tmp_path):
    class Greedy(L.Callback):
        def on_train_batch_end(self, *args):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")

    note = fail(tmp_path, Narrow(room=64), callbacks=[Greedy()])
    assert note == (
        "expected Greedy to fit into the memory of cpu, got out of memory (CUDA out of memory. "
        "Tried): set its batch_size, rows, columns or probe_examples lower."
    )


def test_in_validation_and_sampling(tmp_path):
    wide = {"num_sanity_val_steps": 0, "val_check_interval": 1, "check_val_every_n_epoch": None}
    network = Narrow(room=30, evaluating=True)
    note = fail(tmp_path, network, **wide)
    assert note.startswith(
        "expected `validate` to fit into the memory of cpu, got out of memory ("
    )
    assert note.endswith("): set data.batch_size lower.")
    network = Narrow(room=70, evaluating=True)
    note = fail(tmp_path, network, callbacks=[SampleGrid(rows=10, columns=8)], **wide)
    assert "expected SampleGrid to fit" in note
    assert note.endswith(": set its batch_size, rows, columns or probe_examples lower.")


def test_a_compiled_network_is_tried_uncompiled(tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs[0]))
        return graph

    class Tight(Narrow):
        def forward(self, z, logsnr):
            if len(z) > self.room:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.layer(z)

    torch.compiler.reset()
    network = Tight(room=24)
    network.layer.compile(backend=backend)
    network(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    before = list(compiled)
    note = fail(tmp_path, network)
    assert "set data.batch_size=24, or 16 and" in note
    assert note.endswith("for the same steps (tried without compiling).")
    assert before
    assert compiled == before


def test_other_errors_get_no_note(tmp_path):
    class Broken(Narrow):
        def forward(self, z, logsnr):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken") as caught:
        trainer(tmp_path, max_steps=1).fit(model(Broken()), tiny_data())
    assert not hasattr(caught.value, "__notes__")


def test_it_comes_along_once_and_before_the_checkpoints(tmp_path):
    run = trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint(), Guard()])
    trained = model(Narrow())
    for _ in range(2):
        run.fit(trained, tiny_data())
    assert [type(c) for c in run.callbacks].count(BatchFit) == 1
    kinds = [type(callback) for callback in run.callbacks]
    assert kinds.index(Guard) < kinds.index(BatchFit) < kinds.index(LastCheckpoint)


# On the command line ---------------------------------------------------------------------------

PLUGIN = '''
"""Networks and a callback for memory that runs out."""
import gc, os, resource
from pathlib import Path
import lightning as L
import torch
from torch import nn


class Small(nn.Module):
    """A device that has room for so many images.

    Args:
        shape: (C, H, W).
        rank: The rank with the small device.
    """
    room = 40

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8), rank: int = 0) -> None:
        super().__init__()
        self.shape, self.rank = tuple(shape), rank
        self.layer = nn.Conv2d(shape[0], shape[0], 3, padding=1)

    def forward(self, z, logsnr, label=None):
        if len(z) > self.room and int(os.environ.get("LOCAL_RANK", 0)) == self.rank:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.layer(z)


class Heavy(nn.Module):
    """Keeps some 32 MiB for the backward pass of one image of 64 numbers, and computes little.

    Args:
        shape: (C, H, W).
    """

    def __init__(self, shape: tuple[int, int, int] = (1, 8, 8)) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.layer = nn.Linear(64, 64)

    def forward(self, z, logsnr, label=None):
        h = self.layer(z.flatten(1))
        wide = h[:, None].expand(-1, 4096, -1)
        for _ in range(32):
            wide = wide.sin()
        return wide.mean(1).view(z.shape)


class Limit(L.Callback):
    """Limits the memory that this process may still take from the first step on.

    Args:
        mib: How much, in MiB.
    """

    def __init__(self, mib: int = 100) -> None:
        self.mib = mib

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 0:
            gc.collect()
            kib = Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]
            size = int(kib) * 1024 + self.mib * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (size, size))
'''

WORDS = (
    "--config", ROOT / "configs" / "digits.yaml", "--plugins=memory_plugin",
    "--trainer.accelerator=cpu", "--trainer.max_steps=3", "--data.steps_per_epoch=3",
    "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]", "--data.streaming=false",
    "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1",
)  # fmt: skip


def lit_diffusion(folder, *words):
    """Run `lit-diffusion fit` as a process of its own; (exit code, stderr)."""
    (folder / "memory_plugin.py").write_text(PLUGIN)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    # What is free is given back at once, and no thread takes memory for later: what counts is
    # what is in use, as on a GPU whose cache was emptied.
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "lit_diffusion", "fit", *map(str, [*WORDS, *words])],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_memory_that_really_runs_out(tmp_path):
    limit = ("--trainer.callbacks=memory_plugin.Limit", "--trainer.callbacks.mib=358")
    words = ("--model.network=memory_plugin.Heavy", *limit)  # of 33 or 34 MiB an image
    code, err = lit_diffusion(tmp_path, *words, "--data.batch_size=16")
    assert code == 2, err[-3000:]
    [line] = [line for line in err.splitlines() if line.startswith("lit-diffusion: error")]
    assert "expected a batch of 16 images to fit into the memory of cpu" in line
    assert "Traceback" not in err
    size = int(re.search(r"the largest that fits is (\d+): set data\.batch_size", line)[1])
    assert size in (9, 10)
    code, err = lit_diffusion(tmp_path, *words, f"--data.batch_size={size}")
    assert code == 0, err[-3000:]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes as Linux lists them")
def test_one_rank_of_two(tmp_path):
    words = ("--trainer.strategy=ddp", "--trainer.devices=2", "--data.batch_size=64")
    code, err = lit_diffusion(
        tmp_path, *words, "--model.network=memory_plugin.Small", "--model.network.rank=1"
    )
    assert code != 0
    errors = [line for line in err.splitlines() if line.startswith("lit-diffusion: error")]
    assert len(errors) == 1, err[-3000:]  # who fails speaks
    assert "the largest that fits is 40: set data.batch_size=40, or 32 and" in errors[0]
    here = str(tmp_path)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            assert os.readlink(folder / "cwd") != here, (folder / "cmdline").read_text()
        except OSError:
            continue


@pytest.mark.slow
def test_in_one_line(cli, tmp_path, monkeypatch):
    (tmp_path / "memory_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    words = (*WORDS, "--model.network=memory_plugin.Small")
    code, _, err = cli("fit", *words, "--data.batch_size=64")
    assert code == 2
    assert err.splitlines()[-1].startswith("lit-diffusion: error: expected a batch of 64 images")
    assert "fits is 40: set data.batch_size=40, or 32 and" in err
    assert not (tmp_path / "runs").exists()  # nothing is left of a run that did nothing

    code, _, err = cli("fit", *words, "--data.batch_size=40")
    assert code == 0, err
    drawn = ("sample", "--ckpt_path=last", "--plugins=memory_plugin", "--num_samples=50")
    code, _, err = cli(*drawn)
    assert code == 2
    assert "expected sample to fit into memory, got out of memory" in err.splitlines()[-1]
    assert err.endswith("): set --batch_size lower.\n")
    code, _, err = cli(*drawn, "--batch_size=25")
    assert code == 0, err

    monkeypatch.setenv("LIT_DIFFUSION_TRACEBACK", "1")
    with pytest.raises(torch.OutOfMemoryError):
        cli(*drawn)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(tmp_path, monkeypatch):
    (tmp_path / "memory_plugin.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    from memory_plugin import Heavy

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2**30 / total)
    try:
        note = fail(tmp_path, Heavy(), accelerator="gpu", devices=1)  # 64 images of 33 MiB
        assert re.search(r"to fit into [\d.]+ GiB of \w+", note)
        size = int(re.search(r"the largest that fits is (\d+)", note)[1])
        assert 26 <= size <= 31
        run = trainer(tmp_path, max_steps=3, accelerator="gpu", devices=1)
        run.fit(model(Heavy()), tiny_data(batch_size=size))
        assert run.global_step == 3
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        gc.collect()
        torch.cuda.empty_cache()
