"""Recipes that extend others and runs that start from others, through the command line."""

from __future__ import annotations

import json

import pytest
import yaml

ONE_STAGE = ("-o", "stage2=null", "-o", "ceiling=false", "--quiet")


@pytest.fixture
def recipe_file(tmp_path, tiny_recipe):
    """A recipe of four lines that extends another file."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"name": "tiny", "published": {"paper": "1.0"}, **tiny_recipe}))
    path = folder / "other.yaml"
    path.write_text("extends: tiny.yaml\nname: other\ndata: {phantom: {seed: 5}}\nmethod: {levels: 2}\n")
    return path


def test_a_recipe_that_extends_another_runs_from_a_run_on_a_fraction(command, tmp_path, recipe_file):
    out = tmp_path / "runs"
    source = command("run", recipe_file, "--out", out, *ONE_STAGE)
    assert source.code == 0, source.err
    resolved = yaml.safe_load((out / "other" / "recipe.yaml").read_text())
    assert "extends" not in resolved
    assert (resolved["data"]["phantom"]["seed"], resolved["data"]["phantom"]["train"]) == (5, 6)
    assert (resolved["method"]["levels"], resolved["published"]) == (2, {"paper": "1.0"})
    words = ("-o", f"start_from={out / 'other'}", "-o", "data.train_fraction=0.25", "-o", "name=adapted")
    target = command("run", recipe_file, "--out", out, *words, "-o", "data.phantom.seed=6", *ONE_STAGE)
    assert target.code == 0, target.err
    assert "note  Trained on 2 of 6 training images" in target.out
    assert f"note  All trained weights started from those of the run {out / 'other'}." in target.out
    assert json.loads((out / "adapted" / "scores.json").read_text())["rows"]


@pytest.mark.parametrize(
    ("source", "words"),
    [("nowhere", ("is no directory", "give the directory")), (".", ("no scores.json", "finish that run first"))],
)
def test_a_wrong_source_is_refused_and_leaves_no_run_directory(command, tmp_path, recipe_file, source, words):
    path = tmp_path / source
    outcome = command("run", recipe_file, "--out", tmp_path / "runs", "-o", f"start_from={path}", "--quiet")
    outcome.refused(f"recipe key start_from = {path}", *words)
    assert not (tmp_path / "runs").exists()


def test_a_source_of_another_method_is_refused(command, tmp_path, recipe_file, tiny_run):
    changed = ("-o", f"start_from={tiny_run}", "-o", "method.encoder.name=test_resnet")
    command("run", recipe_file, "--out", tmp_path / "runs", *changed, "--quiet").refused("does not fit", "stage1")
    assert not (tmp_path / "runs").exists()


def test_a_limit_beside_a_fraction_is_refused(command, tmp_path, recipe_file):
    both = ("-o", "data.train_fraction=0.5", "-o", "data.train_limit=2")
    command("run", recipe_file, "--out", tmp_path / "runs", *both).refused("train_limit and train_fraction")
    assert not (tmp_path / "runs").exists()


def test_a_recipe_that_extends_itself_or_nothing_is_refused(command, tmp_path, recipe_file):
    base = recipe_file.with_name("tiny.yaml")
    base.write_text("extends: other.yaml\n")
    command("run", recipe_file, "--out", tmp_path / "runs").refused("extends itself", "other.yaml", "tiny.yaml")
    base.write_text("extends: cam/fantom\n")
    command("run", recipe_file, "--out", tmp_path / "runs").refused("tiny.yaml: extends cam/fantom", "cam/phantom")
    assert not (tmp_path / "runs").exists()
