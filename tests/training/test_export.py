"""`lit-diffusion export`: the folder stands alone, draws the same images, and the Hub takes it."""

import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_module import tiny_data, trainer
from torch import nn

import lit_diffusion as ld
from lit_diffusion.nn import FourierFeatures, ResidualMLP, UNet
from lit_diffusion.training import (
    EMA,
    AdaptiveScheduleUpdate,
    LastCheckpoint,
    Likelihood,
    LitDiffusion,
    SampleGrid,
)
from lit_diffusion.training.commands import export as export_module
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.measurements import (
    Measurement,
    add_measurements,
    read_measurements,
)

ROOT = Path(__file__).parents[2]


def unet(num_classes=None):
    return UNet(shape=(1, 8, 8), channels=(8, 8), attention=(), num_classes=num_classes)


def classes():
    return {"network": unet(10), "sampler": ld.DDIMSampler(steps=3)}, []


def learned():
    """Ends and shape differ from what the arguments say, so the weights must tell."""
    schedule = ld.LearnedSchedule(-5.0, 13.3, learn="both")
    parts = {"network": unet(), "schedule": schedule, "decoder": ld.SoftmaxDecoder(17)}
    return parts | {"sampler": ld.AncestralSampler(steps=3), "schedule_lr": 0.1}, []


def adaptive():
    """The sampler walks the histogram, which lies in float64 buffers."""
    schedule = ld.AdaptiveSchedule(-10.0, 13.3, bins=10)
    return {"network": unet(), "schedule": schedule}, [AdaptiveScheduleUpdate(1)]


def chain():
    """Steps, a weighting that holds a schedule of its own, and infinity among the arguments."""
    weighting = ld.DensityWeighting(ld.BetaSchedule(), num_timesteps=999)
    parts = {"schedule": ld.BetaSchedule(), "weighting": weighting, "num_timesteps": 999}
    return parts | {"network": unet(), "sampler": ld.HeunSampler(3, s_churn=5.0)}, []


def toy():
    inner = ResidualMLP((10, 1, 1), features=16, layers=1)
    network = FourierFeatures(inner, exponents=(1, 6), shape=(2, 1, 1))
    return {"network": network, "shape": (2, 1, 1), "clip_denoised": False}, []


MODELS = [classes, learned, adaptive, chain, toy]


