"""A checkpoint names classes by public paths, so that their files can move."""

import importlib
import inspect
import sys
import types
from collections.abc import Callable

import pytest
import torch

import lit_diffusion
import lit_diffusion.nn
from lit_diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS, description
from lit_diffusion.decoders import Decoder
from lit_diffusion.description import build, describe, public_path
from lit_diffusion.nn import DiT, FourierFeatures, ResidualMLP, UNet
from lit_diffusion.registry import Registry

FAMILIES = (SCHEDULES, WEIGHTINGS, PREDICTIONS, SAMPLERS, Registry(Decoder))
OURS = [cls for family in FAMILIES for cls in family.classes()]
OURS = [cls for cls in OURS if cls.__module__.startswith("lit_diffusion.")]
OURS += [DiT, FourierFeatures, ResidualMLP, UNet]


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_what_is_ours_is_described_by_its_public_name_and_built_again(cls):
    found = describe(cls())
    assert found["class_path"] == f"lit_diffusion.{cls.__name__}"
    assert getattr(lit_diffusion, cls.__name__) is cls
    again = build(found)
    assert type(again) is cls
    assert describe(again) == found
    # The path of the file, as in older checkpoints, is accepted as well.
    assert type(build({**found, "class_path": f"{cls.__module__}.{cls.__name__}"})) is cls


@pytest.mark.parametrize(
    ("cls", "path"),
    [
        (torch.optim.AdamW, "torch.optim.AdamW"),
        (torch.optim.lr_scheduler.LambdaLR, "torch.optim.lr_scheduler.LambdaLR"),
        (torch.nn.Linear, "torch.nn.Linear"),
    ],
)
def test_classes_of_torch_have_their_public_path(cls, path):
    assert public_path(cls) == path


def test_callbacks_have_their_public_path():
    training = importlib.import_module("lit_diffusion.training")
    assert public_path(training.EMA) == "lit_diffusion.training.EMA"


def test_a_file_can_move(monkeypatch):
    before = describe(UNet())
    moved = types.ModuleType("lit_diffusion.nn.elsewhere")
    moved.UNet = UNet
    monkeypatch.setitem(sys.modules, moved.__name__, moved)
    monkeypatch.delitem(sys.modules, "lit_diffusion.nn.unet")
    monkeypatch.setattr(UNet, "__module__", moved.__name__)
    assert describe(UNet()) == before
    assert isinstance(build(before), UNet)


# A file may name what is allowed, and nothing else ----------------------------------------------


class Opened(torch.nn.Module):
    """What a stranger's file would like to be constructed, as its constructor opens a file."""

    opened: list[str] = []  # noqa: RUF012

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path
        self.opened.append(path)


@pytest.fixture
def opened(monkeypatch):
    monkeypatch.setattr(Opened, "opened", [])
    monkeypatch.setattr(lit_diffusion.nn, "Opened", Opened, raising=False)
    return Opened.opened


@pytest.mark.parametrize("path", [f"{Opened.__module__}.Opened", "lit_diffusion.nn.Opened"])
def test_a_class_of_another_module_is_refused_wherever_it_is_imported(opened, path):
    one = {"class_path": path, "init_args": {"path": "secret"}}
    for described in (
        one,
        [one],
        {"class_path": "lit_diffusion.Pretrained", "init_args": {"network": one}},
    ):
        with pytest.raises(
            ValueError, match=rf"may not name .*Opened.*allow\('{Opened.__module__}'\)"
        ):
            build(described)
    assert opened == []


def test_what_is_allowed_is_built(opened, monkeypatch):
    monkeypatch.setattr(description, "_ALLOWED", list(description._ALLOWED))
    description.allow(Opened.__module__)
    assert isinstance(build(describe(Opened("a"))), Opened)
    assert opened == ["a", "a"]


@pytest.mark.parametrize("name", ["schedule", "weighting", "prediction", "sampler", "decoder"])
def test_an_object_of_another_kind_is_refused_before_anything_is_constructed(
    opened, monkeypatch, name
):
    monkeypatch.setattr(description, "_ALLOWED", [*description._ALLOWED, Opened.__module__])
    wrong = {"class_path": f"{Opened.__module__}.Opened", "init_args": {"path": "wrong"}}
    right = {"class_path": f"{Opened.__module__}.Opened", "init_args": {"path": "first"}}
    described = {"network": right, name: wrong}
    with pytest.raises(ValueError, match=f"^{name} of Pretrained must be .*, got the class"):
        build({"class_path": "lit_diffusion.Pretrained", "init_args": described})
    assert opened == []


def test_a_number_is_no_object(opened):
    nested = {"class_path": "lit_diffusion.UNet", "init_args": {}}
    for value in (nested, [nested]):
        one = {"class_path": "lit_diffusion.CosineSchedule", "init_args": {"logsnr_min": value}}
        with pytest.raises(ValueError, match=r"logsnr_min of CosineSchedule.* must be plain data"):
            build(one)


class Wraps(torch.nn.Module):
    """A plug-in whose argument is annotated by what it can do."""

    def __init__(self, inner: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner = inner


def test_an_argument_annotated_by_what_it_can_do_takes_any_allowed_class(monkeypatch):
    monkeypatch.setattr(description, "_ALLOWED", [*description._ALLOWED, Wraps.__module__])
    found = build(describe(Wraps(torch.nn.ReLU())))
    assert isinstance(found.inner, torch.nn.ReLU)


@pytest.mark.parametrize("cls", [*OURS, lit_diffusion.Pretrained], ids=lambda cls: cls.__name__)
def test_every_argument_of_ours_says_what_it_takes(cls):
    assert set(inspect.signature(cls).parameters) <= set(description._hints(cls))
