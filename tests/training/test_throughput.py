"""Throughput: its arithmetic on a clock that only moves when it is told to, and its count."""

import csv
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from test_module import tiny_data, tiny_model, trainer
from torch import nn

from lit_diffusion.training import EMA, Guard, LastCheckpoint, Throughput
from lit_diffusion.training.callbacks import throughput
from lit_diffusion.training.run.metrics_csv import RunLogger


@pytest.fixture
def clock(monkeypatch):
    """A clock: [seconds]."""
    now = [100.0]
    monkeypatch.setattr(throughput, "perf_counter", lambda: now[0])
    return now


class Costs(L.Callback):
    """Moves the clock: what a step takes, the first one above all, and a validation."""

    def __init__(self, clock):
        self.clock = clock

    def on_before_backward(self, trainer, *args):
        self.clock[0] += 1.0 + 50.0 * (trainer.global_step == 0)

    def on_validation_epoch_start(self, *args):
        self.clock[0] += 100.0


class SlowCheckpoint(LastCheckpoint):
    """A checkpoint that takes its time on the disk."""

    def __init__(self, clock, every_n_steps):
        super().__init__(every_n_steps)
        self.clock = clock

    def _save(self, *arguments, **options):
        super()._save(*arguments, **options)
        self.clock[0] += 1000.0


class SlowLoader:
    """A loader, three seconds for a batch, that does not measure its user's waiting."""

    def __init__(self, loader, clock):
        self.loader, self.clock = loader, clock

    def __iter__(self):
        for batch in self.loader:
            self.clock[0] += 3.0
            yield batch

    def __len__(self):
        return len(self.loader)


class MeasuringLoader(SlowLoader):
    """One that does."""

    wait_seconds = 1000.0  # of an earlier training

    def __iter__(self):
        for batch in super().__iter__():
            self.wait_seconds += 3.0
            yield batch


def fit(folder, callbacks, data=None, model=None, **arguments):
    data = data or tiny_data(batch_size=4, steps_per_epoch=6)
    run = trainer(folder, logger=RunLogger(folder / "a" / "1"), callbacks=callbacks, **arguments)
    run.fit(model or tiny_model(), data)
    with (folder / "a" / "1" / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    return {
        int(row["step"]): {
            name.removeprefix("throughput/"): float(value)
            for name, value in row.items()
            if name.startswith("throughput/") and value and "memory" not in name
        }
        for row in rows
        if row["train/loss"]
    }, run


def slow(data, clock, kind=MeasuringLoader):
    whole = data.train_dataloader
    data.train_dataloader = lambda: kind(whole(), clock)
    return data


EXPECTED = {"images_per_s": 1.0, "step_ms": 4000.0, "data_wait": 0.75}  # 4 images in 3 s + 1 s


@pytest.mark.parametrize("kind", [MeasuringLoader, SlowLoader])
def test_images_steps_and_the_wait_for_data(tmp_path, clock, kind):
    data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock, kind)
    found, _ = fit(tmp_path, [Throughput(), Costs(clock)], data, max_steps=12)
    assert found[0] == {}  # the first step does not count
    expected = dict(EXPECTED)
    if kind is SlowLoader:
        del expected["data_wait"]
    for step in range(1, 12):
        assert found[step] == pytest.approx(expected), step  # no mfu on a CPU


def test_all_ranks_count():
    rates = Throughput()
    rates._images, rates._steps, rates._wait = 32, 4, 1.0
    assert rates._rates(2.0, ranks=8) == {
        "images_per_s": 128.0, "step_ms": 500.0, "data_wait": 0.5,
    }  # fmt: skip


def test_validation_and_checkpoints_do_not_count(tmp_path, clock):
    data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock)
    saved = SlowCheckpoint(clock, every_n_steps=2)
    callbacks = [Throughput(), Costs(clock), saved]
    found, _ = fit(tmp_path, callbacks, data, max_steps=12, val_check_interval=3)
    assert clock[0] > 5000
    for step in range(1, 12):
        assert found[step] == pytest.approx(EXPECTED), step


