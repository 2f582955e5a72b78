"""Attention behind the stages of real backbones: the level is the attended map, and all later stages see it."""

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tissuehint.errors import InputError
from tissuehint.methods.cam import CAM, CAMConfig
from tissuehint.methods.gland import Gland, GlandConfig
from tissuehint.model import TissueModel
from tissuehint.nn.attention import ConsistencyCorrelationAttention, CrissCrossAttention, PositionAttention
from tissuehint.nn.class_maps import ClassMapNetwork
from tissuehint.nn.config import EncoderConfig
from tissuehint.nn.encoders import build_encoder, pad_to_multiple
from tissuehint.nn.stage_attention import StageAttention
from tissuehint.testing import fake_batch, fake_labels

# one per layout and way of returning a pyramid: maps, channels last, tokens, transformers, timm's own hooks (xception),
# stages that begin with a layer that does nothing (poolformer)
BACKBONES = [
    "test_resnet",
    "mobilenetv3_small_050",
    "test_convnext",
    "swin_tiny_patch4_window7_224",
    "test_vit",
    "hf:mit_b0",
    "xception41",
    "poolformer_s12",
]
# their levels are norms of what a stage gives, and the next stage takes it without the norm
BEHIND_NORMS = ["hf:swin_tiny", "hf:dinov2_small"]
SIZES = [(64, 64), (75, 51), (33, 64)]


def encoder_of(name, **words):
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(name=name, **words)).eval()


def awaken(module, gamma=1.0):
    """Give every attention an effect that no rounding hides."""
    generator = torch.Generator().manual_seed(7)
    for part in module.modules():
        if isinstance(part, CrissCrossAttention | PositionAttention):
            with torch.no_grad():
                part.gamma.fill_(gamma)
                part.value.bias.copy_(torch.randn(part.value.bias.shape, generator=generator))


def gammas_of(network):
    """Those of the attention: other networks have parameters of this name."""
    return {key: value for key, value in network.attention.named_parameters() if key.endswith("gamma")}


def network_of(name="test_resnet", *, attention="criss_cross", seed=0, **words):
    torch.manual_seed(seed)
    config = CAMConfig(encoder={"name": name}, attention=attention, **words)
    return ClassMapNetwork(config, 3).eval()


def images_of(height=64, width=64, batch=2):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


