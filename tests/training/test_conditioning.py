"""Conditioning: what a batch says of an example reaches the network, unchanged or dropped."""

import csv
import functools
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from image_files import encode, module, pixels, same, take, write_parquet
from torch import nn

import lit_diffusion as ld
from lit_diffusion.description import build, describe
from lit_diffusion.nn import FourierFeatures, ResidualMLP, UNet
from lit_diffusion.training import DataModule, LitDiffusion, SampleGrid
from lit_diffusion.training.data.batching import memory
from lit_diffusion.training.data.reading.columns import MisfitError, numbers
from lit_diffusion.training.step import randomness
from lit_diffusion.training.step.conditions import RESERVED

pytestmark = pytest.mark.usefixtures("alone")

SHAPE = (3, 5, 7)  # with a batch of 4 no two sizes are alike
N = 26
ANGLE = (np.arange(N * 6).reshape(N, 2, 3) / 7).astype(np.float32)
AGE = np.arange(N) - 5
KEYS = ("angle", "age")


def write(folder, change=lambda i, angle: angle, **columns):
    """26 images with a label, an angle of 2 × 3 floats and an age; ten of them to validate on."""
    images = [encode(image) for image in pixels(N, SHAPE)]
    angle = [change(i, a.tolist()) for i, a in enumerate(ANGLE)]
    columns = {"angle": angle, "age": AGE.tolist()} | columns
    for name, end in (("train-00000-of-00001", N), ("test-00000-of-00001", 10)):
        these = {key: values[:end] for key, values in columns.items()}
        write_parquet(
            folder / f"{name}.parquet", images[:end], [i % 4 for i in range(end)], **these
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("conditions"))


def conditioned(folder, place=(0, 1), stage="fit", **arguments):
    settings = {"shape": SHAPE, "condition_keys": KEYS, "batch_size": 4}
    return module(folder, place, stage, **(settings | arguments))


def assert_true(batches):
    """Every row has the angle and the age of the example whose number it says."""
    for batch in batches:
        assert list(batch)[:5] == ["image", "label", "angle", "age", "index"]
        assert batch["angle"].dtype == torch.float32
        assert batch["age"].dtype == torch.int64
        assert torch.equal(batch["angle"], torch.from_numpy(ANGLE)[batch["index"]])
        assert torch.equal(batch["age"], torch.from_numpy(AGE)[batch["index"]])


# --- the data


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 2)])
def test_conditions_stand_beside_their_example(folder, streaming, world, workers):
    for rank in range(world):
        data = conditioned(folder, (rank, world), streaming=streaming, num_workers=workers)
        batches = take(data.train_dataloader(), 9)
        assert batches[0]["angle"].shape == (4, 2, 3)
        assert batches[0]["age"].shape == (4,)
        assert_true(batches)
        assert_true(data.val_dataloader())
        assert sum(len(batch["index"]) for batch in data.val_dataloader()) == 10 // world
    assert_true(data.examples("test", 3))


@pytest.mark.parametrize("streaming", [True, False])
def test_the_order_is_that_without_conditions(folder, streaming):
    loaders = [
        conditioned(folder, streaming=streaming, condition_keys=keys).train_dataloader()
        for keys in ((), KEYS)
    ]
    plain, told = (take(loader, 15) for loader in loaders)
    assert same(plain, [{key: batch[key] for key in plain[0]} for batch in told])


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_exact(folder, streaming, workers):
    settings = {"streaming": streaming, "num_workers": workers, "shuffle_window": 8}
    loader = conditioned(folder, **settings).train_dataloader()
    take(loader, 5)
    state = loader.state_dict()
    expected = take(loader, 10)
    resumed = conditioned(folder, **settings).train_dataloader()
    resumed.load_state_dict(state)
    assert same(take(resumed, 10), expected)
    other = conditioned(folder, **settings, condition_keys=("age",)).train_dataloader()
    with pytest.raises(ValueError, match=r"data.condition_keys was \['angle', 'age'\]"):
        other.load_state_dict(state)


def test_a_state_from_before_conditions_is_taken(folder):
    loader = conditioned(folder, condition_keys=()).train_dataloader()
    state = loader.state_dict()
    older = {k: v for k, v in state["settings"].items() if k != "data.condition_keys"}
    assert len(older) == len(state["settings"]) - 1
    loader.load_state_dict(state | {"settings": older})


