"""What a checkpoint says about itself: `manifest.json`, layout-free, and `manifest.sha256`, its digest.

Every tensor is listed by logical name with its global shape; every saved rectangle with file, first byte, offsets and
a sha256 that also binds step, name, dtype, shape and offsets, so that equal-shaped rectangles cannot be swapped.
Invariant: a `Manifest` that `parse_manifest` returns is whole: its rectangles tile each tensor exactly once and each
file to its last byte, so what is read from it is all that there is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, field_validator, model_validator

from dist_llm.checkpoint.cover import MAX_DIMS, cover_problem
from dist_llm.checkpoint.strict_json import dump, parse, plain
from dist_llm.errors import CheckpointError, CheckpointMismatch, Violation

if TYPE_CHECKING:
    from hashlib import _Hash

MANIFEST = "manifest.json"
SIDECAR = "manifest.sha256"
VERSION = 1
MAX_MANIFEST_BYTES = 2**28
"""Enough for 1.8 million rectangles: a 405 B model on 512 ranks has 1.5 million."""
MAX_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of an element by the dtype names of safetensors."""

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Dims = Annotated[tuple[_Count, ...], Field(strict=False, max_length=MAX_DIMS)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,115}\.safetensors$")]
_TENSOR_NAME = re.compile(r"[^\x00-\x1f\x7f|]{1,512}\Z")


class _Closed(BaseModel):
    """A strict record. Pydantic collects every error, so a bad file of a million entries must fail at its first."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few_keys(cls, value: object) -> object:
        if isinstance(value, dict) and len(value) > len(cls.model_fields):
            unknown = sorted(key for key in value if key not in cls.model_fields)
            raise ValueError(f"unknown keys {', '.join(unknown[:3])}")
        return value


class SavedFile(_Closed):
    """A safetensors file: its size and the digest of its header, the first `header_bytes` bytes."""

    name: _FileName
    size: _Count
    header_bytes: Annotated[int, Field(ge=0, le=MAX_HEADER_BYTES)]
    header_sha256: _Sha256


class Chunk(_Closed):
    """One saved rectangle [offsets, offsets + shape) of a tensor: bytes from `start` of files[file]."""

    file: _Count
    start: _Count
    offsets: _Dims
    shape: _Dims
    sha256: _Sha256


class SavedTensor(_Closed):
    """A logical tensor: its global shape and the rectangles that tile it (none when it has no elements)."""

    dtype: str
    shape: _Dims
    chunks: Annotated[tuple[Chunk, ...], Field(strict=False), FailFast()]


class Manifest(_Closed):
    """A whole checkpoint. `parent` is the manifest digest of the checkpoint before it, if there was one."""

    format: Literal["dist_llm.checkpoint"]
    version: Literal[1]
    step: _Count
    save_id: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    parent: _Sha256 | None
    dist_llm: Annotated[str, Field(max_length=128)]
    torch: Annotated[str, Field(max_length=128)]
    ranks: _Count
    facts: dict[str, object]
    files: Annotated[tuple[SavedFile, ...], Field(strict=False), FailFast()]
    tensors: dict[str, SavedTensor]

    @field_validator("tensors", mode="before")
    @classmethod
    def _tensors_one_by_one(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        for name in value:
            if not _TENSOR_NAME.match(name) or name == "__metadata__":
                raise ValueError(f"{name[:64]!r} cannot be the name of a tensor")
        return {name: SavedTensor.model_validate(tensor) for name, tensor in value.items()}


def start_chunk_digest(
    step: int, name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, ...], lengths: tuple[int, ...]
) -> _Hash:
    """Return a sha256 that has taken in which rectangle this is; the caller feeds it the bytes of the rectangle."""
    return hashlib.sha256(b"dist_llm chunk\n" + dump([step, name, dtype, shape, offsets, lengths]))


def chunk_bytes(tensor: SavedTensor, chunk: Chunk) -> int:
    """Return the size of a saved rectangle."""
    return prod(chunk.shape) * DTYPE_BYTES[tensor.dtype]


def sidecar_text(manifest: bytes) -> bytes:
    """Return the line of `manifest.sha256`; `sha256sum -c manifest.sha256` checks it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n".encode("ascii")


