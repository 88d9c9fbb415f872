"""Numbers one can cite: the same from torch-fidelity, any number of ranks, any precision."""

import csv
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import warm
from torch import nn

from lit_diffusion import SAMPLERS, AncestralSampler, DDIMSampler, HeunSampler
from lit_diffusion.nn import UNet
from lit_diffusion.training import EMA, FID, DataModule, LitDiffusion
from lit_diffusion.training.evaluation import reference, scores
from lit_diffusion.training.evaluation.features import (
    ClassifierFeatures,
    Features,
    InceptionFeatures,
    extract,
    fingerprint,
)
from lit_diffusion.training.evaluation.generation import (
    Generation,
    SampleBatch,
    labels,
    to_bytes,
)
from lit_diffusion.training.evaluation.reference import CHUNK, Reference, open_reference
from lit_diffusion.training.evaluation.scores import Scores
from lit_diffusion.training.run.measurements import read_measurements

pytestmark = [
    pytest.mark.usefixtures("alone"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*is deprecated"),
]
SHAPE = (3, 9, 13)  # channels ≠ height ≠ width


def network(shape=(1, 8, 8), num_classes=10):
    torch.manual_seed(0)
    return UNet(shape=shape, channels=[8, 8], blocks=1, attention=[], num_classes=num_classes)


def model(shape=(1, 8, 8), num_classes=10, steps=3):
    return LitDiffusion(
        network(shape, num_classes), shape=shape, sampler=AncestralSampler(steps=steps)
    )


class Flat(nn.Module):
    """Any module will do: a fixed linear map of the bytes, without logits."""

    num_features = 5

    def __init__(self, pixels=64):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("map", torch.randn(pixels, 5, generator=generator) / pixels)
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return images.float().flatten(1) @ self.map


def whole(data, split):
    return torch.cat([batch["image"] for batch in data.examples(split, 64)])


def open_digits(net, split="test", rows=False, **arguments):
    return open_reference(DataModule(), split, net, torch.device("cpu"), rows, **arguments)


# Samples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 10])
@pytest.mark.parametrize("world", [2, 3, 5])
def test_any_number_of_ranks_draws_the_same_images(num_classes, world):
    generation = Generation(11, batch_size=4, seed=7)
    one = list(generation.sample(model(num_classes=num_classes)))
    dealt = [
        [*generation.sample(model(num_classes=num_classes), None, rank, world)]
        for rank in range(world)
    ]
    several = {int(d.index[0]): d for part in dealt for d in part}
    assert sorted(several) == [0, 4, 8]
    for drawn in one:
        assert torch.equal(several[int(drawn.index[0])].images, drawn.images)
        assert drawn.images.dtype == torch.uint8


def test_more_samples_begin_with_the_fewer():
    few = torch.cat([d.images for d in Generation(6, batch_size=3).sample(model())])
    more = torch.cat([d.images for d in Generation(9, batch_size=3).sample(model())])
    other = torch.cat([d.images for d in Generation(6, batch_size=3, seed=1).sample(model())])
    assert torch.equal(more[:6], few)
    assert not torch.equal(other, few)


def test_bytes_are_the_nearest():
    k = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(k.float() / 127.5 - 1), k)
    assert torch.equal(to_bytes((k.float() + 0.49) / 127.5 - 1)[:-1], k[:-1])  # not truncated
    assert torch.equal(to_bytes((k.float() - 0.49) / 127.5 - 1)[1:], k[1:])
    assert to_bytes(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("seed", [0, 3])
def test_labels_come_in_the_given_shares_for_any_number(seed):
    shares = torch.tensor([5.0, 0.0, 1.0, 2.0])
    for n in (8, 100, 1000):
        counts = labels(torch.arange(n), 6, shares, seed).bincount(minlength=6)
        assert (counts / n - torch.cat([shares, torch.zeros(2)]) / 8).abs().max() < 4 / n
    alone = labels(torch.tensor([57]), 6, shares, seed)
    assert alone == labels(torch.arange(100), 6, shares, seed)[57]


CHURNED = HeunSampler(steps=4, s_churn=10.0)


@pytest.mark.parametrize("guidance", [(1.0, None), (3.0, None), (3.0, (-1.0, 1.0))])
@pytest.mark.parametrize("sampler", [*(SAMPLERS[name](steps=4) for name in SAMPLERS), CHURNED])
def test_network_calls_are_those_that_are_made(sampler, guidance):
    """The number in the protocol is computed; here the calls are counted."""
    subject = model()
    generation = Generation(3, sampler, *guidance)
    calls = []
    subject.denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    list(generation.sample(subject))
    assert len(calls) == generation.protocol(subject)["network calls"]


def test_network_calls_are_doubled_by_guidance_only():
    for guidance, calls in ((1.0, 4), (3.0, 8)):
        protocol = Generation(3, DDIMSampler(steps=4), guidance).protocol(model())
        assert protocol["network calls"] == calls


def test_guidance_that_the_model_cannot_have_is_refused():
    for arguments, reason in (({"num_classes": None}, "classes"), ({}, "label_dropout=0")):
        subject = model(**arguments)
        subject.label_dropout = 0.0
        with pytest.raises(ValueError, match=reason):
            next(Generation(3, DDIMSampler(steps=2), 3.0).sample(subject))


# Scores -----------------------------------------------------------------------------------------


def judge(images, net, others=(), batch=7):
    found = Scores(net, open_digits(net, rows=bool(others)), others)
    for index in torch.arange(len(images)).split(batch):
        found.add(SampleBatch(index, images[index]))
    return found.compute()


OTHERS = (
    scores.kernel_distance,
    scores.inception_score,
    scores.precision_recall,
    scores.density_coverage,
)


def test_the_data_themselves_are_no_distance_away():
    images = whole(DataModule(), "test")
    found = judge(images, ClassifierFeatures(), OTHERS)
    assert abs(found["fid"].value) < 1e-6
    assert found["precision"].value == found["recall"].value == found["coverage"].value == 1
    assert found["density"].value == pytest.approx(1, abs=0.35)  # each lies in its own ball, too
    assert found["inception_score"].value > 5


def test_a_shift_of_the_mean_is_its_square():
    net = Flat()
    real = open_digits(net, "train")
    n, mean = real.count, torch.tensor([3.0, 0.0, 0.0, 4.0, 0.0], dtype=torch.float64)
    total = real.total + n * mean
    cross = torch.outer(mean, real.total)
    outer = real.outer + cross + cross.T + n * torch.outer(mean, mean)
    moved = Reference(n, total, outer, None, None, {})
    assert scores.frechet_distance(moved, real) == pytest.approx(25, rel=1e-9)


def test_density_and_coverage_are_their_definitions():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator)
    fake = 1.3 * torch.randn(31, 3, generator=generator) + 0.2
    known = Reference(40, real.sum(0), real.T @ real, None, real, {})
    found = scores.density_coverage(Features(fake), known)
    inside = 0
    covered = 0
    for i, centre in enumerate(real):
        others = torch.cat([real[:i], real[i + 1 :]])
        radius = (others - centre).norm(dim=1).sort().values[4]
        hits = ((fake - centre).norm(dim=1) <= radius).sum()
        inside += int(hits)
        covered += int(hits > 0)
    assert found["density"].value == pytest.approx(inside / (5 * 31))
    assert found["coverage"].value == pytest.approx(covered / 40)