def test_other_formats(tmp_path, folder):
    rows = [
        {"image": image.tolist(), "angle": angle.tolist(), "age": int(age), "label": 0}
        for image, angle, age in zip(pixels(N, SHAPE), ANGLE, AGE, strict=True)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"data_files": {"train": str(tmp_path / "x.jsonl")}, "val_split": None}
    for streaming in (True, False):
        data = conditioned("json", streaming=streaming, **files)
        batches = take(data.train_dataloader(), 7)
        if not streaming:  # a stream of JSON numbers its examples by shards; here there is one
            assert_true(batches)
        found = {row["age"].item(): row for batch in batches for row in rows_of(batch)}
        assert len(found) > N // 2
        for age, row in found.items():
            assert torch.equal(row["angle"], torch.from_numpy(ANGLE[age + 5]))


def rows_of(batch):
    return [{key: batch[key][i] for key in batch} for i in range(len(batch["image"]))]


def test_fixed_shapes_of_the_library_itself(tmp_path):
    """`datasets` has a type of its own for arrays of two axes."""
    import datasets

    rows = {"image": pixels(N, SHAPE).tolist(), "angle": ANGLE.tolist(), "age": AGE.tolist()}
    features = datasets.Features(
        {
            "image": datasets.Array3D(SHAPE, "uint8"),
            "angle": datasets.Array2D((2, 3), "float32"),
            "age": datasets.Value("int8"),
        }
    )
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    for streaming in (True, False):
        data = conditioned(
            tmp_path / "x.parquet", label_key=None, val_split=None, streaming=streaming
        )
        for batch in take(data.train_dataloader(), 7):
            assert torch.equal(batch["angle"], torch.from_numpy(ANGLE)[batch["index"]])
            assert torch.equal(batch["age"], torch.from_numpy(AGE)[batch["index"]])


def test_the_map_holds_them_and_one_without_stays_valid(folder):
    found = conditioned(folder, streaming=False)._memory
    assert np.array_equal(np.load(found.folder / "condition-0.npy"), ANGLE)
    assert np.array_equal(np.load(found.folder / "condition-1.npy"), AGE)
    plain = conditioned(folder, streaming=False, condition_keys=())._memory
    identity = json.loads((plain.folder / "identity.json").read_text())
    assert set(identity) == {"format", "shape", "image_key", "label_key", "fingerprint"}
    assert identity["format"] == memory.FORMAT
    assert not list(plain.folder.glob("condition-*"))
    path = found.folder / "condition-0.npy"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"can be read in .*; remove that"):
        conditioned(folder, streaming=False)


@pytest.mark.parametrize(
    ("stored", "expected", "dtype"),
    [
        (3, 3, np.int64),
        (True, 1, np.int64),
        (0.5, 0.5, np.float32),
        ([1, 2], [1, 2], np.int64),
        ([True, False], [1, 0], np.int64),
        ([[1, 2.5]], [[1, 2.5]], np.float32),
        (np.float16(0.5), 0.5, np.float32),
        (np.arange(3, dtype=np.uint8), [0, 1, 2], np.int64),
    ],
)
def test_numbers(stored, expected, dtype):
    found = numbers(stored, "angle")
    assert found.dtype == dtype
    assert np.array_equal(found, np.asarray(expected, dtype))


FLOATS, INTEGERS = np.zeros(2, np.float32), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("stored", "like", "reason"),
    [
        (None, None, "got none"),
        ("0.5", None, "got str '0.5'"),
        (["a", "b"], None, "got list"),
        ([1.0, None], None, "got list"),
        ({"x": 1}, None, "got dict"),
        (1j, None, "got complex"),
        ([], None, "an empty list"),
        ([[1, 2], [3]], None, "lists of uneven lengths"),
        ([0.1, float("nan")], None, "finite numbers"),
        (float("inf"), None, "finite numbers"),
        (1e300, None, "finite numbers"),  # not in float32
        ([1.0, 2.0, 3.0], FLOATS, "of shape (2,) as in the first example, got shape (3,)"),
        (1.0, FLOATS, "got shape ()"),
        ([[1.0, 2.0]], FLOATS, "got shape (1, 2)"),
        ([1, 0.5], INTEGERS, "integers in column 'angle' as in the first example"),
        ([1, 2**63], INTEGERS, "integers in column 'angle' as in the first example"),
    ],
)
def test_what_is_no_condition(stored, like, reason):
    with pytest.raises(MisfitError, match=r"column 'angle'") as caught:
        numbers(stored, "angle", like)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_integers_among_floats_are_floats():
    assert numbers([1, 2], "angle", FLOATS).dtype == np.float32


def worse(i, angle):
    """Examples 2, 5, 7 and 8 cannot be used."""
    angle = [row[:] for row in angle]
    if i == 2:
        return None
    if i == 5:
        angle[1] = angle[1][:2]
    if i == 7:
        angle[0][1] = float("nan")
    return angle[:1] if i == 8 else angle


