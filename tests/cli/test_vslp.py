"""``tissuehint run`` with vslp: phases, report, energies, rows; wrong input in one line."""

from __future__ import annotations

import json

import pytest
import yaml

from tissuehint.model import TissueModel
from tissuehint.testing import fake_batch, fake_labels
from tissuehint.testing.fakes import write_fake_folder


@pytest.fixture
def recipe(tmp_path):
    folder = write_fake_folder(tmp_path / "tissue", fake_labels())

    def make(name="tiny", method=None, **changes):
        values = {
            "name": name,
            "output": str(tmp_path / "runs"),
            "data": {"source": "folder", "root": str(folder), "workers": 0},
            "method": {
                "name": "vslp",
                "confidence": {"encoder": {"name": "test_resnet"}},
                "test_time": {"rotations": [0, 90], "mirror": False},
                "fusion": {"regulariser": {"features": 4}, "steps": 2},
                "learning": {"steps": 2, "warm_up": 1, "views": 2},
                **(method or {}),
            },
            "stage1": {"steps": 4, "batch_size": 2, "round_steps": 2},
            "stage2": None,
            "evaluation": {"gallery": 1},
            "trainer": {"accelerator": "cpu", "progress": False},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return make


def test_a_run_shows_its_phases_and_its_energies(command, recipe, tmp_path):
    outcome = command("run", recipe(), "--quiet")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs" / "tiny"
    page = (run / "report.html").read_text()
    assert "Stage 1, confidence: loss" in page
    assert "Stage 1, regulariser: loss" in page
    assert 'id="illustrated"' in page
    assert "Energy along the flow" in page
    scores = json.loads((run / "scores.json").read_text())
    rows = {(row["stage"], row["gate"]): row for row in scores["rows"]}
    for gate in ("predicted", "oracle"):
        row = rows["stage1", gate]
        assert 0 <= row["calibration_error"] <= 1
        assert 0 <= row["proportion_mae_mean"] <= 1
    assert rows["stage1", "oracle"]["proportion_mae_mean"] < 0.02
    layers = json.loads((run / "gallery" / "index.json").read_text())["items"][0]["layers"]
    assert {"fidelity_energy", "regularisation_energy", "proportion_energy"} <= set(layers)
    model = TissueModel.load(run / "model")
    maps = model.predict(fake_batch(fake_labels(), count=1).images[0])
    assert maps.shape == (4, 64, 64)


def test_windows_are_explained_too(command, recipe, tmp_path):
    data = yaml.safe_load(recipe("other").read_text())["data"]
    outcome = command("run", recipe(data={**data, "patches": {"side": 32, "stride": 32}}), "--quiet")
    assert outcome.code == 0, outcome.err
    layers = json.loads((tmp_path / "runs" / "tiny" / "gallery" / "index.json").read_text())["items"][0]["layers"]
    assert {"guided_map_1", "proportion_energy", "disagreement"} <= set(layers)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"fusion": {"solver": "primal_dual"}}, "method.fusion"),
        ({"confidence": {"cells": "pixels"}}, "method.confidence"),
        ({"fusion": {"fidelity": "linear", "ground_cost": [[0, 1], [1, 0]]}}, "has 2 classes, the data 3"),
        ({"confidence": {"encoder": {"name": "test_resnet", "depth": 9}}}, "depth 9"),
        ({"regulariser": {}}, "method.regulariser"),
    ],
)
def test_wrong_settings_are_one_line(command, recipe, tmp_path, method, words):
    outcome = command("run", recipe(method=method), "--quiet")
    assert outcome.code == 2
    assert words in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_images_without_proportions_are_named(command, recipe, tmp_path):
    folder = write_fake_folder(tmp_path / "bare", fake_labels(), masks=False)
    lines = (folder / "labels.csv").read_text().splitlines()
    columns = lines[0].split(",")
    kept = [place for place, name in enumerate(columns) if not name.startswith("proportion:")]
    bare = [",".join(line.split(",")[place] for place in kept) for line in lines]
    (folder / "labels.csv").write_text("\n".join(bare) + "\n")
    outcome = command("run", recipe(data={"source": "folder", "root": str(folder), "workers": 0}), "--quiet")
    assert outcome.code == 2
    assert "has no proportions" in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1
