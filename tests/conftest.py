"""Under ``TRITON_INTERPRET=1``: bfloat16 as on a GPU."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter._convert_float

    def rounding(x, source, target, mode):
        """Triton's interpreter cuts a float32 down to bfloat16; a GPU rounds it to nearest even."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return truncating(x, source, target, mode)
        bits = np.ascontiguousarray(x).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    interpreter._convert_float = rounding
