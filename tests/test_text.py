"""Texts as a condition: bytes, their encoder, and the networks that look at its tokens."""

import pytest
import torch
from torch.nn import functional as F

import lit_diffusion as ld
from lit_diffusion.description import build, describe
from lit_diffusion.models.base import declared_conditions
from lit_diffusion.nn import (
    ByteTransformer,
    DiT,
    FourierFeatures,
    TextEncoder,
    UNet,
    bytes_text,
    text_bytes,
)

WORDS = ["a three", "the digit seven", "é", "3"]
N = len(WORDS)
Z = (2, 8, 8)


def encoder(**arguments):
    return ByteTransformer(**({"length": 24, "width": 16, "depth": 2, "heads": 2} | arguments))


def unet(**arguments):
    return UNet(Z, **({"channels": (8, 16), "attention": (4,), "text": encoder()} | arguments))


def dit(**arguments):
    size = {"depth": 2, "width": 32, "heads": 2}
    return DiT(Z, **(size | {"text": encoder()} | arguments))


NETWORKS = {
    "unet": unet,
    "unet at full resolution": lambda **k: unet(downsample=False, attention=(8,), **k),
    "unet with checkpointing": lambda **k: unet(activation_checkpointing=True, **k),
    "dit": dit,
    "dit with rope": lambda **k: dit(rope=True, qk_norm=True, **k),
    "wrapped": lambda **k: FourierFeatures(UNet((6, 8, 8), **k, text=encoder()), (3,), Z),
}


@pytest.fixture(params=NETWORKS)
def make(request):
    """A maker of networks whose parameters are all different from zero."""

    def made(**arguments):
        torch.manual_seed(0)
        net = NETWORKS[request.param](**arguments)
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
        return net

    return made


@pytest.fixture
def seen():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, *Z, generator=generator), torch.randn(N, generator=generator)


def changed(one, other):
    return ((one - other).abs().flatten(1).amax(1) > 1e-5).tolist()


def test_bytes_and_back():
    found = text_bytes(WORDS)
    assert found.dtype == torch.int64
    assert found.shape == (N, len("the digit seven"))
    assert bytes_text(found) == WORDS
    wide = text_bytes(WORDS, 40)
    assert wide.shape == (N, 40)
    assert torch.equal(wide[:, :15], found)
    assert not wide[:, 15:].any()
    assert text_bytes([], 5).shape == (0, 5)
    many = ["日本語の手書き数字", "🙂 smile", "a\nb\tc "]
    assert bytes_text(text_bytes(many)) == many


