"""VSLP as a method: areas, energies, phases, calibration, baselines as settings, hints of windows."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from tissuehint.data.module import DataConfig, TissueData, WeakConfig
from tissuehint.data.patches import PatchGrid
from tissuehint.data.samples import Batch
from tissuehint.errors import InputError
from tissuehint.methods.vslp import VSLP, FusionConfig, VSLPConfig
from tissuehint.methods.vslp import learning as vslp_learning
from tissuehint.methods.vslp.confidence import best_temperature
from tissuehint.methods.vslp.energy import average
from tissuehint.methods.vslp.learning import consensus, damaged, part_of, partitions
from tissuehint.methods.vslp.views import Seen
from tissuehint.pipeline.inference import StageOneMaps
from tissuehint.testing import MethodCase, fake_batch, fake_dataset, fake_labels
from tissuehint.testing.contract import Killed, assert_same_state, killed_at_step
from tissuehint.testing.fakes import NO_AUGMENTATION, fake_data

ENCODER = {"name": "test_resnet"}
SMALL = {"regulariser": {"features": 4}, "steps": 3}
FAST = {"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 5, "power": 0}


def vslp(*, white=False, seed=0, tissue=3, **settings):
    torch.manual_seed(seed)
    given = {"confidence": {"encoder": ENCODER}, "test_time": {"rotations": [0, 90]}, "fusion": SMALL}
    return VSLP(VSLPConfig(**{**given, **settings}), fake_labels(white=white, tissue=tissue)).eval()


def with_views(method, maps, monkeypatch):
    """Let the method see the given smooth maps (B,N,C,h,w), whatever the images."""
    seen = Seen(maps, torch.ones_like(maps[:, :, 0]))
    monkeypatch.setattr(VSLP, "see", lambda self, images, views=None: seen)
    return method


def smooth_views(images=3, views=4, classes=3, side=56, seed=0):
    generator = torch.Generator().manual_seed(seed)
    whole = F.interpolate(torch.randn(images, classes, 6, 6, generator=generator), (side, side), mode="bicubic")
    noise = torch.randn(images * views, classes, 14, 14, generator=generator)
    noise = F.interpolate(noise, (side, side), mode="bilinear").view(images, views, classes, side, side)
    return (2 * whole[:, None] + noise).softmax(2)


class TestAreas:
    """Proportions that are known are kept by the argmax."""

    @pytest.mark.parametrize(
        "fusion",
        [
            SMALL,
            {"regulariser": {"name": "total_variation"}, "steps": 5},
            {"regulariser": {"name": "none"}, "fidelity": "log", "steps": 5},
            {"regulariser": {"name": "total_variation"}, "fidelity": "linear", "solver": "primal_dual"},
            None,
        ],
        ids=["learned", "total_variation", "log", "primal_dual", "confidence_alone"],
    )
    @pytest.mark.parametrize("sure", [0.01, 0.1, 1, 6, 20])
    def test_near_hard_areas_are_within_a_percent(self, fusion, sure, monkeypatch):
        # of a likeliest class of .34, .38, .72, .95 and .98 on average
        views = (sure * smooth_views().log()).softmax(2)
        method = with_views(vslp(fusion=fusion), views, monkeypatch)
        proportions = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.5, 0.5, 0.0]])
        batch = Batch(["a", "b", "c"], torch.rand(3, 3, 224, 224), proportions=proportions)
        maps = method.label_guided(batch)
        areas = F.one_hot(maps.argmax(1), 3).float().mean((1, 2))
        assert float((areas - proportions).abs().max()) < 0.01

    @pytest.mark.parametrize("exact", [False, True])
    def test_without_proportions_the_areas_are_those_of_the_confidence_map(self, exact, monkeypatch):
        views, images = smooth_views(), torch.rand(3, 3, 224, 224)
        fusion = {**SMALL, "steps": 10}
        if exact:
            regulariser = {"name": "total_variation", "smoothness": 0.5}
            fusion = {"regulariser": regulariser, "fidelity": "linear", "solver": "primal_dual"}
        wanted = F.one_hot(with_views(vslp(fusion=None), views, monkeypatch).fuse(images).u.argmax(1), 3).float()
        held, free = (
            F.one_hot(
                with_views(vslp(fusion={**fusion, "areas": kind}), views, monkeypatch).fuse(images).u.argmax(1), 3
            )
            for kind in ("confidence", "free")
        )
        assert float((held.float().mean((1, 2)) - wanted.mean((1, 2))).abs().max()) < 0.01
        if exact:  # strong smoothing lets small classes go, unless their areas are held
            assert float((free.float().mean((1, 2)) - wanted.mean((1, 2))).abs().max()) > 0.02
            assert not torch.equal(held.argmax(3), wanted.argmax(3))

    def test_what_explains_a_map_without_proportions_does_not_know_them(self, monkeypatch):
        method = with_views(vslp(), smooth_views(), monkeypatch)
        images = torch.rand(3, 3, 224, 224)
        skewed = Batch(["a", "b", "c"], images, proportions=torch.tensor([[0.9, 0.05, 0.05]] * 3))
        found = method.explain(skewed)
        torch.testing.assert_close(found["soft_map"], method.fuse(images).u)
        assert not torch.allclose(found["guided_map"], found["soft_map"], atol=0.1)

    def test_an_image_without_proportions_is_explained_with_those_of_its_free_map(self, monkeypatch):
        method = with_views(vslp(), smooth_views(), monkeypatch)
        batch = Batch(["a", "b", "c"], torch.rand(3, 3, 224, 224), proportions=torch.zeros(3, 3))
        found = method.explain(batch)
        free, guided = (F.one_hot(found[name].argmax(1), 3).float().mean((1, 2)) for name in ("soft_map", "guided_map"))
        assert float((free - guided).abs().max()) < 0.005

    def test_proportions_none_does_not_look_at_them(self, monkeypatch):
        method = with_views(vslp(fusion={**SMALL, "proportions": "none"}), smooth_views(), monkeypatch)
        images = torch.rand(3, 3, 224, 224)
        batch = Batch(["a", "b", "c"], images, proportions=torch.tensor([[0.9, 0.05, 0.05]] * 3))
        assert torch.equal(method.label_guided(batch), method.predict(images))

    def test_soft_proportions_draw_the_areas_near(self, monkeypatch):
        views = smooth_views()
        given = torch.tensor([[0.6, 0.3, 0.1]] * 3)
        distances = []
        for weight in (0.0, 20.0):
            fusion = {"regulariser": {"name": "none"}, "proportions": "soft", "proportion_weight": weight, "steps": 30}
            method = with_views(vslp(fusion=fusion), views, monkeypatch)
            u = method.fuse(torch.rand(3, 3, 224, 224), given).u
            distances.append(float((u.mean((2, 3)) - given).abs().sum()))
        assert distances[1] < 0.2 * distances[0]

    def test_proportions_count_tissue_alone(self, monkeypatch):
        method = with_views(vslp(white=True), smooth_views(1), monkeypatch)
        images = torch.full((1, 3, 224, 224), 0.4)
        images[..., 150:] = 0.98
        maps = method.label_guided(Batch(["a"], images, proportions=torch.tensor([[0.5, 0.3, 0.2]])))
        assert bool((maps.argmax(1)[..., 152:] == 3).all())
        tissue = maps[:, :3].argmax(1)[..., :148]
        areas = F.one_hot(tissue, 3).float().mean((1, 2))
        assert float((areas - torch.tensor([[0.5, 0.3, 0.2]])).abs().max()) < 0.02  # cells across the border are cut


class TestFlow:
    @pytest.mark.parametrize("fidelity", ["wasserstein", "linear", "log"])
    @pytest.mark.parametrize("guided", [False, True])
    def test_energies_never_rise(self, fidelity, guided, monkeypatch):
        fusion = {**SMALL, "fidelity": fidelity, "steps": 6, "step_size": 8.0}
        method = with_views(vslp(fusion=fusion), smooth_views(), monkeypatch)
        flow = method.fuse(torch.rand(3, 3, 224, 224), torch.tensor([[0.6, 0.3, 0.1]] * 3) if guided else None)
        assert flow.energies.shape == (7, 3)
        assert bool((flow.energies.diff(dim=0) <= 0).all())
        assert bool((flow.energies[-1] < flow.energies[0]).all())

    def test_a_ground_cost_moves_mass_between_near_classes(self, monkeypatch):
        """With the middle class near to both others the median of two that are far apart lies there."""
        views = torch.zeros(1, 2, 3, 8, 8)
        views[:, 0, 0], views[:, 1, 2] = 1.0, 1.0
        views = (views + 0.02) / 1.06
        shares = []
        for cost in (None, [[0, 0.3, 1], [0.3, 0, 0.3], [1, 0.3, 0]]):
            fusion = {"ground_cost": cost, "regulariser": {"name": "none"}, "steps": 40, "fidelity": "linear"}
            fusion["areas"] = "free"
            method = with_views(vslp(fusion=fusion), views, monkeypatch)
            shares.append(float(method.fuse(torch.rand(1, 3, 32, 32)).u[:, 1].mean()))
        assert shares[0] < 0.1
        assert shares[1] > 0.5

    def test_the_exact_solver_is_below_the_flow(self, monkeypatch):
        views, images = smooth_views(), torch.rand(3, 3, 224, 224)
        base = {"fidelity": "linear", "regulariser": {"name": "total_variation", "smoothness": 0.3}, "steps": 60}
        flow = with_views(vslp(fusion=base), views, monkeypatch)
        energy = flow.energy(images, flow.see(images))
        by_flow = energy.energy(flow.fuse(images).u).sum((1, 2))
        exact = vslp(fusion={**base, "solver": "primal_dual"})
        exactly = energy.energy(exact.fuse(images).u).sum((1, 2))
        # the smoothed total variation of the flow differs from the exact one by at most the smoothing
        assert bool((exactly < by_flow + 0.05 * by_flow.abs()).all())

    def test_a_map_of_the_exact_solver_says_how_sure_it_is(self, monkeypatch):
        fusion = {"fidelity": "linear", "solver": "primal_dual"}
        fusion["regulariser"] = {"name": "total_variation", "smoothness": 0.3}
        views, images = smooth_views(), torch.rand(3, 3, 56, 56)
        method = with_views(vslp(fusion=fusion, resolution=1), views, monkeypatch)
        u, maps = method.fuse(images).u, method.predict(images)
        assert float((u.amax(1) > 0.99).float().mean()) > 0.9
        assert float((maps.argmax(1) == u.argmax(1)).float().mean()) > 0.99
        sure, confidence = (each.amax(1).flatten().numpy() for each in (maps, views.mean(1)))
        assert np.corrcoef(sure, confidence)[0, 1] > 0.8
        assert float(sure.min()) < 0.75

    def test_the_flow_keeps_known_areas_in_every_map(self, monkeypatch):
        """Sharpened as the projection sees them, before the end moves the classes once more."""
        method = with_views(vslp(fusion={**SMALL, "steps": 6, "step_size": 3.0}), smooth_views(), monkeypatch)
        wanted = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.05, 0.9], [0.5, 0.4, 0.1]])
        ends = []
        monkeypatch.setattr(VSLP, "_with_areas", lambda self, found, *words: ends.append(found.u) or found)
        method.fuse(torch.rand(3, 3, 224, 224), wanted)
        sharp = (ends[0].clamp_min(1e-9).log() / 0.1).softmax(1)
        torch.testing.assert_close(sharp.mean((2, 3)), wanted, atol=2e-3, rtol=0)

    @pytest.mark.parametrize("weight", [1.0, 1e3, 1e6])
    def test_terms_of_any_weight_take_steps(self, weight, monkeypatch):
        settings = {"name": "total_variation", "smoothness": 0.3 * weight}
        fusion = {"regulariser": settings, "fidelity_weight": weight, "steps": 5, "areas": "free"}
        flow = with_views(vslp(fusion=fusion), smooth_views(), monkeypatch).fuse(torch.rand(3, 3, 224, 224))
        assert bool((flow.energies[-1] < 0.97 * flow.energies[0]).all())

    @pytest.mark.parametrize("unit", [1e-3, 1e3])
    @pytest.mark.parametrize("where", ["ground_cost", "fidelity_weight"])
    def test_the_unit_of_the_costs_does_not_matter_to_the_exact_solver(self, where, unit, monkeypatch):
        images = torch.rand(3, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        maps = []
        for factor in (1.0, unit):
            fusion = {"fidelity": "linear", "solver": "primal_dual", "areas": "free"}
            cost = factor if where == "ground_cost" else 1.0
            fusion["ground_cost"] = (cost * (1 - torch.eye(3))).tolist()
            fusion["fidelity_weight"] = 1.0 if where == "ground_cost" else factor
            fusion["regulariser"] = {"name": "total_variation", "smoothness": 0.3 * factor}
            method = with_views(vslp(fusion=fusion), smooth_views(), monkeypatch)
            found = [method.fuse(images, given) for given in (None, torch.tensor([[0.6, 0.3, 0.1]] * 3))]
            maps.append([(flow.u, flow.energies / factor) for flow in found])
        for (u, energies), (other, others) in zip(*maps, strict=True):
            assert float((u.argmax(1) == other.argmax(1)).float().mean()) > 0.998
            torch.testing.assert_close(energies, others, rtol=1e-3, atol=0)

    @pytest.mark.parametrize("exact", [False, True])
    def test_inference_mode(self, exact):
        fusion = {"fidelity": "linear", "solver": "primal_dual", "regulariser": {"name": "none"}} if exact else SMALL
        method = vslp(fusion=fusion, resolution=1)
        batch = fake_batch(fake_labels(white=False), count=2)
        expected = method.predict(batch.images), method.label_guided(batch), method.explain(batch)["guided_map"]
        with torch.inference_mode():
            held = Batch(batch.ids, batch.images.clone(), proportions=batch.need_proportions().clone())
            found = method.predict(held.images), method.label_guided(held), method.explain(held)["guided_map"]
            again = method.fuse(held.images, seen=method.see(held.images))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
        assert again.u.shape == expected[2].shape


class TestExplain:
    def test_names_and_energies(self):
        method = vslp()
        batch = fake_batch(fake_labels(white=False), count=2)
        maps = method.explain(batch)
        assert set(maps) == {
            *("confidence", "disagreement", "entropy", "soft_map", "guided_map"),
            *("fidelity_energy", "regularisation_energy", "proportion_energy"),
        }
        seen = method.see(batch.images)
        energy = method.energy(batch.images, seen)
        torch.testing.assert_close(maps["confidence"], average(seen, "log"))
        terms = energy.terms(maps["guided_map"])
        torch.testing.assert_close(maps["fidelity_energy"][:, 0], terms["fidelity"])
        flat = energy.terms(torch.full_like(maps["guided_map"], 1 / 3))["regularisation"]
        torch.testing.assert_close(maps["regularisation_energy"][:, 0], terms["regularisation"] - flat)

    def test_the_proportion_energy_shows_what_there_is_too_much_of(self, monkeypatch):
        method = with_views(vslp(), smooth_views(1), monkeypatch)
        images = torch.rand(1, 3, 224, 224)
        free = method.fuse(images).u
        maps = method.explain(Batch(["a"], images, proportions=torch.tensor([[0.9, 0.05, 0.05]])))
        classes = free.argmax(1)[0]
        pays = maps["proportion_energy"][0, 0]
        assert float(pays[classes == 0].mean()) < float(pays[classes == 1].mean())
        assert float(pays[classes == 0].mean()) < float(pays[classes == 2].mean())

    def test_without_proportions_there_is_no_guided_map(self):
        batch = fake_batch(fake_labels(white=False), count=2)
        maps = vslp().explain(Batch(batch.ids, batch.images))
        assert "guided_map" not in maps
        assert "proportion_energy" not in maps

    def test_confidence_alone_has_no_energy(self):
        maps = vslp(fusion=None).explain(fake_batch(fake_labels(white=False), count=2))
        assert not [name for name in maps if name.endswith("energy")]

    def test_pictures_of_the_energies(self, tmp_path):
        data = fake_data(fake_dataset(fake_labels(white=False), count=(4, 2, 0)))
        vslp().illustrate(data, tmp_path)
        told = json.loads((tmp_path / "pictures.json").read_text())
        assert told["title"] == "Energies"
        picture = Image.open(tmp_path / told["pictures"][0]["file"])
        assert picture.size == (7 * 172 - 4, 2 * 172 - 4)
        numbers = json.loads((tmp_path / "energies.json").read_text())
        assert numbers["split"] == "val"
        assert all(len(energies) == 4 for energies in numbers["energies"].values())


CASE = MethodCase(
    "vslp",
    {
        "confidence": {"encoder": ENCODER},
        "test_time": {"rotations": [0, 90], "mirror": False},
        "fusion": SMALL,
        "learning": {"steps": 4, "round_steps": 2, "warm_up": 2, "views": 2},
        "optimization": FAST,
    },
    steps=4,
)


class TestPhases:
    @pytest.mark.parametrize("step", [3, 6, 8], ids=["in_stage_1", "in_warm_up", "in_the_last_round"])
    def test_a_kill_in_any_phase_makes_no_difference(self, step, tmp_path):
        whole = CASE.train(tmp_path / "whole", fake_labels())
        with pytest.raises(Killed), killed_at_step(step):
            CASE.train(tmp_path / "killed", fake_labels())
        assert_same_state(CASE.train(tmp_path / "killed", fake_labels()), whole)

    def test_a_finished_phase_is_not_done_again(self, tmp_path):
        CASE.train(tmp_path, fake_labels())
        with killed_at_step(1):  # no step is taken
            CASE.train(tmp_path, fake_labels())
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["confidence", "regulariser"]
        assert not list(tmp_path.rglob("*.ckpt"))

    def test_the_second_phase_leaves_the_network_and_trains_all_of_the_fusion(self, tmp_path):
        trained = CASE.train(tmp_path, fake_labels())
        settings = {**CASE.settings, "learning": {"steps": 0}}
        first = MethodCase("vslp", settings, steps=4).train(tmp_path / "first", fake_labels())
        before, after = first.state_dict(), trained.state_dict()
        same = {name for name, value in after.items() if torch.equal(value, before[name])}
        assert {name for name in after if name.startswith("network")} <= same
        assert not {name for name in same if name.startswith("fusion")}

    def test_total_variation_learns_nothing(self, tmp_path):
        settings = {**CASE.settings, "fusion": {"regulariser": {"name": "total_variation"}}}
        method = MethodCase("vslp", settings, steps=2).train(tmp_path, fake_labels())
        assert method.fusion is None
        assert not (tmp_path / "regulariser").exists()


class TestCalibration:
    def test_the_temperature_undoes_a_scale(self):
        """Logits of known cells, made too sharp by 2.5: proportions drawn from the cells give it back."""
        generator = torch.Generator().manual_seed(0)
        logits = [
            torch.randn(3, 400, generator=generator) + 2 * torch.randn(3, 1, generator=generator) for _ in range(40)
        ]
        weights = [torch.full((400,), 1 / 400)] * 40
        proportions = [each.softmax(0).mean(1) for each in logits]
        found = best_temperature([2.5 * each for each in logits], weights, proportions)
        assert found == pytest.approx(2.5, rel=0.02)

    def test_it_is_chosen_in_training_and_saved(self, tmp_path):
        method = CASE.train(tmp_path, fake_labels())
        assert float(method.temperature) != 1
        assert "temperature" in method.state_dict()
        settings = {**CASE.settings, "calibration": False}
        plain = MethodCase("vslp", settings, steps=4).train(tmp_path / "plain", fake_labels())
        assert float(plain.temperature) == 1


class TestLearningParts:
    def test_the_consensus_has_the_given_areas(self):
        noise = torch.randn(3, 1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
        views = (smooth_views().log() + noise).softmax(2)
        seen = Seen(views, torch.ones_like(views[:, :, 0]))
        proportions = torch.tensor([[0.6, 0.3, 0.1], [0.1, 0.1, 0.8], [0.5, 0.5, 0.0]])
        images, tissue = torch.full((3, 3, 56, 56), 0.5), torch.ones(3, 56, 56)
        borders = []
        for smoothness in (0.0, 1.0):
            labels = consensus(seen, images, proportions, tissue, smoothness)
            areas = F.one_hot(labels, 3).float().mean((1, 2))
            assert float((areas - proportions).abs().max()) < 0.02
            borders.append(int((labels[:, 1:] != labels[:, :-1]).sum()))
        assert borders[1] < 0.8 * borders[0]

    def test_doubtful_pixels_and_white_teach_nothing(self):
        mean = torch.full((1, 2, 4, 4), 0.5)
        mean[:, 0, :2], mean[:, 1, :2] = 0.9, 0.1
        mean[:, 0, 2:], mean[:, 1, 2:] = 0.1, 0.9
        tissue = torch.ones(1, 4, 4)
        tissue[..., 3] = 0
        seen = Seen(mean[:, None], torch.ones(1, 1, 4, 4))
        images, halves = torch.full((1, 3, 4, 4), 0.5), torch.tensor([[0.5, 0.5]])
        labels = consensus(seen, images, halves, tissue, smoothness=0.1, confidence=0.8)
        assert labels[0, :2, :3].eq(0).all()
        assert labels[0, 2:, :3].eq(1).all()
        assert labels[..., 3].eq(255).all()
        seen = Seen(torch.full((1, 1, 2, 4, 4), 0.5), torch.ones(1, 1, 4, 4))
        doubtful = consensus(seen, images, halves, tissue, smoothness=0.1, confidence=0.8)
        assert doubtful.eq(255).all()

    def test_a_part_of_the_views_still_sees_every_pixel(self):
        seen = Seen(torch.rand(1, 3, 2, 4, 4), torch.ones(1, 3, 4, 4))
        seen.validity[:, 0, 0, 0] = 0
        part = part_of(seen, 1)
        assert part.probabilities.shape == (1, 1, 2, 4, 4)
        assert bool((part.validity.sum(1) > 0).all())

    def test_made_up_maps_are_damaged_and_recognisable(self):
        torch.manual_seed(0)
        labels = partitions(6, 3, (28, 36), torch.device("cpu"))
        assert labels.shape == (6, 28, 36)
        assert set(labels.unique().tolist()) == {0, 1, 2}
        seen = damaged(labels, 3)
        torch.testing.assert_close(seen.probabilities.sum(2), torch.ones(6, 3, 28, 36))
        right = (seen.probabilities.mean(1).argmax(1) == labels).float().mean()
        assert 0.5 < float(right) < 0.99

    def test_damage_moves_nothing_on_average(self):
        torch.manual_seed(0)
        labels = torch.zeros(64, 57, 60, dtype=torch.long)
        labels[:, 20:36, 20:36] = 1
        shares = torch.stack([damaged(labels, 2).probabilities[:, :, 1].mean((0, 1)) for _ in range(10)]).mean(0)
        heavy = (shares - shares[:, :10].mean()).clamp_min(0)[10:46, 10:46]  # less what is wrong everywhere
        places = torch.arange(10, 46) + 0.5
        middle = (heavy.sum(1) @ places / heavy.sum(), heavy.sum(0) @ places / heavy.sum())
        assert [float(place) for place in middle] == pytest.approx([28, 28], abs=0.15)

    def test_a_dead_zone_forgives_rounding(self, monkeypatch):
        monkeypatch.setattr(vslp_learning.RegulariserLearning, "_entropy_weight", lambda self: 0.1)
        batch, losses = fake_batch(fake_labels(white=False), count=2), []
        for zone in (0.0, 0.05, 0.1):
            method = vslp(learning={"dead_zone": zone, "warm_up": 0, "views": 1, "proportion_weight": 1.0})
            torch.manual_seed(1)
            losses.append(float(vslp_learning.RegulariserLearning(method).terms(batch)["proportions"].detach()))
        assert losses[0] > losses[1] > losses[2]

    def test_mending_teaches_the_flow_made_up_maps(self):
        """After twenty steps of it alone, maps that it has not seen are mended better than before."""
        method = vslp(fusion={**SMALL, "steps": 5}, seed=2)
        batch = fake_batch(fake_labels(white=False), count=4)
        learning = vslp_learning.RegulariserLearning(method)

        def loss(seed):
            torch.manual_seed(seed)
            return learning.mend(batch)

        before = [float(loss(seed).detach()) for seed in range(100, 106)]
        optimizer = torch.optim.Adam(method.fusion.parameters(), 5e-3)
        for seed in range(20):
            optimizer.zero_grad()
            loss(seed).backward()
            optimizer.step()
        after = [float(loss(seed).detach()) for seed in range(100, 106)]
        assert all(now < then for now, then in zip(after, before, strict=True))

    def test_the_weight_of_the_entropy_grows_from_a_tenth(self, monkeypatch):
        method = vslp(learning={"entropy_weight": 0.5})
        learning = vslp_learning.RegulariserLearning(method)
        for step, weight in ((0, 0.05), (10, 0.275), (20, 0.5)):
            trainer = SimpleNamespace(estimated_stepping_batches=20, global_step=step)
            monkeypatch.setattr(vslp_learning.RegulariserLearning, "trainer", trainer)
            monkeypatch.setattr(vslp_learning.RegulariserLearning, "global_step", step)
            assert learning._entropy_weight() == pytest.approx(weight)


class TestConfig:
    @pytest.mark.parametrize(
        ("fusion", "words"),
        [
            ({"solver": "primal_dual"}, "use solver: flow"),
            ({"fidelity": "log", "ground_cost": [[0, 1], [1, 0]]}, "has no meaning"),
            ({"ground_cost": [[0, 1], [1, 0]]}, "could learn"),
            ({"fidelity": "linear", "ground_cost": [[0, 1], [1, 1]]}, "0 on its diagonal"),
            ({"fidelity": "linear", "ground_cost": [[0, -1], [1, 0]]}, "at least 0"),
        ],
    )
    def test_fusions_that_contradict_themselves(self, fusion, words):
        with pytest.raises(ValidationError, match=words):
            FusionConfig(**fusion)

    def test_a_ground_cost_of_other_classes(self):
        with pytest.raises(InputError, match="has 2 classes, the data 3"):
            vslp(fusion={"fidelity": "linear", "ground_cost": [[0, 1], [1, 0]]})

    @pytest.mark.parametrize(
        "settings",
        [
            {"confidence": {"cells": "pixels"}},
            {"confidence": {"cells": "tiles", "tiles": {"side": 100, "stride": 150}}},
            {"losses": {"dead_zone": 0.1}},
            {"test_time": {"rotations": []}},
            {"test_time": {"rotations": [0, float("inf")]}},
            {"fusion": {"step_size": float("inf")}},
            {"fusion": {"fidelity_weight": float("nan")}},
            {"fusion": {"fidelity": "linear", "ground_cost": [[0, float("nan")], [1, 0]]}},
            {"learning": {"learning_rate": float("inf")}},
        ],
    )
    def test_other_contradictions(self, settings):
        with pytest.raises(ValidationError):
            VSLPConfig(**settings)

    def test_an_offset_that_moves_an_image_out_of_sight(self):
        method = vslp(test_time={"rotations": [0], "offsets": [0, 500]})
        with pytest.raises(
            InputError, match=r"test_time.offsets \(0, 500\).*64 x 96 px out of sight; use offsets below 64"
        ):
            method.predict(torch.rand(1, 3, 64, 96))

    def test_a_batch_without_proportions(self):
        batch = fake_batch(fake_labels(white=False), count=2)
        with pytest.raises(InputError, match="have no proportions"):
            vslp().label_guided(Batch(batch.ids, batch.images))


class TestWindows:
    """Proportions of windows are those of their own part of the mask, with the noise of ``data.weak``."""

    def data(self, **weak):
        dataset = fake_dataset(fake_labels(), count=(6, 1, 1), size=96)  # from picture 3 on of two tissues
        grid = PatchGrid(side=48, stride=24)
        config = DataConfig(
            source="fake", workers=0, augmentation=NO_AUGMENTATION, patches=grid, weak=WeakConfig(**weak)
        )
        return TissueData(dataset, config, 0)

    @pytest.mark.parametrize("weak", [{}, {"round_to": 0.1}, {"noise": 0.05}, {"noise": 0.05, "round_to": 0.05}])
    def test_training_and_scoring_read_the_same(self, weak, monkeypatch):
        data = self.data(**weak)
        items = data.hints("train", "proportions")
        record = data.records("train")[5]
        method = vslp(white=True)
        batches = []
        monkeypatch.setattr(
            VSLP, "label_guided", lambda self, batch: batches.append(batch) or self.predict(batch.images)
        )
        StageOneMaps(method, data, data.config.patches, 4, torch.device("cpu")).guided(record)
        scored = torch.cat([batch.need_proportions() for batch in batches]).numpy()
        rows = [place for place, owner in enumerate(items.owner) if items.records[owner].id == record.id]
        trained = items.proportions[rows]
        told = scored[scored.sum(1) > 0]
        assert len(trained) == len(told)
        np.testing.assert_allclose(trained, told, atol=1e-6)
        step = weak.get("round_to")
        if step:
            np.testing.assert_allclose(trained / step, np.round(trained / step), atol=1e-5)

    def test_windows_differ_from_their_image(self):
        data = self.data()
        items = data.hints("train", "proportions")
        assert len(np.unique(items.proportions.round(3), axis=0)) > 2

    def test_noise_is_new_for_every_window_and_old_for_every_run(self):
        exact, noisy, again = (
            self.data(**weak).hints("train", "proportions").proportions
            for weak in ({}, {"noise": 0.05}, {"noise": 0.05})
        )
        np.testing.assert_array_equal(noisy, again)
        mixed = (exact.max(1) < 1) & (exact.max(1) > 0)
        moved = (noisy - exact)[mixed]
        assert len(moved) > 2
        assert len(np.unique(moved.round(6), axis=0)) > len(moved) // 2
