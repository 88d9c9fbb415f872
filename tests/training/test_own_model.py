"""Subclasses of LitDiffusion: a further loss, arguments of their own, and their checkpoints."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from test_cli import FAST
from test_own_data import BYTES, Plain, X, Y, loader, model, trainer
from torch.func import functional_call
from torch.utils.data import TensorDataset

import lit_diffusion as ld
from lit_diffusion import description
from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.nn import UNet
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.cli import main
from lit_diffusion.training.run.checkpoints import MODEL_CLASS, load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")
CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"

# A further loss -------------------------------------------------------------------------------


class Sharp(LitDiffusion):
    """Penalises the error of x̂ as well."""

    def extra_loss(self, batch, terms):
        return 0.3 * (terms.denoised.x - batch["image"]).square().flatten(1).mean(1)


class Sometimes(Sharp):
    """The same, for no batch."""

    def extra_loss(self, batch, terms):
        return None


def fitted(cls, folder, **arguments):
    torch.manual_seed(0)
    subject = cls(UNet(channels=(8,), attention=(), num_classes=10), **arguments)
    run = trainer(folder, log_every_n_steps=1, max_steps=2)
    run.fit(subject, loader(TensorDataset(X, Y)))
    weights = torch.cat([p.detach().flatten() for p in subject.parameters()])
    return subject, weights, {k: v.item() for k, v in run.callback_metrics.items()}


def test_a_further_loss_is_trained_on_and_logged_on_its_own(tmp_path):
    _, plain, _ = fitted(LitDiffusion, tmp_path)
    _, sharp, logged = fitted(Sharp, tmp_path)
    _, none, zero = fitted(Sometimes, tmp_path)
    assert logged["train/extra_loss"] > 0
    assert zero["train/extra_loss"] == 0
    assert not torch.equal(plain, sharp)
    torch.testing.assert_close(plain, none)


def test_its_gradient_is_that_of_the_sum():
    loss = DiffusionLoss(ld.LinearSchedule(-5.0, 5.0))
    denoiser = ld.Denoiser(Plain().double(), ld.VPrediction())
    x, eps = X[:3].double(), torch.randn_like(X[:3].double())
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)

    def total(scale):
        def call(z, logsnr):
            return functional_call(denoiser, {"network.scale": scale}, (z, logsnr))

        terms = loss(call, x, t=t, eps=eps, with_estimates=True)
        return terms.loss.mean(), Sharp.extra_loss(None, {"image": x}, terms).mean()

    scale = denoiser.network.scale.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda s: sum(total(s)), scale)
    (both,) = torch.autograd.grad(sum(total(scale)), scale)
    one, other = (torch.autograd.grad(part, scale, retain_graph=True)[0] for part in total(scale))
    torch.testing.assert_close(both, one + other)


def test_the_estimates_are_those_of_the_loss_and_are_not_kept_unless_asked_for():
    subject = model(None)
    x, t, eps = X[:3], torch.tensor([0.2, 0.5, 0.8]).double(), torch.randn_like(X[:3])
    plain = subject.loss(subject.denoiser, x, t=t, eps=eps)
    terms = subject.loss(subject.denoiser, x, t=t, eps=eps, with_estimates=True)
    assert plain.z is None
    assert plain.denoised is None
    assert torch.equal(plain.loss, terms.loss)
    torch.testing.assert_close(terms.z, ld.diffuse(x, eps, terms.logsnr))
    error = (terms.denoised.eps - eps).square().flatten(1).mean(1)
    assert torch.equal(error, terms.eps_mse)


# Arguments of its own -------------------------------------------------------------------------

SOURCE = """
from pathlib import Path

from lit_diffusion.nn import UNet
from lit_diffusion.training import LitDiffusion

Path("imported").touch()


class Mine(LitDiffusion):
    \"\"\"A model of one's own.

    Args:
        strength: Of the further loss.
    \"\"\"

    def __init__(self, strength: float = 0.5, **arguments):
        super().__init__(**arguments)
        self.strength = strength

    def extra_loss(self, batch, terms):
        return self.strength * terms.denoised.x.mean()


class Narrow(LitDiffusion):
    \"\"\"A model that makes its network.\"\"\"

    def __init__(self, width: int = 8):
        super().__init__(UNet(channels=(width,), attention=()), label_dropout=0.0)
        self.width = width


class Forgetful(LitDiffusion):
    \"\"\"A model that does not keep its argument.\"\"\"

    def __init__(self, width: int = 8):
        super().__init__(UNet(channels=(width,), attention=()))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The user's module, imported for the test only, and allowed by nobody."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(description, "_ALLOWED", list(description._ALLOWED))
    Path("my_model.py").write_text(SOURCE)
    yield importlib.import_module("my_model")
    sys.modules.pop("my_model", None)


