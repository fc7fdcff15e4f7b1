"""Ranks without processes: threads that talk through the same protocol, and states cut into synthetic layouts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from dist_llm.checkpoint.load import load_over
from dist_llm.checkpoint.save import save_over
from dist_llm.types import TensorShard, TrainState

T = TypeVar("T")
Rectangle = tuple[tuple[int, ...], tuple[int, ...]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool)


class ThreadChannel:
    """A channel between threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._slots = barrier, slots

    def gather(self, payload: bytes) -> list[bytes]:
        """Return all payloads on rank 0."""
        self._slots[self.rank] = payload
        self._barrier.wait()
        received = list(self._slots) if self.rank == 0 else []
        self._barrier.wait()
        return received

    def broadcast(self, payload: bytes) -> bytes:
        """Return rank 0's payload."""
        if self.rank == 0:
            self._slots[0] = payload
        self._barrier.wait()
        received = self._slots[0]
        self._barrier.wait()
        return received


def on_ranks(size: int, work: Callable[[ThreadChannel], T]) -> list[T | Exception]:
    """Run `work` on `size` ranks; return what each returned or raised."""
    barrier = threading.Barrier(size, timeout=30)
    slots = [b""] * size
    outcomes: list[T | Exception] = [RuntimeError("did not run")] * size

    def run(rank: int) -> None:
        try:
            outcomes[rank] = work(ThreadChannel(rank, size, barrier, slots))
        except Exception as exc:
            outcomes[rank] = exc

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def save_on_ranks(root: Path, step: int, states: Sequence[TrainState]) -> list[Path | Exception]:
    """Save with one thread a rank."""
    return on_ranks(len(states), lambda channel: save_over(channel, root, step, states[channel.rank]))


def load_on_ranks(path: Path, states: Sequence[TrainState]) -> list[dict[str, object] | Exception]:
    """Load with one thread a rank."""
    return on_ranks(len(states), lambda channel: load_over(channel, path, states[channel.rank], partial=False))


def full_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return logical tensors of every dtype and of 0 to 4 dims, some of them empty, with arbitrary bits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (13, 10), "vector": (7,), "scalar": (), "cube": (3, 5, 4), "four": (2, 3, 2, 5), "none": (0, 4)}
    tensors = {}
    for name, shape in shapes.items():
        for dtype in DTYPES:
            values = torch.randint(0, 2 if dtype == torch.bool else 127, shape, generator=generator)
            tensors[f"{name}.{str(dtype).removeprefix('torch.')}"] = values.to(dtype)
    tensors["bits"] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45])
    return tensors


