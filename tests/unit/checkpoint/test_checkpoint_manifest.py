"""Whatever bytes stand in a manifest: it is understood in one way or refused in one line, fast and small."""

from __future__ import annotations

import copy
import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from dist_llm.checkpoint.cover import cover_problem
from dist_llm.checkpoint.load import load
from dist_llm.checkpoint.manifest import MAX_MANIFEST_BYTES, check_identity, parse_manifest, sidecar_text
from dist_llm.checkpoint.save import save
from dist_llm.checkpoint.strict_json import MAX_NODES, dump, parse, plain
from dist_llm.errors import CheckpointError, CheckpointMismatch
from dist_llm.types import TrainState
from tests.unit.checkpoint.synthetic import blank, grid, same_bits, split
from tests.work import counted

MUTATIONS = 2000
HOSTILE = (
    None, True, False, -1, 0, 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**40, 0.5, "", "0", "../x", "F32", "I64", "é",
    "\x1b[2J", "\ud800", [], [0], [[]], {}, {"a": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9],
)  # fmt: skip


def state() -> TrainState:
    """Return two tensors in one process."""
    return split({"a": torch.arange(12.0).reshape(3, 4), "b": torch.arange(4.0)}, "one", {"step": 1, "deep": [{}]})[0]


def accepted(path: Path, text: bytes, expected: TrainState) -> bool:
    """Load with a re-signed manifest: right bits (True) or a one-line refusal (False); anything else fails the test."""
    (path / "manifest.json").write_bytes(text)
    (path / "manifest.sha256").write_bytes(sidecar_text(text))
    wanted = blank([expected])[0]
    refusal = ""
    try:
        load(path, wanted)
    except CheckpointError as exc:
        refusal = str(exc)
        assert refusal.isprintable()
    except CheckpointMismatch as exc:
        refusal = str(exc)
    assert refusal or same_bits([wanted], [expected])
    assert len(refusal) < 1000
    return not refusal


def places(tree: object) -> list[tuple[dict | list, object]]:
    """Return every (container, key) of a JSON tree."""
    if isinstance(tree, dict):
        return [found for key in tree for found in [(tree, key), *places(tree[key])]]
    if isinstance(tree, list):
        return [found for index in range(len(tree)) for found in [(tree, index), *places(tree[index])]]
    return []


def test_mutated_trees_never_load_wrong_bits(root: Path) -> None:
    path = save(root, 1, state())
    tree = json.loads((path / "manifest.json").read_bytes())
    choose = random.Random(0)
    expected = state()
    right = 0
    for _ in range(MUTATIONS):
        mutant = copy.deepcopy(tree)
        for _ in range(choose.choice((1, 1, 2))):
            container, key = choose.choice(places(mutant))
            kind = choose.randrange(4)
            if kind == 0:
                del container[key]
            elif kind == 1 and isinstance(container, dict):
                container[f"{key}x"] = container.pop(key)
            elif kind == 2:
                container[key] = copy.deepcopy(choose.choice([c[k] for c, k in places(tree)]))
            else:
                container[key] = choose.choice(HOSTILE)
        right += accepted(path, json.dumps(mutant).encode(), expected)
    assert 0 < right < MUTATIONS / 4


def test_mutated_text_never_loads_wrong_bits(root: Path) -> None:
    path = save(root, 1, state())
    text = (path / "manifest.json").read_bytes()
    choose = random.Random(1)
    expected = state()
    for _ in range(MUTATIONS):
        mutant = bytearray(text)
        for _ in range(choose.choice((1, 1, 4))):
            start = choose.randrange(len(mutant))
            stop = min(len(mutant), start + choose.choice((0, 1, 1, 8, 200)))
            mutant[start:stop] = choose.choice(
                (b"", b"[", b"}", b'"', b",", b"9", b"-", b"\0", b"\xff", b"NaN", b"1e999")
            )
        accepted(path, bytes(mutant), expected)