def saved(subject, path):
    run = trainer(path.parent, max_steps=1)
    run.fit(subject, loader(BYTES))
    run.save_checkpoint(path)
    return path


def forget():
    """As in another process."""
    del sys.modules["my_model"]
    Path("imported").unlink()


def test_a_checkpoint_names_its_class_and_has_its_arguments(mine, tmp_path):
    network = UNet(channels=(8,), attention=())
    for subject in (mine.Mine(0.7, network=network), mine.Narrow(16)):
        path = saved(subject, tmp_path / "one.ckpt")
        assert load_checkpoint(path)[MODEL_CLASS] == f"my_model.{type(subject).__name__}"
        description.allow("my_model")
        loaded = LitDiffusion.load_from_checkpoint(path)
        assert type(loaded) is type(subject)
        assert {"strength": 0.7, "width": 16}.items() & vars(loaded).items()
        noise = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
        subject.eval()
        assert torch.equal(loaded.sample(2, noise[0]), subject.sample(2, noise[1]))
        assert loaded.label_dropout == subject.label_dropout


def test_a_class_that_nobody_allowed_is_neither_used_nor_imported(mine, tmp_path):
    path = saved(mine.Narrow(), tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match="--plugins my_model"):
        LitDiffusion.load_from_checkpoint(path)
    forget()
    with pytest.raises(ValueError, match="--plugins my_model"):
        LitDiffusion.load_from_checkpoint(path)
    assert not Path("imported").exists()


def test_its_own_class_needs_no_permission(mine, tmp_path):
    path = saved(mine.Narrow(16), tmp_path / "one.ckpt")
    assert mine.Narrow.load_from_checkpoint(path).width == 16


def test_an_argument_that_is_not_kept_is_reported_before_training(mine, tmp_path):
    with pytest.warns(UserWarning, match=r"width cannot be kept .*set self\.width"):
        path = saved(mine.Forgetful(16), tmp_path / "one.ckpt")
    assert mine.Forgetful.load_from_checkpoint(path, width=16).shape == (1, 8, 8)


def test_a_checkpoint_may_not_name_any_other_class(mine, tmp_path):
    path = saved(mine.Narrow(), tmp_path / "one.ckpt")
    checkpoint = load_checkpoint(path)
    for other in ("torch.nn.Linear", "lit_diffusion.UNet"):
        torch.save(checkpoint | {MODEL_CLASS: other}, path)
        with pytest.raises(ValueError, match=r"expected a LitDiffusion, got the class"):
            LitDiffusion.load_from_checkpoint(path)


@pytest.fixture
def program(mine, monkeypatch, cli):
    """A run of the user's program, made in another process as it were."""
    sys.argv[:] = ["train.py", "fit", "--config", str(CONFIG), "--model.strength=0.7", *FAST]
    main(mine.Mine)
    (run,) = Path("runs/digits").iterdir()
    monkeypatch.setattr(description, "_ALLOWED", description._ALLOWED[:5])
    forget()
    return run


COMMANDS = [
    [
        "sample",
        "--out",
        "grid.png",
        "--num_samples=2",
        "--sampler=DDIMSampler",
        "--sampler.steps=2",
    ],
    ["objective"],
    ["evaluate", "--num_samples=10", "--features=ClassifierFeatures", "--steps=[2]"],
]


def test_commands_use_it_if_it_is_named(program, cli):
    path = program / "checkpoints" / "last.ckpt"
    assert load_checkpoint(path)[MODEL_CLASS] == "my_model.Mine"
    for words in COMMANDS:
        code, _, err = cli(*words, "--ckpt_path", path)
        assert code == 2
        assert "--plugins my_model" in err
        assert not Path("imported").exists()
    for words in COMMANDS:
        code, _, err = cli(*words, "--ckpt_path", path, "--plugins", "my_model")
        assert code == 0, err
    code, _, err = cli("export", program, "--out", "exported")  # the model without its training
    assert code == 0, err
    assert ld.load_pretrained("exported").sample(1).shape == (1, 1, 8, 8)


def test_validate_names_the_program(program, cli):
    path = program / "checkpoints" / "last.ckpt"
    words = ["--config", CONFIG, "--ckpt_path", path, "--plugins", "my_model"]
    for command in ("validate", "predict", "fit"):
        code, _, err = cli(command, *words, *FAST)
        assert code == 2
        assert "trained as my_model.Mine" in err


def test_a_class_of_the_program_itself_is_found_in_its_file(mine, tmp_path):
    """In another program `__main__` is something else."""
    path = saved(mine.Narrow(16), tmp_path / "one.ckpt")
    torch.save(load_checkpoint(path) | {MODEL_CLASS: "__main__.Narrow"}, path)
    with pytest.raises(ValueError, match=r"the class Narrow of the program .*--plugins"):
        LitDiffusion.load_from_checkpoint(path)
    description.allow("my_model")
    assert LitDiffusion.load_from_checkpoint(path).width == 16