def test_the_kernel_distance_of_a_handful_of_images_is_left_out():
    real = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    known = Reference(40, real.sum(0), real.T @ real, None, real, {})
    with pytest.warns(UserWarning, match="at least 10 images on either side, got 9"):
        assert scores.kernel_distance(Features(real[:9]), known) == {}
    assert set(scores.kernel_distance(Features(real[:10]), known)) == {"kid"}


def test_features_are_looked_at_in_float32_under_any_autocast():
    images = whole(DataModule(), "test")[:33]
    net = ClassifierFeatures()
    plain = extract(net, images)
    with torch.autocast("cpu", torch.bfloat16):
        cast = extract(net, images)
        assert not torch.equal(net(images).features.double(), plain.features)  # it would matter
    assert torch.equal(plain.features, cast.features)
    assert torch.equal(plain.logits, cast.logits)
    assert plain.features.dtype == torch.float64


def test_any_module_will_do_without_logits_too():
    images = whole(DataModule(), "train")[:100]
    found = judge(images, Flat(), (scores.kernel_distance,))
    assert found["fid"].value > 0
    with pytest.raises(ValueError, match="expected logits for the Inception Score, got none"):
        judge(images, Flat(), (scores.inception_score,))


@pytest.mark.parametrize("wrong", [lambda x: x.float(), lambda x: x.float().mean(), lambda x: 3])
def test_a_module_that_returns_no_features_is_refused(wrong):
    class Wrong(nn.Module):
        def forward(self, images):
            return wrong(images)

    with pytest.raises(TypeError, match="expected 4 rows of features from Wrong, got"):
        extract(Wrong(), torch.zeros(4, 1, 8, 8, dtype=torch.uint8))


