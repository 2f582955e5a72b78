"""``tissuehint predict`` on slides: what it leaves, what it survives, how it goes on."""

import csv
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tifffile
from PIL import Image

from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.model import TissueModel
from tissuehint.slides import mapping
from tissuehint.slides import predict as slide_predict
from tissuehint.slides.export import ome_tiff

FILES = {"classes.ome.tif", "tissue.geojson.gz", "areas.csv", "thumbnail.jpg", "overlay.jpg"}
FILES |= {"tissue_mask.geojson", "slide.json"}


@pytest.fixture(scope="session")
def drawn_slides(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate(("a", "b")):
        write_phantom_slide(folder / f"{name}.svs", 400, 520, seed=seed, um_per_px=0.5, blank=0.2)
    return folder


@pytest.fixture
def scans(drawn_slides, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for file in drawn_slides.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def predict(command, tiny_run, tmp_path):
    out = tmp_path / "maps"

    def call(*words, model=tiny_run):
        return command("predict", model, *words, "--out", out, "--quiet")

    call.out = out
    return call


def record(folder):
    return json.loads((folder / "slide.json").read_text())


def table(out):
    with (out / "cohort.csv").open(newline="") as file:
        return list(csv.DictReader(file))


class TestASlide:
    def test_leaves_its_files(self, predict, scans):
        outcome = predict(scans / "a.svs", "--soft")
        assert outcome.code == 0, outcome.err
        folder = predict.out / "a"
        assert {file.name for file in folder.iterdir()} == {*FILES, "probabilities.zarr"}
        assert {file.name for file in predict.out.iterdir()} == {"a", "cohort.csv", "cohort.json", "summary.html"}
        state = record(folder)
        assert (state["state"], state["attempts"], state["error"]) == ("done", 1, None)
        assert state["map"] == {"height": 400, "width": 520, "um_per_px": 0.5, "scale": 1.0, "top": 0.0, "left": 0.0}
        assert len(state["slide"]["sha256"]) == len(state["model"]["sha256"]) == 64
        assert state["slide"]["um_per_px"] == pytest.approx(0.5)
        assert "torch" in state["versions"]
        assert set(state["outputs"]) == {*FILES, "probabilities.zarr"} - {"slide.json"}

    @pytest.mark.parametrize(("side", "width"), [(150, 130), (200, 200)])
    def test_a_level_that_is_nearly_of_its_size_serves_as_thumbnail(self, predict, scans, monkeypatch, side, width):
        write_phantom_slide(scans / "levels.svs", 400, 520, levels=(1, 4), blank=0.2)
        monkeypatch.setattr(slide_predict, "THUMBNAIL_SIDE", side)
        assert predict(scans / "levels.svs").code == 0
        for name in ("thumbnail.jpg", "overlay.jpg"):
            assert Image.open(predict.out / "levels" / name).width == width

    def test_map_is_that_of_the_model(self, predict, scans, tiny_run):
        import zarr

        assert predict(scans / "a.svs", "--soft", "--overlap", 0).code == 0
        classes = tifffile.imread(predict.out / "a" / "classes.ome.tif")
        shares = zarr.open_array(str(predict.out / "a" / "probabilities.zarr"), mode="r")[:]
        model = TissueModel.load(tiny_run)
        with Image.open(scans / "a.svs") as picture:
            image = np.asarray(picture.convert("RGB"))
        side = model.grid.side
        inside = np.s_[: 400 // side * side, : 520 // side * side]  # whole windows
        expected = model.predict(np.ascontiguousarray(image[inside]))
        mapped = classes[inside] != 255
        assert 0.3 < mapped.mean() < 1
        assert (classes[inside] == expected.argmax(0).numpy())[mapped].mean() > 0.995  # a JPEG decoder's last digit
        assert np.abs(shares[(slice(None), *inside)] / 255 - expected.numpy())[:, mapped].max() < 0.05

    def test_tables_agree_with_the_map(self, predict, scans):
        assert predict(scans / "a.svs").code == 0
        classes = tifffile.imread(predict.out / "a" / "classes.ome.tif")
        with (predict.out / "a" / "areas.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for index, row in enumerate(rows):
            count = int((classes == index).sum())
            assert int(row["pixels"]) == count
            assert float(row["mm2"]) == pytest.approx(count * 0.25e-6, rel=1e-4)
        (row,) = table(predict.out)
        assert (row["slide"], row["state"], row["error"]) == ("a", "done", "")
        assert float(row[f"{rows[0]['class']} mm2"]) == pytest.approx(float(rows[0]["mm2"]), rel=1e-4)

    def test_polygons_lie_on_the_slide(self, predict, scans):
        assert predict(scans / "a.svs", "--tolerance", 0, "--min-area", 0).code == 0
        from rasterio.features import rasterize

        classes = tifffile.imread(predict.out / "a" / "classes.ome.tif")
        names = record(predict.out / "a")["labels"]["names"]
        with gzip.open(predict.out / "a" / "tissue.geojson.gz") as file:
            features = json.load(file)["features"]
        shapes = [(each["geometry"], names.index(each["properties"]["classification"]["name"])) for each in features]
        assert {each["properties"]["objectType"] for each in features} == {"annotation"}
        painted = rasterize(shapes, out_shape=classes.shape, fill=255, dtype="uint8")
        white = names.index("white")
        assert (painted == np.where(classes == white, 255, classes)).all()

    def test_is_told(self, predict, scans):
        outcome = predict(scans / "a.svs")
        assert "1 of 1 slides" in outcome.out
        assert "tissuehint view" in outcome.out
        assert outcome.err == ""

    def test_beside_plain_images(self, predict, scans, tissue_folder):
        image = tissue_folder / "images" / "phantom_test_0000.png"
        assert predict(scans / "a.svs", image).code == 0
        assert (predict.out / "phantom_test_0000.png").is_file()
        assert (predict.out / "a" / "slide.json").is_file()
        assert (predict.out / "areas.csv").is_file()


class TestCohorts:
    def test_of_a_folder_a_pattern_and_a_table(self, predict, scans):
        (scans / "table.csv").write_text("slide,mpp\na.svs,\nb.svs,\n")
        for words in ([scans], [scans / "*.svs"], [scans / "table.csv"]):
            outcome = predict(*words)
            assert outcome.code == 0, outcome.err
        assert [row["slide"] for row in table(predict.out)] == ["a", "b"]
        assert outcome.out.count("finished before") == 2
        page = (predict.out / "summary.html").read_text()
        assert "a/overlay.jpg" in page
        assert "2 done" in page

    def test_finished_slides_are_left_alone(self, predict, scans):
        assert predict(scans).code == 0
        before = {file: file.stat().st_mtime_ns for file in (predict.out / "a").iterdir()}
        assert predict(scans).code == 0
        assert {file: file.stat().st_mtime_ns for file in (predict.out / "a").iterdir()} == before

    def test_a_slide_that_changed_is_done_again(self, predict, scans):
        assert predict(scans / "a.svs").code == 0
        (scans / "a.svs").write_bytes((scans / "b.svs").read_bytes())
        assert predict(scans / "a.svs").code == 0
        assert record(predict.out / "a")["attempts"] == 2

    def test_a_slide_that_was_replaced_by_a_bad_one_keeps_no_old_results(self, predict, scans):
        assert predict(scans / "a.svs", "--soft").code == 0
        (scans / "a.svs").write_bytes(b"no slide")
        assert predict(scans / "a.svs", "--soft").code == 2
        assert {file.name for file in (predict.out / "a").iterdir()} == {"slide.json"}
        assert record(predict.out / "a")["state"] == "failed"

    def test_other_settings_or_models_need_another_folder(self, predict, scans, tiny_runs):
        assert predict(scans / "a.svs").code == 0
        predict(scans / "a.svs", "--tolerance", 2).refused(str(predict.out), "other settings of polygons", "--out")
        predict(scans / "a.svs", model=tiny_runs / "tiny-seed1").refused("another model")

    def test_two_slides_of_a_name(self, predict, scans):
        (scans / "sub").mkdir()
        (scans / "sub" / "A.svs").write_bytes((scans / "a.svs").read_bytes())
        predict(scans / "a.svs", scans / "sub" / "A.svs").refused("A.svs", "same folder", "rename one")
        assert not predict.out.exists()


class TestBadInput:
    """The others go on, the exit code is 2, and the reason stands in the table."""

    def check(self, predict, scans, *words, name="bad", attempt=()):
        outcome = predict(scans, *attempt)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        line = next(line for line in outcome.err.splitlines() if name in line)
        for word in words:
            assert word in line, (word, line)
        rows = {row["slide"]: row for row in table(predict.out)}
        assert rows["a"]["state"] == rows["b"]["state"] == "done"
        assert rows[name]["state"] == "failed"
        assert words[0] in rows[name]["error"]
        assert not (predict.out / name / "classes.ome.tif").exists()
        assert "1 of 3 slides have no result" in outcome.err
        assert f"{name}" in outcome.err.splitlines()[-1]
        return outcome

    def test_truncated(self, predict, scans):
        (scans / "bad.svs").write_bytes((scans / "a.svs").read_bytes()[:9000])
        self.check(predict, scans, "bad.svs")

    def test_no_slide_at_all(self, predict, scans):
        (scans / "bad.svs").write_text("no slide")
        self.check(predict, scans, "bad.svs")

    def test_a_jpeg_named_svs(self, predict, scans):
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(scans / "bad.svs", format="JPEG")
        self.check(predict, scans, "JPEG")

    def test_without_um_per_px(self, predict, scans):
        pixels = np.full((300, 300, 3), 120, np.uint8)
        tifffile.imwrite(scans / "bad.tif", pixels, tile=(64, 64), photometric="rgb")
        self.check(predict, scans, "microns per pixel", "--mpp")

    def test_mpp_is_for_slides_without_their_own(self, predict, scans):
        """Given after the first run, it adds the slide that needed it, and does no other again."""
        pixels = np.zeros((300, 300, 3), np.uint8)
        pixels[:] = 200, 60, 120
        tifffile.imwrite(scans / "bad.tif", pixels, tile=(64, 64), photometric="rgb")
        words = ["--tissue", "threshold=0.05", "--tissue", "min_area_um2=0"]
        assert predict(scans, *words).code == 2
        outcome = predict(scans, *words, "--mpp", 0.25)
        assert outcome.code == 0, outcome.err
        assert outcome.out.count("finished before") == 2
        found = {name: record(predict.out / name) for name in ("a", "b", "bad")}
        assert [one["slide"]["um_per_px"] for one in found.values()] == pytest.approx([0.5, 0.5, 0.25])
        assert [one["attempts"] for one in found.values()] == [1, 1, 2]
        assert predict(scans, *words, "--mpp", 0.25).out.count("finished before") == 3
        assert predict(scans, *words).out.count("finished before") == 3
        assert predict(scans, *words, "--mpp", 0.3).out.count("finished before") == 2

    def test_a_table_says_it_better(self, predict, scans):
        (scans / "table.csv").write_text("slide,mpp\na.svs,0.25\n")
        for words in ([scans, scans / "table.csv"], [scans / "table.csv", scans / "a.svs"]):
            assert predict(*words, "--mpp", 1, "--tissue", "min_area_um2=0").code == 0
            assert record(predict.out / "a")["slide"]["um_per_px"] == 0.25
        (scans / "other.csv").write_text("slide,mpp\na.svs,0.3\n")
        predict(scans / "table.csv", scans / "other.csv").refused("a.svs", "two values of mpp (0.25, 0.3)")

    def test_hidden_files_are_no_slides(self, predict, scans):
        (scans / "._a.svs").write_bytes(b"what macOS writes beside a file")
        assert predict(scans).code == 0
        assert [row["slide"] for row in table(predict.out)] == ["a", "b"]

    def test_a_record_that_was_written_by_hand(self, predict, scans):
        assert predict(scans).code == 0
        values = record(predict.out / "b") | {"areas": None}
        (predict.out / "b" / "slide.json").write_text(json.dumps(values))
        outcome = predict(scans)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        assert "slide.json: is damaged (areas is no list)" in outcome.err

    def test_without_tissue(self, predict, scans):
        write_phantom_slide(scans / "bad.svs", 200, 200, blank=1.0)
        self.check(predict, scans, "shows no tissue", "thumbnail.jpg")
        assert (predict.out / "bad" / "thumbnail.jpg").is_file()

    def test_removed_while_it_is_read(self, predict, scans, monkeypatch):
        from tissuehint.slides.mapping import Mapper

        (scans / "bad.svs").write_bytes((scans / "a.svs").read_bytes())
        whole = Mapper.run

        def run(self, progress=None):
            if self.slide.name == "bad":
                (scans / "bad.svs").unlink()
            return whole(self, progress)

        monkeypatch.setattr(Mapper, "run", run)
        self.check(predict, scans, "bad.svs")

    def test_a_full_disk(self, predict, scans, monkeypatch):
        whole = ome_tiff.write_ome_tiff

        def write(path, *words, **names):
            if path.parent.name == "bad":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            whole(path, *words, **names)

        (scans / "bad.svs").write_bytes((scans / "a.svs").read_bytes())
        monkeypatch.setattr("tissuehint.slides.predict.write_ome_tiff", write)
        self.check(predict, scans, "the disk is full", "free space")
        monkeypatch.undo()
        outcome = predict(scans)  # with space again
        assert outcome.code == 0, outcome.err
        assert record(predict.out / "bad")["attempts"] == 2

    def test_a_file_that_does_not_exist(self, predict, scans):
        outcome = predict(scans / "a.svs", scans / "nothing.svs")
        assert outcome.code == 2
        assert "nothing.svs" in outcome.err
        assert "does not exist" in outcome.err

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("name\na.svs\n", ("no column slide",)),
            ("slide,mpp\na.svs,wide\n", (":2", "mpp 'wide'")),
            ("slide,mpp\n,0.5\n", (":2", "names no slide")),
            ("", ("no rows",)),
        ],
    )
    def test_tables_that_are_none(self, predict, scans, text, words):
        (scans / "t.csv").write_text(text)
        predict(scans / "t.csv").refused("t.csv", *words)

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            (["--tissue", "colour=1"], ("--tissue colour=1", "KEY=VALUE")),
            (["--overlap", 64], ("--overlap 64",)),
            (["--window", 64, "--overlap", 80], ("--overlap 80",)),
            (["--outline", "nothing.geojson"], ("nothing.geojson",)),
        ],
    )
    def test_settings_that_do_not_fit_are_told_before_anything_is_written(self, predict, scans, words, said):
        outcome = predict(scans / "a.svs", *words)
        assert outcome.code == 2
        assert "Traceback" not in outcome.err
        for word in said:
            assert word in outcome.err
        assert not predict.out.exists()

    def test_a_folder_with_neither(self, predict, tmp_path):
        (tmp_path / "empty").mkdir()
        predict(tmp_path / "empty").refused("holds no image and no slide")


