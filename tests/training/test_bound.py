"""The bound along a run: the Likelihood callback, and training of learned schedules."""

import functools
import json
import math
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import warm

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import (
    EMA,
    DataModule,
    LastCheckpoint,
    Likelihood,
    LitDiffusion,
    WholeCheckpointIO,
)

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = ld.SoftmaxDecoder(17)


def tiny_model(**arguments):
    torch.manual_seed(0)
    defaults = {
        "network": UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=10),
        "schedule": ld.LinearSchedule(-10.0, 13.3),
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
        "sampler": ld.DDIMSampler(steps=3),
    }
    return LitDiffusion(**{**defaults, **arguments})


def learned_model(learn="both", **arguments):
    schedule = ld.LearnedSchedule(-8.0, 12.0, learn=learn)
    return tiny_model(schedule=schedule, decoder=DIGITS, schedule_lr=0.02, **arguments)


def tiny_data(**arguments):
    defaults = {"batch_size": 8, "steps_per_epoch": 5, "val_examples": 20, "streaming": False}
    return DataModule(**{**defaults, **arguments})


def trainer(folder, callbacks=(), **arguments):
    defaults = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(c, LastCheckpoint) for c in callbacks),
        "plugins": [WholeCheckpointIO()],
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**defaults, **arguments})


def numbers(folder, model, likelihood, **data):
    run = trainer(folder, [likelihood])
    return run.validate(model, tiny_data(**data), verbose=False)[0]


NAMES = ("bpd_prior", "bpd_diffusion", "bpd_reconstruction")


def test_the_terms_are_logged_and_add_up(tmp_path):
    likelihood = Likelihood(DIGITS)
    found = numbers(tmp_path, tiny_model(), likelihood)
    assert found["val/bpd"] == pytest.approx(sum(found[f"val/{name}"] for name in NAMES))
    assert likelihood.summary.startswith(f"val/bpd at step 0: at most {found['val/bpd']:.4f} ± ")
    for said in ("20 examples", "continuous time", "λ in [-10, 13.3]", "levels=17", "±"):
        assert said in likelihood.summary
    tested = trainer(tmp_path, [likelihood]).test(tiny_model(), tiny_data(), verbose=False)[0]
    assert tested["test/bpd"] == found["val/bpd"]


def test_the_number_is_the_bound_of_the_held_out_set(tmp_path):
    model = tiny_model()
    found = numbers(tmp_path, model, Likelihood(DIGITS, samples_per_example=50))
    data = tiny_data(batch_size=20)
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    x, label = batch["image"], batch["label"]
    with torch.no_grad():
        terms = [
            ld.variational_bound(model.denoiser, x, model.loss.schedule, DIGITS, label=label)
            for _ in range(50)
        ]
    bits = torch.stack([term.bits_per_dim.mean() for term in terms])
    error = 3 * float(bits.std()) / 50**0.5
    assert found["val/bpd"] == pytest.approx(float(bits.mean()), abs=2 * error)


def test_whatever_the_batches(tmp_path):
    model = tiny_model()
    found = [
        numbers(tmp_path, model, Likelihood(DIGITS), batch_size=size)["val/bpd"]
        for size in (20, 20, 7, 1)
    ]
    assert found[0] == found[1]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("weighting", [ld.SigmoidWeighting(), ld.EDMWeighting()])
def test_whatever_the_weighting_and_the_training_schedule(tmp_path, weighting):
    plain = numbers(tmp_path, tiny_model(), Likelihood(DIGITS))
    schedule = ld.CosineSchedule(-10.0, 13.3)
    other = tiny_model(weighting=weighting, schedule=schedule)
    found = numbers(tmp_path, other, Likelihood(DIGITS))
    assert found["val/bpd"] == pytest.approx(plain["val/bpd"], rel=1e-6)
    assert found["val/loss"] != pytest.approx(plain["val/loss"], rel=0.01)


def test_a_chain_has_its_own_bound(tmp_path):
    model = tiny_model()
    continuous = numbers(tmp_path, model, Likelihood(DIGITS, samples_per_example=20))["val/bpd"]
    likelihood = Likelihood(DIGITS, num_timesteps=5, samples_per_example=20)
    chain = numbers(tmp_path, model, likelihood)["val/bpd"]
    assert chain > 2 * continuous
    assert ", 5 steps, " in likelihood.summary
    own = tiny_model(num_timesteps=5)
    assert Likelihood(DIGITS, samples_per_example=20).settings(own).num_timesteps == 5
    assert numbers(tmp_path, own, Likelihood(DIGITS, samples_per_example=20))["val/bpd"] == chain


def test_the_models_own_decoder_is_the_default(tmp_path):
    assert Likelihood().settings(learned_model()).decoder == DIGITS
    assert Likelihood().settings(tiny_model()).decoder == ld.SoftmaxDecoder(256)


