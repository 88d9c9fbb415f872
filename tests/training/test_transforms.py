"""Transforms: pictures of any size and mode become images of one shape, exactly as stated."""

import io
import pickle
import random
import sys

import datasets
import numpy as np
import pytest
import torch
from image_files import (
    PARDONS,
    encode,
    module,
    pixels,
    same,
    saved,
    stop_workers,
    stored,
    take,
    write_parquet,
)
from PIL import Image
from torchvision.transforms import v2

from lit_diffusion.training.callbacks import Likelihood
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data import DataModule
from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.decoding.transform_classes import FIXED, REFUSED
from lit_diffusion.training.data.decoding.transforms import Fit, Transforms, protocol_of
from lit_diffusion.training.data.decoding.transforms import restored_generators as restored
from lit_diffusion.training.data.reading.bad_examples import BadExample
from lit_diffusion.training.data.reading.source import Example
from lit_diffusion.training.module import LitDiffusion

pytestmark = [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]

RESIZE = {"class_path": "torchvision.transforms.v2.Resize", "init_args": {"size": [12, 12]}}
RANDOM = [RESIZE, {"class_path": "RandomCrop", "init_args": {"size": 8}}]
RANDOM += ["RandomInvert", "Fit"]  # without random ones: resized twice
RANDOM_FIT = {"class_path": "Fit", "init_args": {"mode": "random_crop"}}
LISTS = [["Fit"], [RANDOM_FIT], RANDOM]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    stop_workers()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Sixty colour pictures, no two neighbours of one size, in row groups of seven."""
    folder = tmp_path_factory.mktemp("mixed")
    images = [encode(pixels(1, (3, 9 + k % 5, 10 + k % 7), seed=k)[0]) for k in range(60)]
    write_parquet(folder / "train-00000-of-00001.parquet", images)
    write_parquet(folder / "test-00000-of-00001.parquet", images[:10])
    return folder


def opened(path, transform, **arguments):
    shape = arguments.pop("shape", (3, 8, 8))
    return module(path, shape=shape, transform=transform, **arguments)


def by_label(batches):
    return {
        int(label): image
        for batch in batches
        for image, label in zip(batch["image"], batch["label"], strict=True)
    }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# What comes out -------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(31, 20), (16, 40), (9, 9), (128, 97)])
def test_fit_resizes_as_pil_does(size, interpolation):
    picture = pixels(1, (3, *size), seed=1)[0]
    kind = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}[interpolation]
    pil = Image.fromarray(picture.transpose(1, 2, 0))

    def resized(height, width):
        return np.asarray(pil.resize((width, height), kind)).transpose(2, 0, 1).astype(int)

    def fit(mode):
        made = Fit(mode, interpolation, fill=7, size=(16, 12))(torch.from_numpy(picture))
        assert made.shape == (3, 16, 12)
        assert made.dtype == torch.uint8
        return made.numpy().astype(int)

    assert abs(fit("squash") - resized(16, 12)).max() <= 1
    h, w = size
    scale = max(16 / h, 12 / w)
    whole = resized(max(16, round(scale * h)), max(12, round(scale * w)))
    top, left = (whole.shape[1] - 16) // 2, (whole.shape[2] - 12) // 2
    assert abs(fit("center_crop") - whole[:, top : top + 16, left : left + 12]).max() <= 1
    scale = min(16 / h, 12 / w)
    part = resized(min(16, round(scale * h)), min(12, round(scale * w)))
    padded = fit("pad")
    top, left = (16 - part.shape[1]) // 2, (12 - part.shape[2]) // 2
    inside = padded[:, top : top + part.shape[1], left : left + part.shape[2]]
    assert abs(inside - part).max() <= 1
    assert (padded == 7).sum() >= padded.size - inside.size


@pytest.mark.parametrize("mode", ["center_crop", "pad", "squash", "random_crop"])
def test_a_picture_of_the_right_size_is_not_touched(mode):
    picture = torch.from_numpy(pixels(1, (3, 8, 8))[0])
    assert torch.equal(Fit(mode, size=(8, 8))(picture), picture)


def test_a_folder_of_mixed_sizes_trains_with_fit_and_fails_without(mixed):
    with pytest.raises(BadExample, match=r"--data\.transform\+=Fit"):
        opened(mixed, None)
    data = opened(mixed, ["Fit"], batch_size=10)
    batches = take(data.train_dataloader(), 6)
    assert sorted(by_label(batches)) == list(range(60))
    assert all(batch["image"].shape == (10, 3, 8, 8) for batch in data.val_dataloader())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
@pytest.mark.parametrize("kind", ["L", "RGB", "RGBA", "LA", "P", "1", "CMYK"])
def test_a_colour_mode_is_converted_as_pil_does(kind, mode):
    image = Image.fromarray(pixels(1, (8, 8, 3))[0])
    image = image.quantize(16) if kind == "P" else image.convert(kind)
    data = stored(image, "TIFF" if kind == "CMYK" else "PNG")
    decoder = ImageDecoder((len(mode), 8, 8), labels=False, mode=mode)
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert(mode)).reshape(8, 8, -1)
    assert np.array_equal(decoder(Example(0, data, None)).image.numpy(), wanted.transpose(2, 0, 1))


def test_grey_pictures_among_coloured_ones_are_used_with_a_mode(tmp_path):
    grey = [stored(Image.fromarray(pixels(1, (8, 8), k)[0]), "JPEG") for k in range(12)]
    colour = [stored(Image.fromarray(pixels(1, (8, 8, 3), k)[0]), "JPEG") for k in range(48)]
    write_parquet(tmp_path / "d" / "train.parquet", colour + grey)
    quiet = {"shape": (3, 8, 8), "val_split": None, "batch_size": 60, "max_bad_share": 1}
    with pytest.warns(UserWarning, match=r"--data\.mode=RGB"):
        few = by_label(take(module(tmp_path / "d", **quiet).train_dataloader(), 1))
    assert max(few) < 48
    found = by_label(take(module(tmp_path / "d", mode="RGB", **quiet).train_dataloader(), 1))
    assert sorted(found) == list(range(60))
    assert torch.equal(found[50][0], found[50][2])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_deep_pictures_are_not_clipped_to_a_mode(mode):
    kind = "PNG" if mode == "I;16" else "TIFF"
    array = np.full((8, 8), 70, {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]) * 300
    data = stored(Image.fromarray(array), kind)
    with pytest.raises(ValueError, match="bytes"):
        ImageDecoder((1, 8, 8), labels=False, mode="L")(Example(0, data, None))


# Random ones ----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", LISTS, ids=["fit", "random fit", "crop and invert"])
def test_images_are_a_function_of_seed_epoch_and_example(mixed, transform):
    """Streamed by any number of workers and ranks, and in memory where the prefix fits."""
    whole = {"val_split": None, "seed": 3, "steps_per_epoch": 100}
    reference = take(opened(mixed, transform, batch_size=60, **whole).train_dataloader(), 2)
    first, second = by_label(reference[:1]), by_label(reference[1:])
    assert len(first) == len(second) == 60
    several = {}
    for place in ((0, 2), (1, 2)):
        many = opened(mixed, transform, place=place, batch_size=5, num_workers=2, **whole)
        several |= by_label(take(many.train_dataloader(), 6))
    assert equal(several, first)
    if transform != LISTS[1]:
        memory = opened(mixed, transform, batch_size=60, streaming=False, **whole)
        batches = take(memory.train_dataloader(), 2)
        assert equal(by_label(batches[:1]), first)
        assert equal(by_label(batches[1:]), second)
    changes = transform != LISTS[0]
    assert equal(first, second) != changes
    other = opened(mixed, transform, batch_size=60, **whole | {"seed": 4}).train_dataloader()
    assert equal(by_label(take(other, 1)), first) != changes


@pytest.mark.parametrize("streaming", [True, False])
def test_a_run_with_random_transforms_resumes_exactly(mixed, streaming):
    def loader():
        return opened(mixed, RANDOM, streaming=streaming, batch_size=7).train_dataloader()

    straight = loader()
    expected = take(straight, 25)
    broken = loader()
    take(broken, 11)
    resumed = loader()
    resumed.load_state_dict(torch.load(saved(broken.state_dict()), weights_only=True))
    assert same(take(resumed, 14), expected[11:])


@pytest.mark.parametrize("streaming", [True, False])
def test_random_transforms_leave_the_global_generators_alone(mixed, streaming):
    data = opened(mixed, RANDOM, streaming=streaming)
    states = [torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()]
    take(data.train_dataloader(), 3)
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == [random.getstate(), np.random.get_state()[1].tolist()]


def test_validation_and_statistics_see_fixed_transforms_only(mixed):
    crop = {"class_path": "Fit", "init_args": {"mode": "random_crop"}}
    data = opened(mixed, ["RandomInvert", crop, "RandomVerticalFlip"], batch_size=10)
    wanted = opened(mixed, ["Fit"], batch_size=10)
    assert equal(by_label(data.val_dataloader()), by_label(wanted.val_dataloader()))
    assert equal(by_label(data.examples("train", 20)), by_label(wanted.examples("train", 20)))
    with pytest.raises(BadExample, match=r"split 'test'.*--data\.transform\+=Fit"):
        opened(mixed, [{"class_path": "RandomCrop", "init_args": {"size": 8}}])


@pytest.mark.filterwarnings("ignore:The transform `ToTensor:UserWarning")
def test_every_class_of_torchvision_is_known_as_fixed_random_or_refused():
    picture = torch.from_numpy(pixels(1, (3, 64, 64))[0])
    arguments = {
        **{"CenterCrop": [8], "RandomCrop": [8], "RandomResizedCrop": [8], "Resize": [8]},
        **{"Pad": [1], "RandomAffine": [9], "RandomRotation": [9], "GaussianBlur": [3]},
        **{"RandomShortestSize": [8], "RandomResize": [8, 12], "ScaleJitter": [(64, 64)]},
        **{"RandomPosterize": [4], "RandomSolarize": [100], "RandomAdjustSharpness": [2]},
        **{"JPEG": [(5, 50)], "ColorJitter": [0.5], "Compose": [[v2.Identity()]]},
        **{"RandomApply": [[v2.Identity()]], "RandomChoice": [[v2.Identity()]]},
        "RandomOrder": [[v2.Identity(), v2.Identity()]],
    }
    missing = []
    for name in dir(v2):
        cls = getattr(v2, name)
        if not isinstance(cls, type) or not issubclass(cls, v2.Transform) or name in REFUSED:
            continue
        with restored():
            before = torch.get_rng_state()
            try:
                cls(*arguments.get(name, []))(picture)
            except (TypeError, ValueError):  # needs boxes, matrices or floats
                missing.append(name)
                continue
            used = not torch.equal(before, torch.get_rng_state())
        assert used == (name not in FIXED | {"Compose"}), name
    assert len(missing) < 16, missing


def test_fit_to_one_pixel_is_the_mean_of_each_channel():
    picture = torch.from_numpy(pixels(1, (3, 9, 9))[0])
    one = Fit("squash", size=(1, 1))(picture)
    assert one.shape == (3, 1, 1)
    assert abs(one.flatten().float() - picture.float().mean((1, 2))).max() < 30


# What may be listed ---------------------------------------------------------------------------


class Brighter(v2.Transform):
    random = False

    def transform(self, inpt, params):
        return inpt // 2 + 100


class Undeclared(v2.Transform):
    pass


def made(*given):
    return Transforms.of(list(given), (3, 8, 8), seed=0)


def test_a_transform_of_ones_own_needs_permission_and_says_whether_it_is_random(monkeypatch):
    path = f"{__name__}.Brighter"
    with pytest.raises(ValueError, match=r"named by --plugins, got .*Brighter"):
        made(path)
    monkeypatch.setattr(
        "lit_diffusion.training.data.decoding.transform_classes.allowed_modules",
        lambda: [__name__],
    )
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    picture = torch.from_numpy(pixels(1, (3, 8, 8))[0])
    for name in (path, "Brighter"):
        assert torch.equal(made(name)(picture), picture // 2 + 100)
    with pytest.raises(ValueError, match="`random`, True or False"):
        made(f"{__name__}.Undeclared")


class Noisy(v2.Transform):
    """Random by all three global generators, each of which is seeded for an example."""

    random = True

    def transform(self, inpt, params):
        noise = torch.randint(40, inpt.shape) + random.randrange(40) + np.random.randint(40)
        return inpt // 2 + noise.byte()


@pytest.fixture
def allowed(monkeypatch):
    name = "lit_diffusion.training.data.decoding.transform_classes.allowed_modules"
    monkeypatch.setattr(name, lambda: [__name__])


@pytest.mark.parametrize(("streaming", "workers"), [(True, 0), (True, 2), (False, 0), (False, 2)])
def test_random_transforms_of_ones_own_resume_exactly(mixed, allowed, streaming, workers):
    def loader():
        given = ["Fit", f"{__name__}.Noisy"]
        arguments = {"streaming": streaming, "num_workers": workers, "batch_size": 7}
        return opened(mixed, given, **arguments).train_dataloader()

    expected = take(loader(), 12)
    assert not same(expected[:1], take(opened(mixed, ["Fit"], batch_size=7).train_dataloader(), 1))
    broken = loader()
    take(broken, 5)
    resumed = loader()
    resumed.load_state_dict(torch.load(saved(broken.state_dict()), weights_only=True))
    assert same(take(resumed, 7), expected[5:])


class Counts(v2.Transform):
    """Differs from call to call, by a state that no checkpoint has."""

    random, calls = True, 0

    def transform(self, inpt, params):
        self.calls += 1
        return inpt.add_(self.calls)  # in place, which must not matter


HIDDEN = np.random.default_rng(0)


class Hides(v2.Transform):
    """Takes its random numbers from where nobody looks."""

    random = True

    def transform(self, inpt, params):
        return inpt // 2 + int(HIDDEN.integers(100))


class SaysFixed(v2.Transform):
    random = False

    def transform(self, inpt, params):
        return inpt // 2 + random.randrange(100)


class Keeps(v2.Transform):
    random = True

    def __init__(self):
        super().__init__()
        self.own = np.random.default_rng(0)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("place", ["alone", "inside"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("Counts", "same state of the generators of torch, random and NumPy, got different"),
        ("Hides", "same state of the generators of torch, random and NumPy, got different"),
        ("SaysFixed", "set random = True"),
        ("Keeps", "Keeps.own is a generator of random numbers"),
    ],
)
def test_what_a_resumed_run_would_not_repeat_is_refused(
    mixed, allowed, name, sentence, place, streaming
):
    given = f"{__name__}.{name}"
    if place == "inside":
        given = {"class_path": "Compose", "init_args": {"transforms": [given]}}
    before = random.getstate()
    with pytest.raises(ValueError, match=sentence) as caught:
        opened(mixed, ["Fit", given], streaming=streaming).train_dataloader()
    assert "\n" not in str(caught.value)
    assert random.getstate() == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("os.system", "must be Fit, a class of torchvision"),
        ("torch.nn.Linear", "must be Fit, a class of torchvision"),
        ("torchvision.transforms.v2.functional.resize", "must be Fit, a class of torchvision"),
        ("InterpolationMode", "must be Fit, a class of torchvision"),
        ("Lambda", "takes a function, which cannot be recorded"),
        ("Resise", "must be Fit, a class of torchvision"),
        ("Resize", "Resize cannot be made so: missing a required argument: 'size'"),
        (lambda x: x, "must be the name of a class"),
        (v2.Resize(8), "must be the name of a class"),
        ({"class_path": "Resize", "init_args": {"size": len}}, "plain data"),
        ({"class_path": "Fit", "init_args": {"mode": "crop"}}, "one of center_crop"),
        ({"class_path": "Fit", "init_args": {"fill": 300}}, "fill must be a byte"),
        ({"class_path": "Fit", "size": 3}, "class_path and init_args"),
        ({"class_path": "RandomApply", "init_args": {"transforms": ["os.x"]}}, "must be Fit"),
        (3, "must be the name of a class"),
    ],
)
def test_what_is_no_recordable_transform_is_refused_in_one_line(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        made(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        ([{"class_path": "Resize", "init_args": {"size": 7}}], "after Resize; put Fit last"),
        (
            ["ConvertImageDtype"],
            "ConvertImageDtype of data.transform to return .* got torch.float32",
        ),
        (["Fit", "Grayscale"], "after Grayscale; set data.mode"),
        ([{"class_path": "Normalize", "init_args": {"mean": [0], "std": [1]}}], "Normalize .*"),
        ([{"class_path": "Pad", "init_args": {"padding": [1, 2, 3]}}], "Pad"),
    ],
)
def test_a_wrong_result_is_one_sentence_with_the_name_of_the_transform(mixed, transform, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened(mixed, transform)
    assert "\n" not in str(caught.value)


def test_a_list_is_the_same_data_however_it_is_written():
    long = {"class_path": "lit_diffusion.training.data.decoding.transforms.Fit"}
    long["init_args"] = {"mode": "center_crop"}
    assert made("Fit").description == made(long).description
    resize = {"class_path": "Resize", "init_args": {"size": [12, 12]}}
    assert made(RESIZE).description == made(resize).description == [RESIZE]
    nested = made({"class_path": "RandomApply", "init_args": {"transforms": ["RandomInvert"]}})
    (inner,) = nested.description[0]["init_args"]["transforms"]
    assert inner["class_path"] == "torchvision.transforms.v2.RandomInvert"
    pickle.loads(pickle.dumps(nested))


# What is recorded -----------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"transform": ["Fit"]}, {"mode": "RGB"}])
def test_resuming_with_other_transforms_is_refused(mixed, change):
    begin = opened(mixed, RANDOM).train_dataloader()
    take(begin, 2)
    with pytest.raises(ValueError, match=f"data.{next(iter(change))} was"):
        opened(mixed, **{"transform": RANDOM} | change).train_dataloader().load_state_dict(
            begin.state_dict()
        )


def test_in_memory_each_list_has_a_map_of_its_own(mixed, tmp_path):
    maps = set()
    for transform in (["Fit"], [RESIZE, *RANDOM[1:]], ["Fit", "RandomInvert"]):
        data = opened(mixed, transform, streaming=False, val_split=None)
        maps.add(data._memory.folder.name)
    assert len(maps) == 2  # the first and the last have the same before what is random
    with pytest.raises(ValueError, match=r"set data\.streaming to true, or put Fit first"):
        opened(mixed, [{"class_path": "RandomResizedCrop", "init_args": {"size": 8}}, "Fit"],
               streaming=False)  # fmt: skip


def test_the_line_that_an_error_names_works(cli, mixed):
    words = ["fit", "--data.path", mixed, "--data.shape=[3,8,8]"]
    words += ["--trainer.max_steps=1", "--trainer.log_every_n_steps=1", "--data.val_split=null"]
    code, _, err = cli(*words)
    assert code == 2
    (line,) = [word.rstrip(".,") for word in err.split() if word.startswith("--data.transform")]
    code, _, err = cli(*words, line)
    assert code == 0, err


def test_a_number_says_how_its_images_were_made(mixed):
    data = opened(mixed, ["RandomInvert", RANDOM_FIT], mode="RGB", val_share=0.5)
    model = LitDiffusion(shape=(3, 8, 8))
    sums = torch.tensor([1.0, 1, 1, 9, 3], dtype=torch.float64)
    (bits, *_) = Likelihood().measurements(model, sums, 0, "val", "raw", data)
    assert bits.protocol["mode"] == "RGB"
    assert bits.protocol["val_share"] == 0.5
    (fit,) = bits.protocol["transform"]  # in validation, without what is random
    assert fit["class_path"] == "Fit"
    assert fit["init_args"]["mode"] == "center_crop"
    assert protocol_of(opened(mixed, ["Fit"], mode=None))["transform"]
    assert protocol_of(module("digits8x8")) == {}


def test_nothing_is_made_of_a_nested_description_while_a_config_is_parsed():
    inner = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}
    given = {"class_path": "RandomApply", "init_args": {"transforms": [inner]}}
    with pytest.raises(ValueError, match=r"transforms\[0\] must be Fit, .* got 'torch.nn.Linear'"):
        instantiate(DataModule, {"path": "digits8x8", "transform": [given]})
