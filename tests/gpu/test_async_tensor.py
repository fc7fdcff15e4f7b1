"""On two CUDA devices that share memory, joined products and collectives give what the plain ones give."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from dist_llm.runtime.mesh import build_mesh
from tests.parallel.tiny import random_batch, tiny_config

pytestmark = pytest.mark.gpu


def _train(rank: int, port: int, asynchronous: bool, path: str) -> None:
    from dist_llm.engine.native import NativeEngine

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=rank, world_size=2)
    split = {"tensor": 2, "sequence": True, "async_tensor": asynchronous}
    sizes = {"hidden_size": 256, "ffn_hidden_size": 512, "max_seq_len": 128}
    config = tiny_config(split, sizes, {"seq_len": 128})
    engine = NativeEngine(config, build_mesh(config.parallel, device))
    losses = [engine.train_step(random_batch(config, engine.data_slice, step)).loss for step in range(3)]
    if rank == 0:
        torch.save(torch.tensor(losses), path)
    dist.destroy_process_group()


def _losses(asynchronous: bool, path: str) -> list[float]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_train, (port, asynchronous, path), nprocs=2)
    losses: list[float] = torch.load(path, weights_only=True).tolist()
    return losses


def test_asynchronous_tensor_parallelism_agrees(tmp_path_factory: pytest.TempPathFactory) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    folder = tmp_path_factory.mktemp("losses")
    plain, joined = _losses(False, str(folder / "plain")), _losses(True, str(folder / "joined"))
    assert joined == pytest.approx(plain, rel=1e-4)
