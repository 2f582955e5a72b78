import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data.catalog import catalog_fakes as fakes
from tissuehint.data import catalog
from tissuehint.data.records import TissueDataset
from tissuehint.errors import InputError

BCSS_TRAIN = [
    "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+0[1101]",
    "TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+1[0000]",
]
LUAD_TRAIN = ["1031280-2300-27920-[1 0 0 1]", "387709-25446-36637-[0 1 0 0]"]


def counts(dataset: TissueDataset) -> dict[str, int]:
    return {name: len(records) for name, records in dataset.splits.items()}


def records(dataset: TissueDataset) -> list:
    return [record for split in dataset.splits.values() for record in split]


def column(dataset: TissueDataset, record) -> list[int]:
    """Classes from top to bottom."""
    return record.read_mask(dataset.labels)[:, 0].tolist()


def groups(dataset: TissueDataset, split: str) -> set[str]:
    return {record.group for record in dataset.splits[split]}


def assert_apart(dataset: TissueDataset) -> None:
    names = list(dataset.splits)
    for first in names:
        for second in names[names.index(first) + 1 :]:
            assert not groups(dataset, first) & groups(dataset, second)
    assert not any("overlap" in note for note in dataset.notes)


def assert_sound(dataset: TissueDataset) -> None:
    ids = [record.id.lower() for record in records(dataset)]
    assert len(set(ids)) == len(ids)
    assert tuple(dataset.splits) == ("train", "val", "test")
    for record in records(dataset):
        assert record.read_image().shape[2] == 3
        copy = pickle.loads(pickle.dumps(record))
        if record.mask is not None:
            assert (copy.read_mask(dataset.labels) == record.read_mask(dataset.labels)).all()


# GlaS


@pytest.mark.parametrize("suffix", [".bmp", ".png", ".jpg", ".tif"])
def test_glas_paper_split(tmp_path, suffix):
    dataset = catalog.read("glas", fakes.write_glas(tmp_path, suffix))
    assert_sound(dataset)
    assert [record.id for record in dataset.splits["train"]] == ["train_1", "train_2", "train_10", "train_70"]
    assert [record.id for record in dataset.splits["val"]] == ["train_71", "train_85"]
    assert [record.id for record in dataset.splits["test"]] == ["testA_1", "testA_2", "testB_1", "testB_2"]
    record = dataset.splits["train"][0]
    assert column(dataset, record) == [0, 1, 1, 1, 1, 1, 1, 1]
    assert record.um_per_px == 0.62
    assert record.group == "2"
    assert dataset.splits["test"][0].group == dataset.splits["val"][0].group == "1"
    assert any("1 of the 4 patients or slides in test" in note and "also in val" in note for note in dataset.notes)
    assert "test holds 2 of 60 testA and 2 of 20 testB images" in dataset.notes


def test_glas_without_test_b_or_table(tmp_path):
    dataset = catalog.read("glas", fakes.write_glas(tmp_path, test_b=0, table=False))
    assert counts(dataset) == {"train": 4, "val": 2, "test": 2}
    assert groups(dataset, "train") == {None}
    assert any("no Grade.csv" in note for note in dataset.notes)
    with pytest.raises(InputError, match=r"Grade\.csv"):
        catalog.read("glas", tmp_path, "patient")


def test_glas_by_patient_is_disjoint_and_does_not_depend_on_test_b(tmp_path):
    fakes.write_glas(tmp_path)
    whole = catalog.read("glas", tmp_path, "patient")
    assert_sound(whole)
    assert_apart(whole)
    assert len(records(whole)) == 10
    for name in ("testB_1", "testB_2"):
        (tmp_path / f"{name}.bmp").unlink()
    part = catalog.read("glas", tmp_path, "patient")
    for split in whole.splits:
        kept = [record.id for record in whole.splits[split] if not record.id.startswith("testB")]
        assert [record.id for record in part.splits[split]] == kept


def test_glas_in_a_folder_of_the_archive(tmp_path):
    fakes.write_glas(tmp_path / "Warwick QU Dataset (Released 2016_07_08)" / "")
    assert counts(catalog.read("glas", tmp_path)) == {"train": 4, "val": 2, "test": 4}


