"""The contract over the whole registry. A new method adds its tiny settings to TINY and gets every test."""

import pytest

from tissuehint.plugins import method_names
from tissuehint.testing import MethodCase, MethodContract

ENCODER = {"name": "test_resnet"}
UNET = {"architecture": "unet", "encoder": ENCODER, "decoder": {"encoder_depth": 3, "decoder_channels": [16, 16, 8]}}
# the compared methods that bring modules or randomness of their own; tests/methods has the others
COMPARED = ("mean_teacher", "dual_branch", "mixmatch")
FAST = {"name": "adamw", "learning_rate": 1e-3, "head_multiplier": 5, "power": 0}
FROZEN = {"name": "test_resnet", "side": 64}  # an image encoder

# name -> settings of its cases; several where a setting takes another path through the method
TINY = {
    "cam": [
        {"encoder": ENCODER, "optimization": FAST},
        {
            "encoder": {"name": "mobilenetv3_small_050"},
            "levels": 2,
            "dropout": 0.3,
            "optimization": FAST,
            "test_time": {"flip": True, "scales": [0.75, 1.0], "intensities": [1.0, 1.1]},
        },
    ],
    "gland": [
        {"encoder": ENCODER, "optimization": FAST},
        {
            "encoder": {"name": "hf:mit_b0", "output_stride": 16},
            "levels": 2,
            "attention": "criss_cross_twice",
            "attention_levels": [-2],
            "pyramid_scales": [2, 4],
            "optimization": FAST,
        },
    ],
    "pbip": [
        {
            "encoder": ENCODER,
            "image_encoder": FROZEN,
            "bank": {"prototypes_per_class": 1, "images_per_prototype": 2},
            "scale": 2.0,  # batch norm's running means of six steps are rough, and 14 makes the most of it
            "optimization": FAST,
        },
        {
            "encoder": {"name": "hf:mit_b0", "output_stride": 16},
            "image_encoder": FROZEN,
            "bank": {"prototypes_per_class": [2, 1, 2], "multi_tag_fallback": True, "selection": "random"},
            "matching": {"form": "prototype", "maps": "coarsest", "temperature": 0.07, "sparsity": 5e-4, "chunk": 3},
            "merge": "softmax",
            "normalize_prototypes": False,
            "optimization": {**FAST, "learning_rate": 2e-4},
        },
    ],
    "lpd": [
        {
            "encoder": ENCODER,
            "image_encoder": FROZEN,
            "prototypes_per_class": 2,
            "warm_up": 2,
            # at the weights 30 and 50 the field makes 2e-4 of the 1e-6 by which a batch changes a convolution
            "crf": {"gaussian_weight": 3, "bilateral_weight": 5},
            "scale": 2.0,
            "test_time": {},
            "optimization": FAST,
        },
        {
            "encoder": {"name": "hf:mit_b0", "output_stride": 16},
            "image_encoder": FROZEN,
            "prototypes_per_class": 3,
            "warm_up": 0,
            "diversity": {"form": "correlation", "gate_by_tags": False},
            "matching": {"max_pairs": 2},
            "crf": None,
            "background": None,
            "optimization": {**FAST, "learning_rate": 2e-4},
        },
    ],
    "vslp": [
        {
            "confidence": {"encoder": ENCODER},
            "test_time": {"rotations": [0, 30], "mirror": True},
            "fusion": {"regulariser": {"features": 4}, "steps": 3},
            "learning": {"steps": 4, "round_steps": 2, "warm_up": 2, "views": 2},
            "optimization": FAST,
        },
        {
            "confidence": {"encoder": ENCODER, "cells": "tiles", "tiles": {"stride": 16, "side": 32}},
            "test_time": {"rotations": [0, 90], "mirror": False, "offsets": [0, 5]},
            "fusion": {"fidelity": "linear", "regulariser": {"name": "total_variation"}, "solver": "primal_dual"},
            "optimization": FAST,
        },
        {
            "confidence": {"encoder": {**ENCODER, "depth": 2}},
            "test_time": {"rotations": [0], "mirror": True},
            "fusion": {
                "ground_cost": [[0, 1, 2], [1, 0, 1], [2, 1, 0]],
                "regulariser": {"name": "total_variation"},
                "proportions": "soft",
                "steps": 2,
            },
            "optimization": FAST,
        },
        {
            "confidence": {"cells": "pixels", "network": UNET},
            "losses": {"form": "l1", "dead_zone": 0.02},
            "test_time": {"rotations": [0], "mirror": False},
            "average": "mean",
            "resolution": 1,
            "fusion": None,
            "optimization": FAST,
        },
        {
            "confidence": {"encoder": {"name": "hf:mit_b0"}, "levels": 2},
            "test_time": {"rotations": [0, 180], "mirror": False},
            "fusion": {
                "fidelity": "linear",
                "ground_cost": [[0, 1, 2], [1, 0, 1], [2, 1, 0]],
                "proportions": "soft",
                "view_entropy": 1.0,
                "regulariser": {"features": 4, "guide": "none"},
                "steps": 2,
            },
            "learning": {"steps": 2, "round_steps": 2, "warm_up": 1, "batch_size": 4},
            "optimization": {**FAST, "learning_rate": 2e-4},
        },
    ],
    "cvm": [
        {"network": UNET, "optimization": FAST},
        *({"network": UNET, "complement": name, "optimization": FAST} for name in COMPARED),
        {"network": {**UNET, "trunk": {"encoder": {"name": "resnet18"}, "stride": 4}}, "optimization": FAST},
    ],
}
CASES = [MethodCase(name, settings) for name, several in TINY.items() for settings in several]


def test_every_method_of_the_registry_has_a_case():
    ours = [name for name in method_names() if name in TINY]
    missing = sorted(set(method_names()) - set(TINY))
    assert not missing, f"give {', '.join(missing)} tiny settings in TINY, so that the contract runs over it"
    assert ours


class TestContract(MethodContract):
    @pytest.fixture(scope="class", params=CASES, ids=[f"{case.name}-{index}" for index, case in enumerate(CASES)])
    @classmethod
    def case(cls, request):
        return request.param
