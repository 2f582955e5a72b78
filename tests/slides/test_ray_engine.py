"""Cohorts on a real local Ray cluster of several processes, one of which is killed in the middle."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tissuehint.data.phantom_slide import write_phantom_slide
from tissuehint.errors import InputError
from tissuehint.labels import LabelSpace
from tissuehint.model import TissueModel
from tissuehint.nn.networks import NetworkConfig, build_network
from tissuehint.slides.cohort import LocalEngine, find_slides, predict_cohort
from tissuehint.slides.mapping import MappingConfig
from tissuehint.slides.predict import SlideConfig
from tissuehint.slides.state import model_facts

# as the engine does: workers are not started with the command line of the tests
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
ray = pytest.importorskip("ray", reason="needs the extra ray")

SLOW = 0.05  # s a batch, so that there is a middle
CONFIG = SlideConfig(mapping=MappingConfig(window=64, overlap=8))


class SlowModel(TissueModel):
    """Says who computes, and takes its time."""

    @classmethod
    def load(cls, folder, *, device="cpu"):
        model = TissueModel.load(folder, device=device)
        mapper, started = model.mapper, Path(folder).parent / "working"

        def slow(images):
            started.mkdir(exist_ok=True)
            (started / str(os.getpid())).touch()
            time.sleep(SLOW)
            return mapper(images)

        model.mapper = slow
        return model


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=3, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort")
    for seed in range(3):
        write_phantom_slide(folder / "scans" / f"s{seed}.svs", 500, 600, seed=seed, blank=0.1)
    (folder / "scans" / "bad.svs").write_text("no slide")
    labels = LabelSpace(("gland", "stroma"))
    config = NetworkConfig(architecture="unet", scale=0.5, encoder={"name": "mobilenetv3_small_050"})
    network = build_network(config, 2).eval()
    TissueModel.from_network(network, labels, config, um_per_px=0.5).save(folder / "model")
    return folder


def predict(engine, cohort, out):
    jobs = find_slides([str(cohort / "scans")], out)
    return {outcome.job.path.stem: outcome for outcome in predict_cohort(engine, jobs, out)}


def results(out):
    names = ("classes.ome.tif", "tissue.geojson.gz", "areas.csv", "overlay.jpg")
    return {(slide, name): (out / slide / name).read_bytes() for slide in ("s0", "s1", "s2") for name in names}


def test_a_worker_that_is_killed_changes_nothing(cluster, cohort, tmp_path, monkeypatch):
    from tissuehint.slides import ray_engine

    facts = model_facts(cohort / "model", 0.5)
    local = LocalEngine(TissueModel.load(cohort / "model"), facts, CONFIG, batch_size=2)
    expected = predict(local, cohort, tmp_path / "local")
    assert {name for name, outcome in expected.items() if outcome.error} == {"bad"}

    class SlowActor(ray_engine.SlideActor):
        def __init__(self, model, *others):
            import tissuehint.model

            tissuehint.model.TissueModel = SlowModel
            super().__init__(model, *others)

    monkeypatch.setattr(ray_engine, "SlideActor", SlowActor)
    killed = []

    def kill():
        limit = time.monotonic() + 240
        while time.monotonic() < limit and not killed:
            journals = list((tmp_path / "ray").glob("*/.work/blocks.txt"))
            workers = list((cohort / "working").glob("*")) if (cohort / "working").is_dir() else []
            if journals and workers:
                killed.append(int(workers[0].name))
                os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.01)

    killer = threading.Thread(target=kill)
    killer.start()
    engine = ray_engine.RayEngine(cohort / "model", facts, CONFIG, actors=2, batch_size=2)
    found = predict(engine, cohort, tmp_path / "ray")
    killer.join()
    assert killed
    assert killed[0] != os.getpid()
    assert {name for name, outcome in found.items() if outcome.error} == {"bad"}
    assert "bad.svs" in found["bad"].error
    assert results(tmp_path / "ray") == results(tmp_path / "local")
    attempts = [
        json.loads((tmp_path / "ray" / name / "slide.json").read_text())["attempts"] for name in ("s0", "s1", "s2")
    ]
    assert sorted(attempts)[-1] > 1
    assert len(list((cohort / "working").iterdir())) > 1  # several processes


class Picky:
    """Fails to start, the first time only or always."""

    def __init__(self, folder, always):
        self.folder, self.always = folder, always

    def __call__(self, actor):
        folder, always = self.folder, self.always

        class PickyActor(actor):
            def __init__(self, *words):
                try:
                    (folder / "one").mkdir()
                except FileExistsError:
                    if always:
                        raise RuntimeError("no model here") from None
                else:
                    raise RuntimeError("no model here")
                super().__init__(*words)

        return PickyActor


@pytest.mark.parametrize("always", [False, True])
def test_workers_that_cannot_start(cluster, cohort, tmp_path, monkeypatch, always):
    """One of two: the other does it all. Both: the reason is told of each slide."""
    from tissuehint.slides import ray_engine

    monkeypatch.setattr(ray_engine, "SlideActor", Picky(tmp_path, always)(ray_engine.SlideActor))
    engine = ray_engine.RayEngine(cohort / "model", model_facts(cohort / "model", 0.5), CONFIG, actors=2, batch_size=2)
    found = predict(engine, cohort, tmp_path / "ray")
    assert set(found) == {"bad", "s0", "s1", "s2"}
    failed = {name: outcome.error for name, outcome in found.items() if outcome.error}
    if always:
        assert len(failed) == 4
        assert all("no worker can start" in line and "no model here" in line for line in failed.values()), failed
    else:
        assert set(failed) == {"bad"}
        assert "bad.svs" in failed["bad"]
        assert "no worker" not in failed["bad"]


def test_no_cluster(cohort, monkeypatch):
    from tissuehint.slides.ray_engine import RayEngine

    if ray.is_initialized():
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **names: (_ for _ in ()).throw(ConnectionError("nobody answers")))
    with pytest.raises(InputError, match=r"--address nowhere:1.*ray start"):
        RayEngine(cohort / "model", {}, CONFIG, address="nowhere:1")
