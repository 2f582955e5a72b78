import json
import os
import subprocess
import sys

import pytest

MARGIN = 0.15


@pytest.mark.slow
def test_the_demo_is_far_above_the_tags_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "tissuehint", "demo", "--out", str(tmp_path), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    report = tmp_path / "cam-phantom" / "report.html"
    assert str(report) in done.stdout
    rows = json.loads((report.parent / "scores.json").read_text())["rows"]
    miou = {row["stage"]: row["miou"] for row in rows if row["protocol_id"] == "A" and row["gate"] != "oracle"}
    tags = next(row["miou"] for row in rows if row["stage"] == "tags_only" and row["protocol_id"] == "A")
    assert miou["stage2"] > tags + MARGIN
