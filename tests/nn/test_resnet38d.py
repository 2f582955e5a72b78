import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from tissuehint.errors import InputError
from tissuehint.nn.config import EncoderConfig, NetworkConfig, TrunkConfig
from tissuehint.nn.encoders import build_encoder, parameters_of_levels
from tissuehint.nn.networks import build_network
from tissuehint.nn.resnet38d import ResNet38d, WideBlock, name_from_mxnet

CHANNELS = (128, 256, 512, 1024, 2048, 4096)
STRIDES = (2, 4, 8, 8, 8, 8)
BLOCKS = [
    *["b2", "b2_1", "b2_2", "b3", "b3_1", "b3_2"],
    *["b4", "b4_1", "b4_2", "b4_3", "b4_4", "b4_5", "b5", "b5_1", "b5_2", "b6", "b7"],
]
WIDENING = ("b2", "b3", "b4", "b5", "b6", "b7")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def meta(**keys):
    """An encoder without memory."""
    with torch.device("meta"):
        return build_encoder(EncoderConfig(name="resnet38d", **keys))


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    built = build_encoder(EncoderConfig(name="resnet38d", frozen_norm=True, frozen_levels=1))
    for module in built.modules():  # norms that are not the identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    return built.eval()


@pytest.fixture(scope="module")
def converted(encoder, tmp_path_factory):
    """Weights as published: names without a wrapper, no batch counters, a classifier."""
    state = {name: value for name, value in encoder.backbone.state_dict().items() if "num_batches" not in name}
    path = tmp_path_factory.mktemp("weights") / "converted.pth"
    torch.save({**state, "fc8.weight": torch.zeros(2, 4096, 1, 1)}, path)
    return path