@pytest.mark.filterwarnings("ignore:skipped")
@pytest.mark.parametrize("streaming", [True, False])
def test_bad_ones_are_left_out_and_named(tmp_path, streaming):
    data = conditioned(
        write(tmp_path / "x", worse), streaming=streaming, max_bad_share=0.3, batch_size=11
    )
    batches = take(data.train_dataloader(), 6)
    assert_true(batches)
    assert set(torch.cat([batch["index"] for batch in batches]).tolist()) == set(range(N)) - {
        2, 5, 7, 8,
    }  # fmt: skip
    angles = torch.cat([batch["angle"] for batch in data.val_dataloader()])
    assert torch.equal(angles, torch.from_numpy(ANGLE)[[0, 1, 3, 4, 6, 9]])
    with pytest.raises(ValueError, match=r"^\w+ [2578]\b.*'train': expected .*column 'angle'"):
        take(
            conditioned(
                tmp_path / "x", streaming=streaming, on_bad_example="raise"
            ).train_dataloader(),
            9,
        )


def test_they_are_listed_in_the_run_folder(tmp_path):
    folder = write(tmp_path / "x", worse)
    data = DataModule(
        str(folder), shape=SHAPE, condition_keys=KEYS, batch_size=4, max_bad_share=0.3
    )
    with pytest.warns(UserWarning, match="skipped row"):
        run(tmp_path, max_steps=12).fit(spy_model(), data)
    rows = csv.DictReader((tmp_path / "bad_examples.csv").read_text().splitlines())
    reasons = {row["row"]: row["reason"] for row in rows if row["split"] == "train"}
    assert set(reasons) == {"2", "5", "7", "8"}
    for row, reason in {
        "2": "got none",
        "5": "uneven",
        "7": "finite",
        "8": "got shape (1, 3)",
    }.items():
        assert reason in reasons[row]


def test_both_splits_must_look_alike(tmp_path, folder):
    write(tmp_path / "x")
    images = [encode(image) for image in pixels(3, SHAPE)]
    write_parquet(
        tmp_path / "x" / "test-00000-of-00001.parquet", images, angle=[[0.5]] * 3, age=[1] * 3
    )
    with pytest.raises(
        ValueError, match=r"'test': .* \(2, 3\) as in the first .* got shape \(1,\)"
    ):
        conditioned(tmp_path / "x")
    with pytest.raises(ValueError, match="expected a column 'height' in split 'train'"):
        conditioned(folder, condition_keys=("height",))
    for keys in (("label",), ("image",), ("index",), ("total",), ("batch",), ("age", "age")):
        with pytest.raises(ValueError, match="must be different columns, none of them called"):
            DataModule(condition_keys=keys)


# --- hiding


def test_hiding():
    n = 4
    angle, age, label = torch.randn(n, 2, 3), torch.arange(n) + 5, torch.arange(n)
    cond = {"label": label, "angle": angle, "age": age, "mask": torch.ones(n, 5).bool()}
    dropped = torch.tensor([True, False, False, True])
    shown = ld.drop_condition(cond, dropped)
    assert shown["label"].tolist() == [-1, 1, 2, -1]
    assert shown["age"].tolist() == [0, 6, 7, 0]
    assert [shown[k].dtype for k in shown] == [cond.get(k, dropped).dtype for k in shown]
    for name in ("angle", "mask"):
        assert torch.equal(shown[name][1:3], cond[name][1:3])
        assert not shown[name][[0, 3]].any()
    assert torch.equal(shown["dropped"], dropped)
    more = ld.drop_condition(shown, torch.tensor([False, True, False, False]))
    assert more["dropped"].tolist() == [True, True, False, True]
    assert torch.equal(label, torch.arange(n))  # not in place
    assert set(ld.drop_condition({"label": label, "angle": None}, dropped)) == {"label"}
    with pytest.raises(TypeError, match=r"Expected a tensor .* condition 'text'"):
        ld.drop_condition({"text": ["a"] * n}, dropped)


class Spy(nn.Module):
    """Keeps what it is told, and answers with a little of its one weight."""

    num_classes = 4

    def __init__(self, shape=SHAPE):
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.ones(()))
        self.told = []

    def forward(self, z, logsnr, label=None, angle=None, age=None, dropped=None):
        self.told.append({"label": label, "angle": angle, "age": age, "dropped": dropped})
        return 0.1 * self.weight * z


def spy_model(conditions=KEYS, **arguments):
    settings = {"shape": SHAPE, "sampler": ld.DDIMSampler(steps=2)}
    return LitDiffusion(network=Spy(), conditions=conditions, **(settings | arguments))


def run(folder, **arguments):
    settings = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**(settings | arguments))


