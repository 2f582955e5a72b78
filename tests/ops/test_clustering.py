"""Spherical k-means against all partitions of a few features, scikit-learn on many, and what holds of any answer."""

import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from tissuehint.errors import InputError
from tissuehint.ops.clustering import spherical_kmeans

few = settings(max_examples=15, deadline=None)


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def unit(features):
    features = np.asarray(features, dtype=np.float64)
    return features / np.sqrt((features**2).sum(1, keepdims=True))


def objective(features, labels):
    """Sum of cosines to the best centres of a partition: the length of the summed directions of each cluster."""
    points, labels = unit(features), np.asarray(labels)
    return sum(np.sqrt((points[labels == each].sum(0) ** 2).sum()) for each in np.unique(labels))


def best_partition(features, k):
    """The largest objective of all partitions into exactly k clusters."""
    partitions = ((0, *rest) for rest in itertools.product(range(k), repeat=len(features) - 1))
    return max(objective(features, labels) for labels in partitions if len(set(labels)) == k)


def blobs(sizes, dim=16, spread=0.1, seed=0):
    """Features of any length around orthogonal directions, shuffled, and the direction of each."""
    random_state = np.random.default_rng(seed)
    labels = random_state.permutation(np.repeat(np.arange(len(sizes)), sizes))
    directions = np.linalg.qr(random_state.normal(size=(dim, dim)))[0][: len(sizes)]
    features = directions[labels] + spread * random_state.normal(size=(len(labels), dim)) / dim**0.5
    return torch.from_numpy(features * random_state.uniform(0.1, 10, (len(labels), 1))), labels


@st.composite
def feature_sets(draw, most=40):
    """(M,D) features without structure, some of them copies of others, and a k."""
    number, dim = draw(st.integers(1, most)), draw(st.integers(1, 6))
    features = normal(number, dim, seed=draw(st.integers(0, 10**6)))
    copies = draw(st.integers(0, number - 1))
    features[number - copies :] = features[: number - copies].repeat(number, 1)[:copies]
    return features, draw(st.integers(1, number))


def check(features, k, found):
    """What holds of every answer, as the docstring says it."""
    assert found.centres.shape == (k, features.shape[1])
    assert found.labels.shape == found.similarity.shape == (len(features),)
    assert found.labels.dtype == torch.int64
    np.testing.assert_allclose(found.centres.norm(dim=1), 1, atol=1e-6)
    sizes = np.bincount(found.labels, minlength=k)
    assert len(sizes) == k
    assert sizes.min() >= 1
    assert sizes.tolist() == sorted(sizes, reverse=True), "the largest cluster comes first"
    cosines = unit(features) @ found.centres.double().numpy().T
    np.testing.assert_allclose(found.similarity, cosines[range(len(features)), found.labels], atol=1e-6)
    assert found.similarity.abs().max() <= 1
    return cosines


