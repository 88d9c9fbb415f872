"""What happens at each noise level: the NoiseLevelLoss callback and `lit-diffusion compare`."""

import csv
import dataclasses
import functools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
import warm
from test_bound import tiny_data, trainer
from torch import nn

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import (
    EMA,
    LastCheckpoint,
    LitDiffusion,
    NoiseLevelLoss,
)
from lit_diffusion.training.callbacks import noise_level_loss
from lit_diffusion.training.last_weights import measure_again
from lit_diffusion.training.run.noise_levels import NoiseLevels, read_table, table_text

CONFIGS = Path(__file__).parents[2] / "configs"


def tiny_model(**arguments):
    torch.manual_seed(0)
    defaults = {
        "network": UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10),
        "schedule": ld.LinearSchedule(-10.0, 13.3),
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
    }
    return LitDiffusion(**{**defaults, **arguments})


class Keep(L.Callback):
    """Keeps what the steps of both stages return, apart for each record of the table."""

    def __init__(self):
        self.train, self.val = [[]], [[]]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train[-1].append(outputs)

    def on_validation_batch_end(self, trainer, pl_module, outputs, *args):
        self.val[-1].append(outputs)

    def on_validation_end(self, trainer, pl_module):
        self.train.append([])
        self.val.append([])


def direct(outputs, bins, low, high):
    """Mean and variance of each bin, one example at a time."""
    found = [[] for _ in range(bins)]
    for step in outputs:
        for logsnr, error, loss in zip(
            *(step[name].tolist() for name in ("logsnr", "eps_mse", "losses")), strict=True
        ):
            i = min(bins - 1, max(0, math.floor((logsnr - low) / (high - low) * bins)))
            found[i].append((error, loss))
    return found