class Batches(L.Callback):
    """Keeps the batches that the model was given."""

    def __init__(self):
        self.train, self.val = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.train.append(batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.val.append(batch)


def test_what_is_hidden_in_training_and_in_guidance_looks_alike(folder, tmp_path):
    batches, model = Batches(), spy_model(label_dropout=0.5)
    data = conditioned(folder)
    run(tmp_path, max_steps=8, limit_val_batches=0, callbacks=[batches]).fit(model, data)
    assert len(model.denoiser.network.told) == 8
    seen = []
    for step, (batch, told) in enumerate(
        zip(batches.train, model.denoiser.network.told, strict=True)
    ):
        # As ever: the coins are the first numbers of the step's own stream.
        randomness.reseed(torch.device("cpu"), 0, "step", step, 0, 0)
        dropped = torch.rand(4) < 0.5
        seen += dropped.tolist()
        assert torch.equal(told["dropped"], dropped)
        assert torch.equal(told["label"], torch.where(dropped, -1, batch["label"]))
        for name in KEYS:
            assert torch.equal(told[name][~dropped], batch[name][~dropped])
            assert not told[name][dropped].any()
    assert 4 < sum(seen) < 28

    spy = Spy()
    cond = {name: batch[name] for name in ("label", *KEYS)}
    guided = ld.GuidedDenoiser(ld.Denoiser(spy), scale=2.0)
    guided(torch.randn(4, *SHAPE), torch.zeros(4), **cond)
    plain, without = spy.told
    assert all(plain[name] is cond[name] for name in cond)
    assert plain["dropped"] is None
    assert without["dropped"].all()
    assert (without["label"] == -1).all()
    for name in KEYS:  # the same look, in shape, type and value
        assert without[name].shape == told[name].shape
        assert without[name].dtype == told[name].dtype
        assert not without[name].any()


def test_labels_alone_are_hidden_as_ever(folder, tmp_path):
    batches, model = Batches(), spy_model(conditions=(), label_dropout=0.5)
    data = conditioned(folder, condition_keys=())
    run(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[batches]).fit(model, data)
    for step, (batch, told) in enumerate(
        zip(batches.train, model.denoiser.network.told, strict=True)
    ):
        randomness.reseed(torch.device("cpu"), 0, "step", step, 0, 0)
        dropped = torch.rand(4) < 0.5
        assert torch.equal(told["label"], torch.where(dropped, -1, batch["label"]))
        assert told["dropped"] is told["angle"] is told["age"] is None


def test_nothing_is_hidden_where_nothing_is_to_be(folder, tmp_path):
    batches, model = Batches(), spy_model(label_dropout=0.0)
    run(tmp_path, max_steps=2, callbacks=[batches], limit_val_batches=0).fit(
        model, conditioned(folder)
    )
    for batch, told in zip(batches.train, model.denoiser.network.told, strict=True):
        assert all(torch.equal(told[name], batch[name]) for name in ("label", *KEYS))
        assert told["dropped"] is None


@pytest.mark.parametrize("streaming", [True, False])
def test_validation_and_prediction_are_told_the_whole_truth(folder, tmp_path, streaming):
    data = conditioned(folder, streaming=streaming, val_examples=6)
    batches, model = Batches(), spy_model()
    run(tmp_path, callbacks=[batches]).validate(model, data, verbose=False)
    told = model.denoiser.network.told
    assert len(told) == len(batches.val) == 2
    for batch, seen in zip(batches.val, told, strict=True):
        assert all(torch.equal(seen[name], batch[name]) for name in ("label", *KEYS))
        assert seen["dropped"] is None
    told.clear()
    images = run(tmp_path).predict(model, data)
    assert [len(image) for image in images] == [3, 3]
    assert len(told) == 4  # two steps for each batch
    for seen, batch in zip(told[::2], batches.val, strict=True):
        assert all(torch.equal(seen[name], batch[name]) for name in ("label", *KEYS))


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_a_resumed_run_ends_with_the_same_weights(folder, tmp_path, streaming):
    def fit(steps, ckpt_path=None):
        torch.manual_seed(0)
        network = UNet(SHAPE, (8,), attention=(), num_classes=4, conditions={"angle": 6, "age": 1})
        model = LitDiffusion(network=network, shape=SHAPE, label_dropout=0.5)
        data = conditioned(folder, streaming=streaming, num_workers=2, steps_per_epoch=10)
        trainer = run(tmp_path, max_steps=steps, limit_val_batches=0)
        trainer.fit(model, data, ckpt_path=ckpt_path, weights_only=True)
        return trainer, model.state_dict()

    _, whole = fit(8)
    fit(5)[0].save_checkpoint(tmp_path / "x.ckpt")
    _, resumed = fit(8, tmp_path / "x.ckpt")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


# --- drawing


def test_sample_hands_conditions_on():
    model, n = spy_model(), 5
    cond = {"angle": torch.randn(n, 2, 3), "age": torch.arange(n)}
    spy = model.denoiser.network
    model.sample(n, label=3, cond=cond)
    assert all(torch.equal(spy.told[0][name], cond[name]) for name in KEYS)
    assert spy.told[0]["label"].tolist() == [3] * n
    spy.told.clear()
    model.sample(n, cond=ld.drop_condition(cond, torch.ones(n).bool()), label=-1, guidance=2.0)
    assert all(told["dropped"].all() and not told["angle"].any() for told in spy.told)
    for wrong, reason in [
        (None, "takes angle, age, got none"),
        ({"angle": cond["angle"]}, "takes angle, age, got angle"),
        (cond | {"height": cond["age"]}, "takes angle, age, got angle, age, height"),
        (cond | {"age": torch.arange(n + 1)}, "Expected 5 rows of 'age'"),
        (cond | {"age": torch.tensor(3)}, "Expected 5 rows of 'age'"),
    ]:
        with pytest.raises(ValueError, match=reason):
            model.sample(n, cond=wrong)
    with pytest.raises(ValueError, match="takes no further conditions, got age"):
        spy_model(conditions=()).sample(n, cond={"age": torch.arange(n)})


def test_a_grid_has_the_conditions_of_the_first_validation_examples(folder, tmp_path):
    grid, model = (
        SampleGrid(rows=2, columns=3, guidance=3.0, guidance_interval=(-1.0, 9.0)),
        spy_model(),
    )
    drawn = []
    plain = model.sample

    def sample(n, generator, label, **arguments):
        drawn.append((n, label, arguments))
        return plain(n, generator, label, **arguments)

    model.sample = sample
    run(tmp_path, max_steps=2, val_check_interval=1, callbacks=[grid]).fit(
        model, conditioned(folder, steps_per_epoch=2)
    )
    assert len(drawn) == 2
    for n, label, arguments in drawn:
        assert n == 6
        assert label.tolist() == [0, 1, 2, 3, 0, 1]
        assert torch.equal(arguments["cond"]["angle"], torch.from_numpy(ANGLE[:6]))
        assert torch.equal(arguments["cond"]["age"], torch.from_numpy(AGE[:6]))
        assert arguments["guidance"] == 3.0
        assert arguments["guidance_interval"] == (-1.0, 9.0)
    drawn.clear()  # fewer examples, fewer images
    run(tmp_path, max_steps=1, callbacks=[grid]).fit(
        model, conditioned(folder, val_examples=5, steps_per_epoch=1)
    )
    assert [n for n, *_ in drawn] == [5]
    with pytest.raises(ValueError, match="low < high"):
        SampleGrid(guidance_interval=(1.0, 1.0))


def test_the_interval_of_a_grid_without_conditions_counts():
    model = LitDiffusion(
        network=UNet(channels=(8,), attention=(), num_classes=3), sampler=ld.DDIMSampler(steps=3)
    )
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)

    def draw(**arguments):
        return SampleGrid(rows=1, columns=3, **arguments).sample(model)

    plain, guided = draw(), draw(guidance=5.0)
    assert not torch.allclose(plain, guided)
    assert torch.allclose(plain, draw(guidance=5.0, guidance_interval=(30.0, 40.0)), atol=1e-5)
    assert torch.equal(guided, draw(guidance=5.0, guidance_interval=(-30.0, 40.0)))


