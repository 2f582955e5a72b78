from __future__ import annotations

import builtins
import json
import socket
from unittest import mock

import numpy as np
import pytest
import tifffile

from tests.slides.view.predicted import marked_map, running, shares_of, write_map, write_slide

SECRET = b"SECRET-OF-ANOTHER-PLACE"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Maps, slides, and beside them what nobody may see."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "secret").mkdir()
    (folder / "secret" / "secret.txt").write_bytes(SECRET)
    slide = write_slide(folder / "slides" / "case7.png")
    write_map(folder / "above", slide)
    (folder / "above").rename(folder / "place")
    folder = folder / "place"  # is a slide's folder too: its name seen from below is ".."
    write_map(folder / "maps" / "one", slide)
    (folder / "maps" / "loose.txt").write_bytes(SECRET)
    return folder


@pytest.fixture(scope="module")
def server(place):
    with running(place / "maps", place.parent / "slides") as server:
        yield server


def test_page_and_its_headers(server):
    for path in ("/", "/static/page.js", "/api/slides", "/slides/one/slide/8/0_0.jpg", "/nowhere"):
        answer = server.get(path)
        assert answer.status == (404 if path == "/nowhere" else 200)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LocalHost", "[::1]"])
def test_own_names_are_answered(server, host):
    assert server.get("/api/slides", host=f"{host}:{server.port}").status == 200


@pytest.mark.parametrize(
    "host",
    [
        "",
        "evil.example",
        "evil.example:{port}",
        "127.0.0.1",
        "127.0.0.1:1",
        "localhost.evil.example:{port}",
        "evil.example@127.0.0.1:{port}",
        "127.0.0.1.nip.io:{port}",
        "127.0.0.1:{port}, evil.example",
        "0.0.0.0:{port}",
    ],
)
def test_other_hosts_are_refused(server, host):
    for path in ("/", "/api/slides", "/slides/one/slide/8/0_0.jpg"):
        answer = server.get(path, host=host.format(port=server.port))
        assert answer.status in (400, 403)
        assert b"one" not in answer.body


