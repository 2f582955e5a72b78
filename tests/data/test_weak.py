import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tissuehint.data.weak import (
    image_seed,
    points_from_geojson,
    points_from_mask,
    proportions_from_mask,
    read_point_table,
    read_proportion_table,
    read_tag_table,
    tags_from_mask,
)
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace

SPACE = LabelSpace(("gland", "stroma", "necrosis", "white"), white=3)
PLAIN = LabelSpace(("gland", "stroma"))

masks = arrays(
    np.uint8,
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    elements=st.sampled_from([0, 0, 0, 1, 1, 2, 3, 255]),
)
tissue_masks = masks.filter(lambda mask: bool((mask < 3).any()))


def blocks(seed: int) -> np.ndarray:
    """Regions large enough to erode."""
    return np.random.default_rng(seed).integers(0, 4, (4, 3)).repeat(9, 0).repeat(9, 1).astype(np.uint8)


class TestTags:
    @settings(deadline=None)
    @given(masks, st.sampled_from([0.0, 0.05, 0.25, 0.29]))
    def test_a_class_is_tagged_above_the_threshold_of_all_counted_pixels(self, mask, threshold):
        counted = int((mask != 255).sum())
        tags = tags_from_mask(mask, SPACE, threshold).values
        for index in range(3):
            count = int((mask == index).sum())
            assert tags[index] == (counted > 0 and count * 100 > round(threshold * 100) * counted)

    def test_exactly_the_threshold_is_not_more_than_it(self):
        mask = np.ones((10, 10), np.uint8)
        mask.flat[:29] = 0
        assert tags_from_mask(mask, PLAIN, 0.29).values.tolist() == [0, 1]

    def test_white_counts_in_the_area_and_ignore_does_not(self):
        mask = np.array([[0, 3, 3, 3]], np.uint8)
        assert tags_from_mask(mask, SPACE, 0.3).values.tolist() == [0, 0, 0]
        mask[0, 1:] = 255
        assert tags_from_mask(mask, SPACE, 0.3).values.tolist() == [1, 0, 0]

    @pytest.mark.parametrize("threshold", [-0.1, 1, 5])
    def test_threshold_is_a_share(self, threshold):
        with pytest.raises(InputError, match=r"0\.05 for 5 %"):
            tags_from_mask(np.zeros((2, 2), np.uint8), SPACE, threshold)

    @pytest.mark.parametrize("derive", [tags_from_mask, proportions_from_mask])
    def test_unknown_value_is_named(self, derive):
        with pytest.raises(InputError, match=r"has value 7, classes are 0\.\.3"):
            derive(np.full((2, 2), 7, np.uint8), SPACE)

    def test_colour_mask_is_refused(self):
        with pytest.raises(InputError, match=r"shape \(2, 2, 3\)"):
            tags_from_mask(np.zeros((2, 2, 3), np.uint8), SPACE)


