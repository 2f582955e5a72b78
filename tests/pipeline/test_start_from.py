"""A run that starts from the weights of a finished one: what it takes over, what it refuses, how it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tissuehint
from tissuehint.data.module import load_dataset
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.pipeline import load_recipe
from tissuehint.pipeline.stages import Experiment
from tissuehint.pipeline.training import Fit, SeedEachStep

STAGES = ("stage1", "stage2", "ceiling")
# other tissue than that of the source, two steps, and a rate at which nothing moves
STILL = {
    "name": "target",
    "data.phantom.seed": 7,
    "stage1": {"steps": 2},
    "stage2": {"steps": 2, "optimization": {"learning_rate": 1e-12}},
    "method.optimization.learning_rate": 1e-12,
    "evaluation.gallery": 0,
}
ONE_STAGE = {"stage2": None, "ceiling": False}


def weights(run: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(run / stage / "weights.safetensors")


@pytest.fixture(scope="module")
def still(finished, tmp_path_factory):
    """(source, target that started from it and hardly moved, state of each module when its training began)."""
    source = finished[0].path
    begun = {}
    fit = Fit.fit

    def watched(self, module, *words, **names):
        begun[self.folder.name] = {name: value.clone() for name, value in module.state_dict().items()}
        fit(self, module, *words, **names)

    recipe = yaml.safe_load((source / "recipe.yaml").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fit, "fit", watched)
        overrides = {**STILL, "start_from": str(source), "output": str(tmp_path_factory.mktemp("still"))}
        result = tissuehint.run(recipe, **overrides)
    return source, result, begun


class TestStart:
    @pytest.mark.parametrize("stage", STAGES)
    def test_each_stage_begins_with_the_weights_of_the_source(self, still, stage):
        source, _, begun = still
        expected = weights(source, stage)
        assert begun[stage].keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(begun[stage][name], value), name

    @pytest.mark.parametrize("stage", STAGES)
    def test_with_a_tiny_rate_it_ends_near_them(self, still, stage):
        source, result, _ = still
        before, after = weights(source, stage), weights(result.path, stage)
        learnt = [name for name in before if "running_" not in name and "num_batches" not in name]
        assert learnt
        for name in learnt:
            torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-6)

    def test_scores_have_the_rows_of_any_run_and_say_where_it_started(self, still):
        source, result, _ = still
        scores = json.loads((result.path / "scores.json").read_text())
        assert {row["stage"] for row in scores["rows"]} == {"tags_only", "pseudo_masks", *STAGES}
        assert scores["weak_full_ratio"] is not None
        assert f"All trained weights started from those of the run {source}." in scores["notes"]
        for stage in STAGES:
            assert json.loads((result.path / stage / "done.json").read_text())["start_from"] == str(source / stage)
        assert yaml.safe_load((result.path / "recipe.yaml").read_text())["start_from"] == str(source)

    def test_without_it_nothing_is_said(self, finished):
        assert not any("started from" in note for note in finished[0].scores["notes"])
        assert b"start_from" not in finished[1]["stage1/done.json"]

    def test_the_recipe_of_the_run_reads_back_and_finds_it_finished(self, still):
        _, result, _ = still
        before = (result.path / "stage1" / "done.json").read_bytes()
        assert tissuehint.run(result.path / "recipe.yaml").path == result.path
        assert (result.path / "stage1" / "done.json").read_bytes() == before

    def test_one_stage_alone_and_home_is_expanded(self, recipe, finished, monkeypatch):
        monkeypatch.setenv("HOME", str(finished[0].path.parent))
        result = tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from="~/tiny")
        done = json.loads((result.path / "stage1" / "done.json").read_text())
        assert done["start_from"] == str(finished[0].path / "stage1")
        assert not (result.path / "stage2").exists()

    def test_full_supervision_alone_starts_from_the_ceiling(self, recipe, finished):
        recipe |= {"method": None, "ceiling": False}
        overrides = {key: value for key, value in STILL.items() if not key.startswith(("stage1", "method"))}
        result = tissuehint.run(recipe, **overrides, data__labels="masks", start_from=str(finished[0].path))
        after = weights(result.path, "ceiling")
        for name, value in weights(finished[0].path, "ceiling").items():
            if "running_" not in name and "num_batches" not in name:
                torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)

    def test_a_fraction_of_the_images_is_noted(self, recipe, finished):
        overrides = {**STILL, **ONE_STAGE, "data.train_fraction": 0.4}
        result = tissuehint.run(recipe, **overrides, start_from=str(finished[0].path))
        assert any("Trained on 2 of 5 training images" in note for note in result.scores["notes"])

    def test_the_seed_draws_the_same_with_and_without(self, recipe, finished):
        def numbers(**start):
            experiment = Experiment(load_recipe(recipe, start))
            method = experiment._method()
            stage2 = experiment._network(experiment.recipe.stage2)
            experiment._start({"stage1": method, "stage2": stage2})
            return torch.rand(4)

        assert torch.equal(numbers(), numbers(start_from=str(finished[0].path)))

    def test_what_a_method_prepares_comes_on_top(self, recipe, finished, monkeypatch):
        from tissuehint.methods.cam import CAM

        seen = {}

        def prepare(self, data, cache):
            first = next(iter(self.state_dict()))
            seen["prepared"] = torch.equal(self.state_dict()[first], weights(finished[0].path, "stage1")[first])
            self.state_dict()[first].fill_(0.25)

        def fit(self, module, *words, **names):
            seen["fitted"] = next(iter(module.state_dict().values())).unique().tolist()
            raise KeyboardInterrupt

        monkeypatch.setattr(CAM, "prepare", prepare)
        monkeypatch.setattr(Fit, "fit", fit)
        with pytest.raises(KeyboardInterrupt):
            tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(finished[0].path))
        assert seen == {"prepared": True, "fitted": [0.25]}


class TestGoingOn:
    """Stages that this run has begun or finished need the source no more."""

    @pytest.fixture
    def source(self, finished, tmp_path):
        return shutil.copytree(finished[0].path, tmp_path / "source")

    def test_a_finished_stage_wins_over_a_source_that_is_gone(self, recipe, source):
        recipe |= ONE_STAGE
        first = tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(source))
        before = weights(first.path, "stage1")
        shutil.rmtree(source)
        again = tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(source), evaluation={"splits": ["val"]})
        assert {row["split"] for row in again.scores["rows"]} == {"val"}
        assert all(torch.equal(value, before[name]) for name, value in weights(first.path, "stage1").items())

    def test_a_killed_run_goes_on_to_the_same_weights(self, recipe, source, monkeypatch):
        recipe |= {**ONE_STAGE, "start_from": str(source)}
        whole = tissuehint.run(recipe, name="whole")
        step = SeedEachStep.on_train_batch_start

        def stop(self, trainer, *others):
            if trainer.global_step == 3:
                raise KeyboardInterrupt
            step(self, trainer, *others)

        with monkeypatch.context() as patch:
            patch.setattr(SeedEachStep, "on_train_batch_start", stop)
            with pytest.raises(KeyboardInterrupt):
                tissuehint.run(recipe, name="killed")
        shutil.rmtree(source)
        killed = tissuehint.run(recipe, name="killed")
        expected = weights(whole.path, "stage1")
        for name, value in weights(killed.path, "stage1").items():
            assert torch.equal(value, expected[name]), name

    def test_another_source_is_another_recipe(self, recipe, finished, source):
        tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(source))
        with pytest.raises(InputError, match=r"holds a run with start_from = "):
            tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(finished[0].path))


class TestRefusals:
    """One line with value, rule and fix, before anything is written."""

    @pytest.fixture
    def source(self, finished, tmp_path):
        """A copy to damage."""
        return shutil.copytree(finished[0].path, tmp_path / "source")

    def refused(self, recipe, source, *words, **overrides):
        with pytest.raises(InputError) as caught:
            tissuehint.run(recipe, **{**STILL, **overrides}, start_from=str(source))
        message = str(caught.value)
        assert message.startswith(f"recipe key start_from = {source}: ")
        assert "\n" not in message
        for word in words:
            assert word in message, message
        assert not Path(recipe["output"]).exists()

    def test_no_such_directory(self, recipe, tmp_path):
        self.refused(recipe, tmp_path / "none", "is no directory", "give the directory of a finished run")

    def test_a_directory_without_a_run(self, recipe, tmp_path):
        self.refused(recipe, tmp_path, "no scores.json", "finish that run first")

    @pytest.mark.parametrize("text", ["{", "[]", '{"labels": 3}', "{}"])
    def test_damaged_scores(self, recipe, source, text):
        (source / "scores.json").write_text(text)
        self.refused(recipe, source, "damaged scores.json")

    def test_a_cross_validation(self, recipe, source):
        scores = json.loads((source / "scores.json").read_text())
        (source / "scores.json").write_text(json.dumps({**scores, "cross_validation": {"folds": 4}}))
        self.refused(recipe, source, "is a cross-validation", "source/fold_0")

    @pytest.mark.parametrize("name", ["done.json", "weights.safetensors"])
    @pytest.mark.parametrize(
        ("stage", "fix"), [("stage1", "same method"), ("stage2", "stage2: null"), ("ceiling", "ceiling: false")]
    )
    def test_a_stage_that_is_not_finished(self, recipe, source, stage, fix, name):
        (source / stage / name).unlink()
        self.refused(recipe, source, f"has no finished {stage}", fix)

    def test_what_is_not_needed_may_lack(self, recipe, source):
        shutil.rmtree(source / "ceiling")
        shutil.rmtree(source / "stage2")
        assert tissuehint.run(recipe, **{**STILL, **ONE_STAGE}, start_from=str(source)).scores["rows"]

    def test_other_classes(self, recipe, finished, monkeypatch):
        dataset = load_dataset(load_recipe(recipe).data)
        space = dataset.labels
        turned = LabelSpace((*space.tissue[::-1], *space.names[space.num_tissue :]), white=space.white)
        monkeypatch.setattr("tissuehint.pipeline.stages.load_dataset", lambda config: replace(dataset, labels=turned))
        self.refused(recipe, finished[0].path, f"classes {', '.join(space.names)}; here they are", "same order")

    def test_another_encoder(self, recipe, finished):
        changed = {"method.encoder.name": "mobilenetv3_small_050"}
        self.refused(recipe, finished[0].path, "does not fit", "stage1 there lacks", "such as", **changed)

    def test_another_network_of_stage_two(self, recipe, finished):
        changed = {"stage2.network.architecture": "unet"}
        self.refused(recipe, finished[0].path, "does not fit", "stage2 there lacks", **changed)

    def test_other_shapes(self, recipe, finished):
        changed = {"stage2.network.decoder": {"decoder_segmentation_channels": 64}}
        self.refused(recipe, finished[0].path, "stage2 there has", "here it is [", **changed)

    def test_a_damaged_weights_file(self, recipe, source):
        path = source / "stage2" / "weights.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
        self.refused(recipe, source, "damaged stage2/weights.safetensors")
