"""A method of another package, as docs/how-to/plug-in.md says: the code tested is the code of that page."""

import re
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from types import ModuleType

import pytest

import tissuehint
from tissuehint import TissueModel, plugins
from tissuehint.errors import InputError
from tissuehint.testing import MethodCase, MethodContract

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "plug-in.md"


@pytest.fixture(scope="module", autouse=True)
def mine():
    """The entry point of the page, as an installed package would bring it."""
    source = re.search(r"```python\n(# mine/method\.py\n.*?)```", PAGE.read_text(), re.DOTALL).group(1)
    group, name, value = re.search(
        r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "([\w.:]+)"', PAGE.read_text()
    ).groups()
    module = ModuleType(value.partition(":")[0])
    installed = EntryPoints([EntryPoint(name, value, group)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mine", ModuleType("mine"))
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(source, str(PAGE), "exec"), module.__dict__)
        patch.setattr("importlib.metadata.entry_points", lambda **words: installed.select(**words))
        patch.setattr(plugins, "entry_points", lambda **words: installed.select(**words))
        yield


FAST = {"learning_rate": 1e-3, "head_multiplier": 5, "power": 0}


class TestMine(MethodContract):
    @pytest.fixture(scope="class")
    @classmethod
    def case(cls):
        return MethodCase("mine", {"encoder": {"name": "test_resnet"}, "optimization": FAST})


def test_it_stands_behind_the_built_in_methods():
    assert plugins.method_names() == [*plugins.METHODS, "mine"]


def test_its_recipe_keys_are_checked():
    recipe = {"name": "a", "data": {"source": "phantom"}, "method": {"name": "mine", "encodr": {}}}
    with pytest.raises(InputError, match=r"method\.encodr is unknown.*|method\.encodr.*encoder"):
        tissuehint.run(recipe)


def test_a_run_with_it_leaves_a_model_that_loads(tmp_path):
    result = tissuehint.run(
        {
            "name": "mine",
            "output": str(tmp_path),
            "data": {"source": "phantom", "phantom": {"train": 4, "val": 0, "test": 2, "size": 64}, "workers": 0},
            "method": {"name": "mine", "encoder": {"name": "test_resnet"}},
            "stage1": {"steps": 2, "batch_size": 4, "round_steps": 2},
            "trainer": {"accelerator": "cpu", "progress": False},
            "evaluation": {"gallery": 1},
        }
    )
    assert {row["name"] for row in result.scores["rows"]} == {"tags", "mine"}
    model = TissueModel.load(result.path)
    assert model.architecture["name"] == "mine"
    assert model.predict(result.path / "gallery" / "phantom_test_0000_image.jpg").shape == (5, 64, 64)
