"""LitDiffusion: one step, fixed validation, sampling, checkpoints, EMA, exact resume."""

import functools
import pickle
import sys
import warnings

import lightning as L
import pytest
import torch
import warm
from torch import nn

import lit_diffusion as ld
from lit_diffusion.description import build, describe
from lit_diffusion.nn import UNet
from lit_diffusion.training import (
    EMA,
    DataModule,
    LastCheckpoint,
    LitDiffusion,
    SampleGrid,
    WarmupDecayLR,
    WholeCheckpointIO,
)
from lit_diffusion.training.run.checkpoints import load_checkpoint


def tiny_model(**arguments):
    torch.manual_seed(0)
    defaults = {
        "network": UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10),
        "schedule": ld.LinearSchedule(-10.0, 13.3),
        "weighting": ld.SigmoidWeighting(1.0),
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
        "lr_scheduler": functools.partial(WarmupDecayLR, warmup=3, decay=0.5),
        "sampler": ld.DDIMSampler(steps=3),
    }
    return LitDiffusion(**{**defaults, **arguments})


def tiny_data(**arguments):
    defaults = {"batch_size": 8, "steps_per_epoch": 5, "val_examples": 20, "streaming": False}
    return DataModule(**{**defaults, **arguments})


def trainer(folder, **arguments):
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    arguments = {**defaults, **arguments}
    if any(isinstance(c, LastCheckpoint) for c in arguments.get("callbacks", [])):
        arguments = {"plugins": [WholeCheckpointIO()], **arguments, "enable_checkpointing": True}
    return L.Trainer(**arguments)


