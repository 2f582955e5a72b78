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
        ({"data.train_fraction": 0}, r"data\.train_fraction = 0"),
        ({"data.train_fraction": 0.5, "data.train_limit": 3}, "recipe key data: .*give one of them"),
        ({"start_from": 3}, "start_from = 3"),
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


def written(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


class TestExtends:
    @pytest.fixture
    def base(self, tmp_path):
        patches = {"side": 64, "stride": 32}
        return written(
            tmp_path / "base.yaml",
            **{**MINIMAL, "data": {"source": "phantom", "patches": patches}},
            stage1={"steps": 7, "batch_size": 3},
            evaluation={"boundary_distances": [1, 2]},
            published={"CAM": "51.2", "ours": "63.0"},
        )

    def test_mappings_are_merged_and_all_else_is_replaced(self, base, tmp_path):
        own = {"name": "b", "stage1": {"steps": 9}, "evaluation": {"boundary_distances": [5]}, "ceiling": True}
        recipe = load_recipe(written(tmp_path / "own.yaml", extends="base.yaml", **own))
        expected = {"name": "b", "stage1.steps": 9, "evaluation.boundary_distances": [5], "ceiling": True}
        assert recipe == load_recipe(base, expected)
        assert (recipe.stage1.steps, recipe.stage1.batch_size) == (9, 3)
        assert recipe.published == {"CAM": "51.2", "ours": "63.0"}

    def test_null_replaces(self, base, tmp_path):
        own = written(tmp_path / "own.yaml", extends="base.yaml", data={"patches": None}, published=None)
        recipe = load_recipe(own)
        assert recipe.data.patches is None
        assert recipe.published == {}
        assert load_recipe(base).data.patches.side == 64

    def test_a_section_takes_the_place_of_null(self, base, tmp_path):
        written(tmp_path / "middle.yaml", extends="base.yaml", data={"patches": None})
        own = written(tmp_path / "own.yaml", extends="middle.yaml", data={"patches": {"side": 48, "stride": 48}})
        assert load_recipe(own).data.patches.side == 48

    def test_paths_are_relative_to_the_file_that_says_them(self, base, tmp_path, monkeypatch):
        written(tmp_path / "one" / "a.yaml", extends="two/b.yaml", stage1={"steps": 1}, seed=1)
        written(tmp_path / "one" / "two" / "b.yaml", extends="../../base.yaml", stage1={"steps": 2, "round_steps": 2})
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        recipe = load_recipe("../one/a.yaml")
        assert (recipe.stage1.steps, recipe.stage1.batch_size, recipe.stage1.round_steps) == (1, 3, 2)
        absolute = written(tmp_path / "c.yaml", extends=str(tmp_path / "one" / "a.yaml"))
        assert load_recipe(absolute) == recipe

    @pytest.mark.parametrize("name", ["cam/phantom", "recipes/cam/phantom.yaml"])
    def test_a_shipped_recipe_by_name(self, tmp_path, name):
        own = written(tmp_path / "own.yaml", extends=name, name="ablation", method={"levels": 1})
        assert load_recipe(own) == load_recipe("cam/phantom", {"name": "ablation", "method.levels": 1})

    def test_a_mapping_extends_too_and_stays_as_it_was(self, base):
        own = {"extends": str(base), "stage1": {"steps": 5}}
        recipe = load_recipe(own, {"seed": 4})
        assert (recipe.stage1.steps, recipe.stage1.batch_size, recipe.seed) == (5, 3, 4)
        assert own == {"extends": str(base), "stage1": {"steps": 5}}
        assert load_recipe({"extends": "cam/phantom"}) == load_recipe("cam/phantom")

    def test_overrides_come_after(self, base, tmp_path):
        own = written(tmp_path / "own.yaml", extends="base.yaml", stage1={"steps": 9})
        assert load_recipe(own, {"stage1.steps": 11}).stage1.steps == 11

    def test_the_resolved_recipe_stands_alone(self, base, tmp_path):
        recipe = load_recipe(written(tmp_path / "own.yaml", extends="base.yaml", seed=8))
        assert "extends" not in yaml.safe_load(recipe.to_yaml())
        base.unlink()
        assert load_recipe(written(tmp_path / "alone.yaml", **yaml.safe_load(recipe.to_yaml()))) == recipe

    def test_variables_that_were_replaced_need_not_be_set(self, tmp_path, monkeypatch):
        monkeypatch.delenv("SOMEWHERE", raising=False)
        written(tmp_path / "base.yaml", **{**MINIMAL, "data": {"source": "phantom", "root": "$SOMEWHERE/x"}})
        own = written(tmp_path / "own.yaml", extends="base.yaml", data={"root": "/data"})
        assert load_recipe(own).data.root == "/data"

    def refused(self, path, *words):
        with pytest.raises(InputError) as caught:
            load_recipe(path)
        message = str(caught.value)
        assert "\n" not in message
        for word in words:
            assert word in message
        return message

    def test_a_cycle_names_its_files(self, tmp_path):
        first = written(tmp_path / "a.yaml", extends="b.yaml")
        written(tmp_path / "b.yaml", extends="sub/../c.yaml")
        written(tmp_path / "c.yaml", extends="a.yaml")
        (tmp_path / "sub").mkdir()
        self.refused(first, "a.yaml -> ", "b.yaml -> ", "c.yaml -> ", "extends itself")
        self.refused(written(tmp_path / "self.yaml", extends="self.yaml"), "self.yaml -> ", "extends itself")

    def test_an_unknown_base_names_the_file_that_asked(self, tmp_path):
        own = written(tmp_path / "own.yaml", extends="middle.yaml")
        written(tmp_path / "middle.yaml", extends="cam/fantom")
        message = self.refused(own, "middle.yaml: extends cam/fantom", "cam/phantom")
        assert "own.yaml" not in message

    def test_a_damaged_base_is_named(self, tmp_path):
        (tmp_path / "base.yaml").write_text("name: [a\n")
        self.refused(written(tmp_path / "own.yaml", extends="base.yaml"), "base.yaml", "is no YAML")

    @pytest.mark.parametrize("name", [None, 3, "", ["cam/phantom", "cam/glas"], {"file": "a"}])
    def test_what_is_no_name(self, tmp_path, name):
        self.refused(written(tmp_path / "own.yaml", extends=name), "own.yaml: extends", "is no name of a recipe")

    def test_it_cannot_be_overridden(self, base):
        with pytest.raises(InputError, match="write extends in a recipe file"):
            load_recipe(base, {"extends": "cam/phantom"})


class TestVariables:
    def test_paths_are_expanded(self, monkeypatch):
        monkeypatch.setenv("SOMEWHERE", "/data")
        recipe = load_recipe(
            MINIMAL,
            {
                "data.root": "$SOMEWHERE/x",
                "method.encoder.weights": "${SOMEWHERE}/w.pt",
                "output": "$SOMEWHERE",
                "start_from": "$SOMEWHERE/run",
            },
        )
        assert recipe.start_from == "/data/run"
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