def test_glas_errors(tmp_path):
    fakes.write_glas(tmp_path)
    (tmp_path / "testA_2_anno.bmp").unlink()
    with pytest.raises(InputError, match=r"testA_2\.bmp.*testA_2_anno"):
        catalog.read("glas", tmp_path)
    fakes.write_mask(tmp_path / "testA_2_anno.bmp", [0])
    table = tmp_path / "Grade.csv"
    text = table.read_text()
    table.write_text(text.replace("testA_2,", "testA_99,"))
    with pytest.raises(InputError, match="testA_2"):
        catalog.read("glas", tmp_path)
    table.write_text(text.replace("patient ID", "who"))
    with pytest.raises(InputError, match=r"Grade\.csv:1.*patient ID"):
        catalog.read("glas", tmp_path)
    table.write_text(text.replace("train_1,2,", "train_1,,"))
    with pytest.raises(InputError, match=r"Grade\.csv:2"):
        catalog.read("glas", tmp_path)


def test_two_images_of_one_name_are_an_error(tmp_path):
    fakes.write_glas(tmp_path)
    fakes.write_image(tmp_path / "train_1.png")
    with pytest.raises(InputError, match=r"train_1\.png"):
        catalog.read("glas", tmp_path)


# EBHI-Seg


def test_ebhi_by_table(tmp_path):
    dataset = catalog.read("ebhi_seg", fakes.write_ebhi(tmp_path))
    assert_sound(dataset)
    assert_apart(dataset)
    assert {record.group[-1] for record in dataset.splits["test"]} == {"8", "9"}
    assert len(dataset.splits["test"]) == 12
    assert len(dataset.splits["train"]) + len(dataset.splits["val"]) == 48
    # an eighth of 24 cases, one of each class
    assert sorted(record.id.split("_GT")[0] for record in dataset.splits["val"]) == [
        "Low-grade_IN",
        "Low-grade_IN",
        "Normal",
        "Normal",
        "Polyp",
        "Polyp",
    ]
    record = next(record for record in dataset.splits["test"] if record.id.startswith("Low-grade_IN"))
    assert record.id == "Low-grade_IN_GTL2000008-1-400-001"
    assert column(dataset, record) == [0, 0, 1, 1, 1, 1, 1, 1]


def test_ebhi_reads_one_bit_labels(tmp_path):
    fakes.write_ebhi(tmp_path)
    for path in tmp_path.glob("*/label/*.png"):
        fakes.write_mask(path, [0, 1], "1")
    dataset = catalog.read("ebhi_seg", tmp_path)
    assert column(dataset, dataset.splits["train"][0]) == [0, 1, 1, 1, 1, 1, 1, 1]


def test_ebhi_reports_a_label_that_is_neither_binary_nor_grey(tmp_path):
    fakes.write_ebhi(tmp_path)
    for path in tmp_path.glob("*/label/*.png"):
        fakes.write_mask(path, [0, 3])
    dataset = catalog.read("ebhi_seg", tmp_path)
    with pytest.raises(InputError, match="mask value 3"):
        dataset.splits["train"][0].read_mask(dataset.labels)


def test_ebhi_without_table_splits_by_case_and_says_so(tmp_path):
    dataset = catalog.read("ebhi_seg", fakes.write_ebhi(tmp_path, table=False))
    assert_apart(dataset)
    assert counts(dataset) == {"train": 42, "val": 6, "test": 12}
    assert any("no split_by_case.csv" in note for note in dataset.notes)


def test_ebhi_gland_paper_takes_its_classes(tmp_path):
    dataset = catalog.read("ebhi_seg", fakes.write_ebhi(tmp_path), "gland_paper")
    assert_apart(dataset)
    assert counts(dataset) == {"train": 28, "val": 4, "test": 8}
    assert {record.id.split("_GT")[0] for record in records(dataset)} == {"Low-grade_IN", "Polyp"}
    assert any("Serrated adenoma" in note for note in dataset.notes)


def test_ebhi_case_written_in_two_ways_stays_out_of_train(tmp_path):
    fakes.write_ebhi(tmp_path)
    twin = "gtp2000009-1-400-007"  # GTP2000009 is in test
    fakes.write_image(tmp_path / "Polyp" / "image" / f"{twin}.png")
    fakes.write_mask(tmp_path / "Polyp" / "label" / f"{twin}.png", [255])
    with (tmp_path / "split_by_case.csv").open("a") as handle:
        handle.write(f"Polyp,{twin}.png,gtp2000009,train\n")
    dataset = catalog.read("ebhi_seg", tmp_path)
    assert_apart(dataset)
    assert not any("007" in record.id.split("-")[-1] for record in records(dataset))
    assert any(note.startswith("1 train images are left out") for note in dataset.notes)