# --- networks


def test_a_network_must_take_what_it_is_told():
    for name in (
        "z",
        "x",
        "label",
        "image",
        "index",
        "dropped",
        "generator",
        "num_timesteps",
        "steps",
        "logsnr",
    ):
        assert name in RESERVED
        with pytest.raises(ValueError, match=f"cannot be called '{name}'"):
            spy_model(conditions=(name,))
    with pytest.raises(ValueError, match="Spy takes no argument 'height'"):
        spy_model(conditions=("age", "height"))
    with pytest.raises(ValueError, match="ResidualMLP takes no argument 'age'"):
        LitDiffusion(network=ResidualMLP(), conditions=("age",))
    wrapped = FourierFeatures(ResidualMLP((5, 8, 8)), (6, 7))
    with pytest.raises(ValueError, match="ResidualMLP takes no argument 'age'"):
        LitDiffusion(network=wrapped, conditions=("age",))

    class Deaf(Spy):
        def forward(self, z, logsnr, label=None, age=None):
            return z

    with pytest.raises(ValueError, match="Deaf takes no argument 'dropped'"):
        LitDiffusion(network=Deaf(), conditions=("age",))
    model = spy_model()
    with pytest.raises(ValueError, match=r"Expected 'angle' in the batch.*got image, label, age"):
        model.condition({"image": None, "label": None, "age": None})


