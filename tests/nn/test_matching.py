"""Matching losses against their equations in loops, in double precision; chunks against plain differentiation."""

import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tissuehint.errors import InputError
from tissuehint.nn.masked_images import masked_image_losses
from tissuehint.nn.matching import (
    Pairs,
    adaptive_weights,
    class_pairs,
    drawn_pairs,
    matching_losses,
    prototype_pairs,
)

few = settings(max_examples=20, deadline=None)
FORMS = ["class", "prototype"]
SIZES = [(1, 2, 1), (5, 2, 1), (4, 3, 2), (7, 4, 3), (3, 5, 4)]  # M, N, K
DIM = 6


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integers(high, *shape, seed=0):
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(first, second):
    return first @ second / (first.square().sum().sqrt() * second.square().sum().sqrt())


def exponential(value):
    return math.exp(value) if isinstance(value, float) else value.exp()


def class_form(front, back, prototypes, number, temperature, counts):
    """Eq. 9-12 for one pair, term by term."""
    own_sum = other_sum = own_mean = other_mean = 0.0
    others = sum(counts) - counts[number]
    for other, count in enumerate(counts):
        for k in range(count):
            if other == number:
                own_sum = own_sum + cosine(front, prototypes[other, k])
                own_mean = own_mean + cosine(back, prototypes[other, k]) / count
            else:
                other_sum = other_sum + cosine(front, prototypes[other, k])
                other_mean = other_mean + cosine(back, prototypes[other, k]) / others
    own, other = exponential(own_sum / temperature), exponential(other_sum / temperature)
    of_front = -(own / (own + other)).log()
    own, other = exponential(own_mean / temperature), exponential(other_mean / temperature)
    return of_front, -(other / (own + other)).log()


def prototype_form(front, back, prototypes, number, temperature, counts, own):
    if own is None:
        cosines = [float(cosine(front, prototypes[number, k]).detach()) for k in range(counts[number])]
        own = cosines.index(max(cosines))
    places = [(other, k) for other, count in enumerate(counts) for k in range(count)]
    fronts = {place: exponential(cosine(front, prototypes[place]) / temperature) for place in places}
    backs = {place: exponential(cosine(back, prototypes[place]) / temperature) for place in places}
    of_front = -(fronts[number, own] / sum(fronts.values())).log()
    others = sum(value for place, value in backs.items() if place != (number, own))
    return of_front, -(others / sum(backs.values())).log()


def losses_slowly(foreground, background, prototypes, classes, *, temperature=1.0, form="class", own=None, counts=None):
    counts = [prototypes.shape[1]] * len(prototypes) if counts is None else counts
    totals = [torch.zeros((), dtype=torch.float64)] * 2
    for pair, number in enumerate(classes.tolist()):
        given = foreground[pair], background[pair], prototypes, number, temperature, counts
        if form == "class":
            found = class_form(*given)
        else:
            found = prototype_form(*given, None if own is None else int(own[pair]))
        totals = [total + each / len(classes) for total, each in zip(totals, found, strict=True)]
    return totals


def case(pairs, number, most, *, seed=0):
    """Features, prototypes of any length, and classes."""
    prototypes = normal(number, most, DIM, seed=seed + 2) * (1 + 9 * uniform(number, most, 1, seed=seed + 3))
    classes = integers(number, pairs, seed=seed + 4)
    return 5 * normal(pairs, DIM, seed=seed), normal(pairs, DIM, seed=seed + 1), prototypes, classes


def counts_of(number, most):
    """Unequal, the largest being K."""
    return [most - (each % most) for each in range(number)]


def own_of(classes, counts, seed=9):
    return (uniform(len(classes), seed=seed) * torch.tensor(counts)[classes]).long()


def assert_one_line(raised, *words):
    error, text = raised.value, str(raised.value)
    assert "\n" not in text
    assert error.subject
    assert error.rule
    assert error.fix
    assert all(word in text for word in words), text


