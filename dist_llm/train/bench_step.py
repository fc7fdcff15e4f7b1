"""Time a training step of the same model in the same layout on several engines, side by side.

    engine A   build, count, wait | round 1 | wait             | round 2 | ...
    engine B   build, count, wait           | round 1 | wait             | round 2 ...

Each engine has ranks of its own, which compute while all others wait: noise of the machine hits all alike, and what an
engine holds and loads is not another's. Batches are of random tokens, so that nothing need be prepared.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.accounting.flops import step_flops
from dist_llm.config.engine_rules import ENGINES
from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.build import build_engine
from dist_llm.errors import ConfigError, EngineUnavailable, Violation
from dist_llm.runtime.cores import usable_cores
from dist_llm.runtime.device import device_name, peak_memory_gib, resolve_device, synchronize
from dist_llm.runtime.ledger import CollectiveLedger
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.runtime.process import prepare_rank
from dist_llm.runtime.seed import set_determinism
from dist_llm.train.engines import REFERENCE, Build, on_engine, problems, said
from dist_llm.train.layouts import MOST_RANKS, given, ranks_for
from dist_llm.train.peak import peak_flops
from dist_llm.types import Batch, DataSlice

Traffic = dict[str, list[int]]
"""Of each kind of collective: how many, their payload bytes, and the bytes that leave a rank."""


@dataclass(frozen=True)
class Start:
    """What a rank says when its engine stands: its device's kind and name, its threads, a step's collectives."""

    device: str
    processor: str
    threads: int
    traffic: Traffic


@dataclass(frozen=True)
class End:
    """What a rank says at last: peak memory, bytes of the state that it holds, and the loss of its last step."""

    peak_memory_gib: float
    state_bytes: int
    loss: float


def random_batch(config: RunConfig, share: DataSlice, step: int) -> Batch:
    """Return this share of the random global batch of a step; with documents where the config masks by them."""
    data = config.data
    generator = torch.Generator().manual_seed(step)
    shape = (data.global_batch, data.seq_len + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    each = data.global_batch // share.count
    rows = slice(share.index * each, (share.index + 1) * each)
    samples = torch.arange(step * data.global_batch, (step + 1) * data.global_batch)[rows]
    ends = torch.rand(tokens[rows, :-1].shape, generator=generator) < 4 / data.seq_len
    documents = ends.long().cumsum(1) if data.document_mask else None
    return Batch(step, tokens[rows, :-1], tokens[rows, 1:], samples, documents)


def run_rounds(config: RunConfig, steps: int, rounds: int, build: Build) -> Iterator[object]:
    """Yield on this rank a Start, the seconds of a step in each round, and an End; between values it waits.

    A round is one step that is not timed and `steps` that are. Collectives: the engine's, and a barrier a round.
    """
    device = resolve_device(config.device, dist.get_rank())
    set_determinism((config.run.seed + dist.get_rank()) % 2**63, config.run.deterministic)
    engine = build(config, build_mesh(config.parallel, device, config.launcher.timeout_seconds))
    done = 0

    def batches(count: int) -> list[Batch]:
        nonlocal done
        done += count
        return [random_batch(config, engine.data_slice, step) for step in range(done - count, done)]

    result = engine.train_step(*batches(1))
    with CollectiveLedger() as ledger:
        engine.train_step(*batches(1))
    yield Start(device.type, device_name(device), torch.get_num_threads(), ledger.by_kind())
    for _ in range(rounds):
        first, *timed = batches(steps + 1)
        dist.barrier()
        engine.train_step(first)
        synchronize(device)
        began = time.perf_counter()
        for batch in timed:
            result = engine.train_step(batch)
        synchronize(device)
        yield (time.perf_counter() - began) / steps
    peak = peak_memory_gib(device)
    yield End(peak, _held_bytes(engine), result.loss)
    engine.close()


def _held_bytes(engine: Engine) -> int:
    """Return the bytes of parameters and optimizer state on this rank, as the engine offers them."""
    return sum(tensor.data.nbytes for tensor in engine.state().tensors)


def choose_engines(config: RunConfig, named: Sequence[str] | None) -> tuple[tuple[str, ...], dict[str, str]]:
    """Return the engines to time, and why others are left out. named None: every one that can run the config.

    Raises ConfigError where a named one cannot, or none can.
    """
    ranks = ranks_for(config)
    if ranks > MOST_RANKS:
        rule = f"is more than one machine is asked to start: at most {MOST_RANKS} ranks"
        raise ConfigError([Violation("launcher.nproc", ranks, rule, (MOST_RANKS,))])
    found = {name: problems(config, ranks, name) for name in named or ENGINES}
    if named is not None or all(found.values()):
        violations = [violation for name in found for violation in found[name]]
        if violations:
            raise ConfigError(list(dict.fromkeys(violations)) if named is not None else found[REFERENCE])
    able = tuple(name for name, violations in found.items() if not violations)
    return able, {name: said(violations) for name, violations in found.items() if violations}


def bench_step(
    config: RunConfig,
    *,
    engines: Sequence[str] | None = None,
    steps: int = 5,
    repeats: int = 5,
    report: Callable[[str], None] = lambda message: None,
    build: Build = build_engine,
) -> dict[str, object]:
    """Time `repeats` rounds of `steps` steps on each engine in turn; return the figures as JSON-able facts.

    engines None: every one that is installed and can run the layout. build: what makes an engine.
    Raises ConfigError where a named engine cannot run it, or none can.
    """
    names, left_out = choose_engines(config, engines)
    ranks = ranks_for(config)
    with ExitStack() as pools:
        streams: dict[str, Iterator[list[Any]]] = {}
        starts: dict[str, list[Start]] = {}
        for name in names:
            report(f"starting {name} on {ranks} rank{'s' * (ranks > 1)}")
            pool = pools.enter_context(_pool(config, ranks))
            stream = pool.stream(run_rounds, on_engine(config, name), steps, repeats, build, world=ranks)
            try:
                starts[name] = next(stream)
            except EngineUnavailable as error:
                if engines is not None:
                    raise
                left_out[name] = str(error)
                continue
            streams[name] = stream
        if not streams:
            raise EngineUnavailable(said_of_each(left_out))
        rounds: dict[str, list[float]] = {name: [] for name in streams}
        for number in range(1, repeats + 1):
            for name, stream in streams.items():
                rounds[name].append(max(next(stream)))
            times = ", ".join(f"{name} {1e3 * seconds[-1]:.1f} ms" for name, seconds in rounds.items())
            report(f"round {number} of {repeats}: {times}")
        ends: dict[str, list[End]] = {name: next(stream) for name, stream in streams.items()}
        for stream in streams.values():
            # To the end, so that engines are closed.
            assert not list(stream)
    return _facts(config, Measured(starts, rounds, ends), steps, left_out)


def _pool(config: RunConfig, ranks: int) -> WorkerPool:
    """Return ranks with the threads, allocator and device that those of a run have."""
    prepare = partial(prepare_rank, config.device, ranks, config.launcher.threads)
    return WorkerPool(ranks, timeout_seconds=config.launcher.timeout_seconds, prepare=prepare)


def said_of_each(reasons: Mapping[str, str]) -> str:
    """Return why each engine is left out, in a line."""
    return "; ".join(f"{name}: {why}" for name, why in reasons.items())


@dataclass(frozen=True)
class Measured:
    """What was measured, by engine: what ranks said first, the slowest rank's seconds a step by round, their last."""

    starts: Mapping[str, list[Start]]
    rounds: Mapping[str, list[float]]
    ends: Mapping[str, list[End]]