@pytest.mark.parametrize("size", [(224, 224), (64, 64), (75, 51), (33, 32)])
def test_maps_have_the_announced_channels_and_strides(size):
    built = meta()
    assert (built.channels, built.strides, built.multiple) == (CHANNELS, STRIDES, 8)
    shapes = [tuple(each.shape) for each in built(torch.empty(2, 3, *size, device="meta"))]
    expected = [
        (2, channels, *(-(-side // stride) for side in size))
        for channels, stride in zip(CHANNELS, STRIDES, strict=True)
    ]
    assert shapes == expected


def test_parameters_are_as_many_as_the_shapes_say():
    pair = 9 * (64 * 128 + 128 * 128) + 64 * 128 + 2 * 2 * 9 * 128 * 128  # level 2
    pair += 9 * (128 * 256 + 256 * 256) + 128 * 256 + 2 * 2 * 9 * 256 * 256
    pair += 9 * (256 * 512 + 512 * 512) + 256 * 512 + 5 * 2 * 9 * 512 * 512
    pair += 9 * (512 * 512 + 512 * 1024) + 512 * 1024 + 2 * 2 * 9 * 1024 * 512
    bottlenecks = 1024 * 512 + 9 * 512 * 1024 + 1024 * 2048 + 1024 * 2048
    bottlenecks += 2048 * 1024 + 9 * 1024 * 2048 + 2048 * 4096 + 2048 * 4096
    norms = 64 + 5 * 128 + 128 + 5 * 256 + 256 + 11 * 512 + 512 + 512 + 2 * (1024 + 512)
    norms += 1024 + 512 + 1024 + 2048 + 1024 + 2048 + 4096
    total = 27 * 64 + pair + bottlenecks + 2 * norms
    assert sum(each.numel() for each in meta().parameters()) == total == 105_070_912


def test_names_are_those_of_the_published_weights():
    expected = {"conv1a.weight"} | {f"bn7.{name}" for name in NORM}
    for block in BLOCKS:
        parts = ["2a", "2b1", *(["2b2"] if block in ("b6", "b7") else [])]
        expected |= {f"{block}.conv_branch{part}.weight" for part in parts}
        expected |= {f"{block}.bn_branch{part}.{name}" for part in parts for name in NORM}
        if block in WIDENING:
            expected.add(f"{block}.conv_branch1.weight")
    assert set(meta().backbone.state_dict()) == expected


def test_dilations_and_strides_are_those_of_affinitynet():
    convolutions = {name: each for name, each in meta().backbone.named_modules() if isinstance(each, nn.Conv2d)}
    for name, each in convolutions.items():
        block, _, part = name.partition(".conv_branch")
        dilation = 1
        if each.kernel_size == (3, 3) and block[:2] in ("b5", "b6", "b7"):
            dilation = {"b5": 2, "b6": 4, "b7": 4}[block[:2]]
        if (block, part) == ("b5", "2a"):
            dilation = 1
        stride = 2 if block in ("b2", "b3", "b4") and part in ("1", "2a") else 1
        assert (each.dilation, each.stride) == ((dilation,) * 2, (stride,) * 2), name
        assert each.padding == (dilation * (each.kernel_size[0] // 2),) * 2
        assert each.bias is None
    kernels = {part: convolutions[f"b6.conv_branch{part}"].kernel_size[0] for part in ("2a", "2b1", "2b2", "1")}
    assert kernels == {"2a": 1, "2b1": 3, "2b2": 1, "1": 1}
    assert (meta().backbone.b6.dropout.p, meta().backbone.b7.dropout.p, meta().backbone.b5.dropout.p) == (0.3, 0.5, 0)


def normed(state, name, maps):
    mean, var, weight, bias = (
        state[f"bn_branch{name}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
    )
    return ((maps - mean) / (var + 1e-5).sqrt() * weight + bias).clamp(min=0)


def scrambled(block):
    """Double precision, evaluation mode, no parameter at its initial value."""
    block = block.double().eval()
    for name, value in block.state_dict().items():
        if "num_batches" not in name:
            value.uniform_(0.5, 1.5) if "running_var" in name else value.normal_()
    return block


def test_a_block_computes_what_its_equation_says():
    block = scrambled(WideBlock(6, (4, 10), (3, 3), (1, 2), stride=2))
    state, maps = block.state_dict(), torch.randn(2, 6, 11, 8, dtype=torch.float64)
    first = normed(state, "2a", maps)
    second = normed(state, "2b1", F.conv2d(first, state["conv_branch2a.weight"], stride=2, padding=1))
    residual = F.conv2d(second, state["conv_branch2b1.weight"], padding=2, dilation=2)
    shortcut = F.conv2d(first, state["conv_branch1.weight"], stride=2)
    assert torch.allclose(block(maps), shortcut + residual, rtol=1e-12)


def test_a_block_of_one_shape_adds_to_its_bare_input():
    block = scrambled(WideBlock(10, (4, 10), (3, 3), (2, 2)))
    state, maps = block.state_dict(), torch.randn(2, 10, 9, 8, dtype=torch.float64)
    second = F.conv2d(normed(state, "2a", maps), state["conv_branch2a.weight"], padding=2, dilation=2)
    residual = F.conv2d(normed(state, "2b1", second), state["conv_branch2b1.weight"], padding=2, dilation=2)
    assert "conv_branch1.weight" not in state
    assert torch.allclose(block(maps), maps + residual, rtol=1e-12)


def test_a_bottleneck_computes_what_its_equation_says():
    block = scrambled(WideBlock(6, (3, 5, 8), (1, 3, 1), (1, 4, 1), dropout=0.5))
    state, maps = block.state_dict(), torch.randn(2, 6, 11, 8, dtype=torch.float64)
    first = normed(state, "2a", maps)
    second = normed(state, "2b1", F.conv2d(first, state["conv_branch2a.weight"]))
    third = normed(state, "2b2", F.conv2d(second, state["conv_branch2b1.weight"], padding=4, dilation=4))
    expected = F.conv2d(first, state["conv_branch1.weight"]) + F.conv2d(third, state["conv_branch2b2.weight"])
    assert torch.allclose(block(maps), expected, rtol=1e-12)


def test_every_level_is_the_output_of_one_submodule_and_the_input_of_the_next(encoder):
    names = ("b2_2", "b3_2", "b4_5", "b5_2", "b6", "relu7")
    followers = ("b3", "b4", "b5", "b6", "b7")
    outputs, inputs, handles = {}, {}, []
    for name, module in encoder.backbone.named_modules():
        if name:
            handles.append(module.register_forward_hook(lambda _, i, out, name=name: outputs.update({name: out})))
            handles.append(module.register_forward_pre_hook(lambda _, i, name=name: inputs.update({name: i[0]})))
    with torch.no_grad():
        maps = encoder.backbone(torch.rand(1, 3, 64, 64))
    for handle in handles:
        handle.remove()
    assert encoder.backbone.levels == names
    assert all(outputs[name] is each for name, each in zip(names, maps, strict=True))
    assert all(inputs[name] is each for name, each in zip(followers, maps[:-1], strict=True))
    # and of no other submodule
    same = [
        name for name, out in outputs.items() for each in maps if out.shape == each.shape and torch.equal(out, each)
    ]
    assert sorted(same) == sorted(names)


def test_a_hook_behind_a_level_changes_it_and_all_later_ones(encoder):
    images = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = encoder(images)
        handle = encoder.backbone.b4_5.register_forward_hook(lambda _, inputs, out: 2 * out)
        after = encoder(images)
        handle.remove()
    assert [torch.equal(one, other) for one, other in zip(before, after, strict=True)] == [True] * 2 + [False] * 4
    assert torch.equal(after[2], 2 * before[2])


def test_random_start_is_kaimings(encoder):
    weight = encoder.backbone.b4_2.conv_branch2a.weight.detach()
    assert weight.mean().abs() < 2e-4
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


def test_a_converted_file_loads_strictly_and_its_classifier_is_ignored(encoder, converted):
    read = build_encoder(EncoderConfig(name="resnet38d", weights=str(converted)))
    own = read.backbone.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in encoder.backbone.state_dict().items())
    assert read.weights.ignored == ("fc8.weight",)
    assert read.weights.loaded == sum("num_batches" not in name for name in own)


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"b4_3.bn_branch2b1.weight": None}, "missing: b4_3.bn_branch2b1.weight"),
        ({"b6.conv_branch2b2.weight": torch.zeros(1)}, "the encoder needs"),
        ({"b4_6.conv_branch2a.weight": torch.zeros(1)}, "more than this architecture: b4_6"),
    ],
)
def test_a_file_of_another_architecture_is_refused(change, rule, tmp_path):
    with torch.device("meta"):
        network = ResNet38d()
    state = {name: torch.zeros(()).expand(value.shape) for name, value in network.state_dict().items()}
    state = {name: value for name, value in {**state, **change}.items() if value is not None}
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=rule):
        network.load(tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("keys", "rule"),
    [
        ({"output_stride": 16}, "has output stride 8, not 16; leave output_stride out"),
        ({"weights": "hub"}, "no weights on a publisher's hub; give the path"),
        ({"weights": "nowhere.pth"}, "does not exist"),
        ({"weights": "nowhere.params"}, "does not exist"),
        ({"frozen_levels": 7}, "is more than the 6 levels of 'resnet38d'"),
    ],
)
def test_what_it_cannot_be(keys, rule):
    with pytest.raises(InputError, match=rule) as caught:
        meta(**keys)
    assert "\n" not in str(caught.value)


