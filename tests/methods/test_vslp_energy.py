"""Terms of the fusion energy and of stage 1 against loops in numpy, finite differences, and POT."""

import itertools
import math

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from tissuehint.errors import InputError
from tissuehint.methods.vslp import (
    ConfidenceConfig,
    EdgeWeightedTotalVariation,
    FusionConfig,
    FusionEnergy,
    ProportionLosses,
    RegulariserConfig,
    TotalDeepVariation,
    minimise,
)
from tissuehint.methods.vslp.confidence import (
    Cells,
    Confidence,
    best_temperature,
    cell_weights,
    proportion_distance,
    proportion_losses,
)
from tissuehint.methods.vslp.energy import LEAST, SLOPE, SMALLEST, SMOOTHING, average, disagreement, entropy
from tissuehint.methods.vslp.views import Seen

few = settings(max_examples=20, deadline=None)
seeds = st.integers(0, 10**6)
B, N, C, H, W = 2, 3, 3, 4, 5
COST = ((0.0, 1.0, 2.5), (1.0, 0.0, 1.5), (2.0, 1.5, 0.0))  # of one class to another and back are not the same
NONE = RegulariserConfig(name="none")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(*shape, axis=1, seed=0):
    return (1.5 * normal(*shape, seed=seed)).softmax(axis)


def seen_of(images=B, views=N, classes=C, height=H, width=W, seed=10):
    """Every pixel is seen by the first view, and by most others."""
    validity = (uniform(images, views, height, width, seed=seed + 1) < 0.7).double()
    validity[:, 0] = 1
    return Seen(maps(images, views, classes, height, width, axis=2, seed=seed), validity)


def energy_of(seen=None, *, regulariser=None, guide=None, weight=1.0, proportions=None, tissue=None, **settings):
    seen = seen_of() if seen is None else seen
    shape = (len(seen.validity), *seen.validity.shape[2:])
    tissue = uniform(*shape, seed=30) if tissue is None else tissue
    config = FusionConfig(**{"regulariser": NONE, **settings})
    return FusionEnergy(config, seen, tissue, regulariser, guide, weight, proportions)


def slow_log(share):
    """The logarithm, with a hundredth of its slope below 1e-4."""
    return math.log(share + SMALLEST) + SLOPE * math.log(share + LEAST)


def half_distance(one, other):
    """Half of the smoothed absolute differences."""
    return sum(math.sqrt((a - b) ** 2 + SMOOTHING**2) - SMOOTHING for a, b in zip(one, other, strict=True)) / 2


def slow_weights(seen, view_entropy=None):
    """(B,N,h,w)."""
    weights = seen.validity.numpy().copy()
    for b, n, y, x in np.ndindex(*weights.shape):
        if view_entropy is not None:
            shares = seen.probabilities[b, n, :, y, x].numpy()
            weights[b, n, y, x] *= math.exp(sum(p * math.log(p) for p in shares) / view_entropy)
    for b, y, x in np.ndindex(len(weights), *weights.shape[2:]):
        weights[b, :, y, x] /= weights[b, :, y, x].sum()
    return weights


def plan_of(a, b, cost, reg):
    """Entropic plan and the value of its dual, <P, C> + reg KL(P | a b')."""
    plan = ot.sinkhorn(a, b, cost, reg, method="sinkhorn_log", numItermax=100000, stopThr=1e-13)
    dual = (plan * cost).sum() + reg * (plan * np.log(plan / np.outer(a, b))).sum()
    return plan, dual


def at_pixels(seen, u, distance, view_entropy=None):
    """Weighted mean over views of a distance of class distributions, (B,h,w)."""
    weights, views, u = slow_weights(seen, view_entropy), seen.probabilities.numpy(), u.numpy()
    found = np.zeros((len(u), *u.shape[2:]))
    for b, n, y, x in np.ndindex(*weights.shape):
        found[b, y, x] += weights[b, n, y, x] * distance(u[b, :, y, x], views[b, n, :, y, x])
    return found


FIDELITIES = {
    "wasserstein": half_distance,
    "linear": lambda u, p: sum(u[i] * p[j] for i, j in itertools.product(range(C), repeat=2) if i != j),
    "log": lambda u, p: -sum(u[i] * slow_log(p[i]) for i in range(C)),
}


def slow_variation(u, images, smoothness, factor):
    """(B,h,w); 0 beyond the far border."""
    u, grey = u.numpy(), images.mean(1).numpy()
    found = np.zeros(grey.shape)

    def steps(field, y, x):
        down = field[y + 1, x] - field[y, x] if y + 1 < field.shape[0] else 0.0
        right = field[y, x + 1] - field[y, x] if x + 1 < field.shape[1] else 0.0
        return down**2 + right**2

    for b, y, x in np.ndindex(*grey.shape):
        edge = 1 / (1 + factor * steps(grey[b], y, x))
        lengths = [math.sqrt(steps(channel, y, x) + SMOOTHING**2) - SMOOTHING for channel in u[b]]
        found[b, y, x] = smoothness * edge * sum(lengths)
    return found


def differences(function, u, step=1e-6):
    """Central differences of a number, at every entry."""
    found = torch.zeros_like(u)
    for place in np.ndindex(*u.shape):
        one = torch.zeros_like(u)
        one[place] = step
        found[place] = (float(function(u + one)) - float(function(u - one))) / (2 * step)
    return found


