from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import webbrowser
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest
import tifffile
import zarr

from tests.slides.view.predicted import write_map, write_slide
from tissuehint.data.phantom_slide import write_phantom_slide


@pytest.fixture
def maps(tmp_path):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    write_map(tmp_path / "maps" / "one", slide)
    write_map(tmp_path / "maps" / "two", slide)
    return tmp_path / "maps"


@contextmanager
def viewing(*words):
    """The command in a process of its own, and the address that it printed."""
    command = [sys.executable, "-m", "tissuehint", "view", *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        yield process, process.stdout.readline().strip()
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def ask(address, path):
    parts = urlsplit(address)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def test_serves_until_interrupted(maps):
    with viewing(maps, "--no-browser") as (process, address):
        assert urlsplit(address).hostname == "127.0.0.1"
        assert b"<title>tissuehint view</title>" in ask(address, "/")[1]
        assert [one["key"] for one in json.loads(ask(address, "/api/slides")[1])["slides"]] == ["one", "two"]
        # a browser keeps its connections open: they must not hold the end up
        with socket.create_connection((urlsplit(address).hostname, urlsplit(address).port)):
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)
        assert process.returncode == 0
        assert out == ""
        lines = err.splitlines()
        assert lines[0] == f"{maps.resolve()}: 2 slides"
        assert lines[1].startswith("one and 1 more: shown as thumbnail")
        assert lines[1].endswith(f"--slides {maps.parent / 'slides'}")
        assert lines[2:] == ["Ctrl-C ends the viewer.", "The viewer has ended."]


def test_shows_what_predict_wrote(command, tiny_run, tmp_path):
    """One command after the other: classes, probabilities and areas are those of the files."""
    scan, out = tmp_path / "scans" / "a.svs", tmp_path / "maps"
    scan.parent.mkdir()
    write_phantom_slide(scan, 400, 520, seed=0, um_per_px=0.5, blank=0.2)
    assert command("predict", tiny_run, scan, "--soft", "--out", out, "--quiet").code == 0
    record = json.loads((out / "a" / "slide.json").read_text())
    classes, placement = tifffile.imread(out / "a" / "classes.ome.tif"), record["map"]
    shares = zarr.open_array(str(out / "a" / "probabilities.zarr"), mode="r")
    with viewing(out, "--slides", scan.parent, "--no-browser", "--quiet") as (_, address):
        (listed,) = json.loads(ask(address, "/api/slides")[1])["slides"]
        assert (listed["key"], listed["state"]) == ("a", "done")
        assert json.loads(ask(address, "/api/slides/a")[1])["pixels"] == "slide"
        areas = {row["class"]: pytest.approx(row["mm2"], rel=1e-3) for row in record["areas"]}
        assert {row["name"]: row["mm2"] for row in listed["classes"]} == areas
        for row, column in ((10, 10), (200, 300), (150, 77)):
            y = placement["top"] + (row + 0.5) * placement["scale"]
            x = placement["left"] + (column + 0.5) * placement["scale"]
            found = json.loads(ask(address, f"/api/slides/a/at?x={x}&y={y}")[1])
            assert found["class"] == (None if classes[row, column] == 255 else classes[row, column])
            if found["class"] is not None:
                assert found["probabilities"] == pytest.approx(
                    [share / 255 for share in shares[:, row, column]], abs=0.01
                )
        for picture in ("/slides/a/slide/9/0_0.jpg", "/slides/a/classes/9/0_0.png", "/slides/a/overlay.jpg"):
            assert ask(address, picture)[0] == 200, picture


def test_quiet_with_slides_and_port(maps):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (maps, "--slides", maps.parent / "slides", "--port", port, "--no-browser", "--quiet")
    with viewing(*words) as (process, address):
        assert address == f"http://127.0.0.1:{port}/"
        assert json.loads(ask(address, "/api/slides/one")[1])["pixels"] == "slide"
        status, picture = ask(address, "/slides/one/slide/8/0_0.jpg")
        assert status == 200
        assert picture[:2] == b"\xff\xd8"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")


def test_listens_to_this_computer_only(maps):
    with viewing(maps, "--no-browser", "--quiet") as (_, address), socket.socket() as line:
        line.settimeout(5)
        assert line.connect_ex(("127.0.0.2", urlsplit(address).port)) != 0


def test_browser_is_opened_unless_refused(maps, command, monkeypatch):
    from tissuehint.slides.view import server

    opened, served = [], []
    monkeypatch.setattr(webbrowser, "open", opened.append)

    def serve(viewer, listener):
        served.append(server.address(listener))
        for _ in range(100):
            if opened:
                break
            time.sleep(0.02)
        listener.close()

    monkeypatch.setattr(server, "serve", serve)
    outcome = command("view", maps)
    assert outcome.code == 0
    assert opened == served == [outcome.out.strip()]
    assert command("view", maps, "--no-browser").code == 0
    assert len(opened) == 1


def test_failed_and_running_slides_are_counted(maps, command, monkeypatch):
    from tissuehint.slides.view import server

    monkeypatch.setattr(server, "serve", lambda viewer, listener: listener.close())
    (maps / "one" / "slide.json").write_text("{")
    record = json.loads((maps / "two" / "slide.json").read_text())
    (maps / "two" / "slide.json").write_text(json.dumps({**record, "state": "running"}))
    outcome = command("view", maps, "--no-browser")
    assert outcome.code == 0
    assert f"{maps.resolve()}: 2 slides, 1 failed, 1 running" in outcome.err


def test_wrong_folders_are_refused(maps, command, tmp_path):
    command("view", tmp_path / "nowhere", "--no-browser").refused("nowhere", "does not exist")
    command("view", maps / "one" / "slide.json", "--no-browser").refused("slide.json", "is not a folder")
    command("view", tmp_path / "slides", "--no-browser").refused("slides", "holds no slide", "tissuehint predict")
    command("view", maps, "--slides", tmp_path / "gone", "--no-browser").refused("--slides", "gone", "does not exist")


def test_port_in_use_is_refused(maps, command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command("view", maps, "--port", port, "--no-browser").refused(f"--port {port}", "in use", "another port")
    command("view", maps, "--port", 70000, "--no-browser").refused("--port", "65535")
