"""Autograd without tensors: which bytes operations make, keep for the backward and let go, in the order of a run.

    forward    an operation makes its output and keeps what its backward reads; what nothing refers to any more is gone
    backward   nodes run latest first; each makes the gradients of its inputs, then lets go of what it kept

A Buffer counts on a Meter from its making until the last reference to it is gone, as torch's storages live by
CPython's counts. planner/native_ops.py says what each operation of models/, ops/ and parallel/ makes and keeps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Meter:
    """Bytes that are alive, and the most there were since `begin`."""

    __slots__ = ("level", "most")

    def __init__(self) -> None:
        self.level = self.most = 0

    def begin(self) -> int:
        """Forget the most there were; return the level."""
        self.most = self.level
        return self.level

    def pass_through(self, size: int) -> None:
        """Count bytes that live for a moment."""
        self.most = max(self.most, self.level + size)


class Buffer:
    """Bytes of one storage, alive as long as something refers to them."""

    __slots__ = ("_meter", "size")

    def __init__(self, meter: Meter, size: int) -> None:
        self._meter, self.size = meter, size
        meter.level += size
        if meter.level > meter.most:
            meter.most = meter.level

    def __del__(self) -> None:
        self._meter.level -= self.size


Gradients = Sequence["Buffer | None"]
"""Gradients of a node's inputs; None where there is none, or where its bytes are counted elsewhere."""
Backward = Callable[["Buffer | None"], Gradients]
"""From the gradient of an output to those of the inputs."""


class Node:
    """An operation that the backward goes through: the nodes of its inputs and what it keeps until then."""

    __slots__ = ("backward", "inputs", "keeps")

    def __init__(self, inputs: Sequence[Node], keeps: Sequence[object], backward: Backward) -> None:
        self.inputs, self.keeps, self.backward = inputs, list(keeps), backward


def leaf() -> Node:
    """Return what stands for the maker of an input."""
    return Node((), (), lambda grad: ())