def unwritable(path, classes, *words, **names):
    assert classes[:64, :64].shape == (64, 64)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def interrupt(*words, **names):
    raise KeyboardInterrupt


class TestGoingOn:
    def test_a_killed_command_ends_as_one_that_was_not(self, predict, command, scans, tiny_run, tmp_path):
        """kill -9 of the real command, at several moments; then the same command again."""
        large = tmp_path / "large"
        large.mkdir()
        write_phantom_slide(large / "c.svs", 900, 2200, seed=5, um_per_px=0.5, blank=0.1)
        words = ["predict", tiny_run, large, "--soft", "--quiet", "--overlap", "32"]
        assert command(*words, "--out", tmp_path / "whole").code == 0
        out = tmp_path / "killed"
        script = "import sys; from tissuehint.cli import main; sys.exit(main(sys.argv[1:]))"
        line = [sys.executable, "-c", script, *map(str, words), "--out", str(out)]
        kills = 0
        for _ in range(6):
            process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            journal = out / "c" / ".work" / "blocks.txt"
            before = journal.stat().st_size if journal.is_file() else 0
            limit = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < limit:
                if journal.is_file() and journal.stat().st_size > before:
                    break
                time.sleep(0.005)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.wait()
            if not (out / "c" / "slide.json").is_file() or record(out / "c")["state"] == "done":
                break
            assert record(out / "c")["state"] == "running"
            assert not (out / "c" / "classes.ome.tif").exists() or kills > 1
        assert kills >= 1
        assert command(*words, "--out", out).code == 0
        for name in ("classes.ome.tif", "tissue.geojson.gz", "areas.csv", "overlay.jpg", "tissue_mask.geojson"):
            assert (out / "c" / name).read_bytes() == (tmp_path / "whole" / "c" / name).read_bytes(), name
        assert record(out / "c")["attempts"] > 1
        assert not (out / "c" / ".work").exists()

    def test_unfinished_files_of_a_killed_attempt_are_removed(self, predict, scans):
        folder = predict.out / "a"
        folder.mkdir(parents=True)
        (folder / ".classes.ome.abcdefgh.part.tif").write_bytes(b"half")
        assert predict(scans / "a.svs").code == 0
        assert {file.name for file in folder.iterdir()} == FILES

    def test_what_goes_wrong_beside_the_network_ends_it(self, predict, scans, monkeypatch):
        """A picture that cannot be written is not found out about after hours of computing."""
        monkeypatch.setattr(slide_predict, "write_ome_tiff", unwritable)
        monkeypatch.setattr(mapping, "CORE", 64)
        whole, done = mapping.Mapper._written, []

        def written(self, *words):
            whole(self, *words)
            done.append(words)
            time.sleep(0.05)

        monkeypatch.setattr(mapping.Mapper, "_written", written)
        outcome = predict(scans / "a.svs", "--window", "64", "--overlap", "32", "--batch-size", "1")
        assert outcome.code == 2
        assert "classes.ome.tif: the disk is full" in outcome.err
        assert 0 < len(done) < 20
        assert not (predict.out / "a" / "tissue.geojson.gz").exists()

    def test_two_commands_do_not_work_on_one_slide(self, predict, scans):
        """Another process holds slide a; the others go on, and its record is left alone."""
        folder = predict.out / "a"
        folder.mkdir(parents=True)
        script = "import sys, filelock\nlock = filelock.FileLock(sys.argv[1])\nlock.acquire()\n"
        script += "print('held', flush=True)\ninput()"
        line = [sys.executable, "-c", script, str(folder / ".lock")]
        other = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert other.stdout.readline() == "held\n"
        outcome = predict(scans)
        assert outcome.code == 2
        assert f"{folder}: is worked on by another process" in outcome.err
        assert not (folder / "slide.json").exists()
        assert record(predict.out / "b")["state"] == "done"
        other.kill()  # and with it goes its claim
        other.communicate()
        assert predict(scans).code == 0
        assert {file.name for file in folder.iterdir()} == FILES

    def test_a_file_system_without_locks(self, predict, scans, monkeypatch):
        def none(self, *words, **names):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        monkeypatch.setattr("filelock.FileLock.acquire", none)
        outcome = predict(scans / "a.svs")
        assert outcome.code == 0
        assert f"{predict.out / 'a'}: its file system has no locks" in outcome.err

    def test_a_kill_while_old_results_are_removed(self, predict, scans, monkeypatch):
        """They are not taken for finished ones, even if the slide is as it was again."""
        before = (scans / "a.svs").read_bytes(), (scans / "a.svs").stat()
        assert predict(scans / "a.svs", "--soft").code == 0
        (scans / "a.svs").write_bytes((scans / "b.svs").read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", interrupt)
            assert predict(scans / "a.svs", "--soft").code == 130
        (scans / "a.svs").write_bytes(before[0])
        os.utime(scans / "a.svs", ns=(before[1].st_atime_ns, before[1].st_mtime_ns))
        assert predict(scans / "a.svs", "--soft").code == 0
        folder = predict.out / "a"
        assert {file.name for file in folder.iterdir()} == {*FILES, "probabilities.zarr"}
        assert record(folder)["attempts"] == 2

    def test_a_kill_while_the_work_is_removed(self, predict, scans, monkeypatch):
        """What is left of it is not gone on with."""
        whole = shutil.rmtree

        def remove(path, *words, **names):
            if (path / "blocks.txt").is_file():
                raise KeyboardInterrupt
            whole(path, *words, **names)

        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", remove)
            assert predict(scans / "a.svs").code == 130
        work = predict.out / "a" / ".work"
        assert work.is_dir()
        assert not (work / "plan.json").exists()

    def test_work_of_other_blocks_is_not_gone_on_with(self, predict, scans, monkeypatch):
        """As after an update that cuts the map into other blocks."""
        words = ["--window", "64", "--overlap", "32", "--batch-size", "2"]
        whole, count = mapping.Mapper._written, 0

        def deadly(self, *block):
            nonlocal count
            count += 1
            if count > 4:
                raise KeyboardInterrupt
            whole(self, *block)

        with monkeypatch.context() as patch:
            patch.setattr(mapping, "CORE", 96)
            patch.setattr(mapping.Mapper, "_written", deadly)
            assert predict(scans / "a.svs", *words).code == 130
        assert (predict.out / "a" / ".work" / "blocks.txt").is_file()
        monkeypatch.setattr(mapping, "CORE", 160)
        assert predict(scans / "a.svs", *words).code == 0
        found = (predict.out / "a" / "classes.ome.tif").read_bytes()
        shutil.rmtree(predict.out)
        assert predict(scans / "a.svs", *words).code == 0
        assert (predict.out / "a" / "classes.ome.tif").read_bytes() == found

    def test_probabilities_survive_a_kill_at_the_very_end(self, predict, scans, monkeypatch):
        import zarr

        from tissuehint.slides.state import SlideState

        whole = SlideState.write

        def write(self, folder):
            if self.state == "done":
                raise KeyboardInterrupt
            whole(self, folder)

        with monkeypatch.context() as patch:
            patch.setattr(SlideState, "write", write)
            assert predict(scans / "a.svs", "--soft").code == 130
        assert predict(scans / "a.svs", "--soft").code == 0
        shares = zarr.open_array(str(predict.out / "a" / "probabilities.zarr"), mode="r")[:]
        mapped = tifffile.imread(predict.out / "a" / "classes.ome.tif") != 255
        assert (np.abs(shares.sum(0, dtype=int)[mapped] - 255) <= 3).all()


class TestOutlines:
    def test_an_edited_outline_is_used(self, predict, scans):
        assert predict(scans / "a.svs").code == 0
        outline = json.loads((predict.out / "a" / "tissue_mask.geojson").read_text())
        square = [[100, 50], [300, 50], [300, 250], [100, 250], [100, 50]]
        outline["features"] = outline["features"][:1]
        outline["features"][0]["geometry"] = {"type": "Polygon", "coordinates": [square]}
        (scans / "mine.geojson").write_text(json.dumps(outline))
        (scans / "t.csv").write_text("slide,outline\nb.svs,mine.geojson\n")
        assert predict(scans / "t.csv").code == 0
        mapped = tifffile.imread(predict.out / "b" / "classes.ome.tif") != 255
        expected = np.zeros_like(mapped)
        expected[50:250, 100:300] = True
        assert (mapped == expected).mean() > 0.95

    def test_an_outline_is_for_one_slide(self, predict, scans):
        predict(scans, "--outline", scans / "x.geojson").refused("--outline", "there are 2", "CSV")