def parse_manifest(raw: bytes, where: str) -> Manifest:
    """Return the manifest in `raw`; raise CheckpointError, naming `where`, for anything that is not sound and whole."""
    if len(raw) > MAX_MANIFEST_BYTES:
        raise CheckpointError(f"{where} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        tree = parse(raw)
    except ValueError as exc:
        raise CheckpointError(f"{where} is not a manifest: {_printable(str(exc))}") from None
    if not isinstance(tree, dict) or tree.get("format") != "dist_llm.checkpoint":
        raise CheckpointError(f"{where} is not a manifest: it does not say format=dist_llm.checkpoint")
    version = tree.get("version")
    if type(version) is not int or version != VERSION:
        shown = _printable(repr(version))
        raise CheckpointError(f"{where} has format version {shown}; this dist_llm reads version {VERSION}")
    try:
        manifest = Manifest.model_validate(tree)
        plain(manifest.facts, "facts")
    except ValidationError as exc:
        raise CheckpointError(f"{where} is not a manifest: {_first_errors(exc)}") from None
    except ValueError as exc:
        raise CheckpointError(f"{where} is not a manifest: {_printable(str(exc))}") from None
    for problem in _structure_problems(manifest):
        raise CheckpointError(f"{where} contradicts itself: {_printable(problem)}")
    return manifest


def check_identity(saved: Mapping[str, object], current: Mapping[str, object], owner: str = "the checkpoint") -> None:
    """Raise CheckpointMismatch listing every field, dotted, in which the owner's identity differs from the run's."""
    before, now = _flatten(saved), _flatten(current)
    violations = [
        Violation(key, now.get(key, "absent"), f"differs from {owner}", _settable(key, before))
        for key in sorted(before.keys() | now.keys())
        if key not in before or key not in now or not _same(before[key], now[key])
    ]
    if violations:
        raise CheckpointMismatch(violations)


def _settable(key: str, saved: Mapping[str, object]) -> tuple[object, ...]:
    """Return the saved value as one to use; the digest of a file or a text is no setting."""
    return () if key not in saved or key.endswith(("sha256", "fingerprint")) else (saved[key],)


def _structure_problems(manifest: Manifest) -> Iterator[str]:
    """Yield what no single field shows: doubled names, rectangles that do not tile their tensor or their file."""
    if len({saved.name for saved in manifest.files}) != len(manifest.files):
        yield "two files have the same name"
    spans: list[list[tuple[int, int]]] = [[] for _ in manifest.files]
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            yield f"tensor {name} has the unknown dtype {tensor.dtype}"
            return
        problem = cover_problem(tensor.shape, [(chunk.offsets, chunk.shape) for chunk in tensor.chunks])
        if problem:
            yield f"tensor {name}: {problem}"
            return
        for chunk in tensor.chunks:
            if chunk.file >= len(manifest.files):
                yield f"tensor {name} names file {chunk.file} of {len(manifest.files)}"
                return
            spans[chunk.file].append((chunk.start, chunk.start + chunk_bytes(tensor, chunk)))
    for saved, parts in zip(manifest.files, spans, strict=True):
        end = saved.header_bytes
        for start, stop in sorted(parts):
            if start != end:
                yield f"rectangles leave a gap or overlap at byte {min(start, end)} of {saved.name}"
                return
            end = stop
        if end != saved.size:
            yield f"rectangles end at byte {end} of {saved.name}, whose size is {saved.size}"


def _flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _same(saved: object, current: object) -> bool:
    """Compare as JSON does: a tuple equals a list, but true does not equal 1."""
    try:
        return dump(plain(saved, "saved")) == dump(plain(current, "current"))
    except ValueError:
        return False


def _first_errors(exc: ValidationError) -> str:
    details = exc.errors(include_url=False, include_context=False, include_input=False)
    shown = "; ".join(f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in details[:3])
    more = f" and {len(details) - 3} more" if len(details) > 3 else ""
    return _printable(shown) + more


def _printable(text: str) -> str:
    """Keep what a file says from reaching a terminal as control characters or megabytes."""
    shown = text.encode("ascii", "backslashreplace").decode("ascii")
    shown = "".join(letter if letter.isprintable() else "?" for letter in shown)
    return shown if len(shown) <= 400 else shown[:400] + "..."