class TestAgainstAllPartitions:
    @pytest.mark.parametrize(("number", "k"), [(4, 1), (5, 2), (7, 2), (6, 3), (7, 3), (6, 5), (5, 5)])
    @pytest.mark.parametrize("dim", [1, 2, 3, 8])
    def test_the_best_is_found(self, number, k, dim):
        features = normal(number, dim, seed=number * 10 + k)
        found = spherical_kmeans(features, k, restarts=60)
        best = best_partition(features, k)
        check(features, k, found)
        if dim > 1:
            assert objective(features, found.labels) == pytest.approx(best, rel=1e-9)
        # on a line directions are +1 and -1 only: k above 2 is a matter of ties
        assert float(found.similarity.sum()) <= best + 1e-9

    @few
    @given(st.integers(0, 10**6))
    def test_any_six_features_in_two_clusters(self, seed):
        features = normal(6, 3, seed=seed)
        found = spherical_kmeans(features, 2, restarts=60)
        assert float(found.similarity.sum()) == pytest.approx(best_partition(features, 2), rel=1e-9)

    def test_more_restarts_are_never_worse(self):
        features = normal(60, 4)
        sums = [float(spherical_kmeans(features, 6, restarts=number).similarity.sum()) for number in (1, 5, 40)]
        assert sums[0] < sums[2], "or this test shows nothing"
        # restarts of another number are other draws, but the best of 40 beats the best of few
        assert max(sums) == sums[2]

    def test_length_does_not_count(self):
        """Euclidean k-means would split the long ones from the short ones."""
        angles = torch.tensor([0.0, 0.1, 0.2, 1.5, 1.6, 1.7])
        lengths = torch.tensor([[1.0], [100.0], [1.0], [100.0], [1.0], [100.0]])
        found = spherical_kmeans(torch.stack([angles.cos(), angles.sin()], 1) * lengths, 2)
        assert adjusted_rand_score(found.labels, [0, 0, 0, 1, 1, 1]) == 1
        # the middle of three directions, each with the same weight
        middles = torch.tensor([[0.1], [1.6]])
        expected = torch.cat([middles.cos(), middles.sin()], 1)
        assert (found.centres @ expected.T).amax(0).numpy() == pytest.approx([1, 1], abs=1e-6)

    def test_opposite_directions_are_as_far_as_can_be(self):
        features = torch.tensor([[1.0, 0.1], [1.0, -0.1], [-1.0, 0.1], [-1.0, -0.1]])
        found = spherical_kmeans(features, 2)
        assert adjusted_rand_score(found.labels, [0, 0, 1, 1]) == 1


class TestAgainstScikitLearn:
    @pytest.mark.parametrize("sizes", [(50, 50), (100, 40, 10), (30,) * 10])
    @pytest.mark.parametrize("spread", [0.1, 0.5, 1.0, 2.0])
    def test_never_worse_on_blobs(self, sizes, spread):
        features, _ = blobs(sizes, spread=spread)
        k = len(sizes)
        found = spherical_kmeans(features, k)
        theirs = KMeans(k, n_init=10, random_state=0).fit(unit(features)).labels_
        # without structure (2.0) both end in some local maximum
        tolerance = 1e-3 if spread < 2 else 1e-2
        assert objective(features, found.labels) >= objective(features, theirs) * (1 - tolerance)

    @pytest.mark.parametrize("sizes", [(50, 50), (100, 40, 10), (30,) * 10])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_blobs_are_recovered(self, sizes, seed):
        features, expected = blobs(sizes, spread=0.5, seed=seed)
        theirs = KMeans(len(sizes), n_init=10, random_state=0).fit(unit(features)).labels_
        found = spherical_kmeans(features, len(sizes), seed=seed)
        assert adjusted_rand_score(found.labels, expected) == 1
        assert adjusted_rand_score(found.labels, theirs) == 1
        assert np.bincount(found.labels).tolist() == sorted(sizes, reverse=True)

    def test_starts_are_far_from_each_other(self):
        """Ten features at random hit ten blobs once in 3000 times, k-means++ nearly always."""
        features, expected = blobs((12,) * 10)
        found = [spherical_kmeans(features, 10, restarts=1, seed=seed).labels for seed in range(20)]
        assert sum(adjusted_rand_score(labels, expected) == 1 for labels in found) >= 15

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_blobs_a_tenth_of_a_degree_apart(self, dtype):
        """Deep features often lie in a narrow cone; the distances are then near the precision of float32."""
        angles = torch.tensor([0.0, 0.002]).repeat(20) + 1e-5 * normal(40, seed=3)
        features = torch.stack([angles.cos(), angles.sin()], 1).to(dtype)
        found = spherical_kmeans(features, 2)
        assert adjusted_rand_score(found.labels, [0, 1] * 20) == 1


