"""Two CPU processes (DDP) against one."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tissuehint

SCRIPT = Path(__file__).with_name("two_processes.py")
# gradients are summed in another order; 10 Adam steps make of 1e-8 about 1e-5
WEIGHTS, SCORES = 2e-4, 5e-3

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def alone_and_together(tmp_path_factory):
    """({name: recipe}, result of one process, folder of two processes, their notes)."""
    folder, notes = tmp_path_factory.mktemp("processes"), tmp_path_factory.mktemp("notes")
    # no batch norm and no dropout anywhere, so that two halves of a batch see what one whole batch sees
    same = {
        "name": "same",
        "output": str(folder),
        "data": {"source": "phantom", "phantom": {"train": 5, "val": 2, "test": 3, "size": 64}, "workers": 0},
        "method": {"name": "cam", "encoder": {"name": "test_convnext"}},
        "stage1": {"steps": 4, "batch_size": 4, "round_steps": 2},
        "stage2": {
            "network": {
                "architecture": "fpn",
                "encoder": {"name": "test_convnext"},
                "decoder": {"decoder_dropout": 0.0},
            },
            "steps": 4,
            "batch_size": 4,
            "round_steps": 2,
            "crop": 64,
            "keep": "best",
        },
        "trainer": {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "progress": False},
        "evaluation": {"gallery": 1},
    }
    # batch norm: each process has running means of its own while it trains
    norm = {**copy.deepcopy(same), "name": "norm", "stage2": None}
    norm["method"]["encoder"]["name"] = "test_resnet"
    norm["data"]["phantom"]["val"] = 0  # a validation pass would bring the buffers together
    for recipe in (same, norm):
        (folder / f"{recipe['name']}.yaml").write_text(yaml.safe_dump(recipe))
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(notes), str(folder / "same.yaml"), str(folder / "norm.yaml")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, errors = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    one = tissuehint.run(same, output=str(folder / "alone"), trainer__devices=1, trainer__strategy="auto")
    return one, folder, notes


def runs(process):
    """Whether a process still runs; one that ended and that nobody has waited for (a container's init) does not."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{process}/stat")
    try:
        return not state.exists() or state.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_both_processes_end(alone_and_together):
    _, _, notes = alone_and_together
    processes = [int((notes / f"ended_{rank}.txt").read_text()) for rank in (0, 1)]
    until = time.monotonic() + 30
    while any(map(runs, processes)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(runs, processes))


def test_an_ended_process_that_nobody_waited_for_does_not_run():
    process = subprocess.Popen([sys.executable, "-c", ""])
    until = time.monotonic() + 30
    while runs(process.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not runs(process.pid)
    assert process.wait() == 0
    assert runs(os.getpid())


def test_each_pseudo_mask_is_written_once_and_by_both_processes(alone_and_together):
    _, _, notes = alone_and_together
    parts = [
        [line for line in (notes / f"written_{rank}.txt").read_text().split() if line.startswith("same/")]
        for rank in (0, 1)
    ]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == [f"same/phantom_train_{index:04d}.png" for index in range(5)]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_weights_are_those_of_one_process(alone_and_together, stage):
    one, folder, _ = alone_and_together
    alone, together = (load_file(path / stage / "weights.safetensors") for path in (one.path, folder / "same"))
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, atol=WEIGHTS, rtol=0, msg=name)


def test_scores_are_those_of_one_process(alone_and_together):
    one, folder, _ = alone_and_together
    alone = json.loads((one.path / "scores.json").read_text())["rows"]
    together = json.loads((folder / "same" / "scores.json").read_text())["rows"]
    assert len(alone) == len(together) == 13
    for mine, theirs in zip(alone, together, strict=True):
        for key in ("stage", "gate", "split", "protocol", "images", "pixels"):
            assert mine[key] == theirs[key]
        for key in ("miou", "fwiou", "dice_mean", "accuracy", "proportion_w1"):
            assert theirs[key] == pytest.approx(mine[key], abs=SCORES), (mine["stage"], mine["gate"], key)


def test_processes_agree_on_every_buffer_before_they_share_the_work(alone_and_together):
    _, _, notes = alone_and_together
    states = {(notes / f"state_norm_{rank}.txt").read_text() for rank in (0, 1)}
    assert len(states) == 1
