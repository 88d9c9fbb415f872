"""Augmentation that does not leak: the network is told what was done, and zeros are nothing."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from image_files import module, same, saved, take, write_sixty
from jsonargparse import Namespace
from test_latents import latents
from test_latents import module as latent_module
from test_latents import write as write_latents
from torch import nn

import lit_diffusion as ld
from lit_diffusion.nn import DiT, FourierFeatures, UNet
from lit_diffusion.testing.networks import check_network
from lit_diffusion.training import Augment, DataModule, LitDiffusion
from lit_diffusion.training.commands.fit_setup.network_shape import set_augment
from lit_diffusion.training.data.decoding.augment import NUMBERS

pytestmark = pytest.mark.usefixtures("alone")

OFTEN = Augment(probability=0.5, y_flip=0.5)
KEYS = ("image", "augment", "index")
SMALL_UNET = {"channels": (8,), "attention": ()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sixty(tmp_path_factory.mktemp("sixty"))


def told(n=4000, augment=OFTEN, seed=0, epoch=0):
    return augment.describe(seed, [epoch] * n, np.arange(n))


def waves(rows, columns):
    """A smooth picture of two channels as a function of the place, from the middle, in pixels."""
    return torch.stack(
        [0.8 * torch.cos(0.11 * columns + 0.05 * rows), 0.7 * torch.sin(0.09 * rows + 0.5)]
    )


# The images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_not_augmented_or_mirrored_only_keeps_every_bit(dtype):
    x, augment = torch.rand(64, 3, 7, 9, dtype=dtype) * 2 - 1, told(64)
    augment[::2] = 0
    made = OFTEN(x, augment)
    assert torch.equal(made[::2], x[::2])
    assert not torch.equal(made, x)
    flips = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    augment = torch.cat([flips, torch.zeros(4, NUMBERS - 2)], dim=1)
    made = OFTEN(x[:4], augment)
    assert torch.equal(made[0], x[0])
    assert torch.equal(made[1], x[1].flip(2))
    assert torch.equal(made[2], x[2].flip(1))
    assert torch.equal(made[3], x[3].flip(1, 2))


def test_the_numbers_say_what_was_done():
    """A picture known everywhere is the picture at M⁻¹ of the place, M made from the numbers."""
    height, width, augment = 36, 48, told(200, Augment(probability=0.7, y_flip=0.5)).double()
    rows, columns = torch.meshgrid(
        torch.arange(height).double() + 0.5 - height / 2,
        torch.arange(width).double() + 0.5 - width / 2,
        indexing="ij",
    )
    made = OFTEN(waves(rows, columns).expand(len(augment), -1, -1, -1), augment)
    seen = 0
    for image, a in zip(made, augment, strict=True):
        flip = torch.diag(1 - 2 * a[:2])
        scale = 2 ** (0.2 * a[2]) * torch.eye(2).double()
        angle = torch.atan2(a[4], a[3] + 1)
        turn = torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]])
        r, theta = torch.hypot(a[5], a[6]), torch.atan2(a[6], a[5]) / 2
        axis = torch.tensor([[theta.cos(), -theta.sin()], [theta.sin(), theta.cos()]])
        stretch = axis @ torch.diag(2 ** (0.2 * r * torch.tensor([1.0, -1.0]).double())) @ axis.T
        way = a[7:] * torch.tensor([width, height]) / 8
        whole = stretch @ turn.double() @ scale @ flip
        place = torch.stack([columns, rows], dim=-1) - way
        source = place @ torch.linalg.inv(whole).T
        inside = (source[..., 0].abs() < width / 2 - 2) & (source[..., 1].abs() < height / 2 - 2)
        wanted = waves(source[..., 1], source[..., 0])
        if inside.any():
            assert (image - wanted)[:, inside].abs().max() < 0.02
            seen += int(inside.sum())
    assert seen > 0.4 * made[:, 0].numel()


def test_images_stay_in_range_and_are_continued_by_their_mirror_image():
    x = torch.rand(200, 1, 8, 8) * 2 - 1
    assert OFTEN(x, told(200)).abs().max() <= 1
    level = torch.full((200, 1, 8, 8), 0.3)
    assert OFTEN(level, told(200)).sub(0.3).abs().max() < 1e-6


# The numbers -------------------------------------------------------------------------------------


def test_each_change_has_its_probability_and_size():
    a = told(20000, Augment(probability=0.3))
    share = (a != 0).float().mean(0).tolist()
    assert share == pytest.approx([0.5, 0, *[0.3] * 7], abs=0.015)
    assert a[a[:, 2] != 0, 2].std() == pytest.approx(1, abs=0.05)
    assert (a[:, 3] + 1).square().add(a[:, 4].square()).sub(1).abs().max() < 1e-6
    normal = torch.hypot(a[:, 5], a[:, 6])[a[:, 5] != 0]  # of a normal number
    assert normal.square().mean() == pytest.approx(1, abs=0.1)
    moved = (a[:, 2:] != 0).float()
    assert torch.corrcoef(moved[:, [0, 1, 3, 5]].T).fill_diagonal_(0).abs().max() < 0.03
    for kind, off in {"scaling": [2], "rotation": [3, 4], "anisotropy": [5, 6]}.items():
        a = told(500, Augment(**{"probability": 1, kind: 0}))
        assert set((a == 0).all(0).nonzero()[:, 0].tolist()) == {1, *off}
    a = told(500, Augment(probability=1, rotation=30))
    assert a[:, 4].abs().max() <= math.sin(math.radians(30)) + 1e-6


def test_the_numbers_depend_on_seed_epoch_and_example():
    assert torch.equal(told(50), told(100)[:50])
    assert not torch.equal(told(50), told(50, epoch=1))
    assert not torch.equal(told(50), told(50, seed=1))


@pytest.mark.parametrize(
    "wrong", [{"probability": 1.2}, {"scaling": -1}, {"rotation": 200}, {"x_flip": math.nan}]
)
def test_numbers_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"data.augment.{next(iter(wrong))} must be from 0 to"):
        Augment(**wrong)
    with pytest.raises(ValueError, match="changes no image"):
        Augment(probability=0, x_flip=0)


# In a batch --------------------------------------------------------------------------------------


def test_the_same_streamed_in_memory_with_workers_and_after_resuming(folder):
    def by_example(**settings):
        data = module(folder, augment=OFTEN, horizontal_flip=True, **settings)
        batches = [data.on_after_batch_transfer(b, 0) for b in take(data.train_dataloader(), 20)]
        rows = (row for b in batches for row in zip(*map(b.get, KEYS), strict=True))
        return {(int(i), n // 60): (image, a) for n, (image, a, i) in enumerate(rows)}

    streamed, memory = by_example(batch_size=6), by_example(batch_size=12, streaming=False)
    for key in streamed:
        assert all(torch.equal(*pair) for pair in zip(streamed[key], memory[key], strict=True))
    settings = {"augment": OFTEN, "num_workers": 2, "shuffle_window": 11}
    loader = module(folder, **settings).train_dataloader()
    take(loader, 3)
    state, after = saved(loader.state_dict()), take(loader, 4)
    again = module(folder, **settings).train_dataloader()
    again.load_state_dict(torch.load(state))
    assert same(take(again, 4), after)
    other = module(folder, **settings | {"augment": Augment()}).train_dataloader()
    state.seek(0)
    with pytest.raises(ValueError, match=r"data.augment was \{.*set it back"):
        other.load_state_dict(torch.load(state))


def test_only_training_images_are_augmented(folder):
    plain, data = module(folder), module(folder, augment=OFTEN)
    for one, other in zip(plain.val_dataloader(), data.val_dataloader(), strict=True):
        one, other = (m.on_after_batch_transfer(b, 0) for m, b in ((plain, one), (data, other)))
        assert one.keys() == other.keys()
        assert torch.equal(one["image"], other["image"])
    one, other = next(plain.examples("train", 8)), next(data.examples("train", 8))
    assert one.keys() == other.keys()
    assert torch.equal(one["image"], other["image"])
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].dtype == torch.uint8
    assert batch["augment"].dtype == torch.float32
    assert batch["augment"].shape == (8, NUMBERS)


def test_latents_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.augment moves images of bytes.*set .* to null"):
        latent_module(write_latents(tmp_path / "d", latents(6)), augment=OFTEN)


# The network -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "network",
    [
        UNet(**SMALL_UNET, num_classes=3, augment=NUMBERS),
        UNet(**SMALL_UNET, conditions={"age": 2}, augment=NUMBERS),
        DiT(depth=1, width=16, heads=2, augment=NUMBERS),
        FourierFeatures(UNet(shape=(3, 8, 8), **SMALL_UNET, augment=NUMBERS), (3,)),
    ],
)
def test_networks_take_it_and_none_is_zeros(network):
    check_network(network)
    network.eval()
    z, logsnr = torch.randn(2, 1, 8, 8), torch.zeros(2)
    assert torch.equal(network(z, logsnr), network(z, logsnr, augment=torch.zeros(2, NUMBERS)))
    with pytest.raises(ValueError, match=r"augmentations of 9 numbers, got .*give augment=4"):
        network(z, logsnr, augment=torch.zeros(2, 4))


class Recorder(nn.Module):
    """Remembers what it was given."""

    num_classes, conditions = 60, ()

    def __init__(self):
        super().__init__()
        self.inner, self.seen = UNet(**SMALL_UNET, num_classes=60, augment=NUMBERS), []

    def forward(self, z, logsnr, label=None, augment=None, dropped=None):
        self.seen.append((self.training, label, augment, dropped))
        return self.inner(z, logsnr, label, augment=augment)


def trainer(**arguments):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return L.Trainer(max_steps=2, enable_model_summary=False, **quiet | arguments)


def test_training_tells_it_and_nothing_else_does(folder):
    network = Recorder()
    model = LitDiffusion(network=network, shape=(1, 8, 8), label_dropout=0.999999)
    data = DataModule(str(folder), batch_size=8, augment=OFTEN)
    trainer().fit(model, data)
    training = [seen for seen in network.seen if seen[0]]
    assert len(training) == 2
    for _, label, augment, dropped in training:
        assert (label == -1).all()  # dropped, and yet it is told of the augmentation
        assert dropped is None
        assert (augment != 0).any()
    trainer().validate(model, data, verbose=False)
    model.sample(2, label=3, guidance=2.0)
    assert all(augment is None for train, _, augment, _ in network.seen if not train)


def test_samples_are_those_of_the_network_that_is_given_zeros():
    class Given(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, z, logsnr):
            return self.network(z, logsnr, augment=z.new_zeros(len(z), NUMBERS))

    network = UNet(**SMALL_UNET, augment=NUMBERS)
    nn.init.normal_(network.conv_out.weight, std=0.1)
    one, other = (LitDiffusion(n, shape=(1, 8, 8)) for n in (network, Given(network)))
    sampler = ld.DDIMSampler(steps=3)
    made = [m.sample(2, torch.Generator().manual_seed(0), sampler=sampler) for m in (one, other)]
    assert torch.equal(*made)


def test_networks_that_are_not_told_are_refused(folder):
    class Untold(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, z, logsnr):
            return self.layer(z)

    data = DataModule(str(folder), batch_size=8, augment=OFTEN, label_key=None)
    with pytest.raises(ValueError, match=r"Untold takes no argument 'augment'.*set data.augment"):
        trainer().fit(LitDiffusion(Untold(), shape=(1, 8, 8)), data)
    with pytest.raises(ValueError, match=r"augment=None\), got 9 numbers; give augment=9"):
        trainer().fit(LitDiffusion(UNet(**SMALL_UNET)), data)
    with pytest.raises(ValueError, match="A condition cannot be called 'augment'"):
        LitDiffusion(UNet(**SMALL_UNET, conditions={"augment": 9}))
    with pytest.raises(ValueError, match="at least one number, got augment=0"):
        UNet(augment=0)


# The command line --------------------------------------------------------------------------------


def test_the_command_line_tells_wrapped_networks_and_keeps_what_is_given():
    def config(name, **arguments):
        return Namespace(class_path=f"lit_diffusion.nn.{name}", init_args=Namespace(**arguments))

    data = Namespace(augment=Namespace())
    inner = config("UNet", augment=None)
    set_augment(config("FourierFeatures", network=inner, exponents=(3,), shape=(1, 8, 8)), data)
    assert inner.init_args.augment == NUMBERS
    given = config("DiT", augment=4)
    set_augment(given, data)
    assert given.init_args.augment == 4
    for network, settings in (("ResidualMLP", data), ("UNet", Namespace(augment=None))):
        none = config(network)
        set_augment(none, settings)
        assert none.init_args.get("augment") is None


@pytest.mark.slow
def test_the_overlay_trains_resumes_and_samples(cli, tmp_path):
    words = ["--config", "digits", "--config", "with/augment", "--trainer.callbacks=[]"]
    words += ["--data.batch_size=8", "--data.steps_per_epoch=2", "--data.val_examples=8"]
    words += ["--model.network.init_args.channels=[8]", "--model.network.init_args.fourier=[]"]
    words += ["--trainer.callbacks+=LastCheckpoint", "--trainer.log_every_n_steps=1"]
    code, _, err = cli("fit", *words, "--trainer.max_steps=2")
    assert code == 0, err
    (config,) = tmp_path.glob("runs/digits/*/config.yaml")
    assert "augment: 9" in config.read_text()
    assert "probability: 0.12" in config.read_text()
    code, _, err = cli("fit", *words, "--trainer.max_steps=4", "--ckpt_path=last")
    assert code == 0, err
    code, _, err = cli("fit", *words, "--data.augment=null", "--ckpt_path=last")
    assert code == 2
    code, _, err = cli("sample", "--ckpt_path=last", "--name=digits", "--out=grid.png")
    assert code == 0, err
    code, _, err = cli("fit", *words, "--data.augment.rotation=500")
    assert code == 2
    assert "data.augment.rotation must be from 0 to 180, got 500" in err
