"""The three attentions against loops over the cells, in double precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tissuehint.errors import InputError
from tissuehint.nn.attention import ConsistencyCorrelationAttention, CrissCrossAttention, PositionAttention

few = settings(max_examples=15)
SINGLE = [CrissCrossAttention, PositionAttention]
ALL = [*SINGLE, ConsistencyCorrelationAttention]
SIZES = [(3, 4), (5, 2), (1, 6), (6, 1), (1, 1), (7, 7)]


def attention_of(kind, channels=6, reduction=2, *, gamma=0.7, seed=0):
    """With weights of a size at which the softmax is neither flat nor a maximum, in double precision."""
    torch.manual_seed(seed)
    attention = kind(channels, reduction).double()
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if name.endswith("gamma"):
                parameter.fill_(gamma)
            else:
                parameter.normal_(std=0.5)
    return attention


def features_of(channels=6, height=3, width=4, batch=2, seed=1):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)).double()


def project(convolution, vector):
    return convolution.weight[:, :, 0, 0] @ vector + convolution.bias


def neighbours(attention, row, column, height, width):
    if isinstance(attention, PositionAttention):
        return [(y, x) for y in range(height) for x in range(width)]
    own_row = [(row, x) for x in range(width)]
    return own_row + [(y, column) for y in range(height) if y != row]


def slowly(attention, features):
    """Eq. 1 and 2 cell by cell: softmax over all keys that the cell sees, its own once, residual, gamma."""
    if isinstance(attention, ConsistencyCorrelationAttention):
        return slowly(attention.second, slowly(attention.position, slowly(attention.first, features)))
    batch, _, height, width = features.shape
    images = []
    for image in range(batch):
        rows = []
        for row in range(height):
            cells = []
            for column in range(width):
                here = features[image, :, row, column]
                query = project(attention.query, here)
                seen = [features[image, :, y, x] for y, x in neighbours(attention, row, column, height, width)]
                affinities = torch.stack([(query * project(attention.key, cell)).sum() for cell in seen])
                exponents = (affinities - affinities.max()).exp()
                shares = exponents / exponents.sum()
                gathered = sum(share * project(attention.value, cell) for share, cell in zip(shares, seen, strict=True))
                cells.append(here + attention.gamma * gathered)
            rows.append(torch.stack(cells, 1))
        images.append(torch.stack(rows, 1))
    return torch.stack(images)


class TestAgainstLoops:
    def test_the_loops_see_a_row_and_a_column_once(self):
        attention = attention_of(CrissCrossAttention)
        seen = neighbours(attention, 1, 2, 4, 5)
        assert len(seen) == len(set(seen)) == 4 + 5 - 1

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_values(self, kind, height, width):
        attention, features = attention_of(kind), features_of(height=height, width=width)
        torch.testing.assert_close(attention(features), slowly(attention, features), atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("kind", SINGLE)
    @few
    @given(
        height=st.integers(1, 5),
        width=st.integers(1, 5),
        channels=st.integers(1, 9),
        reduction=st.integers(1, 12),
        seed=st.integers(0, 999),
    )
    def test_any_shape_and_reduction(self, kind, height, width, channels, reduction, seed):
        attention = attention_of(kind, channels, reduction, seed=seed)
        features = features_of(channels, height, width, batch=1, seed=seed)
        torch.testing.assert_close(attention(features), slowly(attention, features), atol=1e-10, rtol=1e-10)

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 3), (4, 1)])
    def test_gradients_of_features_and_of_every_weight(self, kind, height, width):
        attention = attention_of(kind)
        features = features_of(height=height, width=width).requires_grad_()
        aim = features_of(height=height, width=width, seed=5)
        inputs = [features, *attention.parameters()]
        fast = torch.autograd.grad((attention(features) * aim).sum(), inputs)
        slow = torch.autograd.grad((slowly(attention, features) * aim).sum(), inputs)
        for one, other in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-8)

    @pytest.mark.parametrize("kind", SINGLE)
    def test_gradients_against_finite_differences(self, kind):
        attention = attention_of(kind, 3, 1)
        features = features_of(3, 2, 3, batch=1).requires_grad_()
        assert torch.autograd.gradcheck(attention, (features,))

    @pytest.mark.parametrize("kind", SINGLE)
    def test_one_cell_adds_its_own_value(self, kind):
        attention, features = attention_of(kind), features_of(height=1, width=1)
        torch.testing.assert_close(attention(features), features + 0.7 * attention.value(features))

    def test_own_position_counts_once(self):
        """With equal affinities a cell takes the plain mean of the H + W - 1 cells, not of H + W."""
        attention, features = attention_of(CrissCrossAttention, 1, 1, gamma=1.0), features_of(1, 3, 4, batch=1)
        with torch.no_grad():
            attention.query.weight.zero_()
            attention.query.bias.zero_()
            attention.value.weight.fill_(1)
            attention.value.bias.zero_()
        image = features[0, 0]
        mean = (image[1].sum() + image[:, 2].sum() - image[1, 2]) / 6
        torch.testing.assert_close(attention(features)[0, 0, 1, 2], image[1, 2] + mean)

    @pytest.mark.parametrize("kind", ALL)
    def test_float32_is_the_double_result(self, kind):
        attention, features = attention_of(kind), features_of(height=5, width=3)
        expected = attention(features)
        torch.testing.assert_close(attention.float()(features.float()).double(), expected, atol=1e-5, rtol=1e-5)


class TestGamma:
    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize(("height", "width"), SIZES)
    def test_a_new_attention_changes_nothing(self, kind, height, width):
        features = features_of(height=height, width=width).float()
        assert torch.equal(kind(6, 2)(features), features)

    @pytest.mark.parametrize("kind", ALL)
    def test_every_gamma_is_one_trained_number_that_moves_from_zero(self, kind):
        attention = kind(6, 2)
        gammas = {name: value for name, value in attention.named_parameters() if name.endswith("gamma")}
        assert len(gammas) == (3 if kind is ConsistencyCorrelationAttention else 1)
        attention(features_of().float()).square().sum().backward()
        for name, gamma in gammas.items():
            assert gamma.numel() == 1, name
            assert gamma.item() == 0, name
            assert gamma.requires_grad, name
            assert abs(gamma.grad.item()) > 1e-4, name

    @pytest.mark.parametrize("kind", SINGLE)
    def test_the_result_is_linear_in_gamma(self, kind):
        attention, features = attention_of(kind, gamma=1.0), features_of()
        whole = attention(features) - features
        with torch.no_grad():
            attention.gamma.fill_(-0.25)
        torch.testing.assert_close(attention(features) - features, -0.25 * whole)

    def test_parts_of_the_public_face(self):
        for kind in SINGLE:
            attention = kind(16)
            assert [attention.query.out_channels, attention.key.out_channels, attention.value.out_channels] == [
                2,
                2,
                16,
            ]
            for part in (attention.query, attention.key, attention.value):
                assert part.in_channels == 16
                assert part.kernel_size == (1, 1)
            assert kind(16, reduction=4).query.out_channels == 4
            assert kind(4, reduction=8).query.out_channels == 1

    def test_the_three_parts_share_no_weights(self):
        attention = ConsistencyCorrelationAttention(8, 2)
        single = sum(each.numel() for each in CrissCrossAttention(8, 2).parameters())
        assert sum(each.numel() for each in attention.parameters()) == 3 * single


class TestSymmetry:
    @pytest.mark.parametrize("kind", ALL)
    @few
    @given(height=st.integers(1, 6), width=st.integers(1, 6), seed=st.integers(0, 999))
    def test_a_transposed_map_gives_the_transposed_result(self, kind, height, width, seed):
        attention, features = attention_of(kind, seed=seed), features_of(height=height, width=width, seed=seed)
        turned = attention(features.transpose(2, 3)).transpose(2, 3)
        torch.testing.assert_close(turned, attention(features))

    @few
    @given(seed=st.integers(0, 999))
    def test_position_attention_does_not_care_where_cells_are(self, seed):
        attention, features = attention_of(PositionAttention, seed=seed), features_of(height=4, width=5, seed=seed)
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))

        def moved(maps):
            return maps.flatten(2)[..., order].unflatten(2, (4, 5))

        torch.testing.assert_close(attention(moved(features)), moved(attention(features)))

    @few
    @given(seed=st.integers(0, 999))
    def test_criss_cross_does_not_care_about_the_order_of_rows_and_columns(self, seed):
        attention, features = attention_of(CrissCrossAttention, seed=seed), features_of(height=4, width=5, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        rows, columns = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
        moved = attention(features[:, :, rows][..., columns])
        torch.testing.assert_close(moved, attention(features)[:, :, rows][..., columns])

    def test_one_criss_cross_sees_a_cross_and_two_see_everything(self):
        attention, features = attention_of(CrissCrossAttention), features_of(height=5, width=6, batch=1)
        features.requires_grad_()

        def seen(maps):
            gradient = torch.autograd.grad(maps[0, :, 1, 2].sum(), features, retain_graph=True)[0]
            return gradient[0].abs().sum(0) > 0

        cross = torch.zeros(5, 6, dtype=torch.bool)
        cross[1], cross[:, 2] = True, True
        once = attention(features)
        assert torch.equal(seen(once), cross)
        assert bool(seen(attention(once)).all())

    @pytest.mark.parametrize("kind", ALL)
    def test_images_of_a_batch_do_not_meet(self, kind):
        attention, features = attention_of(kind), features_of(batch=3)
        for index in range(3):
            torch.testing.assert_close(attention(features[index : index + 1])[0], attention(features)[index])

    @pytest.mark.parametrize("kind", ALL)
    def test_the_memory_layout_of_the_map_does_not_matter(self, kind):
        attention, features = attention_of(kind), features_of(height=4, width=5)
        turned = features.to(memory_format=torch.channels_last)
        torch.testing.assert_close(attention.to(memory_format=torch.channels_last)(turned), attention(features))

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last], ids=str)
    def test_the_memory_layout_of_the_map_is_kept(self, kind, order):
        """Stages behind it run in the order in which the map comes, and round as they do without it."""
        attention, features = attention_of(kind, 16).to(memory_format=order), features_of(16, 4, 6)
        kept = attention(features.contiguous(memory_format=order)).is_contiguous(memory_format=order)
        assert kept


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave, the backward ones included."""

    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def test_criss_cross_holds_no_map_of_all_pairs_of_cells():
    side = 128
    attention, features = CrissCrossAttention(4, 2), torch.randn(1, 4, side, side, requires_grad=True)
    with LargestTensor() as largest:
        attention(features).sum().backward()
    assert largest.elements >= side * side * side  # it did look
    assert largest.elements <= side * side * 2 * side