def test_one_sample_is_too_few():
    with pytest.raises(ValueError, match="two images on either side of a Fréchet distance, got 1"):
        judge(whole(DataModule(), "test")[:1], Flat())


# The reference ----------------------------------------------------------------------------------


def test_the_reference_is_measured_once_and_is_that_of_the_data():
    net = Flat()
    first = open_digits(net, rows=True)
    assert net.seen == 297
    again = open_digits(net, rows=True)
    assert net.seen == 297  # from the cache
    images = whole(DataModule(), "test")
    features = extract(net, images).features
    for one in (first, again):
        assert one.count == 297
        assert torch.allclose(one.total, features.sum(0))
        assert torch.allclose(one.outer, features.T @ features)
        assert torch.equal(one.features, features.float())
        assert one.shares.sum() == 297
    content = hashlib.sha256(str([1, 8, 8]).encode())
    for part in images.split(CHUNK):
        content.update(hashlib.sha256(part.numpy().tobytes()).hexdigest().encode())
    assert first.protocol["hash"] == again.protocol["hash"] == content.hexdigest()[:16]
    assert first.protocol == again.protocol


def test_another_network_split_or_data_is_another_reference(tmp_path):
    from image_files import encode, pixels, write_parquet

    net = Flat()
    hashes = [open_digits(net, split).protocol["hash"] for split in ("train", "test")]
    assert len(set(hashes)) == 2
    other = Flat()
    other.map.mul_(2)
    assert fingerprint(other) != fingerprint(net)
    assert not torch.allclose(open_digits(other).total, open_digits(net).total)
    images = [encode(image) for image in pixels(20)]
    shape = tuple(pixels(1)[0].shape)
    folder = tmp_path / "data"
    folder.mkdir()
    found = []
    for changed in (False, True):  # one pixel of one file, under the same name
        last = 255 - pixels(20)[-1] if changed else pixels(20)[-1]
        stored = [*images[:-1], encode(last)]
        write_parquet(folder / "test.parquet", stored)
        data = DataModule(str(folder), shape=shape)
        wide = Flat(shape[0] * shape[1] * shape[2])
        found.append(open_reference(data, "test", wide, torch.device("cpu")))
        assert wide.seen == 20  # not what was kept of the other
    assert found[0].protocol["hash"] != found[1].protocol["hash"]
    assert not torch.equal(found[0].total, found[1].total)


def test_a_wrong_hash_is_refused():
    known = open_digits(Flat()).protocol["hash"]
    assert open_digits(Flat(), expected=known[:6].upper()).count == 297
    with pytest.raises(ValueError, match=rf"begins with 0123, got {known} for split 'test'"):
        open_digits(Flat(), expected="0123")


def test_a_kept_file_that_is_another_is_refused(tmp_path):
    import datasets

    open_digits(Flat())
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lit_diffusion" / "references"
    (kept,) = folder.iterdir()
    other = Flat()
    other.map.mul_(2)
    open_digits(other)
    (theirs,) = set(folder.iterdir()) - {kept}
    kept.write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match=r"is the reference of something else \(features\)"):
        open_digits(Flat())
    kept.write_bytes(b"nothing of the kind")
    with pytest.raises(
        ValueError, match=r"is damaged, or another kind of file: .* to compute the reference again"
    ):
        open_digits(Flat())


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path):
    data = DataModule(cache_dir=str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="the reference could not be cached in"):
        found = open_reference(data, "test", Flat(), torch.device("cpu"))
    assert found.count == 297


