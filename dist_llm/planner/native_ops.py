"""What each operation of the model makes and keeps, in bytes: the native engine's kernels of ops/ and torch's own.

    linear     keeps x                             norm      x and one or two numbers a row
    attention  q, k, v, out and a log-sum-exp      gelu, swiglu  their inputs
    dropout    a mask of bytes                     cross entropy  probabilities in the wide format, or the logits

Everything is of one rank's share of a microbatch. tests/parallel/test_footprint.py holds this equal to measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.planner.tape import Buffer, Gradients, Tape, Value

INDEX_BYTES = 8
"""Bytes of an index: torch's int64."""


@dataclass(frozen=True)
class Formats:
    """Bytes of one element: of activations (compute), and of sums and statistics (wide)."""

    compute: int
    wide: int

    @property
    def narrow(self) -> bool:
        """Whether statistics are of another format than activations."""
        return self.compute != self.wide


class Operations:
    """The operations of one rank, each on a tape; native: those that make nothing beside their results."""

    def __init__(self, tape: Tape, formats: Formats, native: frozenset[str]) -> None:
        self.tape, self.formats, self._native = tape, formats, native

    def linear(self, x: Value, inputs: int, outputs: int) -> Value:
        """x W^T: keeps x; its backward makes dx and, beside it, dW."""
        tape, width, size = self.tape, self.formats.compute, x.size
        weight = inputs * outputs * width
        # What waits for the second half of a backward keeps x alive; else the node alone does.
        made_of = (x.recipe or x.buffer) if tape.splits and tape.saving else None

        def backward(grad: Buffer | None) -> Gradients:
            made = tape.new(size)
            tape.weight_gradient(weight, made_of, grad)
            return [made]

        return tape.apply([x], (x.numel // inputs * outputs, width), [x], 0, backward)

    def add(self, x: Value, y: Value) -> Value:
        """A sum: its gradient goes to both as it is."""
        return self.tape.apply([x, y], (x.numel, x.width), (), 0, lambda grad: [grad, grad])

    def add_bias(self, x: Value) -> Value:
        """The sum with a vector."""
        return self.tape.apply([x], (x.numel, x.width), (), 0, lambda grad: [grad])

    def scaled(self, x: Value) -> Value:
        """The product with a number."""
        return self.tape.apply([x], (x.numel, x.width))

    def rms_norm(self, x: Value, width: int) -> Value:
        """ops/rms_norm.py: statistics in the wide format, one number a row."""
        wide, narrow = x.numel * self.formats.wide, self.formats.narrow
        kept: list[Value | int] = [x, x.numel // width * self.formats.wide]
        if "rms_norm" in self._native:
            return self.tape.apply([x], (x.numel, x.width), kept)
        forward = 3 * wide if narrow else wide
        back = max(6 * wide, 5 * wide + x.size) - x.size if narrow else 3 * wide
        return self.tape.apply([x], (x.numel, x.width), kept, forward, back)

    def layer_norm(self, x: Value, width: int) -> Value:
        """torch's: mean and deviation of each row."""
        return self.tape.apply([x], (x.numel, x.width), [x, 2 * (x.numel // width) * self.formats.wide])

    def rotate(self, x: Value, table_bytes: int = 0) -> Value:
        """ops/rope.py: keeps only its tables, which are counted where they are made."""
        wide = x.numel * self.formats.wide
        if "rope" in self._native:
            return self.tape.apply([x], (x.numel, x.width), [table_bytes])
        if self.formats.narrow:
            return self.tape.apply([x], (x.numel, x.width), [table_bytes], wide, wide + x.size)
        return self.tape.apply([x], (x.numel, x.width), [table_bytes], wide, wide)

    def activation(self, up: Value, gate: Value | None = None) -> Value:
        """gelu(up), or silu(gate) * up."""
        if gate is None:
            return self.tape.apply([up], (up.numel, up.width), [up])
        beside = 0 if "swiglu" in self._native else up.size
        return self.tape.apply([gate, up], (up.numel, up.width), [gate, up], beside, beside)

    def dropout(self, x: Value) -> Value:
        """ops/dropout.py: a counter for each element, three at once while they are mixed; a mask of bytes stays."""
        return self.tape.apply([x], (x.numel, x.width), [x.numel], 3 * INDEX_BYTES * x.numel - x.size, x.size)

    def attend(self, query: Value, key: Value, value: Value, rows: int, mask_bytes: int) -> Value:
        """Flash attention; rows: queries times heads, each with a log-sum-exp."""
        kept: list[Value | int] = [query, key, value, rows * self.formats.wide, mask_bytes]
        out = self.tape.apply([query, key, value], (query.numel, query.width), kept)
        self.keep_output(out)
        return out

    def keep_output(self, out: Value) -> None:
        """Let the node of a value keep the value too."""
        if self.tape.saving:
            out.node.keeps.append(out.buffer)

    def copy(self, x: Value) -> Value:
        """Megatron's f: the same forward; on the way back a sum over ranks, in a new storage."""
        return self.tape.record(Value(x.buffer, x.numel, x.width, x.node, x.recipe), [x], ())

    def reduce(self, x: Value) -> Value:
        """Megatron's g: a sum over ranks in a new storage; the gradient as it is."""
        return self.tape.apply([x], (x.numel, x.width), (), 0, lambda grad: [grad])

    def gather(self, x: Value, ranks: int, batch: int) -> Value:
        """Join the parts of a sequence; of several sequences they come in another order and are copied."""
        again = x.size * ranks if batch > 1 else 0
        return self.tape.apply([x], (x.numel * ranks, x.width), (), again, again)

    def scatter(self, x: Value, ranks: int, batch: int) -> Value:
        """Sum over ranks and keep a part."""
        again = x.size if batch > 1 else 0
        return self.tape.apply([x], (x.numel // ranks, x.width), (), again, again)

    def cross_entropy_in_place(self, logits: Value, rows: int) -> Value:
        """parallel/cross_entropy.py, native: keeps two numbers a row; the gradient takes the place of the logits."""
        tape, numbers = self.tape, 2 * rows * self.formats.wide
        kept = [logits.buffer, tape.new(numbers)]
        tape.meter.pass_through(2 * numbers)

        def backward(grad: Buffer | None) -> Gradients:
            return [kept.pop(0)]

        out = tape.record(Value(tape.new(0), 1, self.formats.wide, logits.node), [logits], (), backward)
        out.node.keeps = [kept]
        return out

    def cross_entropy(self, logits: Value, rows: int) -> Value:
        """parallel/cross_entropy.py: probabilities in the wide format, made where the widened logits are."""
        tape, wide = self.tape, logits.numel * self.formats.wide
        probabilities = tape.new(wide)
        kept = [probabilities, tape.new(rows * (INDEX_BYTES + 1))]
        loss = Value(tape.new(0), 1, self.formats.wide, logits.node)

        def backward(grad: Buffer | None) -> Gradients:
            return [tape.new(logits_size) if narrow else kept.pop(0)]

        narrow, logits_size = self.formats.narrow, logits.size
        out = tape.record(loss, [logits], (), backward)
        out.node.keeps = [kept]
        return out
