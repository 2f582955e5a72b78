"""Cross-validation of a recipe: ordinary runs, and the table of their means."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

import tissuehint
from tests.pipeline.conftest import RECIPE
from tests.report.test_write_report import Page
from tissuehint.errors import InputError
from tissuehint.pipeline import load_recipe
from tissuehint.pipeline.cross_validation import fold_of
from tissuehint.pipeline.summary import mean_ratio, mean_rows, plain
from tissuehint.report import write_report

FOLDS = {
    **RECIPE,
    "name": "folds",
    "data": {**RECIPE["data"], "phantom": {"train": 8, "val": 2, "test": 4, "size": 64}},
    "cross_validation": {"folds": 2},
    "stage1": {"steps": 2, "batch_size": 2, "round_steps": 2},
    "stage2": {**RECIPE["stage2"], "steps": 2, "batch_size": 2},
    "evaluation": {"gallery": 1, "protocols": ["ignore_white"]},
}


def files_of(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change and content of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """(result, folder) of a finished cross-validation; read only."""
    output = tmp_path_factory.mktemp("folds")
    result = tissuehint.run(copy.deepcopy(FOLDS), output=str(output))
    return result, output / "folds"


def scores_of(folder: Path) -> list[dict]:
    return [json.loads((folder / f"fold_{fold}" / "scores.json").read_text()) for fold in range(2)]


def test_each_fold_is_a_whole_run_and_the_directory_holds_their_summary(folds):
    result, folder = folds
    assert result.path == folder
    assert {path.name for path in folder.iterdir()} == {
        "fold_0", "fold_1", "recipe.yaml", "scores.json", "report.html",
    }  # fmt: skip
    for fold in range(2):
        run = folder / f"fold_{fold}"
        for name in ("recipe.yaml", "environment.json", "scores.json", "report.html", "model/model.json"):
            assert (run / name).is_file()
        recipe = yaml.safe_load((run / "recipe.yaml").read_text())
        assert recipe["cross_validation"]["fold"] == fold
        notes = json.loads((run / "environment.json").read_text())["notes"]
        assert any("2 test folds" in note for note in notes)
    assert json.loads((folder / "scores.json").read_text()) == result.scores
    assert load_recipe(folder / "recipe.yaml").to_yaml() == (folder / "recipe.yaml").read_text()
    tested = [json.loads((folder / f"fold_{fold}/scores.json").read_text())["rows"][0]["images"] for fold in range(2)]
    assert sum(tested) == 14


def test_summary_is_the_mean_and_sample_deviation_of_the_folds(folds):
    result, folder = folds
    tables = [one["rows"] for one in scores_of(folder)]
    assert len(result.scores["rows"]) == len(tables[0])
    keys = ("stage", "gate", "split", "protocol", "name")
    for row in result.scores["rows"]:
        alike = [next(one for one in table if all(one[key] == row[key] for key in keys)) for table in tables]
        for key in ("miou", "dice_mean", "dice_from_miou", "accuracy", "fwiou", "boundary_miou"):
            values = [one[key] for one in alike]
            assert row[key]["values"] == values
            assert row[key]["mean"] == pytest.approx(np.mean(values))
            assert row[key]["std"] == pytest.approx(np.std(values, ddof=1))
        assert row["images"] == [one["images"] for one in alike]
        gland = [one["iou"]["gland"] for one in alike]
        if None not in gland:
            assert row["iou"]["gland"]["mean"] == pytest.approx(np.mean(gland))
    ratios = [one["weak_full_ratio"]["miou"] for one in scores_of(folder)]
    assert result.scores["weak_full_ratio"]["miou"]["std"] == pytest.approx(np.std(ratios, ddof=1))
    assert any("pooled" in note for note in result.scores["notes"])


def test_finished_folds_are_left_alone_and_a_lost_one_comes_back_the_same(folds, tmp_path):
    import shutil

    _, folder = folds
    shutil.copytree(folder, tmp_path / "folds")
    here = tmp_path / "folds"
    before = files_of(here / "fold_0")
    scores = (here / "scores.json").read_bytes()
    # as a kill in fold 1 leaves it: no summary, an unfinished fold
    for name in ("scores.json", "recipe.yaml", "report.html", "fold_1/scores.json", "fold_1/stage2/done.json"):
        (here / name).unlink()
    tissuehint.run(copy.deepcopy(FOLDS), output=str(tmp_path))
    assert files_of(here / "fold_0") == before
    assert (here / "scores.json").read_bytes() == scores


def test_one_fold_alone_is_the_run_that_all_folds_contain(folds, tmp_path):
    _, folder = folds
    one = tissuehint.run(copy.deepcopy(FOLDS), output=str(tmp_path), cross_validation__fold=1)
    assert one.path == tmp_path / "folds" / "fold_1"
    assert one.scores["rows"] == scores_of(folder)[1]["rows"]
    before = files_of(one.path)
    again = tissuehint.run(one.path / "recipe.yaml")
    assert again.path == one.path
    assert files_of(one.path) == before
    assert not (tmp_path / "folds" / "scores.json").exists()


def test_the_page_shows_means_and_leads_to_the_folds(folds):
    result, folder = folds
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    links = [link["href"] for link in page.all("a")]
    for fold in range(2):
        assert f"fold_{fold}/report.html" in links
        assert (folder / f"fold_{fold}/report.html").is_file()
    row = next(row for row in result.scores["rows"] if row["stage"] == "stage2")
    assert f"{row['miou']['mean']:.3f} ± {row['miou']['std']:.3f}" in page.text
    for value in row["miou"]["values"]:
        assert f"{value:.3f}" in page.text
    assert "not finished" not in page.text
    assert "pooled" in page.text
    assert "2 folds" in page.text
    before = (folder / "report.html").read_bytes()
    write_report(folder)
    assert (folder / "report.html").read_bytes() == before


def test_no_model_for_all_folds(folds):
    result, folder = folds
    with pytest.raises(InputError, match="model"):
        result.model()
    assert tissuehint.TissueModel.load(folder / "fold_0" / "model").labels.names


def test_another_run_under_the_same_name_is_refused(folds, tmp_path):
    _, folder = folds
    with pytest.raises(InputError, match=r"cross_validation\.folds"):
        tissuehint.run({**FOLDS, "cross_validation": {"folds": 3}}, output=str(folder.parent))
    with pytest.raises(InputError, match=r"cross_validation\.folds"):
        tissuehint.run({**FOLDS, "cross_validation": None}, output=str(folder.parent))
    with pytest.raises(InputError, match="seed"):
        tissuehint.run(copy.deepcopy(FOLDS), output=str(folder.parent), seed=8, cross_validation__fold=0)
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds" / "letter.txt").write_text("mine")
    for changes in ({}, {"cross_validation__fold": 1}):
        with pytest.raises(InputError, match="not empty"):
            tissuehint.run(copy.deepcopy(FOLDS), output=str(tmp_path), **changes)


def test_fold_of_keeps_everything_but_place_and_fold():
    recipe = load_recipe(FOLDS)
    one = fold_of(recipe, 1)
    assert (one.name, one.output, one.cross_validation.fold) == ("fold_1", str(Path("runs") / "folds"), 1)
    assert fold_of(one, 1) is one
    kept = {"name", "output", "cross_validation"}
    assert one.model_dump(exclude=kept) == recipe.model_dump(exclude=kept)


def test_means_where_a_run_lacks_a_row_or_a_score():
    def row(stage, miou, gland):
        names = {"stage": stage, "gate": "none", "split": "test", "protocol": "five_class", "name": "m"}
        return {**names, "miou": miou, "iou": {"gland": gland}, "images": 3, "boundary_distance": 2}

    tables = [
        [row("stage2", 0.5, None)],
        [row("stage2", None, 0.25) | {"boundary_distance": 4}],
        [row("stage2", 0.75, 0.5), row("ceiling", 1.0, 1.0)],
    ]
    first, second = mean_rows(tables)
    assert first["miou"] == {
        "mean": 0.625,
        "std": pytest.approx(np.std([0.5, 0.75], ddof=1)),
        "values": [0.5, None, 0.75],
    }
    assert first["iou"]["gland"]["mean"] == 0.375
    assert first["images"] == [3, 3, 3]
    assert first["boundary_distance"] == "2 or 4"
    assert second["stage"] == "ceiling"
    assert second["miou"]["values"] == [None, None, 1.0]
    assert math.isnan(second["miou"]["std"])
    assert plain(first)["miou"] == 0.625
    assert plain(first)["iou"] == {"gland": 0.375}
    assert plain(first)["images"] == 9
    assert mean_ratio([{"miou": 0.9, "split": "test"}, None]) is None
    assert mean_ratio([{"miou": 0.9, "split": "test"}, {"miou": 0.7, "split": "test"}])["miou"][
        "mean"
    ] == pytest.approx(0.8)
