"""Prototype maps, merging and projections against loops in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tissuehint.errors import InputError
from tissuehint.nn.prototypes import (
    PrototypeProjection,
    by_class,
    check_counts,
    class_of_prototype,
    merge_prototypes,
    similarity_maps,
)

few = settings(max_examples=20, deadline=None)
COUNTS = [[1], [3], [1, 1, 1], [3, 3], [2, 1], [1, 4, 2], [2, 2, 5, 1]]
EXTRA = [(), (7,), (3, 4)]


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps_slowly(features, prototypes, scale=1.0, cosine=True):
    batch, dim, height, width = features.shape
    each = prototypes if prototypes.ndim == 3 else [prototypes] * batch
    maps = torch.zeros(batch, prototypes.shape[-2], height, width, dtype=torch.float64)
    for image in range(batch):
        for number, prototype in enumerate(each[image]):
            for row in range(height):
                for column in range(width):
                    cell = features[image, :, row, column].tolist()
                    product = sum(cell[channel] * float(prototype[channel]) for channel in range(dim))
                    length = math.sqrt(sum(value**2 for value in cell))
                    if cosine:
                        length *= math.sqrt(sum(float(value) ** 2 for value in prototype))
                    maps[image, number, row, column] = scale * product / length if length else 0
    return maps


def merge_slowly(values, counts, how):
    """Numbers and nothing else: one class, one place after the other."""
    flat = values.flatten(2) if values.ndim > 2 else values[..., None]
    result = torch.zeros(len(values), len(counts), flat.shape[2], dtype=torch.float64)
    for image in range(len(values)):
        first = 0
        for number, count in enumerate(counts):
            for place in range(flat.shape[2]):
                own = flat[image, first : first + count, place].tolist()
                weights = [1.0] * count if how == "mean" else [math.exp(value) for value in own]
                result[image, number, place] = sum(w * v for w, v in zip(weights, own, strict=True)) / sum(weights)
            first += count
    return result.reshape(len(values), len(counts), *values.shape[2:])


def assert_one_line(raised, *words):
    error, text = raised.value, str(raised.value)
    assert "\n" not in text
    assert error.subject
    assert error.rule
    assert error.fix
    assert all(word in text for word in words), text


class TestSimilarityMaps:
    @pytest.mark.parametrize("cosine", [True, False])
    @pytest.mark.parametrize("shape", [(2, 5, 3, 4), (1, 1, 2, 2), (3, 8, 1, 1)])
    def test_against_loops(self, shape, cosine):
        features, prototypes = normal(*shape), 3 * normal(6, shape[1], seed=1)
        maps = similarity_maps(features, prototypes, scale=2.5, normalize_prototypes=cosine)
        assert maps.shape == (shape[0], 6, *shape[2:])
        torch.testing.assert_close(maps, maps_slowly(features, prototypes, 2.5, cosine))

    @pytest.mark.parametrize("cosine", [True, False])
    def test_prototypes_of_each_image(self, cosine):
        features, prototypes = normal(3, 5, 2, 4), normal(3, 2, 5, seed=1)
        maps = similarity_maps(features, prototypes, normalize_prototypes=cosine)
        torch.testing.assert_close(maps, maps_slowly(features, prototypes, cosine=cosine))

    @few
    @given(st.integers(0, 10**6), st.floats(-4, 4), st.floats(-4, 4))
    def test_is_the_cosine_and_lengths_do_not_count(self, seed, longer, shorter):
        features, prototypes = normal(2, 4, 3, 2, seed=seed), normal(5, 4, seed=seed + 1)
        maps = similarity_maps(features * 10**longer, prototypes * 10**shorter)
        torch.testing.assert_close(maps, F.cosine_similarity(features[:, None], prototypes[None, ..., None, None], 2))
        assert maps.abs().max() <= 1 + 1e-12

    def test_single_precision(self):
        features, prototypes = normal(2, 512, 7, 7) + 0.5, normal(12, 512, seed=1) + 0.5
        maps = similarity_maps(features.float(), prototypes.float())
        assert maps.dtype == torch.float32
        expected = F.cosine_similarity(features[:, None], prototypes[None, ..., None, None], 2)
        torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=0)

    @pytest.mark.parametrize("cosine", [True, False])
    def test_scale(self, cosine):
        features, prototypes = normal(2, 4, 3, 2), normal(5, 4, seed=1)
        plain = similarity_maps(features, prototypes, normalize_prototypes=cosine)
        learned = nn.Parameter(torch.tensor(1 / 0.07, dtype=torch.float64))
        scaled = similarity_maps(features, prototypes, scale=learned, normalize_prototypes=cosine)
        torch.testing.assert_close(scaled, plain / 0.07)
        torch.autograd.backward(scaled.sum())
        torch.testing.assert_close(learned.grad, plain.sum())

    def test_the_extremes(self):
        prototypes = normal(3, 6)
        features = torch.stack([prototypes[0], -prototypes[0]])[..., None, None]
        maps = similarity_maps(features, prototypes, scale=3.0)[:, 0].flatten()
        assert maps.tolist() == pytest.approx([3, -3])

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("cosine", [True, False])
    def test_cells_without_length_are_like_nothing(self, dtype, cosine):
        features = torch.ones(1, 3, 2, 2, dtype=dtype)
        features[..., 0, 1] = 0
        maps = similarity_maps(features, torch.ones(2, 3, dtype=dtype), normalize_prototypes=cosine)
        assert maps[..., 0, 1].tolist() == [[0, 0]]
        assert maps.isfinite().all()
        assert (maps[..., 1, :] > 0.9).all()

    def test_prototypes_without_length_are_like_nothing(self):
        prototypes = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
        assert similarity_maps(torch.ones(1, 2, 1, 1), prototypes).flatten().tolist() == pytest.approx([0, 0.5**0.5])

    @pytest.mark.parametrize("cosine", [True, False])
    @pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4)])
    def test_gradients(self, cosine, shape):
        features, prototypes = normal(2, 4, 2, 3).requires_grad_(), normal(*shape, seed=1).requires_grad_()
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

        def maps(features, prototypes, scale):
            return similarity_maps(features, prototypes, scale=scale, normalize_prototypes=cosine)

        assert torch.autograd.gradcheck(maps, (features, prototypes, scale))

    @pytest.mark.parametrize("shape", [(3, 5), (2, 3, 5)])
    def test_other_channels(self, shape):
        with pytest.raises(InputError) as raised:
            similarity_maps(torch.ones(2, 4, 2, 2), torch.ones(shape))
        assert_one_line(raised, "5", "4", "project")


class TestMergePrototypes:
    @pytest.mark.parametrize("how", ["mean", "softmax"])
    @pytest.mark.parametrize("counts", COUNTS)
    @pytest.mark.parametrize("extra", EXTRA)
    def test_against_loops(self, how, counts, extra):
        values = 3 * normal(2, sum(counts), *extra)
        merged = merge_prototypes(values, counts, how)
        assert merged.shape == (2, len(counts), *extra)
        torch.testing.assert_close(merged, merge_slowly(values, counts, how))

    def test_the_mean_is_the_default(self):
        values = normal(2, 5)
        assert torch.equal(merge_prototypes(values, [2, 3]), merge_prototypes(values, [2, 3], "mean"))

    @few
    @given(
        st.lists(st.integers(1, 4), min_size=1, max_size=4), st.sampled_from(["mean", "softmax"]), st.integers(0, 10**6)
    )
    def test_order_within_a_class_does_not_count(self, counts, how, seed):
        values = normal(2, sum(counts), 2, seed=seed)
        order, first = [], 0
        for number, count in enumerate(counts):
            own = torch.randperm(count, generator=torch.Generator().manual_seed(seed + number)) + first
            order += own.tolist()
            first += count
        plain, shuffled = merge_prototypes(values, counts, how), merge_prototypes(values[:, order], counts, how)
        torch.testing.assert_close(plain, shuffled)

    @few
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 10**6))
    def test_between_mean_and_maximum(self, counts, seed):
        values = normal(2, sum(counts), 2, seed=seed)
        mean, soft = merge_prototypes(values, counts), merge_prototypes(values, counts, "softmax")
        most = torch.stack([part.amax(1) for part in values.split(counts, 1)], 1)
        assert (mean <= soft + 1e-12).all()
        assert (soft <= most + 1e-12).all()

    @pytest.mark.parametrize("counts", [[2, 2], [1, 3]])
    def test_softmax_of_large_values_is_the_maximum(self, counts):
        values = torch.tensor([[1e3, 9e4, -1e5, 0.0]])
        expected = [float(part.max()) for part in values[0].split(counts)]
        assert merge_prototypes(values, counts, "softmax")[0].tolist() == pytest.approx(expected)

    @pytest.mark.parametrize("how", ["mean", "softmax"])
    @pytest.mark.parametrize("counts", [[2, 2], [1, 3]])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_type_stays(self, how, counts, dtype):
        assert merge_prototypes(torch.ones(2, 4, 3, dtype=dtype), counts, how).dtype == dtype

    @pytest.mark.parametrize("how", ["mean", "softmax"])
    @pytest.mark.parametrize("counts", [[2, 2], [1, 3]])
    def test_gradients(self, how, counts):
        values = normal(2, 4, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda each: merge_prototypes(each, counts, how), (values,))

    @pytest.mark.parametrize("counts", [[6, 1, 3], [3, 3]])
    def test_training_after_inference(self, counts):
        """Lightning's sanity check evaluates in inference mode before the first training step."""
        with torch.inference_mode():
            merge_prototypes(torch.ones(1, sum(counts)), counts)
        values = torch.ones(1, sum(counts), requires_grad=True)
        torch.autograd.backward(merge_prototypes(values, counts).sum())
        assert values.grad[0].tolist() == pytest.approx([1 / count for count in counts for _ in range(count)])

    @pytest.mark.parametrize("counts", [[], [2, 2], [5, 0], [6, -1], [3, 3]])
    def test_wrong_counts(self, counts):
        for call in (lambda: merge_prototypes(torch.ones(1, 5), counts), lambda: check_counts(counts, 5)):
            with pytest.raises(InputError) as raised:
                call()
            assert_one_line(raised, str(counts), "5")

    @pytest.mark.parametrize("counts", [[2, 2], [1, 3]])
    def test_unknown_way(self, counts):
        with pytest.raises(InputError) as raised:
            merge_prototypes(torch.ones(1, 4), counts, "max")
        assert_one_line(raised, "'max'", "mean", "softmax")