class TestFidelity:
    @pytest.mark.parametrize("fidelity", FIDELITIES)
    @pytest.mark.parametrize("view_entropy", [None, 0.5])
    def test_ground_cost_1(self, fidelity, view_entropy):
        seen, u = seen_of(), maps(B, C, H, W)
        energy = energy_of(seen, fidelity=fidelity, view_entropy=view_entropy)
        expected = at_pixels(seen, u, FIDELITIES[fidelity], view_entropy)
        np.testing.assert_allclose(energy.fidelity(u).numpy(), expected, rtol=1e-10)

    def test_linear_with_a_ground_cost(self):
        seen, u, cost = seen_of(), maps(B, C, H, W), np.array(COST)
        expected = at_pixels(seen, u, lambda a, b: a @ cost @ b)
        np.testing.assert_allclose(
            energy_of(seen, fidelity="linear", ground_cost=COST).fidelity(u).numpy(), expected, rtol=1e-10
        )

    @pytest.mark.parametrize("epsilon", [0.05, 0.3])
    def test_transport_at_every_pixel_against_pot(self, epsilon):
        seen, u, cost = seen_of(1, 2, height=2, width=3), maps(1, C, 2, 3), np.array(COST)

        def distance(a, b):
            return (plan_of(a, b, cost, epsilon * cost.max())[0] * cost).sum()

        energy = energy_of(seen, ground_cost=COST, epsilon=epsilon)
        np.testing.assert_allclose(energy.fidelity(u).numpy(), at_pixels(seen, u, distance), rtol=1e-7)

    @pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.005])
    def test_transport_with_little_entropy_is_almost_exact(self, epsilon):
        seen, u, cost = seen_of(1, 2), maps(1, C, H, W), np.array(COST)
        found = energy_of(seen, ground_cost=COST, epsilon=epsilon).fidelity(u).numpy()
        expected = at_pixels(seen, u, lambda a, b: ot.emd2(a.copy(), b.copy(), cost))
        np.testing.assert_allclose(found, expected, rtol=0, atol=epsilon * cost.max() * math.log(C))

    @pytest.mark.parametrize("epsilon", [0.05, 0.02, 0.002])
    @pytest.mark.parametrize("sharp", [1, 6])
    def test_transport_starts_from_that_of_the_map_before(self, epsilon, sharp):
        """And ends at the same, however far that map is."""
        seen, first, second = seen_of(1, 2), maps(1, C, H, W, seed=5), maps(1, C, H, W, seed=6)
        first = (sharp * first.log()).softmax(1)
        energy = energy_of(seen, ground_cost=COST, epsilon=epsilon)
        energy.fidelity(first)
        assert energy.potentials["views"].abs().max() > 0
        expected = energy_of(seen, ground_cost=COST, epsilon=epsilon).fidelity(second)
        torch.testing.assert_close(energy.fidelity(second), expected, rtol=0, atol=1e-4)

    def test_what_a_flow_says_of_transport_is_true(self):
        """At a small epsilon too, whatever the maps on the way were."""
        seen, start = seen_of(2, 3), maps(2, C, H, W, seed=5)
        settings = {"ground_cost": COST, "epsilon": 0.002}
        flows = [minimise(energy_of(seen, **settings), start, steps) for steps in (0, 1, 3, 6)]
        reported = torch.stack([flow.energies[-1] for flow in flows])
        true = torch.stack([energy_of(seen, **settings).energy(flow.u).sum((1, 2)) for flow in flows])
        torch.testing.assert_close(reported, true, rtol=1e-4, atol=1e-4)
        assert bool((true.diff(dim=0) < 0).all())

    def test_transport_with_cost_1_is_half_of_the_absolute_differences(self):
        seen, u = seen_of(1, 2), maps(1, C, H, W)
        ones = tuple(tuple(float(i != j) for j in range(C)) for i in range(C))
        found = energy_of(seen, ground_cost=ones, epsilon=0.02).fidelity(u)
        torch.testing.assert_close(
            found, energy_of(seen).fidelity(u), rtol=0, atol=0.02 * math.log(C) + C * SMOOTHING / 2
        )

    @pytest.mark.parametrize("settings", [{}, {"fidelity": "linear"}, {"fidelity": "linear", "ground_cost": COST}])
    def test_one_hot_maps_and_views(self, settings):
        """The cost of the one class to the other."""
        places = torch.arange(C)
        one_hot = torch.eye(C, dtype=torch.float64)
        views = one_hot.T.view(1, 1, C, 1, C).expand(1, 1, C, C, C)
        u = one_hot.T.view(1, C, C, 1).expand(1, C, C, C)
        energy = energy_of(Seen(views, torch.ones(1, 1, C, C).double()), **settings)
        expected = torch.tensor(COST).double() if "ground_cost" in settings else 1 - one_hot
        torch.testing.assert_close(energy.fidelity(u)[0], expected, rtol=0, atol=SMOOTHING)
        assert not energy.fidelity(u)[0, places, places].any()

    def test_a_view_that_rules_out_a_class_has_a_finite_cost(self):
        shares = torch.tensor([1.0, 0.0]).double().view(1, 1, 2, 1, 1)
        energy = energy_of(Seen(shares, torch.ones(1, 1, 1, 1).double()), fidelity="log")
        assert energy.costs().flatten().tolist() == pytest.approx([-slow_log(1.0), -slow_log(0.0)])
        assert 9 < -slow_log(0.0) < 10

    def test_views_that_do_not_see_a_pixel(self):
        seen, u = seen_of(), maps(B, C, H, W)
        other = torch.where(seen.validity[:, :, None] > 0, seen.probabilities, maps(B, N, C, H, W, axis=2, seed=77))
        for options in ({}, {"fidelity": "linear"}, {"fidelity": "log"}, {"ground_cost": COST}, {"view_entropy": 1.0}):
            first, second = (energy_of(each, **options) for each in (seen, Seen(other, seen.validity)))
            torch.testing.assert_close(first.fidelity(u), second.fidelity(u))

    @few
    @given(seeds, st.one_of(st.none(), st.floats(0.2, 10)))
    def test_view_weights(self, seed, view_entropy):
        seen = seen_of(seed=seed)
        weights = energy_of(seen, view_entropy=view_entropy).view_weights()
        np.testing.assert_allclose(weights.numpy(), slow_weights(seen, view_entropy), rtol=1e-9)
        torch.testing.assert_close(weights.sum(1), torch.ones(B, H, W).double())

    def test_views_count_less_where_they_are_undecided(self):
        probabilities = torch.tensor([[0.98, 0.01, 0.01], [1 / 3, 1 / 3, 1 / 3]]).double().view(1, 2, 3, 1, 1)
        seen = Seen(probabilities, torch.ones(1, 2, 1, 1).double())
        decided = [float(energy_of(seen, view_entropy=h0).view_weights()[0, 0, 0, 0]) for h0 in (0.2, 1.0, 5.0)]
        assert 0.99 > decided[1] > decided[2] > 0.5
        assert decided[0] > 0.98

    def test_weights_sum_to_1_where_all_views_are_undecided(self):
        seen = Seen(torch.full((1, 2, 3, 1, 1), 1 / 3).double(), torch.ones(1, 2, 1, 1).double())
        weights = energy_of(seen, view_entropy=0.05).view_weights()
        torch.testing.assert_close(weights, torch.full_like(weights, 0.5))