BASE = {
    "format": "dist_llm.checkpoint", "version": 1, "step": 1, "save_id": "0" * 32, "parent": None, "dist_llm": "0",
    "torch": "0", "ranks": 1, "facts": {}, "files": [], "tensors": {},
}  # fmt: skip
TEXT = json.dumps(BASE)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "nul", TEXT[:-1], TEXT + "x", "\ufeff" + TEXT, "[" * 100_000, '{"a":' * 100_000,
        TEXT.replace("{}", '{"a": 1, "a": 2}', 1),
        TEXT.replace('"version": 1', '"version": 2'),
        TEXT.replace('"version": 1', '"version": true'),
        TEXT.replace('"version": 1', '"version": 1.0'),
        TEXT.replace('"step": 1', '"step": -1'),
        TEXT.replace('"step": 1', '"step": 1.0'),
        TEXT.replace('"step": 1', '"step": "1"'),
        TEXT.replace('"step": 1', '"step": true'),
        TEXT.replace('"step": 1', '"step": ' + "9" * 5000),
        TEXT.replace("{}", '{"a": NaN}', 1),
        TEXT.replace("{}", '{"a": -Infinity}', 1),
        TEXT.replace("{}", '{"a": 1e999}', 1),
        TEXT.replace("{}", '{"a": "\\ud800"}', 1),
        TEXT.replace("{}", '{"a": ' + "[" * 40 + "]" * 40 + "}", 1),
        json.dumps({**BASE, "extra": 1}),
        json.dumps({**BASE, "tensors": {"a": {"dtype": "F32", "shape": [2], "chunks": []}}}),
        json.dumps({**BASE, "tensors": {"a": {"dtype": "F99", "shape": [0], "chunks": []}}}),
        json.dumps({**BASE, "tensors": {"a\n": {"dtype": "F32", "shape": [0], "chunks": []}}}),
        json.dumps({**BASE, "tensors": {"__metadata__": {"dtype": "F32", "shape": [0], "chunks": []}}}),
        json.dumps({**BASE, "tensors": {"a": {"dtype": "F32", "shape": [0] * 9, "chunks": []}}}),
    ],
)  # fmt: skip
def test_texts_that_are_not_manifests_are_refused(text: str) -> None:
    assert parse_manifest(TEXT.encode(), "it").step == 1
    with pytest.raises(CheckpointError, match=r"^it "):
        parse_manifest(text.encode(), "it")


@pytest.mark.parametrize(
    "change",
    [
        {"offsets": [-1]}, {"offsets": [1]}, {"offsets": [2**63]}, {"offsets": [0, 0]}, {"shape": [3]}, {"shape": [0]},
        {"shape": [2**62]}, {"start": 101}, {"start": 99}, {"start": 2**63 - 1}, {"file": 1}, {"file": -1},
        {"sha256": "0" * 63}, {"sha256": "A" * 64}, {"sha256": "0" * 64 + "\n"},
    ],
)  # fmt: skip
def test_rectangles_outside_tensor_or_file_are_refused(change: dict) -> None:
    chunk = {"file": 0, "start": 100, "offsets": [0], "shape": [2], "sha256": "0" * 64}
    files = [{"name": "rank-0.safetensors", "size": 108, "header_bytes": 100, "header_sha256": "0" * 64}]

    def text(chunk: dict) -> bytes:
        tensors = {"a": {"dtype": "F32", "shape": [2], "chunks": [chunk]}}
        return json.dumps({**BASE, "files": files, "tensors": tensors}).encode()

    assert parse_manifest(text(chunk), "it").tensors["a"].chunks[0].shape == (2,)
    with pytest.raises(CheckpointError):
        parse_manifest(text({**chunk, **change}), "it")


@pytest.mark.parametrize(
    ("starts", "size"), [((100, 105), 109), ((100, 103), 108), ((100, 100), 108), ((104, 108), 112), ((100, 104), 109)]
)
def test_rectangles_that_do_not_tile_their_file_are_refused(starts: tuple[int, int], size: int) -> None:
    def text(starts: tuple[int, int], size: int) -> bytes:
        file = {"name": "rank-0.safetensors", "size": size, "header_bytes": 100, "header_sha256": "0" * 64}
        chunks = [
            {"file": 0, "start": start, "offsets": [index], "shape": [1], "sha256": "0" * 64}
            for index, start in enumerate(starts)
        ]
        tensors = {"a": {"dtype": "F32", "shape": [2], "chunks": chunks}}
        return json.dumps({**BASE, "files": [file], "tensors": tensors}).encode()

    assert len(parse_manifest(text((104, 100), 108), "it").tensors["a"].chunks) == 2
    with pytest.raises(CheckpointError, match="contradicts itself: rectangles"):
        parse_manifest(text(starts, size), "it")