def test_the_sums_are_a_histogram(tmp_path):
    bins, low, high = 7, -10.0, 13.3
    keep, callback = Keep(), NoiseLevelLoss(bins)
    run = trainer(tmp_path, [keep, callback, EMA(0.9)], max_steps=12, accumulate_grad_batches=2)
    run.fit(tiny_model(), tiny_data(steps_per_epoch=10))
    records = read_table(tmp_path / "noise_levels.csv")
    told = [(record.step, record.stage) for record in records]
    assert told == [(5, "train"), (5, "val"), (10, "train"), (10, "val"), (12, "train"),
                    (12, "val")]  # fmt: skip
    kept = {"train": keep.train, "val": keep.val}
    for record in records:
        index = {5: 0, 10: 1, 12: 2}[record.step]
        found = direct(kept[record.stage][index], bins, low, high)
        total = sum(map(len, found))
        assert total == (20 if record.stage == "val" else 32 if record.step == 12 else 80)
        assert record.edges.tolist() == pytest.approx(
            [low + i * (high - low) / bins for i in range(bins + 1)], abs=1e-6
        )
        for i, members in enumerate(found):
            n = len(members)
            assert int(record.count[i]) == n
            assert int(record.not_finite[i]) == 0
            width = (high - low) / bins
            assert float(record.density[i]) == pytest.approx(n / total / width, rel=1e-6)
            for k, name in enumerate(("eps_mse", "loss")):
                values = torch.tensor([member[k] for member in members], dtype=torch.float64)
                mean = getattr(record, name)[i]
                variance = getattr(record, f"{name}_variance")[i]
                if n == 0:
                    assert math.isnan(mean)
                else:
                    assert float(mean) == pytest.approx(float(values.mean()), rel=1e-6)
                    spread = float(values.var(correction=0))
                    assert float(variance) == pytest.approx(spread, rel=1e-5, abs=1e-12)
    assert (tmp_path / "noise_levels.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_average_weights_are_validated(tmp_path):
    last, callback = LastCheckpoint(), NoiseLevelLoss(4)
    run = trainer(tmp_path, [callback, EMA(0.9), last], max_steps=5)
    run.fit(tiny_model(), tiny_data())
    record = read_table(tmp_path / "noise_levels.csv")[-1]
    assert record.stage == "val"
    mean = (record.count * record.eps_mse).sum() / record.count.sum()
    assert float(mean) == pytest.approx(float(run.callback_metrics["val/eps_mse"]), rel=1e-5)
    averaged = LitDiffusion.load_from_checkpoint(last._path)
    found = trainer(tmp_path).validate(averaged, tiny_data(), verbose=False)[0]
    assert float(mean) == pytest.approx(found["val/eps_mse"], rel=1e-5)


def outputs(logsnr, error, loss):
    names = ("logsnr", "eps_mse", "losses")
    return dict(zip(names, map(torch.tensor, (logsnr, error, loss)), strict=True))


def alone(**arguments):
    """A callback with bins on [0, 4], and a trainer that only counts."""
    callback = NoiseLevelLoss(4, **arguments)
    callback._ends = (0.0, 4.0)
    return callback, SimpleNamespace(global_step=0, is_global_zero=True)


def test_what_is_not_finite_is_counted_apart():
    nan, inf = math.nan, math.inf
    callback, run = alone()
    logsnr = [0.5, 0.6, 1.5, 2.5, nan, -7.0, 9.0, 4.0]
    error = [1.0, nan, inf, 2.0, 1.0, 3.0, 5.0, 7.0]
    loss = [1.0, 1.0, 1.0, -inf, 1.0, 3.0, 5.0, 7.0]
    callback.on_train_batch_end(run, None, outputs(logsnr, error, loss), None, 0)
    edges = torch.linspace(0, 4, 5, dtype=torch.float64)
    norms = torch.full((4,), nan)
    record = NoiseLevels.of_sums(1, "train", edges, callback._sums[:5], norms)
    assert record.count.tolist() == [2, 0, 0, 2]  # what is beyond the ends counts at the ends
    assert record.not_finite.tolist() == [2, 1, 1, 0]  # an example without a λ is in the first
    assert record.eps_mse[[0, 3]].tolist() == [2, 6]
    assert record.loss_variance[[0, 3]].tolist() == [1, 1]
    density = [value * 8 for value in record.density.tolist()]
    assert density == pytest.approx([4, 1, 1, 2])


class Spoil(L.Callback):
    """Makes some losses of a step NaN, before NoiseLevelLoss sees them."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            outputs["losses"][:3] = math.nan


def test_what_is_not_finite_is_reported(tmp_path):
    run = trainer(tmp_path, [Spoil(), NoiseLevelLoss(5)], max_steps=5)
    with pytest.warns(UserWarning, match=r"3 losses up to step 5 \(train\) were NaN.*λ between"):
        run.fit(tiny_model(), tiny_data())
    train, val = read_table(tmp_path / "noise_levels.csv")
    assert int(train.not_finite.sum()) == 3
    assert int(train.count.sum()) == 37
    assert int(val.not_finite.sum()) == 0
    assert train.loss[train.count > 0].isfinite().all()


def test_only_non_finite_losses_can_be_drawn_too(tmp_path):
    class SpoilAll(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            outputs["losses"][:] = math.inf

    run = trainer(tmp_path, [SpoilAll(), NoiseLevelLoss(5)], max_steps=2)
    with pytest.warns(UserWarning, match="16 losses"):
        run.fit(tiny_model(), tiny_data())
    record, _ = read_table(tmp_path / "noise_levels.csv")
    assert record.eps_mse.isnan().all()
    assert (tmp_path / "noise_levels.png").is_file()


# Resuming ----------------------------------------------------------------------------------------


class Killed(Exception):  # noqa: N818
    """What a kill is to a run."""


class KillIn(L.Callback):
    """Ends a run in one of its hooks, at a step."""

    def __init__(self, hook, step):
        setattr(self, hook, functools.partial(self._kill, step))

    def _kill(self, step, trainer, *args):
        if trainer.global_step == step:
            raise Killed


def fit(folder, callbacks=(), steps=12, ckpt_path=None, **arguments):
    callback = NoiseLevelLoss(6, probe_every_n_steps=2, probe_examples=3)
    last = LastCheckpoint(every_n_steps=3)
    run = trainer(folder, [EMA(0.9), callback, *callbacks, last], max_steps=steps, **arguments)
    data = tiny_data(steps_per_epoch=10 * run.accumulate_grad_batches)
    model = tiny_model()
    run.fit(model, data, ckpt_path=ckpt_path)
    if model.validated_step < 0:
        measure_again(run, model)


@pytest.fixture
def no_pictures(monkeypatch):
    """They take longer than these trainings."""
    monkeypatch.setattr(noise_level_loss, "save_figure", lambda figure, path: None)
    monkeypatch.setattr(noise_level_loss, "plot_noise_levels", lambda records: None)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(
    ("hook", "step", "accumulate"),
    [
        ("on_train_batch_end", 2, 1),  # before there is a checkpoint to go on from
        ("on_train_batch_end", 5, 1),
        ("on_train_batch_end", 8, 1),
        ("on_train_batch_end", 8, 2),
        ("on_validation_start", 10, 1),
        ("on_validation_end", 10, 2),  # when it is written, and no checkpoint knows of it
        ("on_train_end", 12, 1),
    ],
)
def test_a_resumed_run_continues_the_file(tmp_path, hook, step, accumulate):
    whole, part = tmp_path / "whole", tmp_path / "part"
    arguments = {"accumulate_grad_batches": accumulate, "val_check_interval": 5 * accumulate}
    fit(whole, **arguments)
    with pytest.raises(Killed):
        fit(part, [KillIn(hook, step)], **arguments)
    path = part / "checkpoints" / "last.ckpt"
    fit(part, ckpt_path=path if path.is_file() else None, **arguments)
    first, second = ((folder / "noise_levels.csv").read_text() for folder in (whole, part))
    assert first == second
    records = read_table(part / "noise_levels.csv")
    assert [r.step for r in records if r.stage == "train"][-1] == 12
    assert [r.step for r in records if r.stage == "val"] == [5, 10, 12]
    assert all(r.gradient_norm.isfinite().all() for r in records if r.stage == "train")


@pytest.mark.usefixtures("no_pictures")
def test_a_run_that_goes_on_replaces_its_last_partial_record(tmp_path):
    fit(tmp_path / "whole", steps=20)
    fit(tmp_path / "part", steps=12)
    steps = [record.step for record in read_table(tmp_path / "part" / "noise_levels.csv")]
    assert steps == [10, 10, 12, 12]
    path = tmp_path / "part" / "checkpoints" / "last.ckpt"
    fit(tmp_path / "part", steps=12, ckpt_path=path)  # measured again, and nothing lost
    assert [r.step for r in read_table(tmp_path / "part" / "noise_levels.csv")] == steps
    fit(tmp_path / "part", steps=20, ckpt_path=path)
    files = [tmp_path / name / "noise_levels.csv" for name in ("whole", "part")]
    assert files[0].read_text() == files[1].read_text()


@pytest.mark.usefixtures("no_pictures")
def test_the_bins_of_a_learned_range_stay(tmp_path):
    def model():
        schedule = ld.LearnedSchedule(-8.0, 12.0, learn="both")
        return tiny_model(schedule=schedule, decoder=ld.SoftmaxDecoder(17), schedule_lr=0.05)

    last = LastCheckpoint()
    run = trainer(tmp_path, [EMA(0.9), NoiseLevelLoss(5), last], max_steps=5)
    trained = model()
    run.fit(trained, tiny_data())
    assert trained.loss.schedule.ends != (-8.0, 12.0)
    run = trainer(tmp_path, [EMA(0.9), NoiseLevelLoss(5), LastCheckpoint()], max_steps=10)
    run.fit(model(), tiny_data(), ckpt_path=last._path)
    records = read_table(tmp_path / "noise_levels.csv")
    assert [record.step for record in records] == [5, 5, 10, 10]
    assert {(float(r.edges[0]), float(r.edges[-1])) for r in records} == {(-8.0, 12.0)}
    callbacks = [EMA(0.9), NoiseLevelLoss(6), LastCheckpoint()]
    other = trainer(tmp_path, callbacks, max_steps=15)
    with pytest.raises(ValueError, match="set bins to 5"):
        other.fit(model(), tiny_data(), ckpt_path=last._path)


# What it costs -----------------------------------------------------------------------------------


class Noisy(nn.Module):
    """A network with dropout, batch statistics, a frozen part and a part kept in eval mode."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Dropout(0.3), nn.Conv2d(4, 1, 3, padding=1))
        self.frozen = nn.Conv2d(1, 1, 1).requires_grad_(False)

    def forward(self, z, logsnr, label=None):
        return self.second(self.first(self.frozen(z))) + torch.rand_like(z) * 0


def trained(folder, callbacks):
    torch.manual_seed(0)
    model = tiny_model(network=Noisy())
    model.denoiser.network.second.eval()
    losses = []

    class Losses(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append((float(outputs["loss"]), float(torch.rand(()))))

    run = trainer(folder, [*callbacks, Losses()], max_steps=7, accumulate_grad_batches=2)
    run.fit(model, tiny_data())
    return losses, model.state_dict()


@pytest.mark.filterwarnings("ignore:network cannot be kept", "ignore:.*in eval mode at the start")
def test_training_is_the_same_bit_for_bit(tmp_path):
    plain, weights = trained(tmp_path / "a", [])
    watched, same = trained(tmp_path / "b", [NoiseLevelLoss(5, probe_every_n_steps=1)])
    assert plain == watched
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    record = read_table(tmp_path / "b" / "noise_levels.csv")[0]
    assert (record.gradient_norm > 0).all()


@pytest.mark.filterwarnings("ignore:network cannot be kept")
def test_the_probe_is_the_gradient_and_leaves_no_trace():
    model = tiny_model(network=Noisy())
    network = model.denoiser.network
    network.train()
    network.second.eval()
    modes = [module.training for module in model.modules()]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    batch = {"image": torch.rand(8, 1, 8, 8) * 2 - 1, "label": torch.arange(8)}
    callback, _ = alone(probe_examples=5)
    state, before = torch.get_rng_state(), {k: v.clone() for k, v in model.state_dict().items()}
    norms = callback.gradient_norms(model, batch)
    assert torch.equal(callback.gradient_norms(model, batch), norms)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())

    from lit_diffusion.training.step.randomness import generators

    x, logsnr = batch["image"][:5], torch.full((5,), 2.5, dtype=torch.float64)
    eps = ld.noise_like(x, generators(model.seed, "probe", list(range(5))))
    model.zero_grad()
    model.eval()
    (model.denoiser(ld.diffuse(x, eps, logsnr), logsnr).eps - eps).square().mean().backward()
    squares = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None)
    assert float(norms[2]) == pytest.approx(float(squares.sqrt()), rel=1e-5)