def test_ebhi_image_without_label_is_left_out_by_name(tmp_path):
    fakes.write_ebhi(tmp_path)
    (tmp_path / "Polyp" / "label" / "GTP2000003-1-400-001.png").unlink()
    dataset = catalog.read("ebhi_seg", tmp_path)
    assert len(records(dataset)) == 59
    assert any("Polyp/GTP2000003-1-400-001.png" in note for note in dataset.notes)


def test_ebhi_errors(tmp_path):
    fakes.write_ebhi(tmp_path)
    table = tmp_path / "split_by_case.csv"
    text = table.read_text()
    table.write_text(text.replace("GTP2000003-1-400-001", "other"))
    with pytest.raises(InputError, match=r"split_by_case\.csv.*GTP2000003-1-400-001"):
        catalog.read("ebhi_seg", tmp_path)
    table.write_text(text.replace(",train", ",dev", 1))
    with pytest.raises(InputError, match=r"split_by_case\.csv:2.*dev"):
        catalog.read("ebhi_seg", tmp_path)
    table.write_text(text.replace("file", "picture", 1))
    with pytest.raises(InputError, match=r"split_by_case\.csv:1.*file"):
        catalog.read("ebhi_seg", tmp_path)
    table.write_text(text)
    (tmp_path / "Normal" / "label").rename(tmp_path / "Normal" / "labels")
    with pytest.raises(InputError, match=r"Normal/label"):
        catalog.read("ebhi_seg", tmp_path)


# WSSS4LUAD


def test_wsss4luad_official(tmp_path):
    dataset = catalog.read("wsss4luad", fakes.write_wsss4luad(tmp_path))
    assert_sound(dataset)
    assert counts(dataset) == {"train": 3, "val": 10, "test": 3}
    tags = {record.id: record.tags.values.tolist() for record in dataset.splits["train"]}
    assert tags == {
        "training_1003370-5631-18822-_0_1_0": [0, 1, 0],
        "training_436219-1-2-_0_0_0": [0, 0, 0],
        "training_436219-7159-48057-_1_0_0": [1, 0, 0],
    }
    assert {record.group for record in dataset.splits["train"]} == {"1003370", "436219"}
    assert all(record.mask is None for record in dataset.splits["train"])
    # the first row is tumour in the mask and white in the background mask
    assert column(dataset, dataset.splits["val"][0]) == [3, 0, 1, 2, 3, 3, 3, 3]
    assert any("3 of the 10091 published train images" in note for note in dataset.notes)
    assert any(note.startswith("1 training patches carry no tag") for note in dataset.notes)


def test_wsss4luad_without_background_masks_reads_the_mask_alone(tmp_path):
    dataset = catalog.read("wsss4luad", fakes.write_wsss4luad(tmp_path, background=False))
    assert column(dataset, dataset.splits["val"][0]) == [0, 0, 1, 2, 3, 3, 3, 3]


def test_wsss4luad_regions_share_out_every_class(tmp_path):
    dataset = catalog.read("wsss4luad", fakes.write_wsss4luad(tmp_path), "regions")
    assert_sound(dataset)
    assert counts(dataset) == {"train": 8, "val": 2, "test": 3}
    for split in ("train", "val"):
        present = {label for record in dataset.splits[split] for label in column(dataset, record)}
        assert present == {0, 1, 2, 3}
    assert any("not the official training patches" in note for note in dataset.notes)