def unet(**arguments):
    torch.manual_seed(0)
    settings = {"channels": (8,), "attention": (), "conditions": {"angle": 6, "age": 1}}
    net = UNet(SHAPE, **(settings | arguments))
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return net.eval()


@pytest.mark.parametrize("num_classes", [None, 4])
def test_the_unet_looks_at_its_conditions(num_classes):
    n = 4
    net = unet(num_classes=num_classes)
    z, logsnr = torch.randn(n, *SHAPE), torch.randn(n)
    cond = {"angle": torch.randn(n, 2, 3), "age": torch.arange(n)}
    out = net(z, logsnr, **cond)
    assert out.shape == z.shape
    for name in cond:  # each row steers its own image, and every number counts
        for i in range(cond[name][0].numel()):
            other = {key: value.clone() for key, value in cond.items()}
            other[name][2].view(-1)[i] += 1
            changed = (net(z, logsnr, **other) != out).flatten(1).any(1)
            assert changed.tolist() == [False, False, True, False]
    zeros = {name: torch.zeros_like(value) for name, value in cond.items()}
    dropped = ld.drop_condition(cond, torch.ones(n).bool())
    assert torch.equal(net(z, logsnr, **dropped), net(z, logsnr))
    assert not torch.allclose(net(z, logsnr, **zeros), net(z, logsnr))  # zero is a value, too
    rows = torch.tensor([True, False, False, True])
    mixed = net(z, logsnr, **ld.drop_condition(cond, rows))
    assert torch.allclose(mixed[~rows], out[~rows], atol=1e-5)
    assert torch.allclose(mixed[rows], net(z, logsnr)[rows], atol=1e-5)


def test_the_unet_says_what_does_not_fit():
    z, logsnr = torch.randn(4, *SHAPE), torch.zeros(4)
    angle, age = torch.randn(4, 2, 3), torch.arange(4)
    for cond in ({"angle": angle}, {"angle": angle[:, :1], "age": age}, {"height": age}):
        with pytest.raises(ValueError, match=r"built for conditions of {'angle': 6, 'age': 1}"):
            unet()(z, logsnr, **cond)
    with pytest.raises(ValueError, match="built without conditions but got age"):
        unet(conditions=None)(z, logsnr, age=age)
    with pytest.raises(ValueError, match="at least one number"):
        unet(conditions={"age": 0})


def test_a_unet_says_by_itself_what_it_is_told(tmp_path):
    net = unet()
    assert repr(build(describe(net))) == repr(net)
    assert LitDiffusion(network=net).conditions == KEYS
    assert LitDiffusion(network=net, conditions=["age"]).conditions == ("age",)
    assert LitDiffusion(network=unet(conditions=None)).conditions == ()
    inner = UNet((9, 5, 7), channels=(8,), attention=(), conditions={"age": 1})
    wrapped = FourierFeatures(inner, (3,), SHAPE)
    assert LitDiffusion(network=wrapped, shape=SHAPE).conditions == ("age",)
    for p in inner.parameters():
        p.data += 0.1
    z, logsnr = torch.randn(4, *SHAPE), torch.zeros(4)
    outs = [wrapped(z, logsnr, age=torch.full((4,), age)) for age in (0, 1)]
    assert not torch.allclose(*outs)


# --- learning


class Brightness(nn.Module):
    """A perceptron that is told how bright the image is to be."""

    def __init__(self, shape=(1, 4, 4)):
        super().__init__()
        self.shape = shape
        self.first = nn.Linear(16 + 3, 64)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 16))

    def forward(self, z, logsnr, brightness, dropped=None):
        dropped = torch.zeros(len(z)) if dropped is None else dropped.float()
        told = torch.stack([logsnr / 5, brightness, dropped], dim=1)
        return self.rest(self.first(torch.cat([z.flatten(1), told], dim=1))).view_as(z)


