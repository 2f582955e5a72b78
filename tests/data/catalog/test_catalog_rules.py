import importlib
import pickle
import re
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.data import catalog
from tissuehint.data.catalog.base import record_id
from tissuehint.data.catalog.grouping import split_groups
from tissuehint.errors import InputError

NAMES = (
    "glas",
    "ebhi_seg",
    "wsss4luad",
    "bcss_wsss",
    "luad_histoseg",
    "prog",
    "gcss",
    "gcss_wsss",
    "bcss",
    "camelyon16",
)


def test_the_catalog_has_the_ten_data_sets():
    assert catalog.names() == NAMES
    assert set(catalog.CATALOG) == set(NAMES)
    assert len(catalog.CATALOG) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_says_what_a_table_needs(name):
    entry = catalog.get(name)
    assert entry.name == name
    assert entry.splits
    assert entry.licence
    assert "http" not in entry.citation + entry.licence + entry.layout
    assert len(entry.layout.strip().splitlines()) >= 2
    assert set(entry.hints) <= {"tags", "points", "proportions"}
    for constants in (entry.mean, entry.std):
        assert constants is None or all(0 < value < 1 for value in constants)
    assert all(0 < value < 1 for scores in entry.published.values() for value in scores.values())
    if entry.labels.white is not None:
        assert entry.labels.names[-1] == "white"
        assert entry.labels.colours[-1] == (255, 255, 255)


def test_h_and_e_is_darkest_in_green_in_every_set_of_constants():
    # the constants of BCSS and LUAD are published in blue, green, red order
    for name in NAMES:
        entry = catalog.get(name)
        if entry.mean is not None:
            assert entry.mean[1] == min(entry.mean)
    assert catalog.get("bcss_wsss").mean[0] == pytest.approx(0.70623304)
    assert catalog.get("luad_histoseg").std[0] == pytest.approx(0.18846453)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("GlaS", "glas"), ("ebhi-seg", "ebhi_seg"), ("camelyon", "camelyon16"), ("bcss-wss", "bcss_wsss")],
)
def test_unknown_name_offers_the_nearest(typed, meant):
    with pytest.raises(InputError, match=meant) as caught:
        catalog.get(typed)
    assert typed in str(caught.value)


def test_name_far_from_all_offers_all():
    with pytest.raises(InputError, match=r"glas.*camelyon16"):
        catalog.get("zzzz")


def test_looking_at_names_imports_no_entry():
    code = (
        "import sys; from tissuehint.data.catalog import names; names(); print([m for m in sys.modules if 'glas' in m])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


@pytest.mark.parametrize("name", NAMES)
def test_missing_root_names_path_and_layout(name, tmp_path):
    entry = catalog.get(name)
    with pytest.raises(InputError) as caught:
        catalog.read(name, tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in str(caught.value)
    assert entry.layout.strip().splitlines()[0].strip() in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_empty_root_names_path_and_layout_in_every_scheme(name, tmp_path):
    for scheme in catalog.get(name).splits:
        with pytest.raises(InputError) as caught:
            catalog.read(name, tmp_path, scheme)
        message = str(caught.value)
        assert str(tmp_path) in message
        assert "expected layout" in message
        assert "\n" not in message


@pytest.mark.parametrize("name", NAMES)
def test_unknown_scheme_lists_the_known(name, tmp_path):
    with pytest.raises(InputError, match=catalog.get(name).splits[0]):
        catalog.read(name, tmp_path, "random")


@pytest.mark.parametrize(
    ("stem", "count", "bits"),
    [
        ("TCGA-A1-A0SK-DX1_xmin45749_ymin25055_MPP-0.2500+0[1101]", 4, (1, 1, 0, 1)),
        ("1031280-2300-27920-[1 0 0 1]", 4, (1, 0, 0, 1)),
        ("436219-7159-48057-[1, 0, 0]", 3, (1, 0, 0)),
        ("odd[copy] name [011001].png", 6, (0, 1, 1, 0, 0, 1)),
        ("[0000]", 4, (0, 0, 0, 0)),
    ],
)
def test_bits_of_the_published_spellings(stem, count, bits):
    assert catalog.parse_bits(stem, count) == bits


@pytest.mark.parametrize(
    "stem", ["plain", "a[110]", "a[1 0 2 1]", "a[]", "a[11011]", "a[1101", "a[yes!]", "a[-1 0 0 1]"]
)
def test_bad_bits_name_the_file(stem):
    with pytest.raises(InputError, match=re.escape(stem)):
        catalog.parse_bits(stem, 4)


@given(st.lists(st.integers(0, 1), min_size=1, max_size=8), st.sampled_from(["", " ", ", ", ","]))
def test_bits_round_trip(bits, separator):
    assert catalog.parse_bits(f"x-1[{separator.join(map(str, bits))}]", len(bits)) == tuple(bits)


@given(st.text(max_size=30))
def test_ids_are_safe_file_names(text):
    assert re.fullmatch(r"[A-Za-z0-9+-][A-Za-z0-9_+-]*", record_id("train", text))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=3, max_size=25))
def test_split_groups_is_a_partition_that_does_not_depend_on_order(sizes):
    strata = {f"g{index}": Counter(a=first + 1, b=second) for index, (first, second) in enumerate(sizes)}
    ratio = {"train": 7, "val": 1, "test": 2}
    home = split_groups(strata, ratio)
    assert home.keys() == strata.keys()
    assert set(home.values()) == set(ratio)
    assert split_groups(dict(reversed(strata.items())), ratio) == home


def test_split_groups_meets_ratio_and_mixture():
    strata = {f"g{index}": Counter({"benign" if index % 2 else "malignant": 1}) for index in range(100)}
    home = split_groups(strata, {"train": 7, "val": 1, "test": 2})
    counts = Counter((home[group], kind) for group, kinds in strata.items() for kind in kinds)
    assert counts == {
        ("train", "benign"): 35,
        ("train", "malignant"): 35,
        ("val", "benign"): 5,
        ("val", "malignant"): 5,
        ("test", "benign"): 10,
        ("test", "malignant"): 10,
    }


def test_split_groups_gives_a_rare_class_to_every_split():
    strata = {f"g{index:02d}": Counter(common=1) for index in range(40)}
    for index in range(2):
        strata[f"g{index:02d}"]["rare"] = 1
    home = split_groups(strata, {"train": 9, "val": 1})
    assert {home["g00"], home["g01"]} == {"train", "val"}


def test_decoders_survive_pickling():
    for module, name in (("bcss", "DECODE"), ("gcss", "PATCHES_WSSS")):
        value = getattr(importlib.import_module(f"tissuehint.data.catalog.{module}"), name)
        decode = getattr(value, "decode", value)
        assert pickle.loads(pickle.dumps(decode)).keywords == decode.keywords


def test_label_orders_are_those_of_the_releases():
    tissue = {name: catalog.get(name).labels.names for name in NAMES}
    assert tissue["glas"] == tissue["ebhi_seg"] == tissue["prog"] == ("non-gland", "gland")
    assert tissue["wsss4luad"] == ("tumour", "stroma", "normal", "white")
    assert tissue["bcss_wsss"] == ("tumour", "stroma", "lymphocytic infiltrate", "necrosis", "white")
    assert tissue["luad_histoseg"] == (
        "tumour epithelium",
        "necrosis",
        "lymphocytes",
        "tumour-associated stroma",
        "white",
    )
    assert tissue["camelyon16"] == ("normal", "tumour")
