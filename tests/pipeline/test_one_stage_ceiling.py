"""Full supervision beside a method of one stage: its own network and budget, rows, ratio, whole images."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from PIL import Image

import tissuehint
from tissuehint.data.module import load_dataset
from tissuehint.data.training_sets import MaskSet
from tissuehint.errors import InputError
from tissuehint.metrics import decide
from tissuehint.nn.networks import SegmentationNetwork
from tissuehint.pipeline import load_recipe
from tissuehint.pipeline.results import weak_full_ratio
from tissuehint.segmentation import SegmentationConfig
from tissuehint.testing.fakes import fake_dataset, fake_labels, write_fake_folder

UNET = {
    "architecture": "unet",
    "encoder": {"name": "test_resnet"},
    "decoder": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]},
}
CEILING = {"network": UNET, "steps": 4, "batch_size": 3, "round_steps": 2, "crop": None}
RECIPE = {
    "name": "one-stage",
    "seed": 3,
    "data": {"source": "phantom", "phantom": {"train": 5, "val": 2, "test": 3, "size": 64}, "workers": 0},
    "method": {"name": "cvm", "network": UNET},
    "stage1": {"steps": 4, "batch_size": 4, "round_steps": 2},
    "ceiling": CEILING,
    "trainer": {"accelerator": "cpu", "progress": False},
    "evaluation": {"gallery": 2, "oracle": False},
}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    return {**copy.deepcopy(RECIPE), "output": str(tmp_path / "runs")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[tissuehint.RunResult, list[tuple[int, ...]]]:
    """The result, and the shapes of the images that went through any network while the ceiling was trained."""
    sizes: list[tuple[int, ...]] = []
    sample = MaskSet.sample

    def watched(self: MaskSet, index: int, generator: torch.Generator) -> Any:
        found = sample(self, index, generator)
        sizes.append(tuple(found.image.shape))
        return found

    with patch.object(MaskSet, "sample", watched):
        result = tissuehint.run(copy.deepcopy(RECIPE), output=str(tmp_path_factory.mktemp("runs")))
    return result, sizes


def rows_of(scores: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    return [row for row in scores["rows"] if row["stage"] == stage]


class TestRun:
    def test_rows_of_both(self, finished: Any) -> None:
        scores = finished[0].scores
        stages = {(row["stage"], row["gate"], row["name"]) for row in scores["rows"]}
        assert stages == {("stage1", "predicted", "cvm"), ("ceiling", "none", "unet, masks")}
        protocols = [row["protocol"] for row in rows_of(scores, "ceiling")]
        assert protocols == [row["protocol"] for row in rows_of(scores, "stage1")]

    def test_ratio_is_stage_one_over_ceiling(self, finished: Any) -> None:
        scores = finished[0].scores
        weak, full, ratio = rows_of(scores, "stage1")[0], rows_of(scores, "ceiling")[0], scores["weak_full_ratio"]
        for key in ("miou", "dice_mean", "accuracy", "boundary_miou"):
            assert ratio[key] == pytest.approx(weak[key] / full[key])
        assert (ratio["split"], ratio["protocol"]) == ("test", weak["protocol"])

    def test_it_trains_on_whole_images(self, finished: Any) -> None:
        result, sizes = finished
        assert sizes == [(3, 64, 64)] * 12
        assert json.loads((result.path / "ceiling" / "done.json").read_text())["batch_size"] == 3
        assert not (result.path / "stage2").exists()
        assert not (result.path / "pseudo_masks").exists()

    def test_the_method_is_what_is_kept_and_shown(self, finished: Any) -> None:
        result, _ = finished
        model = result.model()
        assert {row["stage"] for row in model.notes["scores"]} == {"stage1"}
        recipe = load_recipe(result.path / "recipe.yaml")
        dataset = load_dataset(recipe.data)
        for item in json.loads((result.path / "gallery" / "index.json").read_text())["items"]:
            (record,) = [each for each in dataset.splits["test"] if each.id == item["id"]]
            tissue_map = model.predict(record.read_image())
            expected = decide(tissue_map[None], dataset.labels.num_tissue, "five_class")[0].numpy()
            shown = np.asarray(Image.open(result.path / "gallery" / item["layers"]["prediction"]))
            assert np.array_equal(shown, expected)

    def test_recipe_reads_back_with_its_ceiling(self, finished: Any) -> None:
        recipe = load_recipe(finished[0].path / "recipe.yaml")
        assert recipe.ceiling == SegmentationConfig(**CEILING)
        assert recipe.full_supervision == recipe.ceiling


def test_whole_images_of_several_sizes_train_and_are_predicted_whole(recipe: dict[str, Any], tmp_path: Path) -> None:
    labels = fake_labels(tissue=2)
    folder = write_fake_folder(tmp_path / "small", labels, size=48)
    larger = fake_dataset(labels, size=80)
    for split in ("train", "test"):
        for record in larger.splits[split][:2]:
            for kind, pixels in (("images", record.read_image()), ("masks", record.read_mask(labels))):
                (path,) = [*folder.rglob(f"{kind}/**/{record.id}.*")]
                palette = Image.open(path).getpalette() if kind == "masks" else None
                picture = Image.fromarray(pixels)
                if palette:
                    picture = picture.convert("P")
                    picture.putpalette(palette)
                picture.save(path)
    recipe |= {"data": {"source": "folder", "root": str(folder), "labels": "masks", "workers": 0}, "method": None}
    recipe |= {"stage2": recipe.pop("ceiling"), "evaluation": {"gallery": 0}}
    shapes = set()
    forward = SegmentationNetwork.forward

    def watched(self: SegmentationNetwork, images: torch.Tensor) -> torch.Tensor:
        shapes.add((self.training, *images.shape[-2:]))
        return forward(self, images)

    with patch.object(SegmentationNetwork, "forward", watched):
        result = tissuehint.run(recipe)
    assert shapes <= {(True, 48, 48), (True, 80, 80), (False, 48, 48), (False, 80, 80)}
    assert {(True, 80, 80), (False, 48, 48), (False, 80, 80)} <= shapes
    assert result.scores["rows"][0]["pixels"] > 0


class TestRecipe:
    def test_ceiling_alone_needs_no_stage_two(self, recipe: dict[str, Any]) -> None:
        assert load_recipe(recipe).full_supervision == SegmentationConfig(**CEILING)
        assert load_recipe({**recipe, "ceiling": False}).full_supervision is None

    def test_with_stage_two_a_switch_takes_its_network_and_a_mapping_its_own(self, recipe: dict[str, Any]) -> None:
        recipe["stage2"] = {**CEILING, "crop": 64}
        assert load_recipe({**recipe, "ceiling": True}).full_supervision == SegmentationConfig(**recipe["stage2"])
        assert load_recipe(recipe).full_supervision == SegmentationConfig(**CEILING)

    def test_overrides_reach_into_it(self, recipe: dict[str, Any]) -> None:
        checked = load_recipe(recipe, {"ceiling.steps": 9, "ceiling__crop": 96})
        assert checked.full_supervision is not None
        assert (checked.full_supervision.steps, checked.full_supervision.crop) == (9, 96)

    @pytest.mark.parametrize(
        ("ceiling", "words"),
        [
            (True, ["ceiling", "stage2 is not given"]),
            ({"stepz": 3}, ["recipe key ceiling.stepz", "is unknown", "steps"]),
            ({"crop": 8}, ["recipe key ceiling.crop = 8", "32"]),
            ({"crop": None, "stride": 5}, ["recipe key ceiling", "stride 5", "crop is null"]),
            ({"crop": 64, "stride": 65}, ["recipe key ceiling", "stride 65 is larger than crop 64"]),
            ({"network": {"architectur": "unet"}}, ["recipe key ceiling.network.architectur", "architecture"]),
            ("unet", ["recipe key ceiling", "'unet'"]),
            (3, ["recipe key ceiling", "3"]),
        ],
        ids=str,
    )
    def test_errors_name_the_key(self, recipe: dict[str, Any], ceiling: Any, words: list[str]) -> None:
        with pytest.raises(InputError) as caught:
            load_recipe({**recipe, "ceiling": ceiling})
        text = str(caught.value)
        assert "\n" not in text
        assert [word for word in words if word not in text] == []
        assert "SegmentationConfig" not in text
        assert "bool" not in text.partition(";")[0] or not isinstance(ceiling, dict)

    def test_it_needs_masks(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        folder = write_fake_folder(tmp_path / "bare", fake_labels(tissue=2), masks=False)
        recipe["data"] = {"source": "folder", "root": str(folder), "workers": 0}
        with pytest.raises(InputError, match=r"recipe key ceiling: trains with masks, but 8 training images have none"):
            tissuehint.run(recipe)
        assert not (tmp_path / "runs").exists()

    def test_its_best_round_needs_masks_of_val(self, recipe: dict[str, Any], tmp_path: Path) -> None:
        recipe["data"]["phantom"]["val"] = 0
        recipe["ceiling"]["keep"] = "best"
        with pytest.raises(InputError, match=r"recipe key ceiling\.keep = best"):
            tissuehint.run(recipe)
        assert not (tmp_path / "runs").exists()


class TestWeakFullRatio:
    def row(self, stage: str, gate: str, value: float, split: str = "test") -> dict[str, Any]:
        keys = ("miou", "dice_mean", "accuracy", "boundary_miou")
        return {"stage": stage, "gate": gate, "split": split, "protocol": "A", **dict.fromkeys(keys, value)}

    def test_the_first_row_of_each_counts_and_the_oracle_never(self) -> None:
        rows = [
            self.row("stage1", "predicted", 0.6, "val"),
            self.row("stage1", "oracle", 0.9, "val"),
            self.row("ceiling", "none", 0.8, "val"),
            self.row("stage1", "predicted", 0.1),
            self.row("ceiling", "none", 0.2),
        ]
        ratio = weak_full_ratio(rows)
        assert ratio is not None
        assert ratio["miou"] == pytest.approx(0.75)
        assert ratio["split"] == "val"

    def test_stage_two_comes_first(self) -> None:
        rows = [self.row("stage1", "predicted", 0.2), self.row("stage2", "none", 0.4), self.row("ceiling", "none", 0.8)]
        ratio = weak_full_ratio(rows)
        assert ratio is not None
        assert ratio["accuracy"] == pytest.approx(0.5)

    def test_half_of_it_is_none_and_a_ceiling_of_zero_is_nan(self) -> None:
        assert weak_full_ratio([self.row("stage1", "predicted", 0.2)]) is None
        assert weak_full_ratio([self.row("stage1", "oracle", 0.2), self.row("ceiling", "none", 0.8)]) is None
        assert weak_full_ratio([self.row("ceiling", "none", 0.8)]) is None
        ratio = weak_full_ratio([self.row("stage1", "predicted", 0.2), self.row("ceiling", "none", 0.0)])
        assert ratio is not None
        assert np.isnan(ratio["miou"])