def test_its_own_stride_may_be_said():
    assert meta(output_stride=8).strides == STRIDES


@pytest.mark.parametrize("architecture", ["unet", "deeplab_v2"])
def test_segmentation_networks_say_that_it_is_for_class_maps(architecture):
    config = NetworkConfig(architecture=architecture, encoder=EncoderConfig(name="resnet38d"))
    with pytest.raises(InputError, match="is an encoder for class maps only"):
        build_network(config, 2)


@pytest.mark.parametrize("keys", [{"frozen_norm": True}, {"frozen_levels": 1}])
def test_networks_and_trunks_refuse_frozen_parts(keys):
    for kind in (NetworkConfig, TrunkConfig):
        with pytest.raises(ValidationError, match=f"{next(iter(keys))} is for encoders of class maps"):
            kind(encoder=EncoderConfig(name="resnet18", **keys))
    with pytest.raises(ValidationError, match="frozen_levels"):
        EncoderConfig(frozen_levels=-1)


def untrained(encoder):
    return {name for name, each in encoder.backbone.named_parameters() if not each.requires_grad}


def norms(encoder):
    return {name: each for name, each in encoder.named_modules() if isinstance(each, nn.BatchNorm2d)}


def test_one_frozen_level_is_the_stem_and_b2():
    built = meta(frozen_levels=1)
    expected = {name for name, _ in built.backbone.named_parameters() if name.startswith(("conv1a", "b2"))}
    assert untrained(built) == expected
    built.train()
    assert all(each.training != name.startswith("backbone.b2") for name, each in norms(built).items())


