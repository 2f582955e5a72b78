"""Frozen image encoders that are known by name: architecture, normalisation, where the weights are, under what licence.

What stands here was taken from the publishers' pages, code and papers; what could not be looked up there says "see
hub page" instead. Nothing heavy is imported: the command line shows this table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tissuehint.nn.config import NAMED_STATISTICS, ChannelStatistics

# Radford et al. 2021 (CLIP), preprocessor of openai/clip-vit-base-patch32; PLIP was tuned from it with the same
CLIP_STATISTICS = ChannelStatistics(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
# MedCLIP's constants: one mean and one std of chest X-rays, for all channels
MEDCLIP_STATISTICS = ChannelStatistics(mean=(0.5862785803043838,) * 3, std=(0.27950088968644304,) * 3)
# model card of H-optimus-0
H_OPTIMUS_STATISTICS = ChannelStatistics(mean=(0.707223, 0.578729, 0.703617), std=(0.211883, 0.230117, 0.177517))
IMAGENET = NAMED_STATISTICS["imagenet"]

NONCOMMERCIAL = "CC-BY-NC-ND-4.0"
SEE_HUB = "see hub page"

Family = Literal["medclip", "swin", "clip", "vit", "dinov2", "timm"]
Pooling = Literal["class", "class+patches"]


@dataclass(frozen=True)
class CatalogEncoder:
    """An image encoder of the catalog.

    Args:
        name: as in a recipe.
        what: architecture and what it was trained on.
        parameters: in millions, of the image part.
        dim: D, length of a feature vector.
        statistics: normalisation that the weights were trained with.
        hub: repository on the Hugging Face hub; None where the publisher has none there.
        licence: of the weights, as the publisher says it.
        gated: whether the hub asks for a login and agreement to terms; None where that could not be looked up.
        source: paper.
        family: how it is built: by transformers, or by timm.
        options: arguments of the configuration of transformers, or of ``timm.create_model``.
        architecture: name in timm, for the family ``timm``.
        swiglu: timm's transformer blocks have packed SwiGLU layers.
        pooling: ``class`` is the class token; ``class+patches`` concatenates it with the mean of the patch tokens.
        side: pixels a side that the publisher's preprocessing gives it.
        multiple: sides that it takes are multiples of this.
        smallest: and at least this.
        origin: page with the weights, where ``hub`` is None.
    """

    name: str
    what: str
    parameters: float
    dim: int
    statistics: ChannelStatistics
    hub: str | None
    licence: str
    gated: bool | None
    source: str
    family: Family
    options: Mapping[str, Any] = field(default_factory=dict)
    architecture: str = ""
    swiglu: bool = False
    pooling: Pooling = "class"
    side: int = 224
    multiple: int = 16
    smallest: int = 0
    origin: str = ""

    @property
    def projected(self) -> bool:
        """Whether its features come out of a trained projection."""
        return self.family in ("medclip", "clip")

    @property
    def page(self) -> str:
        """Where the weights are, and where access is asked for."""
        return f"https://huggingface.co/{self.hub}" if self.hub else self.origin

    @property
    def access(self) -> str:
        """``open``, ``gated``, or that it could not be looked up."""
        return SEE_HUB if self.gated is None else "gated" if self.gated else "open"


# Liu et al. 2021 (Swin): SwinConfig of transformers has the numbers of microsoft/swin-tiny-patch4-window7-224. Below
# 224 px the last maps are smaller than a window, for which the bias table of the weights has no entries.
_SWIN: dict[str, Any] = {"family": "swin", "multiple": 32, "smallest": 224}
# ViT-B/32 of openai/clip-vit-base-patch32: CLIPVisionConfig of transformers has its numbers
_CLIP: dict[str, Any] = {
    "parameters": 87.8,
    "dim": 512,
    "statistics": CLIP_STATISTICS,
    "family": "clip",
    "options": {"patch_size": 32, "projection_dim": 512},
    "multiple": 32,
}
_VIRCHOW: dict[str, Any] = {
    "parameters": 631.2,
    "dim": 2560,
    "statistics": IMAGENET,
    "gated": True,
    "family": "timm",
    "architecture": "vit_huge_patch14_224",
    "swiglu": True,
    "pooling": "class+patches",
    "multiple": 14,
}

_ROWS = (
    CatalogEncoder(
        name="medclip",
        what="Swin-T, projection; chest X-rays",
        parameters=27.9,
        dim=512,
        statistics=MEDCLIP_STATISTICS,
        hub=None,
        licence="MIT (repository)",
        gated=False,
        source="Wang et al., MedCLIP, EMNLP 2022",
        origin="https://storage.googleapis.com/pytrial/medclip-vit-pretrained.zip",
        **{**_SWIN, "family": "medclip"},
    ),
    CatalogEncoder(
        name="swin_imagenet",
        what="Swin-T; ImageNet-1k",
        parameters=27.5,
        dim=768,
        statistics=IMAGENET,
        hub="microsoft/swin-tiny-patch4-window7-224",
        licence="Apache-2.0",
        gated=False,
        source="Liu et al., Swin Transformer, ICCV 2021",
        **_SWIN,
    ),
    CatalogEncoder(
        name="plip",
        what="ViT-B/32, projection; pathology of Twitter",
        hub="vinid/plip",
        licence=SEE_HUB,
        gated=False,
        source="Huang et al., PLIP, Nature Medicine 2023",
        **_CLIP,
    ),
    CatalogEncoder(
        name="clip",
        what="ViT-B/32, projection; web images",
        hub="openai/clip-vit-base-patch32",
        licence="MIT (repository)",
        gated=False,
        source="Radford et al., CLIP, ICML 2021",
        **_CLIP,
    ),
    CatalogEncoder(
        name="dinov2",
        what="ViT-B/14 by DINOv2; web images",
        parameters=86.6,
        dim=768,
        statistics=IMAGENET,
        hub="facebook/dinov2-base",
        licence="Apache-2.0",
        gated=False,
        source="Oquab et al., DINOv2, TMLR 2024",
        family="dinov2",
        options={"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 518},
        multiple=14,
    ),
    CatalogEncoder(
        name="phikon",
        what="ViT-B/16 by iBOT; TCGA slides",
        parameters=85.8,
        dim=768,
        statistics=IMAGENET,
        hub="owkin/phikon",
        licence="Owkin, non-commercial",
        gated=False,
        source="Filiot et al., medRxiv 2023.07.21.23292757",
        family="vit",
    ),
    CatalogEncoder(
        name="phikon_v2",
        what="ViT-L/16 by DINOv2; public slides (PANCAN-XL)",
        parameters=303.4,
        dim=1024,
        statistics=IMAGENET,
        hub="owkin/phikon-v2",
        licence="Owkin, non-commercial",
        gated=False,
        source="Filiot et al., arXiv 2409.09173",
        family="dinov2",
        options={
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 224,
            "patch_size": 16,
        },
    ),
    CatalogEncoder(
        name="uni",
        what="ViT-L/16 by DINOv2; pathology slides",
        parameters=303.4,
        dim=1024,
        statistics=IMAGENET,
        hub="MahmoodLab/UNI",
        licence=NONCOMMERCIAL,
        gated=True,
        source="Chen et al., UNI, Nature Medicine 2024",
        family="timm",
        architecture="vit_large_patch16_224",
        options={"img_size": 224, "init_values": 1e-5},
    ),
    CatalogEncoder(
        name="uni2",
        what="ViT-H/14, 8 registers, by DINOv2; pathology slides",
        parameters=681.4,
        dim=1536,
        statistics=IMAGENET,
        hub="MahmoodLab/UNI2-h",
        licence=NONCOMMERCIAL,
        gated=True,
        source="Chen et al., UNI, Nature Medicine 2024 (its successor)",
        family="timm",
        architecture="vit_giant_patch14_224",
        options={
            "img_size": 224,
            "patch_size": 14,
            "depth": 24,
            "num_heads": 24,
            "init_values": 1e-5,
            "embed_dim": 1536,
            "mlp_ratio": 2.66667 * 2,
            "no_embed_class": True,
            "reg_tokens": 8,
        },
        swiglu=True,
        multiple=14,
    ),
    CatalogEncoder(
        name="virchow",
        what="ViT-H/14 by DINOv2; pathology slides",
        hub="paige-ai/Virchow",
        licence="Apache-2.0",
        source="Vorontsov et al., Virchow, Nature Medicine 2024",
        options={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": ""},
        **_VIRCHOW,
    ),
    CatalogEncoder(
        name="virchow2",
        what="ViT-H/14, 4 registers, by DINOv2; pathology slides",
        hub="paige-ai/Virchow2",
        licence=NONCOMMERCIAL,
        source="Zimmermann et al., Virchow2, arXiv 2408.00738",
        options={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", "reg_tokens": 4},
        **_VIRCHOW,
    ),
    CatalogEncoder(
        name="h_optimus_0",
        what="ViT-g/14, 4 registers, by DINOv2; pathology slides",
        parameters=1134.8,
        dim=1536,
        statistics=H_OPTIMUS_STATISTICS,
        hub="bioptimus/H-optimus-0",
        licence="Apache-2.0",
        gated=None,
        source="Saillard et al., H-optimus-0, github.com/bioptimus/releases, 2024",
        family="timm",
        architecture="vit_giant_patch14_reg4_dinov2",
        options={"img_size": 224, "init_values": 1e-5},
        multiple=14,
    ),
    CatalogEncoder(
        name="gigapath",
        what="ViT-g/16 by DINOv2; pathology slides",
        parameters=1135.0,
        dim=1536,
        statistics=IMAGENET,
        hub="prov-gigapath/prov-gigapath",
        licence="Apache-2.0, terms: research only",
        gated=True,
        source="Xu et al., Prov-GigaPath, Nature 2024",
        family="timm",
        architecture="vit_giant_patch14_dinov2",
        options={
            "img_size": 224,
            "patch_size": 16,
            "embed_dim": 1536,
            "depth": 40,
            "num_heads": 24,
            "mlp_ratio": 5.33334,
        },
    ),
)

CATALOG: Mapping[str, CatalogEncoder] = {row.name: row for row in _ROWS}
