"""Prove that a stopped run loses nothing: bit-equal on the same layout, and the same state bits on every other.

uninterrupted   0 ------------------------------> N       losses and state, bit for bit,
stopped         0 ----> k | save, new processes' state, load | k ----> N      for several k
moved           load at k on other layouts: every tensor bit-equal, the order of samples unchanged
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from dist_llm.config.checks import check
from dist_llm.config.run import RunConfig
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.loader import TokenLoader
from dist_llm.data.prepare import prepare
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engine.build import build_engine
from dist_llm.errors import ConfigError, Violation
from dist_llm.runtime.mesh import build_control_group, build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.seed import set_determinism
from dist_llm.train.checkpoints import Checkpoints
from dist_llm.train.engines import Build
from dist_llm.train.identity import identity_of, layout_of, recipe_of
from dist_llm.train.layouts import MOST_RANKS, ranks_for
from dist_llm.train.trace import Rectangle, assemble

MOVES: tuple[Mapping[str, object], ...] = (
    {},
    {"tensor": 2, "data": 2, "zero": 1},
    {"pipeline": 2, "data": 2, "zero": 2},
    {"tensor": 2, "sequence": True, "pipeline": 2},
    {"data": 4, "zero": 3},
)
"""Layouts that a checkpoint is moved to: one process, and mixes of four ranks."""

EXPERT_MOVES: tuple[Mapping[str, object], ...] = (
    {"data": 4, "expert": 4, "zero": 2},
    {"pipeline": 2, "data": 2, "expert": 2, "zero": 3},
)
"""Those of a model with experts, too."""


@dataclass
class Outcome:
    """What a rank reports: losses, gradient norms and samples read by step, and its primary rectangles of all state."""

    losses: dict[int, float]
    grad_norms: dict[int, float]
    samples: dict[int, list[tuple[int, str]]]
    state: list[Rectangle]


@dataclass(frozen=True)
class Leg:
    """A part of a run: load what was saved at `start` (if not 0), train to `stop`, save on the way when asked."""

    start: int
    stop: int
    save_at: int | None = None


def run_leg(config: RunConfig, prefix: Path, eos_id: int, root: Path, leg: Leg, build: Build = build_engine) -> Outcome:
    """Run one leg in the current process group. Collectives: the engine's, and those of save and load."""
    engine = build(config, build_mesh(config.parallel, torch.device("cpu")))
    loader = TokenLoader(
        IndexedDataset(prefix), config.data, config.run.seed, engine.data_slice, eos_id, config.model.vocab_size
    )
    checkpoints = Checkpoints(
        root=root,
        config=config.checkpoint,
        engine=engine,
        group=build_control_group(300.0),
        identity=identity_of(config, "", ""),
        layout=layout_of(config, dist.get_world_size(), "cpu"),
        recipe=recipe_of(config),
        report=lambda step: None,
        warn=lambda message: None,
    )
    set_determinism(config.run.seed + dist.get_rank(), config.run.deterministic)
    if leg.start:
        checkpoints.restore(must=True)
    outcome = Outcome({}, {}, {}, [])
    for step in range(leg.start, leg.stop):
        batch = loader.batch(step)
        outcome.samples[step] = [_sample(*row) for row in zip(batch.samples.tolist(), batch.tokens, strict=True)]
        result = engine.train_step(batch)
        outcome.losses[step], outcome.grad_norms[step] = result.loss, result.grad_norm
        if leg.save_at == step + 1:
            checkpoints.save(step + 1, tokens=0)
    outcome.state = [(s.name, s.shape, s.offsets, s.data.numpy().copy()) for s in engine.state().tensors if s.primary]
    engine.close()
    return outcome


def _digests(outcomes: list[Outcome]) -> dict[str, str]:
    """Return the sha256 of every logical tensor, put together from all ranks."""
    whole = assemble(rectangle for outcome in outcomes for rectangle in outcome.state)
    return {name: hashlib.sha256(data.tobytes()).hexdigest() for name, data in whole.items()}


