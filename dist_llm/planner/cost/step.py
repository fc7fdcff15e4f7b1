"""The time of one training step of a config on so many ranks, and what it is spent on.

    step = pipeline of (stages x microbatches) + data ranks' traffic that is not hidden + update
    mfu  = model FLOPs / (step x peak of all devices)              accounting/flops.py, conf/cluster

Components add up to the step: those of the dearest stage, then the bubble, messages, traffic, update and overhead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.flops import step_flops
from dist_llm.accounting.schedules import crosses, stage_rank
from dist_llm.accounting.stages import plan_stages
from dist_llm.config.cluster import ClusterConfig
from dist_llm.config.model import ModelConfig
from dist_llm.config.rules import data_ranks, num_microbatches
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.cost.collectives import all_reduce_seconds, gather_seconds, group_of, send_seconds
from dist_llm.planner.cost.hardware import Device, Fabric, device_of, fabric_of
from dist_llm.planner.cost.pipeline import PipelineSeconds, pipeline_seconds
from dist_llm.planner.cost.seconds import REASONS
from dist_llm.planner.cost.shape import Shape, sends_parts, shape_of
from dist_llm.planner.cost.sharding import (
    Cover,
    Exchange,
    Held,
    Numels,
    exchange_seconds,
    part_numels,
    update_seconds,
)
from dist_llm.planner.cost.stage import Blocks, StageSeconds, stage_seconds
from dist_llm.planner.practice import gradient_width, is_megatron_deepspeed
from dist_llm.runtime.cores import usable_cores

COMPONENTS = (
    *REASONS,
    "recompute",
    "pipeline_bubble",
    "pipeline_comm",
    "data_comm_exposed",
    "optimizer",
    "overhead",
)
"""What a step is spent on, in this order."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step by component, and of one microbatch in each stage, forward and backward (recompute included).

    mfu: part of the peak of all devices that model FLOPs take.
    """

    components: Mapping[str, float]
    stages: tuple[tuple[float, float], ...]
    mfu: float

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(self.components.values())

    @property
    def bound_by(self) -> str:
        """The largest component; `compute` where that is products or attention."""
        largest = max(self.components, key=lambda name: self.components[name])
        return "compute" if largest in ("matmul", "attention") else largest


@dataclass(frozen=True)
class _Plan:
    """What of the config the parts below share."""

    config: RunConfig
    ranks: int
    data: int
    microbatches: int
    device: Device
    fabric: Fabric
    shape: Shape


def predict_step(config: RunConfig, ranks: int) -> StepTime:
    """Return the time of one step on `ranks` ranks. ConfigError where the batch does not split over them."""
    plan = _plan(config, ranks)
    parallel = config.parallel
    blocks = _stage_blocks(config.model, parallel.num_stages, config.cluster.practice, _recomputed(config))
    stages = [stage_seconds(plan.device, plan.fabric, plan.shape, each) for each in blocks]
    works = tuple(stage.whole for stage in stages)
    pipe = pipeline_seconds(
        parallel.schedule, parallel.pipeline, plan.microbatches, works, _hop(plan), is_megatron_deepspeed(config)
    )
    loads = [0.0] * parallel.pipeline
    for index, work in enumerate(works):
        loads[stage_rank(index, parallel.pipeline, parallel.schedule)] += work
    dearest = loads.index(max(loads))
    mine = [i for i in range(len(stages)) if stage_rank(i, parallel.pipeline, parallel.schedule) == dearest]
    exchanged, updated = _sharding(plan, stages, blocks)
    components = _components(plan, [stages[index] for index in mine], pipe)
    components |= {"data_comm_exposed": exchanged, "optimizer": updated}
    seconds = _crowded(plan, components, sum(loads) / len(loads))
    flops = _sequence_flops(config.model, config.data.seq_len) * config.data.global_batch
    return StepTime(
        {name: components[name] for name in COMPONENTS},
        tuple((stage.forward, stage.backward) for stage in stages),
        flops / (seconds * _peak_flops(config, ranks)),
    )


@lru_cache(maxsize=256)
def _sequence_flops(model: ModelConfig, seq_len: int) -> int:
    """Return the model FLOPs of a step on one sequence."""
    return step_flops(model, seq_len, 1)


def _plan(config: RunConfig, ranks: int) -> _Plan:
    data, microbatches = data_ranks(config, ranks), num_microbatches(config, ranks)
    if data is None or microbatches is None or data * config.parallel.model_ranks != ranks:
        rule = "must be a multiple of data ranks x data.microbatch, and ranks of tensor x pipeline x context"
        raise ConfigError([Violation("data.global_batch", config.data.global_batch, rule)])
    cluster = config.cluster
    per_node, cores = _place(config, ranks)
    device = device_of(cluster, config.precision.compute, cores)
    shape = shape_of(config, microbatches)
    return _Plan(config, ranks, data, microbatches, device, fabric_of(cluster, per_node), shape)


def node_devices(cluster: ClusterConfig) -> int:
    """Return the devices of a node: as the cluster says, else of CPUs this machine's cores. Raises ConfigError."""
    if cluster.devices_per_node is None and cluster.device == "cuda":
        rule = "must be given where devices are GPUs: only cores are counted on this machine"
        raise ConfigError([Violation("cluster.devices_per_node", None, rule, (8,))])
    return cluster.devices_per_node or usable_cores()