def test_the_average_weights_are_judged(tmp_path):
    likelihood, last = Likelihood(DIGITS), LastCheckpoint()
    run = trainer(tmp_path, [likelihood, EMA(0.9), last], max_steps=10, val_check_interval=5)
    run.fit(tiny_model(), tiny_data())
    told = float(run.callback_metrics["val/bpd"])
    averaged = LitDiffusion.load_from_checkpoint(last._path)
    found = numbers(tmp_path, averaged, Likelihood(DIGITS))["val/bpd"]
    assert found == pytest.approx(told, rel=1e-6)
    raw = torch.load(last._path, weights_only=True)["current_model_state"]
    averaged.load_state_dict(raw)
    assert numbers(tmp_path, averaged, Likelihood(DIGITS))["val/bpd"] != pytest.approx(told)


TWO_RANKS = """
import sys, json
sys.path.insert(0, {tests!r})
from test_bound import *
if __name__ == "__main__":
    likelihood = Likelihood(samples_per_example=2)
    run = trainer({folder!r}, [likelihood, EMA(0.9), LastCheckpoint()], devices=2,
                  strategy="ddp", max_steps=4, val_check_interval=4, check_val_every_n_epoch=None)
    model = learned_model()
    run.fit(model, tiny_data(batch_size=4))
    found = {{name: float(value) for name, value in run.callback_metrics.items()}}
    ends = [float(p.sum()) for p in model.loss.schedule.parameters()]
    Path({folder!r}, f"rank{{run.global_rank}}.json").write_text(
        json.dumps([run.global_rank, found, ends, likelihood.summary])
    )
"""


@pytest.mark.slow
def test_two_ranks_tell_the_number_of_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_RANKS.format(tests=str(Path(__file__).parent), folder=str(tmp_path)))
    done = warm.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("rank*.json"))]
    (_, one, ends, summary), (_, other, other_ends, other_summary) = told
    assert ends == other_ends  # the learned schedule stays in step
    assert summary == other_summary
    assert "over 20 examples, 2 noise level(s) each" in summary  # of both ranks together
    for name in ("bpd", *NAMES):
        assert one[f"val/{name}"] == other[f"val/{name}"]
    model = LitDiffusion.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    alone = numbers(tmp_path, model, Likelihood(samples_per_example=2))
    for name in ("bpd", *NAMES):
        assert alone[f"val/{name}"] == pytest.approx(one[f"val/{name}"], rel=1e-5)


# Learned schedules in training ------------------------------------------------------------------


def test_a_schedule_has_its_own_rate_and_no_decay():
    model = learned_model(
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1)
    )
    optimizer = model.configure_optimizers()
    network, schedule = optimizer.param_groups
    assert (network["lr"], network["weight_decay"]) == (1e-3, 0.1)
    assert (schedule["lr"], schedule["weight_decay"]) == (0.02, 0.0)
    assert len(schedule["params"]) == 6
    together = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(set(together)) == len(together)
    assert set(together) == {id(p) for p in model.parameters() if p.requires_grad}
    fixed = tiny_model(schedule_lr=0.5).configure_optimizers()
    assert [group["lr"] for group in fixed.param_groups] == [1e-3]


def test_a_schedule_does_not_shorten_the_networks_steps(tmp_path):
    model = learned_model()
    optimizer = model.configure_optimizers()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    first = optimizer.param_groups[0]["params"][0]
    first.grad.view(-1)[0] = 0.5
    model.loss.schedule.slope.grad.fill_(1e6)
    model._trainer = trainer(tmp_path)
    model.configure_gradient_clipping(optimizer, 1.0, "norm")
    assert float(first.grad.view(-1)[0]) == 0.5
    assert float(model.loss.schedule.slope.grad) == pytest.approx(1.0, rel=1e-4)


def fit(folder, steps, ckpt_path=None, stop=None):
    last = LastCheckpoint(**({} if stop is None else {"every_n_steps": stop}))
    model = learned_model()
    run = trainer(folder, [EMA(0.9), last], max_steps=stop or steps)
    run.fit(model, tiny_data(), ckpt_path=ckpt_path)
    return model, last._path


def test_it_trains_is_averaged_and_resumes_exactly(tmp_path):
    whole, path = fit(tmp_path / "whole", 8)
    _, half = fit(tmp_path / "half", 8, stop=4)
    again, resumed = fit(tmp_path / "half", 8, ckpt_path=half)
    ours, theirs = again.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    kept = [torch.load(p, weights_only=True) for p in (path, resumed)]
    for key in ("state_dict", "current_model_state"):
        assert all(torch.equal(kept[0][key][n], kept[1][key][n]) for n in kept[0][key])
    name = "loss.schedule.logsnr_max"
    average, raw = kept[0]["state_dict"][name], kept[0]["current_model_state"][name]
    assert float(raw) != 12.0
    assert abs(float(average) - 12) < abs(float(raw) - 12)  # it lags behind
    shape = [kept[0]["current_model_state"][f"loss.schedule.{n}"] for n in ("bias", "height")]
    fresh = ld.LearnedSchedule()
    assert not torch.equal(shape[0], fresh.bias)
    assert not torch.equal(shape[1], fresh.height)

    loaded = LitDiffusion.load_from_checkpoint(path)
    assert loaded.loss.schedule.ends == (
        float(kept[0]["state_dict"]["loss.schedule.logsnr_min"]),
        float(average),
    )
    assert loaded.loss.decoder == DIGITS
    low, high = loaded.loss.schedule.ends
    walked = loaded.sampler.levels()[[0, -1]].tolist()
    assert walked == pytest.approx([low, high])  # the sampler follows
    assert loaded.sample(1).shape == (1, 1, 8, 8)


