from __future__ import annotations

import csv
import errno
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tissuehint.data.records import read_codes, read_image
from tissuehint.model import TissueModel


@pytest.fixture
def images(tissue_folder):
    return tissue_folder / "images"


def rows_of(folder):
    with (folder / "areas.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_files_are_those_of_the_model(command, tiny_run, images, tmp_path):
    out = tmp_path / "maps"
    outcome = command("predict", tiny_run, images / "phantom_test_*.png", "--out", out, "--soft", "--quiet")
    assert outcome.code == 0, outcome.err
    names = ("phantom_test_0000", "phantom_test_0001")
    endings = (".png", "_overlay.jpg", "_soft.npz")
    assert {path.name for path in out.iterdir()} == {"areas.csv", *(n + e for n in names for e in endings)}
    model = TissueModel.load(tiny_run)
    for name in names:
        expected = model.predict(images / f"{name}.png")
        mask = read_codes(out / f"{name}.png")
        assert (mask == expected.argmax(0).numpy()).all()
        soft = np.load(out / f"{name}_soft.npz")
        assert soft["probabilities"].dtype == np.float16
        assert np.abs(soft["probabilities"] - expected.numpy()).max() < 1e-3
        assert tuple(soft["classes"]) == model.labels.names
        assert Image.open(out / f"{name}.png").getpalette()[:3] == list(model.labels.colours[0])
        assert Image.open(out / f"{name}_overlay.jpg").size == (64, 64)


def test_areas_add_up(command, tiny_run, images, tmp_path):
    out = tmp_path / "maps"
    image = images / "phantom_test_0000.png"
    assert command("predict", tiny_run, image, "--out", out, "--um-per-px", 0.5, "--no-overlay").code == 0
    rows = rows_of(out)
    assert not (out / "phantom_test_0000_overlay.jpg").exists()
    assert {row["image"] for row in rows} == {str(image)}
    assert sum(int(row["pixels"]) for row in rows) == 64 * 64
    assert sum(float(row["mm2"]) for row in rows) == pytest.approx(64 * 64 * 0.25e-6, rel=1e-4)
    tissue = [float(row["percent_of_tissue"]) for row in rows if row["percent_of_tissue"]]
    assert sum(tissue) == pytest.approx(100, abs=1e-2) or not tissue
    white = next(row for row in rows if row["class"] == "white")
    assert white["percent_of_tissue"] == ""


def test_an_image_of_another_pixel_size_is_seen_at_the_models(command, tiny_run, images, tmp_path):
    model = TissueModel.load(tiny_run)
    assert model.um_per_px == 0.5
    large = tmp_path / "large.png"
    Image.open(images / "phantom_test_0000.png").resize((128, 128), Image.Resampling.BILINEAR).save(large)
    out = tmp_path / "maps"
    assert command("predict", tiny_run, large, "--out", out, "--um-per-px", 0.25, "--soft").code == 0
    soft = np.load(out / "large_soft.npz")["probabilities"]
    assert soft.shape[1:] == (128, 128)
    assert np.abs(soft.sum(0) - 1).max() < 0.01
    small = np.asarray(Image.open(large).resize((64, 64), Image.Resampling.BOX))
    there = model.predict(np.ascontiguousarray(small)).numpy()
    # two ways to halve an image differ in places, and the map is smoothed on its way back
    assert np.abs(soft[:, ::2, ::2] - there).mean() < 0.05
    assert read_codes(out / "large.png").shape == (128, 128)


def test_one_bad_image_does_not_stop_the_batch(command, tiny_run, images, tmp_path):
    (images / "phantom_test_0000.png").write_bytes(b"no image")
    out = tmp_path / "maps"
    outcome = command("predict", tiny_run, images, tmp_path / "gone.png", "--out", out, "--quiet")
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 3
    assert "phantom_test_0000.png" in lines[0]
    assert "gone.png" in lines[1]
    assert "does not exist" in lines[1]
    assert lines[2].startswith("error: 2 of 9 images have no result:")
    assert len(list(out.glob("*.png"))) == 7
    assert not (out / "phantom_test_0000.png").exists()
    assert len({row["image"] for row in rows_of(out)}) == 7


def test_results_never_replace_each_other_or_an_input(command, tiny_run, images, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(images / "phantom_test_0000.png", other / "PHANTOM_test_0000.png")
    out = tmp_path / "maps"
    command("predict", tiny_run, images, other, "--out", out).refused("phantom_test_0000", "rename")
    before = (other / "PHANTOM_test_0000.png").read_bytes()
    command("predict", tiny_run, other, "--out", other).refused("replace an input")
    assert (other / "PHANTOM_test_0000.png").read_bytes() == before
    assert not out.exists()


def test_results_of_an_earlier_run_are_replaced(command, tiny_run, images, tmp_path):
    out = tmp_path / "maps"
    out.mkdir()
    (out / "phantom_test_0000.png").write_bytes(b"old")
    assert command("predict", tiny_run, images / "phantom_test_0000.png", "--out", out).code == 0
    assert read_image(out / "phantom_test_0000.png").shape == (64, 64, 3)


def test_a_full_disk_leaves_no_part_behind(command, tiny_run, images, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("PIL.Image.Image.save", full)
    out = tmp_path / "maps"
    command("predict", tiny_run, images, "--out", out, "--quiet").refused("disk is full")
    assert list(out.iterdir()) == []


def test_bad_models_and_options(command, tiny_run, images, tmp_path):
    image, out = images / "phantom_test_0000.png", tmp_path / "maps"
    command("predict", tmp_path, image, "--out", out).refused("model.json")
    command("predict", tiny_run, tmp_path / "*.tif", "--out", out).refused("matches no file")
    command("predict", tiny_run, image, "--out", out, "--um-per-px", 0).refused("--um-per-px")
    broken = tmp_path / "model"
    shutil.copytree(tiny_run / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    command("predict", broken, image, "--out", out).refused("model.safetensors", "damaged")
    weights.unlink()
    command("predict", broken, image, "--out", out).refused("model.safetensors")
    assert not out.exists()


def test_cuda_where_there_is_none(command, tiny_run, images, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    command("predict", tiny_run, images, "--out", tmp_path / "m", "--device", "cuda").refused("cuda", "cpu")


def test_evaluate_a_model_gives_the_scores_of_its_run(command, tiny_run, tmp_path, monkeypatch):
    from tissuehint.data.phantom import write_phantom

    folder, target = tmp_path / "same", tmp_path / "scores.json"
    write_phantom(folder, count=(6, 2, 2), size=64)
    outcome = command("evaluate", tiny_run, "--data", folder, "--json", target, "--quiet", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    rows = json.loads(target.read_text())["rows"]
    ran = json.loads((tiny_run / "scores.json").read_text())["rows"]
    expected = [row for row in ran if row["stage"] == "stage2"]
    assert [row["protocol"] for row in rows] == [row["protocol"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row["miou"] == pytest.approx(other["miou"], abs=1e-6)
        assert row["boundary_miou"] == pytest.approx(other["boundary_miou"], abs=1e-6)


def test_evaluate_folders(command, tissue_folder, tmp_path):
    truth, predictions, target = tissue_folder / "masks", tmp_path / "predictions", tmp_path / "scores.json"
    shutil.copytree(truth, predictions)
    words = ("--classes", tissue_folder / "classes.json", "--json", target, "--quiet")
    outcome = command("evaluate", predictions, truth, *words)
    assert outcome.code == 0, outcome.err
    row = json.loads(target.read_text())["rows"][0]
    assert row["protocol"] == "five_class"
    assert row["accuracy"] == 1
    assert row["miou"] == 1
    # one image wrong everywhere: accuracy is the share of the other pixels
    wrong = predictions / "phantom_train_0000.png"
    Image.fromarray((read_codes(wrong) + 1) % 5).save(wrong)
    assert command("evaluate", predictions, truth, *words).code == 0
    count = len(list(truth.iterdir()))
    assert json.loads(target.read_text())["rows"][0]["accuracy"] == pytest.approx(1 - 1 / count)


def test_evaluate_refuses_what_cannot_be_scored(command, tissue_folder, tmp_path):
    truth, predictions, classes = tissue_folder / "masks", tmp_path / "predictions", tissue_folder / "classes.json"
    shutil.copytree(truth, predictions)
    command("evaluate", predictions).refused("MASKS")
    command("evaluate", predictions, truth).refused("--classes")
    command("evaluate", predictions, truth, "--classes", tmp_path / "no.json").refused("no.json", "does not exist")
    (tmp_path / "bad.json").write_text('{"classes": 3}')
    command("evaluate", predictions, truth, "--classes", tmp_path / "bad.json").refused("bad.json", "names")
    good = ("evaluate", predictions, truth, "--classes", classes, "--quiet")
    command(*good, "--protocol", "fp_on_white").refused("says white", "five_class")
    victim = predictions / "phantom_test_0001.png"
    Image.fromarray(np.full((64, 64), 255, np.uint8)).save(victim)
    command(*good).refused("phantom_test_0001.png", "255")
    Image.fromarray(np.zeros((64, 32), np.uint8)).save(victim)
    command(*good).refused("phantom_test_0001.png", "64 x 32")
    victim.unlink()
    command(*good).refused("no prediction", "phantom_test_0001")


def test_evaluate_refuses_other_classes(command, tiny_run, tmp_path, tissue_folder):
    path = tissue_folder / "classes.json"
    card = json.loads(path.read_text())
    names = {"gland": "stroma", "stroma": "gland"}
    path.write_text(json.dumps({**card, "names": [names.get(name, name) for name in card["names"]]}))
    command("evaluate", tiny_run, "--data", tissue_folder).refused("the model knows")
