from pathlib import Path

import pytest

from tests.report.run_directories import build_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return build_run(tmp_path / "phantom-cam-0")