class TestProportionTerm:
    def test_spread_over_the_tissue(self):
        u, proportions = maps(B, C, H, W), maps(B, C, seed=2)
        energy = energy_of(proportions=proportions, proportion_weight=3.0)
        found = energy.terms(u)["proportion"]
        for image in range(B):
            tissue = energy.tissue[image].numpy()
            mean = [(u[image, c].numpy() * tissue).sum() / tissue.sum() for c in range(C)]
            distance = half_distance(mean, proportions[image].tolist())
            np.testing.assert_allclose(energy.mean(u)[image].numpy(), mean, rtol=1e-10)
            np.testing.assert_allclose(found[image].numpy(), 3.0 * tissue * distance, rtol=1e-9)
            assert float(found[image].sum()) == pytest.approx(3.0 * tissue.sum() * distance, rel=1e-9)

    @pytest.mark.parametrize("cost", [None, COST])
    def test_proportion_map_sums_to_the_term_with_its_entropy(self, cost):
        u, proportions = maps(B, C, H, W), maps(B, C, seed=2)
        energy = energy_of(ground_cost=cost, proportion_weight=3.0, epsilon=0.2)
        found = energy.proportion_map(u, proportions)
        assert found.shape == (B, H, W)
        ground = 1 - np.eye(C) if cost is None else np.array(cost)
        for image in range(B):
            mean, area = energy.mean(u)[image].numpy(), float(energy.tissue[image].sum())
            _, dual = plan_of(mean, proportions[image].numpy(), ground, 0.2 * ground.max())
            assert float(found[image].sum()) == pytest.approx(3.0 * area * dual, rel=1e-6)

    def test_proportion_map_with_little_entropy_sums_to_the_term(self):
        u, proportions = maps(B, C, H, W), maps(B, C, seed=2)
        energy = energy_of(ground_cost=COST, proportion_weight=3.0, epsilon=0.002)
        for image in range(B):
            mean, area = energy.mean(u)[image].numpy(), float(energy.tissue[image].sum())
            expected = 3.0 * area * ot.emd2(mean, proportions[image].numpy(), np.array(COST))
            total = float(energy.proportion_map(u, proportions)[image].sum())
            assert total == pytest.approx(expected, abs=3.0 * area * 0.002 * 2.5 * math.log(C))

    @pytest.mark.parametrize("cost", [None, COST])
    def test_proportion_map_sums_to_the_term_of_the_energy(self, cost):
        """Up to the entropy and to the smoothing of absolute differences."""
        u, proportions = maps(B, C, H, W), maps(B, C, seed=2)
        energy = energy_of(ground_cost=cost, proportions=proportions, epsilon=0.02)
        total, expected = energy.proportion_map(u, proportions), energy.terms(u)["proportion"]
        mean = (total - expected).sum((1, 2)) / (5 * energy.tissue.sum((1, 2)))
        assert bool((mean.abs() < 0.05).all())
        assert bool((expected.sum((1, 2)) / (5 * energy.tissue.sum((1, 2))) > 0.1).all())

    def test_proportion_map_is_high_where_a_class_has_too_much(self):
        u = torch.zeros(1, 3, 2, 6, dtype=torch.float64)
        u[:, 0, :, :4] = u[:, 1, :, 4:5] = u[:, 2, :, 5:] = 1
        found = energy_of(
            seen_of(1, 1, height=2, width=6), tissue=torch.ones(1, 2, 6).double(), epsilon=0.1
        ).proportion_map(u, torch.tensor([[1 / 6, 4 / 6, 1 / 6]]).double())[0]
        assert found[:, :4].min() > found[:, 5].max() > found[:, 4].max()
        assert found[:, 4].max() < found[:, :4].min() - 0.5

    def test_single_precision(self):
        u, proportions = maps(B, C, H, W).float(), maps(B, C, seed=2).float()
        seen = Seen(*(each.float() for each in seen_of()))
        expected = energy_of().proportion_map(u.double(), proportions.double())
        found = energy_of(seen, tissue=energy_of().tissue.float()).proportion_map(u, proportions)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


