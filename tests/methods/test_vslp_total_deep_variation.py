"""Total Deep Variation against its equations in numpy loops, in double precision; what it must not see."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tissuehint.errors import InputError
from tissuehint.methods.vslp import TotalDeepVariation

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)
sides = st.integers(1, 9)
SIZES = [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (1, 7), (4, 3), (5, 5), (8, 8), (7, 9), (13, 6)]
K, G = 3, 2

with_and_without_guide = pytest.mark.parametrize("guide_channels", [0, G])


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(channels=K, features=3, macro_blocks=2, scales=3, guide_channels=0, seed=0):
    """With weights a bit larger than at first, so that what is not linear counts."""
    torch.manual_seed(seed)
    made = TotalDeepVariation(channels, features, macro_blocks, scales, guide_channels).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter *= 1.5
    return made


def maps(*shape, seed=0):
    return normal(*shape, seed=seed).softmax(1)


def guide_of(network, u, seed=7):
    return normal(len(u), network.guide_channels, *u.shape[2:], seed=seed) if network.guide_channels else None


def value(network, u, guide=None):
    with torch.no_grad():
        return float(network.energy(u, guide).sum())


def convolved(x, kernel):
    """(C,H,W) with (M,C,3,3), borders mirrored."""
    height, width = x.shape[1:]
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1)), mode="symmetric")
    total = np.zeros((len(kernel), height, width))
    for row in range(3):
        for column in range(3):
            part = wide[:, row : row + height, column : column + width]
            total += np.einsum("mc,chw->mhw", kernel[:, :, row, column], part)
    return total


def blurred(x):
    height, width = x.shape[1:]
    taps = np.array([1, 4, 6, 4, 1]) / 16
    wide = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="symmetric")
    return sum(
        taps[row] * taps[column] * wide[:, row : row + height, column : column + width]
        for row in range(5)
        for column in range(5)
    )


def enlarged(coarse, kernel, height, width):
    """What cell i gives to the pixels around 2 i; mirrored cells beyond the border give too."""
    wide = np.pad(coarse, ((0, 0), (1, 1), (1, 1)), mode="symmetric")
    fine = np.zeros((kernel.shape[1], height, width))
    for i in range(-1, coarse.shape[1] + 1):
        for j in range(-1, coarse.shape[2] + 1):
            for row in range(3):
                for column in range(3):
                    y, x = 2 * i + row - 1, 2 * j + column - 1
                    if 0 <= y < height and 0 <= x < width:
                        fine[:, y, x] += wide[:, i + 1, j + 1] @ kernel[:, :, row, column]
    return blurred(fine)


def micro_block(block, x):
    inner, outer = (each.detach().numpy() for each in (block.inner, block.outer))
    return x + convolved(np.log(1 + convolved(x, inner) ** 2) / 2, outer)


def macro_block(block, states):
    seen = []
    for scale, before in enumerate(block.before):
        state = states[scale]
        if scale:
            coarser = convolved(blurred(seen[-1]), block.down[scale - 1].detach().numpy())[:, ::2, ::2]
            state = coarser if state is None else state + coarser
        seen.append(micro_block(before, state))
    for scale in reversed(range(len(seen) - 1)):
        finer = enlarged(seen[scale + 1], block.up[scale].detach().numpy(), *seen[scale].shape[1:])
        seen[scale] = micro_block(block.after[scale], seen[scale] + finer)
    return seen


def bounded(filters):
    return np.stack([each / max(1, np.sqrt((each**2).sum())) for each in filters])


def slow_energy(network, u, guide=None):
    """(H,W) of one map."""
    filters = network.filters.detach().numpy()
    first = convolved(u.numpy(), bounded(filters - filters.mean((2, 3), keepdims=True)))
    if guide is not None:
        first = first + convolved(guide.numpy(), bounded(network.guide_filters.detach().numpy()))
    states = [first] + [None] * (network.scales - 1)
    for block in network.blocks:
        states = macro_block(block, states)
    return np.einsum("m,mhw->hw", network.weight.detach().numpy()[0, :, 0, 0], states[0])


def assert_one_line(raised, *words):
    error, text = raised.value, str(raised.value)
    assert "\n" not in text
    assert error.subject
    assert error.rule
    assert error.fix
    assert all(word in text for word in words), text


class TestEnergyAgainstLoops:
    @with_and_without_guide
    @pytest.mark.parametrize("size", SIZES)
    def test_any_size(self, size, guide_channels):
        found = network(guide_channels=guide_channels)
        u = maps(2, K, *size)
        guide = guide_of(found, u)
        energy = found.energy(u, guide).detach()
        assert energy.shape == (2, *size)
        for image in range(2):
            expected = slow_energy(found, u[image], None if guide is None else guide[image])
            np.testing.assert_allclose(energy[image].numpy(), expected, rtol=1e-9, atol=1e-12)
            assert abs(expected).max() > 1e-3 or size == (1, 1)

    @pytest.mark.parametrize(("blocks", "scales"), [(1, 1), (3, 1), (1, 2), (1, 4), (3, 3)])
    def test_any_depth(self, blocks, scales):
        found = network(macro_blocks=blocks, scales=scales)
        u = maps(1, K, 9, 6)
        np.testing.assert_allclose(found.energy(u)[0].detach().numpy(), slow_energy(found, u[0]), rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("scales", [2, 3])
    def test_every_scale_and_every_block_counts(self, scales):
        found, u = network(scales=scales), maps(1, K, 9, 9)
        before = found.energy(u).detach()
        for block in found.blocks:
            for kernel in [*block.down, *block.up]:
                kept = kernel.detach().clone()
                kernel.data.zero_()
                assert (found.energy(u) - before).abs().max() > 1e-4
                kernel.data.copy_(kept)

    def test_defaults_of_the_paper(self):
        found = TotalDeepVariation(4)
        assert found.filters.shape == (32, 4, 3, 3)
        assert len(found.blocks) == 3
        assert [len(block.before) for block in found.blocks] == [3] * 3
        assert [len(block.after) for block in found.blocks] == [2] * 3
        assert found.guide_filters is None
        assert not [name for name, _ in found.named_parameters() if "bias" in name]


class TestWhatIsNotSeen:
    @few
    @given(seeds, sides, sides)
    def test_a_constant_map_has_no_energy(self, seed, height, width):
        constant = normal(2, K, 1, 1, seed=seed).softmax(1).expand(-1, -1, height, width).contiguous()
        found = network(seed=seed)
        assert found.energy(constant).abs().max() < 1e-12
        structured = constant + maps(2, K, height, width, seed=seed)
        assert found.energy(structured).abs().max() > 1e-6 or height * width == 1

    @few
    @given(seeds, sides, sides, st.sampled_from([0, G]))
    def test_a_class_that_is_shifted_everywhere(self, seed, height, width, guide_channels):
        found = network(guide_channels=guide_channels, seed=seed)
        u = maps(2, K, height, width, seed=seed)
        guide, moved = guide_of(found, u), u + 3 * normal(2, K, 1, 1, seed=seed + 1)
        torch.testing.assert_close(found.energy(moved, guide), found.energy(u, guide), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.gradient(moved, guide), found.gradient(u, guide), rtol=1e-8, atol=1e-9)

    @few
    @given(seeds, sides, sides, st.sampled_from([0, G]))
    def test_the_gradient_leaves_areas_as_they_are(self, seed, height, width, guide_channels):
        """Zero response to a shift: the gradient of each class sums to 0."""
        found = network(guide_channels=guide_channels, seed=seed)
        u = maps(1, K, height, width, seed=seed)
        gradient = found.gradient(u, guide_of(found, u)).detach()
        assert gradient.sum((2, 3)).abs().max() < 1e-9

    def test_a_guide_is_seen_where_the_map_is_constant(self):
        found, u = network(guide_channels=G), torch.full((1, K, 5, 6), 1 / K, dtype=torch.float64)
        assert found.energy(u, guide_of(found, u)).abs().max() > 1e-3
        assert found.energy(u, torch.zeros(1, G, 5, 6).double()).abs().max() < 1e-12

    @pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
    def test_filters(self, scale):
        found = network(features=8)
        found.filters.data.mul_(scale).add_(scale)
        filters = found.zero_mean_filters().detach()
        assert filters.shape == found.filters.shape
        assert float(filters.mean((2, 3)).abs().max()) < 1e-12
        norms = filters.flatten(1).norm(dim=1)
        assert float(norms.max()) <= 1 + 1e-12
        if scale < 1:  # short ones are left alone
            expected = found.filters - found.filters.mean((2, 3), keepdim=True)
            torch.testing.assert_close(filters, expected.detach())
        if scale > 1:
            torch.testing.assert_close(norms, torch.ones_like(norms))

    def test_filters_of_zeros(self):
        found = network()
        found.filters.data.fill_(2.0)
        assert not found.energy(maps(1, K, 4, 4)).any()
        assert not found.gradient(maps(1, K, 4, 4)).any()

    @with_and_without_guide
    def test_other_maps_of_the_batch(self, guide_channels):
        found = network(guide_channels=guide_channels)
        u = maps(3, K, 6, 7)
        guide = guide_of(found, u)
        energy, gradient = found.energy(u, guide).detach(), found.gradient(u, guide).detach()
        for image in range(3):
            one = None if guide is None else guide[image : image + 1]
            torch.testing.assert_close(found.energy(u[image : image + 1], one)[0].detach(), energy[image])
            torch.testing.assert_close(found.gradient(u[image : image + 1], one)[0].detach(), gradient[image])


class TestGradient:
    @with_and_without_guide
    @pytest.mark.parametrize("size", SIZES)
    def test_central_differences_along_a_direction(self, size, guide_channels):
        found, u = network(guide_channels=guide_channels), maps(2, K, *size)
        guide = guide_of(found, u)
        gradient, step = found.gradient(u, guide).detach(), 1e-5
        assert gradient.shape == u.shape
        for seed in range(3):
            way = normal(*u.shape, seed=seed + 20)
            expected = (value(found, u + step * way, guide) - value(found, u - step * way, guide)) / (2 * step)
            assert float((gradient * way).sum()) == pytest.approx(expected, rel=1e-6, abs=1e-8)

    @with_and_without_guide
    def test_central_differences_of_every_entry(self, guide_channels):
        found, u = network(guide_channels=guide_channels), maps(1, K, 5, 4)
        guide, step = guide_of(found, u), 1e-5
        gradient = found.gradient(u, guide).detach()
        assert gradient.abs().max() > 1e-2
        expected = torch.zeros_like(u)
        for place in np.ndindex(*u.shape):
            one = torch.zeros_like(u)
            one[place] = step
            expected[place] = (value(found, u + one, guide) - value(found, u - one, guide)) / (2 * step)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)

    @with_and_without_guide
    def test_it_is_differentiable_in_the_map(self, guide_channels):
        found = network(2, 2, 1, 2, guide_channels=guide_channels)
        u = maps(1, 2, 3, 2).requires_grad_()
        guide = guide_of(found, u)
        assert torch.autograd.gradcheck(lambda at: found.gradient(at, guide), [u])

    def test_it_is_differentiable_in_the_guide(self):
        found = network(2, 2, 1, 2, guide_channels=G)
        u, guide = maps(1, 2, 3, 2), normal(1, G, 3, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda seen: found.gradient(u, seen), [guide])

    @with_and_without_guide
    def test_it_is_differentiable_in_the_parameters(self, guide_channels):
        found, u = network(guide_channels=guide_channels), maps(2, K, 5, 6)
        guide = guide_of(found, u)
        parameters = list(found.parameters())

        def loss():
            return found.gradient(u, guide).square().sum()

        loss().backward()
        assert all(float(parameter.grad.abs().max()) > 1e-8 for parameter in parameters)
        for number, parameter in enumerate(parameters):
            way, step, kept = normal(*parameter.shape, seed=number), 1e-5, parameter.detach().clone()
            around = []
            for sign in (1, -1):
                parameter.data.copy_(kept + sign * step * way)
                around.append(float(loss().detach()))
            parameter.data.copy_(kept)
            expected = (around[0] - around[1]) / (2 * step)
            assert float((parameter.grad * way).sum()) == pytest.approx(expected, rel=1e-5, abs=1e-7)

    @with_and_without_guide
    def test_the_energy_reaches_every_parameter(self, guide_channels):
        found, u = network(guide_channels=guide_channels), maps(2, K, 5, 6)
        found.energy(u, guide_of(found, u)).sum().backward()
        assert all(float(parameter.grad.abs().max()) > 1e-8 for parameter in found.parameters())

    def test_through_the_steps_of_a_flow(self):
        """A map that is no leaf."""
        found, start = network(), maps(1, K, 4, 5).requires_grad_()
        u = start
        for _ in range(2):
            u = (u.log() - 0.1 * found.gradient(u)).softmax(1)
        u.square().sum().backward()
        assert float(start.grad.abs().max()) > 1e-4
        assert float(found.filters.grad.abs().max()) > 1e-6

    @pytest.mark.parametrize("wanted", [True, False])
    def test_no_graph_under_no_grad(self, wanted):
        found, u = network(), maps(1, K, 4, 4).requires_grad_(wanted)
        with torch.no_grad():
            gradient = found.gradient(u)
        assert not gradient.requires_grad
        assert gradient.grad_fn is None
        torch.testing.assert_close(gradient, found.gradient(u).detach())
        assert found.gradient(u).requires_grad

    def test_nothing_is_left_behind(self):
        found, u = network(), maps(1, K, 4, 4)
        kept = u.clone()
        found.gradient(u)
        assert torch.equal(u, kept)
        assert not u.requires_grad
        assert u.grad is None
        assert all(parameter.grad is None for parameter in found.parameters())
        assert torch.is_grad_enabled()

    def test_single_precision(self):
        found = network()
        u = maps(2, K, 6, 5)
        expected = found.gradient(u).detach()
        gradient = found.float().gradient(u.float())
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-3, atol=1e-4)


def symmetrised(network, turned):
    """Every kernel of 3 x 3 the mean of itself and of its mirror image."""
    for parameter in network.parameters():
        if parameter.shape[-1] == 3:
            parameter.data.copy_((parameter + turned(parameter)) / 2)
    return network


class TestNothingMoves:
    """With symmetric kernels, a mirrored map has the mirrored energy, unless a change of scale shifts it.

    Every change of scale keeps the cells 0, 2, 4, ... of an axis. They lie the same from both ends where the number of
    cells is odd, at each scale: 1 + a multiple of 2^(scales - 1). An even axis has no such middle; there, structure
    far from the borders is mirrored about a pixel that all scales keep.
    """

    @pytest.mark.parametrize("axis", [-1, -2])
    @pytest.mark.parametrize(("scales", "side"), [(1, 4), (1, 7), (2, 3), (2, 7), (2, 9), (3, 1), (3, 5), (3, 13)])
    def test_mirrored(self, axis, scales, side):
        found = symmetrised(network(scales=scales), lambda kernel: kernel.flip(axis))
        u = maps(2, K, *((6, side) if axis == -1 else (side, 6)))
        assert found.energy(u).abs().max() > 1e-3
        torch.testing.assert_close(found.energy(u.flip(axis)), found.energy(u).flip(axis), rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(found.gradient(u.flip(axis)), found.gradient(u).flip(axis), rtol=1e-8, atol=1e-9)

    @pytest.mark.parametrize("scales", [2, 3])
    def test_mirrored_about_a_pixel_of_an_even_axis(self, scales):
        found = symmetrised(network(macro_blocks=1, scales=scales), lambda kernel: kernel.flip(-1))
        width, middle = 128, 64
        u = torch.full((1, K, 4, width), 1 / K, dtype=torch.float64)
        u[..., middle - 4 : middle + 6] = maps(1, K, 4, 10)
        energy = found.energy(u).detach()
        assert energy[..., middle - 8 : middle + 8].abs().max() > 1e-3
        assert energy[..., :8].abs().max() < 1e-12  # so that the borders have no part in it
        assert energy[..., -8:].abs().max() < 1e-12
        mirrored = found.energy(u.flip(-1).roll(1, -1)).detach()
        torch.testing.assert_close(mirrored, energy.flip(-1).roll(1, -1), rtol=1e-9, atol=1e-11)

    @pytest.mark.parametrize("side", [1, 2, 3, 6, 8])
    def test_transposed(self, side):
        """Rows and columns are treated alike, at any size."""
        found = symmetrised(network(), lambda kernel: kernel.transpose(-1, -2))
        u = maps(2, K, side, 7)
        expected = found.energy(u).transpose(-1, -2)
        torch.testing.assert_close(found.energy(u.transpose(-1, -2)), expected, rtol=1e-9, atol=1e-10)

    def test_structure_far_from_borders_has_its_energy_anywhere(self):
        found = network(macro_blocks=1)
        u = torch.full((1, K, 3, 128), 1 / K, dtype=torch.float64)
        u[..., 60:68] = maps(1, K, 3, 8)
        energy = found.energy(u).detach()
        for shift in (4, -8):
            moved = found.energy(u.roll(shift, -1)).detach()
            torch.testing.assert_close(moved, energy.roll(shift, -1), rtol=1e-9, atol=1e-11)


class TestErrors:
    @pytest.mark.parametrize("name", ["channels", "features", "macro_blocks", "scales"])
    def test_numbers_below_one(self, name):
        with pytest.raises(InputError) as raised:
            TotalDeepVariation(**{"channels": 2, name: 0})
        assert_one_line(raised, f"{name} 0", "at least 1")

    def test_negative_guide_channels(self):
        with pytest.raises(InputError) as raised:
            TotalDeepVariation(2, guide_channels=-1)
        assert_one_line(raised, "guide_channels")

    def test_the_error_names_the_guide_channels_that_were_given(self):
        with pytest.raises(InputError) as raised:
            TotalDeepVariation(2, guide_channels=-1)
        assert_one_line(raised, "guide_channels -1")

    @pytest.mark.parametrize("shape", [(2, K + 1, 4, 4), (2, 1, 4, 4), (K, 4, 4)])
    def test_maps_of_another_shape(self, shape):
        found = network()
        for method in (found.energy, found.gradient):
            with pytest.raises(InputError) as raised:
                method(torch.zeros(shape, dtype=torch.float64))
            assert_one_line(raised, str(tuple(shape)), f"(B,{K},H,W)")

    @pytest.mark.parametrize("shape", [None, (1, G, 4, 5), (2, G + 1, 4, 5), (2, G, 5, 4), (2, G, 1, 1)])
    def test_a_guide_that_is_missing_or_does_not_fit(self, shape):
        found = network(guide_channels=G)
        guide = None if shape is None else torch.zeros(shape, dtype=torch.float64)
        with pytest.raises(InputError) as raised:
            found.energy(maps(2, K, 4, 5), guide)
        assert_one_line(raised, "guide", str((2, G, 4, 5)))

    def test_a_guide_that_is_not_expected(self):
        with pytest.raises(InputError) as raised:
            network().energy(maps(2, K, 4, 5), torch.zeros(2, G, 4, 5, dtype=torch.float64))
        assert_one_line(raised, "guide", "not known")
