"""Starting with the weights of another run, and the guide to it, whose commands are run."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from test_module import fit, tiny_model

from lit_diffusion.nn import UNet
from lit_diffusion.schedules import AdaptiveSchedule
from lit_diffusion.training.restore.initial_weights import initialize, weights_of
from lit_diffusion.training.run.checkpoints import load_checkpoint

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/guide/fine-tune.md").read_text(encoding="utf-8")
COMMANDS = "".join(re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
TINY = [
    "--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1", "--data.steps_per_epoch=2", "--data.batch_size=4",
    "--data.val_examples=6", "--data.num_workers=0", "--model.sampler.steps=2",
    "--model.network.channels=[8,8]", "--model.network.attention=[]",
    "--trainer.callbacks=[{class_path: EMA, init_args: {decay: 0.5}}, LastCheckpoint]",
]  # fmt: skip


def network(**arguments):
    defaults = {"shape": (1, 8, 8), "channels": (8, 8), "attention": (), "num_classes": 10}
    return UNet(**{**defaults, **arguments})


def test_what_is_taken_left_out_and_new():
    other = tiny_model(network=network(), schedule=AdaptiveSchedule(-10.0, 13.3))
    model = tiny_model(network=network(num_classes=3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    state = other.state_dict()
    done = initialize(model, state)
    changed = {n for n, v in model.state_dict().items() if v.shape == state[n].shape}
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in changed)
    (label,) = before.keys() - changed
    assert torch.equal(model.state_dict()[label], before[label])
    assert done.left_out == [f"{label} {tuple(state[label].shape)}", "loss"]
    assert done.new == [f"{label} {tuple(before[label].shape)}"]
    # Every other weight is named by itself or by a module that has it.
    named = [name.partition(" ")[0] for name in done.taken]
    assert all(sum(f"{name}.".startswith(f"{one}.") for one in named) == 1 for name in changed)
    assert not any(f"{label}.".startswith(f"{one}.") for one in named)
    same = initialize(tiny_model(), state)
    assert same.taken == ["denoiser"]
    assert list(same.lines()) == ["Taken: denoiser", "Left out: loss"]


def test_a_network_of_another_kind_is_refused():
    state = {"denoiser.network.other.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match="No weight has the name and shape"):
        initialize(tiny_model(), state)


def test_the_average_is_preferred(tmp_path):
    fit(tmp_path, 2)
    path = tmp_path / "checkpoints" / "last.ckpt"
    state, name = weights_of(path)
    assert name == "EMA(decay=0.9) at step 2"
    average = load_checkpoint(path)["state_dict"]
    assert all(torch.equal(state[key], average[key]) for key in average)


def test_the_guide_to_the_letter(cli, tmp_path):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    lines = COMMANDS.replace("\\\n", " ").splitlines()
    said = {}
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "lit-diffusion"
        longer = ["--trainer.max_steps=4"] if "--ckpt_path" in words else []
        code, out, err = cli(*words, *(TINY + longer if words[0] == "fit" else []))
        assert code == 0, (line, err)
        said[line] = out + err
    base, fine, resumed, _, exported = (said[line] for line in lines)
    assert "Initial weights" not in base
    for text in (fine, exported):
        assert "Initial weights: EMA(decay=0.5) at step " in text
        assert "\nTaken: denoiser\n" in text
    assert re.search(
        r"^Left out: denoiser.network.embed_label\S* \(11, \d+\)$", fine, re.MULTILINE
    )
    assert "Initial weights" not in resumed
    assert "Resuming from runs/fine" in resumed
    (config,) = Path("runs/fine").glob("*/config.yaml")
    named = Path(yaml.safe_load(config.read_text())["init_from"])
    assert named.is_absolute()
    assert named.parts[-4] == "base"


@pytest.mark.parametrize("given", ["nowhere", "last"])
def test_a_source_that_is_not_there_is_refused(cli, given):
    code, _, err = cli(
        "fit", "--config", ROOT / "configs/digits.yaml", *TINY, "--init_from", given
    )
    assert code == 2
    assert "checkpoint" in err.strip().splitlines()[-1]
    assert not Path("runs").exists()