@pytest.mark.filterwarnings("ignore:network cannot be kept")
def test_nothing_waits_for_the_device():
    # A tensor without data: whoever looks at a value raises.
    with torch.device("meta"):
        value = torch.ones(3)
        for look in (float, bool, torch.Tensor.item, torch.Tensor.tolist):
            with pytest.raises((RuntimeError, NotImplementedError)):
                look(value.sum())
    callback, run = alone(probe_every_n_steps=1)
    run.precision_plugin = SimpleNamespace(forward_context=torch.enable_grad)
    callback._sums = callback._sums.to("meta")
    model = tiny_model(network=Noisy()).to("meta")  # ours would ask for an autocast of "meta"
    names = ("logsnr", "eps_mse", "losses")
    for step in range(3):
        run.global_step = step + 1
        told = {name: torch.ones(8, device="meta") for name in names}
        batch = {"image": torch.ones(8, 1, 8, 8, device="meta")}
        batch["label"] = torch.ones(8, dtype=torch.long, device="meta")
        callback.on_train_batch_end(run, model, told, batch, step)
    assert callback._sums.is_meta


def test_a_step_only_adds(tmp_path, monkeypatch):
    """In a real run, `.item`, `.cpu`, `.tolist` and bool are called at validations only."""
    looks = []
    callback = NoiseLevelLoss(5)
    inner = callback.on_train_batch_end

    def watched(*args):
        with monkeypatch.context() as patch:
            for name in ("item", "cpu", "tolist", "numpy", "__bool__", "__float__", "__int__"):
                patch.setattr(
                    torch.Tensor, name, lambda self, *a, name=name, **k: looks.append(name)
                )
            inner(*args)

    callback.on_train_batch_end = watched
    trainer(tmp_path, [callback], max_steps=5).fit(tiny_model(), tiny_data())
    assert looks == []
    assert int(read_table(tmp_path / "noise_levels.csv")[0].count.sum()) == 40


