import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")

SCRIPT = Path(__file__).with_name("killed_runs.py")
MOMENTS = ("stage1_step", "stage1_unmarked", "pseudo_mask", "stage2_best")


@pytest.fixture(scope="module")
def directories(finished, tmp_path_factory):
    """{moment: directory of a run killed there and run again}."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = {**yaml.safe_load((finished[0].path / "recipe.yaml").read_text()), "ceiling": False}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder / "recipe.yaml"), str(folder), *MOMENTS],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return {moment: folder / moment / "tiny" for moment in MOMENTS}


def table(path):
    """{(step, column): value} of a log; fails where a step has a column twice."""
    cells = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for column, value in row.items():
                if value and column not in ("step", "epoch", "data_wait"):
                    assert (int(row["step"]), column) not in cells, f"step {row['step']} has {column} twice"
                    cells[int(row["step"]), column] = value
    return cells


@pytest.mark.parametrize("moment", MOMENTS)
class TestKilled:
    def test_weights_and_pseudo_masks_are_those_of_a_run_that_nobody_killed(self, directories, finished, moment):
        names = [name for name in finished[1] if name.startswith("pseudo_masks/phantom")]
        names += ["stage1/weights.safetensors", "stage2/weights.safetensors", "model/model.safetensors"]
        for name in names:
            assert (directories[moment] / name).read_bytes() == finished[1][name], name

    def test_scores_are_equal(self, directories, finished, moment):
        scores = json.loads((directories[moment] / "scores.json").read_text())
        expected = [row for row in json.loads(finished[1]["scores.json"])["rows"] if row["stage"] != "ceiling"]
        assert scores["rows"] == expected

    def test_logs_have_no_gap_and_no_step_twice(self, directories, finished, moment):
        for stage in ("stage1", "stage2"):
            assert table(directories[moment] / stage / "metrics.csv") == table(finished[0].path / stage / "metrics.csv")

    def test_nothing_of_the_kill_is_left_under_a_final_name(self, directories, finished, moment):
        def seen(names):
            return {name for name in names if "logs" not in name and "ceiling" not in name and ".part" not in name}

        here = {str(path.relative_to(directories[moment])) for path in directories[moment].rglob("*") if path.is_file()}
        assert seen(here) == seen(finished[1])
