from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from tissuehint.cli import main

TINY = {
    "data": {"source": "phantom", "workers": 0, "phantom": {"train": 6, "val": 2, "test": 2, "size": 64}},
    "method": {"name": "cam", "encoder": {"name": "mobilenetv3_small_050"}},
    "stage1": {"steps": 2, "batch_size": 2, "round_steps": 2},
    "stage2": {
        "network": {"architecture": "unet", "encoder": {"name": "mobilenetv3_small_050"}},
        "steps": 2,
        "batch_size": 2,
        "round_steps": 2,
        "crop": 64,
    },
    "ceiling": True,
    "evaluation": {"gallery": 1},
    "trainer": {"accelerator": "cpu", "progress": False},
}


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """One line on stderr that says all words, exit code 2, no traceback."""
        assert self.code == 2, self
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.out
        for word in words:
            assert word in lines[0], (word, lines[0])


@pytest.fixture
def command(capfd, monkeypatch):
    monkeypatch.delenv("TISSUEHINT_DEBUG", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        out, err = capfd.readouterr()
        return Outcome(code, out, err)

    return call


@pytest.fixture(scope="session")
def tiny_recipe() -> dict[str, object]:
    return TINY


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory) -> Path:
    """Folder with the finished runs tiny-seed0 and tiny-seed1; made once for all test processes."""
    import yaml
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    folder = (base if base.name.startswith("pytest-") else base.parent) / "tiny_runs"
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            import torch

            torch.set_num_threads(1)
            recipe = base / "tiny.yaml"
            recipe.write_text(yaml.safe_dump({"name": "tiny", **TINY}))
            assert main(["run", str(recipe), "--seeds", "0,1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_runs) -> Path:
    return tiny_runs / "tiny-seed0"


@pytest.fixture
def tissue_folder(tmp_path) -> Path:
    """A data folder of synthetic tissue."""
    from tissuehint.data.phantom import write_phantom

    folder = tmp_path / "tissue"
    write_phantom(folder, count=(4, 2, 2), size=64)
    return folder
