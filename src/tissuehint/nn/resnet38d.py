"""ResNet38d, the wide backbone of AffinityNet, SEAM and the gland paper.

Wu, Shen, van den Hengel: Wider or deeper: revisiting the ResNet model for visual recognition. Pattern Recognition 90,
2019, model A1 (ResNet-38), in its dilated form of stride 8: Ahn, Kwak: Learning pixel-level semantic affinity with
image-level supervision for weakly supervised semantic segmentation. CVPR 2018.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from tissuehint.errors import InputError
from tissuehint.nn.mxnet_parameters import read_mxnet_parameters
from tissuehint.nn.weights import DERIVED, LoadedWeights, load_backbone

STEM_CHANNELS = 64
# the stages of 3x3 blocks: name, channels between and after the two convolutions, stride of the first block,
# dilations of the first block, dilation of the others, number of blocks
STAGES = (
    ("b2", 128, 128, 2, (1, 1), 1, 3),
    ("b3", 256, 256, 2, (1, 1), 1, 3),
    ("b4", 512, 512, 2, (1, 1), 1, 6),
    ("b5", 512, 1024, 1, (1, 2), 2, 3),
)
# the two 1x1, 3x3, 1x1 blocks: name, channels after each convolution, dilation of the 3x3, dropout
BOTTLENECKS = (("b6", (512, 1024, 2048), 4, 0.3), ("b7", (1024, 2048, 4096), 4, 0.5))
CHANNELS = (128, 256, 512, 1024, 2048, 4096)
STRIDES = (2, 4, 8, 8, 8, 8)
# convolutions of the residual branch in their order
PARTS = ("2a", "2b1", "2b2")

MXNET_SUFFIX = ".params"
MXNET_BLOCK = re.compile(r"(bn|res)([2-7])(a|b(\d+))_(branch(?:1|2a|2b1|2b2))_([a-z_]+)")
MXNET_NAMES = {
    "weight": "weight",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_var": "running_var",
}


class WideBlock(nn.Module):
    r"""A residual block whose norms come first: ``y = s(x) + c_n(a_n(... c_1(a_1(x))))``, ``a_i = ReLU(norm_i(.))``.

    The shortcut ``s`` is x itself, or, where the shape changes, a 1x1 convolution of ``a_1(x)``. Channels are dropped
    before every convolution but the first. Submodules are called ``bn_branch2a``, ``conv_branch2a``, ``bn_branch2b1``,
    ... and ``conv_branch1``, as in the published weights.

    Args:
        in_channels: of x.
        channels: after each convolution, two or three.
        kernels: side of each convolution, odd.
        dilations: of each convolution.
        stride: of the first convolution and of the shortcut.
        dropout: probability that a channel is dropped in training.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int],
        kernels: Sequence[int],
        dilations: Sequence[int],
        stride: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.parts = PARTS[: len(channels)]
        width, step = in_channels, stride
        for part, out, kernel, dilation in zip(self.parts, channels, kernels, dilations, strict=True):
            padding = dilation * (kernel // 2)
            convolution = nn.Conv2d(width, out, kernel, step, padding, dilation, bias=False)
            self.add_module(f"bn_branch{part}", nn.BatchNorm2d(width))
            self.add_module(f"conv_branch{part}", convolution)
            width, step = out, 1
        changes = stride != 1 or width != in_channels
        self.conv_branch1 = nn.Conv2d(in_channels, width, 1, stride, bias=False) if changes else None
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """(B,in_channels,h,w) to (B,channels[-1],ceil(h/stride),ceil(w/stride))."""
        shortcut = branch = maps
        for index, part in enumerate(self.parts):
            branch = F.relu(self.get_submodule(f"bn_branch{part}")(branch))
            if index == 0 and self.conv_branch1 is not None:
                shortcut = self.conv_branch1(branch)
            if index > 0:
                branch = self.dropout(branch)
            branch = self.get_submodule(f"conv_branch{part}")(branch)
        return shortcut + branch


class ResNet38d(nn.Module):
    """Six maps of strides 2, 4, 8, 8, 8, 8: the ends of b2, b3, b4, b5, b6, and the activated end of b7.

    Every map is what one submodule returned (``levels`` has their names) and the very input of what follows.
    Random start: convolutions from Kaiming's normal distribution (fan out, ReLU), norms as the identity.

    The published weights are those of MXNet, trained on ImageNet with mean and standard deviation removed. They are
    read as converted by AffinityNet and its successors (``.pth``, state dict with ``b4_3.bn_branch2b1.weight``), or
    from the original ``.params`` file.

    Attributes:
        channels: per map, fine to coarse.
        strides: per map, pixels of the image per cell.
        levels: per map, the submodule whose output it is.
    """

    channels = CHANNELS
    strides = STRIDES

    def __init__(self) -> None:
        super().__init__()
        self.conv1a = nn.Conv2d(3, STEM_CHANNELS, 3, padding=1, bias=False)
        width = STEM_CHANNELS
        ends: list[str] = []
        self.chain: list[str] = []
        for name, between, out, stride, first, dilation, count in STAGES:
            self._add(name, WideBlock(width, (between, out), (3, 3), first, stride))
            for index in range(1, count):
                self._add(f"{name}_{index}", WideBlock(out, (between, out), (3, 3), (dilation, dilation)))
            width = out
            ends.append(self.chain[-1])
        for name, channels, dilation, dropout in BOTTLENECKS:
            self._add(name, WideBlock(width, channels, (1, 3, 1), (1, dilation, 1), dropout=dropout))
            width = channels[-1]
        self.bn7 = nn.BatchNorm2d(width)
        self.relu7 = nn.ReLU()  # not in place: the map before it stays what bn7 returned
        self.levels = (*ends, "b6", "relu7")
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B,3,H,W) to maps (B,C,ceil(H/stride),ceil(W/stride)), fine to coarse."""
        maps = self.conv1a(images)
        pyramid = []
        for name in self.chain:
            maps = self.get_submodule(name)(maps)
            if name in self.levels:
                pyramid.append(maps)
        pyramid.append(self.relu7(self.bn7(maps)))
        return pyramid

    def load(self, path: Path) -> LoadedWeights:
        """Read converted weights (.pth, .safetensors and others), or the original ``.params`` file of MXNet.

        Raises:
            InputError: unreadable file, or weights of another architecture.
        """
        return self._load_mxnet(path) if path.suffix == MXNET_SUFFIX else load_backbone(self, path)

    def _add(self, name: str, block: WideBlock) -> None:
        self.add_module(name, block)
        self.chain.append(name)

    def _load_mxnet(self, path: Path) -> LoadedWeights:
        offered = read_mxnet_parameters(path)
        tensors = {name: tensor for old, tensor in offered.items() if (name := name_from_mxnet(old)) is not None}
        state = {name: tensor for name, tensor in self.state_dict().items() if not name.endswith(DERIVED)}
        fix = "give the parameters of model A1, ilsvrc-cls_rna-a1_cls1000_ep-0001.params"
        missing = sorted(state.keys() - tensors.keys())
        if missing:
            rule = f"has {len(state) - len(missing)} of the {len(state)} tensors of the encoder; missing: {missing[0]}"
            raise InputError(path, rule, fix)
        foreign = sorted(tensors.keys() - state.keys())
        if foreign:
            raise InputError(path, f"has {len(foreign)} tensors more than this architecture: {foreign[0]}", fix)
        wrong = sorted(name for name in state if tensors[name].shape != state[name].shape)
        if wrong:
            rule = f"'{wrong[0]}' is {list(tensors[wrong[0]].shape)}, the encoder needs {list(state[wrong[0]].shape)}"
            raise InputError(path, rule, fix)
        self.load_state_dict(tensors, strict=False)
        ignored = tuple(sorted(old for old in offered if name_from_mxnet(old) is None))
        return LoadedWeights(str(path), len(tensors), ignored)


def name_from_mxnet(name: str) -> str | None:
    """Our name of a tensor of the original network, or None for its classifier.

    Example:
        >>> name_from_mxnet("aux:bn4b3_branch2b1_moving_mean")
        'b4_3.bn_branch2b1.running_mean'
        >>> name_from_mxnet("arg:res6a_branch1_weight")
        'b6.conv_branch1.weight'
        >>> name_from_mxnet("arg:linear1000_bias")
    """
    bare = name.removeprefix("arg:").removeprefix("aux:")
    if bare == "conv1a_weight":
        return "conv1a.weight"
    if bare.startswith("bn7_") and bare.removeprefix("bn7_") in MXNET_NAMES:
        return f"bn7.{MXNET_NAMES[bare.removeprefix('bn7_')]}"
    match = MXNET_BLOCK.fullmatch(bare)
    if match is None or match[6] not in MXNET_NAMES:
        return None
    block = f"b{match[2]}" + (f"_{match[4]}" if match[4] else "")
    kind = "bn" if match[1] == "bn" else "conv"
    return f"{block}.{kind}_{match[5]}.{MXNET_NAMES[match[6]]}"