def _place(config: RunConfig, ranks: int) -> tuple[int, float]:
    """Return how many ranks share a node, and how many of its devices a rank computes with."""
    devices = node_devices(config.cluster)
    if config.cluster.device == "cuda":
        return devices, 1.0
    per_node = -(-ranks // (config.cluster.nodes or config.launcher.nodes))
    threads = config.launcher.threads or max(1, devices // per_node)
    return per_node, float(min(threads, devices))


def _recomputed(config: RunConfig) -> int | None:
    """Return how many blocks of a stage are recomputed; None: all."""
    parallel = config.parallel
    return 0 if parallel.recompute == "none" else parallel.recompute_layers


@lru_cache(maxsize=2**10)
def _stage_blocks(model: ModelConfig, count: int, practice: str, recomputed: int | None) -> tuple[Blocks, ...]:
    """Return what each stage holds: as many blocks each as the other, or cut by cost as our engines do."""
    dense = min(model.moe.num_dense_layers, model.num_layers) if model.moe.num_experts else model.num_layers
    sizes = [len(stage.layers) for stage in plan_stages(model, count)]
    if practice != "native":
        sizes = even_sizes(model.num_layers, count)
    blocks, start = [], 0
    for index, size in enumerate(sizes):
        plain = max(0, min(dense, start + size) - start)
        again = size if recomputed is None else min(size, recomputed)
        blocks.append(Blocks(plain, size - plain, again, index == 0, index == count - 1))
        start += size
    return tuple(blocks)


def even_sizes(layers: int, count: int) -> list[int]:
    """Return `layers` over `count` stages, those in the middle taking what is left over."""
    sizes = [layers // count] * count
    for extra in range(layers % count):
        sizes[(extra + 1) % count] += 1
    return sizes


def _hop(plan: _Plan) -> float:
    """Return the seconds of one message between pipeline ranks."""
    parallel = plan.config.parallel
    if parallel.pipeline == 1 or not crosses(0, parallel.pipeline, parallel.schedule):
        return 0.0
    stride = parallel.tensor * parallel.context * plan.data
    parts = parallel.tensor if sends_parts(plan.config) else 1
    crossing = stride * parallel.pipeline > plan.fabric.devices_per_node
    sent = send_seconds(plan.fabric, crossing, plan.shape.hidden_bytes / parts)
    if parts == 1 or parallel.sequence:
        return sent
    return sent + gather_seconds(plan.fabric, group_of(plan.fabric, parts, 1), plan.shape.hidden_bytes)


def _sharding(plan: _Plan, stages: list[StageSeconds], blocks: tuple[Blocks, ...]) -> tuple[float, float]:
    """Return the exposed traffic and the update of the pipeline rank for which they take longest."""
    config, parallel = plan.config, plan.config.parallel
    exchange = Exchange(
        ranks=plan.data * parallel.context,
        stride=parallel.tensor,
        replicate=parallel.replicate if parallel.zero else plan.data * parallel.context,
        zero=parallel.zero,
        expert=parallel.expert,
        hides=config.cluster.practice == "native",
        width=plan.shape.width,
        gradient_width=gradient_width(config),
        scatters=not is_megatron_deepspeed(config) or config.precision.compute == "fp16",
    )
    numels = part_numels(config.model, parallel.tensor, parallel.expert)
    longest = (0.0, 0.0)
    for rank in sorted({0, parallel.pipeline - 1, parallel.pipeline // 2}):
        mine = [i for i in range(len(blocks)) if stage_rank(i, parallel.pipeline, parallel.schedule) == rank]
        held = _held(numels, config.model.tie_embeddings, [blocks[index] for index in mine])
        cover = Cover(
            sum(stages[index].forward for index in mine),
            sum(stages[index].backward for index in mine),
            plan.microbatches,
        )
        exchanged = exchange_seconds(plan.device, plan.fabric, exchange, held, cover)
        updated = update_seconds(plan.device, exchange, held, parallel.offload != "none")
        longest = max(longest, (exchanged, updated), key=sum)
    return longest[0] + _tied(plan, numels), longest[1]


def _held(numels: Numels, tied: bool, blocks: list[Blocks]) -> Held:
    """Return the elements of a pipeline rank."""
    counts = {
        "first": float(sum(each.dense for each in blocks)),
        "last": float(sum(each.expert for each in blocks)),
        "embed": float(any(each.first for each in blocks)),
        "head": float(any(each.last for each in blocks)),
    }
    if tied and counts["embed"]:
        counts["head"] = 0.0
    dense = expert = 0.0
    for part, count in counts.items():
        dense, expert = dense + count * numels[part][0], expert + count * numels[part][1]
    return Held(dense, expert, sum(each.dense + each.expert for each in blocks) + 1)


def _tied(plan: _Plan, numels: Numels) -> float:
    """Return the seconds of adding up the gradients of embeddings that are tied over the pipeline's ends.

    Ours adds up what ZeRO leaves a rank; Megatron-LM and DeepSpeed (ReduceTiedGrads) all of it.
    """
    config, parallel = plan.config, plan.config.parallel
    if parallel.pipeline == 1 or not config.model.tie_embeddings:
        return 0.0
    if stage_rank(0, parallel.pipeline, parallel.schedule) == stage_rank(
        parallel.num_stages - 1, parallel.pipeline, parallel.schedule
    ):
        return 0.0
    stride = parallel.tensor * parallel.context * plan.data * (parallel.pipeline - 1)
    ours = config.cluster.practice == "native"
    shards = plan.data * parallel.context // parallel.replicate if parallel.zero and ours else 1
    group = group_of(plan.fabric, 2, stride)
    return all_reduce_seconds(plan.fabric, group, numels["embed"][0] / shards * gradient_width(config))


def _components(plan: _Plan, stages: list[StageSeconds], pipe: PipelineSeconds) -> dict[str, float]:
    """Return the step's components but those of data ranks, from the stages of its dearest rank."""
    count = plan.microbatches
    components = dict.fromkeys(COMPONENTS, 0.0)
    for stage in stages:
        for name in REASONS:
            both = getattr(stage.passes.forward, name) + getattr(stage.passes.backward, name)
            components[name] += count * both
        components["recompute"] += count * stage.passes.again.device
    worked = sum(components.values())
    components["overhead"] = max(0.0, pipe.busy - worked)
    components["pipeline_comm"] = pipe.messages
    components["pipeline_bubble"] = pipe.bubble
    return components


def _crowded(plan: _Plan, components: dict[str, float], mean_load: float) -> float:
    """Add what ranks that share too few cores wait for each other as overhead; return the step's seconds."""
    seconds = sum(components.values())
    if plan.config.cluster.device == "cuda":
        return seconds
    per_node, cores = _place(plan.config, plan.ranks)
    crowd = per_node * cores / node_devices(plan.config.cluster)
    busy = plan.microbatches * mean_load + components["data_comm_exposed"] + components["optimizer"]
    components["overhead"] += max(0.0, busy * crowd - seconds)
    return max(seconds, busy * crowd)


def _peak_flops(config: RunConfig, ranks: int) -> float:
    """Return the dense peak of all devices in the compute format, in FLOP/s, as metrics.jsonl's mfu has it."""
    each: float = getattr(config.cluster.peak_tflops, config.precision.name) * 1e12
    if config.cluster.device == "cuda":
        return each * ranks
    per_node, _ = _place(config, ranks)
    return each * node_devices(config.cluster) * -(-ranks // per_node)