class Value:
    """What an operation gives: elements in a storage, perhaps shared, the node that made it, and its recipe if it is
    given up. buffer None: its bytes are counted elsewhere.
    """

    __slots__ = ("buffer", "node", "numel", "recipe", "width")

    def __init__(self, buffer: Buffer | None, numel: int, width: int, node: Node, recipe: Recipe | None = None) -> None:
        self.buffer, self.numel, self.width, self.node, self.recipe = buffer, numel, width, node, recipe

    @property
    def size(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.width


Call = Callable[..., Value]


class Recipe:
    """A call that a backward makes again, once, for what it had saved or its result (parallel/recompute.py)."""

    def __init__(self, tape: Tape, call: Call, inputs: Sequence[Value]) -> None:
        self._tape, self._call = tape, call
        self.inputs = [Value(x.buffer, x.numel, x.width, leaf()) for x in inputs]
        self._again: tuple[list[Node], Value] | None = None

    def run(self) -> tuple[list[Node], Value]:
        """Make the call; return its nodes and its result."""
        return self._tape.run(self._call, self.inputs, saving=True)

    def compute(self) -> list[Node]:
        """Make the call if it was not yet made again; return its nodes. Its result stays as long as the recipe."""
        if self._again is None:
            self._again = self.run()
        return self._again[0]


class Tape:
    """Operations in their order.

    accumulates: weights have gradients already, to which a backward adds; a first one's are not counted here.
    casts: gradients of weights are of a narrow format until their unit is done, when they are added up in a wide one.
    splits: what gradients of weights are made of waits in `later`, with their bytes.
    """

    def __init__(self, accumulates: bool, casts: bool = False, splits: bool = False) -> None:
        self.meter, self.nodes, self.saving = Meter(), list[Node](), True
        self.accumulates, self.casts, self.splits = accumulates, casts, splits
        self.later: list[tuple[int, object]] = []
        self.unit: list[Buffer] = []

    def new(self, size: int) -> Buffer:
        """Return a storage of so many bytes."""
        return Buffer(self.meter, size)

    def apply(
        self,
        inputs: Sequence[Value],
        shape: tuple[int, int],
        keeps: Sequence[Value | int] = (),
        scratch: int = 0,
        backward: Backward | int = 0,
    ) -> Value:
        """Run an operation that makes `shape` = (elements, bytes of each) and return that.

        keeps: what its backward reads: values, or bytes of its own. scratch: bytes beside inputs and output, for a
        moment. backward: how gradients are made; a number: one storage for each input and so many bytes for a moment.
        """
        if scratch:
            self.meter.pass_through(scratch + shape[0] * shape[1])
        out = Value(self.new(shape[0] * shape[1]), *shape, leaf())
        return self.record(out, inputs, keeps, backward)

    def record(
        self, out: Value, inputs: Sequence[Value], keeps: Sequence[Value | int], backward: Backward | int = 0
    ) -> Value:
        """Append the node that makes a value and return the value."""
        held: list[object] = []
        if self.saving:
            for kept in keeps:
                held.append(self.new(kept) if isinstance(kept, int) else kept.recipe or kept.buffer)
        how = _each(self, [x.size for x in inputs], backward) if isinstance(backward, int) else backward
        out.node = Node([x.node for x in inputs], held, how)
        self.nodes.append(out.node)
        return out

    def weight_gradient(self, size: int, *made_of: object) -> None:
        """Add up the gradient of a weight of so many bytes, or let what it is made of wait."""
        if self.splits:
            self.later.append((size, made_of))
        elif self.casts:
            self.unit.append(self.new(size))
        elif self.accumulates:
            self.meter.pass_through(size)

    def finish(self) -> None:
        """Make the gradients of weights that wait, in the order in which they came."""
        waiting, self.later = self.later[::-1], []
        while waiting:
            size, _ = waiting[-1]
            if self.accumulates:
                self.meter.pass_through(size)
            waiting.pop()

    def again(self, call: Call, *inputs: Value) -> Value:
        """Run a call that keeps its inputs alone; its backward makes it again and goes through it."""
        recipe = Recipe(self, call, inputs)
        out = self.run(call, inputs, saving=False)[1]

        def backward(grad: Buffer | None) -> Gradients:
            return self.back(recipe.run()[0], [grad], [x.node for x in recipe.inputs])

        return self.record(out, inputs, inputs, backward)

    def give_up(self, call: Call, *inputs: Value) -> Value:
        """Run a call whose result is not kept either: whoever saves that keeps the recipe."""
        recipe = Recipe(self, call, inputs)
        out = self.run(call, inputs, saving=False)[1]
        given = Value(out.buffer, out.numel, out.width, out.node, recipe)

        def backward(grad: Buffer | None) -> Gradients:
            return self.back(recipe.compute(), [grad], [x.node for x in recipe.inputs])

        return self.record(given, inputs, [given], backward)

    def run(self, call: Call, inputs: Sequence[Value], saving: bool) -> tuple[list[Node], Value]:
        """Make a call on a tape of its own; return its nodes and its result."""
        outer, saved = self.nodes, self.saving
        self.nodes, self.saving = [], saving
        out = call(*inputs)
        nodes, self.nodes, self.saving = self.nodes, outer, saved
        return nodes, out

    def back(self, nodes: list[Node], grad: list[Buffer | None], ends: Sequence[Node]) -> list[Buffer | None]:
        """Go back through nodes from the gradient of the last; return the gradients of `ends`. Empties both lists."""
        pending = {nodes[-1]: grad.pop()}
        while nodes:
            node = nodes.pop()
            if node not in pending:
                continue
            for kept in node.keeps:
                if isinstance(kept, Recipe):
                    kept.compute()
            found = node.backward(pending.pop(node))
            node.keeps = []
            for source, each in zip(node.inputs, found, strict=True):
                before = pending.get(source)
                pending[source] = each if before is None else each and self.new(each.size)
            del found
        return [pending.get(end) for end in ends]


def _each(tape: Tape, sizes: Sequence[int], scratch: int) -> Backward:
    """Return the backward that makes one storage for each input."""

    def backward(grad: Buffer | None) -> Gradients:
        made = [tape.new(size) for size in sizes]
        tape.meter.pass_through(scratch)
        return made

    return backward
