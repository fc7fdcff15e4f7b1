"""One of four real gloo ranks of `test_four_gloo_processes_agree`: prints, as JSON, what it went through."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dist_llm.checkpoint.load import find_latest, load
from dist_llm.checkpoint.save import save
from dist_llm.errors import DistLLMError
from dist_llm.runtime.process import stop_process
from dist_llm.types import TrainState
from tests.unit.checkpoint.synthetic import blank, full_tensors, same_bits, split


def _told(work: Callable[[], object]) -> str:
    try:
        return f"returned {work()}"
    except DistLLMError as exc:
        return f"{type(exc).__name__}: {exc}"


def _fail_write(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def main(rank: int, size: int, folder: Path) -> str:
    """Save, reshard, meet a flipped bit, disagree, fill the disk of rank 1, and return as JSON what came of it."""
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=30), size, rank)
    group = dist.group.WORLD
    root = folder / "checkpoints"
    tensors = full_tensors()
    saved = [save(root, step, split(tensors, "tp2_dp2", {"step": step})[rank], group) for step in (1, 2)]

    wanted = blank(split(tensors, "pp2_tp2"))[rank]
    facts = load(saved[1], wanted, group)
    resharded = facts == {"step": 2} and same_bits([wanted], [split(tensors, "pp2_tp2")[rank]])

    if rank == 0:
        damaged = saved[1] / "rank-00003.safetensors"
        content = bytearray(damaged.read_bytes())
        content[-1] ^= 1
        damaged.write_bytes(content)
    dist.barrier()
    flipped = _told(lambda: load(saved[1], blank(split(tensors, "tp2_dp2"))[rank], group))
    latest = find_latest(root, group, report=lambda line: None)

    incomplete = _told(lambda: save(root, 3, TrainState((), {"odd": rank == 2}), group))
    write = os.write
    if rank == 1:
        os.write = _fail_write
    full = _told(lambda: save(root, 3, split(tensors, "tp2_dp2")[rank], group))
    os.write = write
    dist.barrier()
    told = {"resharded": resharded, "flipped": flipped, "latest": latest and latest.name}
    return json.dumps({**told, "incomplete": incomplete, "full": full})


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    stop_process()
    print(told)
