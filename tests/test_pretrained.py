"""Pretrained: the model alone, and folders that are damaged, foreign or hostile."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import lit_diffusion as ld
from lit_diffusion.description import build, describe
from lit_diffusion.nn import UNet
from lit_diffusion.registry import arguments


def tiny(**parts):
    torch.manual_seed(0)
    network = UNet(shape=(1, 8, 8), channels=(8,), attention=(), num_classes=3)
    model = ld.Pretrained(**{"network": network, "sampler": ld.DDIMSampler(steps=2), **parts})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write(folder, model):
    """A folder as `export` writes it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model": describe(model)}))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def test_a_model_comes_back_from_its_folder(tmp_path):
    model = tiny()
    again = ld.load_pretrained(write(tmp_path / "model", model))
    drawn = [m.sample(3, torch.Generator().manual_seed(0)) for m in (model, again)]
    assert torch.equal(*drawn)
    assert not again.training


def test_samples_have_the_size_that_is_asked_for(tmp_path):
    model, seeds = tiny(), [torch.Generator().manual_seed(i) for i in (0, 1)]
    again = ld.load_pretrained(write(tmp_path / "model", model))
    given = {"label": [2, -1], "guidance": 2.0, "size": (12, 5)}
    both = model.sample(2, seeds, **given)
    assert both.shape == (2, 1, 12, 5)
    assert both.isfinite().all()
    alone = again.sample(1, torch.Generator().manual_seed(0), **given | {"label": 2})
    torch.testing.assert_close(alone, both[:1])  # a function of its generator
    one, two = (m.sample(2, torch.Generator().manual_seed(0), **given) for m in (model, again))
    assert torch.equal(one, two)
    same = model.sample(2, torch.Generator().manual_seed(0), 1, size=(8, 8))
    assert torch.equal(same, model.sample(2, torch.Generator().manual_seed(0), 1))


@pytest.mark.parametrize(("shape", "size"), [((2, 24), 32), ((1, 4, 8, 8), (8, 4, 12))])
def test_series_and_volumes_of_other_sizes(shape, size):
    network = UNet(shape, channels=(8,), attention=(shape[1],))
    model = ld.Pretrained(network, sampler=ld.DDIMSampler(steps=2))
    sides = (size,) if isinstance(size, int) else size
    assert model.sample(2, size=size).shape == (2, shape[0], *sides)
    with pytest.raises(ValueError, match=f"{len(sides)} positive sides"):
        model.sample(2, size=(8, 8))


