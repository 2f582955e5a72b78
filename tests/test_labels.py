import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint import plugins
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace, Points, Proportions, Tags

few = settings(max_examples=30)
SPACE = LabelSpace(("gland", "stroma", "white"), white=2)
names = st.lists(st.text("abcdefghij", min_size=1, max_size=4), min_size=2, max_size=30, unique=True)


@st.composite
def spaces(draw):
    chosen = tuple(draw(names))
    white = draw(st.sampled_from([None, len(chosen) - 1]))
    colour = st.tuples(*[st.integers(0, 255)] * 3)
    colours = draw(st.just(()) | st.lists(colour, min_size=len(chosen), max_size=len(chosen)).map(tuple))
    return LabelSpace(chosen, colours, draw(st.integers(len(chosen), 255)), white)


class TestLabelSpace:
    @few
    @given(spaces())
    def test_it_survives_json_and_pickle(self, space):
        assert LabelSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
        assert pickle.loads(pickle.dumps(space)) == space

    @few
    @given(spaces())
    def test_the_palette_shows_each_class_in_its_colour(self, space):
        table = space.colour_table()
        assert len(space.palette()) == 768
        assert [tuple(row) for row in table[: space.num_classes].tolist()] == list(space.colours)
        assert table[space.ignore].tolist() == [128, 128, 128]
        unused = np.ones(256, bool)
        unused[[*range(space.num_classes), space.ignore]] = False
        assert not table[unused].any()

    @few
    @given(spaces())
    def test_white_is_a_class_but_no_tissue(self, space):
        assert space.num_classes - space.num_tissue == (space.white is not None)
        assert space.tissue == space.names[: space.num_tissue]
        assert [space.index(name) for name in space.names] == list(range(space.num_classes))

    @pytest.mark.parametrize("count", [1, 8, 9, 40])
    def test_default_colours_differ_and_white_is_white(self, count):
        space = LabelSpace((*(f"class {index}" for index in range(count)), "white"), white=count)
        assert len(set(space.colours)) == count + 1
        assert space.colours[-1] == (255, 255, 255)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"names": ()},
            {"names": ("a", "")},
            {"names": ("a", "a")},
            {"names": ("a", "b"), "colours": ((0, 0, 0),)},
            {"names": ("a",), "colours": ((0, 0),)},
            {"names": ("a",), "colours": ((0, 0, 256),)},
            {"names": ("a",), "colours": ((0, -1, 0),)},
            {"names": ("a", "b"), "white": 0},
            {"names": ("a", "b"), "white": 2},
            {"names": ("white",), "white": 0},
            {"names": ("a", "b"), "ignore": 1},
            {"names": ("a", "b"), "ignore": -1},
            {"names": ("a", "b"), "ignore": 256},
            {"names": tuple(str(index) for index in range(256))},
        ],
    )
    def test_what_is_no_label_space(self, arguments):
        with pytest.raises(InputError) as error:
            LabelSpace(**arguments)
        assert "\n" not in str(error.value)

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(InputError, match=r"'lumen'.*gland, stroma, white"):
            SPACE.index("lumen")


class TestTags:
    @few
    @given(st.lists(st.integers(0, 1), min_size=2, max_size=2))
    def test_names_and_back(self, values):
        tags = Tags(values)
        assert Tags.from_names(tags.names(SPACE), SPACE).values.tolist() == values

    @pytest.mark.parametrize("values", [[0, 2], [0.5, 0], [[0, 1]], [np.nan, 1], 1, ["1", "0"], [None, 1], [-1, 0]])
    def test_anything_but_zero_and_one_is_refused(self, values):
        with pytest.raises(InputError, match="0 or 1"):
            Tags(values)

    def test_bool_and_float_are_fine(self):
        assert Tags([True, False]).values.tolist() == Tags([1.0, 0.0]).values.tolist() == [1, 0]

    def test_unknown_names_and_white_are_refused(self):
        with pytest.raises(InputError, match="lumen"):
            Tags.from_names(["lumen"], SPACE)
        with pytest.raises(InputError, match="white"):
            Tags.from_names(["gland", "white"], SPACE)


class TestPoints:
    def test_none(self):
        for rows in ([], np.zeros((0, 3))):
            assert Points(rows).rows.shape == (0, 3)
            assert len(Points(rows)) == 0

    @pytest.mark.parametrize("rows", [[(1, 2)], [1, 2, 3], [(1, 2, 3, 4)], [[(1, 2, 3)]]])
    def test_another_shape(self, rows):
        with pytest.raises(InputError, match="row, column, class"):
            Points(rows)

    @pytest.mark.parametrize("value", [0.5, np.nan, np.inf])
    def test_fractions(self, value):
        with pytest.raises(InputError, match="whole"):
            Points([(1, value, 0)])

    def test_negative(self):
        with pytest.raises(InputError, match="negative"):
            Points([(1, -2, 0)])

    def test_whole_floats_are_fine(self):
        assert Points([(1.0, 2.0, 0.0)]).rows.dtype == np.int64

    @pytest.mark.parametrize(
        ("row", "rule"), [((10, 0, 0), "outside"), ((0, 20, 0), "outside"), ((0, 0, 3), "class 3")]
    )
    def test_inside_the_image_and_the_classes(self, row, rule):
        Points([(9, 19, 2)]).check_inside(10, 20, SPACE)
        with pytest.raises(InputError, match=rule) as error:
            Points([(0, 0, 0), row]).check_inside(10, 20, SPACE, "points.csv")
        assert str(error.value).startswith("points.csv: ")


class TestProportions:
    @few
    @given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
    def test_what_sums_to_one(self, values):
        shares = np.array(values) / np.sum(values)
        np.testing.assert_array_equal(Proportions(shares).values, shares)

    @pytest.mark.parametrize("values", [[60, 40], [1.5, -0.5], [[0.5, 0.5]], [np.nan, 1], 1.0])
    def test_no_fractions(self, values):
        with pytest.raises(InputError, match=r"\[0,1\]"):
            Proportions(values)

    @pytest.mark.parametrize("values", [[0.5, 0.4], [0.6, 0.41], [0, 0], []])
    def test_another_sum(self, values):
        with pytest.raises(InputError, match="not 1"):
            Proportions(values)

    def test_rounding_of_a_table_is_tolerated(self):
        Proportions([0.333, 0.333, 0.3335])


class TestInputError:
    @given(st.text(), st.text(), st.text())
    def test_one_line_and_whole_after_pickling(self, subject, rule, fix):
        error = InputError(subject, rule, fix)
        assert len(str(error).splitlines()) <= 1
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), again.args) == (InputError, str(error), error.args)
        assert (again.subject, again.rule, again.fix) == (subject, rule, fix)

    def test_it_says_what_rule_and_fix(self):
        assert str(InputError("a.png", "is\nbroken", "replace it")) == "a.png: is broken; replace it"
        assert isinstance(InputError("a", "b", "c"), ValueError)


class TestMethodNames:
    class Entry:
        name = "other"

        def load(self):
            return dict

    def test_every_built_in_name_loads(self):
        for name in plugins.METHODS:
            assert isinstance(plugins.load_method(name), type)

    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(InputError, match=r"method 'camm': is unknown; use one of cam"):
            plugins.load_method("camm")

    def test_other_packages_add_theirs(self, monkeypatch):
        def entry_points(group, name=None):
            assert group == "tissuehint.methods"
            return [self.Entry()] if name in (None, "other") else []

        monkeypatch.setattr(plugins, "entry_points", entry_points)
        assert plugins.method_names() == [*plugins.METHODS, "other"]
        assert plugins.load_method("other") is dict
