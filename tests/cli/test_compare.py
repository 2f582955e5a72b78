from __future__ import annotations

import json

import pytest
from scipy import stats


def write_run(folder, miou, stage="stage2"):
    row = {"stage": stage, "name": "m", "gate": "none", "split": "test", "protocol": "ignore_white", "miou": miou}
    folder.mkdir()
    (folder / "scores.json").write_text(json.dumps({"rows": [{**row, "dice_mean": miou / 2}]}))
    return folder


def test_welch_against_scipy_and_shell_patterns_on_both_sides(command, tmp_path):
    a = [write_run(tmp_path / f"a{index}", value) for index, value in enumerate((0.70, 0.74, 0.71))]
    b = [write_run(tmp_path / f"b{index}", value) for index, value in enumerate((0.60, 0.69))]
    target = tmp_path / "out.json"
    outcome = command("compare", *a, "--against", *b, "--json", target)
    assert outcome.code == 0, outcome.err
    first = json.loads(target.read_text())["rows"][0]
    assert first["measure"] == "mIoU"
    assert first["p"] == pytest.approx(stats.ttest_ind([0.70, 0.74, 0.71], [0.60, 0.69], equal_var=False).pvalue)
    assert "0.717 +- 0.021" in outcome.out
    assert "A: 3 runs, B: 2 runs" in outcome.out
    assert "+0.072" in outcome.out


def test_one_run_a_side_has_no_p(command, tmp_path):
    a, b = write_run(tmp_path / "a", 0.7), write_run(tmp_path / "b", 0.6)
    outcome = command("compare", a, "--against", b)
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if "mIoU" in line)
    assert line.split()[-1] == "-"
    assert line.split()[3:5] == ["0.700", "0.600"]


def test_bad_groups_are_refused(command, tmp_path):
    a, b = write_run(tmp_path / "a", 0.7), write_run(tmp_path / "b", 0.6)
    command("compare", a, b).refused("--against")
    command("compare", a, "--against").refused("--against")
    command("compare", a, "--against", a).refused("given twice")
    command("compare", a, "--agianst", b).refused("--agianst")
    command("compare", a, "--against", tmp_path / "none").refused("none", "scores.json")
    other = write_run(tmp_path / "c", 0.6, stage="stage1")
    command("compare", a, "--against", other).refused("no row")
    (b / "scores.json").write_text("{")
    command("compare", a, "--against", b).refused("scores.json", "damaged")
