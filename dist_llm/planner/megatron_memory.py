"""What Megatron-Core holds on a rank, in closed form: its state, the saved tensors of a layer, and the loss.

    state   c weights + 4 gradients + (4 masters + 8 moments) / dp under ZeRO 1; fp16 without: 2 + 2 + 4 + 4 + 8
            c: bytes of the compute format
    layer   between regions   2 (2 c + mask) s b h        inside  c s b (q + 2 k + 2 q + 2 f, swiglu 3 f) / t
            scores kept       (2 c + 1) a s^2 b / t       all of it once: Korthikanti et al. 2022, equations 1 to 4
    loss    (c + 4) s b v / t at its peak: logits and their fp32 copy, which becomes the probabilities

Masks are counted for GPT-2's family, whose published runs drop out; attention keeps its output in two layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dist_llm.accounting.held import stage_tensors
from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.schedules import Pipe, stage_rank
from dist_llm.accounting.stages import StagePlan, engine_stages
from dist_llm.config.run import RunConfig
from dist_llm.planner.components import Components, total


@dataclass(frozen=True)
class MegatronShape:
    """Sizes of one rank's share of a microbatch: tokens of the region, sequences, bytes of an element."""

    tokens: int
    batch: int
    seq: int
    width: int


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one layer: what it saves, what a backward holds beside, and what recompute keeps instead."""

    saved: int
    kept: int
    working: int


def shape_of(config: RunConfig) -> MegatronShape:
    """Return the share of one rank."""
    seq = config.data.seq_len // config.parallel.context
    return MegatronShape(
        seq * config.data.microbatch, config.data.microbatch, seq, FORMAT_BYTES[config.precision.compute]
    )


def state_numel(config: RunConfig, stage: StagePlan) -> tuple[int, int]:
    """Return the elements of a stage's parameters on one rank: of experts and of all else."""
    tensors = stage_tensors(config.model, config.parallel, stage)
    experts = sum(tensor.numel for tensor in tensors if tensor.expert)
    return experts, sum(tensor.numel for tensor in tensors) - experts


def layer_bytes(config: RunConfig, with_experts: bool) -> LayerBytes:
    """Return what a layer keeps of one microbatch."""
    model, parallel, shape = config.model, config.parallel, shape_of(config)
    c, ranks, width = shape.width, parallel.tensor, model.hidden_size
    drops = model.dropout > 0 or model.family == "gpt2"
    hidden = shape.tokens * width // (ranks if parallel.sequence else 1)
    between = 2 * (2 * c + drops) * hidden
    queries, keys = model.num_heads * model.head_width, model.kv_heads * model.head_width
    core = c * shape.tokens * (queries + 2 * keys) // ranks
    scores = _scores(config, shape, drops)
    out = c * shape.tokens * queries * (1 if scores else 2) // ranks
    feed = _expert_bytes(config, shape) if with_experts else _feed_bytes(config, shape)
    saved = between + core + out + scores + feed
    widest = 2 * c * shape.tokens * model.ffn_hidden_size // ranks
    weight = c * width * model.ffn_hidden_size // ranks
    if parallel.recompute == "full":
        return LayerBytes(saved, c * hidden, widest + weight)
    selective = parallel.recompute == "selective"
    return LayerBytes(saved, saved - (scores if selective else 0), widest + weight)


def _scores(config: RunConfig, shape: MegatronShape, drops: bool) -> int:
    """Return the bytes of softmax, its mask and what is left after dropout; none where a fused kernel attends."""
    if config.engine.transformer_engine != "never":
        return 0
    each = 2 * shape.width + 1 if drops else shape.width
    return each * config.model.num_heads * shape.batch * shape.seq * shape.seq // config.parallel.tensor


def _feed_bytes(config: RunConfig, shape: MegatronShape) -> int:
    model = config.model
    pieces = 3 if model.activation == "swiglu" else 2
    return pieces * shape.width * shape.tokens * model.ffn_hidden_size // config.parallel.tensor