def crop(maps, encoder, images):
    return [
        each[..., : -(-images.shape[-2] // stride), : -(-images.shape[-1] // stride)]
        for each, stride in zip(maps, encoder.strides, strict=True)
    ]


@pytest.mark.parametrize("name", BACKBONES)
class TestBackbones:
    def test_a_new_attention_changes_nothing(self, name):
        plain, attended = encoder_of(name), encoder_of(name)
        levels = [-1, -2, -3]
        StageAttention(attended, "consistency_correlation", levels, 8)
        for height, width in SIZES:
            images = images_of(height, width)
            with torch.no_grad():
                for one, other in zip(plain(images), attended(images), strict=True):
                    assert torch.equal(one, other), (height, width)

    def test_a_level_is_the_attended_map_and_later_stages_see_it(self, name):
        plain = encoder_of(name)
        wrong = []
        for level in range(len(plain.channels)):
            encoder = copy.deepcopy(plain)
            attention = StageAttention(encoder, "criss_cross", [level], 8)
            awaken(attention)
            images = images_of(75, 51)
            with torch.no_grad():
                before = plain(pad_to_multiple(images, plain.multiple))  # attention works on whole cells
                before[level] = attention[0](before[level])
                expected, found = crop(before, plain, images), encoder(images)
            if not torch.allclose(found[level], expected[level], atol=1e-4, rtol=1e-4):
                wrong.append(f"level {level} is not the attended map")
            if any(not torch.equal(found[i], expected[i]) for i in range(level)):
                wrong.append(f"attention at level {level} changes an earlier level")
            wrong += [
                f"level {i} does not see the attention at level {level}"
                for i in range(level + 1, len(found))
                if torch.allclose(found[i], expected[i], atol=1e-6)
            ]
        assert not wrong, "; ".join(wrong)

    def test_gradient_reaches_every_gamma_through_the_coarsest_map(self, name):
        network = network_of(name, attention="consistency_correlation")
        network(images_of()).logits.square().sum().backward()
        gammas = gammas_of(network)
        assert len(gammas) == 9
        assert not [key for key, value in gammas.items() if value.grad is None or not value.grad.any()]


@pytest.mark.parametrize("name", BEHIND_NORMS)
def test_attention_behind_a_stage_is_seen_by_the_later_ones_or_refused(name):
    """Each level by itself: earlier maps stay, this one changes, later ones change; or one line that says no."""
    plain, images = encoder_of(name), images_of(84, 84, batch=1)
    with torch.no_grad():
        before = plain(images)
    wrong = []
    for level in range(len(plain.channels)):
        encoder = copy.deepcopy(plain)
        try:
            attention = StageAttention(encoder, "criss_cross", [level], 8)
        except InputError:
            continue
        awaken(attention)
        with torch.no_grad():
            found = encoder(images)
        changed = [not torch.equal(one, other) for one, other in zip(before, found, strict=True)]
        if changed != [index >= level for index in range(len(changed))]:
            wrong.append(f"attention at level {level} changes {[i for i, each in enumerate(changed) if each]}")
    assert not wrong, "; ".join(wrong)


class TestByHand:
    @pytest.mark.parametrize("kind", ["criss_cross", "criss_cross_twice", "consistency_correlation"])
    def test_stages_of_a_resnet(self, kind):
        encoder = encoder_of("test_resnet")
        attention = StageAttention(encoder, kind, (-3, -1), 4)
        awaken(attention)
        middle, last = attention
        backbone, images = encoder.backbone, images_of(96, 64)
        hooks = {}
        for key in ("layer2", "layer4"):  # as if there were none
            hooks[key] = backbone[key]._forward_hooks.copy()
            backbone[key]._forward_hooks.clear()
        with torch.no_grad():
            maps = encoder.normalization(images)
            expected = []
            for key in backbone:
                maps = backbone[key](maps)
                if key == "layer2":
                    maps = middle(maps)
                if key == "layer4":
                    maps = last(maps)
                if key in ("act1", "layer1", "layer2", "layer3", "layer4"):
                    expected.append(maps.clone())
            for key, each in hooks.items():
                backbone[key]._forward_hooks.update(each)
            found = encoder(images)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)

    @pytest.mark.parametrize(("height", "width"), [(64, 64), (48, 96), (75, 51)])
    def test_the_class_token_of_a_vision_transformer_is_left_alone(self, height, width):
        encoder = encoder_of("vit_tiny_patch16_224")
        images = images_of(height, width)
        outputs = {}
        block = encoder.backbone.model.blocks[10]
        handle = block.register_forward_hook(lambda module, inputs, output: outputs.update(plain=output))
        with torch.no_grad():
            encoder(images)
            handle.remove()
            attention = StageAttention(encoder, "consistency_correlation", [-2], 8)
            awaken(attention)
            block.register_forward_hook(lambda module, inputs, output: outputs.update(attended=output))
            encoder(images)
            rows, columns = -(-height // 16), -(-width // 16)
            tokens = outputs["plain"][:, 1:]
            assert tokens.shape[1] == rows * columns
            maps = tokens.transpose(1, 2).unflatten(2, (rows, columns))
            expected = attention[0](maps).flatten(2).transpose(1, 2)
        assert torch.equal(outputs["attended"][:, :1], outputs["plain"][:, :1])
        torch.testing.assert_close(outputs["attended"][:, 1:], expected)
        assert not torch.allclose(outputs["attended"][:, 1:], tokens)

    def test_the_size_of_one_image_is_not_kept_for_the_next(self):
        network = network_of("test_vit", attention="consistency_correlation", attention_levels=[-2])
        awaken(network)
        with torch.no_grad():
            first = network(images_of(64, 96)).logits
            network(images_of(96, 64))
            network(images_of(33, 70, batch=1))
            assert torch.equal(network(images_of(64, 96)).logits, first)

    def test_each_level_has_its_own_attention_finest_first(self):
        encoder = encoder_of("test_resnet")
        attention = StageAttention(encoder, "consistency_correlation", [-1, 1, -2], 4)
        assert all(isinstance(each, ConsistencyCorrelationAttention) for each in attention)
        channels = [each.first.value.in_channels for each in attention]
        assert channels == [encoder.channels[1], encoder.channels[-2], encoder.channels[-1]]
        assert [each.first.query.out_channels for each in attention] == [max(1, each // 4) for each in channels]

    def test_levels_count_from_both_ends(self):
        last, first = network_of(attention_levels=[-2]), network_of(attention_levels=[3])
        awaken(last)
        awaken(first)
        with torch.no_grad():
            assert torch.equal(last(images_of()).maps, first(images_of()).maps)


class TestNetwork:
    # the maps of test_convnext are channels last in memory; in another order the classifier rounds otherwise
    @pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
    @pytest.mark.parametrize("attention", ["criss_cross", "criss_cross_twice", "consistency_correlation"])
    @pytest.mark.parametrize("pooling", ["average", "pyramid_fusion"])
    def test_exactly_the_same_maps_as_without_before_training(self, name, attention, pooling):
        plain = network_of(name, attention="none", pooling=pooling)
        attended = network_of(name, attention=attention, pooling=pooling)
        for height, width in SIZES:
            with torch.no_grad():
                one, other = plain(images_of(height, width)), attended(images_of(height, width))
            assert torch.equal(one.maps, other.maps)
            assert torch.equal(one.logits, other.logits)

    def test_the_same_in_training_mode(self):
        plain, attended = network_of(attention="none", dropout=0.3).train(), network_of(dropout=0.3).train()
        torch.manual_seed(5)
        one = plain(images_of())
        torch.manual_seed(5)
        other = attended(images_of())
        assert torch.equal(one.logits, other.logits)
        for key, value in plain.encoder.state_dict().items():
            assert torch.equal(value, attended.encoder.state_dict()[key]), key

    @pytest.mark.parametrize("name", ["test_resnet", "test_vit", "hf:mit_b0"])
    def test_building_draws_the_weights_and_nothing_else(self, name):
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002 (the global state is what is looked at)
        others = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
        plain = network_of(name, attention="none")
        channels = plain.encoder.channels
        for index in (-3, -2, -1):
            ConsistencyCorrelationAttention(channels[index], 8)
        expected = torch.random.get_rng_state()
        attended = network_of(name, attention="consistency_correlation")
        assert torch.equal(torch.random.get_rng_state(), expected)
        assert (random.getstate(), np.random.get_state()[1].tolist()) == others  # noqa: NPY002
        state = attended.state_dict()
        for key, value in plain.state_dict().items():
            assert torch.equal(state[key], value), key

    def test_building_leaves_modes_and_statistics(self):
        torch.manual_seed(0)
        config = CAMConfig(encoder={"name": "test_resnet", "frozen_levels": 2}, attention="criss_cross")
        network = ClassMapNetwork(config, 3)
        torch.manual_seed(0)
        plain = ClassMapNetwork(config.model_copy(update={"attention": "none"}), 3)
        modes = dict(network.named_modules())
        for key, module in plain.named_modules():
            assert modes[key].training == module.training, key
        for key, value in plain.named_buffers():
            assert torch.equal(value, dict(network.named_buffers())[key]), key

    def test_the_weights_are_in_the_state_once(self):
        plain, attended = network_of(attention="none"), network_of(attention="consistency_correlation")
        new = set(attended.state_dict()) - set(plain.state_dict())
        assert {key.split(".")[0] for key in new} == {"attention"}
        assert len(new) == 3 * 3 * 7
        identities = [id(each) for each in attended.parameters()]
        assert len(identities) == len(set(identities)) == len(list(plain.parameters())) + len(new)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "hf:mit_b0"])
class TestCopies:
    def test_a_deep_copy_stands_by_itself(self, name):
        network = network_of(name, attention="consistency_correlation")
        awaken(network)
        images = images_of(64, 96)
        with torch.no_grad():
            before = network(images).maps
            other = copy.deepcopy(network)
            assert torch.equal(other(images).maps, before)
            awaken(other, gamma=3.0)
            changed = other(images).maps
            assert not torch.allclose(changed, before)
            assert torch.equal(network(images).maps, before)
            awaken(network, gamma=0.0)
            assert torch.equal(other(images).maps, changed)
            torch.testing.assert_close(network(images).maps, network_of(name, attention="none")(images).maps)

    def test_a_state_carries_over(self, name):
        network, other = network_of(name), network_of(name, seed=1)
        awaken(network)
        other.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(other(images_of()).maps, network(images_of()).maps)

    def test_saved_and_loaded(self, name, tmp_path):
        torch.manual_seed(0)
        method = Gland(GlandConfig(encoder={"name": name}), fake_labels()).eval()
        awaken(method)
        images = fake_batch(fake_labels(), count=2, height=65, width=97).images
        before = TissueModel.from_method(method)
        before.save(tmp_path)
        torch.manual_seed(9)
        loaded = TissueModel.load(tmp_path)
        assert torch.equal(loaded.predict(images), before.predict(images))
        assert [value.item() for value in gammas_of(loaded.network.network).values()] == [1.0] * 9


def test_a_pickled_network_is_whole():
    """As processes that are spawned get it."""
    network = network_of(attention="criss_cross")
    awaken(network)
    images = images_of(64, 96)
    other = pickle.loads(pickle.dumps(network))
    with torch.no_grad():
        assert torch.equal(other(images).maps, network(images).maps)
        awaken(other, gamma=3.0)
        assert not torch.allclose(other(images).maps, network(images).maps)


class TestRefusals:
    @pytest.mark.parametrize("levels", [[-6], [5], [-1, -9], [100]])
    def test_levels_that_the_encoder_does_not_have(self, levels):
        with pytest.raises(InputError, match=r"attention level .*test_resnet.*5") as caught:
            network_of(attention_levels=levels)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("levels", [[-1, -1], [-1, 4], [0, -5]])
    def test_a_level_given_twice(self, levels):
        with pytest.raises(InputError, match="twice") as caught:
            network_of(attention_levels=levels)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("method", [CAMConfig, GlandConfig])
    @pytest.mark.parametrize(
        "wrong",
        [
            {"attention_levels": []},
            {"attention_levels": ["last"]},
            {"attention_levels": [0.5]},
            {"attention_reduction": 0},
            {"attention": "position"},
            {"attention": True},
            {"attention_level": [-1]},
        ],
        ids=str,
    )
    def test_values_that_are_no_attention(self, method, wrong):
        with pytest.raises(ValidationError):
            method(encoder={"name": "test_resnet"}, **wrong)

    def test_a_backbone_whose_stages_are_no_single_modules(self):
        with pytest.raises(InputError, match="mvitv2_tiny") as caught:
            network_of("mvitv2_tiny")
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(("name", "side"), [("maxvit_rmlp_pico_rw_256", 256), ("coatnet_pico_rw_224", 224)])
    def test_networks_of_one_size_take_attention_at_their_size(self, name, side):
        """Or a line says that they do not; but not that an image has a wrong size, where there was none."""
        try:
            network = network_of(name, attention_levels=[-1])
        except InputError as error:
            refusal = str(error)
        else:
            refusal = ""
            with torch.no_grad():
                assert bool(network(images_of(side, side, batch=1)).maps.isfinite().all())
        assert "64 x 64" not in refusal

    def test_a_refused_network_leaves_no_hooks(self):
        encoder = encoder_of("test_resnet")
        with pytest.raises(InputError):
            StageAttention(encoder, "criss_cross", [-1, -9], 8)
        assert not [each for each in encoder.modules() if each._forward_hooks or each._forward_pre_hooks]

    def test_the_defaults_are_no_attention_for_cam_and_all_three_for_gland(self):
        assert CAMConfig().attention == "none"
        assert CAM(CAMConfig(encoder={"name": "test_resnet"}), fake_labels()).network.attention is None
        assert GlandConfig().attention == "consistency_correlation"
        assert len(Gland(GlandConfig(encoder={"name": "test_resnet"}), fake_labels()).network.attention) == 3
