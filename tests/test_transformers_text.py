"""Frozen text encoders of transformers: tiny ones, loaded as real ones are."""

import copy
import json
import shutil

import pytest
import torch
from tiny_text import save_tiny

import lit_diffusion as ld
from lit_diffusion import TransformersText, drop_condition
from lit_diffusion.description import build, describe
from lit_diffusion.models import frozen_encoder
from lit_diffusion.nn import DiT, UNet, text_bytes
from lit_diffusion.testing import check_network

WORDS = ["a three", "the digit seven", "eight"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: save_tiny(root / kind, kind) for kind in ("bert", "clip", "whole clip", "t5")}


@pytest.fixture
def encoder(folders):
    return TransformersText(str(folders["bert"]))


@pytest.mark.parametrize("kind", ["bert", "clip", "whole clip", "t5"])
def test_tokens_are_those_of_the_model(folders, kind):
    from transformers import AutoTokenizer, BertModel, CLIPTextModel, T5EncoderModel

    tokens, mask = TransformersText(str(folders[kind]))(text_bytes(WORDS))
    cls = {"bert": BertModel, "t5": T5EncoderModel}.get(kind, CLIPTextModel)
    tokenizer, model = (one.from_pretrained(folders[kind]) for one in (AutoTokenizer, cls))
    for text, row, used in zip(WORDS, tokens, mask, strict=True):
        with torch.no_grad():
            alone = model.eval()(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        assert used.sum() == len(alone)
        torch.testing.assert_close(row[used], alone, rtol=1e-5, atol=1e-5)


def test_it_is_frozen_and_no_part_of_the_network(encoder):
    net = UNet(channels=(8,), attention=(8,), text=encoder).train()
    assert not [
        name for name in net.state_dict() if name.startswith("text.") and "identity" not in name
    ]
    assert not list(encoder.parameters())
    text = text_bytes(WORDS)
    first, again = encoder(text), encoder(text)
    assert torch.equal(first[0], again[0])  # dropout is off
    assert not first[0].requires_grad
    assert not any(p.requires_grad for p in encoder.frozen._model.parameters())
    net(torch.randn(3, 1, 8, 8), torch.zeros(3), text=text).square().mean().backward()
    net.half()
    assert encoder(text)[0].dtype == torch.float32
    assert copy.deepcopy(net).text.frozen is encoder.frozen


@pytest.mark.parametrize("cls", [UNet, DiT])
def test_networks_with_it_keep_the_laws(encoder, cls):
    size = {"channels": (8,), "attention": (8,)} if cls is UNet else {"patch": 2, "width": 16}
    size |= {} if cls is UNet else {"depth": 1, "heads": 2}
    net = cls(shape=(1, 8, 8), text=encoder, **size)
    check_network(net)
    for p in net.parameters():
        p.data += 0.1 * torch.randn_like(p)
    z, logsnr, text = torch.randn(3, 1, 8, 8), torch.zeros(3), text_bytes(WORDS)
    given, other = net(z, logsnr, text=text), net(z, logsnr, text=text.flip(0))
    assert not torch.allclose(given, other, atol=1e-4)
    dropped = drop_condition({"text": text}, torch.tensor([False, True, False]))
    mixed = net(z, logsnr, **dropped)
    torch.testing.assert_close(mixed[[0, 2]], given[[0, 2]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[1], net(z, logsnr)[1], rtol=1e-4, atol=1e-5)


def test_after_sampling_it_can_be_trained_with(encoder):
    """Sampling is in inference mode, whose tensors cannot be trained with."""
    net = UNet(channels=(8,), attention=(8,), text=encoder)
    model = ld.Pretrained(net, sampler=ld.DDIMSampler(steps=2))
    stored = encoder.stored(*encoder(text_bytes(WORDS)))
    encoder.frozen._model = encoder.frozen._none = None
    for text in (WORDS, stored):
        assert model.sample(3, cond={"text": text}).shape == (3, 1, 8, 8)
    z = torch.randn(3, 1, 8, 8)
    for text in (
        text_bytes(WORDS),
        drop_condition({"text": stored}, torch.ones(3).bool())["text"],
    ):
        net(z, torch.zeros(3), text=text).mean().backward()


def test_stored_tokens_are_the_same(encoder):
    tokens, mask = encoder(text_bytes(WORDS))
    stored = encoder.stored(tokens, mask)
    again, used = encoder(stored)
    assert torch.equal(again, tokens)
    assert torch.equal(used, mask)
    dropped = drop_condition({"text": stored}, torch.tensor([True, False, False]))["text"]
    again, used = encoder(dropped)
    none, where = encoder(encoder.no_text(1))
    torch.testing.assert_close(again[0, : none.shape[1]], none[0])
    assert used.sum(1).tolist() == [int(where.sum()), *mask.sum(1)[1:].tolist()]


def test_stored_tokens_of_another_encoder_are_refused(encoder, tmp_path):
    other = TransformersText(str(save_tiny(tmp_path / "other", seed=1)))
    stored = other.stored(*other(text_bytes(WORDS)))
    with pytest.raises(ValueError, match="got those of another encoder"):
        encoder(stored)


def test_weights_name_their_encoder(encoder, folders, tmp_path):
    net = UNet(channels=(8,), attention=(8,), text=encoder)
    described = describe(net)["init_args"]["text"]
    assert described["init_args"] == {
        "path": str(folders["bert"]),
        "revision": None,
        "truncate": False,
    }
    again = build(describe(net))
    again.load_state_dict(net.state_dict())
    other = TransformersText(str(save_tiny(tmp_path / "other", seed=1)))
    with pytest.raises(ValueError, match=r"these weights were trained with, of SHA-256 .* got"):
        UNet(channels=(8,), attention=(8,), text=other).load_state_dict(net.state_dict())


def test_a_folder_is_read_as_data(folders, tmp_path, monkeypatch):
    def changed(name, do):
        copied = shutil.copytree(folders["bert"], tmp_path / name)
        do(copied)
        return str(copied)

    with pytest.raises(ValueError, match="revision is that of a name on the hub"):
        TransformersText(str(folders["bert"]), revision="main")

    def pickled(folder):
        torch.save({}, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()

    with pytest.raises(ValueError, match="can execute code and are not read"):
        TransformersText(changed("pickled", pickled))

    def damaged(folder):
        from safetensors.torch import load_file, save_file

        weights = load_file(folder / "model.safetensors")
        weights.pop("bert.encoder.layer.0.attention.self.query.weight")
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="lack 1 of a BertModel, such as"):
        TransformersText(changed("damaged", damaged))(text_bytes(["a"]))

    def own_code(folder):
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "code.py").write_text("raise SystemExit('executed')")

    with pytest.raises(ValueError, match="cannot be loaded as AutoConfig of transformers"):
        TransformersText(changed("own_code", own_code))

    def no_tokenizer(folder):
        for path in folder.glob("tokenizer*"):
            path.unlink()

    with pytest.raises(ValueError, match="no_tokenizer a tokenizer, got"):
        TransformersText(changed("no_tokenizer", no_tokenizer))(text_bytes(["a"]))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no folder here and cannot be downloaded"):
        TransformersText("not/there/at all")


def test_a_missing_package_is_one_sentence(folders, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(frozen_encoder.importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-diffusion\[text\]'"):
        TransformersText(str(folders["bert"]))


def test_long_texts_are_refused_or_cut_off(encoder, folders):
    long = "a " * 11
    with pytest.raises(ValueError, match="at most 12 tokens of bert, got 13: 'a a"):
        encoder(text_bytes(["a", long]))
    cut = TransformersText(str(folders["bert"]), truncate=True)
    assert cut(text_bytes(["a", long]))[1].sum(1).tolist() == [3, 12]


def test_a_tokenizer_without_an_end(tmp_path):
    """Then no text has no token at all, and is given one of zeros."""
    encoder = TransformersText(str(save_tiny(tmp_path / "x", end=False)))
    tokens, mask = encoder(encoder.no_text(2))
    assert mask.tolist() == [[True], [True]]
    assert tokens.abs().sum() == 0
    tokens, mask = encoder(
        drop_condition({"text": text_bytes(WORDS)}, torch.arange(3) == 0)["text"]
    )
    assert mask.sum(1).tolist() == [1, 3, 1]
    assert tokens[0].abs().sum() == 0


class Counting(ld.nn.ByteTransformer):
    """Counts how often it is called."""

    calls = 0

    def forward(self, text):
        type(self).calls += 1
        return super().forward(text)


@pytest.mark.parametrize(("guidance", "expected"), [(1.0, 1), (2.0, 2)])
def test_sampling_encodes_a_text_once(guidance, expected, monkeypatch):
    torch.manual_seed(0)
    net = UNet(channels=(8,), attention=(8,), text=Counting(16, width=8, depth=1, heads=1))
    for p in net.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model = ld.Pretrained(net, sampler=ld.DDIMSampler(steps=5))

    def images():
        return model.sample(
            3, torch.Generator().manual_seed(0), cond={"text": WORDS}, guidance=guidance
        )

    Counting.calls = 0
    once = images()
    assert Counting.calls == expected
    assert net.text._seen is None
    net(torch.randn(3, 1, 8, 8), torch.zeros(3), text=text_bytes(WORDS))
    assert Counting.calls == expected + 1
    monkeypatch.setattr(ld.nn.TextEncoder, "read", lambda self, text: self(text))
    assert torch.equal(images(), once)
    assert Counting.calls > 2 * expected + 1


def test_guidance_follows_a_condition_that_changes():
    """What is kept of the dropped condition does not depend on its values."""

    class Age(torch.nn.Module):
        def forward(self, z, logsnr, age=None, dropped=None):
            return z * (1 + age) + 5 * dropped[:, None] if dropped is not None else z * (1 + age)

    inner = ld.Denoiser(Age())
    guided = ld.GuidedDenoiser(inner, 3.0)
    z, logsnr, age = torch.ones(2, 1), torch.zeros(2), torch.ones(2, 1)
    for n in (2, 2, 1):
        age += 1
        given = {"age": age[:n]}
        found = guided(z[:n], logsnr[:n], **given).eps
        kept = inner(z[:n], logsnr[:n], **given).eps
        none = inner(z[:n], logsnr[:n], **drop_condition(given, torch.ones(n).bool())).eps
        torch.testing.assert_close(found, none + 3 * (kept - none))
