import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from safetensors.torch import save_file
from torch.nn.modules.batchnorm import _BatchNorm

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig, NetworkConfig, TrunkConfig
from tissuehint.nn.encoders import build_encoder
from tissuehint.nn.networks import build_network
from tissuehint.nn.optimization import Optimization, build_optimizer
from tissuehint.nn.trunk import Trunk

TINY = "test_resnet"
SMALL = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


def trunk(name=TINY, stride=16, **words):
    encoder = EncoderConfig(name=name, **{key: words.pop(key) for key in ("weights", "output_stride") if key in words})
    return Trunk(TrunkConfig(encoder=encoder, stride=stride, **words))


def network(architecture="unet", decoder=SMALL, trunk=None, name=TINY, **others):
    config = NetworkConfig(
        architecture=architecture,
        encoder=EncoderConfig(name=name),
        decoder=decoder,
        trunk=TrunkConfig(encoder=EncoderConfig(name=TINY), **(trunk or {})),
        **others,
    )
    return build_network(config, 2)


def gradients(module, images):
    module.zero_grad()
    module(images).square().mean().backward()
    return {name: each.grad.clone() for name, each in module.named_parameters()}


def randomised_norms(module):
    """Statistics and affine parameters that are not those of a fresh network."""
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            norm.running_mean.normal_(0, 0.1)
            norm.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
            torch.nn.init.normal_(norm.bias, 0, 0.1)
    return module


def statistics(module):
    return {key: value.clone() for key, value in module.state_dict().items() if "running" in key or "num_b" in key}


def test_the_papers_trunk_is_resnet34_up_to_its_third_stage():
    built = trunk("resnet34")
    assert (built.channels, built.stride) == (256, 16)
    assert [name for name, _ in built.backbone.named_children()][-1] == "layer3"
    with torch.no_grad():
        assert built.eval()(torch.rand(1, 3, 64, 128)).shape == (1, 256, 4, 8)
    assert TrunkConfig() == built.config


@pytest.mark.parametrize(
    ("name", "stride", "output_stride"),
    [
        (TINY, 4, None),
        (TINY, 8, None),
        (TINY, 16, None),
        (TINY, 32, None),
        ("resnet18", 8, 8),
        ("mobilenetv2_100", 16, None),
        ("mobilenetv3_small_050", 4, None),
        ("convnext_atto", 8, None),
        ("efficientnet_b0", 8, None),
        ("regnetx_002", 16, None),
        ("densenet121", 8, None),
        ("dla34", 4, None),
    ],
)
def test_map_is_that_of_the_whole_encoder_and_nothing_else_is_built(name, stride, output_stride):
    whole = randomised_norms(build_encoder(EncoderConfig(name=name, output_stride=output_stride)).eval())
    built = trunk(name, stride, output_stride=output_stride)
    state = whole.backbone.state_dict()
    assert built.backbone.state_dict().keys() <= state.keys()
    built.backbone.load_state_dict({key: state[key] for key in built.backbone.state_dict()})
    images = torch.rand(2, 3, 64, 96)
    position = max(index for index, each in enumerate(whole.strides) if each == stride)
    with torch.no_grad():
        maps = built.eval()(whole.normalization(images))
        assert torch.allclose(maps, whole(images)[position], atol=1e-5)
    assert maps.shape == (2, built.channels, 64 // stride, 96 // stride)
    built.train()(images).square().sum().backward()
    assert not [key for key, each in built.named_parameters() if each.grad is None]


@pytest.mark.parametrize("name", [TINY, "mobilenetv3_small_050", "convnext_atto", "regnetx_002", "densenet121"])
@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_gives_the_same_gradients_and_statistics(name, frozen):
    kept = randomised_norms(trunk(name, 8, checkpointing=False, frozen_norm=frozen).double())
    again = trunk(name, 8, checkpointing=True, frozen_norm=frozen).double()
    again.load_state_dict(kept.state_dict())
    images = torch.rand(2, 3, 32, 64, dtype=torch.float64)
    expected, found = gradients(kept, images), gradients(again, images)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, rtol=1e-9, atol=1e-12), key
    for key, value in statistics(kept).items():
        assert torch.equal(again.state_dict()[key], value), key


