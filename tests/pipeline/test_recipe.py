import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tissuehint.errors import InputError
from tissuehint.pipeline import Recipe, load_recipe
from tissuehint.pipeline.recipe import parse_override, shipped_recipes

# printable: the YAML writer loses control characters such as U+0085
WORDS = st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=20)
MINIMAL = {"name": "a", "data": {"source": "phantom"}, "method": {"name": "cam"}, "stage2": {}}


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("sead", "seed"),
        ("stage_1", "stage1"),
        ("data.sorce", "source"),
        ("data.patches.sidee", "side"),
        ("data.weak.tag_treshold", "tag_threshold"),
        ("data.augmentation.brightnes", "brightness"),
        ("data.phantom.trian", "train"),
        ("method.levls", "levels"),
        ("method.encoder.wieghts", "weights"),
        ("method.optimization.learningrate", "learning_rate"),
        ("method.test_time.flips", "flip"),
        ("stage1.step", "steps"),
        ("pseudo_masks.min_confidense", "min_confidence"),
        ("stage2.crops", "crop"),
        ("stage2.network.architectur", "architecture"),
        ("stage2.network.encoder.nam", "name"),
        ("stage2.optimization.warm_up", "warmup"),
        ("trainer.device", "devices"),
        ("evaluation.protocol", "protocols"),
    ],
)
def test_an_unknown_key_names_itself_and_the_nearest(key, nearest):
    with pytest.raises(InputError) as caught:
        load_recipe(MINIMAL, {key: 1})
    message = str(caught.value)
    assert f"recipe key {key}" in message
    assert "is unknown" in message
    assert nearest in message.partition(";")[2]
    assert "\n" not in message


def test_a_key_unlike_all_others_lists_the_known_ones():
    with pytest.raises(InputError, match=r"known keys: .*learning_rate.*warmup"):
        load_recipe(MINIMAL, {"stage2.optimization.xyzzy": 1})


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ({"stage1.steps": 0}, r"stage1\.steps = 0"),
        ({"stage1.steps": "many"}, r"stage1\.steps = 'many'"),
        ({"name": "a/b"}, "name = 'a/b'"),
        ({"data": "phantom"}, "data = 'phantom'"),
        ({"method": "cam"}, "method = 'cam'"),
        ({"method": None}, "method is not given"),
        ({"stage2": None, "ceiling": True}, "stage2 is not given"),
        ({"stage2": None, "data.labels": "masks"}, "stage2 is not given"),
        ({"data.patches": {"side": 64, "stride": 65}}, "stride 65 is larger than side 64"),
        ({"evaluation.protocols": []}, "at least one split and one protocol"),
        ({"evaluation.splits": ["tests"]}, r"evaluation\.splits"),
        ({"stage2.network.encoder.output_stride": 8}, r"stage2\.network\.encoder"),
        ({"method.test_time.scales": [0]}, r"method\.test_time\.scales"),
    ],
)
def test_a_value_that_breaks_a_rule_is_one_line_with_the_key(overrides, text):
    with pytest.raises(InputError, match=text) as caught:
        load_recipe(MINIMAL, overrides)
    assert "\n" not in str(caught.value)


def test_missing_keys_are_named():
    with pytest.raises(InputError, match=r"recipe key data is missing|recipe key data: is missing"):
        load_recipe({"name": "a", "method": {"name": "cam"}})
    with pytest.raises(InputError, match=r"method\.name"):
        load_recipe({**MINIMAL, "method": {"levels": 2}})


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(InputError, match=r"'cma': is unknown; use one of .*cam"):
        load_recipe(MINIMAL, {"method.name": "cma"})


class TestOverrides:
    def test_dotted_and_double_underscore_mean_the_same(self):
        dotted = load_recipe(MINIMAL, {"stage2.network.encoder.name": "resnet10t", "data.patches.side": 300})
        under = load_recipe(MINIMAL, {"stage2__network__encoder__name": "resnet10t", "data__patches__side": 300})
        assert dotted == under
        assert dotted.stage2.network.encoder.name == "resnet10t"
        assert dotted.data.patches.side == 300

    def test_a_mapping_is_merged(self):
        base = {**MINIMAL, "stage1": {"steps": 7, "batch_size": 3}}
        merged = load_recipe(base, {"stage1": {"steps": 9}})
        assert (merged.stage1.steps, merged.stage1.batch_size) == (9, 3)

    def test_null_takes_a_section_away(self):
        base = {**MINIMAL, "data": {"source": "phantom", "patches": {"side": 64, "stride": 64}}}
        assert load_recipe(base, {"data.patches": None}).data.patches is None

    def test_later_overrides_win(self):
        assert load_recipe(MINIMAL, {"seed": 1, "stage1.steps": 5, "stage1": {"steps": 6}}).stage1.steps == 6

    def test_what_was_given_is_left_as_it_was(self):
        given_mapping = {**MINIMAL, "stage1": {"steps": 7}}
        before = yaml.safe_dump(given_mapping)
        load_recipe(given_mapping, {"stage1.steps": 9, "stage2.steps": 3})
        assert yaml.safe_dump(given_mapping) == before

    def test_a_recipe_can_be_overridden_and_stays_as_it_was(self):
        first = load_recipe(MINIMAL)
        second = load_recipe(first, {"seed": 5})
        assert (first.seed, second.seed) == (0, 5)
        assert second == first.model_copy(update={"seed": 5})

    @pytest.mark.parametrize(
        ("text", "value"),
        [("a.b=1", 1), ("a=null", None), ("a=[1, 2]", [1, 2]), ("a=x=y", "x=y"), ("a=", None), ("a={b: 2}", {"b": 2})],
    )
    def test_command_line_values_are_yaml(self, text, value):
        assert parse_override(text)[1] == value

    @pytest.mark.parametrize("text", ["a", "=1", "a=[1"])
    def test_command_line_values_that_are_none(self, text):
        with pytest.raises(InputError, match="-o"):
            parse_override(text)