class TestTotalVariation:
    @pytest.mark.parametrize("factor", [0.0, 100.0])
    def test_against_loops(self, factor):
        images, u = uniform(B, 3, H, W, seed=4), maps(B, C, H, W)
        config = RegulariserConfig(name="total_variation", smoothness=0.3, edge_factor=factor)
        found = EdgeWeightedTotalVariation(config, images).energy(u)
        np.testing.assert_allclose(found.numpy(), slow_variation(u, images, 0.3, factor), rtol=1e-9)

    def test_a_boundary_is_cheap_on_an_edge_of_the_image(self):
        config = RegulariserConfig(name="total_variation", smoothness=1.0)
        u = torch.zeros(1, 2, 6, 8, dtype=torch.float64)
        u[:, 0, :, :4] = u[:, 1, :, 4:] = 1
        flat = torch.full((1, 3, 6, 8), 0.5, dtype=torch.float64)
        edge = flat.clone()
        edge[..., 4:] = 0.9
        without, on_edge = (float(EdgeWeightedTotalVariation(config, each).energy(u).sum()) for each in (flat, edge))
        assert without == pytest.approx(6 * 2, rel=0.02)  # 6 px of boundary, of two classes
        assert on_edge == pytest.approx(without / (1 + 100 * 0.4**2))
        assert not EdgeWeightedTotalVariation(config, edge).energy(torch.full_like(u, 0.5)).any()


def all_settings():
    """Names, settings, kind of regulariser and whether the proportions are known."""
    yield "wasserstein", {}, None, False
    yield "view entropy", {"view_entropy": 0.5}, None, False
    yield "linear", {"fidelity": "linear", "ground_cost": COST}, None, False
    yield "log", {"fidelity": "log"}, None, True
    yield "proportions", {"proportion_weight": 2.0}, None, True
    yield "total variation", {}, "total_variation", True
    yield "deep variation", {"fidelity": "log"}, "deep", False
    yield "deep variation with a guide", {}, "guided", True


def full(settings, regulariser, known, seed=0):
    """An energy with all that is asked for."""
    guide, made = None, None
    if regulariser == "total_variation":
        config = RegulariserConfig(name="total_variation", smoothness=0.4, edge_factor=5.0)
        made = EdgeWeightedTotalVariation(config, uniform(B, 3, H, W, seed=4))
    elif regulariser is not None:
        guide = uniform(B, 3, H, W, seed=5) if regulariser == "guided" else None
        torch.manual_seed(seed)
        made = TotalDeepVariation(C, 3, 1, 2, 0 if guide is None else 3).double()
    proportions = maps(B, C, seed=2) if known else None
    return energy_of(regulariser=made, guide=guide, weight=1.7, proportions=proportions, **settings)


every_energy = pytest.mark.parametrize(
    ("settings", "regulariser", "known"), [pytest.param(*rest, id=name) for name, *rest in all_settings()]
)