class TestLossesAgainstLoops:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("temperature", [1.0, 0.07])
    @pytest.mark.parametrize("form", FORMS)
    def test_values(self, size, temperature, form):
        options = {"temperature": temperature, "form": form}
        torch.testing.assert_close(
            torch.stack(matching_losses(*case(*size), **options)), torch.stack(losses_slowly(*case(*size), **options))
        )

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("form", FORMS)
    def test_unequal_counts_and_own(self, size, form):
        given, counts = case(*size), counts_of(*size[1:])
        for own in (None, own_of(given[3], counts)):
            options = {"temperature": 0.3, "form": form, "counts": counts, "own": own}
            torch.testing.assert_close(
                torch.stack(matching_losses(*given, **options)), torch.stack(losses_slowly(*given, **options))
            )

    @few
    @given(st.integers(1, 6), st.integers(2, 4), st.integers(1, 3), st.sampled_from(FORMS), st.integers(0, 10**6))
    def test_any_case(self, pairs, number, most, form, seed):
        given = case(pairs, number, most, seed=seed)
        counts = (integers(most, number, seed=seed) + 1).tolist()
        options = {"form": form, "counts": counts, "temperature": 0.5}
        torch.testing.assert_close(
            torch.stack(matching_losses(*given, **options)), torch.stack(losses_slowly(*given, **options))
        )

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("with_counts", [False, True])
    @pytest.mark.parametrize("with_own", [False, True])
    def test_gradients(self, form, with_counts, with_own):
        front, back, prototypes, classes = case(4, 3, 2)
        counts = counts_of(3, 2) if with_counts else None
        own = own_of(classes, counts or [2] * 3) if with_own else None
        given = [each.clone().requires_grad_() for each in (front, back, prototypes)]

        def losses(front, back, prototypes):
            return matching_losses(front, back, prototypes, classes, form=form, counts=counts, own=own, temperature=0.5)

        assert torch.autograd.gradcheck(losses, given)
        slow = losses_slowly(*given, classes, form=form, counts=counts, own=own, temperature=0.5)
        for fast, expected in zip(losses(*given), slow, strict=True):
            found = torch.autograd.grad(fast, given, allow_unused=True, materialize_grads=True, retain_graph=True)
            wanted = torch.autograd.grad(expected, given, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(found, wanted)


class TestLosses:
    @few
    @given(st.sampled_from(FORMS), st.integers(0, 10**6))
    def test_lengths_do_not_count(self, form, seed):
        front, back, prototypes, classes = case(4, 3, 2, seed=seed)
        longer = front * (1 + uniform(4, 1)), back * 1e-3, prototypes * (0.1 + uniform(3, 2, 1)), classes
        torch.testing.assert_close(
            matching_losses(front, back, prototypes, classes, form=form), matching_losses(*longer, form=form)
        )

    @few
    @given(st.sampled_from(FORMS), st.integers(0, 10**6))
    def test_order_of_pairs_and_of_subclasses_does_not_count(self, form, seed):
        front, back, prototypes, classes = case(5, 3, 3, seed=seed)
        order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(
            matching_losses(front, back, prototypes, classes, form=form),
            matching_losses(front[order], back[order], prototypes[:, [2, 0, 1]], classes[order], form=form),
        )

    @pytest.mark.parametrize(("number", "most"), [(2, 1), (3, 2), (4, 3)])
    def test_best_and_worst_of_the_class_form(self, number, most):
        """Classes along axes: foregrounds a = K or 0, backgrounds a mean of 1 or 0."""
        prototypes = torch.eye(number)[:, None].repeat(1, most, 1)
        classes = torch.arange(number)
        own, other = torch.eye(number), torch.eye(number).roll(1, 0)
        best = matching_losses(own, other, prototypes, classes)
        worst = matching_losses(other, own, prototypes, classes)
        # the other class fills 1/(N-1) of the mean over the others
        assert float(best[0]) == pytest.approx(math.log1p(math.exp(-most)), rel=1e-5)
        assert float(worst[0]) == pytest.approx(math.log1p(math.exp(most)), rel=1e-5)
        assert float(best[1]) == pytest.approx(math.log1p(math.exp(-1 / (number - 1))), rel=1e-5)
        assert float(worst[1]) == pytest.approx(math.log1p(math.exp(1)), rel=1e-5)

    def test_best_and_worst_of_the_prototype_form(self):
        prototypes, classes = torch.eye(4, dtype=torch.float64).view(2, 2, 4), torch.tensor([0, 1])
        own, other = prototypes[:, 1], prototypes[[1, 0], 0]
        best = matching_losses(own, other, prototypes, classes, form="prototype", own=torch.tensor([1, 1]))
        worst = matching_losses(other, own, prototypes, classes, form="prototype", own=torch.tensor([1, 1]))
        e = math.e
        assert float(best[0]) == pytest.approx(-math.log(e / (e + 3)))
        assert float(best[1]) == pytest.approx(-math.log((e + 2) / (e + 3)))
        assert float(worst[0]) == pytest.approx(-math.log(1 / (e + 3)))
        assert float(worst[1]) == pytest.approx(-math.log(3 / (e + 3)))

    def test_the_own_class_is_an_opponent_in_the_prototype_form(self):
        prototypes = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[0.0, 1.0], [0.0, -1.0]]])
        alone = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
        front, classes = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
        crowded = matching_losses(front, front, prototypes, classes, form="prototype")[0]
        assert crowded > matching_losses(front, front, alone, classes, form="prototype")[0]

    @pytest.mark.parametrize("form", FORMS)
    def test_low_temperature_in_single_precision(self, form):
        """Neither overflow nor a difference of equal sums, however sure."""
        prototypes, classes = torch.eye(3)[:, None], torch.tensor([0])
        own, other = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[-1.0, 0.0, 0.0]])
        options = {"temperature": 0.001, "form": form}
        best = matching_losses(own, other, prototypes, classes, **options)
        worst = matching_losses(other, own, prototypes, classes, **options)
        assert [float(each) for each in best] == pytest.approx([0, 0])
        expected = losses_slowly(
            other.double(), own.double(), prototypes.double(), classes, temperature=0.01, form=form
        )
        found = matching_losses(other, own, prototypes, classes, temperature=0.01, form=form)
        assert [float(each) for each in found] == pytest.approx([float(each) for each in expected], rel=1e-5)
        assert all(900 < float(each) < 1100 for each in worst)

    def test_a_sure_background_keeps_its_digits(self):
        """1 - p in single precision is 0 for p = 1 - 1e-9; the loss is about 1e-9 all the same."""
        prototypes, classes = torch.eye(2)[:, None], torch.tensor([0])
        sure = torch.tensor([[0.0, 1.0]])
        for form in FORMS:
            found = matching_losses(sure, sure, prototypes, classes, form=form, temperature=0.05)[1]
            assert float(found) == pytest.approx(math.log1p(math.exp(-20)), rel=1e-4)

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("garbage", [0.0, 1e3, -1e30, float("inf"), float("nan")])
    def test_rows_behind_the_counts_are_not_read(self, form, garbage):
        front, back, prototypes, classes = (
            each.float() if each.is_floating_point() else each for each in case(6, 3, 3)
        )
        counts = [2, 1, 3]
        filled = prototypes.clone()
        filled[0, 2:], filled[1, 1:] = garbage, garbage
        filled.requires_grad_()
        found = matching_losses(front, back, filled, classes, form=form, counts=counts)
        expected = losses_slowly(front.double(), back.double(), prototypes.double(), classes, form=form, counts=counts)
        assert [float(each.detach()) for each in found] == pytest.approx([float(each) for each in expected], rel=1e-5)
        (gradient,) = torch.autograd.grad(sum(found), filled)
        assert gradient.isfinite().all()
        assert not gradient[0, 2:].any()
        assert not gradient[1, 1:].any()
        assert gradient[2].any()

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("counts", [None, [1, 2, 2]])
    def test_no_pair(self, form, counts):
        front, back, prototypes, classes = case(0, 3, 2)
        given = [each.requires_grad_() for each in (front, back, prototypes)]
        losses = matching_losses(*given, classes, form=form, counts=counts)
        assert [float(each.detach()) for each in losses] == [0, 0]
        for gradient in torch.autograd.grad(sum(losses), given, allow_unused=True, materialize_grads=True):
            assert not gradient.any()
        with_own = matching_losses(*given, classes, form=form, own=classes)
        assert [float(each.detach()) for each in with_own] == [0, 0]

    @pytest.mark.parametrize("form", FORMS)
    def test_types(self, form):
        front, back, prototypes, classes = case(4, 3, 2)
        expected = matching_losses(front, back, prototypes, classes, form=form)
        assert expected[0].dtype == torch.float64
        half = matching_losses(front.half(), back.half(), prototypes.float(), classes, form=form)
        assert half[0].dtype == half[1].dtype == torch.float32
        assert [float(each) for each in half] == pytest.approx([float(each) for each in expected], rel=5e-3)

    @pytest.mark.parametrize("form", FORMS)
    def test_mixed_precision_does_not_reach_the_losses(self, form):
        """At a temperature of .07, three digits of a cosine are one of the loss."""
        front, back, prototypes, classes = (
            each.float() if each.is_floating_point() else each for each in case(6, 3, 2)
        )
        options = {"form": form, "temperature": 0.07}
        expected = matching_losses(front, back, prototypes, classes, **options)
        with torch.autocast("cpu", torch.bfloat16):
            found = matching_losses(front, back, prototypes, classes, **options)
        assert [float(each) for each in found] == pytest.approx([float(each) for each in expected], rel=1e-5)