def test_accumulated_batches_are_one_step(tmp_path, clock):
    data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock)
    found, _ = fit(
        tmp_path, [Throughput(), Costs(clock)], data, max_steps=6, accumulate_grad_batches=3
    )
    assert found[3] == pytest.approx({**EXPECTED, "step_ms": 12000.0})


def test_a_log_step_speaks_for_the_steps_since_the_last(tmp_path, clock):
    class Slower(Costs):
        def on_before_backward(self, trainer, *args):
            self.clock[0] += 1.0 + 4.0 * (trainer.global_step == 7)

    data = slow(tiny_data(batch_size=4, steps_per_epoch=12), clock)
    found, _ = fit(
        tmp_path, [Throughput(), Slower(clock)], data, max_steps=12, log_every_n_steps=4
    )
    assert [round(found[step]["step_ms"]) for step in (3, 7, 11)] == [4000, 5000, 4000]


def test_a_second_training_with_it_starts_anew(tmp_path, clock):
    rates = Throughput()
    for part in ("one", "two"):
        data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock)
        found, _ = fit(tmp_path / part, [rates, Costs(clock)], data, max_steps=6)
        assert found[0] == {}
        assert found[5] == pytest.approx(EXPECTED)


def test_the_time_that_is_left(tmp_path, clock):
    told = []

    class Ask(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            told.append(rates.time_left(trainer))

    rates = Throughput()
    data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock)
    fit(tmp_path, [rates, Costs(clock), Ask()], data, max_steps=1000, limit_train_batches=3,
        max_epochs=1)  # fmt: skip
    assert told == [None, str(throughput.timedelta(seconds=4 * 998)), "1:06:28"]


# Memory ----------------------------------------------------------------------------------------


class Memory(L.Callback):
    """What is logged of memory, at each step, and what the system says then."""

    def __init__(self):
        self.logged, self.system = [], []

    def on_train_batch_end(self, trainer, *args):
        if "throughput/peak_memory_gib" in trainer.callback_metrics:
            self.logged.append(float(trainer.callback_metrics["throughput/peak_memory_gib"]))
            told = Path("/proc/self/status").read_text()
            self.system.append(int(told.partition("VmHWM:")[2].split()[0]) / 2**20)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what it knows of the process")
def test_the_peak_of_memory_is_what_the_system_says(tmp_path):
    memory = Memory()
    fit(tmp_path, [Throughput(), memory], max_steps=5)
    assert len(memory.logged) == 4  # from the second step on
    assert memory.logged == sorted(memory.logged)
    assert memory.logged == pytest.approx(memory.system, rel=0.05)


def test_the_peak_on_a_gpu_and_on_a_mac(monkeypatch):
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device: (3 + device.index) << 30
    )
    assert throughput.peak_memory(torch.device("cuda", 1)) == 4.0
    if sys.platform == "linux":
        here = throughput.peak_memory(torch.device("cpu"))
        monkeypatch.setattr(sys, "platform", "darwin")  # where the same number is of bytes
        assert throughput.peak_memory(torch.device("cpu")) == pytest.approx(here / 1024, rel=0.05)
        monkeypatch.setitem(sys.modules, "resource", None)
        assert throughput.peak_memory(torch.device("cpu")) is None


# Operations ------------------------------------------------------------------------------------


class Convolution(nn.Module):
    """One convolution with dropout and statistics of its own."""

    def __init__(self):
        super().__init__()
        self.shape = (1, 8, 8)
        self.norm = nn.BatchNorm2d(1)
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, z, logsnr):
        return self.drop(self.layer(self.norm(z)))


def convolution(**arguments):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        return tiny_model(network=Convolution(), **arguments)


