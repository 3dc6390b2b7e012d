"""What every docstring's example may take for granted."""

import pytest
import torch

import torchref


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace.update(torch=torch, torchref=torchref)
