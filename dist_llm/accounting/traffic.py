"""Collectives that a rank of the native engine issues in one step, by axis and kind: counts and payload bytes.

Payload of a collective is the larger of its two buffers: the tensor of an all-reduce, the output of an all-gather, the
input of a reduce-scatter or an all-to-all, the tensor of a send. h = microbatch x T x D x C bytes.

    tp    a layer: 4 all-reduces of h, or under sequence parallelism 4 all-gathers and 4 reduce-scatters of h
    zero  by stage and unit, see parallel/zero.py          pp    h (h / tp) forward and back between stages
    cp    a layer: see docs/context.md; T is a context rank's share
    ep    a layer of experts: see parallel/expert.py; a rank's bytes depend on the tokens, their mean over ep is this,
          and less where model.moe.capacity_factor drops rows
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from dist_llm.accounting.held import HeldTensor, rank_stages, stage_tensors, stage_units
from dist_llm.accounting.memory import FORMAT_BYTES, Place, uses_fsdp
from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.schedules import crosses
from dist_llm.accounting.stages import StagePlan
from dist_llm.config.inputs import DataConfig
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.training import PrecisionConfig

Key = tuple[str, str]
"""(axis, kind): kinds are all_reduce, all_gather, reduce_scatter, all_to_all, send."""


@dataclass(frozen=True)
class Traffic:
    """Number of collectives and their payload bytes, by axis and kind."""

    counts: dict[Key, int]
    payload_bytes: dict[Key, int]


class _Ledger:
    def __init__(self) -> None:
        self.counts: Counter[Key] = Counter()
        self.bytes: Counter[Key] = Counter()

    def add(self, axis: str, kind: str, count: int, payload: int) -> None:
        """Enter `count` collectives of `payload` bytes each."""
        if count:
            self.counts[axis, kind] += count
            self.bytes[axis, kind] += count * payload


@dataclass(frozen=True)
class Shapes:
    """What the counts need of a run on one rank."""

    model: ModelConfig
    parallel: ParallelConfig
    precision: PrecisionConfig
    data: DataConfig
    place: Place
    data_ranks: int

    @property
    def microbatches(self) -> int:
        """Microbatches a step."""
        return self.data.global_batch // (self.data_ranks * self.data.microbatch)

    @property
    def master_bytes(self) -> int:
        """Bytes of an element of masters, optimizer state and reductions."""
        return FORMAT_BYTES[self.precision.master]

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the hidden states of one microbatch, a context rank's share of the sequence."""
        return self.tokens * self.model.hidden_size * FORMAT_BYTES[self.precision.compute]

    def replicas(self, tensor: HeldTensor) -> int:
        """Return how many ranks of dp x cp hold a tensor, or a shard of it."""
        return self.data_ranks * self.parallel.context // (self.parallel.expert if tensor.expert else 1)

    @property
    def tokens(self) -> int:
        """Tokens of one microbatch that a context rank holds."""
        return self.data.microbatch * self.data.seq_len // self.parallel.context


def _one_graph(shapes: Shapes, layer: int) -> bool:
    """Return whether a block is compiled in one piece: neither experts nor weight gradients that wait cut it."""
    parallel = shapes.parallel
    whole_linears = not (parallel.splits_backward or parallel.fused_accumulation)
    return parallel.compile and whole_linears and not shapes.model.has_experts(layer)


def _add_tensor(ledger: _Ledger, shapes: Shapes, stage: StagePlan) -> None:
    """Enter the tp collectives of a stage: Megatron's f and g around each region, and the vocabulary at both ends."""
    parallel, count, hidden = shapes.parallel, shapes.microbatches, shapes.hidden_bytes
    layers = len(stage.layers)
    # What selective recompute runs again lies between the two collectives of a region.
    recomputed = parallel.recomputed_layers(stage.layers) if parallel.recompute == "full" else ()
    # Recompute stops at the last saved tensor: a block's final sum comes again only if something after it keeps one.
    model = shapes.model
    to_the_end = model.dropout > 0 or model.norm_placement == "post"
    # One compiled graph saves all that it keeps at its end.
    sums_again = sum(2 if to_the_end or _one_graph(shapes, layer) else 1 for layer in recomputed)
    ends = int(stage.first) + int(stage.last)
    if parallel.sequence:
        ledger.add("tp", "all_gather", count * (4 * layers + 2 * len(recomputed) + ends), hidden)
        ledger.add("tp", "reduce_scatter", count * (4 * layers + sums_again + ends), hidden)
    else:
        ledger.add("tp", "all_reduce", count * (4 * layers + sums_again + ends), hidden)
    if stage.last:
        wide = 8 if shapes.precision.compute == "fp64" else 4
        ledger.add("tp", "all_reduce", count, shapes.tokens * wide)
        ledger.add("tp", "all_reduce", count, 2 * shapes.tokens * wide)


