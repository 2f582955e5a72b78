from __future__ import annotations

import errno
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image


@pytest.fixture
def recipe_file(tmp_path, tiny_recipe):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({"name": "tiny", **tiny_recipe}))
    return path


@pytest.fixture
def folder_recipe(tmp_path, tiny_recipe, tissue_folder):
    """A recipe on a data folder that a test may damage."""
    values = {**tiny_recipe, "name": "own", "data": {"source": "folder", "root": str(tissue_folder), "workers": 0}}
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_seeds_write_one_run_each_and_their_means(tiny_runs):
    summary = json.loads((tiny_runs / "tiny-seeds.json").read_text())
    assert summary["seeds"] == [0, 1]
    assert summary["runs"] == ["tiny-seed0", "tiny-seed1"]
    tables = [json.loads((tiny_runs / name / "scores.json").read_text())["rows"] for name in summary["runs"]]
    for row in summary["rows"]:
        keys = ("stage", "gate", "split", "protocol")
        values = [next(one for one in table if all(one[k] == row[k] for k in keys))["miou"] for table in tables]
        assert row["miou"]["values"] == values
        assert row["miou"]["mean"] == pytest.approx(np.mean(values))
        assert row["miou"]["std"] == pytest.approx(np.std(values, ddof=1))


def test_a_finished_run_says_so_and_prints_its_scores(command, tiny_runs, recipe_file):
    words = ("run", recipe_file, "--out", tiny_runs, "-o", "name=tiny-seed1", "--seed", 1, "--quiet")
    before = (tiny_runs / "tiny-seed1" / "stage2" / "done.json").read_text()
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    assert "finished before" in outcome.out
    assert (tiny_runs / "tiny-seed1" / "stage2" / "done.json").read_text() == before
    scores = json.loads((tiny_runs / "tiny-seed1" / "scores.json").read_text())
    first = next(row for row in scores["rows"] if row["stage"] == "stage2")
    assert f"result: mIoU {first['miou']:.3f}" in outcome.out
    assert "protocol A ignore_white, gate none, test" in outcome.out
    assert "over the tags alone" in outcome.out
    assert "trained with full masks (protocol A ignore_white, test)" in outcome.out
    assert f"report: {tiny_runs / 'tiny-seed1' / 'report.html'}" in outcome.out
    lines = outcome.out.splitlines()
    start = next(place for place, line in enumerate(lines) if line.endswith("test, protocol A ignore_white"))
    table = [line.split() for line in lines[start + 3 : start + 8]]
    expected = ["stage2 none", "stage1 predicted", "ceiling none", "stage1 oracle", "tags_only oracle"]
    assert [" ".join(line[:2]) for line in table] == expected


def test_what_stands_beside_the_scores_is_printed(capsys, tiny_run):
    from tissuehint.cli.experiments import Finished
    from tissuehint.cli.run import show
    from tissuehint.pipeline import RunResult

    scores = json.loads((tiny_run / "scores.json").read_text())
    show(Finished(RunResult(tiny_run, {**scores, "notes": ["3 patients are in train and in test"]}), 1.0))
    assert "note  3 patients are in train and in test" in capsys.readouterr().out
    show(Finished(RunResult(tiny_run, {**scores, "rows": [], "weak_full_ratio": None}), 1.0))
    assert "no image of the scored splits has a mask" in capsys.readouterr().out


def test_the_run_of_another_recipe_is_refused_and_not_called_finished(command, tiny_runs, recipe_file):
    outcome = command("run", recipe_file, "--out", tiny_runs, "-o", "name=tiny-seed1", "--seed", 5, "--quiet")
    assert outcome.code == 2
    assert "holds a run with seed = 1" in outcome.err
    assert "finished before" not in outcome.out


def test_demo_runs_its_recipe_and_says_how_to_go_on(command, tiny_run, monkeypatch, tmp_path):
    from tissuehint.pipeline import RunResult

    asked = []

    class Done(SimpleNamespace):
        data = SimpleNamespace(records=lambda split: ())

        def run(self):
            return RunResult(tiny_run, json.loads((tiny_run / "scores.json").read_text()))

    def experiment(recipe):
        asked.append(recipe)
        return Done()

    monkeypatch.setattr("tissuehint.pipeline.stages.Experiment", experiment)
    outcome = command("demo", "--out", tmp_path / "runs")
    assert outcome.code == 0, outcome.err
    assert asked[0].name == "cam-phantom"
    assert asked[0].output == str(tmp_path / "runs")
    for line in (
        "result: ",
        "gain: ",
        "weak/full ratio: ",
        "seconds: ",
        "report: ",
        "use the model: tissuehint predict",
    ):
        assert any(said.startswith(line) for said in outcome.out.splitlines()), line


