from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

import tissuehint

HEAVY = (
    "torch",
    "lightning",
    "pydantic",
    "numpy",
    "rich",
    "PIL",
    "yaml",
    "scipy",
    "matplotlib",
    "timm",
    "skimage",
    "numba",
)
VERBS = ("demo", "run", "compare", "data", "methods", "predict", "segment", "evaluate", "report", "doctor")


def test_help_imports_nothing_heavy_and_lists_every_verb():
    script = (
        "import sys; from tissuehint.cli import main; code = main(['--help']);"
        f"print(code, [name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    for verb in VERBS:
        assert f"  {verb} " in done.stdout


def test_help_takes_less_than_half_a_second_of_processor_time():
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "tissuehint", "--help"], capture_output=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(seconds) < 0.5


def test_version(command):
    assert command("--version").out == f"tissuehint {tissuehint.__version__}\n"


def test_without_a_verb_the_help_is_shown(command):
    outcome = command()
    assert outcome.code == 0
    assert "Usage: tissuehint" in outcome.out


@pytest.mark.parametrize("verb", [*VERBS, "data list", "data check", "data weaken", "data phantom"])
def test_every_verb_has_help(command, verb):
    outcome = command(*verb.split(), "--help")
    assert outcome.code == 0
    assert "Usage: tissuehint" in outcome.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dem"], "No such command 'dem'"),
        (["demo", "--nothing"], "--nothing"),
        (["run"], "argument"),
        (["run", "x", "--seed", "many"], "--seed"),
        (["data", "phantom", "x", "--size", "3"], "--size"),
        (["data"], "Missing command"),
        (["predict", "model", "image.png"], "--out"),
    ],
)
def test_wrong_use_is_one_line(command, words, said):
    command(*words).refused(said, "--help")


def test_interrupt_exits_130_and_says_how_to_go_on(command, monkeypatch):
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tissuehint.data.folder_check.check_folder", stop)
    outcome = command("data", "check", ".")
    assert outcome.code == 130
    assert outcome.err.startswith("error: interrupted;")
    assert len(outcome.err.splitlines()) == 1


def test_a_defect_shows_its_traceback_and_exits_1(command, monkeypatch):
    def fail(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("tissuehint.data.folder_check.check_folder", fail)
    outcome = command("data", "check", ".")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert "report" in outcome.err.splitlines()[-1]


def test_debug_variable_shows_the_traceback_of_a_refusal(command, monkeypatch):
    monkeypatch.setenv("TISSUEHINT_DEBUG", "1")
    outcome = command("data", "list", "nothing_like_it")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: data set 'nothing_like_it'")


def test_module_entry_returns_the_exit_code():
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "tissuehint", "data", "list", "nothing"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: data set 'nothing'")
    assert len(done.stderr.splitlines()) == 1
    assert time.monotonic() - started < 20
