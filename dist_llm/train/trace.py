"""What a training run leaves to be compared: curves, weights, and one step seen from inside.

At the step that is looked at: each part's output as the sum of its squares, which every layout adds up alike; the true
mean's gradient; and the squares of every shard, so that replicas can be compared with each other.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.loader import TokenLoader
from dist_llm.engine.native import NativeEngine
from dist_llm.runtime.mesh import Mesh, build_mesh

Array = NDArray[Any]
Rectangle = tuple[str, tuple[int, ...], tuple[int, ...], Array]
"""A part of a logical tensor: the tensor's name and shape, the part's offsets and values."""

_PARTS = re.compile(r"embed|layers\.\d+\.(attention|mlp)")
"""Parts of the model whose outputs are compared."""


@dataclass(frozen=True)
class Held:
    """A shard on a rank, by what replicas of it must agree in: its squares in a phase (gradient or update)."""

    phase: str
    name: str
    offsets: tuple[int, ...]
    squares: float


@dataclass
class Look:
    """One step of one rank.

    place: this rank's index on pp, dp, cp and tp. outputs: sum of squares of what each part gave, over this rank's
    tokens; spread: whether tp ranks hold different tokens of them, else all have the same. gradients: primary shards'.
    """

    place: dict[str, int]
    spread: bool
    outputs: dict[str, float] = field(default_factory=dict)
    gradients: list[Rectangle] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)


@dataclass
class Trace:
    """What a training run left on one rank: curves, primary rectangles of the weights, key-bias gradients' share."""

    losses: list[float]
    grad_norms: list[float]
    weights: list[Rectangle] = field(default_factory=list)
    key_bias_shares: list[dict[str, float]] = field(default_factory=list)
    look: Look | None = None


KEY_BIAS = "attention.wk.bias"
"""How the name of a layer's key bias ends."""


def has_idle_key_bias(model: ModelConfig) -> bool:
    """Return whether key biases, where there are any, have no true gradient: nothing acts on the key after them."""
    return model.position != "rope" and not model.qk_norm


class KeyBias:
    """Notes the norm of this rank's primary key-bias gradients at each step, before the optimizer rescales them.

    None where positions or a norm act on the key after its bias, which then has a gradient like any weight.
    """

    def __init__(self, engine: NativeEngine, model: ModelConfig) -> None:
        self._engine = engine
        self._adds_alike = has_idle_key_bias(model)
        self.norms: list[dict[str, float]] = []

    def observe(self, phase: str) -> None:
        """Look when the gradients are complete."""
        if phase != "before_update":
            return
        gradients = {shard.name: shard.gradient() for shard in self._engine.shards if shard.primary}
        self.norms.append(
            {
                name: gradient.double().norm().item()
                for name, gradient in gradients.items()
                if gradient is not None and self._adds_alike and name.endswith(KEY_BIAS)
            }
        )


class Watch:
    """Looks at one step of an engine from inside; silent in all others."""

    def __init__(self, engine: NativeEngine, mesh: Mesh, sequence: bool) -> None:
        self._engine = engine
        self.on = False
        axes = (mesh.pp, mesh.dp, mesh.cp, mesh.tp)
        self.look = Look({axis.name: axis.index for axis in axes}, sequence or mesh.tp.size == 1)
        for stage in engine.stages:
            for name, module in stage.part.model.named_modules():
                if _PARTS.fullmatch(name):
                    module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def observe(module: nn.Module, inputs: Any, out: Tensor) -> None:
            # In a backward a forward is one that recompute runs again.
            if self.on and torch._C._current_graph_task_id() == -1:
                self.look.outputs[name] = self.look.outputs.get(name, 0.0) + _squares(out)

        return observe

    def observe(self, phase: str) -> None:
        """Keep the gradients when they are complete, and the weights when they are updated."""
        if not self.on or phase not in ("before_update", "after_update"):
            return
        for shard in self._engine.shards:
            if phase == "after_update":
                self.look.held.append(Held("update", shard.name, shard.offsets, _squares(shard.inside(shard.tensor))))
                continue
            gradient = shard.gradient()
            inside = torch.zeros(shard.extent) if gradient is None else shard.inside(gradient.detach())
            self.look.held.append(Held("gradient", shard.name, shard.offsets, _squares(inside)))
            if shard.primary:
                self.look.gradients.append((shard.name, shard.shape, shard.offsets, inside.double().numpy().copy()))

    def scale(self, unit: float) -> None:
        """Divide the gradients by what the engine multiplied the mean's by: `unit`."""
        self.look.gradients = [(*where, values / unit) for *where, values in self.look.gradients]  # type: ignore[misc]


def _squares(x: Tensor) -> float:
    return float(x.detach().double().square().sum())


def train_case(config: RunConfig, prefix: Path, eos_id: int, steps: int, look: int = 0) -> Trace:
    """Train the first `steps` steps in the current process group, look at step `look`; return this rank's trace."""
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    engine = NativeEngine(config, mesh)
    key_bias, watch = KeyBias(engine, config.model), Watch(engine, mesh, config.parallel.sequence)
    loader = TokenLoader(
        IndexedDataset(prefix), config.data, config.run.seed, engine.data_slice, eos_id, config.model.vocab_size
    )

    def observe(phase: str) -> None:
        key_bias.observe(phase)
        watch.observe(phase)

    engine.observe = observe
    trace = Trace([], [], look=watch.look)
    for step in range(steps):
        watch.on = step == look
        result = engine.train_step(loader.batch(step))
        trace.losses.append(result.loss)
        trace.grad_norms.append(result.grad_norm)
        unit = result.tokens * engine.loss_unit
        trace.key_bias_shares.append(
            {key: norm / (result.grad_norm * unit) for key, norm in key_bias.norms[-1].items()}
        )
        if watch.on:
            watch.scale(unit)
    trace.weights = list(_weights(engine))
    engine.close()
    gc.collect()
    return trace


def _weights(engine: NativeEngine) -> Iterator[Rectangle]:
    """Yield this rank's primary rectangles of the model: its parameters, and the biases of its routers."""
    for tensor in engine.state().tensors:
        kind, _, name = tensor.name.partition(".")
        if kind == "model" and tensor.primary:
            yield name, tensor.shape, tensor.offsets, tensor.data.numpy().copy()


def assemble(rectangles: Iterable[Rectangle]) -> dict[str, Array]:
    """Put rectangles of all ranks together into logical tensors; NaN where none lies."""
    whole: dict[str, Array] = {}
    for name, shape, offsets, data in rectangles:
        target = whole.setdefault(name, np.full(shape, np.nan, data.dtype))
        target[tuple(slice(at, at + size) for at, size in zip(offsets, data.shape, strict=True))] = data
    return whole
