"""Seeds and determinism of one process, and the generator state that a checkpoint keeps.

Data order, initial weights and dropout masks are pure functions of the run's seed and draw nothing from here; the
torch generators are still seeded and saved, so that a model option that does draw resumes exactly.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def set_determinism(seed: int, deterministic: bool) -> None:
    """Seed every generator of this process alike on all ranks; with `deterministic` refuse ops whose result varies.

    float32 matrix products stay float32 (no TF32) in either case. Call before the first CUDA matrix product.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False
    if deterministic:
        # cuBLAS reads this when its handle is made; without it split-K sums vary from run to run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Filling every torch.empty costs a write of the whole tensor and would only hide a read of unset memory.
    torch._C._set_deterministic_fill_uninitialized_memory(False)


def generator_state() -> dict[str, Tensor]:
    """Return the states of torch's generators, `cpu` and (where there is one) `cuda`, as uint8 CPU tensors [n]."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_generator_state(state: Mapping[str, Tensor]) -> None:
    """Put back what `generator_state` returned; a device that this process lacks is passed over."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
