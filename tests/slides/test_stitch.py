"""Stitching: the mean of the windows, each block by itself, exactly as at once."""

import errno
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.slides.test_tiles import tilings
from tissuehint.slides.stitch import BlockSum, Waiting, blend_weights
from tissuehint.slides.tiles import Tiling

few = settings(max_examples=60, deadline=None)
CPU = torch.device("cpu")


def picture(tiling, channels=2, seed=0):
    """A picture that is larger than the map, since windows may reach over its border."""
    generator = torch.Generator().manual_seed(seed)
    reach = tiling.side
    return torch.rand(channels, tiling.height + reach, tiling.width + reach, generator=generator)


def window_maps(tiling, of_window):
    """(row, column) -> (K,side,side)."""
    tops, lefts = tiling.corners()
    return {
        (row, column): of_window(int(tops[row]), int(lefts[column]))
        for row in range(tiling.rows)
        for column in range(tiling.columns)
    }


def stitch(tiling, maps, folder, order=None, channels=2, wanted=None):
    """All blocks through the public pieces; pixels that no window sees are nan."""
    found = torch.full((channels, tiling.height, tiling.width), torch.nan)
    waiting, memory = Waiting(folder), None
    for row, column in order or tiling.blocks():
        total = BlockSum(tiling, row, column, channels, CPU, memory)
        for sums in waiting.fetch(row, column):
            total.take(sums)
        for line, place in tiling.windows(row, column).tolist():
            if wanted is None or wanted[line, place]:
                corner = line * tiling.stride, place * tiling.stride
                total.add(maps[line, place][None], [corner[0]], [corner[1]])
        mean, seen = total.mean(), total.seen()
        assert (total.likeliest() == mean.argmax(0))[seen].all()
        memory = total.memory
        core = total.core
        found[:, core.top : core.bottom, core.left : core.right] = torch.where(seen, mean, torch.nan)
        waiting.leave(row, column, total.beyond())
        waiting.forget(row, column)
    return found, waiting


def brute_force(tiling, maps, wanted=None):
    """The equation, in float64, pixel sums over the whole map."""
    weights = blend_weights(tiling.side, tiling.overlap).double()
    channels = next(iter(maps.values())).shape[0]
    wide = (tiling.height + tiling.side, tiling.width + tiling.side)
    total, seen = torch.zeros(channels, *wide, dtype=torch.float64), torch.zeros(wide, dtype=torch.float64)
    for (line, place), values in maps.items():
        if wanted is None or wanted[line, place]:
            top, left = line * tiling.stride, place * tiling.stride
            rows, columns = slice(top, top + tiling.side), slice(left, left + tiling.side)
            total[:, rows, columns] += weights * values.double()
            seen[rows, columns] += weights
    mean = torch.where(seen > 0, total / seen.clamp_min(1e-300), torch.nan)
    return mean[:, : tiling.height, : tiling.width]


class TestBlendWeights:
    @given(st.integers(1, 40), st.data())
    def test_between_0_and_1_symmetric_and_never_0(self, side, data):
        weights = blend_weights(side, data.draw(st.integers(0, side - 1)))
        assert weights.shape == (side, side)
        assert 0 < float(weights.min()) <= float(weights.max()) <= 1
        for other in (weights.T, weights.flip(0), weights.flip(1)):
            assert torch.equal(weights, other)

    def test_windows_of_half_overlap_sum_to_one(self):
        weights = blend_weights(8, 4)[4] / 0.875
        torch.testing.assert_close(weights[:4] + weights[4:], torch.ones(4))

    def test_without_overlap_only_the_border_pixel_is_lower(self):
        weights = blend_weights(6, 0)
        assert float(weights[1:-1, 1:-1].min()) == 1


class TestStitching:
    @few
    @given(tilings(), st.integers(0, 99))
    def test_tiles_of_a_picture_give_the_picture_back(self, tmp_path_factory, tiling, seed):
        whole = picture(tiling, seed=seed)
        side = tiling.side
        maps = window_maps(tiling, lambda top, left: whole[:, top : top + side, left : left + side])
        found, _ = stitch(tiling, maps, tmp_path_factory.mktemp("waiting"))
        torch.testing.assert_close(found, whole[:, : tiling.height, : tiling.width])

    @few
    @given(tilings(), st.integers(0, 99))
    def test_windows_that_disagree_are_averaged_as_the_equation_says(self, tmp_path_factory, tiling, seed):
        generator = torch.Generator().manual_seed(seed)
        side = tiling.side
        maps = window_maps(tiling, lambda top, left: torch.rand(2, side, side, generator=generator))
        found, _ = stitch(tiling, maps, tmp_path_factory.mktemp("waiting"))
        torch.testing.assert_close(found.double(), brute_force(tiling, maps), atol=1e-5, rtol=0)

    @few
    @given(tilings(), st.integers(0, 99))
    def test_where_windows_are_left_out(self, tmp_path_factory, tiling, seed):
        generator = torch.Generator().manual_seed(seed)
        side = tiling.side
        wanted = np.random.default_rng(seed).random((tiling.rows, tiling.columns)) < 0.5
        maps = window_maps(tiling, lambda top, left: torch.rand(2, side, side, generator=generator))
        found, _ = stitch(tiling, maps, tmp_path_factory.mktemp("waiting"), wanted=wanted)
        expected = brute_force(tiling, maps, wanted)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0, equal_nan=True)

    def test_nothing_waits_at_the_end(self, tmp_path):
        tiling = Tiling(50, 41, 8, 5, 2)
        maps = window_maps(tiling, lambda top, left: torch.rand(2, 8, 8))
        stitch(tiling, maps, tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("missing", ["right", "below", "corner"])
    def test_each_part_that_waits_matters(self, tmp_path, missing):
        tiling = Tiling(30, 30, 8, 5, 2)
        maps = window_maps(tiling, lambda top, left: torch.rand(2, 8, 8))
        before, _ = stitch(tiling, maps, tmp_path)
        leave = Waiting.leave

        def forgetful(self, row, column, parts):
            leave(self, row, column, {name: part for name, part in parts.items() if name != missing})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Waiting, "leave", forgetful)
            after, _ = stitch(tiling, maps, tmp_path / "again")
        assert not torch.allclose(before, after)


@pytest.mark.skipif(sys.platform == "win32", reason="file-size limits are POSIX")
@pytest.mark.parametrize("missing", [1, 100, 4000, 30_000])
def test_a_disk_that_is_full_leaves_no_shortened_sums(tmp_path, missing):
    """numpy loses the end of a file without a word, if C writes it out only as it closes the file."""
    script = f"""
import resource, signal, sys
from pathlib import Path
import torch
from tissuehint.slides.stitch import Waiting
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
parts = {{"right": torch.ones(5, 100, 164)[:, :, 64:]}}
resource.setrlimit(resource.RLIMIT_FSIZE, (5 * 100 * 100 * 4 + 128 - {missing},) * 2)
try:
    Waiting(Path(sys.argv[1])).leave(0, 0, parts)
except OSError as error:
    sys.exit(f"refused {{error.errno}} {{Path(error.filename).name}}")
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == f"refused {errno.EFBIG} 0_0_right.npy"
    assert list(tmp_path.iterdir()) == []