class TestErrorsOfLosses:
    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"form": "pixel"}, ["'pixel'", "class", "prototype"]),
            ({"temperature": 0.0}, ["temperature 0.0", "above 0"]),
            ({"temperature": -1.0}, ["temperature -1.0"]),
            ({"temperature": float("nan")}, ["temperature nan"]),
            ({"prototypes": normal(1, 2, DIM)}, ["(1, 2, 6)", "two classes"]),
            ({"prototypes": normal(6, DIM)}, ["(6, 6)", "(N, K, D)"]),
            ({"prototypes": normal(3, 2, DIM + 1)}, ["foreground", "(4, 6)", "(4, 7)"]),
            ({"foreground": normal(3, DIM)}, ["foreground", "(3, 6)", "4 pairs"]),
            ({"background": normal(5, DIM)}, ["background", "(5, 6)", "4 pairs"]),
            ({"background": normal(4, DIM - 1)}, ["background", "(4, 5)"]),
            ({"counts": [2, 2]}, ["[2, 2]", "3 classes"]),
            ({"counts": [2, 0, 1]}, ["[2, 0, 1]"]),
            ({"counts": [2, 3, 1]}, ["[2, 3, 1]"]),
        ],
    )
    def test_one_line(self, changes, words):
        names = ["foreground", "background", "prototypes", "classes"]
        arguments = dict(zip(names, case(4, 3, 2), strict=True)) | changes
        with pytest.raises(InputError) as raised:
            matching_losses(**arguments)
        assert_one_line(raised, *words)


