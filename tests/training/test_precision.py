"""The precisions of a trainer; bfloat16 on a device that has none: float32, or an error."""

import contextlib
import functools
import json
import warnings

import lightning as L
import pytest
import torch
from test_module import fit, tiny_data, tiny_model, trainer

import lit_diffusion as ld
from lit_diffusion.training import (
    EMA,
    AdaptiveScheduleUpdate,
    Averages,
    Guard,
    LastCheckpoint,
    Likelihood,
    LitDiffusion,
    NoiseLevelLoss,
    SampleGrid,
)
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.step import precision
from lit_diffusion.training.step.precision import has_bfloat16

QUICK = (
    "--trainer.max_steps=2", "--data.steps_per_epoch=2", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]",
    "--trainer.limit_val_batches=0", "--model.network.channels=[8,8]",
    "--model.network.attention=[]", "--trainer.log_every_n_steps=1",
)  # fmt: skip


@pytest.fixture
def lacking(monkeypatch):
    """No device has bfloat16."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: False)


def run(folder, **arguments):
    """A training of five steps; its losses, weights and trainer."""
    record, model, done = fit(folder, 5, gradient_clip_val=0.1, **arguments)
    return record.losses, model.state_dict(), done


def test_what_falls_back_is_the_training_in_float32(tmp_path, lacking):
    losses, weights, _ = run(tmp_path / "a", precision="32-true")
    sentence = "cpu has no bfloat16 arithmetic: training in float32"
    with pytest.warns(UserWarning, match=sentence) as told:
        same, as_well, done = run(tmp_path / "b", precision="bf16-mixed")
    assert sum("bfloat16" in str(one.message) for one in told) == 1
    assert done.precision == "32-true"
    assert losses == same
    assert all(torch.equal(weights[name], as_well[name]) for name in weights)


def test_where_there_is_bfloat16_it_is_used_without_a_word(tmp_path):
    losses, _, _ = run(tmp_path / "a", precision="32-true")
    others, _, done = run(tmp_path / "b", precision="bf16-mixed")  # a warning is an error here
    assert done.precision == "bf16-mixed"
    assert losses != others
    assert losses == pytest.approx(others, rel=0.05)


@pytest.mark.parametrize("kind", ["32-true", "64-true"])
def test_other_precisions_are_left_alone(tmp_path, lacking, kind):
    made = trainer(tmp_path, precision=kind)
    precision.settle_precision(made)
    assert made.precision == kind


def test_weights_in_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"16-true: expected .*float16.*=16-mixed") as error:
        trainer(tmp_path, precision="16-true", max_steps=1).fit(tiny_model(), tiny_data())
    assert "\n" not in str(error.value)


class Exact(L.Callback):
    """Checks at each step the types of the weights and of the numbers of the loss."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.steps = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps += 1
        assert {p.dtype for p in pl_module.denoiser.parameters()} == {self.dtype}
        for name in ("losses", "logsnr", "eps_mse"):
            assert outputs[name].dtype in (torch.float32, torch.float64)
        for name, value in pl_module.loss.schedule.state_dict().items():
            assert value.dtype == self.types[name]

    def on_fit_start(self, trainer, pl_module):
        own = type(pl_module.loss.schedule)().state_dict()
        self.types = {name: value.dtype for name, value in own.items()}


SCHEDULES = {
    "adaptive": lambda: ld.AdaptiveSchedule(-10.0, 13.3),
    "learned": lambda: ld.LearnedSchedule(-10.0, 13.3),
    "table": lambda: ld.TableSchedule((14.0, 2.0, -10.0)),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("kind", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)]
)
def test_weights_in_another_type_train_measure_sample_and_resume(tmp_path, schedule, kind, dtype):
    def go(steps, path=None):
        exact = Exact(dtype)
        callbacks = [
            exact,
            EMA(0.9),
            LastCheckpoint(),
            Guard("skip"),
        ]
        if schedule == "adaptive":
            callbacks += [
                AdaptiveScheduleUpdate(2),
                Likelihood(samples_per_example=1),
                NoiseLevelLoss(bins=4, probe_every_n_steps=2, probe_examples=2),
                SampleGrid(rows=1, columns=4),
                Averages(snapshot_every_n_steps=0),
            ]
        model = tiny_model(
            schedule=SCHEDULES[schedule](),
            optimizer=functools.partial(torch.optim.AdamW, lr=1e-3, fused=True),
            lr_scheduler=None,
        )
        run = trainer(
            tmp_path, max_steps=steps, callbacks=callbacks, precision=kind, gradient_clip_val=1.0,
            val_check_interval=2, check_val_every_n_epoch=None,
        )  # fmt: skip
        run.fit(model, tiny_data(), ckpt_path=path)
        assert exact.steps == steps - (2 if path else 0)
        return model, run

    _, run = go(2)
    path = run.checkpoint_callback._path
    model, run = go(4, path)
    metrics = run.callback_metrics
    assert all(bool(value.isfinite()) for value in metrics.values())
    state = load_checkpoint(path)
    averaged = [value for name, value in state["state_dict"].items() if "network" in name]
    least = torch.promote_types(dtype, torch.float32)
    assert {value.dtype for value in averaged} == {least}  # an average of bfloat16 is float32
    loaded = LitDiffusion.load_from_checkpoint(path)
    assert next(loaded.parameters()).dtype == torch.float32
    assert model.sample(2).dtype == least
    assert loaded.sample(2).isfinite().all()


