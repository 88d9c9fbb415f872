"""diffusers on the command line: a network in a config, and published pipelines as checkpoints."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import lit_diffusion as ld
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.run.measurements import read_measurements

diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers: pip install 'lit-diffusion[diffusers]'"
)

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
DIT = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}
DATA = {"path": "digits8x8", "shape": [1, 8, 8], "batch_size": 4, "steps_per_epoch": 2}
TRAINER = {
    "enable_progress_bar": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 1,
}


def config(path, **parts):
    whole = {"data": {**DATA, "val_examples": 6, "num_workers": 0}, "trainer": TRAINER} | parts
    path.write_text(yaml.safe_dump(whole))
    return path


@pytest.fixture
def pipeline(tmp_path):
    """The folder of a pipeline with a chain of 20 levels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, **UNET)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=20, beta_end=0.5, variance_type="fixed_large"
    )
    diffusers.DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "given"), [("UNet2DModel", UNET), ("DiTTransformer2DModel", DIT)]
)
def test_a_config_trains_a_model_of_diffusers(cli, tmp_path, model, given):
    network = {
        "class_path": "DiffusersNetwork",
        "init_args": {"model": model, "config": given, "num_classes": 10},
    }
    sampler = {"class_path": "DDIMSampler", "init_args": {"steps": 2}}
    file = config(tmp_path / "config.yaml", model={"network": network, "sampler": sampler})
    code, out, err = cli("fit", "--config", file, "--trainer.max_steps=2")
    assert code == 0, err
    path = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    lit = LitDiffusion.load_from_checkpoint(path / "checkpoints" / "last.ckpt")
    net = lit.denoiser.network
    assert (type(net.network).__name__, net.shape) == (model, (1, 8, 8))
    assert lit.num_classes == 10
    last = path / "checkpoints" / "last.ckpt"
    code, _, err = cli("fit", "--config", file, "--trainer.max_steps=3", "--ckpt_path", last)
    assert code == 0, err
    assert cli("export", path, "--out", "exported")[0] == 0
    drawn = [m.sample(2, torch.Generator().manual_seed(0), label=3) for m in (
        LitDiffusion.load_from_checkpoint(last), ld.load_pretrained("exported"))]  # fmt: skip
    assert torch.equal(*drawn)
    assert "pip install 'lit-diffusion[diffusers]'" in Path("exported/README.md").read_text()


@pytest.mark.filterwarnings("ignore:logsnr_max:UserWarning")
def test_a_published_pipeline_is_tested_like_any_other(cli, tmp_path, pipeline):
    code, out, err = cli("import", pipeline, "--out", "published.ckpt")
    assert (code, out) == (0, "published.ckpt\n"), err
    decoder = {"class_path": "DiscretizedGaussianDecoder", "init_args": {"levels": 17}}
    callbacks = [
        {"class_path": "EMA"},
        {"class_path": "Likelihood", "init_args": {"decoder": decoder}},
        {"class_path": "FID", "init_args": {"features": "ClassifierFeatures", "num_samples": 8}},
    ]
    file = config(tmp_path / "config.yaml")
    whole = yaml.safe_load(file.read_text())
    whole["trainer"] = whole["trainer"] | {"callbacks": callbacks}
    file.write_text(yaml.safe_dump(whole))
    code, out, err = cli("test", "--config", file, "--ckpt_path", "published.ckpt")
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    measured = {one.name: one for one in read_measurements(folder)}
    assert measured["bpd"].value > 0
    assert measured["bpd"].protocol["num_timesteps"] == 19
    assert measured["fid"].value > 0
    assert (
        "AncestralSampler(steps=20, schedule=BetaSchedule(" in measured["fid"].protocol["sampler"]
    )
    assert measured["fid"].step == 0
    assert measured["fid"].protocol["weights"] == "as published"  # whatever the config averages


def test_a_published_pipeline_is_drawn_from_and_exported(cli, pipeline):
    assert cli("import", pipeline, "--out", "published.ckpt")[0] == 0
    code, _, err = cli("sample", "--ckpt_path", "published.ckpt", "--num_samples=2", "--out=a.png")
    assert code == 0, err
    assert Path("a.png").is_file()
    assert cli("objective", "--ckpt_path", "published.ckpt")[0] == 0
    assert cli("export", "published.ckpt", "--out", "exported", "--license", "apache-2.0")[0] == 0
    drawn = [
        model.eval().sample(2, torch.Generator().manual_seed(0))
        for model in (
            ld.from_diffusers(pipeline),
            ld.load_pretrained("exported"),
            LitDiffusion.load_from_checkpoint("published.ckpt"),
        )
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    card = Path("exported/README.md").read_text()
    assert "| weights | as published, step 0 |" in card
    assert "its training objective is not known" in card


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing", "--out", "a.ckpt"], "Expected the folder of a diffusers pipeline"),
        (["pipeline", "--out", "a.pt"], "--out must be a new .ckpt file, got a.pt"),
        (["pipeline", "--out", "old.ckpt"], "--out must be a new .ckpt file, got old.ckpt"),
        (["pipeline"], "required: out"),
    ],
)
def test_a_mistake_is_one_line(cli, tmp_path, pipeline, words, expected):
    (tmp_path / "old.ckpt").write_text("kept")
    code, _, err = cli("import", *words)
    assert code == 2
    assert expected in err
    assert len(err.strip().splitlines()) == 1
    assert (tmp_path / "old.ckpt").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old.ckpt", "pipeline"]


def test_a_pipeline_that_is_no_chain_is_one_line(cli, tmp_path, pipeline):
    path = pipeline / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    code, _, err = cli("import", "pipeline", "--out", "a.ckpt")
    assert code == 2
    assert "the scheduler of a chain of betas" in err
    assert not (tmp_path / "a.ckpt").exists()


@pytest.mark.slow
def test_without_diffusers_every_way_ends_in_the_same_line(cli, tmp_path, pipeline):
    assert cli("import", "pipeline", "--out", "published.ckpt")[0] == 0
    network = {"class_path": "DiffusersNetwork", "init_args": {"config": UNET}}
    config(tmp_path / "config.yaml", model={"network": network})
    code = """
import sys
sys.modules["diffusers"] = None
from lit_diffusion.training.cli import main
for line in (
    "import pipeline --out b.ckpt",
    "fit --config config.yaml --trainer.max_steps 1",
    "sample --ckpt_path published.ckpt",
):
    sys.argv = ["lit-diffusion", *line.split()]
    try:
        main()
    except SystemExit as stop:
        print(stop.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["2", "2", "2"], done.stderr
    assert "Traceback" not in done.stderr
    told = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(told) == 3
    assert all("pip install 'lit-diffusion[diffusers]'" in line for line in told), told