def _different(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _moved_config(config: RunConfig, parallel: Mapping[str, object]) -> tuple[RunConfig, int]:
    """Return the run on another layout, one sequence a microbatch, and its number of ranks."""
    tree = config.model_dump()
    tree["parallel"] = {"data": 1, **parallel}
    tree["data"]["microbatch"] = 1
    moved = RunConfig.model_validate(tree)
    return moved, moved.parallel.model_ranks * int(str(tree["parallel"]["data"]))


def verify_resume(
    config: RunConfig, *, steps: int = 8, report: Callable[[str], None] = lambda message: None
) -> dict[str, object]:
    """Stop the run at several steps, resume it, move it to other layouts; return the findings as JSON-able facts."""
    ranks = _ranks(config)
    prepared = prepare(config.data, config.tokenizer, config.model.vocab_size, report)
    source = (prepared.prefix, Tokenizer.load(prepared.tokenizer_path).eos_id)
    rows: list[dict[str, object]] = []
    refused: dict[str, str] = {}
    with WorkerPool(max(ranks, 4), timeout_seconds=300.0) as pool, tempfile.TemporaryDirectory() as folder:

        def run(leg: Leg, at: Path, chosen: RunConfig = config, world: int = ranks) -> list[Outcome]:
            return pool.run(run_leg, chosen, *source, at, leg, world=world)

        report(f"uninterrupted: {steps} steps on {ranks} ranks")
        whole = run(Leg(0, steps), Path(folder))
        middle = max(1, steps // 2)
        for stop in sorted({1, middle, max(1, steps - 1)}):
            root = Path(folder) / f"stop-{stop}"
            run(Leg(0, stop, save_at=stop), root)
            resumed = run(Leg(stop, steps), root)
            tail = {step: loss for step, loss in whole[0].losses.items() if step >= stop}
            rows.append(
                _row(f"stop at {stop}", resumed[0].losses == tail, _different(_digests(resumed), _digests(whole)))
            )
            report(_line(rows[-1]))
        root = Path(folder) / f"stop-{middle}"
        saved = _digests(run(Leg(middle, middle), root))
        order = _order(run(Leg(middle, middle + 1), root))
        for parallel in (*MOVES, *(EXPERT_MOVES if config.model.moe.num_experts else ())):
            moved, world = _moved_config(config, parallel)
            violations = check(moved, world)
            if violations:
                refused[_named(parallel)] = "; ".join(str(violation) for violation in violations)
                continue
            there = _digests(run(Leg(middle, middle), root, moved, world))
            same_order = _order(run(Leg(middle, middle + 1), root, moved, world)) == order
            rows.append(_row(f"move to {_named(parallel)}", same_order, _different(there, saved)))
            report(_line(rows[-1]))
    return {"ok": all(row["ok"] for row in rows), "steps": steps, "cases": rows, "not_legal": refused}


def _ranks(config: RunConfig) -> int:
    """Return the ranks to train on. Raises ConfigError where the config does not fit them, or one machine."""
    ranks = ranks_for(config)
    violations = check(config, ranks)
    if ranks > MOST_RANKS:
        rule = f"is more than one machine tries to resume with: at most {MOST_RANKS} ranks"
        violations = [Violation("launcher.nproc", ranks, rule, (MOST_RANKS,))]
    if violations:
        raise ConfigError(violations)
    return ranks


def _sample(number: int, tokens: torch.Tensor) -> tuple[int, str]:
    """Return a sample's global number and the digest of its tokens."""
    return number, hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


def _order(outcomes: list[Outcome]) -> list[tuple[int, str]]:
    """Return number and content of the samples of the one step that was run, over all ranks, by global number."""
    return sorted({sample for outcome in outcomes for samples in outcome.samples.values() for sample in samples})


def _named(parallel: Mapping[str, object]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in parallel.items()) or "one process"


def _line(row: Mapping[str, object]) -> str:
    return f"{'same' if row['ok'] else 'DIFFERENT':9} {row['case']}"


def _row(case: str, history_equal: bool, different: list[str]) -> dict[str, object]:
    ok = history_equal and not different
    return {"case": case, "ok": ok, "history_equal": history_equal, "different_tensors": different[:10]}