class TestPoints:
    @settings(deadline=None)
    @given(masks, st.integers(1, 6), st.integers(0, 4), st.integers(0, 99))
    def test_points_lie_in_their_class_and_are_as_many_as_there_can_be(self, mask, per_class, erosion, seed):
        points = points_from_mask(mask, SPACE, per_class, seed=seed, erosion=erosion).rows
        assert (mask[points[:, 0], points[:, 1]] == points[:, 2]).all()
        assert len(np.unique(points[:, :2], axis=0)) == len(points)
        for index in range(3):
            assert (points[:, 2] == index).sum() == min(per_class, int((mask == index).sum()))
        assert not (points[:, 2] == 3).any()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, 999), st.integers(0, 5), st.integers(1, 40))
    def test_points_lie_in_the_deepest_erosion_that_holds_them_all(self, seed, erosion, per_class):
        from scipy.ndimage import binary_erosion

        mask = blocks(seed)
        points = points_from_mask(mask, SPACE, per_class, seed=seed, erosion=erosion).rows
        for index in np.unique(points[:, 2]):
            region = mask == index
            for steps in range(erosion, -1, -1):
                square = np.ones((3, 3), bool)
                eroded = binary_erosion(region, square, iterations=steps, border_value=1) if steps else region
                if eroded.sum() >= per_class or steps == 0:
                    break
            own = points[points[:, 2] == index]
            assert eroded[own[:, 0], own[:, 1]].all()

    def test_same_seed_same_points_and_classes_don_t_move_each_other(self):
        mask = blocks(1)
        everything = points_from_mask(mask, SPACE, 3, seed=5).rows
        again = points_from_mask(mask, SPACE, 3, seed=5).rows
        other = points_from_mask(mask, SPACE, 3, seed=6).rows
        only = points_from_mask(mask, SPACE, 3, seed=5, classes=["stroma"]).rows
        np.testing.assert_array_equal(everything, again)
        assert not np.array_equal(everything, other)
        np.testing.assert_array_equal(everything[everything[:, 2] == 1], only)

    def test_points_are_uniform(self):
        mask = np.zeros((2, 5), np.uint8)
        drawn = [points_from_mask(mask, PLAIN, 1, seed=seed).rows[0] for seed in range(600)]
        counts = np.bincount([row * 5 + column for row, column, _ in drawn], minlength=10)
        # 600 draws in 10 cells: chi-square with 9 degrees of freedom is below 27.9 in 99.9 % of cases
        assert ((counts - 60) ** 2 / 60).sum() < 27.9

    def test_white_is_drawn_where_asked_for(self):
        mask = np.full((4, 4), 3, np.uint8)
        assert len(points_from_mask(mask, SPACE, 2, seed=0)) == 0
        assert points_from_mask(mask, SPACE, 2, seed=0, classes=[3]).rows[:, 2].tolist() == [3, 3]

    @pytest.mark.parametrize(
        "options", [{"per_class": 0}, {"erosion": -1}, {"classes": ["bone"]}, {"classes": [4]}], ids=str
    )
    def test_options_out_of_range_are_refused(self, options):
        with pytest.raises(InputError):
            points_from_mask(np.zeros((4, 4), np.uint8), SPACE, **{"per_class": 1, "seed": 0, **options})

    def test_seed_of_an_image_depends_on_both_parts(self):
        seeds = {image_seed(seed, name) for seed in range(5) for name in ("a", "b", "c")}
        assert len(seeds) == 15
        assert image_seed(0, "a") == image_seed(0, "a")


class TestProportions:
    @settings(deadline=None)
    @given(tissue_masks)
    def test_exact_shares_of_the_tissue(self, mask):
        counts = np.array([(mask == index).sum() for index in range(3)])
        np.testing.assert_allclose(proportions_from_mask(mask, SPACE).values, counts / counts.sum())

    @settings(deadline=None)
    @given(tissue_masks, st.sampled_from([0.05, 0.1, 0.25, 1 / 3]), st.sampled_from([None, 0.02]))
    def test_rounded_shares_are_multiples_near_by_that_sum_to_one(self, mask, step, noise):
        exact = proportions_from_mask(mask, SPACE, noise=noise, seed=3).values
        rounded = proportions_from_mask(mask, SPACE, round_to=step, noise=noise, seed=3).values
        np.testing.assert_allclose(rounded / step, np.round(rounded / step), atol=1e-9)
        assert rounded.sum() == pytest.approx(1, abs=1e-12)
        assert (np.abs(rounded - exact) < step + 1e-9).all()
        assert (rounded[exact == 0] == 0).all()

    def test_rounding_leaves_multiples_alone(self):
        mask = np.array([0] * 3 + [1] * 6 + [2], np.uint8)[None]
        assert proportions_from_mask(mask, SPACE, round_to=0.1).values.tolist() == [0.3, 0.6, 0.1]

    @settings(deadline=None)
    @given(tissue_masks, st.floats(1e-6, 10), st.integers(0, 99))
    def test_noise_keeps_absent_classes_absent_and_the_sum_at_one(self, mask, noise, seed):
        values = proportions_from_mask(mask, SPACE, noise=noise, seed=seed).values
        assert values.sum() == pytest.approx(1)
        assert all(values[index] == 0 for index in range(3) if not (mask == index).any())

    @pytest.mark.parametrize("noise", [0.01, 0.1])
    def test_noise_has_the_stated_mean_and_deviation(self, noise):
        mask = np.array([0] * 3 + [1] * 7, np.uint8)[None]
        draws = np.array([proportions_from_mask(mask, PLAIN, noise=noise, seed=seed).values for seed in range(2000)])
        deviation = np.sqrt(0.3 * 0.7 * noise / (1 + noise))
        np.testing.assert_allclose(draws.mean(0), [0.3, 0.7], atol=4 * deviation / 2000**0.5)
        np.testing.assert_allclose(draws.std(0), deviation, rtol=0.08)

    def test_no_tissue_is_refused(self):
        with pytest.raises(InputError, match="no pixel of a tissue class"):
            proportions_from_mask(np.full((3, 3), 3, np.uint8), SPACE)

    @pytest.mark.parametrize("options", [{"round_to": 0.3}, {"round_to": 0}, {"round_to": 5}, {"noise": -1}], ids=str)
    def test_options_out_of_range_are_refused(self, options):
        with pytest.raises(InputError):
            proportions_from_mask(np.zeros((2, 2), np.uint8), PLAIN, **options)


