"""Runs side by side: numbers, samples of the same noise, and the settings that differ."""

import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from browser import look

from lit_diffusion.training import compare
from lit_diffusion.training.cli import main
from lit_diffusion.training.reporting.comparison import MISSING, config_differences, numbers
from lit_diffusion.training.reporting.run import Run
from lit_diffusion.training.run.checkpoints import WholeCheckpointIO, load_checkpoint
from lit_diffusion.training.run.measurements import Measurement, add_measurements

CONFIGS = Path(__file__).parents[2] / "configs"
WORDS = [
    "fit", "--config", str(CONFIGS / "digits.yaml"),
    "--config", str(CONFIGS / "with" / "noise-levels.yaml"),
    "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1", "--data.batch_size=4", "--data.val_examples=6",
    "--data.steps_per_epoch=2", "--model.sampler.steps=2", "--model.network.channels=[8,8]",
    "--model.network.attention=[]", "--model.network.blocks=1",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of one run."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["lit-diffusion", *WORDS])
        main()
    (run,) = (folder / "runs" / "digits").iterdir()
    return run


@pytest.fixture
def pair(trained, tmp_path, monkeypatch):
    """Two copies of it with other times, the second of another seed in its config."""
    monkeypatch.chdir(tmp_path)
    runs = [Path("runs/digits/1"), Path("runs/digits/2")]
    for run in runs:
        shutil.copytree(trained, run)
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("seed_everything: 0", "seed_everything: 5"))
    return runs


def pictures(page):
    return re.findall(r'src="(data:image/[^"]+)"', Path(page).read_text())


def test_equal_models_give_equal_images_whatever_their_seeds(pair):
    first = load_checkpoint(pair[1] / "checkpoints/last.ckpt")
    first["hyper_parameters"]["seed"] = 5
    WholeCheckpointIO().save_checkpoint(first, pair[1] / "checkpoints/last.ckpt")
    one, other = pictures(compare(pair, num_samples=4).path)
    assert one == other
    (another,) = pictures(compare(pair[:1], num_samples=4, seed=1).path)
    assert another != one
    # And other models give other images.
    for key in ("state_dict", "current_model_state"):
        weights = first[key]
        first[key] = {name: torch.zeros_like(value) for name, value in weights.items()}
    WholeCheckpointIO().save_checkpoint(first, pair[1] / "checkpoints/last.ckpt")
    one, other = pictures(compare(pair, num_samples=4).path)
    assert one != other


def test_the_page_and_the_text_have_the_numbers_and_the_settings_that_differ(cli, pair):
    code, out, err = cli("compare", *pair, "--num_samples", "2")
    assert code == 0, err
    assert [err.count(f"Using {run}/checkpoints/last.ckpt, step 2.") for run in pair] == [1, 1]
    assert "seed_everything" in out
    assert "model.network" not in out
    assert "ε-error at λ =" in out
    assert out.endswith("Page: compare.html\n")
    page = Path("compare.html").read_text()
    for heading in ("Numbers", "Samples", "Settings that differ", "Curves", "Loss by noise level"):
        assert f"<h2>{heading}</h2>" in page
    assert "could not be rendered" not in page
    loss = Run(pair[0]).columns["val/loss"][-1][1]
    assert out.count(f"{loss:.4g} at step 2") == 2


def test_equal_configs_do_not_differ(pair):
    shutil.copy(pair[0] / "config.yaml", pair[1])
    assert "The configs do not differ." in compare(pair, num_samples=0).text


def test_a_model_that_cannot_be_loaded_is_shown_by_its_own_grid(pair):
    (pair[1] / "checkpoints" / "last.ckpt").write_bytes(b"damaged")
    page = compare(pair, num_samples=2).path.read_text()
    assert "digits/2, its own step-0000002" in page
    assert "digits/2 has no samples of this noise: " in page
    assert "digits/1 has no samples" not in page
    assert len(pictures("compare.html")) == 2


def test_measurements_share_a_row_only_with_their_protocol(pair):
    fid = Measurement("fid", 3.5, 0.25, 2, "evaluate", {"samples": 9, "weights": "raw"})
    add_measurements(pair[0], [fid])
    add_measurements(pair[1], [fid._replace(value=2.5, protocol={"samples": 9, "weights": "EMA"})])
    add_measurements(pair[1], [fid._replace(value=1.5, protocol={"samples": 3, "weights": "raw"})])
    rows = numbers({run.name: Run(run) for run in pair})
    assert [row[1:] for row in rows if "evaluate" in row[0]] == [
        ["3.5 ± 0.25 at step 2, raw", "2.5 ± 0.25 at step 2, EMA"],
        [MISSING, "1.5 ± 0.25 at step 2, raw"],
    ]


def test_callbacks_are_compared_by_their_class():
    ema = {"class_path": "lit_diffusion.training.EMA", "init_args": {"decay": 0.9}}
    grid = {"class_path": "lit_diffusion.training.SampleGrid", "init_args": {"rows": 2}}
    one = {"trainer": {"callbacks": [ema, grid]}}
    other = {"trainer": {"callbacks": [grid, {**ema, "init_args": {"decay": 0.99}}]}}
    assert config_differences({"a": one, "b": other}) == [
        ["trainer.callbacks.EMA.decay", "0.9", "0.99"]
    ]


def test_a_run_without_any_file_of_numbers_is_compared_as_well(pair):
    for name in ("metrics.csv", "metrics.json", "noise_levels.csv", "environment.json"):
        (pair[1] / name).unlink(missing_ok=True)
    shown = compare(pair, num_samples=0)
    assert MISSING in shown.text
    assert "could not be rendered" not in shown.path.read_text()


@pytest.mark.slow
def test_the_page_in_a_browser(pair):
    found, complaints = look(compare(pair, num_samples=4).path, (360, 1280))
    assert not complaints
    for seen in found:
        assert seen["width"] <= seen["room"]
        assert seen["charts"] >= 4
        assert all(width > 0 for _, width, _ in seen["images"])
