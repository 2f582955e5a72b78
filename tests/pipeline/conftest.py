"""A run so small that it takes seconds, and the directory that it leaves."""

import copy

import pytest

import tissuehint

RECIPE = {
    "name": "tiny",
    "seed": 3,
    "data": {"source": "phantom", "phantom": {"train": 5, "val": 2, "test": 3, "size": 64}, "workers": 0},
    "method": {"name": "cam", "encoder": {"name": "test_resnet"}, "dropout": 0.2, "white_threshold": 220},
    "stage1": {"steps": 4, "batch_size": 4, "round_steps": 2},
    "stage2": {
        "network": {"architecture": "fpn", "encoder": {"name": "test_resnet"}},
        "steps": 6,
        "batch_size": 4,
        "round_steps": 2,
        "crop": 64,
        "keep": "best",
    },
    "ceiling": True,
    "trainer": {"accelerator": "cpu", "progress": False},
    "evaluation": {"gallery": 2, "boundary_distances": [1]},
    "published": {"somebody": "99.9 mIoU"},
}


@pytest.fixture
def recipe(tmp_path):
    """A mapping to change at will; the run directory is tmp_path/runs/tiny."""
    return {**copy.deepcopy(RECIPE), "output": str(tmp_path / "runs")}


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(result, snapshot of its files as {relative path: bytes}) of one uninterrupted run; read only."""
    result = tissuehint.run(copy.deepcopy(RECIPE), output=str(tmp_path_factory.mktemp("finished")))
    files = {str(path.relative_to(result.path)): path for path in result.path.rglob("*") if path.is_file()}
    return result, {name: path.read_bytes() for name, path in files.items()}
