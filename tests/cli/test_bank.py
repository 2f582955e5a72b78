"""``tissuehint bank score`` on a tiny data folder: scores, the bank that a run finds, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from sklearn.metrics import f1_score

from tissuehint.methods.pbip import bank_files, build_bank
from tissuehint.testing import fake_labels
from tissuehint.testing.fakes import write_fake_folder

FROZEN = {"name": "test_resnet", "side": 32}
METHOD = {
    "name": "pbip",
    "encoder": {"name": "test_resnet"},
    "image_encoder": FROZEN,
    "bank": {"prototypes_per_class": 1},
}
LENIENT = {"prototypes_per_class": 1, "multi_tag_fallback": True}


@pytest.fixture(autouse=True)
def _no_warnings(monkeypatch):
    """Random weights are said elsewhere; here stderr holds what the command itself says."""
    monkeypatch.setattr("tissuehint.cli._warned", lambda *_, **__: None)


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
    """Pictures 0, 1 and 2 of training carry one tag each, of the others some two; val 9 and test 10 and 11 one."""
    return write_fake_folder(tmp_path_factory.mktemp("data") / "tissue", fake_labels())


@pytest.fixture
def recipe(tmp_path, data_folder):
    """Maker of recipe files, whose runs stand in ``runs``."""

    def make(name="tiny", **changes):
        values = {
            "name": name,
            "output": str(tmp_path / "runs"),
            "data": {"source": "folder", "root": str(data_folder), "workers": 0},
            "method": METHOD,
            "stage1": {"steps": 1, "batch_size": 2, "round_steps": 1},
            "stage2": None,
            "ceiling": False,
            "evaluation": {"gallery": 1},
            "trainer": {"accelerator": "cpu", "progress": False},
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**values, **changes}))
        return path

    return make


@pytest.fixture
def built(monkeypatch):
    """Banks that are built rather than read."""
    banks = []

    def counting(*words, **names):
        banks.append(build_bank(*words, **names))
        return banks[-1]

    monkeypatch.setattr(bank_files, "build_bank", counting)
    return banks


def scores_of(path):
    return json.loads(Path(path).read_text())


def test_table_and_file(command, recipe, tmp_path, built):
    outcome = command("bank", "score", recipe(), "--json", tmp_path / "scores.json")
    assert (outcome.code, outcome.err) == (0, "")
    found = scores_of(tmp_path / "scores.json")
    assert found.keys() == {"split", "similarity", "f1_mean", "accuracy", "f1", "confusion"}
    assert (found["split"], found["similarity"]) == ("test", "mean")
    names = [f"tissue_{number}" for number in range(3)]
    assert list(found["f1"]) == names
    confusion = torch.tensor(found["confusion"])
    assert confusion.sum(1).tolist() == [0, 1, 1]  # pictures 10 and 11
    truth = [row for row in range(3) for column in range(3) for _ in range(confusion[row, column])]
    given = [column for row in range(3) for column in range(3) for _ in range(confusion[row, column])]
    assert found["f1_mean"] == pytest.approx(f1_score(truth, given, average="macro"))
    assert found["accuracy"] == pytest.approx(sum(map(int.__eq__, truth, given)) / 2)
    assert "Image prompts: test, 2 patches with a single tag" in outcome.out
    assert f"accuracy {found['accuracy']:.3f}" in outcome.out
    rows = {line.split()[0]: line.split()[1:] for line in outcome.out.splitlines() if line.split()}
    for name, counts in zip(names, found["confusion"], strict=True):
        assert rows[name][1:] == [str(count) for count in counts]
        if found["f1"][name] is not None:
            assert rows[name][0] == f"{found['f1'][name]:.3f}"
    assert rows["all"] == [f"{found['f1_mean']:.3f}"]
    folder = tmp_path / "runs" / "tiny" / "stage1" / "prepared"
    assert f"pictures: {folder}" in outcome.out
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["bank.json", "bank.safetensors", "bank_0.png", "bank_1.png", "bank_2.png", "pictures.json"]
    )
    assert sorted(path.name for path in (tmp_path / "runs" / "tiny").iterdir()) == ["recipe.yaml", "stage1"]
    assert len(built) == 1


def test_a_run_finds_the_bank_and_shows_it(command, recipe, tmp_path, built):
    path = recipe()
    assert command("bank", "score", path).code == 0
    outcome = command("run", path, "--quiet")
    assert outcome.code == 0, outcome.err
    run = tmp_path / "runs" / "tiny"
    assert len(built) == 1
    assert (run / "stage1" / "done.json").is_file()
    page = (run / "report.html").read_text()
    assert "Image bank" in page
    assert "tissue_1: 1 patches; sub-classes" in page
    from safetensors.torch import load_file

    kept = load_file(str(run / "model" / "model.safetensors"))["bank_prototypes"]
    assert torch.equal(kept, built[0].prototypes)
    before = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    again = command("bank", "score", run, "--json", tmp_path / "of_run.json")
    assert again.code == 0, again.err
    assert command("bank", "score", path, "--json", tmp_path / "of_recipe.json").code == 0
    assert scores_of(tmp_path / "of_run.json") == scores_of(tmp_path / "of_recipe.json")
    assert len(built) == 1
    assert before == {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}


def test_the_other_way_round(command, recipe, built):
    phantom = {"train": 6, "val": 1, "test": 2, "size": 64}
    patches = {"side": 32, "stride": 32, "presence": 0.05}
    data = {"source": "phantom", "workers": 0, "phantom": phantom, "patches": patches}
    path = recipe(data=data, method={**METHOD, "bank": {**LENIENT, "max_white": 1}})
    outcome = command("run", path, "--quiet")
    assert outcome.code == 0, outcome.err
    outcome = command("bank", "score", path)
    assert outcome.code == 0, outcome.err
    assert len(built) == 1


@pytest.mark.parametrize(("split", "patches"), [("train", 3), ("val", 1), ("test", 2)])
def test_splits(command, recipe, tmp_path, built, split, patches):
    path = recipe()
    outcome = command("bank", "score", path, "--split", split, "--json", tmp_path / "scores.json")
    assert outcome.code == 0, outcome.err
    found = scores_of(tmp_path / "scores.json")
    assert found["split"] == split
    assert sum(map(sum, found["confusion"])) == patches
    assert f"Image prompts: {split}, {patches} patches" in outcome.out
    if split == "train":  # each of the three patches is its own prototype
        assert found["f1_mean"] == found["accuracy"] == 1
    if split == "val":
        assert None in found["f1"].values()
        assert "NaN" not in (tmp_path / "scores.json").read_text()


def test_similarity_nearest(command, recipe, tmp_path, monkeypatch, built):
    from tissuehint.methods.pbip import score

    asked = []
    original = score.score_bank
    monkeypatch.setattr(score, "score_bank", lambda *words, **names: asked.append(names) or original(*words, **names))
    path = recipe()
    for similarity, nearest in (("nearest", True), ("mean", False)):
        outcome = command("bank", "score", path, "--similarity", similarity, "--json", tmp_path / "scores.json")
        assert outcome.code == 0, outcome.err
        assert scores_of(tmp_path / "scores.json")["similarity"] == similarity
        assert asked[-1]["nearest"] is nearest
    assert len(built) == 1


def test_overrides_make_another_bank(command, recipe, tmp_path, built):
    path = recipe()
    assert command("bank", "score", path).code == 0
    words = (
        "-o",
        "name=other",
        "-o",
        "method.bank.multi_tag_fallback=true",
        "-o",
        "method.bank.prototypes_per_class=2",
    )
    outcome = command("bank", "score", path, *words)
    assert outcome.code == 0, outcome.err
    assert built[-1].counts == (2, 2, 2)
    for name in ("tissue_0", "tissue_1", "tissue_2"):
        assert any(
            line.startswith("note") and name in line and "multi_tag_fallback" in line
            for line in outcome.out.splitlines()
        )
    assert (tmp_path / "runs" / "other" / "stage1" / "prepared" / "bank.json").is_file()


def test_the_directory_of_another_recipe_is_refused(command, recipe, tmp_path):
    path = recipe()
    assert command("bank", "score", path).code == 0
    card = tmp_path / "runs" / "tiny" / "stage1" / "prepared" / "bank.json"
    before = card.read_bytes()
    command("bank", "score", path, "-o", "method.bank.images_per_prototype=5").refused("images_per_prototype", "name=")
    assert card.read_bytes() == before


def test_a_class_without_patches_of_its_own(command, recipe, tmp_path):
    path = recipe()
    command("bank", "score", path, "-o", "method.bank.prototypes_per_class=2").refused(
        "class tissue_0", "1 patches", "needs 2", "multi_tag_fallback: true"
    )
    assert not (tmp_path / "runs").exists()


def test_the_same_with_other_runs_beside(command, recipe, tmp_path):
    path = recipe()
    (tmp_path / "runs" / "earlier").mkdir(parents=True)
    command("bank", "score", path, "-o", "method.bank.prototypes_per_class=[1,3,1]").refused(
        "class tissue_1", "needs 3"
    )
    assert [each.name for each in (tmp_path / "runs").iterdir()] == ["earlier"]


def test_a_run_says_the_same(command, recipe, tmp_path):
    command("run", recipe(), "--quiet", "-o", "method.bank.prototypes_per_class=2").refused("class tissue_0", "needs 2")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.bank.prototypes_per_class=[1,1]", ["method.bank.prototypes_per_class", "[1, 1]", "3 tissue classes"]),
        ("method.bank.prototypes_per_class=0", ["method.bank.prototypes_per_class"]),
        ("method.bank.k=3", ["method.bank.k"]),
        ("method.bank.selection=best", ["method.bank.selection", "nearest"]),
        ("method.image_encoder.name=medclap", ["medclap"]),
        ("method.image_encoder.weights=gone.pt", ["gone.pt"]),
        ("data.root=gone", ["gone"]),
    ],
)
def test_wrong_values_leave_nothing(command, recipe, tmp_path, override, words):
    command("bank", "score", recipe(), "-o", override).refused(*words)
    assert not (tmp_path / "runs").exists()


def test_a_recipe_of_another_method(command, recipe, tmp_path):
    path = recipe(method={"name": "cam", "encoder": {"name": "test_resnet"}})
    command("bank", "score", path).refused("cam", "no image bank", "pbip")
    command("bank", "score", "cam/phantom").refused("cam", "no image bank", "pbip")
    assert not (tmp_path / "runs").exists()


def test_no_recipe_and_no_run(command, tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    command("bank", "score", folder).refused(str(folder))
    command("bank", "score", tmp_path / "gone.yaml").refused("gone.yaml")
    command("bank", "score", "pbip/phantoms").refused("pbip/phantoms")
    assert not list(folder.iterdir())


def test_a_folder_that_is_no_run(command, tmp_path):
    (tmp_path / "empty").mkdir()
    outcome = command("bank", "score", tmp_path / "empty")
    assert outcome.code == 2
    assert "empty" in outcome.err
    assert "is a folder without recipe.yaml, so no run" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize("damage", ["image", "bank"])
def test_the_bank_of_a_trained_model_is_never_made_anew(command, recipe, tmp_path, data_folder, built, damage):
    """Its prototypes are those of the network: another bank would be scored in its place."""
    shutil.copytree(data_folder, tmp_path / "copy")
    path = recipe(data={"source": "folder", "root": str(tmp_path / "copy"), "workers": 0})
    assert command("run", path, "--quiet").code == 0
    run = tmp_path / "runs" / "tiny"
    if damage == "image":
        first, second = (next((tmp_path / "copy").rglob(f"images/**/train_{n}.*")) for n in (0, 1))
        first.write_bytes(second.read_bytes())
    else:
        shutil.rmtree(run / "stage1" / "prepared")
    before = {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    for place in (run, path):
        outcome = command("bank", "score", place)
        assert outcome.code == 2
        words = {"image": "other training images, tags or encoder weights", "bank": "holds no image bank"}[damage]
        assert words in outcome.err
        assert outcome.err.count("\n") == 1
    assert before == {each: each.read_bytes() for each in run.rglob("*") if each.is_file()}
    assert len(built) == 1


def test_overrides_with_a_directory(command, recipe, tmp_path):
    path = recipe()
    assert command("bank", "score", path).code == 0
    run = tmp_path / "runs" / "tiny"
    before = (run / "recipe.yaml").read_bytes()
    command("bank", "score", run, "-o", "seed=1").refused(str(run), "-o")
    assert (run / "recipe.yaml").read_bytes() == before


def test_wrong_options(command, recipe, tmp_path):
    command("bank", "score", recipe(), "--split", "all").refused("--split", "train")
    command("bank", "score", recipe(), "--similarity", "largest").refused("--similarity", "nearest")
    command("bank", "score", recipe(), "-o", "seed").refused("seed")
    command("bank", "score").refused("recipe")
    assert not (tmp_path / "runs").exists()


def test_a_split_without_single_tags(command, recipe, tmp_path, data_folder):
    """The bank is whole then, and stays."""
    folder = shutil.copytree(data_folder, tmp_path / "pairs")
    table = folder / "labels.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    columns = [place for place, name in enumerate(lines[0]) if name.startswith("tag:")]
    for line in lines[1:]:
        if any("test_" in value for value in line):
            for column in columns:
                line[column] = "1"
    table.write_text("\n".join(",".join(line) for line in lines) + "\n")
    path = recipe(data={"source": "folder", "root": str(folder), "workers": 0})
    command("bank", "score", path).refused("single tag", "another split")
    assert not list(tmp_path.glob("*.json"))
    assert command("bank", "score", path, "--split", "val").code == 0


def test_a_damaged_bank(command, recipe, tmp_path):
    path = recipe()
    assert command("bank", "score", path).code == 0
    card = tmp_path / "runs" / "tiny" / "stage1" / "prepared" / "bank.json"
    card.write_text("{")
    command("bank", "score", path).refused(str(card), "damaged", "delete the folder")
    shutil.rmtree(card.parent)
    assert command("bank", "score", path).code == 0


def test_inside_the_directory_of_a_run(command, recipe, tmp_path, monkeypatch):
    assert command("bank", "score", recipe()).code == 0
    monkeypatch.chdir(tmp_path / "runs" / "tiny")
    outcome = command("bank", "score", ".")
    assert outcome.code == 0, outcome.err


def test_patches_are_scored_where_the_encoder_is(command, recipe, monkeypatch):
    from tissuehint.methods.pbip import PBIP, score

    asked = []

    def scored(items, bank, encoder, *, device="cpu", nearest=False):
        asked.append((torch.device(device), next(encoder.parameters()).device))
        raise KeyboardInterrupt

    path = recipe()
    assert command("bank", "score", path).code == 0
    monkeypatch.setattr("tissuehint.pipeline.inference.inference_device", lambda settings: torch.device("meta"))
    monkeypatch.setattr(PBIP, "prepare", lambda *_: None)
    monkeypatch.setattr(score, "score_bank", scored)
    command("bank", "score", path)
    assert asked
    assert asked[0][0] == asked[0][1]


FOLDS = {"folds": 2, "validation": 0.2}


def test_a_fold_has_the_bank_of_its_own_training_images(command, recipe, tmp_path, built):
    path = recipe(cross_validation={**FOLDS, "fold": 0}, method={**METHOD, "bank": LENIENT})
    outcome = command("run", path, "--quiet")
    assert outcome.code == 0, outcome.err
    card = tmp_path / "runs" / "tiny" / "fold_0" / "stage1" / "prepared" / "bank.json"
    before = card.read_bytes()
    outcome = command("bank", "score", card.parents[2])
    assert outcome.code == 0, outcome.err
    assert len(built) == 1
    assert card.read_bytes() == before


def test_a_cross_validation_is_refused_or_finds_its_banks(command, recipe, tmp_path):
    path = recipe(cross_validation=FOLDS, method={**METHOD, "bank": LENIENT})
    outcome = command("bank", "score", path)
    if outcome.code == 0:
        assert list((tmp_path / "runs" / "tiny").glob("fold_*/stage1/prepared/bank.json"))
        assert not (tmp_path / "runs" / "tiny" / "stage1").exists()
    else:
        outcome.refused("fold")
        assert not (tmp_path / "runs").exists()


def test_random_weights_are_one_line_on_stderr(command, recipe, tmp_path):
    import subprocess
    import sys

    words = [sys.executable, "-m", "tissuehint", "bank", "score", str(recipe())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("warning: image encoder 'test_resnet' has random weights")
