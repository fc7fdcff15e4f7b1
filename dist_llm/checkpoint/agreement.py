"""Ranks that act together or not at all: one rank's failure is every rank's error.

    each:      work on every rank --gather--> rank 0 --broadcast verdict--> all go on, or all raise the same error
    together:  the same, and every rank keeps its own result
    lead:      work on rank 0 --broadcast result or error--> all

Payloads are JSON in uint8 tensors; torch's object collectives are pickle and are not used.
Invariant: every rank leaves them with the same outcome, as long as the group itself lives.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist

from dist_llm import errors
from dist_llm.checkpoint.cover import IncompleteStateError
from dist_llm.errors import ConfigError, DistLLMError, StorageError, Violation

T = TypeVar("T")

_KINDS: dict[str, type[DistLLMError]] = {
    kind.__name__: kind
    for kind in (
        errors.ConfigError,
        errors.LayoutError,
        errors.DataError,
        errors.StorageError,
        errors.CheckpointError,
        errors.CheckpointMismatch,
        errors.NumericsError,
        errors.PeerLostError,
        errors.EngineUnavailable,
        IncompleteStateError,
    )
}


class Channel(Protocol):
    """How `size` ranks talk; rank 0 leads."""

    rank: int
    size: int

    def gather(self, payload: bytes) -> list[bytes]:
        """Return every rank's payload, in rank order, on rank 0; an empty list elsewhere."""

    def broadcast(self, payload: bytes) -> bytes:
        """Return rank 0's payload on every rank."""


class Alone:
    """A channel of one process."""

    rank = 0
    size = 1

    def gather(self, payload: bytes) -> list[bytes]:
        """Return the one payload."""
        return [payload]

    def broadcast(self, payload: bytes) -> bytes:
        """Return the payload."""
        return payload


class GroupChannel:
    """A channel over a process group that has a CPU backend (gloo, or cpu:gloo,cuda:nccl)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = group.rank()
        self.size = group.size()

    def gather(self, payload: bytes) -> list[bytes]:
        """Gather payloads of any length to rank 0. Collectives: one all_gather of 8 bytes, one padded gather."""
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(payload)]), group=self._group)
        longest = max(int(length) for length in lengths)
        sent = _as_tensor(payload.ljust(longest, b" "))
        received = [torch.empty_like(sent) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(sent, received, group=self._group, group_dst=0)
        if received is None:
            return []
        return [_as_bytes(tensor)[: int(length)] for tensor, length in zip(received, lengths, strict=True)]

    def broadcast(self, payload: bytes) -> bytes:
        """Send rank 0's payload to all. Collectives: a broadcast of 8 bytes and one of the payload."""
        length = torch.tensor([len(payload)])
        dist.broadcast(length, group=self._group, group_src=0)
        content = _as_tensor(payload) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(content, group=self._group, group_src=0)
        return _as_bytes(content)


def connect(group: dist.ProcessGroup | None) -> Channel:
    """Return the channel of a process group; None is one process that asks nobody."""
    return Alone() if group is None or group.size() == 1 else GroupChannel(group)


def each(channel: Channel, work: Callable[[], T]) -> list[T]:
    """Run `work` on every rank; return the JSON-able results in rank order on rank 0, an empty list elsewhere.

    If it fails on any rank every rank raises the error of the lowest one that failed. Collectives: gather, broadcast.
    """
    report, error = _attempt(work)
    reports = [json.loads(payload) for payload in channel.gather(_encode(report))]
    _raise_shared(json.loads(channel.broadcast(_encode(_verdict(reports)))), error)
    return [report["value"] for report in reports]


def together(channel: Channel, work: Callable[[], T]) -> T:
    """Run `work` on every rank and return this rank's own result; fails as `each` does. Collectives: as `each`."""
    kept: list[T] = []
    each(channel, lambda: kept.append(work()))
    return kept[0]


def lead(channel: Channel, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its JSON-able result on every rank; its error is raised on every rank.

    Collectives: one broadcast.
    """
    report, error = _attempt(work) if channel.rank == 0 else ({}, None)
    shared = json.loads(channel.broadcast(_encode(report)))
    _raise_shared(shared.get("error"), error)
    value: T = shared["value"]
    return value


def _attempt(work: Callable[[], T]) -> tuple[dict[str, object], Exception | None]:
    try:
        return {"value": work()}, None
    except Exception as exc:  # whatever it is, the other ranks wait for word of it
        return {"error": _describe(exc)}, exc


def _verdict(reports: list[dict[str, Any]]) -> dict[str, object] | None:
    """Return the error of the lowest rank that failed, with the rank's name unless all ranks failed alike."""
    failed = [(rank, report["error"]) for rank, report in enumerate(reports) if "error" in report]
    if not failed:
        return None
    rank, error = failed[0]
    alike = len(failed) == len(reports) and all(other == error for _, other in failed)
    return error if alike or "message" not in error else {**error, "message": f"rank {rank}: {error['message']}"}


def _describe(exc: Exception) -> dict[str, object]:
    if isinstance(exc, ConfigError) and exc.violations:
        rows = [[v.key, _shown(v.value), v.rule, [_shown(choice) for choice in v.legal]] for v in exc.violations]
        return {"kind": type(exc).__name__, "violations": rows}
    if isinstance(exc, DistLLMError):
        return {"kind": type(exc).__name__, "message": str(exc)}
    if isinstance(exc, OSError):
        return {"kind": StorageError.__name__, "message": str(exc)}
    return {"kind": DistLLMError.__name__, "message": f"{type(exc).__name__}: {exc}"}


def _raise_shared(error: dict[str, object] | None, cause: Exception | None) -> None:
    """Raise the error that all ranks were told of, chained to this rank's own where it has one."""
    if error is None:
        return
    kind = _KINDS.get(str(error["kind"]), DistLLMError)
    rows = error.get("violations")
    shared = kind(str(error.get("message", "")))
    if isinstance(rows, list) and issubclass(kind, ConfigError):
        shared = kind([Violation(key, value, rule, tuple(legal)) for key, value, rule, legal in rows])
    shared.shared = True
    try:
        raise shared from cause
    finally:
        # The traceback holds this frame: a name here would keep error, frames and process group alive in a cycle.
        del shared, cause


def _shown(value: object) -> object:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _encode(tree: object) -> bytes:
    return json.dumps(tree, separators=(",", ":")).encode("utf-8")


def _as_tensor(payload: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _as_bytes(content: torch.Tensor) -> bytes:
    return content.numpy().tobytes()