def test_frozen_norms_of_resnet38d():
    built = meta(frozen_norm=True)
    assert untrained(built) == {name for name, _ in built.backbone.named_parameters() if "bn" in name}
    nn.Sequential(built).train()
    assert built.backbone.b7.training
    assert not any(each.training for each in norms(built).values())


def test_all_levels_frozen():
    built = meta(frozen_levels=6)
    assert all(not each.requires_grad for each in built.parameters())


def test_training_leaves_the_frozen_parts_alone(encoder):
    statistics = {name: value.clone() for name, value in encoder.named_buffers()}
    encoder.train()(torch.rand(1, 3, 32, 32))[-1].mean().backward()
    got = {name for name, each in encoder.backbone.named_parameters() if each.grad is not None}
    encoder.zero_grad(set_to_none=True)
    encoder.eval()
    names = {name for name, _ in encoder.backbone.named_parameters()}
    assert got == {name for name in names if "bn" not in name and not name.startswith(("conv1a", "b2"))}
    assert all(torch.equal(value, statistics[name]) for name, value in encoder.named_buffers())


def test_a_saved_configuration_freezes_the_same_parts():
    built = build_encoder(EncoderConfig(name="test_resnet", frozen_levels=2, frozen_norm=True))
    rebuilt = build_encoder(EncoderConfig.model_validate_json(built.config.model_dump_json()))
    rebuilt.load_state_dict(built.state_dict())
    assert untrained(rebuilt) == untrained(built) != set()
    assert not any(each.training for each in norms(rebuilt.train()).values())


@pytest.mark.parametrize(("levels", "parts"), [(1, ("conv1", "bn1")), (3, ("conv1", "bn1", "layer1", "layer2"))])
def test_frozen_levels_of_a_timm_network(levels, parts):
    built = build_encoder(EncoderConfig(name="test_resnet", frozen_levels=levels)).train()
    names = {name for name, _ in built.backbone.named_parameters()}
    frozen = {name for name in names if name.split(".")[0] in parts}
    assert untrained(built) == frozen
    before = {name: value.clone() for name, value in built.state_dict().items()}
    optimizer = torch.optim.SGD(built.parameters(), lr=1.0, weight_decay=0.1)
    sum(each.square().mean() for each in built(torch.rand(2, 3, 64, 64))).backward()
    assert {name for name, each in built.backbone.named_parameters() if each.grad is None} == frozen
    optimizer.step()
    after = built.backbone.state_dict()
    same = {name for name, value in after.items() if torch.equal(value, before[f"backbone.{name}"])}
    assert same >= {name for name in after if name.split(".")[0] in parts}
    statistics = {name for name in after if "running" in name}
    assert same & statistics == {name for name in statistics if name.split(".")[0] in parts}


def test_frozen_norms_of_a_timm_network_keep_their_statistics():
    built = build_encoder(EncoderConfig(name="test_resnet", frozen_norm=True)).train()
    before = {name: value.clone() for name, value in built.named_buffers()}
    built(torch.rand(2, 3, 64, 64))[-1].mean().backward()
    assert all(torch.equal(value, before[name]) for name, value in built.named_buffers())
    affine = {name for name, _ in built.named_parameters() if name.rpartition(".")[0] in norms(built)}
    assert affine
    assert affine == {name for name, each in built.named_parameters() if each.grad is None}