def test_operations_of_one_convolution():
    model = convolution()
    batch = {"image": torch.zeros(20, 1, 8, 8)}
    forward = 2 * 9 * 64  # a multiplication and an addition for each weight and pixel
    # Backward as much for the weights, and as much for what stands before: the normalisation.
    state = torch.get_rng_state()
    assert throughput.count_flops(model, batch) == 3 * forward
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_the_count_leaves_no_trace(tmp_path):
    """Weights, moments, buffers and losses are those of a run without, bit for bit."""
    found = {}
    for peak in (None, 1e-6):
        folder = tmp_path / str(peak)
        callbacks = [EMA(0.9), Guard(), Throughput(peak), LastCheckpoint(2)]
        rates, run = fit(folder, callbacks, model=convolution(), max_steps=6)
        found[peak] = torch.load(folder / "a/1/checkpoints/last.ckpt", weights_only=True), run
        assert ("mfu" in rates[3]) == (peak is not None)
        assert run.lightning_module.denoiser.network.training
    (plain, one), (counted, other) = found.values()
    for key in ("state_dict", "current_model_state"):
        assert "denoiser.network.norm.running_mean" in plain[key]
        assert all(torch.equal(plain[key][name], counted[key][name]) for name in plain[key])
    moments = [c["optimizer_states"][0]["state"][0]["exp_avg"] for c in (plain, counted)]
    assert torch.equal(*moments)
    assert one.callback_metrics["train/loss"] == other.callback_metrics["train/loss"]


def test_the_use_of_the_peak(tmp_path, clock):
    data = slow(tiny_data(batch_size=4, steps_per_epoch=6), clock)
    callbacks = [Throughput(peak_tflops=1e-9), Costs(clock)]
    found, _ = fit(tmp_path, callbacks, data, convolution(), max_steps=4)
    # One image a second, of 3456 operations, on a device that can do a thousand.
    assert found[3]["mfu"] == pytest.approx(3 * 2 * 9 * 64 / 1000)


def test_what_cannot_be_counted_ends_no_run(tmp_path):
    class Nothing(nn.Module):
        def __init__(self):
            super().__init__()
            self.shape = (1, 8, 8)
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, z, logsnr):
            return self.scale * z

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        model = tiny_model(network=Nothing())
    with pytest.warns(UserWarning, match="no mfu, since counting operations failed"):
        found, _ = fit(tmp_path, [Throughput(1.0)], model=model, max_steps=3)
    assert set(found[2]) == {"images_per_s", "step_ms", "data_wait"}


def test_peaks_are_found_by_the_names_that_devices_have():
    names = {
        "NVIDIA H100 80GB HBM3": (989, 494),
        "NVIDIA H100 PCIe": (756, 378),
        "NVIDIA H100 NVL": (835, 417),
        "NVIDIA H200": (989, 494),
        "NVIDIA GH200 480GB": (989, 494),
        "NVIDIA A100-SXM4-80GB": (312, 156),
        "NVIDIA A10": (125, 62.5),
        "NVIDIA L40S": (362, 183),
        "NVIDIA L4": (121, 60),
        "Tesla T4": (65, 8.1),
        "NVIDIA GeForce RTX 4090": (165, 82.6),
    }
    for name, peaks in names.items():
        assert throughput._peak(name, "bf16-mixed") == peaks[0], name
        assert throughput._peak(name, "16-mixed") == peaks[0], name
        assert throughput._peak(name, "32-true") == peaks[1], name
    for name in ("NVIDIA A10G", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GB200", "Apple M2"):
        assert throughput._peak(name, "bf16-mixed") is None, name
    assert throughput._peak("NVIDIA H200", "64-true") is None


def test_a_peak_of_nothing_is_refused():
    with pytest.raises(ValueError, match="peak_tflops must be above 0, got 0"):
        Throughput(peak_tflops=0.0)


def test_a_step_of_ones_own_that_does_not_tell_its_losses(tmp_path):
    class Mine(type(tiny_model())):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx)["loss"]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*cannot be kept in checkpoints")
        model = Mine()
    found, _ = fit(tmp_path, [Throughput()], model=model, max_steps=3)
    assert set(found[2]) == {"step_ms", "data_wait"}
