"""The commands as functions: typed, documented, imported when used, with one-line errors."""

import inspect
import json
import re
import subprocess
import sys
import typing

import docstring_parser
import pytest
import torch

import lit_diffusion as ld
from lit_diffusion import __main__ as command_line
from lit_diffusion import training
from lit_diffusion.training import (
    LitDiffusion,
    callbacks,
    compare,
    ema,
    objective,
    plugins,
    report,
    sample,
)
from lit_diffusion.training.commands.shell.shipped_configs import shipped_configs
from lit_diffusion.training.commands.table import COMMANDS

FUNCTIONS = {name: one.function for name, one in COMMANDS.items() if one.function}


def modules_after(*words):
    """The modules that a command has imported when it ends."""
    code = (
        "import sys, json\n"
        "from lit_diffusion.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_every_command_is_described_and_public():
    described = re.findall(r"^  (\w+) +\S", command_line.overview(), re.MULTILINE)
    assert described == list(COMMANDS)
    assert set(FUNCTIONS.values()) <= set(training.__all__)
    shown = inspect.getsource(training).partition("_MODULES")[0]  # to a type checker
    for function in FUNCTIONS.values():
        assert f"commands.{function} import {function}" in shown


@pytest.mark.parametrize("name", FUNCTIONS.values())
def test_a_command_is_a_typed_and_documented_function(name):
    function = getattr(training, name)
    hints = typing.get_type_hints(function)
    documented = {
        p.arg_name: p.description for p in docstring_parser.parse(function.__doc__).params
    }
    assert set(inspect.signature(function).parameters) == set(documented)
    assert all(documented.values())
    assert set(hints) == {*documented, "return"}
    assert hints["return"] is not type(None)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_help_has_every_argument_and_its_description(cli, name):
    function = getattr(training, FUNCTIONS[name])
    code, out, err = cli(name, "--help")
    assert code == 0, err
    text = " ".join(out.split())
    assert " ".join(function.__doc__.partition("\n")[0].split()) in text
    for argument in inspect.signature(function).parameters:
        if argument not in ("model_class", "data_class", "num_timesteps"):
            assert argument in text


def test_every_public_name_is_reached():
    assert set(training.__all__) <= set(dir(training))
    for name in training.__all__:
        assert getattr(training, name) is not None
    with pytest.raises(AttributeError, match="LitDifusion"):
        _ = training.LitDifusion


@pytest.mark.slow
def test_a_command_imports_only_what_it_needs():
    assert "lightning" not in modules_after("plugins")
    others = modules_after("report", "--help")
    assert not {"datasets", "wandb"} & others
    assert "lit_diffusion.training.commands.report" in others
    assert "lit_diffusion.training.commands.evaluate" not in others


def test_a_wrong_argument_is_one_sentence_in_python_and_on_the_command_line(cli, tmp_path):
    calls = [
        (compare, {"runs": []}, ["compare"]),
        (ema, {"run": "nowhere"}, ["ema", "nowhere"]),
        (objective, {"out": "x.jpg"}, ["objective", "--out", "x.jpg"]),
        (report, {"run": "nowhere"}, ["report", "nowhere"]),
        (sample, {"ckpt_path": "x", "per_class": 0}, ["sample", "--ckpt_path=x", "--per_class=0"]),
    ]
    for function, arguments, words in calls:
        with pytest.raises(ValueError, match=r".") as raised:
            function(**arguments)
        code, out, err = cli(*words)
        assert (code, out) == (2, "")
        assert err == f"lit-diffusion: error: {raised.value}\n"


def test_an_objective_from_python():
    described = objective(ld.CosineSchedule(), ld.SigmoidWeighting(bias=1.0), ld.EpsPrediction())
    assert described.objective.monotone
    assert described.figure is None
    assert str(described).startswith("Objective: SigmoidWeighting(bias=1), sampled from Cosine")
    with pytest.raises(ValueError, match="data_std"):
        objective(weighting=ld.EDMWeighting(0.3), prediction=ld.EDMPrediction(0.5))


def test_samples_from_python(tmp_path):
    import lightning as L

    model = LitDiffusion(sampler=ld.DDIMSampler(steps=2))
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    images, path = sample(tmp_path / "x.ckpt", num_samples=3, out=tmp_path / "x.npy")
    assert images.shape == (3, 1, 8, 8)
    assert path.is_file()
    assert images.abs().max() <= 1
    assert torch.equal(images, sample(tmp_path / "x.ckpt", num_samples=3, out=path).images)


def test_plugins_from_python():
    found = plugins()
    assert ld.CosineSchedule in found["NoiseSchedule"]
    assert "  CosineSchedule " in str(found)
    assert {ld.UNet, ld.DiT, ld.DiffusersNetwork} <= set(found["Network"])


def test_plugins_lists_callbacks_and_configs():
    found = plugins()
    assert [name for name, _, _ in found.own_callbacks] == callbacks.__all__
    assert all(summary.endswith((".", "file.")) for _, _, summary in found.own_callbacks)
    lines = [line.split() for line in str(found).partition("Config\n")[2].splitlines()]
    assert [words[0] for words in lines if words] == list(shipped_configs())
    said = [" ".join(words[1:]) for words in lines if words]
    assert len(set(said) - {""}) == len(said)


def test_plugins_lists_the_networks_and_callbacks_of_a_user(cli, tmp_path):
    (tmp_path / "listed_plugin.py").write_text(
        "import lightning as L\nfrom torch import nn\n\n"
        'class MyNet(nn.Module):\n    """A net.\n\n    More."""\n'
        "    def forward(self, z, logsnr, label=None):\n        return z\n\n"
        "class Layer(nn.Module):\n    def forward(self, x):\n        return x\n\n"
        'class MyCallback(L.Callback):\n    """Does it."""\n'
    )
    code, out, err = cli("plugins", "--plugins", "listed_plugin")
    assert code == 0, err
    lines = [line.split() for line in out.splitlines()]
    assert ["MyNet", "listed_plugin", "A", "net."] in lines
    assert ["MyCallback", "listed_plugin", "Does", "it."] in lines
    assert not any("Layer" in words for words in lines)


def test_jsonargparse_still_finds_class_names_where_it_is_replaced():
    """If this fails, look for a public way first: see `prefer_importable_classes`."""
    from jsonargparse import _typehints

    from lit_diffusion.training.lightning_internals import prefer_importable_classes

    prefer_importable_classes()
    found = _typehints.get_all_subclass_paths(ld.Weighting)
    assert "lit_diffusion.SigmoidWeighting" in found
    source = inspect.getsource(_typehints.resolve_class_path_by_name)
    assert "get_all_subclass_paths(" in source