class TestTables:
    def write(self, tmp_path, text):
        path = tmp_path / "hints.csv"
        path.write_text(text, encoding="utf-8")
        return path

    def test_tags(self, tmp_path):
        path = self.write(tmp_path, "tag:stroma,image,tag:gland\n1,a.png,0\n0,sub\\b,1\n,c,\n")
        assert {image: tags.values.tolist() for image, tags in read_tag_table(path, PLAIN).items()} == {
            "a.png": [0, 1],
            "sub/b": [1, 0],
        }

    def test_proportions(self, tmp_path):
        path = self.write(tmp_path, "image,split,proportion:gland,proportion:stroma\na,train,.25,0.75\nb,,,\n")
        found = read_proportion_table(path, PLAIN)
        assert list(found) == ["a"]
        assert found["a"].values.tolist() == [0.25, 0.75]

    def test_spreadsheet_with_semicolons_decimal_commas_and_byte_order_mark(self, tmp_path):
        path = tmp_path / "hints.csv"
        path.write_bytes("image;proportion:gland;proportion:stroma;\r\nä;0,5;0,5;\r\n;;;\r\n".encode("utf-8-sig"))
        assert read_proportion_table(path, PLAIN)["ä"].values.tolist() == [0.5, 0.5]

    def test_points_by_name_and_by_index(self, tmp_path):
        path = self.write(tmp_path, "image,row,column,class\na,1,2,stroma\na,3,4.0,0\nb,0,0,1\n")
        found = read_point_table(path, PLAIN)
        assert found["a"].rows.tolist() == [[1, 2, 1], [3, 4, 0]]
        assert found["b"].rows.tolist() == [[0, 0, 1]]

    @pytest.mark.parametrize(
        ("read", "text", "message"),
        [
            (read_tag_table, "image,tag:gland,tag:stroma\na,1,0\nb,2,0\n", ":3: tag:gland of image 'b' is '2'"),
            (read_tag_table, "image,tag:gland\na,1\n", ":1: column 'tag:stroma' is missing"),
            (read_tag_table, "image\na\n", "column 'tag:<class>' is missing"),
            (read_tag_table, "image,tag:gland,tag:stroma\na,1,\n", ":2: tag:stroma of image 'a' is empty"),
            (read_tag_table, "image,tag:gland,tag:stroma\na,1,0\n\na,1,0\n", ":4: image 'a' stands in line 2"),
            (read_tag_table, "", "table is empty"),
            (read_proportion_table, "image,proportion:gland,proportion:stroma\na,30,70\n", ":2: .* per cent"),
            (read_proportion_table, "image,proportion:gland,proportion:stroma\na,.3,.6\n", ":2: .* sum to 0.9, not 1"),
            (read_proportion_table, "image,proportion:gland,proportion:stroma\na,nan,1\n", ":2: .* is 'nan'"),
            (read_point_table, "image,row,column,class\na,1,2,bone\n", ":2: class of a point is 'bone'"),
            (read_point_table, "image,row,column,class\na,1,2,2\n", ":2: class of a point is '2'"),
            (read_point_table, "image,row,column,class\na,-1,2,0\n", ":2: row of a point is '-1'"),
            (read_point_table, "image,row,column,class\na,1,2.5,0\n", ":2: column of a point is '2.5'"),
            (read_point_table, "image,row,column,class\na,1,1e30,0\n", ":2: column of a point is '1e30'"),
            (read_point_table, "image,row,column,class\na,1e999,2,0\n", ":2: row of a point is '1e999'"),
            (read_point_table, "image,row,column,class\na,1,2,0\na,1,2,1\n", ":3: .* is stroma here and gland before"),
            (read_point_table, "image,row,colum,class\na,1,2,0\n", ":1: column 'column' is missing"),
        ],
    )
    def test_errors_name_file_and_line(self, tmp_path, read, text, message):
        with pytest.raises(InputError, match=r"hints\.csv.*" + message):
            read(self.write(tmp_path, text), PLAIN)

    def test_missing_file(self, tmp_path):
        with pytest.raises(InputError, match=r"nothing\.csv: table does not exist"):
            read_point_table(tmp_path / "nothing.csv", PLAIN)


