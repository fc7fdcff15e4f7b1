"""Which layouts are legal, for the native engine: one table that the checks, the solver and the docs share.

    ranks = data x pipeline x context x tensor        microbatches of a rank = global_batch / (data x microbatch)

Sources: Megatron-LM (Shoeybi et al. 2019, Narayanan et al. 2021) and the schedules of torch.distributed.pipelining.
Invariant: a layout that breaks none of these is built and stepped by the engine; each rule is one named function.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from dist_llm.config.parallel import V_SCHEDULES
from dist_llm.config.rule import RANKS, Broken, Rule, reads
from dist_llm.config.run import RunConfig

LATER = "is not part of this version"

_DATA_KEYS = (RANKS, "parallel.data", "parallel.tensor", "parallel.pipeline", "parallel.context")
_BATCH_KEYS = (*_DATA_KEYS, "data.global_batch", "data.microbatch")


def data_ranks(config: RunConfig, world_size: int | None) -> int | None:
    """Return the size of the data axis: as set, else from the number of ranks; None if unknown or not whole."""
    if config.parallel.data is not None:
        return config.parallel.data
    if world_size is None or world_size % config.parallel.model_ranks:
        return None
    return world_size // config.parallel.model_ranks


def num_microbatches(config: RunConfig, world_size: int | None) -> int | None:
    """Return the microbatches that each data rank accumulates in a step; None if unknown or not whole."""
    data = data_ranks(config, world_size)
    if data is None or config.data.global_batch % (data * config.data.microbatch):
        return None
    return config.data.global_batch // (data * config.data.microbatch)


def divisors(number: int) -> tuple[int, ...]:
    """Return the divisors of a positive number in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(small + [number // d for d in reversed(small) if d * d != number])


def multiples(unit: int, near: int, count: int = 8) -> tuple[int, ...]:
    """Return multiples of `unit` around `near`, positive ones only."""
    middle = near // unit
    return tuple(unit * k for k in range(max(1, middle - count), middle + count + 1))


_SPLIT = ("num_heads", "num_kv_heads", "ffn_hidden_size")
_EXPERT_KEYS = ("model.num_layers", "model.moe.num_experts", "model.moe.num_dense_layers")


@reads("parallel.tensor", *(f"model.{name}" for name in _SPLIT), "model.moe.ffn_hidden_size", *_EXPERT_KEYS)
def tensor_divides_model(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.tensor` divides `model.num_heads`, `model.num_kv_heads` and `model.ffn_hidden_size`.

    Each tensor rank holds whole heads, whole key-value heads and an equal slice of the feed-forward layer, if any layer
    has one. The vocabulary need not divide: it is padded, and the padding is never predicted.
    """
    tensor, model = config.parallel.tensor, config.model
    sizes = {"model.num_heads": model.num_heads}
    if model.num_expert_layers < model.num_layers or model.moe.ffn_hidden_size is None:
        sizes["model.ffn_hidden_size"] = model.ffn_hidden_size
    if model.num_kv_heads is not None:
        sizes["model.num_kv_heads"] = model.num_kv_heads
    broken = [f"{key}={size}" for key, size in sorted(sizes.items(), key=_heads_first) if size % tensor]
    if broken:
        listed = broken[0] if len(broken) == 1 else ", ".join(broken[:-1]) + " and " + broken[-1]
        yield Broken("parallel.tensor", f"must divide {listed}", divisors(math.gcd(*sizes.values())))


def _heads_first(item: tuple[str, int]) -> int:
    """Order the sizes that tensor parallelism splits as a person names them."""
    return _SPLIT.index(item[0].removeprefix("model."))


@reads("parallel.tensor", "parallel.sequence", "parallel.context", "data.seq_len", "model.max_seq_len")
def sequence_splits_evenly(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`data.seq_len` is a multiple of what splits it: with `parallel.sequence` the tensor ranks, and the context ranks.

    A context rank keeps two chunks of 2 x `parallel.context` equal ones, one from each end; of these, between the
    tensor-parallel regions, each tensor rank keeps an equal slice.
    """
    parallel, seq_len = config.parallel, config.data.seq_len
    slices = parallel.tensor if parallel.sequence else 1
    unit = slices if parallel.context == 1 else parallel.context * math.lcm(2, slices)
    if seq_len % unit:
        near = tuple(size for size in multiples(unit, seq_len) if size <= config.model.max_seq_len)
        names = f"parallel.tensor={parallel.tensor} under parallel.sequence=true"
        if parallel.context > 1:
            names = f"{unit}: parallel.context={parallel.context}, two chunks a rank" + f", and {names}" * (slices > 1)
        yield Broken("data.seq_len", f"must be a multiple of {names}", near)


@reads("parallel.pipeline", "parallel.virtual_pipeline", "parallel.schedule", "model.num_layers")
def stages_hold_layers(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.pipeline` x `parallel.virtual_pipeline` is at most `model.num_layers`.

    Every pipeline stage holds at least one layer; those with the embedding and the head may hold fewer.
    """
    parallel, layers = config.parallel, config.model.num_layers
    if parallel.num_stages <= layers:
        return
    if parallel.virtual_pipeline > 1 and parallel.pipeline <= layers and parallel.schedule not in V_SCHEDULES:
        words = f"x parallel.pipeline={parallel.pipeline} stages must not exceed model.num_layers={layers}"
        yield Broken("parallel.virtual_pipeline", words, divisors(layers // parallel.pipeline))
    else:
        chunks = f"x parallel.virtual_pipeline={parallel.chunks} stages " if parallel.chunks > 1 else ""
        near = tuple(range(1, min(layers, 64) + 1)) + divisors(layers)
        yield Broken("parallel.pipeline", f"{chunks}must not exceed model.num_layers={layers}", near)


@reads("parallel.pipeline", "parallel.virtual_pipeline")
def chunks_need_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.virtual_pipeline` is 1 when `parallel.pipeline` is 1: chunks interleave the stages of several ranks."""
    if config.parallel.pipeline == 1 and config.parallel.virtual_pipeline > 1:
        yield Broken("parallel.virtual_pipeline", "must be 1 when parallel.pipeline=1", (1,))


@reads("parallel.pipeline", "parallel.schedule", "parallel.virtual_pipeline")
def chunks_match_schedule(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`gpipe` and `1f1b` run one chunk a rank, `interleaved` two or more, `zbv` and `dualpipev` just two.

    `zero_bubble` runs any number of chunks (`parallel.virtual_pipeline`). Of the two in a V a rank's first goes down
    the ranks and its second up again, so 1, the default, means 2 there.
    """
    parallel = config.parallel
    if parallel.pipeline == 1:
        return
    if parallel.schedule in ("gpipe", "1f1b") and parallel.virtual_pipeline > 1:
        yield Broken("parallel.virtual_pipeline", f"must be 1 under parallel.schedule={parallel.schedule}", (1,))
    if parallel.schedule == "interleaved" and parallel.virtual_pipeline == 1:
        words = "must be at least 2 under parallel.schedule=interleaved"
        yield Broken("parallel.virtual_pipeline", words, (2, 3, 4))
    if parallel.schedule in V_SCHEDULES and parallel.virtual_pipeline > 2:
        yield Broken("parallel.virtual_pipeline", f"must be 2 under parallel.schedule={parallel.schedule}", (2,))


@reads(*_BATCH_KEYS, "parallel.schedule")
def microbatches_fill_pipeline(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """A data rank has at least `parallel.pipeline` microbatches under `1f1b`, twice as many under `dualpipev`.

    The conditions of torch's Schedule1F1B and ScheduleDualPipeV: so many fill the pipeline.
    """
    pipeline, schedule = config.parallel.pipeline, config.parallel.schedule
    if pipeline == 1 or schedule not in ("1f1b", "dualpipev"):
        return
    needed = pipeline if schedule == "1f1b" else 2 * pipeline
    data = data_ranks(config, world_size) or 1
    share = data * config.data.microbatch
    count, rest = divmod(config.data.global_batch, share)
    if not rest and count < needed:
        filling = f"microbatches that fill parallel.pipeline={pipeline} under {schedule}"
        yield Broken(
            "data.global_batch", f"gives a rank {count} of the {needed} {filling}", multiples(share, needed * share)
        )


@reads(*_BATCH_KEYS, "parallel.schedule")
def microbatches_fill_rounds(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """The microbatches of a rank are a multiple of the rounds, max(1, microbatches // pipeline).

    The condition of torch's `interleaved` and `zero_bubble` schedules; any multiple of `parallel.pipeline` meets it.
    """
    pipeline, count = config.parallel.pipeline, num_microbatches(config, world_size)
    if pipeline == 1 or config.parallel.schedule not in ("interleaved", "zero_bubble") or count is None:
        return
    rounds = max(1, count // pipeline)
    if count % rounds:
        share = config.data.global_batch // count
        words = f"gives {count} microbatches a rank, not a multiple of {rounds} rounds of parallel.pipeline={pipeline}"
        yield Broken("data.global_batch", words, multiples(share, config.data.global_batch, 2 * pipeline))


@reads("parallel.context", "parallel.context_method", "parallel.context_heads")
def context_heads_divide_context(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `context_method: mixed`, `parallel.context_heads` divides `parallel.context`; under others it is 1.

    With 1 the mix is `ring`, with all of `parallel.context` it is `ulysses`.
    """
    parallel, key = config.parallel, "parallel.context_heads"
    if parallel.context_method != "mixed" and parallel.context_heads > 1:
        yield Broken(key, f"must be 1 under parallel.context_method={parallel.context_method}", (1,))
    elif parallel.context % parallel.context_heads:
        yield Broken(key, f"must divide parallel.context={parallel.context}", divisors(parallel.context))


@reads("parallel.context", "parallel.context_method", "parallel.context_heads", "parallel.tensor", "model.num_heads")
def context_divides_heads(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """The context ranks that exchange heads, all of them under `ulysses`, divide the heads of a tensor rank.

    Each attends with whole heads. Key-value heads need not divide: they are repeated until they do. `ring` needs
    nothing of the heads.
    """
    parallel, heads = config.parallel, config.model.num_heads
    if heads % parallel.tensor or heads // parallel.tensor % parallel.head_ranks == 0:
        return
    mine = heads // parallel.tensor
    key = "parallel.context" if parallel.context_method == "ulysses" else "parallel.context_heads"
    yield Broken(key, f"must divide the {mine} heads of a tensor rank under {parallel.context_method}", divisors(mine))


@reads("parallel.context", "model.attention_dropout")
def context_without_attention_dropout(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.context` above 1 needs `model.attention_dropout` of 0: its mask belongs to fused attention alone."""
    if config.parallel.context > 1 and config.model.attention_dropout > 0:
        yield Broken("model.attention_dropout", "must be 0 with parallel.context above 1", (0.0,))


@reads("parallel.expert", *_EXPERT_KEYS)
def expert_divides_experts(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.expert` divides `model.moe.num_experts`: each of its ranks holds whole experts, equally many."""
    ranks, model, experts = config.parallel.expert, config.model, config.model.moe.num_experts
    if ranks > 1 and not model.num_expert_layers:
        missing = "without model.moe.num_experts" if not experts else "where all layers are model.moe.num_dense_layers"
        yield Broken("parallel.expert", f"must be 1 {missing}", (1,))
    elif experts % ranks:
        yield Broken("parallel.expert", f"must divide model.moe.num_experts={experts}", divisors(experts))


@reads(*_DATA_KEYS, "parallel.expert", "parallel.replicate", "parallel.zero")
def expert_divides_shards(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.expert` divides data x context / replicate: its ranks are neighbours there, not more of them."""
    parallel, data = config.parallel, data_ranks(config, world_size)
    if data is None or data % parallel.replicate:
        return
    shards = data * parallel.context // parallel.replicate
    if shards % parallel.expert:
        words = f"must divide the {shards} ranks of data x context" + " / replicate" * (parallel.replicate > 1)
        yield Broken("parallel.expert", words, divisors(shards))


@reads("parallel.tensor", "model.moe.ffn_hidden_size", *_EXPERT_KEYS)
def tensor_divides_experts(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.tensor` divides `model.moe.ffn_hidden_size`: each tensor rank holds a slice of every expert."""
    width = config.model.moe.ffn_hidden_size
    if config.model.num_expert_layers and width is not None and width % config.parallel.tensor:
        yield Broken("parallel.tensor", f"must divide model.moe.ffn_hidden_size={width}", divisors(width))


@reads("parallel.recompute", "parallel.recompute_operators")
def operators_do_not_overlap(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.recompute_operators` names each operator once; not `activation` beside `mlp`, which it is inside."""
    listed = config.parallel.recompute_operators
    if config.parallel.recompute != "selective":
        return
    if len(set(listed)) < len(listed):
        yield Broken("parallel.recompute_operators", "must name each operator once", (tuple(dict.fromkeys(listed)),))
    if "mlp" in listed and "activation" in listed:
        ways = tuple(tuple(name for name in listed if name != left_out) for left_out in ("activation", "mlp"))
        yield Broken("parallel.recompute_operators", "must not name both mlp and the activation inside it", ways)


@reads("parallel.recompute", "parallel.recompute_layers")
def layers_need_recompute(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.recompute_layers` is null under `recompute: none`, where it would silently do nothing."""
    if config.parallel.recompute == "none" and config.parallel.recompute_layers is not None:
        yield Broken("parallel.recompute_layers", "must be null under parallel.recompute=none", (None,))


@reads("parallel.async_tensor", "parallel.sequence")
def async_needs_sequence(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.async_tensor` needs `parallel.sequence`, whose gathers and scatters can go in pieces."""
    if config.parallel.async_tensor and not config.parallel.sequence:
        yield Broken("parallel.async_tensor", "must be false without parallel.sequence=true", (False,))


@reads("parallel.async_tensor", "parallel.compile", "parallel.recompute", "parallel.recompute_operators")
def async_stays_whole(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.async_tensor` is without `parallel.compile` and without selective recompute of `mlp`.

    It makes the outputs of a region's first linears as the region is entered, outside of what `mlp` runs again, and
    hands them over in a way that a graph does not hold.
    """
    parallel = config.parallel
    if not parallel.async_tensor:
        return
    if parallel.compile:
        yield Broken("parallel.async_tensor", "must be false with parallel.compile=true", (False,))
    if parallel.recompute == "selective" and "mlp" in parallel.recompute_operators:
        words = "must be false with mlp in parallel.recompute_operators"
        yield Broken("parallel.async_tensor", words, (False,))


@reads("parallel.replicate", "parallel.zero")
def replicas_need_shards(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.replicate` above 1 needs `parallel.zero` of 1 or more: it replicates what ZeRO shards (HSDP)."""
    if config.parallel.replicate > 1 and config.parallel.zero == 0:
        yield Broken("parallel.replicate", "must be 1 with parallel.zero=0, which replicates everything", (1,))


@reads("parallel.offload", "parallel.zero")
def offloaded_parameters_are_sharded(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.offload: parameters` needs `parallel.zero` of 1 or more: it keeps ZeRO's shards in host memory.

    Under `parallel.zero: 0` every rank computes with its parameters where they are stored.
    """
    if config.parallel.offload == "parameters" and config.parallel.zero == 0:
        words = "needs parallel.zero of 1 or more, whose shards it keeps in host memory"
        yield Broken("parallel.offload", words, ("optimizer", "none"))


@reads("parallel.fused_accumulation", "parallel.zero", "precision.name")
def fused_sums_exist(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.fused_accumulation` needs `parallel.zero` of 0 or 1, and `precision` bf16 or fp16.

    ZeRO 2 and 3 reduce the gradients of every microbatch and keep no sum of whole ones; in fp32 and fp64 a product has
    the format of the sum already.
    """
    if not config.parallel.fused_accumulation:
        return
    if config.parallel.zero >= 2:
        words = f"keeps no sum of whole gradients under parallel.zero={config.parallel.zero}"
        yield Broken("parallel.fused_accumulation", words, (False,))
    if config.precision.compute == config.precision.master:
        words = f"has nothing to widen under precision={config.precision.name}"
        yield Broken("parallel.fused_accumulation", words, (False,))


@reads(*_DATA_KEYS, "parallel.replicate")
def replicas_divide_data(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`parallel.replicate` divides the data axis: `parallel.data`, or what the number of ranks makes of it."""
    data = data_ranks(config, world_size)
    if data is not None and data % config.parallel.replicate:
        yield Broken("parallel.replicate", f"must divide the data axis of {data} ranks", divisors(data))


@reads(*_DATA_KEYS)
def ranks_fit_layout(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """The ranks that are started are data x pipeline x context x tensor of them.

    With `parallel.data` unset any multiple of pipeline x context x tensor will do; the data axis takes the quotient.
    """
    parallel = config.parallel
    if world_size is None:
        return
    sizes = {key: getattr(parallel, key) for key in ("data", "pipeline", "context", "tensor")}
    factors = [f"parallel.{key}={size}" for key, size in sizes.items() if size is not None and size > 1]
    product = " x ".join(factors or ["parallel.data=1"])
    if parallel.data is not None:
        needed = parallel.data * parallel.model_ranks
        if world_size != needed:
            yield Broken(RANKS, "must be " + (f"{needed} = " if len(factors) > 1 else "") + product, (needed,))
    elif world_size % parallel.model_ranks:
        unit = f"{parallel.model_ranks} = {product}" if len(factors) > 1 else product
        yield Broken(RANKS, f"must be a multiple of {unit}", multiples(parallel.model_ranks, world_size))


@reads(*_BATCH_KEYS)
def batch_splits_evenly(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`data.global_batch` is a multiple of the data ranks x `data.microbatch`.

    While the number of ranks is unknown it is a multiple of `data.microbatch` at least.
    """
    batch, microbatch = config.data.global_batch, config.data.microbatch
    data = data_ranks(config, world_size)
    share = microbatch * (data or 1)
    if batch % share:
        ranks = f" x {data} data ranks = {share}" if data is not None and data > 1 else ""
        words = f"must be a multiple of data.microbatch={microbatch}{ranks}"
        filling = tuple(share * config.parallel.pipeline * times for times in (1, 2, 3, 4))
        yield Broken("data.global_batch", words, (*multiples(share, batch), *filling))


LAYOUT_RULES: tuple[Rule, ...] = (
    tensor_divides_model,
    sequence_splits_evenly,
    stages_hold_layers,
    chunks_need_pipeline,
    chunks_match_schedule,
    batch_splits_evenly,
    microbatches_fill_pipeline,
    microbatches_fill_rounds,
    context_heads_divide_context,
    context_divides_heads,
    context_without_attention_dropout,
    expert_divides_experts,
    expert_divides_shards,
    tensor_divides_experts,
    operators_do_not_overlap,
    layers_need_recompute,
    async_needs_sequence,
    async_stays_whole,
    replicas_need_shards,
    offloaded_parameters_are_sharded,
    fused_sums_exist,
    replicas_divide_data,
    ranks_fit_layout,
)
"""The table, in the order in which a person meets the settings."""
