"""For authors of methods: the contract suite that every method passes, and small fake data. Needs pytest."""

import pytest

pytest.register_assert_rewrite("tissuehint.testing.contract")

from tissuehint.testing.contract import MethodCase, MethodContract  # noqa: E402
from tissuehint.testing.fakes import fake_batch, fake_dataset, fake_labels  # noqa: E402

__all__ = ["MethodCase", "MethodContract", "fake_batch", "fake_dataset", "fake_labels"]