class TestWhatAlwaysHolds:
    @few
    @given(feature_sets())
    def test_invariants(self, drawn):
        features, k = drawn
        check(features, k, spherical_kmeans(features, k, restarts=3))

    @few
    @given(feature_sets())
    def test_fixed_point(self, drawn):
        """No centre is nearer than the own one, and the own one is the middle of its cluster."""
        features, k = drawn
        found = spherical_kmeans(features, k, restarts=3)
        cosines = check(features, k, found)
        assert (cosines.max(1) - found.similarity.numpy()).max() < 1e-6
        for cluster in range(k):
            total = unit(features)[found.labels.numpy() == cluster].sum(0)
            if np.linalg.norm(total) > 1e-5:
                middle = total / np.linalg.norm(total)
                np.testing.assert_allclose(found.centres[cluster], middle, atol=1e-6)

    @few
    @given(st.integers(2, 30), st.integers(2, 6), st.integers(1, 5), st.integers(0, 10**6))
    def test_positive_factors_change_nothing(self, number, dim, k, seed):
        features, k = normal(number, dim, seed=seed), min(k, number)
        factors = torch.from_numpy(10.0 ** np.random.default_rng(seed).uniform(-3, 3, (number, 1)))
        plain, scaled = (spherical_kmeans(each, k, restarts=3) for each in (features, features * factors))
        assert torch.equal(plain.labels, scaled.labels)
        np.testing.assert_allclose(plain.centres, scaled.centres, atol=1e-9)
        np.testing.assert_allclose(plain.similarity, scaled.similarity, atol=1e-9)

    @pytest.mark.parametrize("factor", [1e-300, 1e-30, 1e30, 1e300])
    def test_very_short_and_very_long_features(self, factor):
        features, expected = blobs((20, 10), spread=0.5)
        features[::2] *= factor
        found = spherical_kmeans(features, 2)
        assert adjusted_rand_score(found.labels, expected) == 1
        check(features / features.abs().amax(1, keepdim=True), 2, found)

    @pytest.mark.parametrize("factor", [1e-38, 1e-30, 1e30, 1e37])
    def test_very_short_and_very_long_features_in_single_precision(self, factor):
        features, expected = blobs((20, 10), spread=0.5)
        features = torch.nn.functional.normalize(features).float()
        features[::2] *= factor
        assert adjusted_rand_score(spherical_kmeans(features, 2).labels, expected) == 1

    @few
    @given(st.integers(0, 10**6))
    def test_order_of_rows_on_blobs(self, seed):
        features, _ = blobs((12, 9, 5), spread=0.8, seed=seed)
        order = np.random.default_rng(seed).permutation(len(features))
        plain, shuffled = spherical_kmeans(features, 3), spherical_kmeans(features[order], 3)
        assert objective(features, plain.labels) == pytest.approx(objective(features[order], shuffled.labels), rel=1e-9)
        assert torch.equal(plain.labels[order], shuffled.labels)

    @few
    @given(feature_sets())
    def test_one_cluster_is_the_mean_direction(self, drawn):
        features, _ = drawn
        found = spherical_kmeans(features, 1)
        total = unit(features).sum(0)
        assert set(found.labels.tolist()) == {0}
        if np.linalg.norm(total) > 1e-3:
            np.testing.assert_allclose(found.centres[0], total / np.linalg.norm(total), atol=1e-9)

    def test_one_cluster_whose_features_cancel_out(self):
        found = spherical_kmeans(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), 1)
        assert float(found.centres.norm()) == pytest.approx(1)
        assert float(found.similarity.sum()) == pytest.approx(0)

    @few
    @given(st.integers(1, 12), st.integers(2, 6), st.integers(0, 10**6))
    def test_as_many_clusters_as_features(self, number, dim, seed):
        features = normal(number, dim, seed=seed)
        found = spherical_kmeans(features, number, restarts=2)
        assert sorted(found.labels.tolist()) == list(range(number))
        np.testing.assert_allclose(found.similarity, 1, atol=1e-9)
        np.testing.assert_allclose(found.centres[found.labels], unit(features), atol=1e-9)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("distinct", "number", "k"), [(1, 5, 3), (2, 9, 5), (3, 30, 10), (1, 4, 4)])
    def test_fewer_different_features_than_clusters(self, distinct, number, k, dtype):
        features = normal(distinct, 7).repeat(-(-number // distinct), 1)[:number].to(dtype)
        found = spherical_kmeans(features, k)
        check(features, k, found)
        np.testing.assert_allclose(found.similarity, 1, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize(("distinct", "number", "k"), [(3, 30, 3), (3, 30, 10), (20, 200, 25), (3, 3000, 4)])
    def test_copies_do_not_wander_between_clusters(self, distinct, number, k, dtype, monkeypatch):
        """Which of many equal centres has the largest cosine is a matter of rounding, and no reason to go on."""
        features = normal(distinct, 7).repeat(-(-number // distinct), 1)[:number].to(dtype)
        sweeps, argmax = [], torch.Tensor.argmax
        monkeypatch.setattr(torch.Tensor, "argmax", lambda *given: sweeps.append(1) or argmax(*given))
        spherical_kmeans(features, k, restarts=3)
        assert 0 < len(sweeps) < 50


class TestReproducibility:
    def test_the_seed_decides_and_no_global_generator_is_touched(self):
        features = normal(200, 8)
        states = [torch.get_rng_state(), random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
        first = spherical_kmeans(features, 9, restarts=1, seed=5)
        assert torch.equal(states[0], torch.get_rng_state())
        assert states[1:] == [random.getstate(), repr(np.random.get_state())]  # noqa: NPY002
        torch.manual_seed(17)
        second = spherical_kmeans(features, 9, restarts=1, seed=5)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        others = [spherical_kmeans(features, 9, restarts=1, seed=seed).labels for seed in range(5)]
        assert not all(torch.equal(first.labels, other) for other in others)

    def test_features_stay_as_they_are(self):
        features = normal(20, 4).requires_grad_()
        before = features.detach().clone()
        found = spherical_kmeans(features, 3)
        assert torch.equal(before, features.detach())
        assert not found.centres.requires_grad
        assert features.grad is None

    @pytest.mark.parametrize(
        ("given_type", "expected"),
        [
            (torch.float64, torch.float64),
            (torch.float32, torch.float32),
            (torch.float16, torch.float32),
            (torch.bfloat16, torch.float32),
        ],
    )
    def test_types(self, given_type, expected):
        features, labels = blobs((20, 10), spread=0.5)
        found = spherical_kmeans(features.to(given_type), 2)
        assert found.centres.dtype == found.similarity.dtype == expected
        assert adjusted_rand_score(found.labels, labels) == 1

    def test_double_precision_is_used(self):
        features = normal(50, 8)
        centres = spherical_kmeans(features, 3).centres
        np.testing.assert_allclose(centres.norm(dim=1), 1, atol=1e-14)
        labels = spherical_kmeans(features, 3).labels
        middle = unit(features)[labels.numpy() == 0].sum(0)
        np.testing.assert_allclose(centres[0], middle / np.linalg.norm(middle), atol=1e-14)


class TestErrors:
    def says(self, features, k, *words, **options):
        with pytest.raises(InputError) as raised:
            spherical_kmeans(features, k, **options)
        error, text = raised.value, str(raised.value)
        assert "\n" not in text
        assert error.subject
        assert error.rule
        assert error.fix
        assert all(word in text for word in words), text
        return error

    @pytest.mark.parametrize("k", [-1, 0, 6, 100])
    def test_number_of_clusters(self, k):
        self.says(normal(5, 3), k, f"k {k}", "1..5")

    @pytest.mark.parametrize("k", [-1, 0])
    def test_fewer_clusters_than_none_is_no_advice(self, k):
        assert "fewer clusters" not in self.says(normal(5, 3), k).fix

    def test_no_feature(self):
        self.says(normal(0, 3), 1)

    @pytest.mark.parametrize("shape", [(5,), (5, 3, 2), ()])
    def test_shape(self, shape):
        self.says(torch.ones(shape), 1, str(shape), "(M, D)")

    def test_features_without_channels(self):
        self.says(torch.ones(3, 0), 1)

    @pytest.mark.parametrize("value", [0.0, float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("where", [0, 3])
    def test_features_without_direction(self, value, where):
        features = normal(5, 3)
        features[where] = value
        self.says(features, 2, f"feature {where}")

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_single_number_that_is_not_finite(self, value):
        features = normal(5, 3)
        features[4, 1] = value
        self.says(features, 2, "feature 4", "not finite")

    @pytest.mark.parametrize("restarts", [0, -3])
    def test_restarts(self, restarts):
        self.says(normal(5, 3), 2, f"restarts {restarts}", restarts=restarts)
