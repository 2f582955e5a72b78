"""The truncated flow: it never rises, stays in the simplex, and ends at minimisers that are known."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from tissuehint.errors import InputError
from tissuehint.methods.vslp import TotalDeepVariation, minimise
from tissuehint.methods.vslp.flow import mirror_step
from tissuehint.ops.capacity import capacity_bias

few = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)
B, K = 2, 3
UNIT = 1e4
KINDS = ["quadratic", "indefinite", "total variation", "absolute values", "deep variation", "not everywhere", "nowhere"]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(*shape, seed=0):
    return (1.5 * normal(*shape, seed=seed)).softmax(1)


def lengths(u):
    """Sum of absolute differences at every pixel."""
    wide = torch.nn.functional.pad(u, (0, 1, 0, 1), mode="replicate")
    return ((wide[..., 1:, :-1] - u).abs() + (wide[..., :-1, 1:] - u).abs()).sum(1)


def deep_variation(seed, channels=K):
    torch.manual_seed(seed)
    return TotalDeepVariation(channels, 3, 1, 2).double()


def energy_of(kind, shape, seed):
    """A function of maps (B,K,H,W), (B,H,W)."""
    wanted, matrix = maps(*shape, seed=seed + 1), normal(shape[1], shape[1], seed=seed + 2)
    if kind == "deep variation":
        return deep_variation(seed, shape[1]).energy
    if kind == "total variation":
        return lambda u: lengths(u) + 0.5 * (u - wanted).square().sum(1)
    if kind == "absolute values":
        return lambda u: (u - wanted).abs().sum(1)
    if kind == "not everywhere":  # no number where a class has less than a tenth
        return lambda u: (u - 0.1).sqrt().sum(1) + (u * wanted).sum(1)
    if kind == "nowhere":
        return lambda u: (u - 2).log().sum(1)
    form = matrix @ matrix.T if kind == "quadratic" else matrix
    return lambda u: torch.einsum("bihw,ij,bjhw->bhw", u - wanted, form, u - wanted)


def assert_descent(flow, energy, start, steps):
    assert flow.u.shape == start.shape
    assert flow.energies.shape == (steps + 1, len(start))
    assert_in_simplex(flow.u)
    assert bool((flow.energies.diff(dim=0) <= 0).all())
    for place, u in ((0, start), (-1, flow.u)):
        torch.testing.assert_close(flow.energies[place], energy(u).flatten(1).sum(1).detach())


def assert_in_simplex(u):
    assert bool((u >= 0).all())
    torch.testing.assert_close(u.sum(1), torch.ones_like(u[:, 0]))


class Weighed:
    """Its gradient is that of its energy, and each is counted."""

    def __init__(self, cost):
        self.cost, self.energies, self.gradients = cost, 0, 0

    def energy(self, u):
        self.energies += 1
        return (self.cost * u).sum(1)

    def gradient(self, u):
        self.gradients += 1
        return self.cost.expand_as(u)


class TestDescent:
    @few
    @given(st.sampled_from(KINDS[:-1]), seeds, st.integers(1, 5), st.integers(1, 5), st.integers(-2, 6))
    def test_any_energy_and_any_step_size(self, kind, seed, height, width, magnitude):
        start = maps(B, K, height, width, seed=seed)
        if kind == "not everywhere":
            start = 0.4 * start + 0.2  # here it is a number
        energy = energy_of(kind, start.shape, seed)
        flow = minimise(energy, start, 8, step_size=10.0**magnitude)
        assert_descent(flow, energy, start, 8)
        assert bool(flow.energies.isfinite().all())

    @few
    @given(st.sampled_from(KINDS[:3]), seeds, st.integers(2, 6), st.integers(-1, 4))
    def test_single_precision_and_any_number_of_classes(self, kind, seed, classes, magnitude):
        start = maps(B, classes, 3, 4, seed=seed)
        energy = energy_of(kind, start.shape, seed)
        flow = minimise(lambda u: energy(u.double()).float(), start.float(), 6, step_size=10.0**magnitude)
        assert flow.u.dtype == flow.energies.dtype == torch.float32
        assert_in_simplex(flow.u)
        assert bool((flow.energies.diff(dim=0) <= 0).all())

    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_it_goes_somewhere(self, kind):
        start = 0.4 * maps(B, K, 4, 4) + 0.2
        flow = minimise(energy_of(kind, start.shape, 3), start, 10)
        assert bool((flow.energies[-1] < flow.energies[0] - 1e-2).all())

    def test_an_energy_that_is_no_number_anywhere(self):
        start = maps(B, K, 3, 3)
        flow = minimise(energy_of("nowhere", start.shape, 0), start, 3)
        assert torch.equal(flow.u, start)
        assert bool(flow.energies.isnan().all())

    @few
    @given(st.sampled_from(KINDS[:4]), seeds)
    def test_an_image_has_arrived_where_its_energy_falls_by_no_more_than_rounding(self, kind, seed):
        start, counted = maps(4, K, 2, 3, seed=seed), energy_of(kind, (4, K, 2, 3), seed)
        size = []

        def energy(u):
            found = counted(u.double()).float()
            size.append(found.reshape(4, -1).abs().sum(1))
            return found

        falls = -minimise(energy, start.float(), 60).energies.double().diff(dim=0)
        taken = falls > 0
        least = torch.stack(size).min(0).values * torch.finfo(torch.float32).eps
        assert bool((falls >= least)[taken].all())
        assert not bool((taken[1:] & ~taken[:-1]).any())  # no step after one that was not taken
        assert bool(taken[0].any())

    @pytest.mark.parametrize("unit", [1e-9, 1e-3, 1.0, 1e6])
    @pytest.mark.parametrize("form", [torch.sum, torch.mean])
    def test_the_unit_of_the_energy_is_free(self, unit, form):
        start, target = maps(B, K, 8, 8), maps(B, K, 8, 8, seed=9)

        def energy(u):
            return unit * form((u - target).square(), (1, 2, 3))

        step = 1 / unit if form is torch.sum else 64 * K / unit
        flow = minimise(energy, start, 40, step_size=step)
        assert bool((flow.energies[-1] < 0.01 * flow.energies[0]).all())

    def test_the_first_step_may_be_far_too_long(self):
        start = torch.full((B, 2, 4, 4), 0.25)
        start[:, 0] = 0.75

        def energy(u):
            return (u[:, 0] - 0.8).square()

        few, more = (minimise(energy, start, 4, step_size=1e4, halvings=2, first_halvings=n) for n in (None, 20))
        assert torch.equal(few.u, start)
        assert bool((more.energies.diff(dim=0)[:2] < 0).all())

    @pytest.mark.parametrize("size", [(), (3, 4)])
    def test_no_image(self, size):
        flow = minimise(lambda u: u[:, 0].flatten(1).sum(1) if not size else u[:, 0], torch.rand(0, 2, 3, 4), 3)
        assert flow.u.shape == (0, 2, 3, 4)
        assert flow.energies.shape == (4, 0)

    def test_an_energy_that_does_not_look_at_the_map(self):
        start = maps(B, K, 2, 2)
        flow = minimise(lambda u: torch.ones(len(u)), start, 3)
        assert torch.equal(flow.u, start)
        assert torch.equal(flow.energies, torch.ones(4, B, dtype=start.dtype))

    def test_inference_mode(self):
        start, network = maps(B, K, 4, 4), deep_variation(0)
        expected = minimise(network, start, 3).u
        with torch.inference_mode():
            torch.testing.assert_close(minimise(network, start.clone(), 3).u, expected)
            torch.testing.assert_close(minimise(network.energy, start.clone(), 3).u, expected)

    @pytest.mark.parametrize("step_size", [math.inf, 1e300])
    def test_steps_that_lead_to_no_number(self, step_size):
        start, cost = maps(B, K, 2, 2), normal(B, K, 2, 2)
        cost[:, :, 0, 0] = 0
        flow = minimise(lambda u: (cost * u).sum(1), start, 3, step_size=step_size)
        assert_in_simplex(flow.u)
        assert bool((flow.energies.diff(dim=0) <= 0).all())

    def test_a_gradient_that_is_no_number_at_pixels_that_do_not_count(self):
        """The trap of torch.where: the branch that is not chosen has a derivative that is no number."""

        def energy(u):
            return torch.where(u[:, 0] > 0.5, (u[:, 0] - 0.5).sqrt(), 0.0)

        start = torch.tensor([[0.9, 0.2], [0.1, 0.8]], dtype=torch.float64).view(1, 2, 1, 2)
        assert_in_simplex(minimise(energy, start, 3).u)

    def test_every_image_by_itself(self):
        """One of them with a steep energy, one with a flat one, one with steps of its own."""
        start, factor, steps = maps(3, K, 4, 5), torch.tensor([100.0, 1.0, 1e-3]), torch.tensor([1.0, 30.0, 5.0])
        energies = [energy_of("absolute values", (1, K, 4, 5), seed) for seed in range(3)]

        def energy(u):
            return torch.cat([factor[i] * each(u[i : i + 1]) for i, each in enumerate(energies)])

        together = minimise(energy, start, 12, step_size=steps)
        for i, each in enumerate(energies):

            def alone(u, i=i, each=each):
                return factor[i] * each(u)

            one = minimise(alone, start[i : i + 1], 12, step_size=float(steps[i]))
            torch.testing.assert_close(together.u[i], one.u[0], rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(together.energies[:, i], one.energies[:, 0], rtol=1e-10, atol=1e-12)

    def test_a_bad_image_holds_up_no_other(self):
        start = maps(2, K, 3, 3)
        good = energy_of("quadratic", (1, K, 3, 3), 0)

        def energy(u):
            return torch.cat([(u[:1] - 2).log().sum(1), good(u[1:])])

        flow = minimise(energy, start, 6)
        torch.testing.assert_close(flow.u[1], minimise(good, start[1:], 6).u[0])
        assert torch.equal(flow.u[0], start[0])


class TestForms:
    @pytest.mark.parametrize("project", [False, True])
    def test_object_map_and_sum(self, project):
        network, start = deep_variation(0), maps(B, K, 5, 4)
        forms = [network, network.energy, lambda u: network.energy(u).sum((1, 2))]
        options = {"step_size": 3.0, "project": same_everywhere_in_rows if project else None}
        first, *others = [minimise(form, start, 7, **options) for form in forms]
        assert bool((first.energies[-1] < first.energies[0]).all())
        for other in others:
            torch.testing.assert_close(other.u, first.u)
            torch.testing.assert_close(other.energies, first.energies)

    def test_the_gradient_of_the_object_is_taken(self):
        class Misled(Weighed):
            def gradient(self, u):
                return -super().gradient(u)

        start, cost = maps(B, K, 2, 2), normal(B, K, 2, 2)
        assert torch.equal(minimise(Misled(cost), start, 2).u, start)  # uphill, so that no step is taken
        assert not torch.equal(minimise(Weighed(cost), start, 2).u, start)

    def test_numbers_of_evaluations(self):
        counted = Weighed(normal(B, K, 2, 2))
        minimise(counted, maps(B, K, 2, 2), 5)
        assert (counted.energies, counted.gradients) == (1 + 5, 5)

        class Uphill(Weighed):
            def gradient(self, u):
                return -super().gradient(u)

        counted = Uphill(normal(B, K, 2, 2))
        flow = minimise(counted, maps(B, K, 2, 2), 5, halvings=3)  # it has arrived, and nothing more is tried
        assert (counted.energies, counted.gradients) == (1 + 4, 1)
        assert flow.energies.shape == (1 + 5, B)

    def test_no_graph(self):
        network = deep_variation(0)
        start = maps(B, K, 4, 4).requires_grad_()
        kept = start.detach().clone()
        step_size = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
        for form in (network, network.energy):
            for steps in (0, 3):
                flow = minimise(form, start, steps, step_size=step_size)
                assert not flow.u.requires_grad
                assert not flow.energies.requires_grad
        assert torch.equal(start.detach(), kept)
        assert start.grad is None
        assert step_size.grad is None
        assert all(parameter.grad is None for parameter in network.parameters())
        assert torch.is_grad_enabled()

    def test_a_function_is_differentiated_under_no_grad_too(self):
        start, energy = maps(B, K, 3, 3), energy_of("quadratic", (B, K, 3, 3), 0)
        with torch.no_grad():
            flow = minimise(energy, start, 5)
        torch.testing.assert_close(flow.u, minimise(energy, start, 5).u)


class TestSteps:
    """On a linear energy the logarithms move by the step sizes times the cost."""

    def test_steps_grow(self):
        start, cost = maps(B, K, 3, 2), 0.3 * normal(B, K, 3, 2)
        for steps in range(5):
            flow = minimise(lambda u: (cost * u).sum(1), start, steps, step_size=0.5)
            total = sum(0.5 * 1.2**number for number in range(steps))
            torch.testing.assert_close(flow.u, (start.log() - total * cost).softmax(1), rtol=1e-9, atol=1e-12)

    def test_steps_are_halved(self):
        """What is beyond .3 is forbidden: 1 and .5 are, .25 is not; then .25 + .3, .15 and .075 are, .0375 is not."""

        def energy(u):
            beyond = (u[:, 0] / u[:, 1]).log() > 0.3
            return torch.where(beyond, math.inf, u[:, 1])

        class Energy(Weighed):
            def energy(self, u):
                return energy(u)

        slope = torch.tensor([0.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
        start = torch.full((1, 2, 1, 1), 0.5, dtype=torch.float64)
        for steps, total in ((1, 0.25), (2, 0.25 + 0.0375)):
            flow = minimise(Energy(slope), start, steps)
            assert float((flow.u[0, 0] / flow.u[0, 1]).log()) == pytest.approx(total, rel=1e-9)
        for halvings, total in ((1, 0.0), (2, 0.25)):
            flow = minimise(Energy(slope), start, 1, halvings=halvings)
            assert float((flow.u[0, 0] / flow.u[0, 1]).log()) == pytest.approx(total, rel=1e-9, abs=1e-12)

    def test_no_step(self):
        start, energy = maps(B, K, 3, 4), energy_of("quadratic", (B, K, 3, 4), 0)
        flow = minimise(energy, start, 0)
        assert torch.equal(flow.u, start)
        torch.testing.assert_close(flow.energies, energy(start).sum((1, 2))[None])

    def test_one_hot_maps_can_be_left(self):
        wanted = 0.5 * maps(B, K, 3, 3) + 0.5 / K
        start = torch.zeros_like(wanted)
        start[:, 1] = 1
        flow = minimise(lambda u: (u - wanted).square().sum(1), start, 60)
        torch.testing.assert_close(flow.energies[0], (start - wanted).square().sum((1, 2, 3)))
        torch.testing.assert_close(flow.u, wanted, rtol=0, atol=1e-3)

    @pytest.mark.parametrize("tau", [torch.tensor(0.7), torch.tensor([0.7, 0.0])])
    def test_mirror_step(self, tau):
        u, gradient = maps(B, K, 3, 4), normal(B, K, 3, 4)
        found = mirror_step(u, gradient, tau.double())
        for image in range(B):
            length = float(tau if tau.ndim == 0 else tau[image])
            weighed = u[image] * (-length * gradient[image]).exp()
            torch.testing.assert_close(found[image], weighed / weighed.sum(0))

    def test_mirror_step_is_differentiable(self):
        u, gradient = maps(1, 2, 2, 2).requires_grad_(), normal(1, 2, 2, 2).requires_grad_()
        tau = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(mirror_step, [u, gradient, tau])

    def test_mirror_step_from_zeros(self):
        u = torch.tensor([1.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
        gradient = torch.tensor([20.0, 0.0], dtype=torch.float64).view(1, 2, 1, 1)
        found = mirror_step(u, gradient, torch.tensor(1.0))
        assert_in_simplex(found)
        assert float(found[0, 1]) > 0.99


class TestMinimisers:
    """Energies in a large unit, so that a millionth is little."""

    def test_linear_with_relative_entropy(self):
        """<c, u> + a KL(u | q): u is q exp(- c / a), scaled."""
        cost, prior, weight = normal(B, K, 4, 3), maps(B, K, 4, 3, seed=5), 0.7

        def energy(u):
            return UNIT * (cost * u + weight * u * (u / prior).log()).sum(1)

        expected = (prior.log() - cost / weight).softmax(1)
        flow = minimise(energy, torch.full_like(cost, 1 / K), 60, step_size=1 / UNIT)
        torch.testing.assert_close(flow.u, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(flow.energies[-1], energy(expected).sum((1, 2)), rtol=0, atol=1e-8 * UNIT)

    @pytest.mark.parametrize("step_size", [0.01, 1.0, 100.0])
    def test_nearest_map(self, step_size):
        """The projection onto the simplex, by sorting; most of these points project onto an edge."""
        wanted = normal(40, 4, 1, 1)
        start = maps(40, 4, 1, 1, seed=1)
        flow = minimise(lambda u: UNIT * (u - wanted).square().sum(1) / 2, start, 200, step_size=step_size / UNIT)
        expected = np.apply_along_axis(nearest_in_simplex, 1, wanted.numpy())
        assert (expected == 0).mean() > 0.2
        np.testing.assert_allclose(flow.u.numpy(), expected, atol=1e-3)

    @pytest.mark.parametrize("kind", ["quadratic", "total variation"])
    def test_arrived_means_almost_there(self, kind):
        """In units of 1, the energy is within some hundred-thousandths per pixel of what it falls to."""
        start, energy = maps(B, K, 4, 5), energy_of(kind, (B, K, 4, 5), 1)
        flow = minimise(energy, start, 100)
        best = minimise(lambda u: UNIT * energy(u), start, 3000, step_size=1 / UNIT).energies[-1] / UNIT
        assert bool((flow.energies[-1] - best < 2e-5 * 20).all())

    def test_linear(self):
        cost = normal(B, K, 4, 3)
        flow = minimise(lambda u: (cost * u).sum(1), maps(B, K, 4, 3), 60)
        assert torch.equal(flow.u.argmax(1), cost.argmin(1))
        torch.testing.assert_close(flow.energies[-1], cost.amin(1).sum((1, 2)), rtol=0, atol=1e-3)

    def test_neighbours_that_are_coupled(self):
        """Against scipy, on a row of pixels with a smooth total variation."""
        wanted = maps(1, 2, 1, 5, seed=3)

        def energy(u):
            length = (u.diff(dim=-1).square() + 1e-4).sqrt().sum((1, 2, 3))
            return UNIT * ((u - wanted).square().sum((1, 2, 3)) + 0.2 * length)

        def of_first(shares):
            first = torch.from_numpy(shares)
            return float(energy(torch.stack([first, 1 - first]).view(1, 2, 1, 5))) / UNIT

        best = optimize.minimize(of_first, np.full(5, 0.5), bounds=[(0, 1)] * 5, options={"ftol": 1e-14})
        flow = minimise(energy, torch.full_like(wanted, 0.5), 300, step_size=1 / UNIT)
        assert float(flow.energies[-1]) / UNIT == pytest.approx(best.fun, abs=1e-5)
        np.testing.assert_allclose(flow.u[0, 0, 0].numpy(), best.x, atol=5e-3)


def nearest_in_simplex(point):
    ordered = np.sort(point)[::-1]
    excess = (np.cumsum(ordered) - 1) / np.arange(1, len(point) + 1)
    return np.maximum(point - excess[ordered > excess][-1], 0)


def same_everywhere_in_rows(logarithms):
    return logarithms.mean(-1, keepdim=True).expand_as(logarithms)


class TestProjection:
    def test_every_map_is_allowed(self):
        """All that the energy is asked about, proposals that are not taken too."""
        seen = []
        wanted = maps(B, K, 4, 5, seed=9)

        def energy(u):
            seen.append(u.detach())
            return (u - wanted).abs().sum(1)

        start = maps(B, K, 4, 5)
        flow = minimise(energy, start, 8, step_size=10.0, project=same_everywhere_in_rows)
        assert len(seen) > 1 + 8
        for u in [*seen, flow.u]:
            torch.testing.assert_close(u, u[..., :1].expand_as(u))
            assert_in_simplex(u)
        assert bool((flow.energies.diff(dim=0) <= 0).all())
        assert bool((flow.energies[-1] < flow.energies[0]).all())

    def test_the_start_is_projected(self):
        start, energy = maps(B, K, 4, 5), energy_of("quadratic", (B, K, 4, 5), 0)
        flow = minimise(energy, start, 0, project=same_everywhere_in_rows)
        torch.testing.assert_close(flow.u, same_everywhere_in_rows(start.log()).softmax(1))
        torch.testing.assert_close(flow.energies[0], energy(flow.u).sum((1, 2)))

    @few
    @given(seeds, st.floats(0.1, 100))
    def test_areas(self, seed, step_size):
        """The one that is used: the classes keep their areas at the temperature of the projection."""
        shares = maps(B, K, 1, 1, seed=seed)[:, :, 0, 0]
        tissue = torch.ones(B, 4, 5, dtype=torch.float64)

        def project(logarithms):
            return logarithms + capacity_bias(logarithms, shares, tissue, temperature=1.0)[:, :, None, None]

        start = maps(B, K, 4, 5, seed=seed)
        energy = energy_of("total variation", start.shape, seed)
        flow = minimise(energy, start, 5, step_size=step_size, project=project)
        torch.testing.assert_close(flow.u.mean((2, 3)), shares, rtol=0, atol=1e-4)
        assert_in_simplex(flow.u)
        assert bool((flow.energies.diff(dim=0) <= 0).all())

    def test_mirror_step(self):
        u, gradient = maps(B, K, 3, 4), normal(B, K, 3, 4)
        found = mirror_step(u, gradient, torch.tensor(0.5), same_everywhere_in_rows)
        torch.testing.assert_close(found, (u.log() - 0.5 * gradient).mean(-1, keepdim=True).softmax(1).expand_as(u))


class TestErrors:
    @pytest.mark.parametrize(
        ("start", "word"),
        [
            (torch.full((2, 3, 3), 0.5), "(2, 3, 3)"),
            (torch.full((1, 2, 3, 3), 0.6), "summing to 1"),
            (torch.tensor([1.5, -0.5]).view(1, 2, 1, 1), "at least 0"),
            (torch.full((1, 2, 3, 3), math.nan), "tissue map"),
        ],
    )
    def test_a_start_that_is_no_tissue_map(self, start, word):
        assert_error(word, start=start)

    @pytest.mark.parametrize("step_size", [0.0, -1.0, math.nan, torch.tensor([1.0, 0.0])])
    def test_a_step_size_that_is_not_above_0(self, step_size):
        assert_error("step_size", step_size=step_size)

    def test_negative_steps(self):
        assert_error("steps -1", steps=-1)


def assert_error(word, start=None, steps=1, step_size=1.0):
    given = torch.full((2, 2, 2, 2), 0.5) if start is None else start
    with pytest.raises(InputError) as raised:
        minimise(lambda u: u.square().sum(1), given, steps, step_size=step_size)
    assert "\n" not in str(raised.value)
    assert word in str(raised.value)
    assert raised.value.rule
    assert raised.value.fix