def feature(kind, coordinates, name="stroma", **classification):
    return {
        "type": "Feature",
        "id": "2d0a",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": {"objectType": "annotation", "classification": {"name": name, **classification}},
    }


class TestGeoJson:
    FEATURES = (
        feature("Point", [10.5, 20.99], color=[200, 0, 0]),
        feature("MultiPoint", [[1, 2], [3.2, 4.7]], "gland", colorRGB=-3670016),
        feature("Polygon", [[[0, 0], [5, 0], [5, 5], [0, 0]]], "region of interest"),
    )

    def write(self, tmp_path, content):
        path = tmp_path / "a.geojson"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    @pytest.mark.parametrize("wrap", [list, lambda features: {"type": "FeatureCollection", "features": features}])
    def test_points_are_rows_and_columns(self, tmp_path, wrap):
        points = points_from_geojson(self.write(tmp_path, wrap(list(self.FEATURES))), PLAIN)
        assert points.rows.tolist() == [[20, 10, 1], [2, 1, 0], [4, 3, 0]]

    def test_single_feature_with_a_derived_class(self, tmp_path):
        one = feature("Point", [1, 2, 0], None, names=["Tumor", "Positive"])
        points = points_from_geojson(self.write(tmp_path, one), LabelSpace(("Tumor: Positive",)))
        assert points.rows.tolist() == [[2, 1, 0]]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([feature("Point", [1, 2], "bone")], "feature 1 has class 'bone', classes are gland, stroma"),
            ([feature("Point", [1, 2], None)], "feature 1 is a point without a class"),
            ([{"geometry": {"type": "Point", "coordinates": [1, 2]}}], "without a class"),
            ([FEATURES[2]], "no points in 1 features"),
            ({"type": "FeatureCollection", "features": []}, "no points in 0 features"),
            ([feature("Point", [-1, 2])], "feature 1 has the place"),
            ([feature("Point", [10**400, 2])], "feature 1 has the place"),
            ([feature("MultiPoint", 3)], "feature 1 has the place 3"),
            ([feature("Point", [1, 2]), feature("Point", [1.5, 2.5], "gland")], "is gland here and stroma before"),
            ({"type": "Topology"}, "is no FeatureCollection"),
            ('{"a": 1,\n]', r"a\.geojson:2: file is no JSON"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_errors_name_the_feature(self, tmp_path, content, message):
        with pytest.raises(InputError, match=message):
            points_from_geojson(self.write(tmp_path, content), PLAIN)