# Whatever the batches and ranks ------------------------------------------------------------------


def validated(folder, size):
    """The table of a run whose training is nothing, so that only the batches differ."""
    model = tiny_model(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    run = trainer(folder, [NoiseLevelLoss(5)], max_steps=1, val_check_interval=1)
    run.fit(model, tiny_data(batch_size=size))
    return read_table(folder / "noise_levels.csv")[-1]


def same_numbers(one, other):
    for field in dataclasses.fields(one)[2:]:
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-8, equal_nan=True)


def test_validation_whatever_the_batches(tmp_path):
    first, *rest = (validated(tmp_path / str(size), size) for size in (20, 7, 1))
    assert first.stage == "val"
    for record in rest:
        same_numbers(first, record)


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
from test_noise_levels import *
if __name__ == "__main__":
    noise_level_loss.plot_noise_levels = noise_level_loss.save_figure = lambda *arguments: None
    callback = NoiseLevelLoss(5, probe_every_n_steps=2)
    last = LastCheckpoint(every_n_steps=3)
    callbacks = [KillIn("on_train_batch_end", {kill}), callback, last]
    run = trainer({folder!r}, callbacks, devices=2, strategy="ddp", max_steps=4,
                  val_check_interval=4, check_val_every_n_epoch=None)
    model = tiny_model(optimizer=functools.partial(torch.optim.SGD, lr=0.0))
    run.fit(model, tiny_data(batch_size=4, steps_per_epoch=4), ckpt_path={ckpt!r})
