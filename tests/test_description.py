"""A checkpoint names classes by public paths, so that their files can move."""

import importlib
import sys
import types

import pytest
import torch

import lit_diffusion
from lit_diffusion import PREDICTIONS, SAMPLERS, SCHEDULES, WEIGHTINGS
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