class TestWhole:
    @every_energy
    def test_sum_of_the_terms(self, settings, regulariser, known):
        energy, u = full(settings, regulariser, known), maps(B, C, H, W)
        terms = energy.terms(u)
        names = ["fidelity"] + ["regularisation"] * (regulariser is not None) + ["proportion"] * known
        assert list(terms) == names
        assert all(term.shape == (B, H, W) for term in terms.values())
        torch.testing.assert_close(energy.energy(u), sum(terms.values()))
        torch.testing.assert_close(terms["fidelity"], 1.7 * energy.tissue * energy.fidelity(u))
        if regulariser == "total_variation":
            expected = slow_variation(u, uniform(B, 3, H, W, seed=4), 0.4, 5.0)
            np.testing.assert_allclose(terms["regularisation"].numpy(), expected, rtol=1e-9)
        elif regulariser is not None:
            torch.testing.assert_close(terms["regularisation"], energy.regulariser.energy(u, energy.guide))

    @every_energy
    def test_gradient_by_central_differences(self, settings, regulariser, known):
        energy, u = full(settings, regulariser, known), maps(B, C, H, W)
        with torch.no_grad():
            gradient = energy.gradient(u)
            expected = differences(lambda at: energy.energy(at).sum(), u)
        assert gradient.abs().max() > 1e-2
        assert not gradient.requires_grad
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)

    @every_energy
    def test_gradient_is_differentiable(self, settings, regulariser, known):
        energy, u = full(settings, regulariser, known), maps(B, C, H, W).requires_grad_()
        way, push = normal(*u.shape, seed=8), normal(*u.shape, seed=9)
        gradient = energy.gradient(u)
        step = 1e-6
        around = [energy.gradient(u.detach() + sign * step * way).detach() for sign in (1, -1)]
        expected = float(((around[0] - around[1]) / (2 * step) * push).sum())
        if regulariser is None and "fidelity" in settings and not known:
            assert expected == pytest.approx(0, abs=1e-8)  # linear in u
            return
        (found,) = torch.autograd.grad((gradient * push).sum(), u)
        assert float((found * way).sum()) == pytest.approx(expected, rel=1e-5)
        assert abs(expected) > 1e-3

    def test_gradient_with_a_ground_cost_is_that_of_the_dual(self):
        """Along directions that stay on the simplex, by differences of POT's dual values."""
        epsilon, cost = 0.3, np.array(COST)
        seen, u = seen_of(1, 2, height=1, width=2), maps(1, C, 1, 2)
        energy = energy_of(seen, ground_cost=COST, epsilon=epsilon, weight=1.7)
        gradient, step = energy.gradient(u).detach(), 1e-4
        for x, c in itertools.product(range(2), range(C)):
            way = -torch.ones(C).double() / C
            way[c] += 1
            around = []
            for sign in (1, -1):
                moved = (u[0, :, 0, x] + sign * step * way).numpy()
                views = seen.probabilities[0, :, :, 0, x].numpy()
                weights = slow_weights(seen)[0, :, 0, x]
                duals = [plan_of(moved, view / view.sum(), cost, epsilon * cost.max())[1] for view in views]
                around.append(float(weights @ duals))
            expected = 1.7 * float(energy.tissue[0, 0, x]) * (around[0] - around[1]) / (2 * step)
            assert float((gradient[0, :, 0, x] * way).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)

    def test_lambda_and_the_regulariser_are_learned_through_the_gradient(self):
        energy = full({}, "guided", False)
        weight = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
        learned = FusionEnergy(energy.config, energy.seen, energy.tissue, energy.regulariser, energy.guide, weight)
        u = maps(B, C, H, W)
        learned.gradient(u).square().sum().backward()
        assert float(weight.grad) != 0
        assert all(float(each.grad.abs().max()) > 0 for each in energy.regulariser.parameters())
        torch.testing.assert_close(learned.gradient(u).detach(), energy.gradient(u).detach())

    @every_energy
    def test_other_images_of_the_batch(self, settings, regulariser, known):
        energy, u = full(settings, regulariser, known), maps(B, C, H, W)
        changed = torch.cat([u[:1], maps(1, C, H, W, seed=55)])
        torch.testing.assert_close(energy.energy(changed)[0], energy.energy(u)[0])
        torch.testing.assert_close(energy.gradient(changed)[0].detach(), energy.gradient(u)[0].detach())

    @pytest.mark.parametrize("settings", [{}, {"fidelity": "linear"}, {"fidelity": "log"}, {"ground_cost": COST}])
    def test_the_flow_goes_to_what_the_views_say(self, settings):
        """Three views agree, one is an outlier: the map becomes the class of the three."""
        shares = torch.tensor([[0.8, 0.1, 0.1]] * 3 + [[0.05, 0.05, 0.9]]).double()
        seen = Seen(shares.view(1, 4, 3, 1, 1).expand(1, 4, 3, 2, 2), torch.ones(1, 4, 2, 2).double())
        energy = energy_of(seen, tissue=torch.ones(1, 2, 2).double(), **settings)
        flow = minimise(energy, torch.full((1, 3, 2, 2), 1 / 3).double(), 40)
        assert bool((flow.u.argmax(1) == 0).all())
        assert bool((flow.energies.diff(dim=0) <= 0).all())
        if not settings:  # the median of the views, not their mean
            assert float(flow.u[0, 0].min()) > 0.75

    @pytest.mark.parametrize(
        ("wrong", "words"),
        [
            ({"solver": "primal_dual"}, "primal_dual"),
            ({"fidelity": "log", "ground_cost": COST}, "ground_cost"),
            ({"fidelity": "linear", "ground_cost": ((0, 1), (1, 0, 1))}, "square"),
            ({"fidelity": "linear", "ground_cost": ((0, 1), (1, 0.5))}, "diagonal"),
            ({"fidelity": "linear", "ground_cost": ((0, -1), (1, 0))}, "at least 0"),
            ({"fidelity": "linear", "ground_cost": ((0, 0), (0, 0))}, "one above"),
            ({"view_entropy": 0}, "view_entropy"),
        ],
    )
    def test_wrong_settings(self, wrong, words):
        with pytest.raises(ValueError, match=words):
            FusionConfig(**wrong)


class TestViewsTogether:
    def test_mean_and_log(self):
        seen = seen_of()
        arithmetic, geometric = average(seen, "mean"), average(seen, "log")
        for b, y, x in np.ndindex(B, H, W):
            rows = [seen.probabilities[b, n, :, y, x].numpy() for n in range(N) if seen.validity[b, n, y, x]]
            np.testing.assert_allclose(arithmetic[b, :, y, x].numpy(), np.mean(rows, 0), rtol=1e-9)
            product = np.exp(np.mean([[slow_log(share) for share in row] for row in rows], 0))
            np.testing.assert_allclose(geometric[b, :, y, x].numpy(), product / product.sum(), rtol=1e-9)

    def test_no_view_rules_out_a_class(self):
        shares = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).double().view(1, 2, 2, 1, 1)
        found = average(Seen(shares, torch.ones(1, 2, 1, 1).double()), "log").flatten()
        ratio = math.exp((slow_log(0.0) - slow_log(1.0)) / 2)
        assert 0.006 < ratio < 0.01
        assert found.tolist() == pytest.approx([1 / (1 + ratio), ratio / (1 + ratio)])

    def test_disagreement(self):
        seen = seen_of()
        mean = average(seen, "mean")
        found = disagreement(seen, mean)
        for b, y, x in np.ndindex(B, H, W):
            distances = [
                abs(seen.probabilities[b, n, :, y, x] - mean[b, :, y, x]).sum().item() / 2
                for n in range(N)
                if seen.validity[b, n, y, x]
            ]
            assert float(found[b, y, x]) == pytest.approx(np.mean(distances), rel=1e-9)
        assert bool(((found >= 0) & (found <= 1)).all())
        same = Seen(seen.probabilities[:, :1].expand_as(seen.probabilities), seen.validity)
        assert float(disagreement(same, average(same, "mean")).max()) < 1e-12

    def test_entropy(self):
        shares = maps(2, 5, 3)
        np.testing.assert_allclose(entropy(shares).numpy(), stats.entropy(shares.numpy(), axis=1), rtol=1e-9)
        moved = entropy(shares.transpose(1, 2), 2)
        np.testing.assert_allclose(moved.numpy(), stats.entropy(shares.numpy(), axis=1), rtol=1e-9)
        assert entropy(torch.eye(3)).tolist() == [0, 0, 0]
        assert float(entropy(torch.full((1, 4), 0.25))) == pytest.approx(math.log(4))


