"""CUDA kernels in Triton, made for verification passes of 1 to 64 rows.

Triton is imported by the modules of this package only, which are imported where they are used.
"""

import os

# Triton 3.9 warns at every compilation unless this is set. The kernels assume fused multiply-add.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
