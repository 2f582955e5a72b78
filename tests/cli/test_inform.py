from __future__ import annotations

import json
import types

import pytest

from tissuehint.cli import doctor
from tissuehint.pipeline.recipe import shipped_recipes
from tissuehint.plugins import METHODS


def test_methods_lists_hint_idea_and_recipes(command):
    outcome = command("methods")
    assert outcome.code == 0
    for name in METHODS:
        line = next(line for line in outcome.out.splitlines() if line.split()[:1] == [name])
        assert line.split()[1] in ("tags", "points", "proportions")
    assert all(recipe in outcome.out for recipe in shipped_recipes())


def test_methods_shows_the_page_of_one(command):
    outcome = command("methods", "cam")
    assert outcome.code == 0
    assert "Zhou" in outcome.out
    command("methods", "cim").refused("cim", "cam")


def test_methods_lists_the_image_encoders_with_licence_and_access(command):
    from tissuehint.nn.image_encoder_catalog import CATALOG

    outcome = command("methods", "--encoders")
    assert outcome.code == 0
    for name, row in CATALOG.items():
        line = next(line for line in outcome.out.splitlines() if line.split()[:1] == [name])
        assert all(text in line for text in (row.what, str(row.dim), str(row.side), row.hub or "", row.licence))
        assert line.endswith(row.access)
    assert "timm" in outcome.out.splitlines()[-1]
    command("methods", "cam", "--encoders").refused("cam", "--encoders")


def test_a_broken_plug_in_does_not_hide_the_others(command, monkeypatch):
    monkeypatch.setitem(METHODS, "broken", "tissuehint.methods.nothing:Broken")
    outcome = command("methods")
    assert outcome.code == 0
    assert "cannot be loaded" in outcome.out
    assert "cam" in outcome.out


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TISSUEHINT_DATA", raising=False)


def findings(command, *words):
    outcome = command("doctor", "--json", *words)
    return outcome.code, {finding["name"]: finding for finding in json.loads(outcome.out)}


def test_doctor_names_what_it_found(command, offline, tmp_path, monkeypatch):
    (tmp_path / "glas").mkdir()
    (tmp_path / "bcss-wsss").mkdir()
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "encoder.safetensors").touch()
    monkeypatch.setenv("TISSUEHINT_DATA", str(tmp_path))
    code, found = findings(command)
    assert code == 0
    assert {"python", "torch", "lightning", "timm", "processor", "disk", "memory"} <= found.keys()
    assert "glas, bcss_wsss" in found["data sets"]["found"]
    assert "encoder.safetensors" in found["weights"]["found"]
    assert "offline" in found["weights hub"]["found"]
    assert all(one["fix"] for one in found.values() if one["state"] != "ok")


def test_doctor_table_ends_with_the_count(command, offline):
    outcome = command("doctor")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith("problems: 0, warnings: ")
    assert "TISSUEHINT_DATA is not set" in outcome.out


def test_doctor_problem_is_exit_code_2(command, offline, monkeypatch, tmp_path):
    monkeypatch.setenv("TISSUEHINT_DATA", str(tmp_path / "gone"))
    usage = types.SimpleNamespace(free=1e8, total=1e9)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    code, found = findings(command)
    assert code == 2
    assert found["disk"]["state"] == found["data sets"]["state"] == "problem"


def test_doctor_does_not_wait_for_a_silent_hub(command, monkeypatch):
    import socket
    import threading

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(1)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(doctor, "HUB_SECONDS", 0.3)
        (hub,) = doctor._hub()
    assert hub.state == "warning"
    assert hub.fix
    assert threading.active_count() < 50


def test_doctor_survives_a_broken_check(command, offline, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("driver too old\nmore")

    monkeypatch.setattr("torch.cuda.is_available", broken)
    code, found = findings(command)
    assert code == 0
    assert "driver too old" in found["devices"]["found"]