def weights_slowly(maps, threshold):
    """Eq. 4 and 5 pixel by pixel, with maps scaled to [0,1]."""
    front, back = torch.zeros_like(maps), torch.zeros_like(maps)
    for number, each in enumerate(maps.tolist()):
        highest = max(max(0.0, value) for row in each for value in row)
        for y, row in enumerate(each):
            for x, value in enumerate(row):
                scaled = max(0.0, value) / highest if highest else 0.0
                chosen = threshold is None or (highest > 0 and scaled >= threshold)
                front[number, y, x] = scaled if chosen else 0
                back[number, y, x] = 1 - scaled if threshold is None or not chosen else 0
    return front, back


class TestAdaptiveWeights:
    @pytest.mark.parametrize("threshold", [None, 0.0, 0.15, 0.5, 1.0])
    def test_against_loops(self, threshold):
        maps = torch.cat([normal(5, 4, 3), -uniform(1, 4, 3), torch.zeros(1, 4, 3), 50 * uniform(1, 4, 3)])
        torch.testing.assert_close(adaptive_weights(maps, threshold), weights_slowly(maps, threshold))

    @few
    @given(st.integers(0, 10**6), st.sampled_from([None, 0.0, 0.15, 0.5, 1.0]), st.integers(-10, 10))
    def test_ranges_and_scale(self, seed, threshold, exponent):
        maps = normal(4, 3, 5, seed=seed)
        front, back = adaptive_weights(maps, threshold)
        for weights in (front, back):
            assert weights.min() >= 0
            assert weights.max() <= 1
        torch.testing.assert_close(front.amax((1, 2)), (maps.amax((1, 2)) > 0).double())
        if threshold is not None:
            assert not (front * back).any(), "a pixel is either foreground or background"
        factors = 2.0**exponent * torch.tensor([1, 2, 4, 0.5]).view(4, 1, 1)
        assert all(map(torch.equal, (front, back), adaptive_weights(maps * factors, threshold)))

    def test_each_map_by_itself(self):
        maps = normal(3, 4, 4)
        together = adaptive_weights(maps, 0.5)
        for number in range(3):
            alone = adaptive_weights(maps[number : number + 1], 0.5)
            assert all(torch.equal(a[0], b[number]) for a, b in zip(alone, together, strict=True))

    def test_the_extreme_thresholds(self):
        maps = torch.tensor([[[4.0, 2.0, -1.0]]])
        assert adaptive_weights(maps, 0.0)[0].tolist() == [[[1, 0.5, 0]]]
        assert adaptive_weights(maps, 0.0)[1].tolist() == [[[0, 0, 0]]]
        assert adaptive_weights(maps, 1.0)[0].tolist() == [[[1, 0, 0]]]
        assert adaptive_weights(maps, 1.0)[1].tolist() == [[[0, 0.5, 1]]]
        assert adaptive_weights(maps, None)[1].tolist() == [[[0, 0.5, 1]]]

    @pytest.mark.parametrize("threshold", [None, 0.0, 0.15, 1.0])
    @pytest.mark.parametrize("value", [-2.0, 0.0])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_a_map_without_a_positive_part_is_background(self, threshold, value, dtype):
        maps = torch.full((1, 2, 3), value, dtype=dtype, requires_grad=True)
        front, back = adaptive_weights(maps, threshold)
        assert front.dtype == back.dtype == dtype
        assert (front == 0).all()
        assert (back == 1).all()
        (gradient,) = torch.autograd.grad((front + 2 * back).sum(), maps)
        assert gradient.isfinite().all()

    @pytest.mark.parametrize("threshold", [None, 0.3])
    def test_gradients(self, threshold):
        maps = normal(2, 3, 3).requires_grad_()
        assert torch.autograd.gradcheck(lambda each: adaptive_weights(each, threshold), (maps,))

    def test_no_map(self):
        assert [tuple(each.shape) for each in adaptive_weights(torch.zeros(0, 3, 3), 0.5)] == [(0, 3, 3)] * 2