def grid(shape: tuple[int, ...], parts: Sequence[int]) -> list[Rectangle]:
    """Cut `shape` into ceil-chunks, parts[d] along dim d (1 beyond); the last ones may be empty, as FSDP's are."""
    rectangles: list[Rectangle] = [((), ())]
    for dim, size in enumerate(shape):
        count = parts[dim] if dim < len(parts) else 1
        chunk = -(-size // count)
        cuts = [(min(index * chunk, size), min((index + 1) * chunk, size)) for index in range(count)]
        rectangles = [((*o, a), (*n, b - a)) for o, n in rectangles for a, b in cuts]
    return rectangles


def pinwheel(shape: tuple[int, ...]) -> list[Rectangle]:
    """Cut two dims into five rectangles around a centre, which no sequence of straight cuts makes."""
    if len(shape) != 2 or min(shape) < 5:
        return [((0,) * len(shape), shape)]
    rows, columns = shape
    return [
        ((0, 0), (2, columns - 2)),
        ((0, columns - 2), (rows - 2, 2)),
        ((rows - 2, 2), (2, columns - 2)),
        ((2, 0), (rows - 2, 2)),
        ((2, 2), (rows - 4, columns - 4)),
    ]


def cut(tensor: torch.Tensor, name: str, rectangle: Rectangle, primary: bool = True) -> TensorShard:
    """Return the shard of a full tensor at a rectangle, in storage of its own."""
    part = tensor
    for dim, (offset, length) in enumerate(zip(*rectangle, strict=True)):
        part = part.narrow(dim, offset, length)
    return TensorShard(name, tuple(tensor.shape), rectangle[0], part.clone(), primary)


def _tp2_dp2(name: str, tensor: torch.Tensor, position: int) -> list[tuple[int, TensorShard]]:
    """Cut by dim 1 over tp and by dim 0 over dp; vectors by dp and copied over tp."""
    tp = 2 if tensor.dim() > 1 else 1
    shards = []
    for index, rectangle in enumerate(grid(tuple(tensor.shape), (2, tp)) if tensor.dim() else [((), ())]):
        owners = [index] if tp == 2 else ([2 * index, 2 * index + 1] if tensor.dim() else [0, 1, 2, 3])
        shards += [(rank, cut(tensor, name, rectangle, rank == owners[0])) for rank in owners]
    return shards


def _pp2_tp2(name: str, tensor: torch.Tensor, position: int) -> list[tuple[int, TensorShard]]:
    """Put a tensor on one of two stages, cut by dim 0 over tp; rank 2 * stage + tp."""
    rectangles = grid(tuple(tensor.shape), (2,)) if tensor.dim() else [((), ())]
    return [(2 * (position % 2) + tp, cut(tensor, name, rectangle)) for tp, rectangle in enumerate(rectangles)]


def _spread(ranks: int, cutter: Callable[[tuple[int, ...]], list[Rectangle]]) -> Callable[..., list]:
    def place(name: str, tensor: torch.Tensor, position: int) -> list[tuple[int, TensorShard]]:
        return [(index % ranks, cut(tensor, name, r)) for index, r in enumerate(cutter(tuple(tensor.shape)))]

    return place


def _replicas(name: str, tensor: torch.Tensor, position: int) -> list[tuple[int, TensorShard]]:
    whole = ((0,) * tensor.dim(), tuple(tensor.shape))
    return [(rank, cut(tensor, name, whole, primary=rank == position % 4)) for rank in range(4)]


LAYOUTS: dict[str, tuple[int, Callable[..., list]]] = {
    "one": (1, _spread(1, lambda shape: grid(shape, ()))),
    "dp4": (4, _replicas),
    "zero3": (3, _spread(3, lambda shape: grid(shape, (3,)))),
    "zero8": (8, _spread(8, lambda shape: grid(shape, (8,)))),
    "tp2_dp2": (4, _tp2_dp2),
    "pp2_tp2": (4, _pp2_tp2),
    "grid": (6, _spread(6, lambda shape: grid(shape, (3, 2, 2)))),
    "pinwheel": (2, _spread(2, pinwheel)),
}


def split(tensors: dict[str, torch.Tensor], layout: str, facts: dict[str, object] | None = None) -> list[TrainState]:
    """Return one state a rank that together hold `tensors` in a named layout."""
    ranks, place = LAYOUTS[layout]
    shards: list[list[TensorShard]] = [[] for _ in range(ranks)]
    for position, (name, tensor) in enumerate(sorted(tensors.items())):
        for rank, shard in place(name, tensor, position):
            shards[rank].append(shard)
    return [TrainState(tuple(own), facts or {}) for own in shards]


def blank(states: Sequence[TrainState]) -> list[TrainState]:
    """Return the same shards with zeros in them."""
    return [
        TrainState(
            tuple(TensorShard(s.name, s.shape, s.offsets, torch.zeros_like(s.data), s.primary) for s in state.tensors)
        )
        for state in states
    ]


def same_bits(left: Sequence[TrainState], right: Sequence[TrainState]) -> bool:
    """Compare every shard bit by bit."""
    return [_bits(state) for state in left] == [_bits(state) for state in right]


def _bits(state: TrainState) -> list[tuple[str, torch.dtype, torch.Size, bytes]]:
    return [
        (shard.name, shard.data.dtype, shard.data.shape, shard.data.reshape(-1).view(torch.uint8).numpy().tobytes())
        for shard in state.tensors
    ]


def small_state(value: float, facts: dict[str, object] | None = None) -> TrainState:
    """Return a state of one process whose every number tells `value`."""
    tensors = {"weight": torch.full((6, 4), value), "moment": torch.full((5,), value, dtype=torch.float64)}
    return split(tensors, "one", facts if facts is not None else {"value": value})[0]