def slow_losses(logits, weights, proportions, config):
    """Terms of one image after the other, means over them."""
    found = {"proportions": [], "entropy": [], "presence": []}
    for rows, share, wanted in zip(logits.double(), weights.double(), proportions.double(), strict=True):
        cells = [np.exp(row.numpy()) / np.exp(row.numpy()).sum() for row in rows.T]
        mean = sum(w * p for w, p in zip(share.tolist(), cells, strict=True))
        found["proportions"].append(slow_distance(mean, wanted.tolist(), config.form, config.dead_zone))
        found["entropy"].append(sum(w * stats.entropy(p) for w, p in zip(share.tolist(), cells, strict=True)))
        surprises = []
        for c, part in enumerate(wanted.tolist()):
            somewhere = sum(w * p[c] ** 8 for w, p in zip(share.tolist(), cells, strict=True)) ** (1 / 8)
            if part > config.presence_above:
                surprises.append(-math.log(somewhere))
            elif part == 0:
                surprises.append(-math.log(1 - somewhere))
        found["presence"].append(sum(surprises) / max(len(surprises), 1))
    weighed = {"proportions": 1.0, "entropy": config.entropy_weight, "presence": config.presence_weight}
    return {name: weighed[name] * np.mean(values) for name, values in found.items() if weighed[name]}


def slow_distance(predicted, given, form, dead_zone=0.0):
    if form == "cross_entropy":
        return -sum(g * math.log(max(p, 1e-6)) for p, g in zip(predicted, given, strict=True))
    beyond = [max(abs(p - g) - dead_zone, 0) for p, g in zip(predicted, given, strict=True)]
    return sum(each**2 for each in beyond) if form == "l2" else sum(beyond) / (2 if form == "wasserstein" else 1)


GIVEN = torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.03, 0.2, 0.77, 0.0], [0.25, 0.25, 0.25, 0.25]])


class TestProportionLosses:
    @pytest.mark.parametrize(
        "config",
        [
            {},
            {"form": "l1", "dead_zone": 0.05},
            {"form": "l2", "entropy_weight": 0.0},
            {"form": "wasserstein", "presence_weight": 0.0},
            {"presence_above": 0.0, "entropy_weight": 2.0, "presence_weight": 3.0},
        ],
    )
    def test_against_loops(self, config):
        config = ProportionLosses(**config)
        logits, weights = 2 * normal(3, 4, 7), maps(3, 7, seed=1)
        found = proportion_losses(logits, weights, GIVEN.double(), config)
        expected = slow_losses(logits, weights, GIVEN, config)
        assert list(found) == list(expected)
        for name, value in found.items():
            assert float(value) == pytest.approx(expected[name], rel=1e-5)

    @few
    @given(seeds, st.sampled_from(["cross_entropy", "l1", "l2", "wasserstein"]), st.floats(0, 0.3))
    def test_distances(self, seed, form, dead_zone):
        predicted, wanted = maps(3, 4, seed=seed), maps(3, 4, seed=seed + 1)
        found = proportion_distance(predicted, wanted, form, dead_zone)
        expected = [
            slow_distance(p, g, form, dead_zone) for p, g in zip(predicted.tolist(), wanted.tolist(), strict=True)
        ]
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("form", ["l1", "l2", "wasserstein"])
    def test_what_is_within_the_dead_zone_costs_nothing(self, form):
        given, predicted = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.46, 0.51, 0.03]])
        assert float(proportion_distance(predicted, given, form, 0.05)) == 0
        assert float(proportion_distance(predicted, given, form, 0.02)) > 0
        assert float(proportion_distance(given, given, form)) == 0

    def test_wasserstein_is_transport_with_cost_1(self):
        predicted, given = maps(5, 4), maps(5, 4, seed=1)
        expected = [ot.emd2(p, g, 1 - np.eye(4)) for p, g in zip(predicted.numpy(), given.numpy(), strict=True)]
        np.testing.assert_allclose(proportion_distance(predicted, given, "wasserstein").numpy(), expected, rtol=1e-7)

    def test_cross_entropy_is_least_at_the_proportions(self):
        given = maps(1, 4)
        least = float(proportion_distance(given, given, "cross_entropy"))
        assert least == pytest.approx(float(entropy(given)))
        assert all(float(proportion_distance(maps(1, 4, seed=s), given, "cross_entropy")) > least for s in range(1, 20))

    def test_no_term_without_a_weight(self):
        config = ProportionLosses(entropy_weight=0, presence_weight=0)
        assert list(proportion_losses(normal(1, 4, 3), maps(1, 3), GIVEN[:1], config)) == ["proportions"]

    def test_nothing_is_asked_of_shares_between_0_and_the_threshold(self):
        logits = normal(1, 3, 6).float().requires_grad_()
        given = torch.tensor([[0.95, 0.04, 0.01]])
        config = ProportionLosses(presence_above=0.96)
        proportion_losses(logits, maps(1, 6).float(), given, config)["presence"].backward()
        assert not logits.grad.any()

    @pytest.mark.parametrize("name", ["proportions", "entropy", "presence"])
    def test_descent(self, name):
        logits, weights = normal(3, 4, 7).float(), maps(3, 7, seed=1).float()
        logits.requires_grad_()
        before = proportion_losses(logits, weights, GIVEN, ProportionLosses())[name]
        before.backward()
        moved = logits.detach() - 0.1 * logits.grad / logits.grad.norm()
        assert proportion_losses(moved, weights, GIVEN, ProportionLosses())[name] < before

    @pytest.mark.parametrize("gap", [5, 11, 12, 13, 14, 16, 30, 200])
    def test_a_network_that_is_sure_has_finite_gradients(self, gap):
        """Of a class that is absent, and of one that it does not see."""
        logits = torch.zeros(2, 3, 4)
        logits[:, 2] = -gap
        logits.requires_grad_()
        given = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
        terms = proportion_losses(logits, torch.full((2, 4), 0.25), given, ProportionLosses())
        sum(terms.values()).backward()
        assert all(bool(value.isfinite()) for value in terms.values())
        assert bool(logits.grad.isfinite().all())

    def test_a_class_that_is_not_seen_at_all_is_asked_for(self):
        """The gradient of - log s with respect to a logit is - 1, or almost, however small s is."""
        logits = torch.zeros(1, 3, 4)
        logits[:, 2] = -16
        logits.requires_grad_()
        config = ProportionLosses(entropy_weight=0)
        terms = proportion_losses(logits, torch.full((1, 4), 0.25), torch.tensor([[0.3, 0.3, 0.4]]), config)
        sum(terms.values()).backward()
        assert float(logits.grad[0, 2].sum()) == pytest.approx(-0.4 - 0.1 / 3, rel=1e-2)

    def test_dead_zone_is_not_for_cross_entropy(self):
        with pytest.raises(ValueError, match="dead_zone"):
            ProportionLosses(dead_zone=0.1)


