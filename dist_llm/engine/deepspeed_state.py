"""Where DeepSpeed keeps a rank's masters and moments: parts of flat fp32 tensors, seen as parts of our weights.

ZeRO 1, 2   a group's weights one after another, padded; each rank of zero has an equal part of that
            | w0 . . . w1 . | . w2 . . w3 pad |
ZeRO 3      of every weight each rank has an equal part (the last ones padded), one after another
            | w0 . w1 . w2 . w3 . | w0 . w1 pad w2 . w3 pad |

What DeepSpeed keeps in files is read into host memory where it is asked for, and written back by `restore`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    """Elements [start, start + length) of a weight's tp share, which lie at `at` of the flat tensors of a group.

    bands: the tp share in the logical tensor. shape: the tp share's. primary: this tp rank saves it.
    """

    group: int
    bands: tuple[Band, ...]
    shape: tuple[int, ...]
    primary: bool
    at: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece of a flat tensor of the group, a view."""
        return flat.detach().narrow(0, self.at, self.length)


class FlatState:
    """Masters and moments of this rank under DeepSpeed's ZeRO optimizer of any stage; `adam` updates them."""

    def __init__(self, zero: Any, adam: torch.optim.Optimizer, shards: Iterable[LocalShard], mesh: Mesh) -> None:
        self._zero, self._adam = zero, adam
        self._each = hasattr(zero, "fp32_partitioned_groups_flat")
        names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
        self._masters: list[Tensor] = next(getattr(zero, name) for name in names if hasattr(zero, name))
        by_parameter = {id(shard.parameter): shard for shard in shards}
        located = list(self._sharded_each(mesh) if self._each else self._sharded_together(mesh))
        self._pieces = [_piece(by_parameter[id(weight)], mesh, *place) for weight, *place in located]
        self._copies: dict[int, dict[str, Tensor]] = {}
        self._start([by_parameter[id(weight)] for weight, *_ in located])

    def _sharded_together(self, mesh: Mesh) -> Iterator[tuple[Any, int, int, int, int]]:
        """Yield weight, group, at, start and length under ZeRO 1 and 2, by where the weights now lie.

        bf16 under ZeRO 1 has a class of its own.
        """
        zero, low = self._zero, hasattr(self._zero, "bit16_groups")
        groups, flats = (
            (zero.bit16_groups, zero.bit16_groups_flat) if low else (zero.bf16_groups, zero.bf16_groups_flat)
        )
        for group, (weights, flat) in enumerate(zip(groups, flats, strict=True)):
            size = self._masters[group].numel()
            begin = mesh.zero.index * size
            for weight in weights:
                at = (weight.data_ptr() - flat.data_ptr()) // flat.element_size()
                first, last = max(at, begin), min(at + weight.numel(), begin + size)
                if first < last:
                    yield weight, group, first - begin, first - at, last - first

    def _sharded_each(self, mesh: Mesh) -> Iterator[tuple[Any, int, int, int, int]]:
        """Yield weight, group, at, start and length under ZeRO 3."""
        for group, weights in enumerate(self._zero.fp16_groups):
            at = 0
            for weight in weights:
                size = int(weight.partition_numel())
                start = mesh.zero.index * size
                length = min(size, int(weight.ds_numel) - start)
                if length > 0:
                    yield weight, group, at, start, length
                at += size

    @torch.no_grad()
    def _start(self, shards: list[LocalShard]) -> None:
        """Make masters equal to the shards, and the moments that a first step would make.

        DeepSpeed makes masters from weights in the compute format.
        """
        for group, master in enumerate(self._masters):
            with self._at_hand(group, written=True):
                self._adam.state[master] = {"step": 0, **{name: torch.zeros_like(master.detach()) for name in MOMENTS}}
                for piece, shard in zip(self._pieces, shards, strict=True):
                    if piece.group == group:
                        piece.of(master).copy_(shard.tensor.flatten().narrow(0, piece.start, piece.length))
        self._set_updates(0)

    def _in_files(self, group: int) -> bool:
        return self._each and bool(self._zero._swappable_optimizer_subgroup(group))

    @contextmanager
    def _at_hand(self, group: int, written: bool) -> Iterator[None]:
        """Have a group's flat tensors in memory inside the block; `written`: they go back to their files after it."""
        swapped = self._in_files(group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(group)
        yield
        if swapped and written:
            self._zero._optimizer_states_and_gradient_swap_out(group)
        elif swapped:
            self._zero._release_swap_buffers(group)

    def _flats(self, group: int) -> dict[str, Tensor]:
        state = self._adam.state[self._masters[group]]
        return {"model": self._masters[group], **{f"optimizer.{name}": state[name] for name in MOMENTS}}

    def _set_updates(self, updates: int) -> None:
        """Set the number of updates that Adam corrects its moments by."""
        # torch's kernel wants a tensor beside the moments, DeepSpeed's a number.
        by_torch = isinstance(self._adam, torch.optim.AdamW)
        for master in self._masters:
            count = torch.full((), float(updates), device=master.device) if by_torch else updates
            self._adam.state[master]["step"] = count

    @torch.no_grad()
    def shards(self) -> Iterator[TensorShard]:
        """Yield the rectangles of masters and moments that this rank updates, each a view of them.

        What lies in files is copied first; the copies stay until `restore` takes over what was loaded into them, or
        `forget_copies` drops them.
        """
        flats = {group: self._flats(group) for group in range(len(self._masters)) if not self._in_files(group)}
        for group in range(len(self._masters)):
            if self._in_files(group):
                with self._at_hand(group, written=False):
                    self._copies[group] = {kind: flat.detach().clone() for kind, flat in self._flats(group).items()}
        flats |= self._copies
        for piece in self._pieces:
            for kind, flat in flats[piece.group].items():
                yield from band_shards(kind, piece.of(flat), piece.start, piece.bands, piece.primary)

    def forget_copies(self) -> None:
        """Free the copies of what lies in files."""
        self._copies = {}

    @torch.no_grad()
    def restore(self, updates: int) -> None:
        """Take over what was loaded into `shards`, after so many updates. Collectives: all-gathers over zero."""
        self._set_updates(updates)
        if not self._each:
            self._zero.update_lp_params()
            return
        self._zero.checkpoint_event_prologue()
        for group in range(len(self._masters)):
            with self._at_hand(group, written=True):
                for kind, copy in self._copies.pop(group, {}).items():
                    self._flats(group)[kind].detach().copy_(copy)
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()


def _piece(shard: LocalShard, mesh: Mesh, group: int, at: int, start: int, length: int) -> Piece:
    shape = tuple(shard.tensor.shape)
    bands = (Band(shard.name, shard.shape, shard.offsets, shape),)
    return Piece(group, bands, shape, shard.split or mesh.tp.index == 0, at, start, length)
