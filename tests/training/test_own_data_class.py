"""Classes of data of one's own on the command line: data sets, data modules, what they promise."""

import sys

import lightning as L
import pytest
import torch
import warm
import yaml
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from lit_diffusion.nn import UNet
from lit_diffusion.training import DatasetModule, LitDiffusion
from lit_diffusion.training.data.own import EpochOrder, promises, shape_of
from lit_diffusion.training.run.checkpoints import load_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")

PLUGIN = '''
import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

class Rows(Dataset):
    """Numbered examples.

    Args:
        n: Their number.
        size: Height and width.
        key: The name of the pictures.
    """

    def __init__(self, n: int = 12, size: int = 8, key: str = "image"):
        self.n, self.size, self.key = n, size, key

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        image = torch.full((2, self.size, self.size), i / self.n * 2 - 1)
        return {self.key: image, "index": torch.tensor(i)}

class Endless(IterableDataset):
    def __init__(self, size: int = 8):
        self.size = size

    def __iter__(self):
        while True:
            yield torch.rand(1, self.size, self.size) * 2 - 1

class Module(L.LightningDataModule):
    def __init__(self, size: int = 8):
        super().__init__()
        self.shape = (2, size, size)

    def _loader(self):
        rows = [{"pixels": torch.full(self.shape, -0.5), "kind": i % 3} for i in range(8)]
        return DataLoader(rows, batch_size=4)

    train_dataloader = val_dataloader = predict_dataloader = _loader

class Seen(L.Callback):
    """Writes the numbers of the examples of each training batch."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open(f"seen{trainer.global_rank}.txt", "a") as file:
            file.write(" ".join(map(str, batch["index"].tolist())) + "\\n")

class NoData:
    pass
'''

QUIET = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.log_every_n_steps=1",
    "--trainer.num_sanity_val_steps=0",
]
TINY = ["--model.network=UNet", "--model.network.channels=[8]", "--model.network.attention=[]"]


@pytest.fixture
def own(cli, tmp_path, monkeypatch):
    """A command in a folder with a module of classes; its name, since modules stay imported."""
    name = f"own_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    config = {"trainer": {"callbacks": []}}
    (tmp_path / "bare.yaml").write_text(yaml.safe_dump(config))

    def run(command, *words, extra=(*QUIET, *TINY)):
        words = [str(word).replace("OWN", name) for word in words]
        extra = extra if command in ("fit", "validate", "predict") else ()
        return cli(command, f"--plugins={name}", *extra, *words)

    run.name = name
    return run


def newest(tmp_path):
    return max((tmp_path / "runs/run").iterdir(), key=lambda path: path.stat().st_mtime_ns)


# On the command line ---------------------------------------------------------------------------


def test_a_dataset_is_trained_on_from_the_shell_and_from_its_saved_config(own, tmp_path):
    words = ["--config=bare.yaml", "--data=OWN.Rows", "--data.n=8", "--loader.batch_size=4"]
    words += ["--loader.val=OWN.Rows", "--loader.val.n=5", "--trainer.max_steps=2"]
    code, out, err = own("fit", *words)
    assert code == 0, err
    assert "val/loss at step 2" in out
    assert "resumed run" not in err  # nothing is left to the user
    run = newest(tmp_path)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["data"] == {
        "class_path": f"{own.name}.Rows",
        "init_args": {"n": 8, "size": 8, "key": "image"},
    }
    assert config["loader"]["batch_size"] == 4
    assert config["loader"]["seed"] == 0
    assert config["model"]["shape"] == [2, 8, 8]
    assert config["model"]["network"]["init_args"]["shape"] == [2, 8, 8]
    code, again, err = own("fit", f"--config={run / 'config.yaml'}", extra=())
    assert code == 0, err
    value = [line for text in (out, again) for line in text.splitlines() if "val/loss" in line]
    assert value[0] == value[1]