def test_checkpointing_keeps_less_and_only_in_training():
    def kept_bytes(module):
        """Memory that autograd holds between forward and backward, but for parameters."""
        held = {}

        def pack(tensor):
            if not isinstance(tensor, torch.nn.Parameter):
                held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = module(torch.rand(1, 3, 128, 128))
        assert kept.requires_grad
        return sum(held.values())

    plain, lean = trunk("resnet18", checkpointing=False), trunk("resnet18")
    assert kept_bytes(lean) < 0.35 * kept_bytes(plain)
    assert kept_bytes(lean.eval()) == kept_bytes(plain.eval())


def test_frozen_norm_keeps_its_statistics_and_learns_its_affine_part():
    frozen, free = trunk(), trunk(frozen_norm=False)
    for built, same in ((frozen, True), (free, False)):
        before = statistics(built.train())
        built(torch.rand(2, 3, 64, 64)).square().sum().backward()
        after = statistics(built)
        assert all(torch.equal(after[key], before[key]) for key in before) is same
        norms = [each for each in built.modules() if isinstance(each, _BatchNorm)]
        assert all(norm.training is not same for norm in norms)
        assert all(norm.weight.grad is not None for norm in norms)


def test_frozen_norm_survives_the_train_mode_of_the_network_around():
    built = network().train()
    assert built.trunk.training
    assert not any(each.training for each in built.trunk.modules() if isinstance(each, _BatchNorm))
    assert all(each.training for each in built.network.modules() if isinstance(each, _BatchNorm))
    before = statistics(built)
    built(torch.rand(2, 3, 256, 256)).sum().backward()
    changed = {key.split(".")[0] for key, value in statistics(built).items() if not torch.equal(value, before[key])}
    assert changed == {"network"}


@pytest.mark.parametrize("name", [TINY, "mobilenetv2_100"])
def test_weights_of_a_path(name, tmp_path):
    plain = timm.create_model(name, num_classes=9)
    path = tmp_path / "weights.safetensors"
    save_file(plain.state_dict(), path)
    built = trunk(name, weights=str(path))
    state = built.backbone.state_dict()
    assert built.weights.loaded == len(state)
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ({"name": "convnext_atto", "stride": 16, "output_stride": 8}, "no map of stride 16, its maps have 4, 8, 8, 8"),
        ({"name": "vit_tiny_patch16_224"}, "not a chain of convolutional stages.*resnet34"),
        ({"name": "swin_tiny_patch4_window7_224"}, "not a chain of convolutional stages"),
        ({"name": "hf:mit_b0"}, "not a network of timm"),
        ({"name": "resnet35"}, "did you mean resnet"),
        ({"weights": "/nowhere/weights.safetensors"}, "weights.safetensors"),
    ],
)
def test_what_cannot_be_a_trunk(words, rule):
    with pytest.raises(InputError, match=rule) as caught:
        trunk(**words)
    assert "\n" not in str(caught.value)