def _facts(config: RunConfig, measured: Measured, steps: int, left_out: Mapping[str, str]) -> dict[str, object]:
    """Return all figures: of the machine, of each engine, and of each kind of its collectives."""
    names = list(measured.rounds)
    reference = REFERENCE if REFERENCE in names else names[0]
    first = measured.starts[reference][0]
    data = config.data
    return {
        "ok": True,
        "device": first.device,
        "processor": first.processor,
        "cores": usable_cores(),
        "threads": first.threads,
        "torch": torch.__version__,
        "layout": given(config).name.removeprefix("as-given "),
        "precision": config.precision.name,
        "batch": f"{data.global_batch} sequences of {data.seq_len} random tokens",
        "steps": steps,
        "repeats": len(measured.rounds[reference]),
        "reference": reference,
        "engines": [figures(config, measured, name, reference) for name in names],
        "collectives": [row for name in names for row in traffic_rows(name, measured.starts[name])],
        "rounds": {name: list(seconds) for name, seconds in measured.rounds.items()},
        "left_out": dict(left_out),
    }


def figures(config: RunConfig, measured: Measured, name: str, reference: str) -> dict[str, object]:
    """Return the figures of an engine. ratio: of its tokens a second to the reference's in the same round, the median.

    Memory and bytes are those of the rank with most; sent bytes and collectives are a step's.
    """
    seconds, ends = measured.rounds[name], measured.ends[name]
    median = statistics.median(seconds)
    ratios = [one / own for one, own in zip(measured.rounds[reference], seconds, strict=True)]
    tokens = config.data.global_batch * config.data.seq_len
    start = measured.starts[name][0]
    peak = peak_flops(config, start.device, len(ends), 1)
    flops = step_flops(config.model, config.data.seq_len, config.data.global_batch)
    per_rank = [each.traffic.values() for each in measured.starts[name]]
    return {
        "engine": name,
        "step_seconds": median,
        "fastest_step_seconds": min(seconds),
        "slowest_step_seconds": max(seconds),
        "tokens_per_second": tokens / median,
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "greatest_ratio": max(ratios),
        "mfu": None if peak is None else flops / median / peak,
        "peak_memory_gib": max(end.peak_memory_gib for end in ends),
        "state_bytes": max(end.state_bytes for end in ends),
        "collectives": max(sum(count for count, _, _ in kinds) for kinds in per_rank),
        "payload_bytes": max(sum(payload for _, payload, _ in kinds) for kinds in per_rank),
        "sent_bytes": max(sum(sent for _, _, sent in kinds) for kinds in per_rank),
        "loss": ends[0].loss,
    }


def traffic_rows(name: str, starts: Sequence[Start]) -> list[dict[str, object]]:
    """Return a row for each kind of collective of an engine: a step's of the rank with most, and of all ranks."""
    rows: list[dict[str, object]] = []
    for kind in sorted({kind for start in starts for kind in start.traffic}):
        each = [start.traffic.get(kind, [0, 0, 0]) for start in starts]
        row: dict[str, object] = {"engine": name, "kind": kind}
        for place, figure in enumerate(("count", "payload_bytes", "sent_bytes")):
            row[figure] = max(rank[place] for rank in each)
            row[f"all_{figure}"] = sum(rank[place] for rank in each)
        rows.append(row)
    return rows