def test_wsss4luad_errors(tmp_path):
    fakes.write_wsss4luad(tmp_path)
    (tmp_path / "3.testing" / "background-mask" / "01.png").unlink()
    with pytest.raises(InputError, match=r"img/01\.png.*background-mask/01\.png"):
        catalog.read("wsss4luad", tmp_path)
    fakes.write_mask(tmp_path / "3.testing" / "background-mask" / "01.png", [0, 2])
    dataset = catalog.read("wsss4luad", tmp_path)
    with pytest.raises(InputError, match="value 2"):
        dataset.splits["test"][1].read_mask(dataset.labels)
    fakes.write_mask(tmp_path / "3.testing" / "background-mask" / "01.png", [0, 1], side=4)
    with pytest.raises(InputError, match="4 x 4"):
        dataset.splits["test"][1].read_mask(dataset.labels)
    fakes.write_image(tmp_path / "1.training" / "1-2-3-[1, 0].png")
    with pytest.raises(InputError, match=r"1-2-3-\[1, 0\]\.png"):
        catalog.read("wsss4luad", tmp_path)


# Data sets of tagged patches


@pytest.mark.parametrize("val", ["val", "valid"])
@pytest.mark.parametrize("train_folder", ["train", "training", "train/img"])
def test_bcss_wsss(tmp_path, val, train_folder):
    root = fakes.write_patches(
        tmp_path, BCSS_TRAIN, ["TCGA-AN-A0XU-DX1_x_MPP-0.2500+7"], [0, 1, 2, 3, 4], val=val, train_folder=train_folder
    )
    dataset = catalog.read("bcss_wsss", root)
    assert_sound(dataset)
    assert counts(dataset) == {"train": 2, "val": 1, "test": 1}
    first, second = dataset.splits["train"]
    assert first.id == "train_TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0_2500+0_1101"
    assert first.tags.names(dataset.labels) == ("tumour", "stroma", "necrosis")
    assert second.tags.values.tolist() == [0, 0, 0, 0]
    assert first.group == "TCGA-A1-A0SK"
    assert dataset.splits["val"][0].tags is None
    assert column(dataset, dataset.splits["val"][0]) == [0, 1, 2, 3, 4, 4, 4, 4]
    assert any("also in val" in note for note in dataset.notes)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".tiff"])
def test_luad_histoseg(tmp_path, suffix):
    root = fakes.write_patches(tmp_path, LUAD_TRAIN, ["0", "17"], [3, 1, 4], suffix=suffix)
    dataset = catalog.read("luad_histoseg", root)
    assert_sound(dataset)
    assert [record.tags.names(dataset.labels) for record in dataset.splits["train"]] == [
        ("tumour epithelium", "tumour-associated stroma"),
        ("necrosis",),
    ]
    assert [record.group for record in dataset.splits["train"]] == ["1031280", "387709"]
    assert {record.id for record in dataset.splits["test"]} == {"test_0", "test_17"}
    assert column(dataset, dataset.splits["test"][0]) == [3, 1, 4, 4, 4, 4, 4, 4]
    assert all(record.um_per_px == 1.0 for record in records(dataset))


def test_gcss_wsss_moves_white_from_first_to_last(tmp_path):
    root = fakes.write_patches(tmp_path, ["a[100001]", "b[011000]"], ["c"], [0, 1, 2, 3, 4, 5])
    dataset = catalog.read("gcss_wsss", root)
    assert_sound(dataset)
    assert dataset.labels.white == 5
    assert [record.tags.names(dataset.labels) for record in dataset.splits["train"]] == [
        ("necrosis",),
        ("tumour", "lymphoid stroma"),
    ]
    assert column(dataset, dataset.splits["val"][0]) == [5, 0, 1, 2, 3, 4, 4, 4]


def test_gcss_wsss_reports_a_code_it_does_not_have(tmp_path):
    dataset = catalog.read("gcss_wsss", fakes.write_patches(tmp_path, ["a[100001]"], ["c"], [0, 6]))
    with pytest.raises(InputError, match="mask value 6"):
        dataset.splits["val"][0].read_mask(dataset.labels)


def test_gcss_of_pbip(tmp_path):
    dataset = catalog.read("gcss", fakes.write_patches(tmp_path, ["TCGA-BR-4184_1[0011]"], ["c"], [0, 3, 4]))
    assert_sound(dataset)
    assert dataset.splits["train"][0].tags.values.tolist() == [0, 0, 1, 1]
    assert dataset.labels.num_tissue == 4
    assert column(dataset, dataset.splits["test"][0])[:3] == [0, 3, 4]