def test_only_the_first_process_prints(command, tiny_run, recipe_file, monkeypatch, tmp_path):
    from tissuehint.pipeline import RunResult

    result = RunResult(tiny_run, json.loads((tiny_run / "scores.json").read_text()))
    monkeypatch.setattr("tissuehint.pipeline.stages.Experiment.run", lambda experiment: result)
    monkeypatch.setattr("tissuehint.pipeline.processes.is_writer", lambda: False)
    outcome = command("run", recipe_file, "--out", tmp_path / "runs", "--quiet")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")


def test_an_interrupted_run_says_how_to_resume(command, monkeypatch, recipe_file, tmp_path):
    def stopped(experiment):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise SystemExit(1)  # noqa: B904 (as Lightning does)

    monkeypatch.setattr("tissuehint.pipeline.stages.Experiment.run", stopped)
    outcome = command("run", recipe_file, "--out", tmp_path / "runs")
    assert outcome.code == 130
    assert outcome.err == f"error: interrupted; run the same command again to go on in {tmp_path / 'runs' / 'tiny'}\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["stage1.stepz=3"], ["stage1.stepz", "nearest known keys", "steps"]),
        (["stage2.network.encoder.nam=x"], ["stage2.network.encoder.nam", "name"]),
        (["stage1.steps=none"], ["stage1.steps", "none"]),
        (["method.name=cim"], ["cim", "cam"]),
        (["stage1.steps"], ["key=value"]),
        (["method.encoder.weights=gone.safetensors"], ["gone.safetensors", "does not exist"]),
        (["data.source=glass", "data.root=."], ["glass", "glas"]),
        (["data.source=folder", "data.root=gone"], ["gone"]),
    ],
)
def test_a_wrong_recipe_is_refused_before_anything_is_written(command, recipe_file, tmp_path, changes, words):
    options = [word for change in changes for word in ("-o", change)]
    command("run", recipe_file, "--out", tmp_path / "runs", *options).refused(*words)
    assert not (tmp_path / "runs").exists()


def test_unknown_recipe_and_seeds(command, recipe_file):
    command("run", "cam/phantoms").refused("cam/phantoms", "cam/phantom")
    command("run", recipe_file, "--seeds", "0,0").refused("--seeds 0,0")
    command("run", recipe_file, "--seeds", "0,1", "--seed", 1).refused("--seed")


def truncate_image(folder):
    path = folder / "images" / "phantom_train_0001.png"
    path.write_bytes(path.read_bytes()[:300])
    return path.name


def resize_mask(folder):
    path = folder / "masks" / "phantom_train_0001.png"
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(path)
    return path.name


def unknown_class(folder):
    path = folder / "masks" / "phantom_train_0001.png"
    Image.fromarray(np.full((64, 64), 9, np.uint8)).save(path)
    return path.name


def _change_table(folder, column, value):
    table = folder / "labels.csv"
    lines = [line.split(",") for line in table.read_text().splitlines()]
    lines[2][lines[0].index(column)] = value
    table.write_text("\n".join(",".join(line) for line in lines) + "\n")
    return "labels.csv:3"


def wrong_tag(folder):
    return _change_table(folder, "tag:gland", "2")


def wrong_sum(folder):
    return _change_table(folder, "proportion:gland", "0.987")


DAMAGES = [truncate_image, resize_mask, unknown_class, wrong_tag, wrong_sum]


@pytest.mark.parametrize("damage", DAMAGES)
def test_data_check_names_the_damage(command, tissue_folder, damage):
    place = damage(tissue_folder)
    outcome = command("data", "check", tissue_folder)
    assert outcome.code == 2
    assert any(place in line for line in outcome.out.splitlines()[:-1])
    assert outcome.out.splitlines()[-1].endswith("1 error, 0 warnings")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_on_damaged_data_is_refused_and_leaves_nothing(command, folder_recipe, tissue_folder, tmp_path, damage):
    place = damage(tissue_folder)
    command("run", folder_recipe, "--out", tmp_path / "deep" / "runs").refused(place)
    assert not (tmp_path / "deep").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing(command, recipe_file, tmp_path, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "runs"))

    monkeypatch.setattr("tissuehint.pipeline.training.save_weights", full)
    monkeypatch.setattr("tissuehint.files.Path.write_text", full)
    command("run", recipe_file, "--out", tmp_path / "runs").refused("disk is full")
    assert not (tmp_path / "runs").exists()


def test_a_run_that_has_work_is_kept_when_the_disk_is_full(command, tiny_run, recipe_file, tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "tiny-seed0"
    shutil.copytree(tiny_run, folder)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "scores.json")

    monkeypatch.setattr("tissuehint.pipeline.stages.Experiment.run", full)
    command("run", recipe_file, "--out", tmp_path / "runs", "-o", "name=tiny-seed0").refused(
        "scores.json", "disk is full"
    )
    assert (folder / "stage2" / "done.json").is_file()


def test_report_is_written_again(command, tiny_run, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    (folder / "report.html").unlink()
    outcome = command("report", folder)
    assert outcome.code == 0
    assert outcome.out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()
    command("report", tmp_path / "none").refused("none")
