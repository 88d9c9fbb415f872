"""bfloat16 on a device that has none: float32 and a sentence, or an error if it is a must."""

import contextlib
import json

import pytest
import torch
from test_module import fit, tiny_data, tiny_model, trainer

from lit_diffusion.training import precision
from lit_diffusion.training.precision import has_bfloat16

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


@pytest.mark.parametrize("kind", ["32-true", "64-true", "16-true"])
def test_other_precisions_are_left_alone(tmp_path, lacking, kind):
    made = trainer(tmp_path, precision=kind)
    precision.settle_precision(made)
    assert made.precision == kind


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