class TestNetworkBehindATrunk:
    @pytest.mark.parametrize(
        ("architecture", "decoder"),
        [("unet", SMALL), ("manet", {}), ("fpn", {}), ("deeplabv3plus", {}), ("pspnet", {}), ("segformer", {})],
    )
    @pytest.mark.parametrize("scale", [1.0, 0.5])
    def test_grid_and_logits_at_any_size(self, architecture, decoder, scale):
        built = network(architecture, decoder, scale=scale).eval()
        for height, width in [(256, 128), (197, 130), (65, 64)]:
            images = torch.rand(1, 3, height, width)
            with torch.no_grad():
                features, logits = built.dense(images)
                assert built(images).shape == (1, 2, height, width)
            h, w = (-(-round(side * scale) // 16) for side in (height, width))
            assert logits.shape == (1, 2, h, w)
            assert features.shape[-2:] == (h, w) == built.grid(height, width)

    def test_dpt(self):
        built = network("dpt", {"encoder_depth": 4}, name="vit_tiny_patch16_224").eval()
        with torch.no_grad():
            features, logits = built.dense(torch.rand(1, 3, 512, 300))
        assert logits.shape == (1, 2, 32, 19)
        assert features.shape == (1, 256, 32, 19)

    def test_the_path_step_by_step(self):
        built = network(trunk={"stride": 8}).eval()
        images = torch.rand(1, 3, 128, 64)
        with torch.no_grad():
            expected = built.network(built.trunk(built.normalization(images)))
            assert torch.equal(built.dense(images).logits, expected)
            enlarged = F.interpolate(expected, (128, 64), mode="bilinear", align_corners=False)
            assert torch.equal(built(images), enlarged)

    def test_cells_keep_their_place_where_the_image_ends_inside_one(self):
        built = network(trunk={"stride": 8}).eval()
        images = torch.rand(1, 3, 61, 50)
        with torch.no_grad():
            logits = built.dense(images).logits
            assert logits.shape == (1, 2, 8, 7)
            enlarged = F.interpolate(logits, (64, 56), mode="bilinear", align_corners=False)
            assert torch.equal(built(images), enlarged[..., :61, :50])

    def test_images_are_normalised_for_the_trunk(self):
        built = network()
        statistics = built.config.trunk.encoder.statistics
        assert built.normalization.mean.flatten().tolist() == pytest.approx(statistics.mean)
        config = NetworkConfig(
            encoder=EncoderConfig(name=TINY, normalization="unit"),
            trunk=TrunkConfig(encoder=EncoderConfig(name=TINY, normalization="inception")),
        )
        assert build_network(config, 2).normalization.mean.flatten().tolist() == [0.5, 0.5, 0.5]

    def test_gradient_reaches_every_parameter(self):
        built = network(decoder={})
        built(torch.rand(1, 3, 1024, 512)).square().sum().backward()
        assert not [key for key, each in built.named_parameters() if each.grad is None]

    def test_the_trunk_learns_at_the_rate_of_an_encoder_and_all_else_at_that_of_a_head(self):
        built = network()
        groups = build_optimizer(Optimization(learning_rate=1e-3, warmup=0), built, 10)["optimizer"].param_groups
        rates = {id(each): group["lr"] for group in groups for each in group["params"]}
        assert all(rates[id(each)] == pytest.approx(1e-3) for each in built.trunk.parameters())
        assert all(rates[id(each)] == pytest.approx(1e-2) for each in built.network.parameters())
        assert len(rates) == sum(1 for _ in built.parameters())

    def test_weights_of_the_trunk_are_those_of_the_network(self, tmp_path):
        path = tmp_path / "weights.safetensors"
        save_file(timm.create_model(TINY).state_dict(), path)
        config = NetworkConfig(
            encoder=EncoderConfig(name=TINY),
            trunk=TrunkConfig(encoder=EncoderConfig(name=TINY, weights=str(path))),
        )
        built = build_network(config, 2)
        assert built.encoder is built.trunk
        assert built.weights.loaded == len(built.trunk.backbone.state_dict())

    def test_a_copy_computes_on_its_own(self):
        built = network().train()
        other = copy.deepcopy(built)
        for each in other.trunk.parameters():
            torch.nn.init.zeros_(each)
        images = torch.rand(2, 3, 256, 256)
        with torch.no_grad():
            assert not torch.allclose(built(images), other(images))

    @pytest.mark.parametrize(
        ("words", "rule"),
        [
            ({"encoder": EncoderConfig(weights="hub")}, "expect the 3 channels.*trunk.encoder.weights"),
            ({"architecture": "deeplab_v2"}, "cannot stand behind a trunk"),
        ],
    )
    def test_what_does_not_fit_behind_a_trunk(self, words, rule):
        with pytest.raises(ValidationError, match=rule):
            NetworkConfig(trunk=TrunkConfig(), **words)

    def test_a_transformers_encoder_does_not_fit(self):
        with pytest.raises(InputError, match="not the 192 of a trunk") as caught:
            network("segformer", {}, name="hf:mit_b0")
        assert "\n" not in str(caught.value)

    def test_configuration_round_trips(self):
        config = NetworkConfig(scale=0.25, trunk=TrunkConfig(stride=8, checkpointing=False))
        assert NetworkConfig.model_validate_json(config.model_dump_json()) == config
        with pytest.raises(ValidationError, match="stride"):
            TrunkConfig(stride=2)