def test_a_model_obeys_and_guidance_makes_it_obey_more(tmp_path):
    """Images of one grey each; the condition is that grey, but for an error of 0.2."""
    generator = torch.Generator().manual_seed(0)

    def batch():
        brightness = 0.3 * torch.randn(256, generator=generator)
        grey = brightness + 0.2 * torch.randn(256, generator=generator)
        return {"image": grey[:, None, None, None].expand(-1, 1, 4, 4), "brightness": brightness}

    torch.manual_seed(0)
    model = LitDiffusion(
        network=Brightness(),
        conditions=["brightness"],
        shape=(1, 4, 4),
        schedule=ld.CosineSchedule(-8.0, 8.0),
        weighting=ld.SigmoidWeighting(),
        sampler=ld.DDIMSampler(steps=40),
        optimizer=functools.partial(torch.optim.AdamW, lr=5e-3),
        label_dropout=0.2,
        clip_denoised=False,
    )
    batches = [batch() for _ in range(500)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    model.validation_step = None  # there is nothing to validate on
    run(tmp_path, max_steps=500, max_epochs=1).fit(model, loader)

    asked = torch.tensor([-0.4, 0.0, 0.4])

    def drawn(guidance=1.0, cond=None):
        cond = {"brightness": asked.repeat_interleave(200)} if cond is None else cond
        noise = torch.Generator().manual_seed(1)
        return model.sample(600, noise, guidance=guidance, cond=cond).mean((1, 2, 3)).view(3, 200)

    plain = drawn()
    assert torch.allclose(plain.mean(1), asked, atol=0.1)
    assert torch.allclose(plain.std(1), torch.full((3,), 0.2), atol=0.08)
    guided = drawn(guidance=3.0)
    assert guided[0].mean() < plain[0].mean() - 0.1
    assert guided[2].mean() > plain[2].mean() + 0.1
    cond = {"brightness": torch.full((600,), 0.4)}
    without = drawn(cond=ld.drop_condition(cond, torch.ones(600).bool()))
    assert abs(float(without.mean())) < 0.1  # the mean of all there is


# --- the command line


CONFIG = """
seed_everything: 0
data:
  shape: [3, 5, 7]
  batch_size: 4
  steps_per_epoch: 2
  val_examples: 6
  condition_keys: [angle, age]
model:
  network:
    class_path: UNet
    init_args: {channels: [8], attention: [], num_classes: 4, conditions: {angle: 6, age: 1}}
  sampler: {class_path: DDIMSampler, init_args: {steps: 2}}
trainer:
  accelerator: cpu
  max_steps: 2
  enable_progress_bar: false
  enable_model_summary: false
  log_every_n_steps: 1
  callbacks: [{class_path: SampleGrid, init_args: {rows: 2, columns: 2, guidance: 2.0}}]
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_from_the_command_line(cli, config, folder, streaming):
    words = ["--config", config, "--data.path", folder, f"--data.streaming={streaming}"]
    code, _, err = cli("fit", *words)
    assert code == 0, err
    assert len(list(Path("runs").glob("run/*/samples/step-*.png"))) == 1
    code, _, err = cli("fit", *words, "--trainer.max_steps=4", "--ckpt_path=last")
    assert code == 0, err
    code, _, err = cli("validate", *words, "--ckpt_path=last")
    assert code == 0, err
    code, _, err = cli("predict", *words, "--ckpt_path=last")
    assert code == 0, err
    assert list(Path("runs").glob("run/*/samples/predict-*.png"))
    code, _, err = cli("sample", "--ckpt_path=last", "--num_samples=4", "--out=folder")
    assert code == 0, err
    assert len(list(Path("folder").glob("*.png"))) == 4


MISTAKES = {
    "no such column": (["--data.condition_keys=[height]"], "expected a column 'height'"),
    "a column twice": (["--data.condition_keys=[age,age]"], "must be different columns"),
    "the label": (["--data.condition_keys=[label]"], "none of them called image, label"),
    "the image": (["--data.condition_keys=[image]"], "none of them called image, label"),
    "the index": (["--model.conditions=[index]"], "cannot be called 'index'"),
    "words": (["--data.condition_keys=[angle,age,word]"], "numbers in column 'word', got str"),
    "a network that is not told": (
        ["--model.network.conditions=null", "--model.conditions=[age]"],
        "built without conditions but got age",
    ),
    "a network that cannot be told": (
        ["--model.network=ResidualMLP", "--model.conditions=[age]"],
        "ResidualMLP takes no argument 'age'",
    ),
    "not in the data": (["--data.condition_keys=[age]"], "Expected 'angle' in the batch"),
    "of another size": (
        ["--model.network.conditions={angle: 5, age: 1}"],
        "{'angle': 5, 'age': 1}",
    ),
    "every example bad": (["--data.condition_keys=[angle,age,gap]"], "column 'gap', got none"),
    "interval": (["--trainer.callbacks.guidance_interval=[2,1]"], "low < high"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(cli, config, tmp_path, mistake):
    path = write(tmp_path / "x", word=["a"] * N, gap=[None] * N)
    words, telling = MISTAKES[mistake]
    code, _, err = cli("fit", "--config", config, "--data.path", path, *words)
    assert code == 2
    errors = [line for line in err.splitlines() if "error:" in line]
    assert len(errors) == 1
    assert telling in errors[0], errors[0]
    assert "Traceback" not in err
    assert not Path("runs").exists()


@pytest.fixture
def labelled(tmp_path):
    """A checkpoint of a model with twelve classes, which answers differently to each."""
    model = LitDiffusion(
        network=UNet(channels=(8,), attention=(), num_classes=12), sampler=ld.DDIMSampler(steps=2)
    )
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    trainer = run(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    return model.eval()


def bytes_of(image):
    return ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def files(out):
    """The images in a folder and below, by their paths."""
    from PIL import Image

    found = sorted(out.rglob("*.png"))
    return {str(p.relative_to(out)): torch.from_numpy(np.array(Image.open(p))) for p in found}


def test_sample_labels(cli, labelled):
    def drawn(*words):
        out = Path(f"out{len(list(Path().glob('out*')))}")
        code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--out", out, "--batch_size=5", *words)
        assert code == 0, err
        return files(out)

    def expected(n, **arguments):
        noise = randomness.generators(0, "sample", list(range(n)))
        return bytes_of(labelled.sample(n, noise, **arguments))[:, 0]

    found = drawn("--num_samples=7", "--label=[3,-1,11]")
    assert list(found) == [f"{i:06d}.png" for i in range(7)]
    truth = expected(7, label=[3, -1, 11, 3, -1, 11, 3])
    assert close(list(found.values()), truth)
    for word in ("none", "-1"):
        assert close(drawn("--num_samples=3", "--label", word).values(), expected(3, label=-1))
    found = drawn("--num_samples=3", "--label=4", "--guidance=3", "--guidance_interval=[-2,1]")
    truth = expected(3, label=4, guidance=3.0, guidance_interval=(-2.0, 1.0))
    assert close(found.values(), truth)
    assert not close(drawn("--num_samples=3", "--label=4", "--guidance=3").values(), truth)

    found = drawn("--per_class=2")
    assert len(found) == 24
    truth = expected(24, label=[*range(12)] * 2)
    for i, image in enumerate(truth):
        assert close([found[f"{i % 12:02d}/{i:06d}.png"]], [image])
    assert list(drawn("--per_class=1", "--label=[7,-1]")) == ["07/000000.png", "none/000001.png"]


def close(images, others):
    images, others = list(images), list(others)
    assert len(images) == len(others)
    return all((a.int() - b.int()).abs().max() <= 1 for a, b in zip(images, others, strict=True))


@pytest.mark.parametrize(
    ("words", "columns", "rows"),
    [
        (["--per_class=2"], 12, 2),
        (["--per_class=3", "--label=[1,2]"], 2, 3),
        (["--num_samples=7", "--label=[0,1,2]"], 3, 3),
        (["--num_samples=9", "--label=3"], 3, 3),
        (["--num_samples=4"], 2, 2),
    ],
)
def test_a_grid_has_a_column_for_each_class(cli, labelled, words, columns, rows):
    from PIL import Image

    code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--out=x.png", *words)
    assert code == 0, err
    with Image.open("x.png") as picture:
        assert picture.size == (68 * columns + 4, 68 * rows + 4)  # 64 pixels and a margin of 4


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--label=12"], "classes from 0 to 11, or none, got 12"),
        (["--label=[1,2,3,4,5,6,12]"], "classes from 0 to 11, or none"),
        (["--label=[0,-2]"], "classes from 0 to 11, or none"),
        (["--label=[]"], "classes from 0 to 11, or none, got []"),
        (["--label=seven"], "--label must be a number: the data name no classes"),
        (["--per_class=0"], "--per_class must be at least 1"),
        (["--num_samples=0"], "--num_samples must be at least 1"),
        (["--per_class=2", "--num_samples=4"], "omit --num_samples"),
        (["--guidance_interval=[0,1]"], "give --guidance"),
        (["--guidance=2", "--guidance_interval=[1,0]"], "low < high"),
        (["--guidance=2", "--guidance_interval=1"], "guidance_interval: expected"),
    ],
)
def test_a_mistake_in_sample_is_one_line_before_anything_is_drawn(cli, labelled, words, telling):
    code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--out=folder", "--batch_size=2", *words)
    assert code == 2
    lines = [line for line in err.splitlines() if not line.startswith("Using ")]
    assert len(lines) == 1  # no progress bar has begun
    assert telling in err
    assert not Path("folder").exists()


def test_a_model_without_classes_takes_no_label(cli, tmp_path):
    model = LitDiffusion(network=UNet(channels=(8,), attention=()))
    trainer = run(tmp_path)
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    for words in (["--label=0"], ["--per_class=2"], ["--label=none"]):
        code, _, err = cli("sample", "--ckpt_path=x.ckpt", *words)
        assert code == 2
        assert "trained without classes" in err
