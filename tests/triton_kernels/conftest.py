"""These tests run kernels: in Triton's interpreter (see tests/test_interpreted.py) or on a GPU."""

import torchref

if torchref.get_backend() != "triton":
    collect_ignore_glob = ["test_*.py"]
