"""``tissuehint run`` with lpd: what is logged, what the report shows, and a training that is killed in its warm-up."""

from __future__ import annotations

import csv
import json

import pytest
import yaml

from tissuehint.testing import fake_labels
from tissuehint.testing.contract import Killed, killed_at_step
from tissuehint.testing.fakes import write_fake_folder


@pytest.fixture
def recipe(tmp_path):
    folder = write_fake_folder(tmp_path / "tissue", fake_labels())

    def make(name="tiny", **changes):
        values = {
            "name": name,
            "output": str(tmp_path / "runs"),
            "data": {"source": "folder", "root": str(folder), "workers": 0},
            "method": {
                "name": "lpd",
                "encoder": {"name": "test_resnet"},
                "image_encoder": {"name": "test_resnet", "side": 32},
                "prototypes_per_class": 2,
                "warm_up": 2,
                "diversity": {"min_pixels": 1, "background": -1000},
                "crf": {"iterations": 1},
                "test_time": {},
            },
            "stage1": {"steps": 4, "batch_size": 2, "round_steps": 2},
            "stage2": None,
            "ceiling": False,
            "evaluation": {"gallery": 1},
            "trainer": {"accelerator": "cpu", "progress": False},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return make


def test_a_run_logs_and_shows_what_the_prototypes_see(command, recipe, tmp_path):
    outcome = command("run", recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs" / "tiny"
    rows = list(csv.DictReader((run / "stage1" / "metrics.csv").open()))
    for name in ("val_coverage", "val_overlap"):
        values = [float(row[name]) for row in rows if row[name]]
        assert len(values) == 2  # one a round
        assert all(0 <= value <= 1 for value in values)
        assert name == "val_overlap" or min(values) > 0
    # the second round is behind the warm-up
    assert any(row["train_diversity"] for row in rows)
    numbers = json.loads((run / "stage1" / "illustrated" / "diversity.json").read_text())
    assert numbers["split"] == "val"
    page = (run / "report.html").read_text()
    assert 'id="illustrated"' in page
    assert "where each prototype of the class looks" in page
    shown = [name for name, value in numbers["coverage"].items() if value is not None]
    assert shown
    for name in shown:
        assert f"{name}: coverage {numbers['coverage'][name]:.2f}" in page
    rows = json.loads((run / "scores.json").read_text())["rows"]
    assert {(row["stage"], row["gate"]) for row in rows} >= {("stage1", "predicted"), ("stage1", "oracle")}


def test_a_killed_run_goes_on_behind_its_warm_up(command, recipe, tmp_path):
    """Steps are counted over the kill: the same weights as without."""
    from safetensors.torch import load_file

    changes = {"stage1": {"steps": 4, "batch_size": 2, "round_steps": 1}}
    with pytest.raises(Killed), killed_at_step(4):
        command("run", recipe("killed", **changes), "--quiet")
    for name in ("killed", "whole"):
        outcome = command("run", recipe(name, **changes), "--quiet")
        assert outcome.code == 0, outcome.err
    killed, whole = (
        load_file(str(tmp_path / "runs" / name / "stage1" / "weights.safetensors")) for name in ("killed", "whole")
    )
    assert killed.keys() == whole.keys()
    assert all((killed[key] == whole[key]).all() for key in whole)


def test_a_warm_up_that_never_ends(command, recipe, tmp_path):
    path = recipe(stage1={"steps": 2, "batch_size": 2, "round_steps": 1})
    outcome = command("run", path)
    assert outcome.code == 2
    assert "method.warm_up 2: is not below the 2 steps of stage1" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"diversity": {"window": 4}}, "4 is even"),
        ({"similarity": "convolution"}, "no prototypes that could be trained"),
        ({"crf": {"iterations": 0}}, "method.crf.iterations"),
        ({"prototypes_per_class": 0}, "method.prototypes_per_class"),
    ],
)
def test_wrong_values(command, recipe, tmp_path, method, words):
    outcome = command("run", recipe(method={"name": "lpd", "encoder": {"name": "test_resnet"}, **method}))
    assert outcome.code == 2
    assert words in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()
