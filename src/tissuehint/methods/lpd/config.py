"""Settings of LPD. Defaults are those of the released code; BCSS-WSSS trains 18,700 steps of 10 images with them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tissuehint.methods.base import CRFConfig, TestTimeAugmentation
from tissuehint.methods.prototypes import MatchingConfig, PrototypeConfig
from tissuehint.nn.matching import Form
from tissuehint.nn.prototypes import Merge

WARM_UP = 3000  # steps
PROTOTYPES = 10  # of each class
SIX_VIEWS = TestTimeAugmentation(flip="horizontal", intensities=(1.0, 0.9, 1.1))


class LPDMatchingConfig(MatchingConfig):
    """The mask refiner: PBIP's matching branch with the numbers of LPD's released code."""

    weight: float = Field(default=0.1, ge=0)
    background: float = Field(default=1.0, ge=0)
    threshold: float | None = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=0.07, gt=0)
    form: Form = "prototype"
    maps: Literal["sum", "coarsest"] = "coarsest"
    sparsity: float = Field(default=5e-4, ge=0)


class DiversityConfig(BaseModel):
    """What makes the prototypes of a class look at different places.

    Args:
        weight: lambda_div; 0 leaves the loss out.
        form: ``jeffreys`` (the last release of the code, mended) or ``correlation`` (the first).
        temperature: of the Jeffreys form (ours; the released code has none).
        min_pixels: of the Jeffreys form: cells that a class must have in an image; null is 2 K.
        window: of the correlation form, cells a side, odd.
        min_mass: of the correlation form.
        prototypes: what the features of the coarsest level are compared with: the ``projected`` prototypes that make
            the class maps, or the ``raw`` ones (released code), for which an encoder with as many channels as the
            frozen encoder has features is needed.
        background: a cell belongs to the class with the largest logit, or to none where all lie below this.
        gate_by_tags: only tagged classes have a region.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    weight: float = Field(default=0.5, ge=0)
    form: Literal["jeffreys", "correlation"] = "jeffreys"
    temperature: float = Field(default=0.1, gt=0)
    min_pixels: int | None = Field(default=None, ge=1)
    window: int = Field(default=7, ge=1)
    min_mass: float = Field(default=0.05, ge=0, lt=1)
    prototypes: Literal["projected", "raw"] = "projected"
    background: float = 0.2
    gate_by_tags: bool = True

    @field_validator("window")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError(f"{value} is even; give an odd number of cells, such as 7")
        return value


class LPDConfig(PrototypeConfig):
    """A classifier by prototypes that are trained with it.

    Args:
        prototypes_per_class: K.
        warm_up: steps with the classification loss alone; matching would destroy prototypes that start at random.
        matching: the mask refiner.
        diversity: of the prototypes of a class.
        background: exponent of the background (1 - max M)^exponent that competes with the classes for a pixel; null
            leaves it out.
    """

    name: Literal["lpd"] = "lpd"
    prototypes_per_class: int = Field(default=PROTOTYPES, ge=1)
    warm_up: int = Field(default=WARM_UP, ge=0)
    matching: LPDMatchingConfig = LPDMatchingConfig()
    diversity: DiversityConfig = DiversityConfig()
    merge: Merge = "softmax"
    background: float | None = Field(default=10.0, gt=0)
    crf: CRFConfig | None = CRFConfig()
    test_time: TestTimeAugmentation = SIX_VIEWS

    @model_validator(mode="after")
    def _prototypes_have_maps(self) -> LPDConfig:
        if self.similarity == "convolution":
            raise ValueError(
                "similarity: convolution has no prototypes that could be trained; write cosine, or use pbip"
            )
        return self