def test_nothing_is_frozen_unless_asked():
    built = build_encoder(EncoderConfig(name="test_resnet")).train()
    assert all(each.requires_grad for each in built.parameters())
    assert all(each.training for each in built.modules())
    assert parameters_of_levels(built, 0) == []


@pytest.mark.parametrize("name", ["test_resnet", "hf:mit_b0", "vit_tiny_patch16_224"])
def test_freezing_draws_no_random_numbers_and_changes_no_weights(name):
    torch.manual_seed(5)
    plain, after = build_encoder(EncoderConfig(name=name)), torch.rand(3)
    torch.manual_seed(5)
    frozen, again = build_encoder(EncoderConfig(name=name, frozen_levels=1, frozen_norm=True)), torch.rand(3)
    assert torch.equal(after, again)
    assert 0 < len(untrained(frozen)) < len(list(frozen.parameters()))
    assert all(torch.equal(value, plain.state_dict()[key]) for key, value in frozen.state_dict().items())
    assert all(each.grad is None for each in frozen.parameters())


def test_levels_that_a_network_has_not():
    with pytest.raises(InputError, match="frozen_levels 9: is more than the 5 levels of 'test_resnet'; use at most 5"):
        build_encoder(EncoderConfig(name="test_resnet", frozen_levels=9))


def test_a_network_of_one_size_is_looked_into_at_that_size():
    frozen = build_encoder(EncoderConfig(name="maxvit_pico_rw_256", frozen_levels=1))
    assert 0 < len(untrained(frozen)) < len(list(frozen.parameters()))


def mxnet_name(name):
    """The original name of one of ours, the other way round than the code under test."""
    kinds = {"bias": "beta", "running_mean": "moving_mean", "running_var": "moving_var"}
    *block, last = name.split(".")
    prefix = "aux" if last.startswith("running") else "arg"
    if block in (["conv1a"], ["bn7"]):
        end = "weight" if block == ["conv1a"] else kinds.get(last, "gamma")
        return f"{prefix}:{block[0]}_{end}"
    kind, branch = block[1].split("_")
    level, _, number = block[0][1:].partition("_")
    place = f"{level}b{number}" if number else f"{level}a"
    if kind == "conv":
        return f"arg:res{place}_{branch}_weight"
    return f"{prefix}:bn{place}_{branch}_{kinds.get(last, 'gamma')}"


def mxnet_file(path, arrays, version):
    """Write a ``.params`` file; version 0 is the one before MXNet 1.0."""
    with path.open("wb") as file:
        file.write(struct.pack("<QQQ", 0x112, 0, len(arrays)))
        for array in arrays.values():
            if version:
                file.write(struct.pack("<I", 0xF993FAC7 + version))
            if version == 2:
                file.write(struct.pack("<i", 0))
            file.write(struct.pack(f"<I{array.ndim}{'q' if version else 'I'}", array.ndim, *array.shape))
            file.write(struct.pack("<iii", 1, 0, {"f4": 0, "f8": 1}[array.dtype.str[1:]]))
            file.write(array.tobytes())
        file.write(struct.pack("<Q", len(arrays)))
        for name in arrays:
            file.write(struct.pack("<Q", len(name)) + name.encode())
    return path


def test_the_original_file_of_mxnet_loads(encoder, tmp_path):
    state = {name: value for name, value in encoder.backbone.state_dict().items() if "num_batches" not in name}
    arrays = {mxnet_name(name): value.numpy() for name, value in state.items()}
    assert {name_from_mxnet(name) for name in arrays} == state.keys()
    arrays["arg:linear1000_bias"] = np.zeros(1000, np.float32)
    path = mxnet_file(tmp_path / "a1.params", arrays, version=0)
    read = build_encoder(EncoderConfig(name="resnet38d", weights=str(path)))
    assert all(torch.equal(value, state[name]) for name, value in read.backbone.state_dict().items() if name in state)
    assert (read.weights.loaded, read.weights.ignored) == (len(state), ("arg:linear1000_bias",))