def test_a_data_module_with_names_of_its_own_is_trained_on_from_a_config(own, tmp_path):
    config = {
        "trainer": {"callbacks": [], "max_steps": 2},
        "data": {"class_path": f"{own.name}.Module", "init_args": {"size": 8}},
        "model": {"keys": {"image": "pixels", "label": "kind"}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    with pytest.warns(UserWarning, match="order of the examples is that of Module") as caught:
        code, _, err = own("fit", "--config=mine.yaml", "--model.network.num_classes=3")
    assert code == 0, err
    assert sum("is up to it" in str(one.message) for one in caught) == 1
    checkpoint = newest(tmp_path) / "checkpoints/last.ckpt"
    described = load_checkpoint(checkpoint)["hyper_parameters"]
    assert described["keys"] == {"image": "pixels", "label": "kind"}
    assert described["shape"] == [2, 8, 8]
    for command in ("validate", "predict"):
        code, _, err = own(command, "--config=mine.yaml", f"--ckpt_path={checkpoint}", extra=QUIET)
        assert code == 0, err
    code, _, err = own("sample", f"--ckpt_path={checkpoint}", "--num_samples=2", "--out=s.png")
    assert code == 0, err
    code, _, err = own("report", f"{newest(tmp_path)}")
    assert code == 0, err
    code, _, err = own("objective", "--config=mine.yaml", "--out=o.png")
    assert code == 0, err
    code, _, err = own("evaluate", f"--ckpt_path={checkpoint}")
    assert code == 2
    assert f"the data are {own.name}.Module, and" in err
    assert "--data.path" in err
    assert len(err.splitlines()) == 1


def test_an_iterable_dataset_says_what_is_up_to_it(own):
    words = ["--config=bare.yaml", "--data=OWN.Endless", "--trainer.max_steps=2"]
    with pytest.warns(UserWarning, match="Endless is iterable") as caught:
        code, _, err = own("fit", *words, "--model.network.shape=[1,8,8]")
    assert code == 0, err
    assert sum("is up to it" in str(one.message) for one in caught) == 1


def test_print_config_of_a_class_can_be_used(own, tmp_path):
    code, out, err = own("fit", "--data=OWN.Rows", "--data.n=9", "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)
    assert found["data"]["init_args"]["n"] == 9
    assert found["loader"]["batch_size"] == 64


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data=OWN.Row"], "has no class 'Row'. Did you mean Rows?"),
        (["--data=nowhere.Rows"], "nowhere.Rows may not be imported yet"),
        (["--data=OWN.NoData"], "expected a LightningDataModule, or a Dataset"),
        (["--data=OWN.Rows", "--data.m=3"], "m'"),
        (["--data=OWN.Rows", "--data.n=three"], "expected int, got three"),
        (["--data=OWN.Rows", "--loader.batch_size=0"], "batch_size must be at least 1"),
        (["--data=OWN.Module", "--loader.batch_size=4"], "no argument is called --loader"),
        (["--data=OWN.Rows", "--config=digits"], "leave that section out of the config"),
        (["--data=OWN.Rows", "--model.keys={label: kind}"], "'kind' for 'label'"),
        (["--data=OWN.Rows", "--model.shape=[1,8,8]"], r"got (2, 8, 8) in a batch"),
        (["--data.class_path=OWN.Rows", "--data.init_args.k=1"], "k'"),
    ],
)
def test_a_mistake_is_one_line(own, tmp_path, words, message):
    config = [] if "--config=digits" in words else ["--config=bare.yaml"]
    code, _, err = own("fit", *config, *words, "--trainer.max_steps=1")
    assert code == 2, err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    assert message in lines[0]
    assert not list(tmp_path.glob("runs/run/*/checkpoints/*"))


def test_commands_that_read_by_number_refuse_a_class(own):
    code, _, err = own("encode", "--data=OWN.Rows", "--vae=none", "--out=latents")
    assert code == 2
    assert "reads examples by split and number" in err


# The order -------------------------------------------------------------------------------------


def test_the_order_is_a_function_of_seed_and_epoch():
    data = TensorDataset(torch.zeros(10, 1))
    order, same, other = EpochOrder(data), EpochOrder(data), EpochOrder(data, seed=1)
    first = [*order]
    assert sorted(first) == list(range(10))
    assert [*same] == first != [*other]
    order.set_epoch(1)
    assert [*order] != first
    ranks = [EpochOrder(data, world=2, rank=rank) for rank in (0, 1)]
    assert sorted([*ranks[0], *ranks[1]]) == list(range(10))
    same.continue_at(0, 4)
    assert [*same] == first[4:]
    same.set_epoch(1)
    assert [*same] == [*order]
    assert [*EpochOrder(data, shuffle=False)] == list(range(10))


class Numbers(Dataset):
    def __init__(self, n=10):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return {"image": torch.full((1, 8, 8), i / 10), "index": torch.tensor(i)}


class Seen(L.Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append(batch["index"].tolist())


def train(folder, steps, ckpt=None, every=1, data=None, **arguments):
    torch.manual_seed(0)
    seen = Seen()
    saved = L.pytorch.callbacks.ModelCheckpoint(
        folder, "{step}", every_n_train_steps=every, save_top_k=-1
    )
    trainer = L.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, callbacks=[seen, saved],
        enable_progress_bar=False, enable_model_summary=False, **arguments,
    )  # fmt: skip
    model = LitDiffusion(UNet(shape=(1, 8, 8), channels=(8,), attention=()), label_dropout=0.0)
    trainer.fit(model, datamodule=data or DatasetModule(Numbers(), batch_size=4), ckpt_path=ckpt)
    return seen.batches, model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_resumed_run_continues_with_the_same_batches(tmp_path, step):
    """From the middle and the end of an epoch of three batches, bit for bit."""
    whole, model = train(tmp_path / "whole", 8)
    assert sorted(i for batch in whole[:3] for i in batch) == list(range(10))
    assert whole[:3] != whole[3:6]
    rest, resumed = train(tmp_path / "rest", 8, tmp_path / f"whole/step={step}.ckpt")
    assert rest == whole[step:]
    for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_with_a_limit_and_accumulation_continues_with_the_same_batches(tmp_path):
    limits = {"limit_train_batches": 2, "accumulate_grad_batches": 2}
    whole, _ = train(tmp_path / "whole", 3, **limits)
    assert [len(one) for one in whole] == [4] * 6
    rest, _ = train(tmp_path / "rest", 3, tmp_path / "whole/step=1.ckpt", **limits)
    assert rest == whole[2:]


@pytest.mark.filterwarnings("ignore")
def test_overfitting_repeats_the_same_batches(tmp_path):
    seen, _ = train(tmp_path, 4, overfit_batches=1)
    assert seen == [seen[0]] * 4


@pytest.mark.filterwarnings("ignore")
def test_another_order_is_not_resumed(tmp_path):
    train(tmp_path, 1)
    other = DatasetModule(Numbers(), batch_size=5)
    with pytest.raises(ValueError, match=r"loader.batch_size was 4 .* and is 5 now"):
        train(tmp_path, 2, tmp_path / "step=1.ckpt", data=other)


@pytest.mark.filterwarnings("ignore")
def test_a_data_set_can_be_predicted_for(tmp_path):
    model = LitDiffusion(UNet(shape=(1, 8, 8), channels=(8,), attention=()), label_dropout=0.0)
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", logger=False, enable_progress_bar=False
    )
    data = DatasetModule(Numbers(), Numbers(3), batch_size=2)
    assert [len(one) for one in trainer.predict(model, datamodule=data)] == [2, 1]