@pytest.mark.parametrize("key", ["tensors", "files", "facts", None])
def test_a_million_entries_cost_a_few_lines_each(key: str | None) -> None:
    bomb = {str(index): {} for index in range(400_000)}
    tree = {**BASE, **bomb} if key is None else {**BASE, key: list(bomb.values()) if key == "files" else bomb}
    text = json.dumps(tree).encode()
    with counted() as work:
        if key == "facts":
            assert len(parse_manifest(text, "it").facts) == 400_000
        else:
            with pytest.raises(CheckpointError):
                parse_manifest(text, "it")
        with pytest.raises(CheckpointError, match="larger than"):
            parse_manifest(b" " * (MAX_MANIFEST_BYTES + 1), "it")
        with pytest.raises(CheckpointError, match="values"):
            parse_manifest(b"[" + b"[]," * MAX_NODES + b"[]]", "it")
    assert work.lines < 30_000_000


def test_cover_agrees_with_counting_cells() -> None:
    choose = random.Random(2)
    for _ in range(3000):
        shape = tuple(choose.randint(1, 4) for _ in range(choose.randint(0, 3)))
        rectangles = grid(shape, [choose.randint(1, 3) for _ in shape])
        rectangles = [r for r in rectangles if all(r[1])]
        for _ in range(choose.choice((0, 0, 1, 2))):
            offsets = tuple(choose.randrange(size) for size in shape)
            lengths = tuple(choose.randint(1, size - offset) for size, offset in zip(shape, offsets, strict=True))
            if choose.random() < 0.5 and rectangles:
                rectangles[choose.randrange(len(rectangles))] = (offsets, lengths)
            else:
                rectangles.append((offsets, lengths))
        counts = dict.fromkeys(itertools.product(*map(range, shape)), 0)
        for offsets, lengths in rectangles:
            for cell in itertools.product(*(range(o, o + n) for o, n in zip(offsets, lengths, strict=True))):
                counts[cell] += 1
        exact = all(count == 1 for count in counts.values())
        assert (cover_problem(shape, rectangles) is None) == exact, (shape, rectangles)


def test_cover_of_empty_tensors_and_of_very_many_rectangles() -> None:
    assert cover_problem((0, 4), []) is None
    assert cover_problem((0, 4), [((0, 0), (0, 4))]) is not None
    assert cover_problem((), [((), ())]) is None
    assert cover_problem((), []) is not None
    many = grid((512, 256), (512, 128))
    with counted() as work:
        assert cover_problem((512, 256), many) is None
        assert cover_problem((512, 256), many[:-1]) is not None
    assert work.lines < 30_000_000  # some 90 per rectangle
    assert "too many" in str(cover_problem((2**20,) * 8, [((index,) * 8, (1,) * 8) for index in range(10_000)]))


def test_identity_lists_every_field_that_differs() -> None:
    saved = {"model": {"num_layers": 4, "family": "gpt2", "betas": [0.9, 0.95]}, "tokenizer": "ab", "old": 1}
    check_identity(saved, {**copy.deepcopy(saved), "model": {**saved["model"], "betas": (0.9, 0.95)}})
    with pytest.raises(CheckpointMismatch) as failure:
        check_identity(
            saved, {"model": {"num_layers": 8, "family": "gpt2", "betas": [0.9]}, "tokenizer": "cd", "new": 2}
        )
    keys = [violation.key for violation in failure.value.violations]
    assert keys == ["model.betas", "model.num_layers", "new", "old", "tokenizer"]
    assert "model.num_layers=8 differs from the checkpoint; use 4" in str(failure.value)
    with pytest.raises(CheckpointMismatch):
        check_identity({"flag": True}, {"flag": 1})


def test_json_is_canonical_and_plain() -> None:
    assert dump({"b": (1, 2), "a": "é"}) == b'{"a":"\\u00e9","b":[1,2]}\n'
    assert parse(dump({"a": [1.5, None]})) == {"a": [1.5, None]}
    assert plain({"a": (1, {"b": True})}, "x") == {"a": [1, {"b": True}]}
    for bad in (float("inf"), {1: 2}, {"a": object()}, b"x", {"a": "\udc80"}, {"\udc80": 1}):
        with pytest.raises(ValueError, match="x"):
            plain(bad, "x")