def test_a_data_module_of_the_users_own_trains_in_bfloat16(tmp_path):
    rows = [{"image": 2 * torch.rand(1, 8, 8) - 1, "label": torch.tensor(i)} for i in range(8)]
    exact = Exact(torch.bfloat16)
    run = trainer(
        tmp_path, precision="bf16-true", max_steps=2, callbacks=[exact], limit_val_batches=0
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run.fit(tiny_model(), torch.utils.data.DataLoader(rows, 4))
    assert exact.steps == 2


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_a_model_that_is_cast_in_python_samples_and_measures(cast):
    model = getattr(tiny_model(), cast)()
    images = model.sample(2, torch.Generator().manual_seed(0))
    assert images.dtype == (torch.float64 if cast == "double" else torch.float32)
    terms = model.loss(model.denoiser, images, label=torch.tensor([0, 1]))
    assert all(term.dtype in (torch.float32, torch.float64) for term in terms[:3])


def test_weights_in_bfloat16_are_refused(tmp_path, lacking):
    with pytest.raises(ValueError, match=r"bf16-true: cpu has no bfloat16 .*=16-mixed") as error:
        trainer(tmp_path, precision="bf16-true", max_steps=1).fit(tiny_model(), tiny_data())
    assert "\n" not in str(error.value)


def test_a_validation_falls_back_too(tmp_path, lacking):
    plain = trainer(tmp_path).validate(tiny_model(), tiny_data(), verbose=False)
    made = trainer(tmp_path, precision="bf16-mixed")
    with pytest.warns(UserWarning, match="has no bfloat16"):
        assert made.validate(tiny_model(), tiny_data(), verbose=False) == plain


def test_on_the_command_line(cli, configs, tmp_path, lacking):
    overlay = ("--config", configs / "digits.yaml", "--config", configs / "with" / "bf16.yaml")
    with pytest.warns(UserWarning, match="has no bfloat16") as told:
        code, _, err = cli("fit", *overlay, *QUICK)
    assert code == 0, err
    assert sum("bfloat16" in str(one.message) for one in told) == 1
    [session] = json.loads(next(tmp_path.glob("runs/*/*/environment.json")).read_text())
    assert session["precision"] == "32-true"  # what was really used


def test_insisting_on_the_command_line(cli, configs, tmp_path, lacking):
    words = ("--config", configs / "digits.yaml", "--trainer.precision=bf16-true")
    code, _, err = cli("fit", *words, *QUICK)
    assert code == 2
    assert "trainer.precision=bf16-true: cpu has no bfloat16 arithmetic; set" in err
    assert sum(line.startswith("lit-diffusion: error") for line in err.splitlines()) == 1
    assert "Traceback" not in err
    assert not (tmp_path / "runs").exists()


# What is asked of the device -------------------------------------------------------------------


@pytest.mark.parametrize("answer", [True, False])
def test_a_gpu_that_only_emulates_it_does_not_have_it(monkeypatch, answer):
    asked = []

    def supported(including_emulation=True):
        asked.append(including_emulation)
        return including_emulation or answer

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    assert has_bfloat16(torch.device("cuda", 1)) is answer
    assert asked == [False]


@pytest.mark.parametrize("answer", [True, False])
def test_a_mac_has_it_since_version_14(monkeypatch, answer):
    newer = {(14, 0): answer}
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda *v: newer[v])
    assert has_bfloat16(torch.device("mps")) is answer


def test_a_cpu_has_it():
    assert has_bfloat16(torch.device("cpu"))