def trained(folder, make, callbacks=(), steps=3):
    """A run folder with the checkpoint of a model that has been trained a little."""
    torch.manual_seed(0)
    arguments, own = make()
    model = LitDiffusion(
        **{"optimizer": functools.partial(torch.optim.AdamW, lr=1e-2), **arguments}
    )
    data = tiny_data()
    if make is toy:
        data = tiny_data(path="swirl", shape=(2, 1, 1), label_key=None)
    callbacks = [EMA(0.9), *own, LastCheckpoint(), *callbacks]
    trainer(folder, max_steps=steps, callbacks=callbacks).fit(model, data)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run with samples and numbers."""
    folder = tmp_path_factory.mktemp("export") / "runs" / "tiny" / "1"
    callbacks = [SampleGrid(rows=1, columns=10), Likelihood(ld.SoftmaxDecoder(17))]
    return trained(folder, classes, callbacks, steps=5)


@pytest.mark.filterwarnings("ignore:The decoder:UserWarning")
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_the_folder_draws_the_same_images(cli, tmp_path, make):
    folder = trained(tmp_path / "run", make)
    code, out, err = cli("export", folder, "--out", "exported")
    assert (code, out) == (0, "exported\n"), err
    ours = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    theirs = ld.load_pretrained("exported")
    assert not theirs.training
    label = None if ours.num_classes is None else torch.tensor([3, -1, 9, 0])
    for arguments in ({}, {"label": label}, {"sampler": ld.DDIMSampler(steps=2, eta=1.0)}):
        drawn = [
            [
                model.sample(4, torch.Generator().manual_seed(7), **arguments),
                model.sample(2, [torch.Generator().manual_seed(i) for i in range(2)]),
            ]
            for model in (ours, theirs)
        ]
        for one, other in zip(*drawn, strict=True):
            assert torch.equal(one, other)
    assert theirs.schedule.ends == ours.loss.schedule.ends
    x, t = -torch.ones(2, *ours.shape), torch.tensor([0.2, 0.8])
    eps, generator = torch.ones_like(x), torch.Generator()
    terms = [
        model.loss(model.denoiser, x, t=t, eps=eps, generator=generator.manual_seed(0))
        for model in (ours, theirs)
    ]
    assert all(map(torch.equal, terms[0][:3], terms[1][:3]))


def test_guidance_is_the_same(cli, tmp_path, run):
    cli("export", run, "--out", "exported")
    ours = LitDiffusion.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    theirs = ld.load_pretrained("exported")
    guided = {"label": 3, "guidance": 2.0, "guidance_interval": (-5.0, 5.0)}
    drawn = [m.sample(2, torch.Generator().manual_seed(0), **guided) for m in (ours, theirs)]
    assert torch.equal(*drawn)
    plain = theirs.sample(2, torch.Generator().manual_seed(0), label=3)
    assert not torch.equal(drawn[0], plain)


def test_the_weights_are_the_average_in_float32(cli, run):
    cli("export", run, "--out", "exported")
    kept = load_file("exported/model.safetensors")
    checkpoint = load_checkpoint(run / "checkpoints" / "last.ckpt")
    average, raw = checkpoint["state_dict"], checkpoint["current_model_state"]
    assert kept.keys() == average.keys()
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    assert any(not torch.equal(kept[name], raw[name]) for name in kept)
    assert {value.dtype for value in kept.values()} == {torch.float32}
    config = json.loads(Path("exported/config.json").read_text())
    assert config["weights"] == checkpoint.get("average", "average")
    assert config["step"] == 5
    whole = Path("exported/model.safetensors").read_bytes()
    assert config["sha256"] == hashlib.sha256(whole).hexdigest()
    assert "optimizer" not in config["model"]["init_args"]
    modes = {path.stat().st_mode for path in Path("exported").iterdir()}
    assert len(modes) == 1  # none is for the owner alone


def test_the_config_is_json_even_with_infinity(cli, tmp_path):
    folder = trained(tmp_path / "run", chain)
    cli("export", folder, "--out", "exported")
    text = Path("exported/config.json").read_text()

    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    sampler = json.loads(text, parse_constant=refuse)["model"]["init_args"]["sampler"]
    assert sampler["init_args"]["s_max"] == float("inf")


# The card -------------------------------------------------------------------------------------


def card_of(cli, run, *extra):
    code, _, err = cli("export", run, "--out", "exported", *extra)
    assert code == 0, err
    return Path("exported/README.md").read_text(encoding="utf-8")


def test_the_hub_can_read_the_card(cli, run):
    from huggingface_hub import ModelCard

    card_of(cli, run, "--license", "mit")
    card = ModelCard.load("exported/README.md")
    assert card.data.license == "mit"
    assert card.data.to_dict()["library_name"] == "lit-diffusion"
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert "diffusion" in card.data.tags
    assert card.text.lstrip().startswith("# tiny")


def test_the_card_says_what_the_model_is(cli, run):
    text = card_of(cli, run)
    assert yaml.safe_load(text.split("---\n")[1])["license"] == "unknown"
    assert "SigmoidWeighting(bias=2), sampled from CosineSchedule" in text
    assert "Nearest published objective: " in text
    assert "| classes | 10 |" in text
    assert "![Samples](samples.png)" in text
    assert (run / "samples/step-0000005.png").read_bytes() == Path(
        "exported/samples.png"
    ).read_bytes()


def test_the_numbers_are_those_of_these_weights_with_their_protocol(cli, run, tmp_path):
    folder = tmp_path / "runs" / "copy" / "1"
    shutil.copytree(run, folder)
    weights = load_checkpoint(run / "checkpoints/last.ckpt").get("average", "average")
    (bits,) = (m for m in read_measurements(run) if m.name == "bpd" and m.step == 5)
    new = [
        Measurement("fid", 12.5, 0.25, 5, "evaluate", {"samples": 77, "weights": weights}),
        Measurement("fid", 4321.5, None, 4, "evaluate", {"samples": 4321, "weights": weights}),
        Measurement("fid", 9876.5, None, 5, "evaluate", {"samples": 9876, "weights": "another"}),
    ]
    add_measurements(folder, new)
    numbers = card_of(cli, folder).partition("## Numbers")[2].partition("## Use")[0]
    assert f"| {bits.value:.4g} ± {bits.error:.2g} |" in numbers
    (row,) = [line for line in numbers.splitlines() if "12.5 ± 0.25" in line]
    assert row.startswith(f"| 5 | evaluate | {weights} | 77 samples |")
    assert "1. Protocol\n\n   - sampled from: LinearSchedule" in numbers
    assert "SoftmaxDecoder(levels=17)" in numbers
    assert "4321" not in numbers  # of another step
    assert "9876" not in numbers  # of other weights


def test_the_code_of_the_card_runs_without_the_training_wing(cli, run, tmp_path):
    text = card_of(cli, run)
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    check = (
        "import sys\n"
        "assert x.shape == (4, 1, 8, 8) and x.abs().max() <= 1\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "wing = {'lightning', 'pytorch_lightning', 'datasets', 'torchvision', 'torchmetrics',\n"
        "        'torch_fidelity', 'wandb', 'jsonargparse', 'matplotlib', 'diffusers', 'yaml'}\n"
        "assert not loaded & wing, loaded & wing\n"
        "assert 'lit_diffusion.training' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code + check],
        cwd=tmp_path / "exported",
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


# Which run, and what cannot be exported ------------------------------------------------------


def test_a_run_is_named_in_three_ways(cli, run, tmp_path):
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "1").symlink_to(run)
    last = run / "checkpoints" / "last.ckpt"
    for i, words in enumerate((["last"], [last], [run])):
        code, _, err = cli("export", *words, "--out", f"out{i}")
        assert code == 0, err
        assert (tmp_path / f"out{i}" / "model.safetensors").is_file()
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nothing", "--out", "new"], "No checkpoint at nothing:"),
        (["last", "--out", "new"], "there is no checkpoint below runs;"),
        (["a.ckpt", "--name", "b", "--out", "new"], "--name and --root say"),
        (["last"], "required: out"),
        (["--out", "new"], "required: run"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(cli, tmp_path, words, expected):
    code, _, err = cli("export", *words)
    assert code == 2
    assert expected in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_is_left_alone(cli, run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kept.txt").write_text("kept")
    code, _, err = cli("export", run, "--out", "mine")
    assert code == 2
    assert "a new or empty folder" in err
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["kept.txt"]
    (tmp_path / "empty").mkdir()
    assert cli("export", run, "--out", "empty")[0] == 0


def test_a_full_disk_leaves_no_half_folder(cli, run, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export_module.shutil, "copyfile", full)
    code, _, err = cli("export", run, "--out", "exported")
    assert code == 2
    assert "No space left" in err
    assert list(tmp_path.iterdir()) == []


class Unkept(nn.Module):
    """A network that does not keep its argument."""

    def __init__(self, width=3):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, width, padding=width // 2)

    def forward(self, z, logsnr):
        return self.layer(z)


@pytest.mark.filterwarnings("ignore:network cannot be kept")
def test_a_network_that_cannot_be_described_is_refused(cli, tmp_path):
    folder = trained(tmp_path / "run", lambda: ({"network": Unkept()}, []))
    code, _, err = cli("export", folder, "--out", "exported")
    assert code == 2
    assert "does not describe its network" in err
    assert not Path("exported").exists()
