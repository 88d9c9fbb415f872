"""The shipped digits with captions, and the config that trains on them."""

import hashlib
import re
from pathlib import Path

from lit_diffusion.training.reporting.parts import picture
from lit_diffusion.training.run.grid_texts import texts_of

SHIPPED = Path(__file__).parents[2] / "lit_diffusion" / "data"


def test_the_captions_are_those_of_the_readme(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    text = (SHIPPED / "digits_text" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {"digits8x8": SHIPPED / "digits8x8"}
    exec(code, names)
    for split in ("train", "test"):
        shipped = pq.read_table(SHIPPED / "digits_text" / f"{split}.parquet")
        assert shipped.equals(pq.read_table(f"{split}.parquet"))
        file = SHIPPED / "digits_text" / f"{split}.parquet"
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert names["caption"](0, 8) == "an eight"


def test_the_config_trains_and_prompts(cli):
    code, out, err = cli(
        "fit", "--config=digits-text", "--trainer.max_steps=2", "--data.steps_per_epoch=2",
        "--data.val_examples=6", "--data.batch_size=4", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1",
        "--model.sampler.steps=2",
    )  # fmt: skip
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    (path,) = (folder / "samples").glob("step-*.png")
    assert picture(path, "", "").columns[:2] == ["a zero", "the digit one"]
    words = ["--ckpt_path=last", "--num_samples=2", "--device=cpu", "--guidance=2"]
    code, _, err = cli("sample", *words, "--prompt=a three", "--out=three.png")
    assert code == 0, err
    assert texts_of(Path("three.png")) == [["a three"], ["a three"]]
    code, _, err = cli("sample", *words, "--out=captions.png")  # those of the validation split
    assert code == 0, err