def test_a_sampler_with_ends_of_its_own_cannot_follow():
    sampler = ld.DDIMSampler(schedule=ld.CosineSchedule(-5.0, 5.0))
    with pytest.raises(ValueError, match="leave out the sampler's schedule"):
        learned_model(sampler=sampler)
    learned_model(learn="shape", sampler=sampler)


def test_validation_with_a_decoder_is_the_same_number_every_time(tmp_path):
    model = learned_model()
    found = [
        trainer(tmp_path).validate(model, tiny_data(batch_size=size), verbose=False)[0]["val/loss"]
        for size in (20, 20, 7, 1)
    ]
    assert found[0] == found[1]
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


def test_bf16_leaves_the_schedule_in_full_precision(tmp_path):
    model = learned_model()
    run = trainer(tmp_path, [EMA(0.9)], max_steps=2, precision="bf16-mixed")
    run.fit(model, tiny_data())
    assert {p.dtype for p in model.loss.schedule.parameters()} == {torch.float32}
    assert model.loss.schedule.at(torch.rand(3))[0].dtype == torch.float64


# From the shell -------------------------------------------------------------------------------


SMALL = (
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.max_steps=2",
    "--trainer.log_every_n_steps=1",
    "--data.steps_per_epoch=2",
    "--data.batch_size=4",
    "--data.val_examples=6",
    "--model.network.channels=[8,8]",
    "--model.network.attention=[]",
    "--model.sampler.steps=2",
)


def test_fit_validate_and_test_print_the_bound(cli):
    digits = ("--config", CONFIGS / "digits.yaml")
    code, out, err = cli("fit", *digits, *SMALL)
    assert code == 0, err
    assert "val/bpd at step 2: " in out
    assert "SoftmaxDecoder(levels=17)" in out
    told = next(line for line in out.splitlines() if line.startswith("val/bpd"))
    for command, name in (("validate", "val"), ("test", "test")):
        code, out, err = cli(
            command, *digits, *SMALL[:2], "--data.val_examples=6", "--ckpt_path=last"
        )
        assert code == 0, err
        line = next(line for line in out.splitlines() if line.startswith(f"{name}/bpd"))
        assert line.partition(":")[2].split()[0] == told.partition(":")[2].split()[0]


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--trainer.callbacks+=Likelihood", "--trainer.callbacks.decoder=SoftmaxDecoder",
          "--trainer.callbacks.decoder.levels=5"], "do not match levels=5"),
        (["--trainer.callbacks+=Likelihood", "--trainer.callbacks+=Likelihood"],
         "expected one in trainer.callbacks, got 2"),
        (["--model.num_timesteps=0"], "at least 1 step"),
        (["--model.schedule.learn=true"], "Give a decoder"),
        (["--model.decoder=SoftmaxDecodr"], "SoftmaxDecoder"),
        (["--model.decoder=SoftmaxDecoder", "--model.decoder.levels=3"], "do not match levels=3"),
        (["--model.decoder=SoftmaxDecoder", "--model.decoder.levels=1"], "at least 2 levels"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_leaves_nothing(cli, words, telling, tmp_path):
    config = CONFIGS / "digits.yaml"
    extra = [] if words[0].startswith("--model") else ["--trainer.callbacks=[]"]
    code, _, err = cli("fit", "--config", config, *SMALL, *extra, *words)
    assert code == 2, err
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert telling in errors[0], errors[0]
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ["vdm-mnist"])
def test_vdm_on_mnist_starts_at_the_bits_of_a_network_that_says_z(cli, name, shared):
    code, out, err = cli(
        "fit", "--config", CONFIGS / f"{name}.yaml", f"--data.path={shared / 'mnist'}",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.max_steps=1", "--data.steps_per_epoch=1", "--data.batch_size=8",
        "--trainer.log_every_n_steps=1",
        "--data.val_examples=32", "--model.network.network.channels=[8]",
        "--model.network.network.blocks=1", "--model.sampler.steps=2",
    )  # fmt: skip
    assert code == 0, err
    line = next(line for line in out.splitlines() if line.startswith("val/bpd"))
    assert 9.0 < float(line.partition("at most")[2].split()[0]) < 10.5
    assert math.isfinite(float(line.partition("reconstruction")[2].split(")")[0]))