class TestByClass:
    @pytest.mark.parametrize("counts", COUNTS)
    def test_rows_go_to_their_class_and_the_rest_is_zero(self, counts):
        prototypes = normal(sum(counts), 3)
        grouped = by_class(prototypes, counts)
        assert grouped.shape == (len(counts), max(counts), 3)
        first = 0
        for number, count in enumerate(counts):
            assert torch.equal(grouped[number, :count], prototypes[first : first + count])
            assert not grouped[number, count:].any()
            first += count

    def test_gradient_is_one_each(self):
        prototypes = normal(4, 3).requires_grad_()
        torch.autograd.backward(by_class(prototypes, [1, 3]).sum())
        assert torch.equal(prototypes.grad, torch.ones_like(prototypes))

    @pytest.mark.parametrize("counts", [[], [1, 2], [4, 3], [2, 2], [5, 0]])
    def test_no_prototype_is_lost(self, counts):
        with pytest.raises(InputError) as raised:
            by_class(torch.ones(5, 2), counts)
        assert_one_line(raised, str(counts), "5")

    @pytest.mark.parametrize("counts", COUNTS)
    def test_class_of_prototype(self, counts):
        classes = class_of_prototype(counts)
        assert classes == sorted(classes)
        assert [classes.count(number) for number in range(len(counts))] == counts


