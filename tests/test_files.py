import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from tissuehint.data.records import read_codes, read_image
from tissuehint.files import atomic_path, write_json, write_palette_png, write_text
from tissuehint.labels import LabelSpace

SPACE = LabelSpace(("gland", "stroma", "white"), white=2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class TestAtomicPath:
    def test_the_file_appears_at_the_end_under_its_name(self, tmp_path):
        target = tmp_path / "deep" / "er" / "scores.json"
        with atomic_path(target) as part:
            assert part.parent == target.parent
            assert part.suffix == ".json"
            assert part.name.startswith(".")
            part.write_text("whole")
            assert not target.exists()
        assert target.read_text() == "whole"
        assert names(target.parent) == ["scores.json"]

    @pytest.mark.parametrize("old", [None, "old"])
    @pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
    def test_a_failure_leaves_what_was_there(self, tmp_path, old, error):
        target = tmp_path / "scores.json"
        if old:
            target.write_text(old)

        def write():
            with atomic_path(target) as part:
                part.write_text("half")
                raise error

        with pytest.raises(type(error)):
            write()
        assert names(tmp_path) == (["scores.json"] if old else [])
        assert not old or target.read_text() == old

    def test_a_library_that_does_not_say_that_the_disk_is_full(self, tmp_path, monkeypatch):
        """numpy's error has no number."""

        def write():
            with atomic_path(tmp_path / "a.npy"):
                raise OSError("25600 requested and 1234 written")

        with pytest.raises(OSError, match="25600 requested"):
            write()
        monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "a.npy"))
        assert names(tmp_path) == []

    def test_a_failing_rename_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="space"):
            write_text(tmp_path / "a.txt", "text")
        assert names(tmp_path) == []

    def test_readers_never_see_a_part(self, tmp_path):
        target = tmp_path / "a.txt"
        write_text(target, "one")
        with atomic_path(target) as part:
            part.write_text("tw")
            assert target.read_text() == "one"
            part.write_text("two")
        assert target.read_text() == "two"

    @pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
    def test_permissions_follow_the_umask(self, tmp_path):
        plain = tmp_path / "plain"
        plain.touch()
        write_text(tmp_path / "a.txt", "text")
        assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits are POSIX")
@pytest.mark.parametrize("kind", ["json", "png"])
def test_a_disk_that_fills_up_in_the_middle_leaves_the_old_file(tmp_path, kind):
    target = tmp_path / f"file.{kind}"
    target.write_bytes(b"old")
    script = f"""
import resource, signal, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np
from tissuehint.files import write_json, write_palette_png
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    if {kind!r} == "json":
        write_json(Path(sys.argv[1]), list(range(9999)))
    else:
        mask = np.random.default_rng(0).integers(0, 256, (200, 200)).astype(np.uint8)
        write_palette_png(Path(sys.argv[1]), mask, [0] * 768)
except OSError as error:
    sys.exit(f"refused {{error.errno}}")
"""
    # stderr is a pipe, which the limit does not touch
    done = subprocess.run([sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == f"refused {errno.EFBIG}"
    assert names(tmp_path) == [target.name]
    assert target.read_bytes() == b"old"


class TestJson:
    def test_numbers_that_json_has_not_become_null(self, tmp_path):
        value = {
            "nan": float("nan"),
            "inf": [np.inf, -np.inf],
            "numpy": np.float32("nan"),
            "array": np.array([[1.5, np.nan]]),
            "nested": ({"deep": (np.nan, 2)},),
        }
        write_json(tmp_path / "a.json", value)

        def refuse(constant):
            raise AssertionError(f"{constant} is no JSON")

        read = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
        assert read == {
            "nan": None,
            "inf": [None, None],
            "numpy": None,
            "array": [[1.5, None]],
            "nested": [{"deep": [None, 2]}],
        }

    def test_plain_values_come_back(self, tmp_path):
        value = {"text": "Drüse", 1: True, "none": None, "path": tmp_path, "int": np.int64(7), "bool": np.bool_(False)}
        write_json(tmp_path / "a.json", value)
        read = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert read == {"text": "Drüse", "1": True, "none": None, "path": str(tmp_path), "int": 7, "bool": False}

    def test_what_is_no_json_leaves_nothing(self, tmp_path):
        with pytest.raises(TypeError):
            write_json(tmp_path / "a.json", {"a": object()})
        assert names(tmp_path) == []


class TestPalettePng:
    @settings(max_examples=20)
    @given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)))
    def test_every_index_comes_back(self, tmp_path_factory, mask):
        path = tmp_path_factory.mktemp("png") / "mask.png"
        write_palette_png(path, mask, SPACE.palette())
        np.testing.assert_array_equal(read_codes(path), mask)
        np.testing.assert_array_equal(read_image(path), SPACE.colour_table()[mask])
        with Image.open(path) as picture:
            assert picture.mode == "P"

    def test_a_strided_view_is_written_as_seen(self, tmp_path):
        mask = np.arange(24, dtype=np.uint8).reshape(4, 6)[::2, ::-1].T
        write_palette_png(tmp_path / "a.png", mask, SPACE.palette())
        np.testing.assert_array_equal(read_codes(tmp_path / "a.png"), mask)

    def test_a_full_disk_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image.Image, "save", full_disk)
        with pytest.raises(OSError, match="space"):
            write_palette_png(tmp_path / "a.png", np.zeros((3, 3), np.uint8), SPACE.palette())
        assert names(tmp_path) == []


def test_a_full_disk_names_the_target(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "a.bin"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.bin")
    with pytest.raises(OSError, match="No space left") as caught, atomic_path(tmp_path / "a.bin") as part:
        raise OSError(errno.ENOSPC, "No space left on device", str(part))
    assert caught.value.filename == str(tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_words_a_full_disk_itself(tmp_path, monkeypatch):
    def fail():
        with atomic_path(tmp_path / "a.bin"):
            raise RuntimeError("PytorchStreamWriter failed writing file data/0")

    with pytest.raises(RuntimeError):  # there is room: another defect, not to be hidden
        fail()
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left") as caught:
        fail()
    assert caught.value.filename == str(tmp_path / "a.bin")