class TestTemperature:
    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
    def test_the_one_that_made_the_proportions(self, temperature):
        logits = [3 * normal(4, 5 + number, seed=number) for number in range(6)]
        weights = [maps(1, 5 + number, seed=number)[0] for number in range(6)]
        given = [((each / temperature).softmax(0) * w).sum(1) for each, w in zip(logits, weights, strict=True)]
        assert best_temperature(logits, weights, given) == pytest.approx(temperature, rel=1e-3)

    def test_no_other_is_better(self):
        logits = [2 * normal(4, 6, seed=number) for number in range(5)]
        weights = [maps(1, 6, seed=number)[0] for number in range(5)]
        given = [
            0.8 * (each / 1.5).softmax(0) @ w + 0.2 * maps(1, 4, seed=number)[0]
            for number, (each, w) in enumerate(zip(logits, weights, strict=True))
        ]

        def surprise(temperature):
            return sum(
                -sum(
                    g * math.log(m)
                    for g, m in zip(wanted.tolist(), ((each / temperature).softmax(0) @ w).tolist(), strict=True)
                )
                for each, w, wanted in zip(logits, weights, given, strict=True)
            )

        found = best_temperature(logits, weights, given)
        assert 0.3 < found < 3.5
        assert surprise(found) <= min(surprise(4.0**power) for power in np.linspace(-1, 1, 201)) + 1e-6

    @pytest.mark.parametrize(("temperature", "bound"), [(50.0, 4.0), (0.01, 0.25)])
    def test_bounds(self, temperature, bound):
        logits = [3 * normal(3, 8, seed=number) for number in range(4)]
        weights = [torch.full((8,), 1 / 8)] * 4
        given = [(each / temperature).softmax(0).mean(1) for each in logits]
        assert best_temperature(logits, weights, given) == pytest.approx(bound, rel=1e-2)


class TestCellWeights:
    @pytest.mark.parametrize(("size", "cells", "covered"), [((8, 12), (2, 3), (8, 12)), ((7, 9), (2, 3), (8, 12))])
    def test_shares_of_the_tissue(self, size, cells, covered):
        tissue = (uniform(2, *size) < 0.6).double()
        found = cell_weights(tissue, Cells(torch.zeros(2, 3, *cells), covered))
        assert found.shape == (2, *cells)
        for image in range(2):
            for row, column in np.ndindex(*cells):
                part = tissue[image, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                expected = float(part.sum() / tissue[image].sum())
                assert float(found[image, row, column]) == pytest.approx(expected, abs=1e-9)

    @few
    @given(seeds, st.tuples(*[st.integers(1, 9)] * 4), st.floats(0, 1))
    def test_they_sum_to_1(self, seed, sides, share):
        tissue = (uniform(2, *sides[:2], seed=seed) < share).double()
        found = cell_weights(tissue, Cells(torch.zeros(2, 3, *sides[2:]), sides[:2]))
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(2).double())
        assert bool((found >= 0).all())

    def test_even_without_tissue(self):
        tissue = torch.zeros(2, 8, 12)
        tissue[1, 0, 0] = 1
        found = cell_weights(tissue, Cells(torch.zeros(2, 3, 2, 3), (8, 12)))
        torch.testing.assert_close(found[0], torch.full((2, 3), 1 / 6))
        assert float(found[1, 0, 0]) == 1


STRIDE, SIDE = 20, 32


