"""Compiling: the same numbers to rounding, the same names, one piece; and what is said without."""

import copy

import pytest
import torch
from test_module import tiny_data, tiny_model, trainer
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import Compile
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.step.compilation import compile_cache_folder, compile_in_place, why_not

CPU = torch.device("cpu")


class Small(nn.Module):
    """A network that is compiled in a moment, and uses all that a network is given."""

    num_classes = 10

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 3, padding=1)
        self.table = nn.Embedding(11, 64)

    def forward(self, z, logsnr, label=None):
        e = self.table(label + 1).view(-1, 1, 8, 8)
        return self.layer(z).tanh() * torch.sigmoid(logsnr).view(-1, 1, 1, 1) + 0.1 * e


@pytest.fixture
def fresh(monkeypatch, tmp_path_factory):
    """Nothing compiled before, and kernels of the test session in a folder of its own."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def steps(model, batch, n=2):
    """Losses and weights of a few steps by hand, under generators of their own."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for seed in range(n):
        generator = torch.Generator().manual_seed(seed)
        terms = model.loss(
            model.denoiser, batch["image"], generator=generator, label=batch["label"]
        )
        optimizer.zero_grad()
        terms.loss.mean().backward()
        optimizer.step()
        losses.append(terms.loss.detach())
    return torch.cat(losses), {k: v.clone() for k, v in model.state_dict().items()}


def compiled_in_place(model):
    """Compile, and count what is compiled from here on."""
    assert compile_in_place(model, CPU)
    counters.clear()


def make_batch(n=6):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(n, 1, 8, 8, generator=generator).clamp(-1, 1)
    return {"image": image, "label": torch.arange(n) - 1}


# Dynamo asks a λ that has a gradient for it, and torch would say that there is none yet.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (ld.LinearSchedule(-5.0, 5.0), ld.VPrediction()),
        (ld.LearnedSchedule(-5.0, 5.0), ld.VPrediction()),
        (ld.AdaptiveSchedule(), ld.EDMPrediction()),
    ],
    ids=str,
)
def test_the_same_steps_to_rounding_in_one_piece(fresh, schedule, prediction):
    """A learned schedule has a gradient of its own, through λ: it must not be lost either."""
    torch.manual_seed(0)
    plain = tiny_model(
        network=Small(), schedule=schedule, prediction=prediction, weighting=ld.ELBOWeighting()
    )
    compiled = copy.deepcopy(plain)
    compiled_in_place(compiled)
    plain.train(), compiled.train()
    losses, weights = steps(plain, make_batch())
    losses_c, weights_c = steps(compiled, make_batch())
    torch.testing.assert_close(losses_c, losses, rtol=1e-5, atol=1e-6)
    assert weights_c.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weights_c[name], weight, rtol=1e-5, atol=1e-6, msg=name)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_sampling_is_compiled_too_and_copies_are_not(fresh):
    model = tiny_model(network=Small(), shape=(1, 8, 8))
    plain = copy.deepcopy(model)
    compiled_in_place(model)
    draw = {"n": 3, "label": 4, "guidance": 2.0}
    images = model.sample(generator=torch.Generator().manual_seed(0), **draw)
    assert counters["stats"]["unique_graphs"] == 1  # of all levels, guided or not
    expected = plain.sample(generator=torch.Generator().manual_seed(0), **draw)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(model)
    assert twin.denoiser.network._compiled_call_impl is None
    assert twin.loss._compiled is None
    assert model.loss._compiled is not None


@pytest.mark.slow
def test_a_run_with_it_has_the_checkpoint_of_one_without(fresh, tmp_path):
    runs = {}
    for name, callbacks in (("plain", []), ("compiled", [Compile()])):
        torch.manual_seed(0)
        run = trainer(tmp_path, max_steps=4, callbacks=callbacks)
        model = tiny_model(network=Small())
        run.fit(model, tiny_data())
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
        runs[name] = load_checkpoint(tmp_path / f"{name}.ckpt")["state_dict"]
    assert counters["stats"]["unique_graphs"] >= 2  # training, and validation
    assert runs["plain"].keys() == runs["compiled"].keys()
    for name, weight in runs["plain"].items():
        torch.testing.assert_close(runs["compiled"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.fixture
def no_compiler(fresh, monkeypatch, tmp_path):
    """A machine that has none, as torch sees it, and nothing kept."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "empty"))
    with inductor.patch("cpp.cxx", ("/nowhere/c++",)):
        yield


def test_without_a_compiler_a_run_goes_on_and_says_so(no_compiler, tmp_path):
    model = tiny_model(network=Small())
    with pytest.warns(UserWarning, match=r"nothing can be compiled for cpu \(.*\): continuing"):
        trainer(tmp_path, max_steps=2, callbacks=[Compile()]).fit(model, tiny_data())
    assert model.denoiser.network._compiled_call_impl is None
    assert model.loss._compiled is None


def test_whoever_insists_is_told(no_compiler, cli):
    code, _, err = cli(
        *("fit", "--trainer.accelerator=cpu", "--trainer.max_steps=2"),
        *("--trainer.callbacks=Compile", "--trainer.callbacks.required=true"),
    )
    assert code == 2
    assert "nothing can be compiled for cpu" in err.splitlines()[-1]
    assert "do not ask for it" in err.splitlines()[-1]


def test_why_not_is_silent_where_it_can(fresh):
    assert why_not(CPU) is None


def test_kernels_are_kept_where_the_user_keeps_such_things(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache_folder() == tmp_path / "lit_diffusion" / "compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert compile_cache_folder().parts[-3:] == (".cache", "lit_diffusion", "compiled")


def test_weights_of_either_order_in_memory_go_on_as_if_nothing_had_changed(tmp_path):
    """A fused optimizer reads weights and moments as if they lay alike."""

    def run(first, then, name):
        paths = []
        for steps, last in ((3, first), (6, then)):
            torch.manual_seed(0)
            network = UNet((1, 8, 8), (8, 8), attention=(), num_classes=10, channels_last=last)
            model = tiny_model(
                network=network,
                optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, fused=True),
            )
            going = trainer(tmp_path, max_steps=steps)
            going.fit(model, tiny_data(), ckpt_path=paths[-1] if paths else None)
            paths.append(tmp_path / f"{name}-{steps}.ckpt")
            going.save_checkpoint(paths[-1])
        return model.state_dict()

    with pytest.warns(UserWarning, match="optimizer cannot be kept"):
        expected, changed = run(True, True, "same"), run(False, True, "changed")
    for name, weight in expected.items():
        torch.testing.assert_close(changed[name], weight, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.soak
def test_the_networks_of_the_house_compile_in_one_piece(fresh):
    for network in (
        UNet((1, 8, 8), (8, 16), attention=(4,), num_classes=10, dropout=0.1, fourier=(3,)),
        ld.nn.DiT((1, 8, 8), depth=2, width=16, heads=2, num_classes=10, rope=True, qk_norm=True),
    ):
        model = tiny_model(network=network).train()
        compiled_in_place(model)
        steps(model, make_batch())
        model.sample(2, label=1)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]