class TestPrototypeProjection:
    def test_layers(self):
        projection = PrototypeProjection(512, 64)
        assert [type(layer) for layer in projection] == [nn.Linear, nn.ReLU, nn.Linear]
        assert tuple(projection[0].weight.shape) == (256, 512)
        assert tuple(projection[2].weight.shape) == (64, 256)
        assert projection(torch.ones(12, 512)).shape == (12, 64)

    def test_start(self):
        """Biases 0; weights of a truncated normal of spread .02, as MiT's, whose bounds lie far outside."""
        torch.manual_seed(0)
        projection = PrototypeProjection(512, 320)
        for layer in (projection[0], projection[2]):
            weights = layer.weight.detach()
            assert not layer.bias.any()
            assert float(weights.mean()) == pytest.approx(0, abs=3e-4)
            assert float(weights.std()) == pytest.approx(0.02, rel=0.02)
            within = float((weights.abs() < 0.02).float().mean())
            assert within == pytest.approx(0.683, abs=0.01)

    def test_against_its_formula(self):
        projection, prototypes = PrototypeProjection(6, 4).double(), normal(5, 6)
        with torch.no_grad():
            for parameter in projection.parameters():
                parameter.copy_(normal(*parameter.shape, seed=parameter.numel()))
        first, second = projection[0], projection[2]
        hidden = (prototypes @ first.weight.T + first.bias).clamp_min(0)
        torch.testing.assert_close(projection(prototypes), hidden @ second.weight.T + second.bias)

    @pytest.mark.parametrize("dim", [1, 3])
    def test_few_channels(self, dim):
        assert PrototypeProjection(dim, 2)[0].out_features == max(1, dim // 2)
