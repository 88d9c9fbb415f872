"""Names and texts of strangers in a report and a model card: shown as they are, never obeyed."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch
import yaml

import lit_diffusion as ld
from lit_diffusion.description import describe
from lit_diffusion.training.reporting.model_card import model_card
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.run.measurements import Measurement, add_measurements

IMAGE = "<img src=x onerror=alert(1)>"
LINKS = "[a](javascript:b) ![c](http://d/e) `f` | https://g\n\n# h\n\n<script>i</script>"


class Tags(HTMLParser):
    """The tags of a page with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


def test_a_report_obeys_nothing_that_a_run_folder_says(tmp_path):
    run = tmp_path / IMAGE / "1"
    run.mkdir(parents=True)
    config = {"name": IMAGE, "data": {IMAGE: IMAGE, "path": IMAGE}, "model": {"network": IMAGE}}
    config["model"] |= {"shape": IMAGE, "schedule": {"class_path": IMAGE}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.csv").write_text(f'epoch,step,train/loss,"train/{IMAGE}"\n0,0,1,2\n0,1,1,2\n')
    session = dict.fromkeys(("outcome", "device", "precision", "torch", IMAGE), IMAGE)
    session["started"] = "2026-01-01T00:00:00+00:00"
    (run / "environment.json").write_text(json.dumps([session]))
    add_measurements(
        run, [Measurement(n, 1.0, None, 1, IMAGE, {IMAGE: IMAGE}) for n in ("fid", IMAGE)]
    )
    (run / "bad_examples.csv").write_text(
        f"split,file,row,rows,reason,epoch\n{IMAGE},{IMAGE},1,1,{IMAGE},0\n"
    )
    page = write_report(run).read_text()
    assert IMAGE not in page
    assert page.count("&lt;img src=x onerror") > 10
    for tag, attributes in Tags(page).found:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert tag != "script"


class Named(torch.nn.Module):
    """A network whose class has a hostile name."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)


Named.__name__ = LINKS


@pytest.mark.parametrize("hostile", [IMAGE, LINKS])
def test_a_model_card_obeys_no_name(hostile):
    model = ld.Pretrained(Named(), shape=(1, 1, 1), conditions=[hostile])
    measured = [
        Measurement("fid", 1.0, None, 1, hostile, {"weights": hostile, hostile: hostile}),
        Measurement(hostile, 1.0, None, 1, "val", {"weights": hostile, "x": [hostile]}),
    ]
    described = {"class_path": "lit_diffusion.Pretrained", "init_args": {}}
    card = model_card(model, described, hostile, hostile, hostile, measured, picture=True)
    front, text = card.split("---\n", 2)[1:]
    assert yaml.safe_load(front)["license"] == hostile
    prose = re.sub(r"^```python\n.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not Tags(prose).found
    assert "<" not in re.sub(r"`[^`]*`", "", prose)
    assert re.findall(r"(?<!\\)\]?(?<!\\)!?\[[^\]]*\]\([^)]*\)", prose) == [
        "![Samples](samples.png)"
    ]
    assert re.findall(r"^#.*", prose, re.MULTILINE)[1:] == ["## Objective", "## Numbers", "## Use"]
    assert "://" not in prose
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) in (3, 9), row


def test_the_card_shows_usual_names_as_they_are():
    network = ld.ResidualMLP(shape=(1, 1, 2), features=8, layers=1)
    model = ld.Pretrained(network, shape=(1, 1, 2))
    card = model_card(
        model, describe(model), "my_run-1", "mit", "EMA(decay=0.9), step 3", [], False
    )
    assert "# my_run-1\n" in card
    assert "| weights | EMA(decay=0.9), step 3 |" in card
    assert "`DDIMSampler(" in card
