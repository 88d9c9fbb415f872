"""Secrets in the addresses of data: in nothing that a run writes or says; given again to go on."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from image_files import encode, pixels, serving, write_parquet
from test_cli import FAST

from lit_diffusion.training import DataModule
from lit_diffusion.training.commands.shell.errors import fail
from lit_diffusion.training.data.reading.retry import NetworkError, patiently
from lit_diffusion.training.data.reading.sources import find_splits, locate
from lit_diffusion.training.reporting.page import text
from lit_diffusion.training.run.messages import logger
from lit_diffusion.training.run.secrets import masked, refuse_masked, without_secrets

USER, PASSWORD, SIGNATURE = "ann7q", "pass9wz", "5ig4x8"
SECRETS = (USER, PASSWORD, SIGNATURE)

ADDRESSES = [
    ("https://ann:pw@host/a.parquet", "https://***@host/a.parquet"),
    ("https://hf_token@host:80/a", "https://***@host:80/a"),
    ("https://ann:p@w@host/a", "https://***@host/a"),
    ("simplecache::s3://key:secret@bucket/a", "simplecache::s3://***@bucket/a"),
    (
        "https://h/a?X-Amz-Signature=1f&X-Amz-Date=2",
        "https://h/a?X-Amz-Signature=***&X-Amz-Date=2",
    ),
    ("https://h/a?X-Amz-Credential=K%2F1&b=2", "https://h/a?X-Amz-Credential=***&b=2"),
    ("https://h/a?sv=2020&sig=a%2Bb#part", "https://h/a?sv=2020&sig=***#part"),
    ("https://h/a?access_token=x;y=1", "https://h/a?access_token=***;y=1"),
    ("https://h/a?u=0123456789abcdef0123456789abcdef", "https://h/a?u=***"),
    ("'https://h/a?token=x' failed", "'https://h/a?token=***' failed"),
    ("key AKIAIOSFODNN7EXAMPLE and hf_" + "a" * 34, "key *** and ***"),
]


@pytest.mark.parametrize(("address", "shown"), ADDRESSES)
def test_what_is_masked(address, shown):
    assert without_secrets(address) == shown
    assert without_secrets(shown) == shown


@pytest.mark.parametrize(
    "plain",
    [
        "hf://datasets/user/name@main/train.parquet",
        "https://host/a.parquet?download=true&part=3",
        "s3://bucket/a b/c@d.parquet",
        "mail ann@host; lr=0.1 num_tokens=12",
        "/home/ann/data=token/x.parquet",
    ],
)
def test_what_stays(plain):
    assert without_secrets(plain) == plain


def test_all_texts_of_a_config_are_masked_and_refused_afterwards():
    files = {"train": ["https://h/a?sig=x", "b.parquet"], "test": ("s3://a:b@c/d", 3)}
    shown = {"train": ["https://h/a?sig=***", "b.parquet"], "test": ("s3://***@c/d", 3)}
    assert masked(files) == shown
    refuse_masked("data.data_files", files)
    with pytest.raises(ValueError, match=r"give it again, as --data\.data_files or in a last"):
        refuse_masked("data.data_files", shown)
    with pytest.raises(ValueError, match=r"data\.data_files is 'https"):
        locate("parquet", shown)


SECRET_URL = f"http://{USER}:{PASSWORD}@{{}}/train.parquet?X-Amz-Signature={SIGNATURE}"


def clean(*texts):
    for one in texts:
        assert not [secret for secret in SECRETS if secret in one], one


def test_no_error_and_no_message_has_them(capsys, caplog, monkeypatch):
    monkeypatch.setattr("lit_diffusion.training.data.reading.retry.FIRST_WAIT", 0)
    url = SECRET_URL.format("127.0.0.1:9")

    def broken():
        raise ConnectionError(f"cannot reach {url}")

    with pytest.raises(NetworkError) as network:
        patiently(without_secrets(url), broken)
    with pytest.raises(ValueError, match="expected the URL of a parquet file") as format:
        locate(url.replace("parquet", "zip"), None)
    with pytest.raises((ValueError, OSError), match="cannot be opened") as missing:
        find_splits("json", {"train": url}, None, streaming=False)
    with pytest.raises(SystemExit):
        fail(f"cannot read {url}")
    with pytest.warns(UserWarning, match="cannot read http://"), caplog.at_level("INFO"):
        logger.warning("cannot read %s", url)
    clean(*(str(one.value) for one in (network, format, missing)))
    clean(capsys.readouterr().err, caplog.text, text(url))


@pytest.fixture
def served(tmp_path):
    """The address of ten images and a broken one, with user, password and signature."""
    images = [encode(one) for one in pixels(10)]
    write_parquet(tmp_path / "served" / "train.parquet", [*images, b"broken"])
    with serving(tmp_path / "served") as server:
        yield SECRET_URL.format(server.url.removeprefix("http://"))


def files_with_secrets(folder):
    found = [path for path in Path(folder).rglob("*") if path.is_file()]
    assert found
    return [path for path in found if any(s.encode() in path.read_bytes() for s in SECRETS)]


@pytest.mark.filterwarnings("ignore")
def test_nothing_that_a_run_writes_has_them_and_it_goes_on(cli, served, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_CONSOLE", "off")  # it would wrap what pytest has wrapped
    fit = ["fit", "--model.network=UNet", "--model.sampler=DDIMSampler", *FAST]
    fit += ["--data.val_split=null", "--data.max_bad_share=0.5"]
    code, out, err = cli(*fit, f"--data.path={served}")
    assert code == 0, err
    run = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    clean(out, err)
    assert "skipped row 10 of http://***@127.0.0.1" in err
    assert "X-Amz-Signature=***" in (run / "config.yaml").read_text()
    assert "http://***@" in (run / "bad_examples.csv").read_text()
    assert list(run.glob("wandb/offline-run-*/*.wandb"))
    assert files_with_secrets(run) == []

    # It goes on if the address is given again, and says so if not.
    recorded = ["fit", f"--config={run / 'config.yaml'}", "--ckpt_path=last"]
    code, out, err = cli(*recorded)
    assert code == 2
    assert "data.path is 'http://***@127.0.0.1" in err
    assert "so give it again, as --data.path or in a last --config" in err
    assert err.count("\n") <= 3
    code, out, err = cli(*recorded, f"--data.path={served}", "--trainer.max_steps=4")
    assert code == 0, err
    assert "Steps: 4" in out
    shutil.rmtree(run / "wandb")
    assert files_with_secrets(run) == []


def test_measurements_have_them_not(served, monkeypatch, tmp_path):
    from lit_diffusion.training.evaluation.reference import open_reference

    class Flat(torch.nn.Module):
        def forward(self, images):
            return images.flatten(1).float()

    data = DataModule(served, val_split=None, max_bad_share=0.5, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=r"skipped row 10 of http://\*\*\*@"):
        found = open_reference(data, "train", Flat(), torch.device("cpu"))
    assert found.protocol["data"] == "train.parquet?X-Amz-Signature=***"
    assert files_with_secrets(tmp_path / "cache") == []


def test_a_replay_takes_the_address_again(tmp_path):
    """The flag exists, and the config comes after that of the run."""
    from lit_diffusion.training.commands import replay

    seen = []

    class StopError(Exception):
        pass

    def run(model_class, data_class, args):
        seen.extend(args)
        raise StopError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "DiffusionCLI", run)
        record = {
            "step": 1, "batches": [], "checkpoint": None, "config": "a.yaml", "world_size": 1,
            "not_finite": "loss",
        }  # fmt: skip
        (tmp_path / "a.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": []}}))
        (tmp_path / "a.json").write_text(json.dumps(record))
        patch.setenv("WANDB_MODE", "disabled")
        with pytest.raises(StopError):
            replay.replay(tmp_path / "a.json", config="address.yaml")
    assert seen[0::2] == ["fit", seen[2], "address.yaml"]