def _add_context(ledger: _Ledger, shapes: Shapes, stage: StagePlan) -> None:
    """Enter what attention exchanges over cp, see docs/context.md; recompute of attention exchanges anew."""
    parallel, model = shapes.parallel, shapes.model
    heads, ranks = parallel.head_ranks, parallel.ring_ranks
    calls = shapes.microbatches * len(stage.layers)
    again = shapes.microbatches * len(parallel.recomputed_layers(stage.layers))
    forwards = calls + (again if parallel.computes_again("core_attn") else 0)
    # The output's exchange, the last thing that attention does, comes again only if something after it keeps a tensor.
    returns = calls + (again if parallel.recompute == "full" else 0)
    compute, wide = FORMAT_BYTES[shapes.precision.compute], 8 if shapes.precision.compute == "fp64" else 4
    head = shapes.tokens * model.head_width
    mine = model.kv_heads // parallel.tensor
    query, pair = head * model.num_heads // parallel.tensor, 2 * head * math.lcm(mine, heads)
    if heads > 1:
        axis = "cp" if ranks == 1 else "cp_heads"
        ledger.add(axis, "all_to_all", forwards + calls, (query + pair) * compute)
        ledger.add(axis, "all_to_all", returns + calls, query * compute)
    if ranks > 1:
        axis = "cp" if heads == 1 else "cp_ring"
        ledger.add(axis, "send", (forwards + calls) * (ranks - 1), pair * compute)
        ledger.add(axis, "send", calls * ranks, pair * wide)


def _add_expert(ledger: _Ledger, shapes: Shapes, stage: StagePlan) -> None:
    """Enter what layers of experts exchange over ep, see parallel/expert.py, and count over cp for the balance loss."""
    parallel, model = shapes.parallel, shapes.model
    calls = shapes.microbatches * sum(model.has_experts(layer) for layer in stage.layers)
    recomputed = parallel.recomputed_layers(stage.layers) if parallel.computes_again("mlp") else ()
    forwards = calls + shapes.microbatches * sum(model.has_experts(layer) for layer in recomputed)
    rows = shapes.tokens * model.moe.top_k * model.hidden_size * FORMAT_BYTES[shapes.precision.compute]
    if parallel.expert > 1:
        ledger.add("ep", "all_to_all", forwards, model.moe.num_experts * 8)
        ledger.add("ep", "all_to_all", 2 * (forwards + calls), rows)
    if parallel.context > 1 and model.moe.balance_loss:
        ledger.add("cp", "all_reduce", forwards, shapes.data.microbatch * model.moe.num_experts * 8)


def _add_zero(ledger: _Ledger, shapes: Shapes, stage: StagePlan) -> None:
    """Enter FSDP2's collectives of a stage's units over the shard and replicate axes."""
    zero, count = shapes.parallel.zero, shapes.microbatches
    gathers = 2 * count if zero == 3 else 1
    reduces = count if zero >= 2 else 1
    compute = FORMAT_BYTES[shapes.precision.compute]
    for unit in stage_units(shapes.model, shapes.parallel, stage):
        prefix = "expert_" if unit[0].expert and shapes.parallel.expert > 1 else ""
        shards = shapes.place.shards_of(unit[0])
        replicas = shapes.replicas(unit[0]) // shards
        padded = sum(shapes.place.shard_numel(tensor) for tensor in unit)
        if shards > 1:
            ledger.add(f"{prefix}shard", "all_gather", gathers, padded * shards * compute)
            ledger.add(f"{prefix}shard", "reduce_scatter", reduces, padded * shards * shapes.master_bytes)
        if replicas > 1:
            ledger.add(f"{prefix}replicate", "all_reduce", 1, padded * shapes.master_bytes)


