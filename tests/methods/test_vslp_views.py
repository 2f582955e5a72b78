"""Views against loops over pixels in numpy; quarter turns and mirrors against torch; what comes back."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tissuehint.methods.vslp import View, ViewConfig
from tissuehint.methods.vslp.views import bring_back, canvas_size, look

few = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 10**6)
shifts = st.integers(-6, 6)
any_view = st.builds(View, st.floats(-400, 400), st.booleans(), st.tuples(shifts, shifts))
exact_view = st.builds(View, st.sampled_from([-90, 0, 90, 180, 270, 450]), st.booleans(), st.tuples(shifts, shifts))
SIZES = [(8, 8), (7, 7), (5, 9), (9, 4), (1, 6), (6, 5)]

quarter_turns = pytest.mark.parametrize("turns", [0, 1, 2, 3, -1, 5])
mirrored_or_not = pytest.mark.parametrize("mirrored", [False, True])


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def turned(images, turns, mirrored):
    """Mirrored left-right, then turned counter-clockwise."""
    return torch.rot90(images.flip(-1) if mirrored else images, turns, (-2, -1))


def on_image(view, point):
    """Where on the image, as (x, y) from its centre, the point of the canvas looks.

    The image is mirrored, turned counter-clockwise (y points down), and moved. So a point of the canvas is moved back,
    turned back, and mirrored.
    """
    angle = math.radians(view.rotation)
    x, y = point[0] - view.offset[1], point[1] - view.offset[0]
    x, y = math.cos(angle) * x - math.sin(angle) * y, math.sin(angle) * x + math.cos(angle) * y
    return (-x if view.mirrored else x), y


def on_canvas(view, point):
    """The other way."""
    angle = math.radians(view.rotation)
    x, y = (-point[0] if view.mirrored else point[0]), point[1]
    x, y = math.cos(angle) * x + math.sin(angle) * y, -math.sin(angle) * x + math.cos(angle) * y
    return x + view.offset[1], y + view.offset[0]


def centre(index, cells, extent):
    """Of a cell, in px from the middle of the extent."""
    return (index + 0.5) * extent / cells - extent / 2


def interpolated(values, row, column, beyond):
    """Between the centres of cells of (C,H,W) at a fractional index; ``beyond`` gives what stands where none is."""
    top, left = math.floor(row), math.floor(column)
    total = 0
    for y, share_y in ((top, top + 1 - row), (top + 1, row - top)):
        for x, share_x in ((left, left + 1 - column), (left + 1, column - left)):
            total = total + share_y * share_x * beyond(values, y, x)
    return total


def white(values, y, x):
    inside = 0 <= y < values.shape[1] and 0 <= x < values.shape[2]
    return values[:, y, x] if inside else np.ones(len(values))


def border(values, y, x):
    return values[:, min(max(y, 0), values.shape[1] - 1), min(max(x, 0), values.shape[2] - 1)]


def looked(image, view):
    """(C,H,W) of one image."""
    height, width = image.shape[1:]
    rows, columns = canvas_size(view, height, width)
    found = np.zeros((len(image), rows, columns))
    for row in range(rows):
        for column in range(columns):
            x, y = on_image(view, (centre(column, columns, columns), centre(row, rows, rows)))
            found[:, row, column] = interpolated(image, y + height / 2 - 0.5, x + width / 2 - 0.5, white)
    return found


def brought_back(cells, view, image, covered, size):
    """(C,h,w), and how far in px each cell of the working grid is inside of the canvas."""
    canvas = canvas_size(view, *image)
    found, inside = np.zeros((len(cells), *size)), np.zeros(size)
    for row in range(size[0]):
        for column in range(size[1]):
            x, y = on_canvas(view, (centre(column, size[1], image[1]), centre(row, size[0], image[0])))
            inside[row, column] = min(canvas[1] / 2 - abs(x), canvas[0] / 2 - abs(y))
            place = (
                (y + canvas[0] / 2) * cells.shape[1] / covered[0] - 0.5,
                (x + canvas[1] / 2) * cells.shape[2] / covered[1] - 0.5,
            )
            found[:, row, column] = interpolated(cells, *place, border)
    return found, inside


def smooth(height, width):
    """In (0,1), and of waves longer than the image."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height).double(), torch.linspace(0, 3, width).double(), indexing="ij")
    return torch.stack([0.5 + 0.4 * torch.sin(x + 0.3) * torch.cos(y), 0.5 + 0.3 * torch.cos(x * y / 2)])[None]