@pytest.mark.parametrize("name", ["bcss_wsss", "luad_histoseg", "gcss"])
def test_tagged_patches_errors(tmp_path, name):
    def written(case: str):
        return fakes.write_patches(tmp_path / case, BCSS_TRAIN, ["v0", "v1"], [0])

    root = written("no-mask")
    (root / "test" / "mask" / "v1.png").unlink()
    with pytest.raises(InputError, match=r"test/img/v1\.png.*test/mask/v1\.png"):
        catalog.read(name, root)

    root = written("jpeg-mask")
    (root / "val" / "mask" / "v1.png").rename(root / "val" / "mask" / "v1.jpg")
    with pytest.raises(InputError, match=r"val/img/v1\.png"):
        catalog.read(name, root)

    root = written("no-val")
    (root / "val").rename(root / "holdout")
    with pytest.raises(InputError, match=r"no-val/val.*valid.*expected layout"):
        catalog.read(name, root)

    root = written("no-bits")
    fakes.write_image(root / "train" / "plain.png")
    with pytest.raises(InputError, match=r"train/plain\.png.*4 bits"):
        catalog.read(name, root)

    root = written("empty")
    for path in (root / "train").glob("*.png"):
        path.unlink()
    with pytest.raises(InputError, match=r"empty/train.*has no image"):
        catalog.read(name, root)

    root = written("twice")
    fakes.write_image(root / "train" / f"{BCSS_TRAIN[0]}.bmp")
    with pytest.raises(InputError, match="same id"):
        catalog.read(name, root)


# ProG


def test_prog_official_folders(tmp_path):
    root = fakes.write_patches(tmp_path, ["0001[10]", "0002[11]"], ["0003"], [0, 1], val="valid")
    dataset = catalog.read("prog", root, "official")
    assert_sound(dataset)
    assert [record.tags.names(dataset.labels) for record in dataset.splits["train"]] == [
        ("non-gland",),
        ("non-gland", "gland"),
    ]
    assert column(dataset, dataset.splits["test"][0])[:3] == [0, 1, 1]
    with pytest.raises(InputError, match="official"):
        catalog.read("prog", root)


def test_prog_patches_by_patient(tmp_path):
    root = tmp_path
    for number in range(30):
        fakes.write_image(root / "train" / f"P{number}_1[11].png")
    for folder, numbers in (("val", range(10, 40)), ("test", range(20, 50))):
        for number in numbers:
            fakes.write_image(root / folder / "img" / f"P{number}_2.png")
            fakes.write_mask(root / folder / "mask" / f"P{number}_2.png", [0, 255])
    dataset = catalog.read("prog", root)
    assert_sound(dataset)
    assert_apart(dataset)
    assert {f"patient_{number}" for number in range(10)} <= groups(dataset, "train")
    assert {f"patient_{number}" for number in range(40, 50)} <= groups(dataset, "test")
    assert len(records(dataset)) == 50
    assert "40 of 90 patches are left out for it" in dataset.notes


def test_prog_whole_images_by_patient(tmp_path):
    for patient in range(1, 31):
        for image in range(2):
            fakes.write_image(tmp_path / "images" / f"Patient_{patient:03d}_{image}.tif")
            fakes.write_mask(tmp_path / "masks" / f"Patient_{patient:03d}_{image}.png", [0, 255])
    dataset = catalog.read("prog", tmp_path)
    assert_sound(dataset)
    assert_apart(dataset)
    assert counts(dataset) == {"train": 40, "val": 10, "test": 10}
    assert column(dataset, dataset.splits["val"][0])[:2] == [0, 1]
    with pytest.raises(InputError, match=str(tmp_path / "train")):
        catalog.read("prog", tmp_path, "official")


# BCSS


@pytest.mark.parametrize("images", ["rgbs_colorNormalized", "rgbs", "images"])
def test_bcss_merges_codes_and_keeps_the_test_sites(tmp_path, images):
    dataset = catalog.read("bcss", fakes.write_bcss(tmp_path, images))
    assert_sound(dataset)
    assert_apart(dataset)
    assert {record.group for record in dataset.splits["test"]} == {"TCGA-OL-A5D6", "TCGA-S3-AA10"}
    assert counts(dataset) == {"train": 9, "val": 1, "test": 2}
    classes = column(dataset, dataset.splits["train"][0])[:22]
    expected = dict.fromkeys(range(22), 255) | {1: 0, 19: 0, 20: 0, 2: 1, 3: 2, 10: 2, 11: 2, 4: 3}
    assert classes == [expected[code] for code in range(22)]


