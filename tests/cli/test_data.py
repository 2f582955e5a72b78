from __future__ import annotations

import pytest
from PIL import Image

from tissuehint.data import catalog
from tissuehint.data.folder import read_folder


def test_list_names_every_data_set_and_its_licence(command):
    outcome = command("data", "list")
    assert outcome.code == 0
    for name in catalog.names():
        assert any(line.split()[:1] == [name] for line in outcome.out.splitlines()), name


def test_list_of_one_shows_the_layout(command):
    out = command("data", "list", "glas").out
    for line in catalog.get("glas").layout.strip().splitlines():
        assert line.strip() in out
    command("data", "list", "glass").refused("glass", "glas")


def test_check_of_whole_data_is_quiet(command, tissue_folder):
    outcome = command("data", "check", tissue_folder)
    assert (outcome.code, outcome.out) == (0, f"{tissue_folder}: 0 errors, 0 warnings\n")


def test_check_lists_all_problems_in_one_pass(command, tissue_folder):
    table = tissue_folder / "labels.csv"
    lines = table.read_text().splitlines()
    cells = lines[1].split(",")
    cells[3] = "yes"
    lines[1] = ",".join(cells)
    lines[2] = lines[2].replace("phantom_", "ghost_", 1)
    table.write_text("\n".join(lines) + "\n")
    (tissue_folder / "masks" / "phantom_test_0000.png").write_bytes(b"no image")
    outcome = command("data", "check", tissue_folder)
    assert outcome.code == 2
    assert "labels.csv:2:" in outcome.out
    assert "labels.csv:3:" in outcome.out
    assert "masks/phantom_test_0000.png" in outcome.out


def test_check_with_warnings_only_is_0(command, tissue_folder):
    Image.new("RGB", (64, 64)).save(tissue_folder / "images" / "unlisted.png")
    outcome = command("data", "check", tissue_folder)
    assert outcome.code == 0
    assert "1 warning" in outcome.out.splitlines()[-1]


def test_phantom_writes_what_it_says(command, tmp_path):
    folder = tmp_path / "new" / "tissue"
    outcome = command("data", "phantom", folder, "--train", 3, "--val", 0, "--test", 2, "--size", 64, "--seed", 5)
    assert outcome.code == 0, outcome.err
    dataset = read_folder(folder)
    assert [len(dataset.splits[split]) for split in ("train", "val", "test")] == [3, 0, 2]
    command("data", "phantom", folder).refused(str(folder), "not empty")


def test_weaken_a_folder(command, tissue_folder, tmp_path):
    out = tmp_path / "weak"
    words = ("--points", 1, "--round-to", 0.1, "--seed", 3, "--tag-threshold", 0.05)
    outcome = command("data", "weaken", tissue_folder, "--out", out, *words)
    assert outcome.code == 0, outcome.err
    dataset = read_folder(out)
    for records in dataset.splits.values():
        for record in records:
            assert record.tags is not None
            assert record.proportions is not None
            tenths = record.proportions.values * 10
            assert tenths == pytest.approx(tenths.round(), abs=1e-6)
    assert command("data", "check", out).code == 0
    command("data", "weaken", tissue_folder, "--out", out).refused("not empty")


def test_weaken_without_masks_names_the_image_and_leaves_nothing(command, tissue_folder, tmp_path):
    (tissue_folder / "masks" / "phantom_val_0000.png").unlink()
    out = tmp_path / "deep" / "weak"
    command("data", "weaken", tissue_folder, "--out", out).refused("phantom_val_0000", "mask")
    assert not out.parent.exists()
    outcome = command("data", "weaken", tissue_folder, "--out", out, "--masked-only")
    assert outcome.code == 0
    assert len(read_folder(out).splits["val"]) == 1


def test_weaken_refuses_unknown_sources_and_rules(command, tissue_folder, tmp_path):
    out = tmp_path / "weak"
    command("data", "weaken", "glass", "--out", out).refused("glass", "glas")
    command("data", "weaken", tmp_path / "gone", "--out", out).refused("gone", "no folder")
    command("data", "weaken", "glas", "--root", tmp_path / "gone", "--out", out).refused("gone")
    command("data", "weaken", tissue_folder, "--out", out, "--tag-threshold", 7).refused("threshold")
    command("data", "weaken", tissue_folder, "--out", out, "--scheme", "x").refused("--scheme")
    assert not out.exists()