class Record(L.Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.losses, self.logsnr, self.val = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        assert not outputs["eps_mse"].requires_grad
        self.losses.append(float(outputs["loss"]))
        self.logsnr.append(outputs["logsnr"])

    def on_validation_end(self, trainer, pl_module):
        self.val.append(float(trainer.callback_metrics["val/loss"]))


def fit(folder, steps, ckpt_path=None, data=None, callbacks=(), **arguments):
    record = Record()
    model = tiny_model()
    run = trainer(
        folder,
        max_steps=steps,
        callbacks=[record, EMA(0.9), LastCheckpoint(), *callbacks],
        **arguments,
    )
    run.fit(model, data or tiny_data(), ckpt_path=ckpt_path)
    return record, model, run


def test_training_lowers_the_validation_loss(tmp_path):
    record, _, _ = fit(tmp_path, 30, val_check_interval=15, check_val_every_n_epoch=None)
    assert record.val[1] < record.val[0]


def test_a_stratified_batch_covers_the_accumulated_step(tmp_path):
    record, _, _ = fit(tmp_path, 3, data=tiny_data(steps_per_epoch=6), accumulate_grad_batches=2)
    assert len(record.losses) == 6
    schedule = ld.LinearSchedule(-10.0, 13.3)
    for step in range(3):
        t = schedule.time(torch.cat(record.logsnr[2 * step : 2 * step + 2])).sort().values
        assert torch.allclose(t.diff(), torch.full((15,), 1 / 16, dtype=torch.float64))


def test_validation_is_the_same_number_every_time_for_any_batch_size(tmp_path):
    model = perturbed(tiny_model())
    numbers = [
        trainer(tmp_path).validate(model, tiny_data(batch_size=size), verbose=False)[0]["val/loss"]
        for size in (20, 20, 7, 1)
    ]
    assert numbers[0] == numbers[1]
    assert numbers == pytest.approx([numbers[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [5, 7])
def test_resuming_is_exact(tmp_path, streaming, accumulate, stop):
    arguments = {"accumulate_grad_batches": accumulate, "val_check_interval": 5}

    def data():
        return tiny_data(streaming=streaming, steps_per_epoch=10)

    whole, model, _ = fit(tmp_path / "whole", 14, data=data(), **arguments)
    first, _, run = fit_until(tmp_path / "part", stop, data(), arguments)
    path = run.checkpoint_callback._path
    second, resumed, _ = fit(tmp_path / "part", 14, ckpt_path=path, data=data(), **arguments)
    assert first.losses + second.losses == whole.losses
    ours, theirs = resumed.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    raw = [
        load_checkpoint(r / "checkpoints" / "last.ckpt")
        for r in (tmp_path / "whole", tmp_path / "part")
    ]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(raw[0][key][n], raw[1][key][n]) for n in raw[0][key]), key
    first_moments = [ckpt["optimizer_states"][0]["state"][0]["exp_avg"] for ckpt in raw]
    assert torch.equal(*first_moments)
    assert raw[0]["lr_schedulers"] == raw[1]["lr_schedulers"]


class StopAt(L.Callback):
    """Ends a run in the middle, as a kill just after a checkpoint would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == self.step:
            trainer.should_stop = True


def fit_until(folder, stop, data, arguments):
    record = Record()
    model = tiny_model()
    run = trainer(
        folder,
        max_steps=14,
        min_steps=1,
        callbacks=[record, EMA(0.9), StopAt(stop), LastCheckpoint(every_n_steps=stop)],
        **arguments,
    )
    run.fit(model, data)
    return record, model, run


def test_a_seeded_run_gives_these_losses(tmp_path):
    # A change that should not move the loss must leave these numbers alone.
    torch.manual_seed(0)
    record, _, _ = fit(tmp_path, 4)
    again_seeded = torch.tensor(record.losses)
    torch.manual_seed(0)
    again, _, _ = fit(tmp_path / "again", 4)
    assert record.losses == again.losses
    assert again_seeded.isfinite().all()


# Agreement between the parts ------------------------------------------------------------------


def test_one_data_std():
    LitDiffusion(weighting=ld.EDMWeighting(0.3), prediction=ld.EDMPrediction(0.3))
    LitDiffusion(weighting=ld.EDMWeighting(0.3), prediction=ld.VPrediction())
    for weighting in (ld.EDMWeighting(0.5), ld.MonotoneWeighting(ld.EDMWeighting(0.5))):
        with pytest.raises(ValueError, match="data_std"):
            LitDiffusion(weighting=weighting, prediction=ld.EDMPrediction(0.3))


def test_a_class_in_place_of_an_instance():
    for arguments in (
        {"weighting": ld.EDMWeighting},
        {"schedule": ld.CosineSchedule},
        {"prediction": ld.VPrediction},
        {"sampler": ld.DDIMSampler},
        {"network": UNet},
    ):
        with pytest.raises(TypeError, match="if this is a class, call it"):
            LitDiffusion(**arguments)
    with pytest.raises(TypeError, match="if this is a class, call it"):
        ld.DiffusionLoss(weighting=ld.EDMWeighting)


def test_the_sampler_stays_in_the_trained_range():
    schedule = ld.CosineSchedule(-10.0, 10.0)
    model = LitDiffusion(schedule=schedule)
    levels = model.sampler.levels()
    assert float(levels[0]) == -10
    assert float(levels[-1]) == 10
    with pytest.raises(ValueError, match=r"trained on \[-10, 10\]"):
        LitDiffusion(schedule=schedule, sampler=ld.DDIMSampler(schedule=ld.KarrasSchedule()))
    with pytest.raises(ValueError, match="trained on"):
        model.sample(1, sampler=ld.DDIMSampler(schedule=ld.LinearSchedule(-20.0, 10.0)))


# Sampling -------------------------------------------------------------------------------------


def perturbed(model):
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.05 * torch.randn(p.shape, generator=generator)
    return model


def test_samples_do_not_depend_on_the_batch():
    from lit_diffusion.training.step.randomness import generators

    model = perturbed(tiny_model(sampler=ld.AncestralSampler(steps=4)))
    whole = model.sample(4, generators(0, "sample", [0, 1, 2, 3]))
    last = model.sample(2, generators(0, "sample", [2, 3]))
    assert torch.allclose(whole[2:], last, atol=1e-5)
    assert whole.shape == (4, 1, 8, 8)
    assert float(whole.abs().max()) <= 1
    assert not whole.requires_grad


def test_labels_and_guidance_change_the_sample():
    model = perturbed(tiny_model())

    def draw(**arguments):
        return model.sample(3, torch.Generator().manual_seed(0), **arguments)

    plain = draw(label=3)
    assert torch.equal(plain, draw(label=[3, 3, 3]))
    assert not torch.allclose(plain, draw(label=4))
    assert not torch.allclose(plain, draw(label=3, guidance=4.0))
    assert torch.allclose(draw(label=-1), draw(label=-1, guidance=4.0), atol=1e-4)
    drawn = model._labels(5000, None, torch.Generator().manual_seed(0)).bincount(minlength=10)
    assert int(drawn.min()) > 400
    for bad in (10, [1, 2], [-2, 0, 0]):
        with pytest.raises(ValueError, match="labels from 0 to 9"):
            draw(label=bad)
    without = LitDiffusion(network=UNet(channels=(8,), attention=()))
    with pytest.raises(ValueError, match="without classes"):
        without.sample(1, label=3)
    with pytest.raises(ValueError, match="Guidance needs classes"):
        without.sample(1, guidance=2.0)


def test_sample_leaves_training_mode_as_it_was():
    model = tiny_model()
    model.train()
    model.sample(1)
    assert model.training


# Checkpoints ----------------------------------------------------------------------------------


def test_a_checkpoint_is_enough_to_sample(tmp_path):
    _, model, run = fit(tmp_path, 6)
    path = run.checkpoint_callback._path
    assert torch.load(path, weights_only=True)["state_dict"]
    loaded = LitDiffusion.load_from_checkpoint(path)
    assert describe(loaded.denoiser.network) == describe(model.denoiser.network)
    assert repr(loaded.loss) == repr(model.loss)
    assert loaded.sampler == model.sampler or repr(loaded.sampler) == repr(model.sampler)
    noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    model.eval()
    assert torch.equal(loaded.sample(2, noise[0]), model.sample(2, noise[1]))  # both averaged
    assert loaded.hparams == model.hparams
    other = LitDiffusion.load_from_checkpoint(path, sampler=ld.AncestralSampler(steps=7))
    assert other.sampler.steps == 7


class Uncapturable(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, widths[0])

    def forward(self, z, logsnr, label=None):
        return z


def test_what_cannot_be_captured_is_asked_for(tmp_path):
    with pytest.warns(UserWarning, match=r"network cannot be kept.*network="):
        model = tiny_model(network=Uncapturable([1]), optimizer=torch.optim.SGD)
    run = trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint()])
    data = tiny_data()
    with pytest.raises(Exception, match="grad"):
        run.fit(model, data)  # its output does not depend on its weights
    path = tmp_path / "mine.ckpt"
    run.save_checkpoint(path)
    with pytest.raises(ValueError, match="pass network="):
        LitDiffusion.load_from_checkpoint(path)
    loaded = LitDiffusion.load_from_checkpoint(path, network=Uncapturable([1]))
    assert isinstance(loaded.denoiser.network, Uncapturable)


def test_a_lambda_optimizer_does_not_stand_in_the_way_of_sampling(tmp_path):
    with pytest.warns(UserWarning, match="optimizer cannot be kept"):
        model = tiny_model(optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    run = trainer(tmp_path, max_steps=1, callbacks=[LastCheckpoint()])
    run.fit(model, tiny_data())
    loaded = LitDiffusion.load_from_checkpoint(run.checkpoint_callback._path)
    assert loaded.sample(1).shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match="pass optimizer="):
        loaded.configure_optimizers()


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


def test_a_hostile_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": Evil()}, path)
    with pytest.raises(ValueError, match="not a checkpoint of lit_diffusion"):
        LitDiffusion.load_from_checkpoint(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="not a checkpoint"):
        LitDiffusion.load_from_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="No checkpoint"):
        LitDiffusion.load_from_checkpoint(tmp_path / "none.ckpt")
    for class_path in ("os.system", "subprocess.Popen", "antigravity.geohash", "builtins.eval"):
        with pytest.raises(ValueError, match=r"may not name|not a class"):
            build({"class_path": class_path, "init_args": {}})
    assert "antigravity" not in sys.modules


def test_descriptions_round_trip():
    for value in [
        ld.ShiftedSchedule(ld.NormalSchedule(1.0, 2.0), shift=-1.0),
        ld.MonotoneWeighting(ld.P2Weighting(0.5)),
        ld.DDIMSampler(steps=7, schedule=ld.KarrasSchedule(), eta=0.5),
        ld.EDMPrediction(0.25),
        UNet(shape=(3, 16, 8), channels=(8, 16), num_classes=4),
    ]:
        again = build(describe(value))
        assert repr(again) == repr(value)
        assert describe(again) == describe(value)
    partial = build(describe(functools.partial(torch.optim.AdamW, lr=0.1, betas=(0.9, 0.99))))
    assert partial.func is torch.optim.AdamW
    assert partial.keywords["lr"] == 0.1


# EMA ------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Sees which weights are in place in each kind of hook."""

    def __init__(self):
        self.seen = {}

    def weight(self, pl_module):
        return next(pl_module.parameters()).detach().clone()

    def on_validation_epoch_start(self, trainer, pl_module):
        self.seen["inner start"] = self.weight(pl_module)

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen["inner end"] = self.weight(pl_module)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen["train"] = self.weight(pl_module)


@pytest.mark.parametrize("order", [1, -1])
def test_everyone_sees_the_average_in_validation_and_raw_weights_in_training(tmp_path, order):
    watch, ema = Watch(), EMA(0.9)
    run = trainer(
        tmp_path,
        max_steps=6,
        callbacks=[watch, ema][::order],
        val_check_interval=3,
        check_val_every_n_epoch=None,
    )
    model = tiny_model()
    start = next(model.parameters()).detach().clone()
    run.fit(model, tiny_data())
    assert torch.equal(watch.seen["inner start"], watch.seen["inner end"])
    assert not torch.equal(watch.seen["inner end"], watch.seen["train"])
    assert not torch.equal(watch.seen["inner end"], start)
    assert torch.equal(next(model.parameters()), watch.seen["inner end"])  # left in place


def test_the_average_is_the_recursion_on_optimizer_steps(tmp_path):
    class Trail(L.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, pl_module, *args):
            self.weights.append(
                torch.nn.utils.parameters_to_vector(pl_module.parameters()).detach().clone()
            )

    trail = Trail()
    model = tiny_model()
    expected = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    trainer(tmp_path, max_steps=4, callbacks=[EMA(0.25), trail], accumulate_grad_batches=2).fit(
        model, tiny_data(steps_per_epoch=8)
    )
    assert len(trail.weights) == 8
    for n, weights in enumerate(trail.weights[1::2], start=1):
        expected.lerp_(weights, 1 - min(0.25, (1 + n) / (10 + n)))
    assert torch.allclose(
        torch.nn.utils.parameters_to_vector(model.parameters()), expected, atol=1e-6
    )


def test_an_exception_in_validation_gives_the_weights_back(tmp_path):
    class Fails(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            raise RuntimeError("on purpose")

    watch, model = Watch(), tiny_model()
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer(
            tmp_path,
            max_steps=5,
            callbacks=[EMA(0.9), watch, Fails()],
            val_check_interval=3,
            check_val_every_n_epoch=None,
        ).fit(model, tiny_data())
    assert torch.equal(next(model.parameters()), watch.seen["train"])


def test_a_resume_without_ema_is_refused(tmp_path):
    _, _, run = fit(tmp_path, 3)
    listed = pytest.warns(UserWarning, match="add the following callbacks")  # Lightning's own
    with listed, pytest.raises(ValueError, match="add EMA to trainer"):
        trainer(tmp_path, max_steps=5).fit(
            tiny_model(), tiny_data(), ckpt_path=run.checkpoint_callback._path
        )


def test_a_checkpoint_saved_in_validation_is_not_exchanged(tmp_path):
    class SavesInside(L.Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "inside.ckpt", weights_only=False)

    watch = Watch()
    trainer(
        tmp_path,
        max_steps=3,
        callbacks=[EMA(0.9), watch, SavesInside()],
        val_check_interval=3,
        check_val_every_n_epoch=None,
        enable_checkpointing=False,
    ).fit(tiny_model(), tiny_data())
    inside = load_checkpoint(tmp_path / "inside.ckpt")
    name = next(iter(inside["state_dict"]))
    assert torch.equal(inside["current_model_state"][name], watch.seen["train"])
    assert torch.equal(inside["state_dict"][name], watch.seen["inner end"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="decay must be in"):
        EMA(1.0)
    with pytest.raises(ValueError, match="at least 1"):
        SampleGrid(rows=0)
    with pytest.raises(ValueError, match="at least 1"):
        LastCheckpoint(0)
    with pytest.raises(ValueError, match="label_dropout"):
        LitDiffusion(label_dropout=1.5)


# Precision and ranks --------------------------------------------------------------------------


def test_bf16_keeps_the_loss_in_float32(tmp_path):
    record = Record()
    run = trainer(tmp_path, max_steps=2, callbacks=[record], precision="bf16-mixed")
    model = tiny_model()
    run.fit(model, tiny_data())
    assert next(model.parameters()).dtype == torch.float32
    assert record.logsnr[0].dtype == torch.float64
    assert all(torch.tensor(record.losses).isfinite())


TWO_RANKS = """
import sys, json, torch
sys.path.insert(0, {tests!r})
from test_module import *
if __name__ == "__main__":
    torch.manual_seed(0)
    record, model = Record(), tiny_model()
    run = trainer(
        {folder!r}, max_steps=3, callbacks=[record, EMA(0.9), LastCheckpoint()], devices=2,
        strategy="ddp", val_check_interval=3, check_val_every_n_epoch=None,
    )
    run.fit(model, tiny_data(batch_size=8))
    total = float(sum(p.sum() for p in model.parameters()))
    out = [torch.cat(record.logsnr).tolist(), record.val, total]
    # A file each: on one pipe the lines of two ranks may run into one another.
    with open({folder!r} + f"/rank{{run.global_rank}}.json", "w") as file:
        json.dump([run.global_rank, *out], file)
"""


def test_two_ranks_share_one_lattice_and_one_validation(tmp_path):
    import json
    from pathlib import Path

    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = warm.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = {}
    for path in tmp_path.glob("rank*.json"):
        rank, *values = json.loads(path.read_text())
        ranks[rank] = values
    assert set(ranks) == {0, 1}
    schedule = ld.LinearSchedule(-10.0, 13.3)
    both = [torch.tensor(ranks[r][0], dtype=torch.float64).reshape(3, 8) for r in (0, 1)]
    for step in range(3):
        t = schedule.time(torch.cat([both[0][step], both[1][step]])).sort().values
        assert torch.allclose(t.diff(), torch.full((15,), 1 / 16, dtype=torch.float64))
    assert ranks[0][1] == ranks[1][1]  # validation, the same on both
    assert ranks[0][2] == ranks[1][2]  # weights in step
    one = trainer(tmp_path).validate(
        LitDiffusion.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt"),
        tiny_data(),
        verbose=False,
    )
    assert one[0]["val/loss"] == pytest.approx(ranks[0][1][-1], rel=1e-5)


def test_loading_is_silent(tmp_path):
    _, _, run = fit(tmp_path, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LitDiffusion.load_from_checkpoint(run.checkpoint_callback._path)
