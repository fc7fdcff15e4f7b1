"""How closely two runs of the same training must agree: relative, over the loss and gradient norm of every step.

The promise is 1e-5 in fp32 and 1e-9 in fp64 over 20 steps; a test may hold more than the promise, not less.
"""

from __future__ import annotations

FP32 = 1e-5
"""Any two layouts, or a layout and a golden curve, in fp32 over 20 steps."""

FP64 = 1e-9
"""The same in fp64."""

FP64_FEW_STEPS = 1e-12
"""Any two layouts in fp64 over the handful of steps of the parallel tests: rounding has had no time to grow."""

LOW_PRECISION_LOSS = 0.02
"""Absolute, in nats: a bf16 or fp16 loss against fp32 over a handful of steps."""

VISIBLE = 1e-5
"""What a deliberate fault has to move at the least, so that the fp32 promise would find it."""

VISIBLE_MASK = 1e-4
"""What masking attention between documents has to move at the least, so that the mask is seen to act."""
SAME_SUM = 2e-5
"""Relative drift of the norm of a mean gradient over many equal microbatches, summed in fp32."""
VISIBLE_SUM = 2e-4
"""The least drift of such a norm where sums are in bf16."""
NEAR_SUM = 2e-3
"""How much farther from fp32, relative, a gradient norm may be that is rounded less often: the luck of one norm."""
ENGINE_LOSS = 2e-5
"""Relative, over 20 steps in fp32: the losses of two engines."""
ENGINE_NORM = 1e-4
"""The same of their gradient norms."""
KERNEL_ULPS = 2
"""Steps of its format that an element of a kernel's result may be off; Triton's interpreter truncates."""
KERNEL_SUM = 2e-6
"""What it may differ besides, relative to the largest element: the order of fp32 sums."""