class TestLook:
    @pytest.mark.parametrize("size", SIZES)
    @quarter_turns
    @mirrored_or_not
    def test_quarter_turns_and_mirrors_move_pixels(self, size, turns, mirrored):
        images = uniform(2, 3, *size)
        found = look(images, View(90.0 * turns, mirrored))
        torch.testing.assert_close(found, turned(images, turns, mirrored), rtol=0, atol=1e-9)

    @quarter_turns
    @mirrored_or_not
    def test_single_precision(self, turns, mirrored):
        images = uniform(1, 3, 60, 90).float()
        found = look(images, View(90.0 * turns, mirrored))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, turned(images, turns, mirrored), rtol=0, atol=1e-4)

    def test_the_plain_view_is_the_image(self):
        images = uniform(1, 3, 5, 6)
        assert torch.equal(look(images, View()), images)

    @few
    @given(any_view, st.sampled_from(SIZES), seeds)
    def test_any_view_pixel_by_pixel(self, view, size, seed):
        images = uniform(2, 2, *size, seed=seed)
        found = look(images, view)
        assert found.shape == (2, 2, *canvas_size(view, *size))
        assert bool(((found > -1e-9) & (found < 1 + 1e-9)).all())
        for image in range(2):
            np.testing.assert_allclose(found[image].numpy(), looked(images[image].numpy(), view), atol=1e-7)

    @quarter_turns
    @mirrored_or_not
    @pytest.mark.parametrize("offset", [(2, 0), (0, 1), (-1, 3), (20, 20)])
    def test_the_image_is_moved_last_and_white_comes_in(self, turns, mirrored, offset):
        images = 0.9 * uniform(1, 3, 5, 7)
        whole = turned(images, turns, mirrored)
        rows, columns = whole.shape[-2:]
        expected = torch.ones_like(whole)
        for row in range(rows):
            for column in range(columns):
                y, x = row - offset[0], column - offset[1]
                if 0 <= y < rows and 0 <= x < columns:
                    expected[..., row, column] = whole[..., y, x]
        torch.testing.assert_close(look(images, View(90.0 * turns, mirrored, offset)), expected, rtol=0, atol=1e-9)

    @few
    @given(any_view, st.sampled_from(SIZES))
    def test_outside_is_white(self, view, size):
        """A black image: black where all of it is the image, white where nothing is, and no image is darker."""
        found = look(torch.zeros(1, 1, *size).double(), view)[0, 0]
        rows, columns = found.shape
        for row in range(rows):
            for column in range(columns):
                x, y = on_image(view, (centre(column, columns, columns), centre(row, rows, rows)))
                beyond = max(abs(x) - size[1] / 2, abs(y) - size[0] / 2)
                if beyond > 0.501:
                    assert found[row, column] == 1
                if beyond < -0.501:
                    assert found[row, column].abs() < 1e-9
        assert torch.equal(look(torch.ones(1, 3, *size), view), torch.ones(1, 3, *found.shape))

    def test_corners_of_a_turned_image(self):
        found = look(torch.zeros(1, 3, 20, 20), View(45.0))[0, 0]
        assert bool((found[[0, 0, -1, -1], [0, -1, 0, -1]] == 1).all())
        assert found[10, 10] == 0

    @pytest.mark.parametrize("angle", [30, 60])
    def test_counter_clockwise(self, angle):
        """A dark spot on the right goes up; mirrored first, it starts on the left and goes down."""
        images = torch.ones(1, 1, 41, 41).double()
        images[..., 20, 35] = 0
        for mirrored, sign in ((False, 1), (True, -1)):
            found = 1 - look(images, View(float(angle), mirrored))[0, 0]
            rows, columns = (torch.arange(41).double() - 20 for _ in range(2))
            x, y = (found.sum(0) * columns).sum() / found.sum(), (found.sum(1) * rows).sum() / found.sum()
            assert float(x) == pytest.approx(sign * 15 * math.cos(math.radians(angle)), abs=0.3)
            assert float(y) == pytest.approx(-sign * 15 * math.sin(math.radians(angle)), abs=0.3)