class TestNumbers:
    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("size", [1e-3, 1.0, 1e3, 1e8])
    def test_finite_in_float32(self, kind, size):
        attention = attention_of(kind).float()
        features = (size * features_of(height=5, width=3).float()).requires_grad_()
        result = attention(features)
        result.mean().backward()
        assert bool(result.isfinite().all())
        assert bool(features.grad.isfinite().all())
        assert all(bool(each.grad.isfinite().all()) for each in attention.parameters())

    @pytest.mark.parametrize("kind", ALL)
    @pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
    def test_finite_and_near_under_autocast(self, kind, precision):
        attention = attention_of(kind).float()
        features = features_of(height=5, width=3).float().requires_grad_()
        expected = attention(features)
        with torch.autocast("cpu", dtype=precision):
            result = attention(features)
        result.float().sum().backward()
        assert bool(result.isfinite().all())
        assert all(bool(each.grad.isfinite().all()) for each in (features, *attention.parameters()))
        torch.testing.assert_close(result.float(), expected, atol=0.2, rtol=0.1)

    @pytest.mark.parametrize("kind", ALL)
    def test_a_map_of_equal_cells_stays_one(self, kind):
        attention = attention_of(kind)
        features = features_of(height=1, width=1).expand(2, 6, 4, 3).contiguous()
        result = attention(features)
        torch.testing.assert_close(result, result[..., :1, :1].expand_as(result))


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"channels": 0}, "channels 0"),
        ({"channels": -4}, "channels -4"),
        ({"channels": 8, "reduction": 0}, "reduction 0"),
        ({"channels": 8, "reduction": -1}, "reduction -1"),
    ],
)
def test_wrong_numbers_are_refused_in_one_line(kind, arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        kind(**arguments)
    assert "\n" not in str(caught.value)
