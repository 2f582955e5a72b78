"""PBIP: prototype-based image prompting."""

from tissuehint.methods.pbip.bank import Bank, BankConfig, build_bank
from tissuehint.methods.pbip.config import PBIPConfig
from tissuehint.methods.pbip.method import PBIP
from tissuehint.nn.matching import matching_losses

__all__ = ["PBIP", "Bank", "BankConfig", "PBIPConfig", "build_bank", "matching_losses"]
