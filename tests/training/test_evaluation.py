"""`lit-diffusion evaluate`, as a user types it."""

import json
import os
import shutil
import statistics
import sys
from pathlib import Path

import pytest
import torch
import warm
from PIL import Image

from lit_diffusion.training.run.measurements import (
    Measurement,
    add_measurements,
    read_measurements,
)

CONFIGS = Path(__file__).parents[2] / "configs"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
FIT = [
    "fit", "--config", str(CONFIGS / "digits.yaml"), "--trainer.max_steps=6",
    "--data.steps_per_epoch=6", "--data.batch_size=8", "--model.network.channels=[8,8]",
    "--model.network.attention=[]", "--model.sampler.steps=2", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run of the demo, with its FID and Likelihood."""
    folder = tmp_path_factory.mktemp("trained")
    words = [sys.executable, "-m", "lit_diffusion", *FIT]
    done = warm.run(words, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "runs"


@pytest.fixture
def run(trained, cli):
    """Its folder, copied to where the command runs."""
    shutil.copytree(trained, "runs")
    (folder,) = Path("runs/digits").iterdir()
    return folder


def told(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_without_words_it_repeats_what_training_logged(run, cli):
    logged = {one.name: one for one in read_measurements(run)}
    code, out, err = cli("evaluate", "--ckpt_path", "last")
    assert code == 0, err
    assert out.strip().endswith(f"Written to {run}/evaluation")
    found = told(run / "evaluation")
    (row,) = found["scores"]
    assert row["scores"]["fid"]["mean"] == pytest.approx(logged["fid"].value, rel=1e-9)
    assert found["baseline"] == pytest.approx(logged["fid_baseline"].value)
    for key in ("samples", "sampler", "network calls", "reference", "classes", "precision"):
        assert row["protocol"][key] == logged["fid"].protocol[key], key
    bound = {one["name"]: one for one in found["bound"]}
    for name in ("bpd", "bpd_prior", "bpd_diffusion", "bpd_reconstruction"):
        assert bound[name]["value"] == pytest.approx(logged[name].value, rel=1e-6, abs=1e-9)
    assert bound["bpd"]["error"] == pytest.approx(logged["bpd"].error, rel=1e-4)
    assert bound["bpd"]["protocol"]["samples per example"] == 8
    assert "| AncestralSampler | 2 | 2 |" in (run / "evaluation" / "evaluation.md").read_text()
    assert not (run / "evaluation" / "evaluation.png").exists()  # one point is no curve
    measured = [one for one in read_measurements(run) if one.name == "fid"]
    assert [one.stage for one in measured] == ["val", "evaluate"]
    assert measured[0]._replace(stage="evaluate") == measured[1]  # protocol and all
    assert "All evaluations" in (run / "report.html").read_text()


def test_a_sweep_over_samplers_steps_and_seeds(run, cli):
    code, out, err = cli(
        "evaluate", "--ckpt_path", "last", "--samplers", "[DDIMSampler, HeunSampler]",
        "--steps", "[2,4]", "--seeds", "[0,1,2]", "--num_samples=20", "--bound=false",
        "--guidance=2.0", "--out", "sweep",
    )  # fmt: skip
    assert code == 0, err
    rows = told(Path("sweep"))["scores"]
    assert [(row["sampler"], row["steps"], row["network calls"]) for row in rows] == [
        ("DDIMSampler", 2, 4), ("DDIMSampler", 4, 8), ("HeunSampler", 2, 6), ("HeunSampler", 4, 14)
    ]  # fmt: skip
    for row in rows:
        for name, score in row["scores"].items():
            assert len(score["values"]) == 3
            assert score["mean"] == pytest.approx(statistics.fmean(score["values"])), name
            assert score["error"] == pytest.approx(statistics.stdev(score["values"])), name
        assert len(set(row["scores"]["fid"]["values"])) == 3
        assert row["protocol"]["guidance"] == 2.0
    names = {"fid", "kid", "inception_score", "precision", "recall", "density", "coverage"}
    assert set(rows[0]["scores"]) == names
    assert len({row["scores"]["fid"]["mean"] for row in rows}) == 4
    with Image.open("sweep/evaluation.png") as picture:
        assert picture.width > 500
    assert "![Fréchet distance against network calls](evaluation.png)" in out
    # Once more, one way only: the picture of the sweep does not stay beside the new numbers.
    code, _, err = cli("evaluate", "--ckpt_path", "last", "--num_samples=20", "--out", "sweep")
    assert code == 0, err
    assert not Path("sweep/evaluation.png").exists()


def test_a_checkpoint_without_its_run_needs_a_config(run, cli):
    shutil.copy(run / "checkpoints" / "last.ckpt", "alone.ckpt")
    few = ["--num_samples=10", "--features=ClassifierFeatures", "--split=test", "--bound=false"]
    code, _, err = cli("evaluate", "--ckpt_path=alone.ckpt", *few)
    assert code == 2
    assert "alone.ckpt is not in a run folder" in err  # and not: measured on other data
    few += ["--data.path=digits8x8", "--out=here"]
    code, _, err = cli("evaluate", "--ckpt_path=alone.ckpt", *few)
    assert code == 0, err
    code, _, err = cli(
        "evaluate", "--ckpt_path=alone.ckpt", "--config", CONFIGS / "digits.yaml", "--out=there",
        "--num_samples=10",
    )  # fmt: skip
    assert code == 0, err
    one, other = (told(Path(folder))["scores"][0]["scores"]["fid"] for folder in ("here", "there"))
    assert one == other
    assert told(Path("there"))["baseline"] is not None  # the config's FID says so


def test_it_knows_no_stale_numbers(run, cli):
    """Other weights under the same name are measured anew, and say so."""
    found = []
    for scale in (1.0, 1.5):
        path = run / "checkpoints" / "last.ckpt"
        checkpoint = torch.load(path, weights_only=True)
        for value in checkpoint["state_dict"].values():
            value.mul_(scale)
        torch.save(checkpoint, path)
        code, _, err = cli("evaluate", "--ckpt_path", path, "--num_samples=20", "--bound=false")
        assert code == 0, err
        found.append(told(run / "evaluation"))
    assert found[0]["checkpoint"]["sha256"] != found[1]["checkpoint"]["sha256"]
    hashes = {one["weights hash"] for one in found}
    assert len(hashes) == 2
    assert found[0]["scores"][0]["scores"]["fid"] != found[1]["scores"][0]["scores"]["fid"]


MISTAKES = [
    (["--steps=[0]"], "--steps must be numbers of at least 1, got [0]"),
    (["--seeds=[1,1]"], "--seeds must be different numbers"),
    (["--samplers=[DDIMSampl]"], "no class is named 'DDIMSampl'. Did you mean DDIMSampler"),
    (["--split=nope"], "expected a split 'nope', got test, train"),
    (["--features=Nope"], "features: no class is named 'Nope'"),
    (["--out=x.json"], "--out must be a folder, got x.json"),
    (["--num_samples=1"], "--num_samples must be at least 2"),
    (["--reference_hash=00"], "expected a reference whose hash begins with 00"),
    (["--ckpt_path=nope.ckpt"], "No checkpoint at nope.ckpt"),
    (["--data.path=./nope"], "expected a file or folder at './nope'"),
    (["--guidance=2", "--guidance_interval=[2,1]"], "interval must be (low, high)"),
    (["--guidance_interval=[-2,2]"], "which means none: give --guidance"),
    (["--config=nope.yaml"], "--config nope.yaml cannot be read"),
    (["--device=nope"], "--device nope is not available: Expected one of cpu, cuda"),
    (
        ["--likelihood.samples_per_example=0"],
        "num_timesteps and samples_per_example must be at least 1",
    ),
    (["--data.shape=[3,8,8]"], "of the model's shape (1, 8, 8), got (3, 8, 8)"),
    (["--nope=1"], "no argument is called --nope"),
]


@pytest.mark.parametrize(("words", "sentence"), MISTAKES, ids=lambda x: str(x)[:30])
def test_a_mistake_is_one_line_and_writes_nothing(run, cli, words, sentence):
    before = sorted(path for path in run.rglob("*"))
    given = [] if words[0].startswith("--ckpt_path") else ["--ckpt_path=last"]
    code, out, err = cli("evaluate", *given, *words)
    assert code == 2, (out, err)
    assert sentence in err
    assert err.strip().splitlines()[-1].startswith("lit-diffusion: error: ")
    assert "Traceback" not in err
    assert sorted(path for path in run.rglob("*")) == before
    assert not Path("x.json").exists()


def test_nothing_to_evaluate(cli):
    assert "give --ckpt_path" in cli("evaluate")[2]
    code, _, err = cli("evaluate", "--ckpt_path=last")
    assert code == 2
    assert "there is no checkpoint below runs;" in err


# metrics.json ---------------------------------------------------------------------------------


def test_measurements_come_back_as_they_were_written(tmp_path):
    one = Measurement("fid", 1.25, None, 10, "val", {"seed": 0, "λ": [1.0, 2.0]})
    other = one._replace(protocol={"seed": 1}, error=0.5)
    add_measurements(tmp_path / "new", [one, other])
    assert read_measurements(tmp_path / "new") == [one, other]
    again = one._replace(value=7.0)
    later = one._replace(step=20)
    add_measurements(tmp_path / "new", [again, later])
    assert read_measurements(tmp_path / "new") == [other, again, later]
    assert read_measurements(tmp_path) == []
    (tmp_path / "new" / "metrics.json").write_text('[{"name": "fid"}]')
    with pytest.raises(ValueError, match=r"expected the measurements of a run in .*; remove"):
        read_measurements(tmp_path / "new")