def confidence(seed=0, **settings):
    torch.manual_seed(seed)
    tiles = {"stride": STRIDE, "side": SIDE, **settings.pop("tiles", {})}
    given = {"cells": "tiles", "encoder": {"name": "test_resnet"}, "tiles": tiles}
    return Confidence(ConfidenceConfig(**{**given, **settings}), C).eval()


def window(image, row, column):
    """(3,SIDE,SIDE) around a tile, white where the image ends."""
    found = torch.ones(3, SIDE, SIDE)
    before = (SIDE - STRIDE) // 2
    for y, x in itertools.product(range(SIDE), repeat=2):
        place = (STRIDE * row + y - before, STRIDE * column + x - before)
        if 0 <= place[0] < image.shape[1] and 0 <= place[1] < image.shape[2]:
            found[:, y, x] = image[:, place[0], place[1]]
    return found


class TestTiles:
    @pytest.mark.parametrize(("height", "width"), [(60, 80), (45, 61), (20, 20), (13, 50)])
    @torch.no_grad()
    def test_every_tile_by_itself(self, height, width):
        network, images = confidence(), uniform(2, 3, height, width).float()
        found = network(images)
        rows, columns = math.ceil(height / STRIDE), math.ceil(width / STRIDE)
        assert found.logits.shape == (2, C, rows, columns)
        assert found.covered == (rows * STRIDE, columns * STRIDE)
        for image, row, column in np.ndindex(2, rows, columns):
            expected = network.network(window(images[image], row, column)[None]).logits[0]
            torch.testing.assert_close(found.logits[image, :, row, column], expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_more_windows_than_go_through_at_a_time(self, monkeypatch):
        network, images = confidence(), uniform(2, 3, 60, 80).float()
        expected = network(images).logits
        monkeypatch.setattr("tissuehint.methods.vslp.confidence.WINDOWS", 5)
        torch.testing.assert_close(network(images).logits, expected, rtol=1e-4, atol=1e-5)

    @torch.no_grad()
    def test_a_tile_sees_its_window_alone(self):
        network, images = confidence(), uniform(1, 3, 100, 100).float()
        changed = images.clone()
        changed[..., :20, :20] = 0  # windows reach 6 px over their tiles
        moved = (network(changed).logits - network(images).logits).abs().amax((0, 1)) > 1e-6
        expected = torch.zeros(5, 5, dtype=torch.bool)
        expected[:2, :2] = True
        assert torch.equal(moved, expected)

    @pytest.mark.parametrize("count", [1, 5, 12, 100])
    @torch.no_grad()
    def test_a_training_step_sees_some_of_them(self, count):
        network = confidence(tiles={"in_training": count})
        images, tissue = uniform(2, 3, 45, 61).float(), (uniform(2, 45, 61, seed=1) < 0.5).float()
        tissue[0, :25] = 0
        network.training = True  # its batch norms keep to their statistics
        torch.manual_seed(3)
        logits, weights = network.drawn(images, tissue)
        assert logits.shape == (2, C, min(count, 12))
        torch.testing.assert_close(weights.sum(1), torch.ones(2))
        whole = network(images).logits.flatten(2)
        shares = torch.zeros(2, 12)
        for image, place in np.ndindex(2, 12):
            row, column = divmod(place, 4)
            part = tissue[image, 20 * row : 20 * row + 20, 20 * column : 20 * column + 20]
            shares[image, place] = part.sum()
        places = []
        for number in range(logits.shape[2]):
            distances = (whole - logits[:, :, number, None]).abs().amax((0, 1))
            places.append(int(distances.argmin()))
            assert float(distances.min()) < 1e-4
        assert len(set(places)) == len(places)
        expected = shares[:, places]
        even = torch.full_like(expected, 1 / len(places))
        expected = torch.where(expected.sum(1, keepdim=True) > 0, expected / expected.sum(1, keepdim=True), even)
        torch.testing.assert_close(weights, expected)

    @torch.no_grad()
    def test_they_are_drawn_anew(self):
        network, images = confidence(tiles={"in_training": 2}), uniform(1, 3, 100, 100).float()
        network.training = True
        drawn = [network.drawn(images, torch.ones(1, 100, 100))[0] for _ in range(6)]
        assert any(not torch.allclose(drawn[0], each) for each in drawn)

    @pytest.mark.parametrize("cells", ["tiles", "tokens"])
    @torch.no_grad()
    def test_all_are_seen_outside_of_training(self, cells):
        network = confidence(cells=cells, tiles={"in_training": 2})
        images, tissue = uniform(2, 3, 64, 96).float(), (uniform(2, 64, 96, seed=1) < 0.5).float()
        found = network(images)
        logits, weights = network.drawn(images, tissue)
        assert torch.equal(logits, found.logits.flatten(2))
        assert torch.equal(weights, cell_weights(tissue, found).flatten(1))

    def test_tokens(self):
        network = confidence(cells="tokens")
        found = network(uniform(2, 3, 64, 96).float())
        assert found.logits.shape == (2, C, 2, 3)
        assert found.covered == (64, 96)
        with pytest.raises(InputError, match="32"):
            network(uniform(1, 3, 31, 64).float())

    @pytest.mark.parametrize(
        "wrong", [{"tiles": {"stride": 50, "side": 40}}, {"cells": "pixels"}, {"tiles": {"stride": 10, "side": 31}}]
    )
    def test_wrong_settings(self, wrong):
        with pytest.raises(ValueError, match=r"side|network"):
            ConfidenceConfig(**{"cells": "tiles", **wrong})
