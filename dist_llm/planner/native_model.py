"""The parts of a stage on a tape, as models/ and parallel/ run them: embedding, block, head with its loss.

Each part is run alone, forward and back; stage_bytes.py puts them one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.accounting.params import padded_vocab
from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.planner.native_context import attend_over_ranks, attention_shape
from dist_llm.planner.native_experts import experts
from dist_llm.planner.native_ops import INDEX_BYTES, Formats, Operations
from dist_llm.planner.tape import Tape, Value


@dataclass(frozen=True)
class Share:
    """One rank's part of a microbatch: sequences, tokens of each inside a tensor-parallel region and between regions.

    documents: attention has a mask.
    """

    batch: int
    seq: int
    part: int
    documents: bool

    @property
    def tokens(self) -> int:
        """Tokens inside a region."""
        return self.batch * self.seq


@dataclass(frozen=True)
class Setting:
    """All that the bytes of a part depend on; hashable, so that a part is run once.

    native: the operations that the compiled library computes, which needs no memory beside its results.
    """

    model: ModelConfig
    parallel: ParallelConfig
    formats: Formats
    share: Share
    native: frozenset[str]


class Parts:
    """The parts of a model on one tape."""

    def __init__(self, setting: Setting, tape: Tape) -> None:
        self._model, self._parallel, self._share = setting.model, setting.parallel, setting.share
        self._tape, self.ops = tape, Operations(tape, setting.formats, setting.native)
        in_place = "cross_entropy" in setting.native
        self._loss = self.ops.cross_entropy_in_place if in_place else self.ops.cross_entropy
        self._sequence = self._parallel.sequence and self._parallel.tensor > 1

    def hidden_numel(self) -> int:
        """Elements of the hidden states between regions."""
        return self._share.batch * self._share.part * self._model.hidden_size

    def embed(self) -> Value:
        """Token and position tables."""
        ops, share, ranks = self.ops, self._share, self._parallel.tensor
        numel = share.tokens * self._model.hidden_size
        width, table = ops.formats.compute, padded_vocab(self._model.vocab_size, ranks) // ranks
        gradient = table * self._model.hidden_size * width

        def look_up_back(grad: object) -> list[None]:
            self._tape.weight_gradient(gradient)
            return []

        kept = share.tokens * (INDEX_BYTES + 1) if ranks > 1 else 0
        x = self._tape.apply([], (numel, width), [kept], 0, look_up_back)
        if ranks > 1:
            x = self._leave(ops.add_bias(x))
        if self._model.position == "learned":
            x = ops.add_bias(x)
        if self._model.mup.embedding_multiplier != 1:
            x = ops.scaled(x)
        return self._dropped(x)

    def block(self, x: Value, with_experts: bool, recompute: bool) -> Value:
        """Attention and feed-forward halves; recompute: whether this layer is one of those that recompute."""
        if recompute and self._parallel.recompute == "full":
            return self._tape.again(lambda y: self._block(y, with_experts, False), x)
        return self._block(x, with_experts, recompute)

    def head(self, x: Value, keeps_logits: bool) -> tuple[Value, Value | None]:
        """Final norm, projection and loss; returns the loss, and the logits where a pipeline keeps them."""
        model, ops, ranks = self._model, self.ops, self._parallel.tensor
        if model.norm_placement == "pre":
            x = self._norm(x, False)
        if model.output_scale != 1:
            x = ops.scaled(x)
        columns = padded_vocab(model.vocab_size, ranks) // ranks
        logits = ops.linear(self._enter(x), model.hidden_size, columns)
        loss = self._loss(logits, self._share.tokens)
        return loss, logits if keeps_logits else None

    def _block(self, x: Value, with_experts: bool, selective: bool) -> Value:
        add = self.ops.add

        def whole(y: Value) -> Value:
            return self._experts(y, selective) if with_experts else self._mlp(y, selective)

        def feed(y: Value) -> Value:
            again = selective and self._parallel.computes_again("mlp")
            return self._tape.again(whole, y) if again else whole(y)

        if self._model.norm_placement == "post":
            x = self._norm(add(x, self._dropped(self._attention(x, selective))), selective)
            return self._norm(add(x, self._dropped(feed(x))), selective)
        x = add(x, self._dropped(self._attention(self._norm(x, selective), selective)))
        return add(x, self._dropped(feed(self._norm(x, selective))))

    def _attention(self, x: Value, selective: bool) -> Value:
        model, ops, tape = self._model, self.ops, self._tape
        head, ranks = model.head_width, self._parallel.tensor
        x = self._enter(x)
        query, key, value = (
            self._column(x, heads * head // ranks) for heads in (model.num_heads, model.kv_heads, model.kv_heads)
        )
        if model.qk_norm:
            query, key = self._norm(query, selective, head), self._norm(key, selective, head)
        if model.position == "rope":
            # Over context ranks each layer picks the rows of its positions from the tables of cos and sin.
            table = self._share.seq * head * ops.formats.wide if self._parallel.context > 1 else 0
            query, key = ops.rotate(query, table), ops.rotate(key)
        if model.query_scale != 1:
            query = ops.scaled(query)

        share = self._share
        shape = attention_shape(self._parallel, share.batch, share.seq, head, share.documents)

        def attend(q: Value, k: Value, v: Value) -> Value:
            return attend_over_ranks(ops, (q, k, v), shape)

        if selective and self._parallel.computes_again("core_attn"):
            out = tape.again(attend, query, key, value)
        else:
            out = attend(query, key, value)
        del query, key, value, x
        return self._row(out, model.num_heads * head // ranks)

    def _mlp(self, x: Value, selective: bool, inner: int | None = None, partial: bool = False) -> Value:
        model, ranks = self._model, self._parallel.tensor
        width = (model.ffn_hidden_size if inner is None else inner) // ranks
        if not partial:
            x = self._enter(x)
        gate = self._column(x, width) if model.activation == "swiglu" else None
        up = self._column(x, width)
        del x
        product = self._activation(up, gate, selective)
        del up, gate
        return self.ops.linear(product, width, model.hidden_size) if partial else self._row(product, width)

    def _experts(self, x: Value, selective: bool) -> Value:
        model = self._model
        x = self._enter(x)
        shared = model.moe.num_shared * model.expert_width
        mixed = experts(self.ops, x, model, self._parallel, lambda up, gate: self._activation(up, gate, selective))
        if shared:
            mixed = self.ops.add(mixed, self._mlp(x, selective, shared, partial=True))
        del x
        return self._leave(mixed)

    def _activation(self, up: Value, gate: Value | None, selective: bool) -> Value:
        if selective and self._parallel.computes_again("activation"):
            return self._tape.give_up(self.ops.activation, *((up,) if gate is None else (up, gate)))
        return self.ops.activation(up, gate)

    def _norm(self, x: Value, selective: bool, width: int | None = None) -> Value:
        """Normalise rows of hidden states or, of `width`, those of heads."""
        rms = width is not None or self._model.norm == "rmsnorm"

        def call(y: Value) -> Value:
            return (self.ops.rms_norm if rms else self.ops.layer_norm)(y, width or self._model.hidden_size)

        return self._tape.give_up(call, x) if selective and self._parallel.computes_again("norm") else call(x)

    def _column(self, x: Value, outputs: int) -> Value:
        return self.ops.linear(x, self._model.hidden_size, outputs)

    def _row(self, x: Value, inputs: int) -> Value:
        out = self._leave(self.ops.linear(x, inputs, self._model.hidden_size))
        return self.ops.add_bias(out) if self._parallel.tensor > 1 and self._model.bias else out

    def _dropped(self, x: Value) -> Value:
        return self.ops.dropout(x) if self._model.dropout else x

    def _enter(self, x: Value) -> Value:
        if self._parallel.tensor == 1:
            return x
        if self._sequence:
            return self.ops.gather(x, self._parallel.tensor, self._share.batch)
        return self.ops.copy(x)

    def _leave(self, x: Value) -> Value:
        if self._parallel.tensor == 1:
            return x
        if self._sequence:
            return self.ops.scatter(x, self._parallel.tensor, self._share.batch)
        return self.ops.reduce(x)