@pytest.mark.parametrize(
    ("text", "telling"),
    [
        ("", "blank"),
        (" \n", "blank"),
        ("a\0b", "zero characters"),
        ("\ud800", "UTF-8 can encode"),
        ("four digits", "at most 10 bytes, got 11"),
        ("ééééééé", "at most 10 bytes, got 14"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(text, telling):
    with pytest.raises(ValueError, match=telling):
        text_bytes(["fine", text], 10)


def test_a_new_network_is_unchanged_by_the_text(seen):
    """So far it is zero everywhere; with another last layer it still does not look at the text."""
    for net in (unet(), dit()):
        last = net.conv_out if isinstance(net, UNet) else net.layer_out
        torch.nn.init.normal_(last.weight)
        for block in net.modules():  # open the gates of a DiT, so that its blocks do something
            if type(block).__name__ == "Modulation":
                torch.nn.init.normal_(block.layer.weight, std=0.1)
        out = net(*seen, text=text_bytes(WORDS))
        assert out.any()
        assert torch.equal(out, net(*seen))
        assert torch.equal(out, net(*seen, text=text_bytes(["x"] * N)))


def test_each_caption_steers_its_own_image(make, seen):
    net = make()
    out = net(*seen, text=text_bytes(WORDS, 20))
    for i in range(N):
        other = [*WORDS]
        other[i] += "!"
        steered = changed(net(*seen, text=text_bytes(other, 20)), out)
        assert steered == [k == i for k in range(N)]
    order = torch.tensor([2, 0, 3, 1])
    z, logsnr = seen
    moved = net(z[order], logsnr[order], text=text_bytes(WORDS, 20)[order])
    torch.testing.assert_close(moved, out[order], rtol=1e-4, atol=1e-5)


def test_the_order_of_the_bytes_matters(make, seen):
    net = make()
    one, other = (net(*seen, text=text_bytes([word] * N)) for word in ("on", "no"))
    assert all(changed(one, other))


def test_padding_does_not_matter(make, seen):
    net = make()
    outs = [net(*seen, text=text_bytes(WORDS, length)) for length in (15, 19, 24)]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-4, atol=1e-5)


def test_a_dropped_caption_is_no_caption(make, seen):
    net = make()
    text = text_bytes(WORDS, 24)
    out, without = net(*seen, text=text), net(*seen)
    assert all(changed(out, without))
    for rows in (torch.ones(N).bool(), torch.tensor([True, False, False, True])):
        mixed = net(*seen, **ld.drop_condition({"text": text}, rows))
        expected = torch.where(rows[:, None, None, None], without, out)
        torch.testing.assert_close(mixed, expected, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(without).all()


def test_the_gradient_reaches_every_parameter(make, seen):
    net = make().train()
    text = ld.drop_condition({"text": text_bytes(WORDS)}, torch.arange(N) == 0)
    net(*seen, **text).square().mean().backward()
    missing = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert missing == []
    encoded = next(m for m in net.modules() if isinstance(m, ByteTransformer))
    used = encoded.table.weight.grad.abs().sum(1) > 0
    wanted = {0, *"".join(WORDS[1:]).encode()}  # the bytes that are there, and "no text"
    assert set(used.nonzero().flatten().tolist()) == wanted


def test_a_network_without_texts_is_as_before():
    """It has none of the new parameters, and its weights are a part of those with texts."""
    for make in (unet, dit):
        plain, reads = make(text=None), make()
        names = set(plain.state_dict())
        further = set(reads.state_dict()) - names
        assert all(name.startswith("text.") or ".read." in name for name in further)
        assert not [name for name in names if name.startswith("text.") or ".read." in name]
        left = reads.load_state_dict(plain.state_dict(), strict=False)  # an older checkpoint
        assert set(left.missing_keys) == further
        assert left.unexpected_keys == []


def test_with_labels_and_numbers_together(seen):
    torch.manual_seed(0)
    for make in (unet, dit):
        net = make(num_classes=3, conditions={"age": 1})
        for p in net.parameters():
            p.data += 0.1 * torch.randn(p.shape)
        cond = {"label": torch.tensor([0, 1, 2, -1]), "age": torch.arange(N)}
        cond["text"] = text_bytes(WORDS)
        out = net(*seen, **cond)
        for name, other in (("label", 2), ("age", 9), ("text", 65)):
            moved = cond[name].clone()
            moved[1] = other
            assert changed(net(*seen, **(cond | {name: moved})), out) == [
                False,
                True,
                False,
                False,
            ]
        dropped = ld.drop_condition(cond, torch.ones(N).bool())
        assert torch.equal(net(*seen, **dropped), net(*seen))
        for lacking in ("age", "text"):
            given = {name: value for name, value in cond.items() if name != lacking}
            with pytest.raises(ValueError, match="built for texts and other conditions, got"):
                net(*seen, **given)


def test_what_does_not_fit_is_refused(seen):
    text = text_bytes(WORDS)
    with pytest.raises(ValueError, match="built without conditions but got text"):
        unet(text=None)(*seen, text=text)
    with pytest.raises(ValueError, match=r"length=24 takes bytes.*got torch.int64 \(4, 25\)"):
        unet()(*seen, text=F.pad(text, (0, 10)))
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        unet()(*seen, text=text.float())
    with pytest.raises(ValueError, match="looks at a text where it has attention"):
        unet(attention=(5,))
    with pytest.raises(ValueError, match="cannot be numbers as well"):
        dit(conditions={"text": 3})
    for wrong in ({"depth": 0}, {"length": 0}, {"width": 15}):
        with pytest.raises(ValueError, match="at least 1, and width a multiple"):
            encoder(**wrong)


def test_numbers_may_be_called_text(seen):
    """Models of an earlier version may have a condition of that name."""
    net = unet(text=None, conditions={"text": 2})
    assert declared_conditions(net) == ("text",)
    assert net(*seen, text=torch.randn(N, 2)).shape == seen[0].shape


def test_a_network_is_described_and_built_again(make):
    net = make()
    assert declared_conditions(net) == ("text",)
    again = build(describe(net))
    assert repr(again) == repr(net)
    again.load_state_dict(net.state_dict())


def test_in_half_precision(seen):
    z, logsnr = seen
    net = unet()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    text = text_bytes(WORDS)
    out = net(z, logsnr, text=text)
    with torch.autocast("cpu", torch.bfloat16):
        rough = net(z, logsnr, text=text)
    assert rough.dtype == torch.float32
    assert (rough - out).abs().max() < 0.1 * out.abs().max()
    denoiser = ld.Denoiser(net.to(torch.bfloat16))
    assert denoiser(z, logsnr, text=text).x.dtype == torch.float32


@pytest.mark.parametrize("make", [unet, dit])
def test_it_compiles_into_one_graph(make, seen):
    net = make()
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    text = text_bytes(WORDS)
    for cond in ({"text": text}, {}):
        torch.testing.assert_close(compiled(*seen, **cond), net(*seen, **cond))


class Letters(TextEncoder):
    """An encoder of one's own, of tokens without an order."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.width = width
        self.table = torch.nn.Embedding(256, width)

    def forward(self, text):
        mask = text > 0
        mask[:, 0] = True
        return self.table(text), mask

    def no_text(self, batch):
        return torch.zeros(batch, 1, dtype=torch.int64)


def test_an_encoder_of_ones_own(seen):
    torch.manual_seed(0)
    net = unet(text=Letters())
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    one, other = (net(*seen, text=text_bytes([word] * N)) for word in ("on", "no"))
    assert not any(changed(one, other))  # its letters have no order
    assert all(changed(one, net(*seen)))
