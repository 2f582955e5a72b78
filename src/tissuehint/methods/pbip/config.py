"""Settings of PBIP's first stage."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from tissuehint.methods.pbip.bank import BankConfig
from tissuehint.methods.prototypes import PrototypeConfig


class PBIPConfig(PrototypeConfig):
    """A classifier by the prototypes of an image bank, with foreground/background matching.

    Args:
        bank: how prototypes are made from the training images.
        center_prototypes: as in ``PrototypeSettings``.
        level_weights: as in ``PrototypeSettings``; the default is the unweighted sum of Eq. 8.
    """

    name: Literal["pbip"] = "pbip"
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    center_prototypes: bool = True
    bank: BankConfig = BankConfig()

    @model_validator(mode="after")
    def _prototypes_are_seen(self) -> PBIPConfig:
        if self.similarity == "convolution" and self.matching.used and self.matching.form == "prototype":
            raise ValueError(
                "similarity: convolution has no map of each prototype, which matching.form: prototype matches; "
                "write matching.form: class, or similarity: cosine"
            )
        return self