def test_second_host_is_refused(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as line:
        request = f"GET /api/slides HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nHost: evil.example\r\n\r\n"
        line.sendall(request.encode())
        assert line.recv(100).split()[1] in (b"400", b"403")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reading(server, method):
    answer = server.get("/api/slides", method=method, Origin="http://evil.example")
    assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD")
    assert server.get("/nowhere", method=method).status == 405
    assert server.get("/api/slides", method="HEAD").status == 200


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_other_sites_cannot_use_the_pictures(server, site):
    assert server.get("/slides/one/thumbnail.jpg", Sec_Fetch_Site=site, Sec_Fetch_Mode="no-cors").status == 403
    assert server.get("/api/slides", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 403
    assert server.get("/", Sec_Fetch_Site=site, Sec_Fetch_Mode="navigate").status == 200  # a link to the page
    assert server.get("/slides/one/thumbnail.jpg", Sec_Fetch_Site="same-origin").status == 200


@pytest.mark.parametrize(
    "path",
    [
        "/slides/../thumbnail.jpg",
        "/slides/%2e%2e/thumbnail.jpg",
        "/slides/%2E%2E/classes/8/0_0.png",
        "/slides/.%2e/slide/8/0_0.jpg",
        "/slides/one/../../../../secret/secret.txt",
        "/slides/%2e%2e%2f%2e%2e%2fsecret/secret.txt",
        "/slides/one/%2e%2e%2f%2e%2e%2floose.txt",
        "/slides/one/..%2f..%2fsecret%2fsecret.txt",
        "/slides/one/..%5c..%5csecret%5csecret.txt",
        "/slides/one/%252e%252e%252fsecret.txt",
        "/slides/%2fetc/passwd",
        "/slides//etc/passwd",
        "//etc/passwd",
        "/slides/one//etc/passwd",
        "/slides/one/%2fetc%2fpasswd",
        "/slides/one/thumbnail.jpg%00.txt",
        "/slides/one%00/thumbnail.jpg",
        "/slides/./loose.txt",
        "/slides/%2e/loose.txt",
        "/slides/one/slide.json",
        "/static/../guard.py",
        "/static/%2e%2e%2fguard.py",
        "/static/guard.py",
        "/static/%2fetc%2fpasswd",
        "/api/slides/%2e%2e",
        "/api/slides/%2e%2e/at?x=1&y=1",
        "/api/slides/%2e%2e%2f%2e%2e%2fplace/at?x=1&y=1",
    ],
)
def test_names_never_become_paths(server, path):
    answer = server.get(path)
    assert answer.status in (400, 404)
    assert SECRET not in answer.body
    assert b"root:" not in answer.body


def test_url_in_the_request_line_does_not_replace_the_host(server):
    assert server.get(f"http://evil.example:{server.port}/api/slides", host="evil.example").status in (400, 403, 404)


def test_links_that_lead_out_are_not_followed(tmp_path):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    root, secret = tmp_path / "maps", tmp_path / "secret"
    shares = shares_of(marked_map())
    outside = write_map(secret / "outside", slide, probabilities=shares)
    write_map(root / "sound", slide, probabilities=shares)
    for name in ("picture", "map", "shares", "chunk", "metadata", "record", "areas"):
        write_map(root / name, slide, probabilities=shares)

    def swap(inner, outer):
        inner.rename(f"{inner}.away")
        inner.symlink_to(outer)

    swap(root / "picture" / "thumbnail.jpg", outside / "thumbnail.jpg")
    swap(root / "map" / "classes.ome.tif", outside / "classes.ome.tif")
    swap(root / "shares" / "probabilities.zarr", outside / "probabilities.zarr")
    swap(root / "metadata" / "probabilities.zarr" / "zarr.json", outside / "probabilities.zarr" / "zarr.json")
    swap(root / "chunk" / "probabilities.zarr" / "c" / "0" / "0" / "0", outside / "probabilities.zarr" / "c/0/0/0")
    swap(root / "record" / "slide.json", outside / "slide.json")
    swap(root / "areas" / "areas.csv", outside / "areas.csv")
    (root / "all").symlink_to(outside)
    (root / "inner").symlink_to(root / "sound")
    with running(root, tmp_path / "slides") as server:
        found = {one["key"]: one for one in server.get("/api/slides").json()["slides"]}
        assert set(found) == {"sound", "picture", "map", "shares", "chunk", "metadata", "record", "areas"}
        assert found["map"]["state"] == found["record"]["state"] == "failed"
        assert found["picture"]["pictures"] == ["overlay.jpg"]
        assert found["areas"]["tissue_mm2"] is None
        assert server.get("/slides/all/thumbnail.jpg").status == 404
        assert server.get("/slides/picture/thumbnail.jpg").status == 404
        at = "at?x=200&y=200"
        assert server.get(f"/api/slides/sound/{at}").json()["probabilities"] is not None
        for name in ("shares", "metadata", "chunk"):
            assert server.get(f"/api/slides/{name}/{at}").json()["probabilities"] is None


def test_description_of_the_map_opens_no_other_file(tmp_path):
    """An OME-TIFF may say that its pixels lie in another file."""
    slide = write_slide(tmp_path / "slides" / "case7.png")
    folder = write_map(tmp_path / "maps" / "one", slide)
    classes = marked_map()
    ome = (
        '<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">'
        '<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" '
        f'SizeX="{classes.shape[1]}" SizeY="{len(classes)}" SizeC="1" SizeZ="1" SizeT="1"><Channel ID="Channel:0:0"/>'
        '<TiffData IFD="0" PlaneCount="1">'
        '<UUID FileName="../../secret.tif">urn:uuid:2</UUID></TiffData></Pixels></Image></OME>'
    )
    tifffile.imwrite(tmp_path / "secret.tif", (classes != 1).astype(np.uint8), photometric="minisblack")
    tifffile.imwrite(folder / "classes.ome.tif", classes, description=ome, metadata=None, tile=(64, 64))
    opened = []
    real = builtins.open

    def watched(file, *rest, **more):
        opened.append(str(file))
        return real(file, *rest, **more)

    with running(tmp_path / "maps", tmp_path / "slides") as server, mock.patch("builtins.open", watched):
        assert server.get("/api/slides/one/at?x=600&y=300").json()["name"] == "tumour"
    assert any(name.endswith("classes.ome.tif") for name in opened)
    assert not any("secret" in name for name in opened)


@pytest.mark.parametrize("kind", ["elsewhere", "parent", "link", "text"])
def test_slide_files_outside_are_not_read(tmp_path, kind):
    slide = write_slide(tmp_path / "slides" / "case7.png")
    folder = write_map(tmp_path / "maps" / "one", slide)
    record = json.loads((folder / "slide.json").read_text())
    outside = write_slide(tmp_path / "secret" / "other.png")
    named = {
        "elsewhere": outside,
        "parent": tmp_path / "slides" / ".." / "secret" / "other.png",
        "link": tmp_path / "slides" / "other.png",
        "text": "/etc/passwd",
    }[kind]
    (tmp_path / "slides" / "other.png").symlink_to(outside)
    record["slide"]["path"] = str(named)
    record["slide"]["bytes"] = outside.stat().st_size
    (folder / "slide.json").write_text(json.dumps(record))
    with running(tmp_path / "maps", tmp_path / "slides") as server:
        answer = server.get("/api/slides/one").json()
        assert answer["pixels"] == "thumbnail"
        assert "no file" in answer["notes"][0]