class TestPairs:
    def test_classes_against_loops(self):
        tags = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1]])
        expected = [(b, n) for b in range(4) for n in range(3) if tags[b, n]]
        for each in (tags, tags.float(), tags.bool()):
            pairs = class_pairs(each)
            assert list(zip(pairs.images.tolist(), pairs.classes.tolist(), strict=True)) == expected
            assert pairs.own is None

    @few
    @given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(0, 10**6))
    def test_prototypes_against_loops(self, counts, seed):
        tags, scores = integers(2, 5, len(counts), seed=seed), normal(5, sum(counts), seed=seed)
        expected = []
        for image in range(5):
            first = 0
            for number, count in enumerate(counts):
                own = scores[image, first : first + count].tolist()
                for k, score in enumerate(own):
                    if tags[image, number] and (score > sum(own) / count or score == max(own)):
                        expected.append((image, number, k))
                first += count
        pairs = prototype_pairs(tags, scores, counts)
        assert list(zip(*(each.tolist() for each in pairs), strict=True)) == expected

    @pytest.mark.parametrize("counts", [[3, 3], [5, 2], [1, 7], [1, 1]])
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_of_equal_scores_one_is_taken(self, counts, dtype):
        """None is above the mean, whatever the rounding of that mean."""
        scores = uniform(200, 1).to(dtype).expand(200, sum(counts))
        pairs = prototype_pairs(torch.ones(200, 2), scores, counts)
        assert pairs.images.tolist() == [image for image in range(200) for _ in range(2)]
        assert pairs.classes.tolist() == [0, 1] * 200

    def test_ties_above_the_mean_are_all_taken(self):
        pairs = prototype_pairs(torch.ones(1, 2), torch.tensor([[2.0, 2.0, 0.0, 1.0]]), [3, 1])
        assert [each.tolist() for each in pairs] == [[0, 0, 0], [0, 0, 1], [0, 1, 0]]

    def test_negative_scores_and_absent_places(self):
        """A place that does not exist is neither 0 in the mean nor the best."""
        pairs = prototype_pairs(torch.ones(1, 2), torch.tensor([[-5.0, -6.0, -1.0, -2.0, -9.0]]), [2, 3])
        assert [each.tolist() for each in pairs] == [[0, 0, 0], [0, 1, 1], [0, 0, 1]]

    def test_scores_get_no_gradient_and_stay(self):
        scores = normal(2, 4).requires_grad_()
        before = scores.detach().clone()
        pairs = prototype_pairs(torch.ones(2, 2), scores, [2, 2])
        assert not any(each.requires_grad for each in pairs)
        assert torch.equal(scores.detach(), before)

    def test_no_tag(self):
        for pairs in (class_pairs(torch.zeros(2, 3)), prototype_pairs(torch.zeros(2, 3), normal(2, 6), [2, 1, 3])):
            assert len(pairs.images) == len(pairs.classes) == 0

    def test_wrong_counts(self):
        with pytest.raises(InputError) as raised:
            prototype_pairs(torch.ones(2, 2), normal(2, 5), [2, 2])
        assert_one_line(raised, "[2, 2]", "5")


class Encoder(nn.Module):
    """A small encoder with curvature that remembers what it saw."""

    def __init__(self, frozen=True):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 3 * 3, DIM)).double()
        self.requires_grad_(not frozen)
        self.eval()
        self.seen = []

    def forward(self, pictures):
        self.seen.append(len(pictures))
        return self.layers(pictures)


class Packed:
    def __init__(self, tensor):
        self.tensor = tensor.detach()  # an output holds the graph that would hold it


class Kept(saved_tensors_hooks):
    """How many numbers autograd keeps for the backward pass, now and at most."""

    def __init__(self):
        self.packed, self.peak = weakref.WeakSet(), 0
        super().__init__(self.pack, lambda packed: packed.tensor)

    def pack(self, tensor):
        packed = Packed(tensor)
        self.packed.add(packed)
        self.peak = max(self.peak, self.alive())
        return packed

    def alive(self):
        return sum(each.tensor.numel() for each in self.packed)


def scene(pairs=7, *, own=False, counts=(2, 1, 3), seed=0):
    """Maps of both kinds, images, pairs in no order, prototypes."""
    classes = integers(len(counts), pairs, seed=seed)
    places = Pairs(integers(3, pairs, seed=seed + 1), classes, own_of(classes, counts) if own else None)
    maps = [uniform(pairs, 5, 5, seed=seed + 2 + number).requires_grad_() for number in range(2)]
    prototypes = normal(len(counts), max(counts), DIM, seed=seed + 4).requires_grad_()
    return maps[0], maps[1], normal(3, 3, 5, 5, seed=seed + 5), places, prototypes


def plainly(foreground, background, images, pairs, prototypes, encode, **options):
    """All pictures at once, differentiated by torch alone."""
    features = [
        encode(torch.stack([each[p] * images[b] for p, b in enumerate(pairs.images.tolist())]))
        for each in (foreground, background)
    ]
    return matching_losses(*features, prototypes, pairs.classes, own=pairs.own, **options)


def differentiate(losses, wanted, factors=(1.0, 1.0)):
    total = sum(factor * loss for factor, loss in zip(factors, losses, strict=True) if loss is not None)
    return torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)