# Weights of feature networks --------------------------------------------------------------------


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """A file of Inception's weights, made up, but read by the real code."""
    from torch_fidelity import feature_extractor_inceptionv3 as room

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    load = room.FeatureExtractorInceptionV3.load_state_dict
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(room.FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        made = room.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    assert load is room.FeatureExtractorInceptionV3.load_state_dict
    torch.save(made.state_dict(), path)
    return str(path), hashlib.sha256(path.read_bytes()).hexdigest()


def test_inceptions_file_is_checked_before_it_is_read(inception, tmp_path):
    path, digest = inception
    with pytest.raises(ValueError, match=f"begins with 6726825d in .*, got {digest}"):
        InceptionFeatures(path)
    with pytest.raises(FileNotFoundError, match=r"at .*nowhere"):
        InceptionFeatures(str(tmp_path / "nowhere.pth"))

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    evil = tmp_path / "evil.pth"
    torch.save({"fc.weight": Evil()}, evil)
    with pytest.raises(ValueError, match="expected Inception's weights"):
        InceptionFeatures(str(evil), hashlib.sha256(evil.read_bytes()).hexdigest())
    assert not (tmp_path / "executed").exists()


def test_to_make_one_draws_no_random_numbers(inception):
    """Networks are made before the model: else a run with FID would begin with other weights."""
    for make in (ClassifierFeatures, lambda: InceptionFeatures(*inception)):
        torch.manual_seed(0)
        make()
        found = torch.rand(3)
        torch.manual_seed(0)
        assert torch.equal(found, torch.rand(3))


def test_inception_sees_grey_as_colour_without_colour(inception):
    net = InceptionFeatures(*inception)
    grey = torch.randint(0, 256, (2, 1, 8, 9), dtype=torch.uint8)
    assert torch.equal(net(grey).features, net(grey.repeat(1, 3, 1, 1)).features)
    assert net(grey).logits.shape == (2, 1008)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        net(grey.repeat(1, 2, 1, 1))


def test_without_a_network_the_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(FileNotFoundError, match=r"cannot be downloaded .* features\.weights"):
        InceptionFeatures()


def test_the_shipped_classifier_is_small_and_right():
    net = ClassifierFeatures()
    path = Path(reference.__file__).parents[2] / "data" / "digits8x8" / "features.safetensors"
    assert path.stat().st_size <= 300 * 1024
    data = DataModule()
    batches = list(data.examples("test", 512))
    right = net(batches[0]["image"]).logits.argmax(1) == batches[0]["label"]
    assert right.float().mean() > 0.98
    with pytest.raises(ValueError, match=r"expects images \(1, 8, 8\), got \(3, 8, 8\)"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="SHA-256 begins with 0000"):
        ClassifierFeatures(sha256="0000")


def test_a_classifier_of_something_else_is_refused(tmp_path):
    from safetensors.torch import save_file

    for number, about in enumerate([None, {"made": "{}"}, {"made": "no json"}]):
        path = tmp_path / f"{number}.safetensors"
        save_file({"a": torch.zeros(1)}, path, metadata=about)
        with pytest.raises(ValueError, match=r"expected a classifier that .*train_features\.py"):
            ClassifierFeatures(str(path))


# As torch-fidelity says -------------------------------------------------------------------------


class Stored(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


N = 20


@pytest.mark.slow
def test_callback_evaluate_and_torch_fidelity_agree(inception, cli, tmp_path):
    """The whole path: a run with the callback, the command on its checkpoint, the library."""
    import torch_fidelity

    path, digest = inception
    given = {"class_path": "InceptionFeatures", "init_args": {"weights": path, "sha256": digest}}
    callback = {
        "class_path": "FID",
        "init_args": {
            "num_samples": N, "features": given, "split": "test", "kid": True, "batch_size": 16,
            "inception_score": True, "precision_recall": True, "seed": 5,
        },
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    from image_files import encode, write_parquet

    folder = tmp_path / "data"
    folder.mkdir()
    data = DataModule()
    for split, n in (("train", 16), ("test", 24)):
        stored = [encode(image.numpy()) for image in whole(data, split)[:n]]
        write_parquet(folder / f"{split}.parquet", stored, labels=[i % 10 for i in range(n)])
    code, out, err = cli(
        "fit", "--config", config, f"--data.path={folder}", "--trainer.max_steps=1",
        "--data.batch_size=4", "--data.steps_per_epoch=1", "--trainer.accelerator=cpu",
        "--trainer.log_every_n_steps=1",
        "--trainer.enable_progress_bar=false", "--model.network=UNet",
        "--model.network.channels=[8,8]", "--model.network.attention=[]",
        "--model.network.num_classes=10", "--model.sampler=DDIMSampler",
        "--model.sampler.steps=2", "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    assert code == 0, err
    run = next(Path("runs/run").iterdir())
    ours = {one.name: one for one in read_measurements(run)}
    assert "val/fid at step " in out
    code, out, err = cli("evaluate", "--ckpt_path", "last", "--bound=false", "--device=cpu")
    assert code == 0, err
    told = json.loads((run / "evaluation" / "evaluation.json").read_text())
    (row,) = told["scores"]

    assert row["seeds"] == [5]
    assert "seed" not in row["protocol"]

    subject = LitDiffusion.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    data = DataModule(str(folder))
    shares = torch.ones(10) + (torch.arange(10) < 6)  # 16 training images, labels i % 10
    drawn = Generation(N, seed=5, batch_size=16).sample(subject, shares)
    theirs = torch_fidelity.calculate_metrics(
        input1=Stored(torch.cat([d.images for d in drawn])),
        input2=Stored(whole(data, "test")),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=path,
        feature_layer_prc="2048",
        cuda=False, isc=True, fid=True, kid=True, prc=True, kid_subset_size=N // 2, cache=False,
        verbose=False, save_cpu_ram=True,
    )  # fmt: skip
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "inception_score": "inception_score_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, their_name in names.items():
        expected = pytest.approx(theirs[their_name], rel=1e-4)
        assert ours[name].value == expected, name
        assert row["scores"][name]["mean"] == expected, name
    assert row["scores"]["density"]["mean"] == pytest.approx(ours["density"].value, rel=1e-6)
    # What makes a number a citation.
    protocol = ours["fid"].protocol
    assert protocol["reference"]["hash"] == told["reference"]["hash"]
    assert protocol["reference"]["examples"] == 24
    assert protocol["reference"]["resize"].startswith("299 × 299")
    assert protocol["samples"] == N
    assert protocol["network calls"] == protocol["steps"] == 2
    assert protocol["seed"] == 5
    assert "DDIMSampler(steps=2" in protocol["sampler"]
    assert protocol["weights"] == "raw"
    assert set(protocol["versions"]) >= {"torch", "torchmetrics", "torch-fidelity"}
    with (run / "metrics.csv").open() as file:
        logged = [row["val/fid"] for row in csv.DictReader(file) if row.get("val/fid")]
    assert float(logged[-1]) == pytest.approx(ours["fid"].value, rel=1e-6)


# Ranks and precision ----------------------------------------------------------------------------

JOB = """
import sys
import lightning as L
from test_fid import model
from lit_diffusion.training import EMA, FID, DataModule
from lit_diffusion.training.evaluation.features import ClassifierFeatures

if __name__ == "__main__":
    folder, devices, precision, samples, batch_size = sys.argv[1:]
    fid = FID(
        int(samples), ClassifierFeatures(), "test", True, True, True, batch_size=int(batch_size)
    )
    trainer = L.Trainer(
        default_root_dir=folder, devices=int(devices), precision=precision, accelerator="cpu",
        strategy="ddp" if devices != "1" else "auto", callbacks=[fid], barebones=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        logger=L.pytorch.loggers.CSVLogger(folder, name="", version=""),
    )
    subject = model()
    trainer.test(subject, DataModule(val_examples=8, cache_dir=folder + "/cache"))
"""


def measured(folder, devices=1, precision="32-true", samples=37, batch_size=8):
    folder.mkdir()
    script = folder / "job.py"
    script.write_text(JOB)
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    words = [folder, devices, precision, samples, batch_size]
    done = warm.run(
        [sys.executable, str(script), *map(str, words)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {one.name: one for one in read_measurements(folder)}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return {
        samples: measured(folder / f"{samples}", samples=samples, batch_size=batch)
        for samples, batch in ((37, 8), (20, 64))
    }


@pytest.mark.slow
@pytest.mark.parametrize(("samples", "batch"), [(37, 8), (20, 64)])
def test_two_ranks_measure_what_one_does(one_rank, tmp_path, samples, batch):
    """Five batches for two ranks; and one batch, so that a rank draws nothing."""
    two = measured(tmp_path / "two", devices=2, samples=samples, batch_size=batch)
    assert set(two) >= {"fid", "kid", "inception_score", "precision", "density", "coverage"}
    for name, one in one_rank[samples].items():
        assert two[name].value == pytest.approx(one.value, rel=1e-6), name
        assert two[name].protocol == one.protocol


def test_bf16_measures_what_float32_does(one_rank, tmp_path):
    half = measured(tmp_path / "half", precision="bf16-mixed")
    for name, one in one_rank[37].items():
        assert half[name].value == pytest.approx(one.value, rel=1e-9), name


# The callback in a run --------------------------------------------------------------------------


def trainer(folder, callbacks, **arguments):
    defaults = {
        "default_root_dir": folder, "max_steps": 4, "accelerator": "cpu",
        "enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1,
        "num_sanity_val_steps": 0, "enable_checkpointing": False,
    }  # fmt: skip
    logger = L.pytorch.loggers.CSVLogger(folder, name="", version="")
    return L.Trainer(**defaults | {"logger": logger} | arguments, callbacks=callbacks)


def test_samples_are_those_of_the_average_whatever_the_order(tmp_path):
    found = []
    for number, flip in enumerate((False, True)):
        callbacks = [EMA(0.5), FID(9, Flat(), "test", batch_size=4)]
        subject = model()
        run = trainer(tmp_path / str(number), callbacks[:: -1 if flip else 1], max_steps=6)
        run.fit(subject, DataModule(steps_per_epoch=6, val_examples=8))
        (one,) = read_measurements(tmp_path / str(number))
        found.append(one)
        # After the fit the module holds the average: what is drawn now was measured then.
        shares = open_digits(Flat(), "train").shares
        again = Scores(Flat(), open_digits(Flat()))
        for drawn in Generation(9, batch_size=4).sample(subject, shares):
            again.add(drawn)
        assert one.value == pytest.approx(again.compute()["fid"].value, rel=1e-9)
    assert found[0].value == found[1].value
    assert "EMA" in found[0].protocol["weights"] or "average" in found[0].protocol["weights"]


def test_validations_are_counted_and_the_last_is_measured(tmp_path):
    callback = FID(4, Flat(), "test", every_n_validations=2, baseline_split="train")
    run = trainer(tmp_path, [callback], max_steps=5)
    run.fit(model(), DataModule(steps_per_epoch=1, val_examples=8))
    steps = [one.step for one in read_measurements(tmp_path) if one.name == "fid"]
    assert steps == [2, 4, 5]
    baseline = [one for one in read_measurements(tmp_path) if one.name == "fid_baseline"]
    truth = scores.frechet_distance(open_digits(Flat(), "train"), open_digits(Flat()))
    assert {one.value for one in baseline} == {truth}
    assert baseline[0].protocol["split"] == "train"
    assert "samples" not in baseline[0].protocol


def test_nothing_of_it_is_in_checkpoints(tmp_path):
    callback = FID(4, ClassifierFeatures(), "test")
    run = trainer(tmp_path, [callback], max_steps=1, enable_checkpointing=True)
    subject = model()
    run.fit(subject, DataModule(steps_per_epoch=1, val_examples=8))
    run.save_checkpoint(tmp_path / "x.ckpt")
    kept = torch.load(tmp_path / "x.ckpt", weights_only=True)
    names = set(kept["state_dict"])
    assert names == set(model().state_dict())
    (state,) = [value for key, value in kept["callbacks"].items() if "FID" in key]
    assert state == {"validations": 1}


@pytest.mark.parametrize(
    "wrong", [{"num_samples": 1}, {"every_n_validations": 0}, {"batch_size": 0}]
)
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must be at least"):
        FID(**{"num_samples": 10, "features": Flat(), **wrong})


def test_a_wrong_hash_stops_a_run_before_it_begins(tmp_path):
    run = trainer(tmp_path, [FID(4, Flat(), "test", reference_hash="00")])
    subject = model()
    with pytest.raises(ValueError, match="expected a reference whose hash begins with 00"):
        run.fit(subject, DataModule(steps_per_epoch=1, val_examples=8))
    assert run.global_step == 0


def test_measurements_are_replaced_when_they_are_repeated(tmp_path):
    callback = FID(4, Flat(), "test")
    for _ in range(2):
        trainer(tmp_path, [callback], logger=False).test(model(), DataModule(val_examples=8))
    assert [one.name for one in read_measurements(tmp_path)] == ["fid"]
    other = dataclasses.replace(callback.generation, seed=3)
    callback.generation = other
    trainer(tmp_path, [callback], logger=False).test(model(), DataModule(val_examples=8))
    assert [one.protocol["seed"] for one in read_measurements(tmp_path)] == [0, 3]