def test_sizes_that_the_network_does_not_take_are_refused():
    plain = ld.Pretrained(nn.Identity(), shape=(1, 8, 8))
    vector = ld.Pretrained(ld.nn.ResidualMLP(shape=(3,), features=8))
    fixed = ld.Pretrained(ld.nn.DiT((1, 8, 8), depth=1, width=32, heads=1))
    for model, size, sentence in [
        (plain, (8, 9), r"the Identity takes, .*got \(1, 8, 9\)"),
        (vector, 3, "size of 0 positive sides, since they have none"),
        (fixed, (8, 16), "train with positions='resampled'"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            model.sample(1, size=size)


def test_its_arguments_are_those_it_was_made_with():
    schedule, weighting = ld.LinearSchedule(-5.0, 5.0), ld.SigmoidWeighting(1.0)
    parts = {
        "network": UNet(shape=(1, 4, 6), channels=(8,), attention=()),
        "schedule": schedule,
        "weighting": weighting,
        "prediction": ld.XPrediction(),
        "sampler": ld.DDIMSampler(steps=2, schedule=schedule),
        "num_timesteps": 7,
        "decoder": None,
        "shape": (1, 4, 6),
        "conditions": None,
        "label_dropout": 0.2,
        "clip_denoised": False,
    }
    found = arguments(ld.Pretrained(**parts))
    assert found.keys() == parts.keys()
    assert found["conditions"] == ()
    assert all(found[name] is parts[name] for name in parts if name not in ("conditions",
               "shape"))  # fmt: skip
    twin = build(describe(ld.Pretrained(**parts)))
    assert describe(twin) == describe(ld.Pretrained(**parts))


def test_the_defaults_are_those_of_training():
    from lit_diffusion.training import LitDiffusion

    ours, theirs = ld.Pretrained(), LitDiffusion()
    assert repr(ours.denoiser) == repr(theirs.denoiser)
    assert repr(ours.loss) == repr(theirs.loss)
    assert repr(ours.sampler) == repr(theirs.sampler)
    assert (ours.shape, ours.clip_denoised) == (theirs.shape, theirs.clip_denoised)


def test_labels_and_guidance_are_heeded():
    model = tiny()

    def draw(**arguments):
        return model.sample(2, torch.Generator().manual_seed(0), **arguments)

    assert not torch.equal(draw(label=0), draw(label=1))
    assert torch.equal(draw(label=[0, 1])[1], draw(label=1)[1])
    assert torch.equal(draw(label=1, guidance=0.0), draw(label=-1))
    for label in (3, -2, [0], [0, 1, 2]):
        with pytest.raises(ValueError, match="Expected 2 labels from 0 to 2"):
            draw(label=label)


def test_without_classes_there_is_nothing_to_guide():
    model = tiny(network=UNet(shape=(1, 8, 8), channels=(8,), attention=()))
    with pytest.raises(ValueError, match="leave label out"):
        model.sample(2, label=0)
    with pytest.raises(ValueError, match="Guidance needs classes"):
        model.sample(2, guidance=2.0)


class Angle(nn.Module):
    """A network with a condition of its own."""

    conditions = ("angle",)

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z, logsnr, angle, dropped=None):
        return self.scale * angle[:, :, None, None] * z


def test_further_conditions_reach_the_network():
    sampler = ld.DDIMSampler(steps=2)
    model = ld.Pretrained(network=Angle(), sampler=sampler, shape=(1, 8, 8))
    assert model.conditions == ("angle",)

    def draw(angle, **arguments):
        cond = {"angle": torch.tensor([[angle], [0.0]])}
        return model.sample(2, torch.Generator().manual_seed(0), cond=cond, **arguments)

    one, other, guided = draw(0.1), draw(0.2), draw(0.2, guidance=2.0)
    assert not torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
    assert not torch.equal(guided[0], other[0])
    with pytest.raises(ValueError, match="This model takes angle, got none"):
        model.sample(2)
    with pytest.raises(ValueError, match="Expected 2 rows of 'angle'"):
        model.sample(2, cond={"angle": torch.zeros(3, 1)})
    with pytest.raises(ValueError, match="no further conditions, got angle"):
        tiny().sample(2, cond={"angle": torch.zeros(2, 1)})


def test_sampling_leaves_the_mode_as_it_was():
    model = tiny().train()
    model.sample(1)
    assert model.training


def test_clip_keeps_images_in_range_and_its_absence_does_not():
    drawn = {
        clip_denoised: tiny(clip_denoised=clip_denoised).sample(
            4, torch.Generator().manual_seed(0)
        )
        for clip_denoised in (0, 1)
    }
    assert drawn[1].abs().max() <= 1 < drawn[0].abs().max()


def test_a_sampler_beyond_the_trained_range_is_refused():
    beyond = ld.DDIMSampler(steps=2, schedule=ld.LinearSchedule(-10.0, 10.0))
    with pytest.raises(ValueError, match=r"visits λ from -10 to 10.*trained on \[-5, 5\] only"):
        tiny(schedule=ld.LinearSchedule(-5.0, 5.0), sampler=beyond)
    inside = tiny(schedule=ld.LinearSchedule(-5.0, 5.0))
    assert inside.sampler.schedule.ends == (-5.0, 5.0)
    with pytest.raises(ValueError, match="restrict its schedule to that range"):
        inside.sample(1, sampler=beyond)


# Folders that are not right ---------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "model", tiny())


def refused(folder, error, *words):
    with pytest.raises(error) as caught:
        ld.load_pretrained(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_no_folder(tmp_path):
    refused(tmp_path / "none", FileNotFoundError, "lit-diffusion export", "no config.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_is_missing(folder, name):
    (folder / name).unlink()
    refused(folder, FileNotFoundError, "lit-diffusion export", f"no {name}")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "3",
        "null",
        '"model"',
        "{}",
        '{"model": null}',
        '{"model": {"class_path": "torch.nn.Linear", "init_args": {}}}',
        '{"architectures": ["BertModel"]}',
        "\udcff",
    ],
)
def test_a_config_of_another_kind(folder, text):
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    refused(folder, ValueError, "config.json is not a config that `lit-diffusion export` wrote")


def change(folder, **parts):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model"]["init_args"] |= parts
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("parts", "word"),
    [
        ({"schedule": {"class_path": "lit_diffusion.CosinSchedule"}}, "CosinSchedule"),
        ({"network": {"class_path": "lit_diffusion.nn.UNet", "init_args": {"w": 1}}}, "'w'"),
        ({"network": {"class_path": "not_installed.Network"}}, "not_installed"),
        ({"unknown": 1}, "unknown"),
        ({"shape": [1, 8]}, "shape"),
        ({"shape": [0, 8, 8]}, "all positive"),
        ({"shape": [1, 28, 28]}, "is built"),
        ({"sampler": 7}, "schedule"),
        ({"network": {"class_path": 7}}, "7"),
    ],
)
def test_a_config_that_cannot_be_made(folder, parts, word):
    change(folder, **parts)
    refused(folder, ValueError, "config.json describes a model that cannot be built", word)


def test_nothing_but_allowed_modules_is_imported(folder, tmp_path):
    """A module that is there to be imported, but that nobody allowed."""
    (tmp_path / "hostile.py").write_text(
        "import pathlib, torch\npathlib.Path('executed').touch()\n"
        "class Network(torch.nn.Module):\n    pass\n"
    )
    code = (
        "import sys\n"
        "from lit_diffusion import load_pretrained\n"
        "try:\n    load_pretrained('model')\n"
        "except ValueError as error:\n    print('refused:', error)\n"
        "assert 'hostile' not in sys.modules"
    )
    change(folder, network={"class_path": "hostile.Network", "init_args": {}})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("refused: ")
    assert "may not name hostile.Network" in done.stdout
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("path", ["os.system", "subprocess.Popen", "builtins.eval", "eval"])
def test_what_is_no_part_of_a_model_is_not_called(folder, path):
    change(folder, network={"class_path": path, "init_args": {"command": "true"}})
    refused(folder, ValueError, path)


def test_weights_that_are_damaged(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for damaged in (b"", whole[:7], whole[: len(whole) // 2], b"\xff" * 64):
        path.write_bytes(damaged)
        refused(folder, ValueError, "model.safetensors does not hold the weights")


def test_weights_of_another_model(folder):
    save_file({"weight": torch.zeros(2)}, folder / "model.safetensors")
    refused(folder, ValueError, "model.safetensors does not hold the weights", "Missing key")


def test_a_pickle_is_not_read(folder):
    torch.save({"weight": torch.zeros(2)}, folder / "model.safetensors")
    refused(folder, ValueError, "model.safetensors does not hold the weights")