"""


def two_ranks(folder, kill=-1, ckpt=None):
    script = folder / "two.py"
    places = {"tests": str(Path(__file__).parent), "folder": str(folder)}
    script.write_text(TWO_RANKS.format(kill=kill, ckpt=ckpt, **places))
    return warm.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_two_ranks_tell_the_numbers_of_one_and_resume(tmp_path):
    killed = two_ranks(tmp_path, kill=4)
    assert "Killed" in killed.stderr
    assert not (tmp_path / "noise_levels.csv").exists()
    done = two_ranks(tmp_path, ckpt=str(tmp_path / "checkpoints" / "last.ckpt"))
    assert done.returncode == 0, done.stderr[-3000:]
    train, val = read_table(tmp_path / "noise_levels.csv")
    # Three steps before the kill and one after it, of two ranks of four examples.
    assert int(train.count.sum()) == (3 + 1) * 2 * 4
    assert (train.gradient_norm > 0).all()
    same_numbers(val, validated(tmp_path / "one", 20))


# From the shell ----------------------------------------------------------------------------------


DIGITS = ("--config", CONFIGS / "digits.yaml")
OVERLAY = ("--config", CONFIGS / "with" / "noise-levels.yaml")
SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=4",
    "--trainer.log_every_n_steps=1",
    "--data.steps_per_epoch=2",
    "--data.batch_size=16",
    "--data.val_examples=40",
    "--model.network.channels=[8,8]",
    "--model.network.attention=[]",
    "--model.sampler.steps=2",
)


@pytest.mark.slow
def test_two_runs_are_laid_over_each_other(cli):
    runs = []
    for extra in ((), ("--config", CONFIGS / "objective" / "flow-matching.yaml")):
        code, out, err = cli("fit", *DIGITS, *extra, *OVERLAY, *SMALL)
        assert code == 0, err
        runs.append(Path(out.splitlines()[-1].removeprefix("Run folder: ")))
        assert {"noise_levels.csv", "noise_levels.png"} <= {p.name for p in runs[-1].iterdir()}
    code, out, err = cli("compare", *runs, "--out", "figures/both.png")
    assert code == 0, err
    assert err == ""
    assert Path("figures/both.png").stat().st_size > 10_000
    head, *rows, figure = out.splitlines()
    assert head.startswith("ε-error at λ =")
    assert figure == "Figure: figures/both.png"
    for row, run in zip(rows, runs, strict=True):
        name, *numbers, stage, step = row.split()
        assert name == "/".join(run.parts[-2:])
        assert (stage, step) == ("val", "4")
        assert len(numbers) == 8
        assert all(float(number) > 0 for number in numbers)


def record(step, stage, low, high, errors):
    ones = torch.ones(len(errors), dtype=torch.float64)
    edges = torch.linspace(low, high, len(errors) + 1, dtype=torch.float64)
    error = torch.tensor(errors, dtype=torch.float64)
    return NoiseLevels(step, stage, edges, ones, 0 * ones, error, ones, error, ones, ones)


def folder_with(path, *records):
    path.mkdir(parents=True)
    (path / "noise_levels.csv").write_text(table_text([], header=True) + table_text(records))
    return path


def test_the_table_is_at_common_noise_levels(cli, tmp_path):
    # ε-error e^λ at the centres of the bins: what lies between them is exact, too.
    def exponential(low, high, bins):
        width = (high - low) / bins
        return [math.exp(low + (i + 0.5) * width) for i in range(bins)]

    one = folder_with(tmp_path / "a" / "1", record(1, "val", -5.0, 5.0, exponential(-5, 5, 10)))
    other = folder_with(
        tmp_path / "a" / "2",
        record(1, "val", -2.0, 6.0, [9.0] * 4),
        record(2, "train", -2.0, 6.0, [1.0] * 4),
        record(2, "val", -2.0, 6.0, exponential(-2, 6, 4)),
    )
    code, out, _ = cli("compare", one, other, "--out", "both.svg")
    assert code == 0
    head, *rows, _ = out.splitlines()
    levels = [float(word) for word in head.split()[4:-3]]
    assert (levels[0], levels[-1]) == (-1.0, 4.5)
    for row in rows:
        numbers = [float(word) for word in row.split()[1:-2]]
        exact = [math.exp(-1 + 5.5 * i / 6) for i in range(7)]
        half = (math.exp(4.5) - math.exp(-1.0)) / 2
        assert numbers == pytest.approx([*exact, half], rel=1e-3)
    apart = folder_with(tmp_path / "a" / "3", record(1, "val", 7.0, 9.0, [1.0, 2.0]))
    code, out, _ = cli("compare", one, apart, "--out", "apart.png")
    assert code == 0
    assert "no noise levels in common" in out
    assert Path("apart.png").is_file()


FIGURE = ("--out", "figure.png")


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        ((), "at least 1 run"),
        (("nowhere",), "nowhere is not a run folder"),
        (("good", "empty"), "empty is not a run folder"),
        (("good", "bare", *FIGURE), "bare has no noise_levels.csv"),
        (("good", "header", *FIGURE), "no record yet"),
        (("good", "other", *FIGURE), "not a table of NoiseLevelLoss: expected the columns"),
        (("good", "torn", *FIGURE), "not a table of NoiseLevelLoss"),
        (("good", "good"), "expected each run once"),
        (("good", "--out", "both.doc"), ".html, .png, .pdf, .svg, got both.doc"),
        (("good", "--colour"), "no argument is called --colour"),
    ],
)
def test_a_mistake_is_one_line_and_draws_nothing(cli, tmp_path, words, telling):
    folder_with(tmp_path / "good", record(1, "val", 0.0, 1.0, [1.0, 2.0]))
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare" / "checkpoints").mkdir(parents=True)
    folder_with(tmp_path / "header")
    texts = {"other": "step,loss\n1,2\n", "torn": table_text([], header=True) + "1,val,0\n"}
    for name, text in texts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "noise_levels.csv").write_text(text)
    code, out, err = cli("compare", *words)
    assert code == 2, err
    assert len(err.splitlines()) == 1
    assert telling in err
    assert out == ""
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (("--trainer.callbacks.bins=0",), "at least 1"),
        (("--trainer.callbacks.probe_every_n_steps=-1",), "at least 0"),
        (("--trainer.callbacks.probe_examples=0",), "at least 1"),
        (("--trainer.callbacks.bins=many",), "expected int, got many"),
        (OVERLAY, "listed twice"),
    ],
)
def test_a_mistake_in_a_config_is_one_line(cli, words, telling):
    code, _, err = cli("fit", *DIGITS, *OVERLAY, *words, *SMALL)
    assert code == 2, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert telling in errors[0]
    assert not Path("runs").exists()


def test_the_table_can_be_read_by_anyone(tmp_path):
    path = folder_with(tmp_path / "run", record(3, "val", 0.0, 2.0, [math.nan, 2.0]))
    with (path / "noise_levels.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["eps_mse"] for row in rows] == ["", "2"]
    assert [row["logsnr_min"] for row in rows] == ["0", "1"]
    assert [row["density"] for row in rows] == ["0.5", "0.5"]
    (again,) = read_table(path / "noise_levels.csv")
    assert again.edges.tolist() == [0, 1, 2]


def test_a_resumed_picture_goes_back_to_the_beginning(tmp_path):
    """The file keeps fewer digits of the edges than a run has; they are the same bins."""
    from lit_diffusion.training.run.noise_levels import plot_noise_levels, read_table, table_text

    edges = torch.linspace(-10, 13.3, 8, dtype=torch.float64) + 1e-7 / 3
    sums = torch.ones(5, 14, dtype=torch.float64)
    unknown = torch.full((7,), torch.nan, dtype=torch.float64)
    records = [NoiseLevels.of_sums(step, "val", edges, sums, unknown) for step in (10, 20, 30)]
    (tmp_path / "x.csv").write_text(table_text(records[:2], header=True))
    figure = plot_noise_levels([*read_table(tmp_path / "x.csv"), records[2]])
    (mesh,) = figure.axes[3].collections
    assert mesh.get_array().shape == (3, 7)
