"""The bias gradient of a linear layer; its products are the library's (cuBLAS, hipBLASLt).

A column sum of (rows, out_features): reads 1 element for each of dy.
"""

from torch import Tensor

from ._sums import column_sums


def linear_bias_bwd(dy: Tensor) -> Tensor:
    return column_sums(dy.contiguous())
