"""Windows and blocks: every pixel is owned once and seen by windows."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tissuehint.errors import InputError
from tissuehint.slides.tiles import Tiling

few = settings(max_examples=150, deadline=None)


@st.composite
def tilings(draw):
    side = draw(st.integers(1, 12))
    stride = draw(st.integers(1, side))
    block = draw(st.integers(1, 4))
    assume(side - stride <= block * stride)
    return Tiling(draw(st.integers(1, 40)), draw(st.integers(1, 40)), side, stride, block)


class TestTiling:
    @few
    @given(tilings())
    def test_the_cores_cover_every_pixel_once(self, tiling):
        owned = np.zeros((tiling.height, tiling.width), int)
        for block in tiling.blocks():
            core = tiling.core(*block)
            assert min(core.shape) > 0
            owned[core.top : core.bottom, core.left : core.right] += 1
        assert (owned == 1).all()

    @few
    @given(tilings())
    def test_every_window_is_in_one_block_and_every_pixel_in_a_window(self, tiling):
        tops, lefts = tiling.corners()
        met = np.zeros((tiling.rows, tiling.columns), int)
        seen = np.zeros((tiling.height, tiling.width), bool)
        for block in tiling.blocks():
            for row, column in tiling.windows(*block):
                met[row, column] += 1
                top, left = tops[row], lefts[column]
                assert top < tiling.height
                assert left < tiling.width
                seen[top : top + tiling.side, left : left + tiling.side] = True
        assert (met == 1).all()
        assert seen.all()

    @few
    @given(tilings())
    def test_windows_reach_no_further_than_the_blocks_beside_below_and_between(self, tiling):
        tops, lefts = tiling.corners()
        for row, column in tiling.blocks():
            core = tiling.core(row, column)
            for line, place in tiling.windows(row, column):
                assert core.top <= tops[line] < core.bottom
                assert core.left <= lefts[place] < core.right
                if row < tiling.block_rows - 1:
                    after = tiling.core(row + 1, column)
                    assert min(tops[line] + tiling.side, tiling.height) <= after.bottom
                    assert tops[line] + tiling.side <= core.bottom + tiling.overlap

    @few
    @given(tilings())
    def test_cores_begin_at_multiples_of_their_side(self, tiling):
        """So that chunks of this side are written by one block each."""
        for block in tiling.blocks():
            core = tiling.core(*block)
            assert core.top % tiling.core_side == core.left % tiling.core_side == 0

    @few
    @given(tilings())
    def test_no_window_is_needless(self, tiling):
        tops, lefts = tiling.corners()
        for starts, length in ((tops, tiling.height), (lefts, tiling.width)):
            assert len(starts) == 1 or starts[-2] + tiling.side < length

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ((0, 5, 4, 2, 1), "map of 0 x 5 px"),
            ((5, 5, 4, 5, 1), "stride 5"),
            ((5, 5, 4, 0, 1), "stride 0"),
            ((9, 9, 4, 1, 2), "block of 2 windows"),
        ],
    )
    def test_what_cannot_be_tiled(self, values, said):
        with pytest.raises(InputError, match=said):
            Tiling(*values)
