"""The one door to torch's own test databases, which are private and change between versions."""

import pytest

pytest.importorskip("numpy", reason="torch.testing._internal imports it")
pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

__all__ = ["module_db", "op_db"]
