import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import tissuehint
from tissuehint.data.phantom import PHANTOM_LABELS
from tissuehint.errors import InputError
from tissuehint.files import write_json
from tissuehint.pipeline import Recipe, load_recipe
from tissuehint.pipeline.directory import RunDirectory
from tissuehint.pipeline.stages import Experiment
from tissuehint.pipeline.training import SeedEachStep, WholeCheckpoints
from tissuehint.testing.contract import unreadable_masks
from tissuehint.testing.fakes import fake_dataset, fake_labels, write_fake_folder

SCORE_KEYS = {
    "stage", "name", "gate", "split", "protocol", "protocol_id", "miou", "fwiou", "dice_mean", "dice_from_miou",
    "accuracy", "iou", "boundary_miou", "boundary_iou", "boundary_distance", "boundary_miou_d1", "kappa", "auc",
    "precision", "proportion_mae", "proportion_mae_mean", "proportion_kl", "proportion_w1", "images",
    "pixels", "calibration_error",
}  # fmt: skip


def finite(value):
    """As JSON writes it: NaN is null, tuples are lists."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rows_of(scores, **wanted):
    return [row for row in scores["rows"] if all(row[key] == value for key, value in wanted.items())]


PROTOCOLS = {"A": "ignore_white", "B": "fp_on_white", "C": "five_class"}


class TestFinishedRun:
    def test_every_documented_file_is_there_and_nothing_half_written(self, finished):
        _, files = finished
        expected = {"recipe.yaml", "environment.json", "scores.json", "report.html", "gallery/index.json"}
        expected |= {"model/model.safetensors", "model/model.json", "pseudo_masks/done.json"}
        expected |= {
            f"{stage}/{name}"
            for stage in ("stage1", "stage2", "ceiling")
            for name in ("weights.safetensors", "metrics.csv", "done.json")
        }
        expected |= {f"pseudo_masks/phantom_train_{index:04d}.png" for index in range(5)}
        assert expected <= files.keys()
        assert not [name for name in files if ".part" in name or name.endswith(".ckpt")]
        assert not [name for name in files if Path(name).name.startswith(".")]

    def test_recipe_reads_back_to_the_same_recipe(self, finished):
        result, _ = finished
        again = load_recipe(result.path / "recipe.yaml")
        assert isinstance(again, Recipe)
        assert again.to_yaml() == (result.path / "recipe.yaml").read_text()
        assert again.stage2.steps == 6

    def test_environment_says_versions_seed_and_notes(self, finished):
        _, files = finished
        environment = json.loads(files["environment.json"])
        assert environment["seed"] == 3
        assert environment["torch"] == str(torch.__version__)
        assert environment["tissuehint"] == tissuehint.__version__
        assert environment["packages"]["timm"]
        assert any("synthetic" in note for note in environment["notes"])

    def test_pseudo_masks_are_palette_images_of_tagged_classes(self, finished):
        result, _ = finished
        dataset = tissuehint.pipeline.stages.load_dataset(load_recipe(result.path / "recipe.yaml").data)
        for record in dataset.splits["train"]:
            with Image.open(result.path / "pseudo_masks" / f"{record.id}.png") as picture:
                assert picture.mode == "P"
                assert picture.getpalette()[:3] == list(PHANTOM_LABELS.colours[0])
                values = set(np.unique(np.asarray(picture)).tolist())
            allowed = set(np.flatnonzero(record.tags.values).tolist()) | {PHANTOM_LABELS.white, 255}
            assert values <= allowed

    def test_done_marks_say_what_was_done(self, finished):
        _, files = finished
        done = json.loads(files["stage2/done.json"])
        assert (done["steps"], done["batch_size"]) == (6, 4)
        assert done["seconds"] > 0
        assert json.loads(files["pseudo_masks/done.json"])["images"] == 5

    def test_scores_file_is_what_the_run_returns(self, finished):
        result, files = finished
        assert json.loads(files["scores.json"]) == finite(result.scores)

    def test_score_rows(self, finished):
        scores = finished[0].scores
        kinds = {(row["stage"], row["gate"], row["split"]) for row in scores["rows"]}
        assert kinds == {
            ("tags_only", "oracle", "test"),
            ("stage1", "predicted", "test"),
            ("stage1", "oracle", "test"),
            ("stage2", "none", "test"),
            ("ceiling", "none", "test"),
            ("pseudo_masks", "oracle", "train"),
        }
        for stage, gate, split in kinds:
            rows = rows_of(scores, stage=stage, gate=gate, split=split)
            # a pseudo mask that says white has no second choice, which A and B would ask for
            expected = ["C"] if stage == "pseudo_masks" else ["A", "B", "C"]
            assert [row["protocol_id"] for row in rows] == expected
            assert [row["protocol"] for row in rows] == [PROTOCOLS[letter] for letter in expected]
            for row in rows:
                assert row.keys() - {"ignored"} == SCORE_KEYS
                assert set(row["iou"]) == set(PHANTOM_LABELS.tissue)
                assert 0 <= row["miou"] <= 1
                assert row["images"] == (5 if split == "train" else 3)
            # A counts fewer pixels (no white truth), B and C count all; A is never below B
            assert rows[0]["pixels"] <= rows[-1]["pixels"] == row["images"] * 64 * 64
            if len(rows) == 3:
                assert rows[1]["pixels"] == rows[2]["pixels"]
                assert rows[0]["miou"] >= rows[1]["miou"] - 1e-12
        assert all("ignored" in row for row in rows_of(scores, stage="pseudo_masks"))

    def test_weak_full_ratio_is_stage_two_over_ceiling(self, finished):
        scores = finished[0].scores
        weak, full = (rows_of(scores, stage=stage, protocol_id="A")[0] for stage in ("stage2", "ceiling"))
        ratio = scores["weak_full_ratio"]
        assert (ratio["split"], ratio["protocol"]) == ("test", "ignore_white")
        for key in ("miou", "dice_mean", "accuracy", "boundary_miou"):
            assert ratio[key] == pytest.approx(weak[key] / full[key], nan_ok=True)

    def test_gallery_has_every_layer_it_names(self, finished):
        result, files = finished
        index = json.loads(files["gallery/index.json"])
        assert len(index["items"]) == 2
        for item in index["items"]:
            explained = {"class_maps_1", "class_maps_2", "class_maps_3"}
            assert set(item["layers"]) == {"image", "truth", "pseudo_mask", "prediction", "tissue_map"} | explained
            for name in item["layers"].values():
                with Image.open(result.path / "gallery" / name) as picture:
                    assert picture.size == (64, 64)

    def test_model_is_stage_two_and_carries_its_own_scores(self, finished):
        result, _ = finished
        model = result.model()
        assert model.architecture["kind"] == "network"
        assert model.um_per_px == 0.5
        noted = model.notes["scores"]
        assert {(row["stage"], row["split"]) for row in noted} == {("stage2", "test")}
        assert noted == finite([row for row in result.scores["rows"] if row["stage"] == "stage2"])

    def test_model_gives_the_scores_of_the_run(self, finished):
        result, _ = finished
        model = result.model()
        dataset = tissuehint.pipeline.stages.load_dataset(load_recipe(result.path / "recipe.yaml").data)
        confusion = np.zeros((4, 4), np.int64)
        for record in dataset.splits["test"]:
            truth = record.read_mask(PHANTOM_LABELS).astype(np.int64)
            seen = model.predict(record.read_image())[:4].argmax(0).numpy()
            counted = truth < 4
            np.add.at(confusion, (truth[counted], seen[counted]), 1)
        row = rows_of(result.scores, stage="stage2", protocol_id="A")[0]
        assert row["miou"] == pytest.approx(tissuehint.metrics.scores(confusion)["miou"])

    def test_report_is_one_file_with_scores_and_recipe(self, finished):
        page = finished[1]["report.html"].decode()
        assert "tiny" in page
        assert "99.9 mIoU" in page
        assert 'src="http' not in page

    def test_running_again_changes_nothing(self, finished):
        result, files = finished
        again = tissuehint.run(result.path / "recipe.yaml")
        assert again.path == result.path
        assert finite(again.scores) == finite(result.scores)
        for name, content in files.items():
            assert (result.path / name).read_bytes() == content, name


class TestOtherShapesOfRuns:
    def test_labels_masks_trains_the_ceiling_alone(self, recipe):
        recipe["data"]["labels"] = "masks"
        recipe["evaluation"]["gallery"] = 1
        del recipe["method"], recipe["ceiling"]
        result = tissuehint.run(recipe)
        assert {row["stage"] for row in result.scores["rows"]} == {"ceiling"}
        assert result.scores["weak_full_ratio"] is None
        assert not (result.path / "stage1").exists()
        assert not (result.path / "pseudo_masks").exists()
        assert not (result.path / "stage2").exists()
        assert {row["stage"] for row in result.model().notes["scores"]} == {"ceiling"}

    def test_without_stage_two_the_method_is_the_model(self, recipe):
        recipe |= {"stage2": None, "ceiling": False}
        result = tissuehint.run(recipe)
        assert not (result.path / "pseudo_masks").exists()
        model = result.model()
        assert model.architecture == {**model.architecture, "kind": "method", "name": "cam"}
        assert {(row["stage"], row["gate"]) for row in model.notes["scores"]} == {("stage1", "predicted")}
        image = np.full((70, 90, 3), 120, np.uint8)
        assert model.predict(image).shape == (5, 70, 90)

    def test_a_folder_with_tags_and_no_mask_at_all(self, recipe, tmp_path):
        recipe["data"] = {"source": "folder", "root": str(tmp_path / "data"), "workers": 0}
        recipe["ceiling"] = False
        recipe["stage2"]["keep"] = "last"
        write_fake_folder(tmp_path / "data", fake_labels(), masks=False)
        result = tissuehint.run(recipe)
        assert result.scores["rows"] == []
        assert result.report.is_file()
        assert len(list((result.path / "pseudo_masks").glob("*.png"))) == 8
        assert result.model().predict(np.full((64, 64, 3), 90, np.uint8)).shape == (4, 64, 64)

    def test_patches_slide_over_larger_images(self, recipe):
        recipe["data"]["patches"] = {"side": 48, "stride": 32, "resize": 64}
        recipe |= {"stage2": None, "ceiling": False}
        result = tissuehint.run(recipe)
        assert result.model().grid.side == 48
        assert {row["images"] for row in result.scores["rows"]} == {3}

    def test_another_evaluation_scores_again_without_training(self, recipe):
        recipe |= {"stage2": None, "ceiling": False}
        first = tissuehint.run(recipe)
        weights = first.path / "stage1" / "weights.safetensors"
        before = weights.stat().st_mtime_ns
        second = tissuehint.run(recipe, evaluation={"oracle": False, "splits": ["val", "test"]})
        assert weights.stat().st_mtime_ns == before
        assert {(row["stage"], row["split"]) for row in second.scores["rows"]} == {
            ("stage1", "val"),
            ("stage1", "test"),
        }
        predicted = [rows_of(each.scores, stage="stage1", gate="predicted", split="test") for each in (first, second)]
        assert finite(predicted[0]) == finite(predicted[1])


class TestRefusals:
    """Nothing is written before everything that can refuse the recipe has spoken."""

    def refused(self, recipe, tmp_path, text, **overrides):
        with pytest.raises(InputError, match=text):
            tissuehint.run(recipe, **overrides)
        assert not (tmp_path / "runs").exists()

    def test_missing_encoder_weights(self, recipe, tmp_path):
        self.refused(
            recipe, tmp_path, r"none\.safetensors", method__encoder__weights=str(tmp_path / "none.safetensors")
        )

    def test_missing_weights_of_stage_two(self, recipe, tmp_path):
        missing = str(tmp_path / "none.safetensors")
        self.refused(recipe, tmp_path, r"none\.safetensors", stage2__network__encoder__weights=missing)

    def test_missing_data_folder(self, recipe, tmp_path):
        recipe["data"] = {"source": "folder", "root": str(tmp_path / "nowhere")}
        self.refused(recipe, tmp_path, "nowhere")

    def test_unknown_encoder(self, recipe, tmp_path):
        self.refused(recipe, tmp_path, "resnet1o", method__encoder__name="resnet1o")

    def test_keep_best_without_validation_masks(self, recipe, tmp_path):
        self.refused(recipe, tmp_path, "keep", data__phantom__val=0)

    @pytest.mark.parametrize(("key", "value"), [("accelerator", "cpuu"), ("devices", 0), ("precision", "3-bit")])
    def test_trainer_settings_that_lightning_refuses(self, recipe, tmp_path, key, value):
        self.refused(recipe, tmp_path, "recipe key trainer", **{f"trainer__{key}": value})

    @pytest.mark.parametrize("key", ["pseudo_masks__stride", "evaluation__stride"])
    def test_inference_windows_with_gaps(self, recipe, tmp_path, key):
        patches = {"side": 48, "stride": 48}
        self.refused(recipe, tmp_path, "stride 49 is larger", data__patches=patches, **{key: 49})

    def test_ceiling_without_masks(self, recipe, tmp_path, monkeypatch):
        bare = fake_dataset(fake_labels(), masks=False)
        monkeypatch.setattr("tissuehint.pipeline.stages.load_dataset", lambda config: bare)
        recipe["stage2"]["keep"] = "last"
        self.refused(recipe, tmp_path, "mask")

    def test_no_hint_of_the_kind_the_method_needs(self, recipe, monkeypatch):
        labels = fake_labels()
        whole = fake_dataset(labels, masks=False)
        bare = {split: tuple(replace(record, tags=None) for record in part) for split, part in whole.splits.items()}
        monkeypatch.setattr("tissuehint.pipeline.stages.load_dataset", lambda config: replace(whole, splits=bare))
        recipe |= {"stage2": None, "ceiling": False}
        with pytest.raises(InputError, match="tags"):
            tissuehint.run(recipe)


class TestInterruptions:
    def test_ctrl_c_is_a_keyboard_interrupt_and_the_run_goes_on_afterwards(self, recipe, finished, monkeypatch):
        import signal

        handler = signal.getsignal(signal.SIGINT)
        original = SeedEachStep.on_train_batch_start

        def stop(self, trainer, *others):
            if trainer.global_step == 3:
                raise KeyboardInterrupt
            original(self, trainer, *others)

        with monkeypatch.context() as patch:
            patch.setattr(SeedEachStep, "on_train_batch_start", stop)
            with pytest.raises(KeyboardInterrupt):
                tissuehint.run(recipe)
        assert signal.getsignal(signal.SIGINT) is handler
        recipe |= {"stage2": None, "ceiling": False}
        stage1 = Path(recipe["output"]) / "tiny" / "stage1"
        assert not (stage1 / "done.json").exists()

    @pytest.mark.parametrize("place", ["pseudo_masks", "scores", "weights"])
    def test_a_full_disk_leaves_nothing_half_written(self, recipe, finished, monkeypatch, place):
        recipe |= {"stage2": None if place == "weights" else recipe["stage2"], "ceiling": False}
        full = OSError(28, "No space left on device")
        targets = {
            "pseudo_masks": ("PIL.Image.Image.save", lambda name: name.startswith(".phantom_train_0002")),
            "scores": ("pathlib.Path.write_text", lambda name: name.startswith(".scores")),
            "weights": ("safetensors.torch.save_file", lambda name: name.startswith(".weights")),
        }
        where, hit = targets[place]
        owner, _, attribute = where.rpartition(".")
        target = pytest.importorskip(owner) if place == "weights" else None
        if target is None:
            target = Image.Image if place == "pseudo_masks" else Path
        original = getattr(target, attribute)

        def write(*words, **names):
            path = next(
                Path(word)
                for word in (words[::-1] if place == "pseudo_masks" else words)
                if isinstance(word, str | Path)
            )
            if hit(path.name):
                path.write_bytes(b"half")
                raise full
            return original(*words, **names)

        with monkeypatch.context() as patch:
            patch.setattr(target, attribute, write)
            with pytest.raises(OSError, match="No space left"):
                tissuehint.run(recipe)
        folder = Path(recipe["output"]) / "tiny"
        assert not [path for path in folder.rglob("*") if ".part" in path.name]
        absent = {"pseudo_masks": "pseudo_masks/phantom_train_0002.png", "scores": "scores.json"}
        assert not (folder / absent.get(place, "stage1/weights.safetensors")).exists()
        if place == "pseudo_masks":
            assert sorted(path.name for path in (folder / "pseudo_masks").iterdir()) == [
                f"phantom_train_{index:04d}.png" for index in range(2)
            ]
        assert tissuehint.run(recipe).scores["rows"]
        expected = finished[1]["stage1/weights.safetensors"]
        assert (folder / "stage1" / "weights.safetensors").read_bytes() == expected

    def test_a_checkpoint_is_whole_or_absent(self, tmp_path, monkeypatch):
        target = tmp_path / "last.ckpt"
        WholeCheckpoints().save_checkpoint({"round": 1}, target)

        def half(checkpoint, path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("torch.save", half)
        with pytest.raises(OSError, match="No space left"):
            WholeCheckpoints().save_checkpoint({"round": 2}, str(target))
        assert WholeCheckpoints().load_checkpoint(target) == {"round": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]

    def test_a_damaged_checkpoint_is_named(self, recipe):
        checkpoint = Path(recipe["output"]) / "tiny" / "stage1" / "checkpoints" / "last.ckpt"
        RunDirectory.open(load_recipe(recipe))
        checkpoint.parent.mkdir(parents=True)
        checkpoint.write_bytes(b"PK half a checkpoint")
        with pytest.raises(InputError, match=r"last\.ckpt: is damaged .* delete it"):
            tissuehint.run(recipe)


class TestDirectory:
    def test_another_recipe_is_refused_by_the_key_that_differs(self, recipe, tmp_path):
        first = load_recipe(recipe)
        RunDirectory.open(first)
        with pytest.raises(InputError, match=r"stage1\.steps = 4, the recipe now says 8"):
            RunDirectory.open(load_recipe(recipe, {"stage1.steps": 8}))
        with pytest.raises(InputError, match=r"data\.patches"):
            RunDirectory.open(load_recipe(recipe, {"data.patches.side": 64, "data.patches.stride": 64}))
        assert yaml.safe_load((tmp_path / "runs" / "tiny" / "recipe.yaml").read_text())["stage1"]["steps"] == 4

    def test_keys_that_do_not_change_training_are_free(self, recipe):
        RunDirectory.open(load_recipe(recipe))
        changes = {"trainer.devices": 2, "evaluation.gallery": 1, "data.workers": 1, "data.cache_mb": 0}
        RunDirectory.open(load_recipe(recipe, {**changes, "published": {"a": "b"}}))

    def test_a_folder_with_something_else_is_refused(self, recipe, tmp_path):
        folder = tmp_path / "runs" / "tiny"
        folder.mkdir(parents=True)
        (folder / "thesis.txt").write_text("mine")
        with pytest.raises(InputError, match="is not empty"):
            tissuehint.run(recipe)
        assert [path.name for path in folder.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "", "name: tiny\n"])
    def test_a_damaged_record_is_one_line(self, recipe, tmp_path, text):
        folder = tmp_path / "runs" / "tiny"
        folder.mkdir(parents=True)
        (folder / "recipe.yaml").write_text(text)
        with pytest.raises(InputError, match="tiny"):
            tissuehint.run(recipe)
        assert (folder / "recipe.yaml").read_text() == text

    def test_an_empty_folder_is_used(self, recipe, tmp_path):
        (tmp_path / "runs" / "tiny").mkdir(parents=True)
        assert RunDirectory.open(load_recipe(recipe)).path.name == "tiny"
        assert not [path for path in (tmp_path / "runs" / "tiny").iterdir() if path.name != "recipe.yaml"]


def test_no_stage_reads_a_mask_where_the_data_set_brings_tags(recipe, monkeypatch):
    recipe |= {"ceiling": False}
    recipe["stage2"]["keep"] = "last"
    recipe["data"]["phantom"]["val"] = 0
    experiment = Experiment(load_recipe(recipe))
    monkeypatch.setattr(experiment.data, "check_masks", lambda: None)
    monkeypatch.setattr(Experiment, "_finish", lambda self, *modules: self)
    with unreadable_masks():
        experiment.run()
    assert (experiment.directory.stage2 / "done.json").is_file()


def test_write_json_is_what_the_scores_are_written_with(tmp_path):
    write_json(tmp_path / "a.json", {"x": (1, float("nan"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, None]}