def test_the_promises():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    assert promises(DatasetModule(Numbers())) is None
    assert "Stream is iterable" in promises(DatasetModule(Stream()))
    assert shape_of(DatasetModule(Numbers())) == (1, 8, 8)
    assert shape_of(DatasetModule(TensorDataset(torch.zeros(3, 3, 4, 4)))) == (3, 4, 4)
    assert shape_of(DatasetModule(Stream())) is None
    with pytest.raises(TypeError, match=r"must be a torch\.utils\.data\.Dataset, got 3"):
        DatasetModule(3)


@pytest.mark.slow
def test_two_ranks_share_the_examples_and_resume(own, tmp_path):
    words = [
        sys.executable, "-m", "lit_diffusion", "fit", f"--plugins={own.name}",
        "--config=bare.yaml",
        f"--data={own.name}.Rows", "--loader.batch_size=2", "--trainer.devices=2",
        "--trainer.strategy=ddp", f"--trainer.callbacks+={own.name}.Seen", *QUIET, *TINY,
    ]  # fmt: skip

    def seen():
        files = [tmp_path / f"seen{rank}.txt" for rank in (0, 1)]
        found = [file.read_text().splitlines() for file in files]
        for file in files:
            file.unlink()
        return found

    done = warm.run([*words, "--trainer.max_steps=6"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = seen()
    for epoch in (slice(0, 3), slice(3, 6)):
        numbers = " ".join([*whole[0][epoch], *whole[1][epoch]]).split()
        assert sorted(map(int, numbers)) == list(range(12))
    assert whole[0][:3] != whole[0][3:]
    first = warm.run([*words, "--trainer.max_steps=2"], cwd=tmp_path)
    assert first.returncode == 0, first.stderr[-3000:]
    begun = seen()
    more = warm.run([*words, "--trainer.max_steps=6", "--ckpt_path=last"], cwd=tmp_path)
    assert more.returncode == 0, more.stderr[-3000:]
    rest = seen()
    assert [begun[rank] + rest[rank] for rank in (0, 1)] == whole