def _expert_bytes(config: RunConfig, shape: MegatronShape) -> int:
    """Tokens before and after, rows as sent, sorted and returned, the linears' inputs, and the router's scores."""
    model, ranks = config.model, config.parallel.tensor
    part = shape.tokens // (ranks if config.parallel.sequence else 1)
    rows = part * model.moe.top_k
    pieces = 3 if model.activation == "swiglu" else 2
    moved = shape.width * (3 * rows + 2 * shape.tokens) * model.hidden_size
    inside = pieces * shape.width * rows * model.expert_width
    shared = pieces * shape.width * shape.tokens * model.moe.num_shared * model.expert_width // ranks
    return moved + inside + shared + 4 * 4 * part * model.moe.num_experts


def loss_bytes(config: RunConfig) -> int:
    """Return the most that logits and loss of one microbatch hold."""
    shape, ranks = shape_of(config), config.parallel.tensor
    columns = padded_vocab(config.model.vocab_size, ranks) // ranks
    wide = max(4, shape.width) if shape.width != 4 else 4
    return (shape.width + wide) * shape.tokens * columns + shape.width * shape.tokens * config.model.hidden_size


def in_flight(pipe: Pipe, index: int) -> int:
    """Return the most microbatches of a chunk that a rank holds between forward and backward, over all its chunks.

    Narayanan et al. 2021: one for each rank below and itself; interleaved, a round of all chunks but one beside.
    """
    below = pipe.ranks - 1 - index
    if pipe.schedule == "gpipe":
        return pipe.microbatches * pipe.chunks
    if pipe.chunks == 1:
        return min(pipe.microbatches, below + 1)
    return min(pipe.microbatches * pipe.chunks, (pipe.chunks - 1) * pipe.ranks + 2 * below + 1)


def megatron_rank(config: RunConfig, pipe: Pipe, data: int, index: int) -> tuple[dict[int, Components], Components]:
    """Return the components of each stage of a pipeline rank, and of the rank."""
    parallel, model = config.parallel, config.model
    stages = [
        stage
        for stage in engine_stages("megatron", model, parallel.num_stages)
        if stage_rank(stage.index, parallel.pipeline, parallel.schedule) == index
    ]
    # A round goes through the chunks of a rank alike.
    flying = in_flight(pipe, index)
    rows: dict[int, Components] = {}
    for place, stage in enumerate(stages):
        rounds, more = divmod(flying, len(stages))
        rows[stage.index] = _stage(config, data, stage, rounds + (place < more))
    whole = total(rows.values())
    # One stage of a rank works at a time.
    return rows, replace(whole, working=max(row.working for row in rows.values()))


def _stage(config: RunConfig, data: int, stage: StagePlan, flying: int) -> Components:
    parallel, model = config.parallel, config.model
    c = FORMAT_BYTES[config.precision.compute]
    experts, dense = state_numel(config, stage)
    shards = data * parallel.context if parallel.zero else 1
    own = dense / shards + experts / max(1, shards // parallel.expert)
    numel = dense + experts
    layers = [layer_bytes(config, model.has_experts(layer)) for layer in stage.layers]
    kept = sum(layer.kept for layer in layers)
    # A backward makes a layer again, then holds the gradients at its widest.
    most = max((layer.saved - layer.kept + layer.working for layer in layers), default=0)
    loss = loss_bytes(config) if stage.last else 0
    crossing = shape_of(config).tokens * model.hidden_size * c if parallel.pipeline > 1 else 0
    # Without the distributed optimizer fp16's gradients stay fp16, and masters have fp32 copies of them.
    halves = config.precision.compute == "fp16" and not parallel.zero
    masters = 8 if c == 4 else 16 if halves else 12
    return Components(
        parameters=numel * c,
        gradients=numel * (2 if halves else 4),
        optimizer=int(own * masters),
        activations=kept * flying,
        working=max(0, most - loss),
        logits=loss,
        buffers=2 * crossing,
    )
