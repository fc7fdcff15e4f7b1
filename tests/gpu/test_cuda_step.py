"""On a CUDA device the same engine takes the same steps: losses near the CPU's, in every precision."""

from __future__ import annotations

import pytest
import torch

from dist_llm.runtime.mesh import build_mesh
from tests.parallel.tiny import GPT2, random_batch, tiny_config

pytestmark = pytest.mark.gpu


def _losses(device: str, precision: str) -> list[float]:
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    from dist_llm.engine.native import NativeEngine

    config = tiny_config({}, GPT2, precision={"name": precision})
    backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        engine = NativeEngine(config, build_mesh(config.parallel, torch.device(device)))
        return [engine.train_step(random_batch(config, engine.data_slice, step)).loss for step in range(5)]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2), ("fp16", 2e-2)])
def test_cuda_losses_are_near_the_cpus(precision: str, tolerance: float) -> None:
    assert _losses("cuda", precision) == pytest.approx(_losses("cpu", "fp32"), rel=tolerance)
