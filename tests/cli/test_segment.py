from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from tissuehint.data.records import read_codes

CLICKS = [(8, 10, "gland"), (40, 12, "gland"), (10, 60, "stroma"), (35, 70, "stroma")]


@pytest.fixture
def image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pixels = np.empty((50, 80, 3))
    pixels[:, :40], pixels[:, 40:] = (120, 80, 40), (190, 140, 200)
    pixels += np.random.default_rng(0).normal(0, 10, pixels.shape)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "core.png")
    return tmp_path / "core.png"


@pytest.fixture
def table(tmp_path):
    return write(tmp_path / "clicks.csv", CLICKS)


def write(path, clicks):
    path.write_text("row,column,class\n" + "".join(f"{row},{column},{name}\n" for row, column, name in clicks))
    return path


def feature(row, column, name):
    properties = {"objectType": "annotation", "classification": {"name": name}}
    geometry = {"type": "Point", "coordinates": [column + 0.7, row + 0.2]}
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def left_half(shape=(50, 80)):
    truth = np.ones(shape, np.uint8)
    truth[:, : shape[1] // 2] = 0
    return truth


def test_a_table_of_points_makes_a_mask(command, image, table, tmp_path):
    outcome = command("segment", image, "--points", table)
    assert outcome.code == 0, outcome.err
    mask = read_codes(tmp_path / "core_mask.png")
    assert (mask == left_half()).mean() > 0.97
    assert Image.open(tmp_path / "core_mask.png").mode == "P"
    lines = outcome.out.splitlines()
    assert lines[0] == f"gland: {int((mask == 0).sum())} px, {100 * (mask == 0).mean():.1f} %"
    assert lines[1].startswith("stroma: ")
    assert lines[2].startswith("4 points, ")
    assert lines[2].endswith("core_mask.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clicks.csv", "core.png", "core_mask.png"]


@pytest.mark.parametrize("name", ["clicks.geojson", "clicks.json"])
def test_an_export_of_qupath_says_the_same(command, image, table, tmp_path, name):
    region = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": []}, "properties": {}}
    features = [region, *(feature(*click) for click in CLICKS)]
    (tmp_path / name).write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    assert command("segment", image, "--points", table, "--out", "table.png").code == 0
    assert command("segment", image, "--points", tmp_path / name, "--out", "qupath.png").code == 0
    assert (read_codes(tmp_path / "table.png") == read_codes(tmp_path / "qupath.png")).all()


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_overlay_and_probabilities(command, image, table, tmp_path, suffix):
    out = tmp_path / "new" / "mask.png"
    words = ("--overlay", tmp_path / "new" / f"overlay.{suffix}", "--soft", tmp_path / "new" / "soft.npz")
    assert command("segment", image, "--points", table, "--out", out, *words).code == 0
    assert {path.name for path in out.parent.iterdir()} == {"mask.png", f"overlay.{suffix}", "soft.npz"}
    assert Image.open(out.parent / f"overlay.{suffix}").size == (80, 50)
    soft = np.load(out.parent / "soft.npz")
    assert soft["classes"].tolist() == ["gland", "stroma"]
    assert soft["probabilities"].dtype == np.float16
    assert (soft["probabilities"].argmax(0) == read_codes(out)).mean() > 0.99


def test_a_target_is_taken_against_the_rest(command, image, tmp_path):
    clicks = write(tmp_path / "three.csv", [*CLICKS, (45, 45, "muscle")])
    outcome = command("segment", image, "--points", clicks, "--target", "gland")
    assert outcome.code == 0, outcome.err
    assert [line.partition(":")[0] for line in outcome.out.splitlines()[:2]] == ["rest", "gland"]
    assert (read_codes(tmp_path / "core_mask.png") == 1 - left_half()).mean() > 0.9


def test_an_encoder_with_weights_is_used(command, image, table, tmp_path):
    import torch
    from safetensors.torch import save_file

    from tissuehint.nn.config import EncoderConfig
    from tissuehint.nn.encoders import build_encoder

    torch.manual_seed(0)
    backbone = build_encoder(EncoderConfig(name="test_resnet")).backbone
    save_file(dict(backbone.state_dict()), tmp_path / "weights.safetensors")
    words = ("--encoder", "test_resnet", "--weights", tmp_path / "weights.safetensors", "--normalization", "unit")
    outcome = command("segment", image, "--points", table, *words)
    assert outcome.code == 0, outcome.err
    assert (read_codes(tmp_path / "core_mask.png") == left_half()).mean() > 0.9


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "empty"),
        ("row,column,class\n", "no points"),
        ("row,column\n1,2\n", "'class'"),
        ("image,row,column,class\na,1,2,x\n", "'image'"),
        ("row,column,class\n1,2,gland\n3,4,gland\n", "one class only, 'gland'"),
        ("row,column,class\n1,2,gland\n50,4,stroma\n", ":3: point (row 50, column 4)"),
        ("row,column,class\n1,2,gland\n1,2,stroma\n", "is stroma here and gland before"),
        ("row,column,class\n1,2,gland\n-3,4,stroma\n", ":3: row of a point is '-3'"),
        ("row,column,class\n1,2.5,gland\n3,4,stroma\n", ":2: column of a point is '2.5'"),
        ("row,column,class\n1,2,gland\nnan,4,stroma\n", "'nan'"),
        ("row,column,class\n1,2,gland\n3,4,\n", ":3: class of a point is empty"),
    ],
)
def test_a_table_that_breaks_a_rule_is_refused(command, image, tmp_path, content, said):
    (tmp_path / "bad.csv").write_text(content)
    command("segment", image, "--points", "bad.csv", "--overlay", "overlay.png").refused("bad.csv", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.csv", "core.png"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no points"),
        (json.dumps([feature(1, 2, "gland")]), "one class only"),
        (json.dumps([feature(1, 2, "gland"), feature(3, 4, "")]), "without a class"),
        (json.dumps([feature(1, 2, "gland"), feature(3, 400, "stroma")]), "outside the image"),
        (json.dumps({"type": "Feature", "geometry": None}), "has no points"),
    ],
)
def test_an_export_that_breaks_a_rule_is_refused(command, image, tmp_path, content, said):
    (tmp_path / "bad.geojson").write_text(content)
    command("segment", image, "--points", "bad.geojson").refused("bad.geojson", said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.geojson", "core.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--eta", "1.2"], "eta 1.2"),
        (["--target", "bone"], "classes are gland, stroma"),
        (["--out", "mask.jpg"], ".png"),
        (["--overlay", "overlay.gif"], ".jpg"),
        (["--soft", "soft.png"], ".npz"),
        (["--out", "core.png"], "replace an input"),
        (["--out", "a.png", "--overlay", "a.png"], "two results"),
        (["--encoder", "resnet18"], "--weights"),
        (["--weights", "hub"], "--encoder"),
        (["--encoder", "resnet18", "--weights", "missing.safetensors"], "missing.safetensors"),
        (["--side", "0"], "--side"),
        (["--data-weight", "-1"], "--data-weight"),
        (["--rule", "paper"], "--rule"),
    ],
)
def test_options_that_break_a_rule_are_refused(command, image, table, tmp_path, words, said):
    before = image.read_bytes()
    command("segment", image, "--points", table, *words).refused(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clicks.csv", "core.png"]
    assert image.read_bytes() == before


def test_files_that_do_not_exist_are_refused(command, image, table):
    command("segment", "nothing.png", "--points", table).refused("nothing.png", "does not exist")
    command("segment", image, "--points", "nothing.csv").refused("nothing.csv", "does not exist")
    command("segment", image).refused("--points")


def test_an_image_of_one_colour_is_refused(command, image, table, tmp_path):
    Image.new("RGB", (80, 50), (200, 180, 210)).save(image)
    command("segment", image, "--points", table).refused("alike", "one colour")
    assert not (tmp_path / "core_mask.png").exists()