class TestFiles:
    def test_yaml_errors_name_file_and_line(self, tmp_path):
        path = tmp_path / "bad.yaml"
        path.write_text("name: a\ndata:\n  source: [phantom\nmethod: {}\n")
        with pytest.raises(InputError, match=r"bad\.yaml:4"):
            load_recipe(path)

    @pytest.mark.parametrize("content", [b"", b"- 1\n- 2\n", b"just words", b"\xff\xfe\x00"])
    def test_what_is_no_recipe(self, tmp_path, content):
        path = tmp_path / "bad.yaml"
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.yaml"):
            load_recipe(path)

    def test_an_unknown_name_lists_the_nearest(self):
        with pytest.raises(InputError, match="cam/phantom"):
            load_recipe("cam/fantom")

    def test_a_key_that_is_no_text(self):
        with pytest.raises(InputError, match="1"):
            load_recipe({**MINIMAL, 1: 2})

    def test_a_number_as_exponent_is_a_number(self, tmp_path):
        path = tmp_path / "exponent.yaml"
        path.write_text(yaml.safe_dump(MINIMAL) + "stage1: {steps: 3}\n")
        path.write_text(path.read_text().replace("stage2: {}", "stage2: {optimization: {learning_rate: 1e-3}}"))
        assert load_recipe(path).stage2.optimization.learning_rate == 1e-3


class TestVariables:
    def test_paths_are_expanded(self, monkeypatch):
        monkeypatch.setenv("SOMEWHERE", "/data")
        recipe = load_recipe(
            MINIMAL,
            {"data.root": "$SOMEWHERE/x", "method.encoder.weights": "${SOMEWHERE}/w.pt", "output": "$SOMEWHERE"},
        )
        assert recipe.data.root == "/data/x"
        assert recipe.method.encoder.weights == "/data/w.pt"
        assert recipe.output == "/data"

    def test_an_unset_variable_is_named_with_its_key(self, monkeypatch):
        monkeypatch.delenv("SOMEWHERE", raising=False)
        with pytest.raises(InputError, match=r"method\.encoder\.weights.*SOMEWHERE.*not set"):
            load_recipe(MINIMAL, {"method.encoder.weights": "$SOMEWHERE/w.pt"})

    def test_other_keys_keep_their_dollars(self):
        assert load_recipe(MINIMAL, {"published": {"cost": "5 $US"}}).published == {"cost": "5 $US"}


class TestResolved:
    @pytest.mark.parametrize("name", sorted(shipped_recipes()))
    def test_every_shipped_recipe_loads_and_reads_back(self, name, monkeypatch, tmp_path):
        monkeypatch.setenv("TISSUEHINT_DATA", str(tmp_path))
        recipe = load_recipe(name)
        path = tmp_path / "resolved.yaml"
        path.write_text(recipe.to_yaml())
        assert load_recipe(path) == recipe
        assert recipe.name

    def test_there_are_recipes(self):
        assert "cam/phantom" in shipped_recipes()

    @given(
        seed=st.integers(0, 2**31),
        rate=st.floats(1e-9, 1e3),
        devices=st.one_of(st.integers(1, 8), st.just("auto"), st.lists(st.integers(0, 3), min_size=1), st.just("2")),
        published=st.dictionaries(WORDS, WORDS, max_size=3),
        scales=st.lists(st.floats(0.25, 4), min_size=1, max_size=3),
        side=st.one_of(st.none(), st.integers(16, 999)),
    )
    def test_any_recipe_reads_back_to_itself(self, seed, rate, devices, published, scales, side):
        recipe = load_recipe(
            MINIMAL,
            {
                "seed": seed,
                "stage2.optimization.learning_rate": rate,
                "trainer.devices": devices,
                "published": published,
                "method.test_time.scales": scales,
                "data.patches": None if side is None else {"side": side, "stride": side},
                "method.encoder.normalization": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]},
            },
        )
        again = load_recipe(yaml.safe_load(recipe.to_yaml()))
        assert again == recipe
        assert isinstance(again, Recipe)
        assert type(again.trainer.devices) is type(recipe.trainer.devices)

    def test_frozen(self):
        with pytest.raises(ValueError, match="frozen"):
            load_recipe(MINIMAL).seed = 4

    def test_loading_needs_no_data_and_writes_nothing(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        load_recipe(MINIMAL)
        assert list(tmp_path.iterdir()) == []
