"""Where DeepSpeed keeps a rank's masters and moments: parts of flat fp32 tensors, seen as parts of our weights.

ZeRO 1, 2   a group's weights one after another, padded; each rank of zero has an equal part of that
            | w0 . . . w1 . | . w2 . . w3 pad |
ZeRO 3      of every weight each rank has an equal part (the last ones padded), one after another
            | w0 . w1 . w2 . w3 . | w0 . w1 pad w2 . w3 pad |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dist_llm.engine.rectangles import Band, band_shards
from dist_llm.parallel.shards import LocalShard
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import TensorShard

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's running means of the gradient and of its square, by DeepSpeed's and torch's names."""


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + length) of a weight's tp share, which lie at `at` of a flat tensor of masters."""

    shard: LocalShard
    master: Tensor
    at: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece of a tensor that is as the masters are: these, or a moment."""
        return flat.detach().narrow(0, self.at, self.length)


def list_pieces(zero: Any, shards: Iterable[LocalShard], mesh: Mesh) -> list[Piece]:
    """Return what this rank updates, of DeepSpeed's ZeRO optimizer (any stage)."""
    by_parameter = {id(shard.parameter): shard for shard in shards}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return list(_sharded_each(zero, by_parameter, mesh))
    return list(_sharded_together(zero, by_parameter, mesh))


def masters(zero: Any) -> list[Tensor]:
    """Return the flat fp32 tensors that the optimizer updates on this rank, one a group."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    found: list[Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
    return found


def _sharded_together(zero: Any, by_parameter: dict[int, LocalShard], mesh: Mesh) -> Iterator[Piece]:
    """Yield the pieces under ZeRO 1 and 2 (for bf16 the first has a class of its own), by where weights now lie."""
    low = hasattr(zero, "bit16_groups")
    groups, flats = (zero.bit16_groups, zero.bit16_groups_flat) if low else (zero.bf16_groups, zero.bf16_groups_flat)
    for weights, flat, master in zip(groups, flats, masters(zero), strict=True):
        begin = mesh.zero.index * master.numel()
        for weight in weights:
            at = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
            first, last = max(at, begin), min(at + weight.numel(), begin + master.numel())
            if first < last:
                yield Piece(by_parameter[id(weight)], master, first - begin, first - at, last - first)


def _sharded_each(zero: Any, by_parameter: dict[int, LocalShard], mesh: Mesh) -> Iterator[Piece]:
    """Yield the pieces under ZeRO 3."""
    for weights, master in zip(zero.fp16_groups, masters(zero), strict=True):
        at = 0
        for weight in weights:
            size = int(weight.partition_numel())
            start = mesh.zero.index * size
            length = min(size, int(weight.ds_numel) - start)
            if length > 0:
                yield Piece(by_parameter[id(weight)], master, at, start, length)
            at += size


@torch.no_grad()
def copy_masters(pieces: Iterable[Piece]) -> None:
    """Make the masters equal to the shards: DeepSpeed makes them from weights in the compute format."""
    for piece in pieces:
        piece.of(piece.master).copy_(piece.shard.tensor.flatten().narrow(0, piece.start, piece.length))


def without_start(pieces: Iterable[Piece]) -> list[Piece]:
    """Return the pieces, and let go of the tensors that their weights started from."""
    return [replace(piece, shard=replace(piece.shard, tensor=piece.shard.tensor.to(device="meta"))) for piece in pieces]


def prepare_moments(adam: torch.optim.Optimizer, flats: Iterable[Tensor]) -> None:
    """Make the moments that a first step would make, so that a checkpoint can be loaded into them."""
    for flat in flats:
        zeros = {moment: torch.zeros_like(flat.detach()) for moment in MOMENTS}
        adam.state[flat] = {"step": 0, **zeros}
    set_updates(adam, 0)


def set_updates(adam: torch.optim.Optimizer, updates: int) -> None:
    """Set the number of updates that Adam corrects its moments by."""
    for state in adam.state.values():
        # torch's kernel wants a tensor beside the moments, DeepSpeed's a number.
        by_torch = isinstance(adam, torch.optim.AdamW)
        state["step"] = torch.full((), float(updates), device=state["exp_avg"].device) if by_torch else updates


def state_shards(pieces: Iterable[Piece], adam: torch.optim.Optimizer, mesh: Mesh) -> Iterator[TensorShard]:
    """Yield the rectangles of masters and moments that this rank updates, each a view of them.

    What tp ranks hold alike the first of them saves.
    """
    for piece in pieces:
        shard, shape = piece.shard, tuple(piece.shard.tensor.shape)
        bands = [Band(shard.name, shard.shape, shard.offsets, shape)]
        kinds = {"model": piece.master, **{f"optimizer.{name}": adam.state[piece.master][name] for name in MOMENTS}}
        for kind, flat in kinds.items():
            yield from band_shards(kind, piece.of(flat), piece.start, bands, shard.split or mesh.tp.index == 0)


@torch.no_grad()
def take_masters(zero: Any) -> None:
    """Make the model's weights equal to the masters. Collectives: all-gathers over zero."""
    if not hasattr(zero, "fp32_partitioned_groups_flat"):
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    zero.checkpoint_event_epilogue()