class TestCanvas:
    @pytest.mark.parametrize("rotation", [0, 30, 44, 136, 150, 180, 210, 330, 360, -30, -180])
    def test_upright(self, rotation):
        assert canvas_size(View(rotation), 5, 9) == (5, 9)

    @pytest.mark.parametrize("rotation", [46, 60, 90, 120, 134, 226, 270, 300, 450, -60, -90])
    def test_on_its_side(self, rotation):
        assert canvas_size(View(rotation), 5, 9) == (9, 5)

    def test_mirrors_and_offsets_do_not_matter(self):
        assert canvas_size(View(60.0, True, (3, 4)), 5, 9) == (9, 5)


class TestBringBack:
    @pytest.mark.parametrize("size", SIZES)
    @quarter_turns
    @mirrored_or_not
    def test_what_was_seen_of_pixels(self, size, turns, mirrored):
        images, view = uniform(2, 3, *size), View(90.0 * turns, mirrored)
        canvas = canvas_size(view, *size)
        found, validity = bring_back(look(images, view), view, size, canvas, size)
        torch.testing.assert_close(found, images, rtol=0, atol=1e-9)
        assert torch.equal(validity, torch.ones(size).double())

    @few
    @given(any_view, st.sampled_from(SIZES), st.tuples(*[st.integers(1, 6)] * 4), st.tuples(shifts, shifts), seeds)
    def test_any_view_any_cells_and_any_grid(self, view, image, cells, more, seed):
        maps = uniform(2, 3, *cells[:2], seed=seed)
        canvas = canvas_size(view, *image)
        covered = (canvas[0] + abs(more[0]), canvas[1] + abs(more[1]))
        found, validity = bring_back(maps, view, image, covered, cells[2:])
        assert found.shape == (2, 3, *cells[2:])
        assert validity.shape == cells[2:]
        assert validity.dtype == maps.dtype
        for one, each in zip(maps, found, strict=True):
            expected, inside = brought_back(one.numpy(), view, image, covered, cells[2:])
            np.testing.assert_allclose(each.numpy(), expected, atol=1e-7)
        clear = np.abs(inside) > 1e-4  # on the border rounding decides
        assert ((validity.numpy() == 1) == (inside > 0))[clear].all()
        assert validity.unique().tolist() in ([0], [1], [0, 1])

    @few
    @given(exact_view, st.sampled_from(SIZES))
    def test_pixels_that_were_moved_out_of_the_canvas_are_not_seen(self, view, size):
        images = 0.9 * uniform(1, 2, *size)
        canvas = canvas_size(view, *size)
        found, validity = bring_back(look(images, view), view, size, canvas, size)
        down, right = view.offset
        assert int(validity.sum()) == max(canvas[0] - abs(down), 0) * max(canvas[1] - abs(right), 0)
        torch.testing.assert_close(found * validity, images * validity, rtol=0, atol=1e-9)

    @pytest.mark.parametrize("rotation", [30, 45, 120, 200])
    @mirrored_or_not
    @pytest.mark.parametrize("offset", [(0, 0), (7, -4)])
    def test_smooth_images(self, rotation, mirrored, offset):
        """All but the rim, which has white in it."""
        size, view = (40, 56), View(float(rotation), mirrored, offset)
        images = smooth(*size)
        canvas = canvas_size(view, *size)
        found, validity = bring_back(look(images, view), view, size, canvas, size)
        compared = validity.bool()
        compared[[0, 1, -1, -2]] = compared[:, [0, 1, -1, -2]] = False
        assert compared.double().mean() > 0.5
        assert (found - images)[..., compared].abs().max() < 0.02

    def test_no_shift_remains(self):
        """Errors of one resampling each way do not add up to a shift: a spot stays where it is."""
        size = (41, 41)
        y, x = torch.meshgrid(torch.arange(41).double(), torch.arange(41).double(), indexing="ij")
        spot = (-((y - 16).square() + (x - 23).square()) / 18).exp()[None, None]
        for view in ViewConfig(offsets=(0, 3)).views():
            found = bring_back(1 - look(1 - spot, view), view, size, size, size)[0][0, 0]
            assert float((found * y).sum() / found.sum()) == pytest.approx(16, abs=0.05)
            assert float((found * x).sum() / found.sum()) == pytest.approx(23, abs=0.05)

    @pytest.mark.parametrize("view", [View(), View(90.0), View(30.0, True), View(120.0, False, (5, -9))])
    def test_cells_that_say_where_they_are(self, view):
        """Cells of 16 px over a canvas that they do not divide: between their centres, places are exact."""
        image, size = (50, 70), (25, 14)
        canvas = canvas_size(view, *image)
        cells = tuple(-(-side // 16) for side in canvas)
        y, x = torch.meshgrid(*(16 * (torch.arange(count).double() + 0.5) for count in cells), indexing="ij")
        covered = (16 * cells[0], 16 * cells[1])
        found, _ = bring_back(torch.stack([x, y])[None], view, image, covered, size)
        compared = 0
        for row in range(size[0]):
            for column in range(size[1]):
                x, y = on_canvas(view, (centre(column, size[1], image[1]), centre(row, size[0], image[0])))
                x, y = x + canvas[1] / 2, y + canvas[0] / 2
                if 8 < x < covered[1] - 8 and 8 < y < covered[0] - 8:
                    assert found[0, :, row, column].tolist() == pytest.approx([x, y], abs=1e-6)
                    compared += 1
        assert compared > 100

    @few
    @given(any_view, st.sampled_from(SIZES), st.tuples(*[st.integers(1, 6)] * 4), seeds)
    def test_probabilities_stay_probabilities(self, view, image, cells, seed):
        shares = (4 * uniform(2, 4, *cells[:2], seed=seed)).softmax(1).float()
        found, validity = bring_back(shares, view, image, canvas_size(view, *image), cells[2:])
        assert found.dtype == validity.dtype == torch.float32
        assert bool((found >= 0).all())
        torch.testing.assert_close(found.sum(1), torch.ones_like(found[:, 0]))

    def test_the_plain_view_sees_everything(self):
        for size in ((13, 18), (4, 5), (26, 36)):
            assert bool(bring_back(uniform(1, 2, 3, 4), View(), (13, 18), (15, 20), size)[1].all())

    def test_rotations_lose_the_corners(self):
        """The working grid of a square image turned by 45 degrees: the corners are not seen, the middle is."""
        validity = bring_back(uniform(1, 2, 8, 8), View(45.0), (32, 32), (32, 32), (8, 8))[1]
        assert not validity[[0, 0, -1, -1], [0, -1, 0, -1]].any()
        assert bool(validity[2:6, 2:6].all())


class TestViewConfig:
    def test_the_plain_view_comes_first(self):
        assert ViewConfig().views()[0] == ViewConfig(offsets=(0, 50, 100)).views()[0] == View()

    @pytest.mark.parametrize(
        ("settings", "count"),
        [
            ({}, 12),
            ({"mirror": False}, 6),
            ({"offsets": (0, 50, 100)}, 12 * 9),
            ({"rotations": (0, 90, 180, 270)}, 8),
            ({"rotations": (15,), "mirror": False, "offsets": (0, 4)}, 4),
            ({"rotations": (0,), "mirror": False}, 1),
        ],
    )
    def test_every_combination_once(self, settings, count):
        config = ViewConfig(**settings)
        views = config.views()
        assert len(views) == len(set(views)) == count
        assert set(views) == {
            View(rotation, mirrored, (down, right))
            for rotation in config.rotations
            for mirrored in {False, config.mirror}
            for down in config.offsets
            for right in config.offsets
        }

    def test_order(self):
        """Rotations change first, then offsets to the right, then down; mirrored views come last."""
        views = ViewConfig(rotations=(0, 90), offsets=(0, 7)).views()
        assert [view.rotation for view in views] == [0, 90] * 8
        assert [view.offset for view in views[::2]] == [(0, 0), (0, 7), (7, 0), (7, 7)] * 2
        assert [view.mirrored for view in views] == [False] * 8 + [True] * 8

    @pytest.mark.parametrize("wrong", [{"rotations": ()}, {"offsets": ()}, {"shifts": (0,)}])
    def test_wrong_settings(self, wrong):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            ViewConfig(**wrong)