def _bucket_payloads(sizes: list[int], bucket_bytes: int) -> list[int]:
    buckets: list[int] = []
    for size in sizes:
        if buckets and buckets[-1] + size <= bucket_bytes:
            buckets[-1] += size
        else:
            buckets.append(size)
    return buckets


def _add_replicas(ledger: _Ledger, shapes: Shapes, stage: StagePlan) -> None:
    """Enter the buckets in which a stage's gradients are summed over replicas without FSDP2."""
    parallel, tensors = shapes.parallel, stage_tensors(shapes.model, shapes.parallel, stage)
    for axis, experts in (("zero", False), ("expert_zero" if parallel.expert > 1 else "zero", True)):
        alike = [t for t in reversed(tensors) if t.expert == experts]
        if alike and shapes.replicas(alike[0]) > 1:
            sizes = [t.numel * shapes.master_bytes for t in alike]
            for payload in _bucket_payloads(sizes, parallel.bucket_mib << 20):
                ledger.add(axis, "all_reduce", 1, payload)


def _add_finish(ledger: _Ledger, shapes: Shapes, stages: list[StagePlan]) -> None:
    """Enter what completes the gradients of a rank after its last backward, and the totals over the world."""
    parallel, place = shapes.parallel, shapes.place
    by_stage = [stage_tensors(shapes.model, parallel, stage) for stage in stages]
    bucket = parallel.bucket_mib << 20
    if parallel.tensor > 1:
        partial = [place.real_numel(t) * shapes.master_bytes for tensors in by_stage for t in tensors if t.partial]
        for payload in _bucket_payloads(partial, bucket):
            ledger.add("tp", "all_reduce", 1, payload)
    if parallel.pipeline > 1 and shapes.model.tie_embeddings and stages[0].first != stages[-1].last:
        rows = padded_vocab(shapes.model.vocab_size, parallel.tensor) // parallel.tensor
        chunk = -(-rows // place.shards)
        mine = max(0, min(rows, (place.shard_index + 1) * chunk) - place.shard_index * chunk)
        ledger.add("ends", "all_reduce", 1, mine * shapes.model.hidden_size * shapes.master_bytes)
    routers = sum(shapes.model.has_experts(layer) for stage in stages for layer in stage.layers)
    if routers and shapes.data_ranks * parallel.context > 1:
        ledger.add("zero", "all_reduce", 1, routers * shapes.model.moe.num_experts * 8)
    moe = shapes.model.moe
    figures = 0 if not moe.num_experts else 4 if moe.capacity_factor is None else 6
    ledger.add("world", "all_reduce", 1, (3 + figures) * 8)


def _edges(stage: StagePlan) -> list[int]:
    """Return the stages whose output this stage has part in: its own, and that of the one before it."""
    return [index for index in (stage.index - 1, stage.index) if 0 <= index < stage.count - 1]


def step_traffic(shapes: Shapes, only: StagePlan | None = None) -> Traffic:
    """Return the collectives of one training step of one rank, or of only one of its stages.

    What a rank issues once for all of its stages counts with the first.
    """
    ledger = _Ledger()
    parallel = shapes.parallel
    fsdp = uses_fsdp(parallel, shapes.precision, shapes.place.shards)
    stages = rank_stages(shapes.model, parallel, shapes.place.pipeline_index)
    crossing = shapes.hidden_bytes // (parallel.tensor if parallel.sequence else 1)
    for stage in stages if only is None else [only]:
        if parallel.tensor > 1:
            _add_tensor(ledger, shapes, stage)
        if parallel.context > 1:
            _add_context(ledger, shapes, stage)
        _add_expert(ledger, shapes, stage)
        (_add_zero if fsdp else _add_replicas)(ledger, shapes, stage)
        if parallel.pipeline > 1:
            sends = sum(crosses(index, parallel.pipeline, parallel.schedule) for index in _edges(stage))
            ledger.add("pp", "send", sends * shapes.microbatches, crossing)
    if only in (None, stages[0]):
        _add_finish(ledger, shapes, stages)
    return Traffic(dict(ledger.counts), dict(ledger.bytes))
