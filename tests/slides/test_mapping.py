"""The map of a slide is what the model says of its pixels, wherever blocks and windows end, and after any kill."""

import errno
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tissuehint.data.patches import PatchGrid
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.model import TissueModel
from tissuehint.slides import mapping
from tissuehint.slides.mapping import (
    CLASSES,
    JOURNAL,
    PROBABILITIES,
    GrowingMap,
    Mapper,
    MappingConfig,
    UnfinishedError,
    plan_map,
)
from tissuehint.slides.reader import open_slide
from tissuehint.slides.tiles import Tiling

LABELS = LabelSpace(("red", "green", "blue"))


class Everywhere:
    """Tissue on the whole slide, but for a box of level-0 pixels (top, left, bottom, right)."""

    def __init__(self, bare=(0, 0, 0, 0)):
        self.bare = bare

    def shares(self, tops, lefts, heights, widths):
        top, left, bottom, right = self.bare
        inside = (tops >= top) & (tops + heights <= bottom) & (lefts >= left) & (lefts + widths <= right)
        return np.where(inside, 0.0, 1.0)

    def at(self, rows, columns):
        top, left, bottom, right = self.bare
        bare = ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))[None, :]
        return ~bare


def colour_model(*, grid=None, um_per_px=0.5, smooth=1, seen=None):
    """Probabilities from the colour of a pixel, or the mean colour around it; ``seen`` collects the windows."""
    kernel = nn.AvgPool2d(smooth, 1, smooth // 2, count_include_pad=False)

    def mapper(images):
        if seen is not None:
            seen.append(images.shape)
        return (kernel(images) * 6).softmax(1)

    network = nn.Conv2d(1, 1, 1)
    return TissueModel(network, mapper, LABELS, {}, grid=grid, um_per_px=um_per_px)


@pytest.fixture
def slide_file(tmp_path):
    """Coloured noise with structure, 190 x 233 px."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 255, (10, 12, 3)).astype(np.uint8)
    picture = Image.fromarray(coarse).resize((233, 190), Image.Resampling.BICUBIC)
    path = tmp_path / "slide.png"
    picture.save(path)
    return path


def run(model, path, folder, tissue=None, *, um_per_px=0.5, core=64, batch_size=3, readers=2, **config):
    """Map with blocks of about ``core`` px."""
    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, open_slide(path, um_per_px=um_per_px) as slide:
        patch.setattr(mapping, "CORE", core)
        tissue = tissue or Everywhere()
        settings = MappingConfig(**config)
        plan = plan_map(model, slide, tissue, settings)
        mapper = Mapper(
            model,
            slide,
            tissue,
            plan,
            folder,
            probabilities=settings.probabilities,
            batch_size=batch_size,
            readers=readers,
        )
        mapper.run()
        shares = None if mapper.probabilities is None else mapper.probabilities[:]
        return mapper.classes[:], shares, plan


class TestTheMap:
    @pytest.mark.parametrize("core", [32, 64, 500])
    @pytest.mark.parametrize("overlap", [0, 5, 16])
    def test_of_a_model_that_looks_at_single_pixels_is_exact(self, slide_file, tmp_path, core, overlap):
        image = np.asarray(Image.open(slide_file))
        classes, shares, _ = run(
            colour_model(), slide_file, tmp_path / "w", core=core, window=32, overlap=overlap, probabilities=True
        )
        expected = (torch.from_numpy(image.copy()).movedim(-1, 0).float() / 255 * 6).softmax(0)
        assert classes.shape == image.shape[:2]
        assert (classes == expected.argmax(0).numpy()).all()
        assert np.abs(shares / 255 - expected.numpy()).max() <= 0.5 / 255 + 1e-6

    def test_is_that_of_the_model_on_the_whole_image_where_windows_agree(self, slide_file, tmp_path):
        """It looks 3 px around, windows overlap by more: only at the borders of windows it sees less."""
        image = np.asarray(Image.open(slide_file))
        model = colour_model(smooth=7)
        classes, _, _ = run(model, slide_file, tmp_path / "w", window=48, overlap=16)
        assert (classes == model.classes(model.predict(image))).mean() > 0.98

    def test_at_the_models_pixel_size(self, slide_file, tmp_path):
        classes, _, plan = run(colour_model(um_per_px=1.0), slide_file, tmp_path / "w", window=32)
        assert classes.shape == (95, 116)
        assert (plan.placement.scale, plan.placement.um_per_px) == (2.0, 1.0)
        picture = np.asarray(Image.open(slide_file).reduce(2))
        expected = picture[:95, :116].argmax(2)
        assert (classes == expected).mean() > 0.97

    def test_pixel_sizes_within_one_per_cent_are_the_same(self, slide_file, tmp_path):
        _, _, plan = run(colour_model(um_per_px=0.502), slide_file, tmp_path / "w", window=32)
        assert plan.placement.scale == 1.0
        assert plan.placement.um_per_px == 0.5

    def test_windows_are_those_of_the_models_grid(self, slide_file, tmp_path):
        seen = []
        model = colour_model(grid=PatchGrid(side=40, stride=30, resize=20), seen=seen)
        _, _, plan = run(model, slide_file, tmp_path / "w")
        assert (plan.tiling.side, plan.tiling.stride) == (40, 30)
        assert {tuple(shape[2:]) for shape in seen} == {(20, 20)}

    def test_each_window_is_computed_once(self, slide_file, tmp_path):
        seen = []
        _, _, plan = run(colour_model(seen=seen), slide_file, tmp_path / "w", window=32, overlap=8, batch_size=4)
        assert sum(shape[0] for shape in seen) == plan.windows == plan.tiling.rows * plan.tiling.columns
        assert max(shape[0] for shape in seen) == 4

    def test_each_chunk_is_written_once(self, slide_file, tmp_path, monkeypatch):
        written = []
        write = Mapper._write

        def spy(self, row, column, total):
            core = self.plan.tiling.core(row, column)
            side = self.classes.chunks[0]
            rows, columns = range(core.top // side, -(-core.bottom // side)), range(core.left, core.right, side)
            written.extend((line, place // side) for line in rows for place in columns)
            write(self, row, column, total)

        monkeypatch.setattr(Mapper, "_write", spy)
        run(colour_model(), slide_file, tmp_path / "w", window=32, overlap=8)
        assert len(written) == len(set(written)) > 4


class TestBackground:
    BARE = (60, 70, 170, 200)

    def test_is_not_computed_and_not_mapped(self, slide_file, tmp_path):
        full, bare = [], []
        whole, _, _ = run(colour_model(seen=full), slide_file, tmp_path / "a", window=32, overlap=8)
        classes, shares, plan = run(
            colour_model(seen=bare),
            slide_file,
            tmp_path / "b",
            Everywhere(self.BARE),
            window=32,
            overlap=8,
            probabilities=True,
        )
        top, left, bottom, right = self.BARE
        inside = np.zeros_like(classes, bool)
        inside[top:bottom, left:right] = True
        assert (classes[inside] == LABELS.ignore).all()
        assert (shares[:, inside] == 0).all()
        assert (classes[~inside] == whole[~inside]).all()
        computed = sum(shape[0] for shape in bare)
        assert computed == plan.windows < sum(shape[0] for shape in full)

    def test_alone_gives_an_empty_map(self, slide_file, tmp_path):
        seen = []
        classes, _, plan = run(
            colour_model(seen=seen), slide_file, tmp_path / "w", Everywhere((-999, -999, 9999, 9999)), window=32
        )
        assert plan.windows == 0
        assert seen == []
        assert (classes == LABELS.ignore).all()


class Killed(BaseException):
    """Not an Exception: nothing in the program may catch it."""


class TestGoingOn:
    @pytest.mark.parametrize("after", range(1, 12))
    def test_a_run_that_was_killed_ends_as_one_that_was_not(self, slide_file, tmp_path, after):
        """A kill while window batches are computed, at any of them."""
        settings = {"window": 32, "overlap": 12, "probabilities": True, "batch_size": 7}
        model = colour_model(smooth=9)
        expected, shares, plan = run(model, slide_file, tmp_path / "a", **settings)
        count = 0
        unharmed = model.mapper

        def deadly(images):
            nonlocal count
            count += 1
            if count > after:
                raise Killed
            return unharmed(images)

        model.mapper = deadly
        with pytest.raises(Killed):
            run(model, slide_file, tmp_path / "b", **settings)
        count, seen = -(10**6), []

        def again(images):
            seen.append(len(images))
            return unharmed(images)

        model.mapper = again
        classes, other, _ = run(model, slide_file, tmp_path / "b", **settings)
        assert (classes == expected).all()
        assert (other == shares).all()
        assert sum(seen) <= plan.windows

    @pytest.mark.parametrize("place", ["leave", "forget"])
    def test_a_kill_between_writing_and_the_journal(self, slide_file, tmp_path, monkeypatch, place):
        settings = {"window": 32, "overlap": 12}
        model = colour_model(smooth=9)
        expected, _, _ = run(model, slide_file, tmp_path / "a", **settings)
        whole = getattr(mapping.Waiting, place)
        calls = 0

        def deadly(self, *words):
            nonlocal calls
            calls += 1
            if calls == 5:
                raise Killed
            whole(self, *words)

        with monkeypatch.context() as patch:
            patch.setattr(mapping.Waiting, place, deadly)
            with pytest.raises(Killed):
                run(model, slide_file, tmp_path / "b", **settings)
        classes, _, _ = run(model, slide_file, tmp_path / "b", **settings)
        assert (classes == expected).all()

    def test_a_journal_line_that_was_cut_off_does_not_count(self, slide_file, tmp_path):
        settings = {"window": 32, "overlap": 12}
        expected, _, _ = run(colour_model(), slide_file, tmp_path / "a", **settings)
        run(colour_model(), slide_file, tmp_path / "b", **settings)
        journal = tmp_path / "b" / JOURNAL
        lines = journal.read_text().splitlines()
        journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:1])
        seen = []
        classes, _, _ = run(colour_model(seen=seen), slide_file, tmp_path / "b", **settings)
        assert seen
        assert (classes == expected).all()
        assert journal.read_text().splitlines() == lines

    def test_a_journal_is_mended_whole_or_not_at_all(self, slide_file, tmp_path, monkeypatch):
        settings = {"window": 32, "overlap": 12}
        run(colour_model(), slide_file, tmp_path / "a", **settings)
        journal = tmp_path / "a" / JOURNAL
        cut = journal.read_text()[:-2]
        journal.write_text(cut)

        def full_disk(*words):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space"):
            run(colour_model(), slide_file, tmp_path / "a", **settings)
        assert journal.read_text() == cut

    @pytest.mark.parametrize("name", [CLASSES, PROBABILITIES])
    @pytest.mark.parametrize("lost", ["all", "inside"])
    def test_a_journal_without_its_arrays_counts_for_nothing(self, slide_file, tmp_path, name, lost):
        """A kill while an array is made, or while the folder is removed."""
        settings = {"window": 32, "overlap": 12, "probabilities": True}
        model = colour_model(smooth=9)
        expected, shares, _ = run(model, slide_file, tmp_path / "a", **settings)
        shutil.rmtree(tmp_path / "a" / name)
        if lost == "inside":
            (tmp_path / "a" / name).mkdir()
        classes, other, _ = run(model, slide_file, tmp_path / "a", **settings)
        assert (classes == expected).all()
        assert (other == shares).all()

    def test_a_finished_map_is_not_computed_again(self, slide_file, tmp_path):
        run(colour_model(), slide_file, tmp_path / "a", window=32)
        seen = []
        run(colour_model(seen=seen), slide_file, tmp_path / "a", window=32)
        assert seen == []
        assert (tmp_path / "a" / CLASSES).is_dir()


class TestRefusals:
    def test_a_slide_without_pixel_size(self, slide_file):
        with open_slide(slide_file) as slide, pytest.raises(InputError, match="--mpp"):
            plan_map(colour_model(), slide, Everywhere(), MappingConfig())

    def test_a_model_without_pixel_size(self, slide_file):
        with open_slide(slide_file, um_per_px=0.5) as slide, pytest.raises(InputError, match="--model-mpp"):
            plan_map(colour_model(um_per_px=None), slide, Everywhere(), MappingConfig())

    def test_an_overlap_without_a_step(self, slide_file):
        with open_slide(slide_file, um_per_px=0.5) as slide, pytest.raises(InputError, match="--overlap 32"):
            plan_map(colour_model(), slide, Everywhere(), MappingConfig(window=32, overlap=32))

    def test_the_map_lies_on_the_bounds_of_the_slide(self, slide_file):
        with open_slide(slide_file, um_per_px=0.5) as slide:
            slide.bounds = replace(slide.bounds, top=30.0, left=20.0, height=100.0, width=50.0)
            plan = plan_map(colour_model(), slide, Everywhere(), MappingConfig(window=32))
        assert (plan.placement.top, plan.placement.left) == (30, 20)
        assert (plan.tiling.height, plan.tiling.width) == (100, 50)


class Known:
    """A map that remembers what was done of it when it was read."""

    chunks = (64, 64)

    def __init__(self, values):
        self.values, self.shape, self.reads = values, values.shape, []

    def __getitem__(self, key):
        self.reads.append(key)
        return self.values[key]


class TestAMapThatGrows:
    # 2 x 3 blocks of 64 px; the lower ones reach to the end, 90 px
    tiling = Tiling(154, 164, side=64, stride=32, block=2)
    values = np.random.default_rng(0).integers(0, 3, (154, 164)).astype(np.uint8)

    def grown(self, *blocks):
        known = Known(self.values)
        growing = GrowingMap(known, self.tiling)
        growing.add(blocks)
        return growing, known

    def test_what_is_done_is_there(self):
        growing, _ = self.grown((0, 0), (0, 1))
        assert (self.tiling.block_rows, self.tiling.block_columns) == (2, 3)
        for key in (np.s_[0:64, 0:64], np.s_[10:20, 60:128], np.s_[0:1, 0:128], np.s_[64:64, 0:164]):
            assert (growing[key] == self.values[key]).all()

    @pytest.mark.parametrize(
        ("key", "late"),
        [
            (np.s_[0:65, 0:64], (1, 0)),
            (np.s_[0:10, 127:129], (0, 2)),
            (np.s_[130:154, 150:164], (1, 2)),
            (np.s_[0:200, 0:200], (1, 1)),
        ],
    )
    def test_what_is_not_done_is_waited_for(self, key, late):
        growing, known = self.grown(*(block for block in self.tiling.blocks() if block != late))
        with ThreadPoolExecutor(1) as pool:
            read = pool.submit(lambda: growing[key])
            with pytest.raises(TimeoutError):
                read.result(timeout=0.1)
            assert not known.reads
            growing.add([late])
            assert (read.result(timeout=20) == self.values[key]).all()

    def test_giving_up_ends_the_waiting_alone(self):
        growing, known = self.grown((0, 0))
        with ThreadPoolExecutor(1) as pool:
            started = threading.Event()

            def read():
                started.set()
                return growing[0:64, 0:65]

            waiting = pool.submit(read)
            started.wait(20)
            growing.give_up()
            with pytest.raises(UnfinishedError):
                waiting.result(timeout=20)
        assert not known.reads
        assert (growing[0:64, 0:64] == self.values[:64, :64]).all()

    def test_of_a_slide(self, slide_file, tmp_path, monkeypatch):
        """Read block by block while it is computed, it is the map."""
        read = {}
        whole = GrowingMap.add

        def add(self, blocks):
            whole(self, blocks)
            for row, column in blocks:
                core = self._tiling.core(row, column)
                rows, columns = slice(core.top, core.bottom), slice(core.left, core.right)
                read[row, column] = rows, columns, self[rows, columns]

        monkeypatch.setattr(GrowingMap, "add", add)
        classes, _, plan = run(colour_model(), slide_file, tmp_path / "map")
        assert set(read) == set(plan.tiling.blocks())
        for rows, columns, part in read.values():
            assert (part == classes[rows, columns]).all()