class TestMaskedImageLosses:
    @pytest.mark.parametrize("chunk", [1, 2, 3, 7, 50])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("own", [False, True])
    def test_chunks_change_nothing(self, chunk, form, own):
        front, back, images, pairs, prototypes = scene(own=own)
        options = {"form": form, "temperature": 0.4, "counts": [2, 1, 3]}
        found = masked_image_losses(front, back, images, pairs, prototypes, Encoder(), chunk=chunk, **options)
        expected = plainly(front, back, images, pairs, prototypes, Encoder(), **options)
        torch.testing.assert_close(found, expected)
        for factors in ((1.0, 1.0), (0.7, -2.0)):
            wanted = [front, back, prototypes]
            again = masked_image_losses(front, back, images, pairs, prototypes, Encoder(), chunk=chunk, **options)
            slow = plainly(front, back, images, pairs, prototypes, Encoder(), **options)
            torch.testing.assert_close(differentiate(again, wanted, factors), differentiate(slow, wanted, factors))

    @pytest.mark.parametrize("chunk", [2, 50])
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("left_out", [0, 1])
    def test_one_of_the_two(self, chunk, form, left_out):
        front, back, images, pairs, prototypes = scene(own=True)
        maps = [None if number == left_out else each for number, each in enumerate((front, back))]
        options = {"form": form, "counts": [2, 1, 3]}
        found = masked_image_losses(*maps, images, pairs, prototypes, Encoder(), chunk=chunk, **options)
        expected = plainly(front, back, images, pairs, prototypes, Encoder(), **options)
        assert found[left_out] is None
        torch.testing.assert_close(found[1 - left_out], expected[1 - left_out])
        wanted = [(front, back)[1 - left_out], prototypes]
        torch.testing.assert_close(
            differentiate([found[1 - left_out]], wanted, [3.0]),
            differentiate([expected[1 - left_out]], wanted, [3.0]),
        )

    def test_the_foreground_alone_finds_its_own_prototype(self):
        front, back, images, pairs, prototypes = scene()
        options = {"form": "prototype", "counts": [2, 1, 3]}
        found = masked_image_losses(front, None, images, pairs, prototypes, Encoder(), chunk=2, **options)
        expected = plainly(front, back, images, pairs, prototypes, Encoder(), **options)
        torch.testing.assert_close(found[0], expected[0])

    def test_the_background_alone_needs_an_own_prototype(self):
        _, back, images, pairs, prototypes = scene()
        with pytest.raises(InputError) as raised:
            masked_image_losses(None, back, images, pairs, prototypes, Encoder(), form="prototype")
        assert_one_line(raised, "pairs", "own")

    def test_neither(self):
        encoder = Encoder()
        _, _, images, pairs, prototypes = scene()
        assert masked_image_losses(None, None, images, pairs, prototypes, encoder) == (None, None)
        assert not encoder.seen

    @pytest.mark.parametrize("form", FORMS)
    def test_the_numbers(self, form):
        """By finite differences, which know neither chunks nor torch's rules."""
        front, back, images, pairs, prototypes = scene(3, own=True)
        encoder = Encoder()

        def losses(front, back, prototypes):
            return masked_image_losses(front, back, images, pairs, prototypes, encoder, chunk=2, form=form)

        assert torch.autograd.gradcheck(losses, (front, back, prototypes), fast_mode=True)

    @pytest.mark.parametrize("kept", [[0], [1], [2], [0, 1], [0, 2]])
    def test_only_what_is_asked_for_gets_a_gradient(self, kept):
        front, back, images, pairs, prototypes = scene()
        leaves = [front, back, prototypes]
        given = [each if number in kept else each.detach() for number, each in enumerate(leaves)]
        found = masked_image_losses(*given[:2], images, pairs, given[2], Encoder(), chunk=3)
        expected = plainly(front, back, images, pairs, prototypes, Encoder())
        torch.testing.assert_close(
            differentiate(found, [leaves[number] for number in kept]),
            differentiate(expected, [leaves[number] for number in kept]),
        )
        assert all(not given[number].requires_grad for number in range(3) if number not in kept)

    def test_gradients_reach_the_maps_behind_the_weights(self):
        _, _, images, pairs, prototypes = scene()
        maps = normal(7, 5, 5, seed=8).requires_grad_()
        found = masked_image_losses(*adaptive_weights(maps, 0.2), images, pairs, prototypes, Encoder(), chunk=2)
        expected = plainly(*adaptive_weights(maps, 0.2), images, pairs, prototypes, Encoder())
        torch.testing.assert_close(differentiate(found, [maps]), differentiate(expected, [maps]))

    @pytest.mark.parametrize("frozen", [True, False])
    def test_the_encoder_gets_no_gradient(self, frozen):
        encoder = Encoder(frozen)
        front, back, images, pairs, prototypes = scene()
        torch.autograd.backward(sum(masked_image_losses(front, back, images, pairs, prototypes, encoder, chunk=3)))
        assert all(parameter.grad is None for parameter in encoder.parameters())
        assert front.grad.any()
        assert back.grad.any()
        assert prototypes.grad.any()

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients(self, mode):
        front, back, images, pairs, prototypes = scene()
        expected = plainly(front, back, images, pairs, prototypes, Encoder())
        with mode():
            found = masked_image_losses(front, back, images, pairs, prototypes, Encoder(), chunk=3)
        assert not any(each.requires_grad for each in found)
        assert [float(each) for each in found] == pytest.approx([float(each.detach()) for each in expected])

    def test_without_gradients_nothing_is_differentiated(self):
        seen = []

        def encode(pictures):
            seen.append(pictures.requires_grad)
            return pictures.flatten(1)[:, :DIM]

        with torch.no_grad():
            masked_image_losses(*scene(), encode, chunk=3)
        assert seen == [False] * 3

    def test_inputs_stay_as_they_are(self):
        given = scene()
        before = [each.detach().clone() for each in (*given[:3], given[4])]
        found = masked_image_losses(*given, Encoder(), chunk=3)
        torch.autograd.backward(sum(found))
        assert all(map(torch.equal, before, (each.detach() for each in (*given[:3], given[4]))))

    @pytest.mark.parametrize("form", FORMS)
    def test_no_pair(self, form):
        front, back, images, pairs, prototypes = scene(0)
        encoder = Encoder()
        found = masked_image_losses(front, back, images, pairs, prototypes, encoder, form=form, counts=[2, 1, 3])
        assert [float(each.detach()) for each in found] == [0, 0]
        gradients = differentiate(found, [front, back, prototypes])
        assert [each.shape for each in gradients] == [front.shape, back.shape, prototypes.shape]
        assert not any(each.any() for each in gradients)
        assert not encoder.seen

    @pytest.mark.parametrize(("pairs", "chunk"), [(7, 1), (7, 3), (6, 3), (7, 7), (5, 100)])
    @pytest.mark.parametrize("both", [True, False])
    def test_each_picture_is_encoded_once_and_few_at_a_time(self, pairs, chunk, both):
        encoder = Encoder()
        front, back, images, places, prototypes = scene(pairs)
        losses = masked_image_losses(front, back if both else None, images, places, prototypes, encoder, chunk=chunk)
        torch.autograd.backward(sum(each for each in losses if each is not None))
        pictures = 2 if both else 1
        assert sum(encoder.seen) == pictures * pairs
        assert max(encoder.seen) <= pictures * chunk
        assert len(encoder.seen) == math.ceil(pairs / chunk)

    def test_the_default_chunk_bounds_the_batch(self):
        encoder = Encoder()
        masked_image_losses(*scene(100), encoder)
        assert max(encoder.seen) <= 64

    @pytest.mark.parametrize("form", FORMS)
    def test_memory(self, form):
        """More pairs cost 4 h w numbers each, the activations of a chunk once."""

        def measure(pairs, work):
            given = scene(pairs, own=True)
            kept = Kept()
            with kept:
                losses = work(*given, Encoder(), form=form)
            return kept.peak, kept.alive(), losses

        few_peak, _, _ = measure(4, lambda *given, **options: masked_image_losses(*given, chunk=4, **options))
        peak, alive, losses = measure(40, lambda *given, **options: masked_image_losses(*given, chunk=4, **options))
        plain, _, _ = measure(40, plainly)
        assert alive <= 2 * 40 * 5 * 5 + 2 * 3 * 3 * DIM
        assert peak <= few_peak + alive
        assert plain > 5 * few_peak, "or this test shows nothing"
        torch.autograd.backward(sum(losses))

    def test_differentiated_once_only(self):
        front, back, images, pairs, prototypes = scene()
        losses = masked_image_losses(front, back, images, pairs, prototypes, Encoder())
        (gradient,) = torch.autograd.grad(sum(losses) ** 2, front, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.backward(gradient.sum())

    def test_mixed_precision(self):
        """The encoder may run in half precision; its gradients still arrive."""
        front, back, images, pairs, prototypes = scene()
        single = [each.detach().float().requires_grad_() for each in (front, back, prototypes)]
        encoder = Encoder().float()
        with torch.autocast("cpu", torch.bfloat16):
            found = masked_image_losses(*single[:2], images.float(), pairs, single[2], encoder, chunk=3)
        expected = plainly(front, back, images, pairs, prototypes, Encoder())
        gradients = differentiate(found, single)
        for gradient, wanted in zip(gradients, differentiate(expected, [front, back, prototypes]), strict=True):
            assert gradient.dtype == torch.float32
            assert (gradient - wanted).norm() < 0.05 * wanted.norm()


class TestErrorsOfMaskedImageLosses:
    @pytest.mark.parametrize("chunk", [0, -1])
    def test_chunk(self, chunk):
        with pytest.raises(InputError) as raised:
            masked_image_losses(*scene(), Encoder(), chunk=chunk)
        assert_one_line(raised, str(chunk))

    @pytest.mark.parametrize("shape", [(7, 1, 5, 5), (1, 5, 5), (6, 5, 5), (9, 5, 5)])
    @pytest.mark.parametrize("chunk", [1, 7])
    @pytest.mark.parametrize("which", ["foreground", "background"])
    def test_weights_of_another_shape(self, which, shape, chunk):
        """Broadcasting or leaving out a map without a word would train on something else."""
        front, back, images, pairs, prototypes = scene()
        given = {"foreground": front, "background": back} | {which: uniform(*shape)}
        with pytest.raises(InputError) as raised:
            masked_image_losses(
                **given, images=images, pairs=pairs, prototypes=prototypes, encode=Encoder(), chunk=chunk
            )
        assert_one_line(raised, which)

    def test_as_matching_losses(self):
        with pytest.raises(InputError) as raised:
            masked_image_losses(*scene(), Encoder(), temperature=0.0)
        assert_one_line(raised, "temperature 0.0")


class TestWhatDoesNotExist:
    @pytest.mark.parametrize("classes", [[0, 3], [-1, 0]])
    def test_a_class(self, classes):
        words = r"classes: hold .*; 3 classes of prototypes are 0 to 2"
        with pytest.raises(InputError, match=words):
            matching_losses(normal(2, DIM), normal(2, DIM), normal(3, 2, DIM), torch.tensor(classes))

    @pytest.mark.parametrize("own", [[0, 2], [-1, 0], [0, 1]])
    def test_an_own_prototype(self, own):
        """Of a class with fewer prototypes than another the rows behind its own are none."""
        counts = [1, 2, 2] if own == [0, 1] else None
        classes = torch.tensor([1, 0])
        for call in (
            lambda form: matching_losses(
                normal(2, DIM),
                normal(2, DIM),
                normal(3, 2, DIM),
                classes,
                form=form,
                own=torch.tensor(own),
                counts=counts,
            ),
            lambda form: masked_image_losses(
                uniform(2, 4, 4),
                None,
                normal(1, 3, 4, 4),
                Pairs(torch.zeros(2, dtype=torch.long), classes, torch.tensor(own)),
                normal(3, 2, DIM),
                lambda pictures: pictures.flatten(1)[:, :DIM],
                form=form,
                counts=counts,
            ),
        ):
            with pytest.raises(InputError, match=r"own: is -?\d for pair \d, whose class has \d prototypes"):
                call("prototype")

    def test_own_of_another_length(self):
        own = torch.zeros(3, dtype=torch.long)
        with pytest.raises(InputError, match=r"own: is \(3,\); 2 pairs need \(2,\)"):
            matching_losses(normal(2, DIM), normal(2, DIM), normal(3, 2, DIM), torch.tensor([0, 1]), own=own)

    @pytest.mark.parametrize("settings", [{"form": "classes"}, {"temperature": 0.0}])
    def test_settings_without_any_pair(self, settings):
        none = Pairs(*[torch.zeros(0, dtype=torch.long)] * 3)
        with pytest.raises(InputError, match=next(iter(settings))):
            masked_image_losses(
                uniform(0, 4, 4), None, normal(1, 3, 4, 4), none, normal(3, 2, DIM), nn.Flatten(), **settings
            )

    @pytest.mark.parametrize("threshold", [-0.1, 1.5, math.nan])
    def test_a_threshold(self, threshold):
        with pytest.raises(InputError, match=r"threshold .* is not in \[0,1\]"):
            adaptive_weights(normal(1, 2, 2), threshold)


@pytest.mark.parametrize("way", ["encoder", "autocast"])
def test_gradients_survive_an_encoder_in_half_precision(way):
    """The share of one of 512 pairs in the mean is below what half precision holds."""
    pairs, side = 512, 8
    matrix = normal(3 * side * side, DIM, seed=3) / 1000
    weights = uniform(pairs, side, side).requires_grad_()
    images, prototypes = normal(2, 3, side, side, seed=1), normal(3, 2, DIM, seed=2)
    chosen = Pairs(integers(2, pairs), integers(3, pairs, seed=1), None)

    def exact(pictures):
        return pictures.flatten(1) @ matrix

    def half(pictures):
        if way == "autocast":
            with torch.autocast("cpu", torch.float16):
                return pictures.flatten(1) @ matrix.float()
        return pictures.half().flatten(1) @ matrix.half()

    found = []
    for encode, kind in ((exact, torch.float64), (half, torch.float32)):
        leaf = weights.detach().to(kind).requires_grad_()
        losses = masked_image_losses(
            leaf, None, images.to(kind), chosen, prototypes.to(kind), encode, temperature=50.0, chunk=64
        )
        assert losses[0] is not None
        found.append(torch.autograd.grad(losses[0], leaf)[0].double())
    assert float(found[0].abs().max()) < 1e-4
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert float(error) < 0.01


class TestDrawnPairs:
    PAIRS = Pairs(torch.arange(10), torch.arange(10) % 3, torch.arange(10) % 2)

    @pytest.mark.parametrize("most", [None, 10, 11])
    def test_all_where_they_are_few(self, most):
        assert drawn_pairs(self.PAIRS, most) is self.PAIRS

    @pytest.mark.parametrize("own", [True, False])
    def test_some_in_their_order_from_the_global_generator(self, own):
        pairs = self.PAIRS if own else self.PAIRS._replace(own=None)
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(drawn_pairs(pairs, 4))
        first, again, other = (each.images.tolist() for each in found)
        assert first == again == sorted(set(first))
        assert first != other
        assert len(first) == 4
        assert found[0].classes.tolist() == [place % 3 for place in first]
        assert (found[0].own is None) == (not own)
        if own:
            assert found[0].own.tolist() == [place % 2 for place in first]