def test_bcss_by_patient(tmp_path):
    dataset = catalog.read("bcss", fakes.write_bcss(tmp_path), "patient")
    assert_apart(dataset)
    assert Counter(counts(dataset)).total() == 12
    assert all(dataset.splits.values())


def test_bcss_errors(tmp_path):
    fakes.write_bcss(tmp_path)
    path = next((tmp_path / "masks").glob("*A0SA*.png"))
    fakes.write_mask(path, [1, 22], side=24)
    dataset = catalog.read("bcss", tmp_path)
    record = next(record for record in records(dataset) if "A0SA" in record.id)
    with pytest.raises(InputError, match="mask value 22"):
        record.read_mask(dataset.labels)
    fakes.write_image(tmp_path / "rgbs_colorNormalized" / "mine.png")
    fakes.write_mask(tmp_path / "masks" / "mine.png", [1])
    with pytest.raises(InputError, match=r"mine\.png"):
        catalog.read("bcss", tmp_path)


# Camelyon16


def test_camelyon16_scales_mask_and_points_to_the_image(tmp_path):
    dataset = catalog.read("camelyon16", fakes.write_camelyon16(tmp_path))
    assert_sound(dataset)
    assert_apart(dataset)
    assert counts(dataset) == {"train": 10, "val": 2, "test": 4}
    record = dataset.splits["train"][0]
    mask = record.read_mask(dataset.labels)
    assert mask.shape == (16, 16)
    assert mask[:, 0].tolist() == [0] * 4 + [1] * 12
    # pixel (2, 3) of the 4-px mask is rows 8..11 and columns 12..15 of the image
    assert record.points.rows.tolist() == [[2, 6, 0], [10, 14, 1], [14, 2, 1]]
    record.points.check_inside(*record.size(), dataset.labels)
    assert all(mask[row, col] == label for row, col, label in record.points.rows)
    assert record.group.startswith("tumor_")


def test_camelyon16_folds_test_every_crop_once(tmp_path):
    fakes.write_camelyon16(tmp_path)
    tested = Counter()
    for scheme in catalog.get("camelyon16").splits:
        dataset = catalog.read("camelyon16", tmp_path, scheme)
        assert_apart(dataset)
        assert len(records(dataset)) == 16
        tested.update(record.id for record in dataset.splits["test"])
    assert len(tested) == 16
    assert set(tested.values()) == {1}


def test_camelyon16_without_points(tmp_path):
    fakes.write_camelyon16(tmp_path)
    for path in (tmp_path / "points").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"images/tumor_000_0_128\.png.*points/tumor_000_0_128\.json"):
        catalog.read("camelyon16", tmp_path)
    (tmp_path / "points").rmdir()
    dataset = catalog.read("camelyon16", tmp_path)
    assert all(record.points is None for record in records(dataset))


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"pos": []}',
        '{"pos": [[1, 2, 3]], "neg": []}',
        '{"pos": [[1, 2.5]], "neg": []}',
        '{"pos": [[4, 0]], "neg": []}',
        '{"pos": 3, "neg": []}',
        '{"pos": [[0, -1]], "neg": []}',
    ],
)
def test_camelyon16_bad_points_name_the_file(tmp_path, text):
    fakes.write_camelyon16(tmp_path, slides=4)
    (tmp_path / "points" / "tumor_002_0_128.json").write_text(text)
    with pytest.raises(InputError, match=r"tumor_002_0_128\.json"):
        catalog.read("camelyon16", tmp_path)


def test_camelyon16_mask_must_fit_the_image(tmp_path):
    fakes.write_camelyon16(tmp_path, slides=4)
    Image.fromarray(np.zeros((5, 4), np.uint8)).save(tmp_path / "masks" / "tumor_001_0_128.png")
    with pytest.raises(InputError, match=r"masks/tumor_001_0_128\.png.*5 x 4.*16 x 16"):
        catalog.read("camelyon16", tmp_path)
    fakes.write_image(tmp_path / "images" / "crop.png")
    fakes.write_mask(tmp_path / "masks" / "crop.png", [0])
    with pytest.raises(InputError, match=r"crop\.png"):
        catalog.read("camelyon16", tmp_path)
