from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

SMALL = {"train": 6, "val": 2, "test": 4, "size": 64}


@pytest.fixture(scope="module")
def folds_recipe(tmp_path_factory, tiny_recipe):
    values = {
        **tiny_recipe,
        "name": "folds",
        "data": {**tiny_recipe["data"], "phantom": SMALL},
        "cross_validation": {"folds": 2},
        "ceiling": False,
        "stage2": None,
        "evaluation": {"gallery": 0, "protocols": ["ignore_white"]},
    }
    path = tmp_path_factory.mktemp("recipe") / "folds.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_run_prints_means_resumes_and_goes_into_compare(command, folds_recipe, output):
    words = ("run", folds_recipe, "--out", output, "--quiet")
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    summary = json.loads((output / "folds" / "scores.json").read_text())
    values = next(row for row in summary["rows"] if row["gate"] == "predicted")["miou"]["values"]
    mean = f"{np.mean(values):.3f} +- {np.std(values, ddof=1):.3f}"
    assert mean in outcome.out
    assert f"fold 2 of 2: {output / 'folds' / 'fold_1'}" in outcome.out
    assert "sample standard deviation over 2 folds" in outcome.out
    assert "note  cross-validation: all 12 images" in outcome.out
    assert f"report: {output / 'folds' / 'report.html'}" in outcome.out

    again = command(*words)
    assert again.code == 0, again.err
    assert again.out.count("finished before; nothing is trained again") == 2
    assert mean in again.out

    one = command(*words, "-o", "cross_validation.fold=1")
    assert one.code == 0, one.err
    assert "Scores of fold_1" in one.out

    target = output / "difference.json"
    fold = output / "folds" / "fold_0"
    other = command("compare", output / "folds", "--against", fold, "--json", target)
    assert other.code == 0, other.err
    assert "A: 2 runs, B: 1 runs" in other.out
    rows = json.loads(target.read_text())["rows"]
    assert next(row for row in rows if row["gate"] == "predicted")["a"]["values"] == values


def test_seeds_are_means_over_the_folds(command, folds_recipe, output):
    outcome = command("run", folds_recipe, "--out", output, "--quiet", "--seeds", "0,1", "-o", "stage1.steps=1",
                      "-o", "stage1.round_steps=1")  # fmt: skip
    assert outcome.code == 0, outcome.err
    summary = json.loads((output / "folds-seeds.json").read_text())
    assert summary["runs"] == ["folds-seed0", "folds-seed1"]
    for row in summary["rows"]:
        for place, name in enumerate(summary["runs"]):
            rows = json.loads((output / name / "scores.json").read_text())["rows"]
            alike = next(one for one in rows if all(one[key] == row[key] for key in ("stage", "gate", "protocol")))
            assert row["miou"]["values"][place] == pytest.approx(alike["miou"]["mean"])
    assert "over the seeds 0, 1, of the means over the folds" in outcome.out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["folds=1"], ["cross_validation.folds = 1", "greater than or equal to 2"]),
        (["fold=2"], ["cross_validation", "fold 2", "2 folds", "0 to 1"]),
        (["folds=9"], ["cross_validation.folds = 9", "4 patients", "4 or fewer"]),
        (["folds=9", "fold=0"], ["cross_validation.folds = 9", "4 or fewer"]),
        (["flods=3"], ["cross_validation.flods", "nearest known keys", "folds"]),
        (["validation=1"], ["cross_validation.validation = 1", "less than 1"]),
    ],
)
def test_wrong_rules_are_refused_before_anything_is_written(command, folds_recipe, tmp_path, changes, words):
    options = [word for change in changes for word in ("-o", f"cross_validation.{change}")]
    command("run", folds_recipe, "--out", tmp_path / "runs", *options).refused(*words)
    assert not (tmp_path / "runs").exists()


def test_seeds_do_not_go_with_a_single_fold(command, folds_recipe, tmp_path):
    words = ("run", folds_recipe, "--out", tmp_path / "runs", "--seeds", "0,1", "-o", "cross_validation.fold=0")
    command(*words).refused("cross_validation.fold = 0", "--seeds")
    assert not (tmp_path / "runs").exists()
