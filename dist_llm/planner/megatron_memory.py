"""What Megatron-Core holds on a rank, in closed form: its state, the saved tensors of a layer, and the loss.

    state   c weights + 4 gradients + (4 masters + 8 moments) / dp under ZeRO 1; fp16 without: 2 + 2 + 4 + 4 + 8
            c: bytes of the compute format
    layer   between regions   2 (2 c + mask) s b h        inside  c s b (q + 2 k + 2 q + 2 f, swiglu 3 f) / t
            scores kept       (2 c + 1) a s^2 b / t       all of it once: Korthikanti et al. 2022, equations 1 to 4
    loss    (c + 4) s b v / t at its peak: logits and their fp32 copy, which becomes the probabilities

Masks are counted for GPT-2's family, whose published runs drop out; attention keeps its output in two layouts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dist_llm.accounting.held import stage_units
from dist_llm.accounting.memory import FORMAT_BYTES
from dist_llm.accounting.params import padded_vocab
from dist_llm.accounting.schedules import Pipe, stage_rank
from dist_llm.accounting.stages import engine_stages
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.run import RunConfig
from dist_llm.planner.components import Components, total
from dist_llm.planner.practice import keeps_scores
from dist_llm.planner.stage_kind import Hashed, StageKind, kind_of, plan_of


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
    if not keeps_scores(config):
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


class MegatronMemory:
    """Megatron-Core's memory under one config, on `data` data ranks."""

    def __init__(self, config: RunConfig, pipe: Pipe, data: int) -> None:
        self._config, self._pipe = config, pipe
        self._shards = data * config.parallel.context if config.parallel.zero else 1
        self._dense, self._experts = (layer_bytes(config, experts) for experts in (False, True))
        self._loss, self._shape = loss_bytes(config), shape_of(config)
        # Two of what crosses between ranks are on their way: one is received, one sent.
        hidden = self._shape.tokens * config.model.hidden_size * self._shape.width
        self._crossing = 2 * hidden if pipe.ranks > 1 else 0
        self._model = Hashed(config.model)

    def rank(self, index: int, by_stage: bool) -> tuple[dict[int, Components], Components]:
        """Return the components of each stage of a pipeline rank, and of the rank."""
        parallel = self._config.parallel
        stages = [
            stage
            for stage in engine_stages("megatron", self._config.model, parallel.num_stages)
            if stage_rank(stage.index, parallel.pipeline, parallel.schedule) == index
        ]
        # A round goes through all chunks of a rank.
        rounds, more = divmod(in_flight(self._pipe, index), len(stages))
        rows = {
            stage.index: self._stage(kind_of(self._config, stage), rounds + (place < more))
            for place, stage in enumerate(stages)
        }
        # One of the stages works at a time.
        return rows, total(rows.values()).having(working=max(row.working for row in rows.values()))

    def _stage(self, kind: StageKind, flying: int) -> Components:
        precision, zero, shape = self._config.precision, self._config.parallel.zero, self._shape
        split = (self._config.parallel.tensor, self._config.parallel.expert)
        experts, dense = _numel(self._model, split, kind)
        own = dense / self._shards + experts / max(1, self._shards // self._config.parallel.expert)
        # Without the distributed optimizer fp16's gradients stay fp16, and masters have fp32 copies of them.
        halves = precision.compute == "fp16" and not zero
        masters = 8 if shape.width == 4 else 16 if halves else 12
        layers = [(kind.layers.dense, self._dense), (kind.layers.experts, self._experts)]
        kept = sum(count * layer.kept for count, layer in layers)
        # A backward makes a layer again, then holds gradients at its widest.
        most = max(layer.saved - layer.kept + layer.working for count, layer in layers if count)
        loss = self._loss if kind.last else 0
        return Components(
            parameters=(experts + dense) * shape.width,
            gradients=(experts + dense) * (2 if halves else 4),
            optimizer=int(own * masters),
            activations=kept * flying,
            working=max(0, most - loss),
            logits=loss,
            buffers=self._crossing,
        )


@lru_cache(maxsize=8192)
def _numel(model: Hashed[ModelConfig], split: tuple[int, int], kind: StageKind) -> tuple[int, int]:
    """Return the elements of a stage's parameters on one rank: of experts and of all else."""
    layout = ParallelConfig(tensor=split[0], expert=split[1])
    units = stage_units(model.value, layout, plan_of(model.value, kind))
    experts = sum(tensor.numel for unit in units for tensor in unit if tensor.expert)
    return experts, sum(tensor.numel for unit in units for tensor in unit) - experts
