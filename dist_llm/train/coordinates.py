"""The coordinate check (Yang et al. 2022, appendix D): under muP a layer's outputs move alike at every width.

    size    mean |x| of what a kind of layer puts out, over tokens, features and layers
    change  mean |x - x at the start|: what training did to it
    slope   of log(size or change) against log(width), by least squares: 0 at any width, 1 twice as much at twice

One batch of random tokens is trained on again and again, so that updates add up as they do on text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from dist_llm.config.checks import check
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.engine.native import NativeEngine
from dist_llm.errors import ConfigError, Violation
from dist_llm.models.attention import Attention
from dist_llm.models.transformer import Transformer
from dist_llm.ops.causal_attention import CausalAttention
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.types import Batch

KINDS = ("embedding", "attention_logits", "attention", "mlp", "hidden", "logits")
"""What is looked at: softmax's inputs and the outputs of layers; hidden is the last block's."""
PARAMETRISATIONS = ("mup", "standard")
GROWTH, FALL = 0.25, -0.35
"""Largest slope of a size or a change after the last step, and smallest of a change."""
FALL_OF_SCORES = -0.65
"""The smallest of attention's logits in wider heads: until queries find their keys they fall as the root of d."""

Figures = dict[str, tuple[float, float]]
"""(size, change) of every kind."""


class _Watch:
    """Takes (size, change) of each kind from a model's forward passes; all forwards must see the same batch."""

    def __init__(self, model: Transformer) -> None:
        self._start: dict[str, Tensor] = {}
        self._seen: dict[str, list[tuple[float, float]]] = {}
        assert model.embed is not None
        assert model.head is not None
        self._hook("embedding", "embed", model.embed)
        self._hook("logits", "head", model.head)
        for name, layer in model.layers.items():
            attention = layer.get_submodule("attention")
            assert isinstance(attention, Attention)
            self._hook("attention", f"{name}.attention", attention)
            self._hook("mlp", f"{name}.mlp", layer.get_submodule("mlp"))
            attention.attend = _Scores(self._taker("attention_logits", f"{name}.scores"))
        self._hook("hidden", "hidden", layer)

    def take(self) -> Figures:
        """Return the figures of the forward since the last call, means over layers."""
        figures = {}
        for kind, pairs in self._seen.items():
            sizes, changes = zip(*pairs, strict=True)
            figures[kind] = (sum(sizes) / len(sizes), sum(changes) / len(changes))
        self._seen = {}
        return figures

    def _hook(self, kind: str, place: str, module: nn.Module) -> None:
        take = self._taker(kind, place)
        module.register_forward_hook(lambda _module, _inputs, out: take(out))

    def _taker(self, kind: str, place: str) -> Callable[[Tensor], None]:
        def take(out: Tensor) -> None:
            value = out.detach().double()
            start = self._start.setdefault(place, value)
            pair = (value.abs().mean().item(), (value - start).abs().mean().item())
            self._seen.setdefault(kind, []).append(pair)

        return take


class _Scores(CausalAttention):
    """Attention that shows what its softmax is given."""

    def __init__(self, take: Callable[[Tensor], None]) -> None:
        self._take = take

    def __call__(self, query: Tensor, key: Tensor, *rest: Any) -> Tensor:
        """Attend, as attention does."""
        with torch.no_grad():
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
            scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
            rows, columns = torch.tril_indices(*scores.shape[-2:]).unbind()
            self._take(scores[..., rows, columns])
        return super().__call__(query, key, *rest)


def watch_training(config: RunConfig, steps: int) -> list[Figures]:
    """Train `steps` steps on one random batch; return the figures of each forward, the first before any step.

    In the current process group, of one rank.
    """
    data = config.data
    draw = torch.Generator().manual_seed(config.run.seed)
    tokens = torch.randint(0, config.model.vocab_size, (data.global_batch, data.seq_len + 1), generator=draw)
    batch = Batch(0, tokens[:, :-1], tokens[:, 1:], torch.arange(data.global_batch))
    engine = NativeEngine(config, build_mesh(config.parallel, torch.device("cpu")))
    model: Any = engine.stages[0].part.model
    watch, figures = _Watch(model), []
    for _ in range(steps):
        engine.train_step(batch)
        figures.append(watch.take())
    engine.eval_step(batch)
    figures.append(watch.take())
    engine.close()
    return figures


@dataclass(frozen=True)
class Widths:
    """The widths to compare, that of the base model, and whether more width is wider heads (else more of them)."""

    widths: tuple[int, ...]
    base: int
    wider_heads: bool

    @staticmethod
    def choose(model: ModelConfig, asked: Sequence[int] | None, wider_heads: bool) -> Widths:
        """Return what to compare for a model. asked: None for four widths from 64 on. Raises ConfigError."""
        unit = _unit(model, wider_heads)
        smallest = -(-64 // unit) * unit
        usual = tuple(smallest * 2**power for power in range(4))
        widths = usual if asked is None else tuple(asked)
        base = model.mup.base_width if model.mup.base_width is not None else widths[0]
        kept = "heads of whole (rope: even) widths" if wider_heads else "whole numbers of heads"
        rule = f"must be multiples of {unit}, for {kept} in proportion to this model's"
        violations = []
        if any(width % unit for width in widths):
            violations.append(Violation("--widths", ",".join(map(str, widths)), rule, (",".join(map(str, usual)),)))
        if base % unit and wider_heads:
            violations.append(Violation("model.mup.base_width", base, rule.replace("multiples", "a multiple")))
        if violations:
            raise ConfigError(violations)
        return Widths(widths, base, wider_heads)

    def resize(self, model: ModelConfig, width: int, mup: bool) -> ModelConfig:
        """Return the model at another width, all that is a width in proportion, under either parametrisation."""
        tree = model.model_dump() | _sizes(model, width, self.wider_heads)
        tree["moe"] = {**tree["moe"], "ffn_hidden_size": _inner(model.expert_width, width, model)}
        tree.update(dropout=0.0, attention_dropout=0.0, mup={})
        if mup:
            tree["mup"] = {
                "base_width": self.base,
                "base_head_width": _sizes(model, self.base, self.wider_heads)["head_dim"],
                "base_ffn_width": _inner(model.ffn_hidden_size, self.base, model),
                "base_expert_width": _inner(model.expert_width, self.base, model),
                "output_multiplier": model.mup.output_multiplier,
                "embedding_multiplier": model.mup.embedding_multiplier,
            }
        return ModelConfig.model_validate(tree)


def _unit(model: ModelConfig, wider_heads: bool) -> int:
    """Return what every width must be a multiple of."""
    if wider_heads:
        step = 2 if model.position == "rope" else 1
        return step * (Fraction(model.hidden_size, model.head_width)).numerator
    return model.hidden_size // math.gcd(model.hidden_size, model.kv_heads)


def _sizes(model: ModelConfig, width: int, wider_heads: bool) -> dict[str, int]:
    """Return the sizes of a model of a width."""
    ratio = Fraction(width, model.hidden_size)
    heads, head = (1, ratio) if wider_heads else (ratio, 1)
    return {
        "hidden_size": width,
        "num_heads": int(model.num_heads * heads),
        "num_kv_heads": int(model.kv_heads * heads),
        "head_dim": int(model.head_width * head),
        "ffn_hidden_size": _inner(model.ffn_hidden_size, width, model),
    }


def _inner(inner: int, width: int, model: ModelConfig) -> int:
    return max(1, round(Fraction(inner * width, model.hidden_size)))


def verify_coordinates(
    config: RunConfig,
    widths: Widths,
    *,
    steps: int = 10,
    seeds: int = 1,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, object]:
    """Train `steps` steps at every width, under muP and not; return slopes and figures as JSON-able facts.

    `ok`: under muP no size or change grows after the last step, and no change falls, beyond the bounds.
    """
    rows: list[dict[str, object]] = []
    with WorkerPool(1, timeout_seconds=300.0) as pool:
        for name in PARAMETRISATIONS:
            for width in widths.widths:
                report(f"{name}: width {width}, {steps} steps")
                drawn = []
                for seed in range(config.run.seed, config.run.seed + seeds):
                    run = _run_config(config, widths.resize(config.model, width, name == "mup"), seed)
                    drawn.append(pool.run(watch_training, run, steps, world=1)[0])
                rows += _mean_rows(name, width, drawn)
    falls = {kind: FALL_OF_SCORES if kind == "attention_logits" and widths.wider_heads else FALL for kind in KINDS}
    slopes = [_slopes(rows, kind, steps, fall) for kind, fall in falls.items()]
    return {
        "ok": all(row["ok"] for row in slopes),
        "base_width": widths.base,
        "steps": steps,
        "lr": config.optimizer.lr,
        "bounds": {"growth": GROWTH, "fall": falls},
        "kinds": slopes,
        "figures": rows,
    }


def _run_config(config: RunConfig, model: ModelConfig, seed: int) -> RunConfig:
    """Return the run of one model: one process, one microbatch a step, a constant learning rate."""
    tree = config.model_dump()
    tree["model"] = model.model_dump()
    tree["run"]["seed"] = seed
    tree["parallel"] = {"zero": 0}
    tree["data"].update(global_batch=config.data.microbatch, document_mask=False)
    tree["schedule"] = {"name": "constant"}
    tree["precision"] = {"name": "fp32"}
    run = RunConfig.model_validate(tree)
    violations = check(run, 1)
    if violations:
        raise ConfigError(violations)
    return run


def _mean_rows(name: str, width: int, drawn: list[list[Figures]]) -> list[dict[str, object]]:
    """Return a row a step and kind: the means over seeds."""
    rows: list[dict[str, object]] = []
    for step, figures in enumerate(zip(*drawn, strict=True)):
        for kind in KINDS:
            means = [sum(each[kind][part] for each in figures) / len(figures) for part in (0, 1)]
            size, change = (mean if math.isfinite(mean) else None for mean in means)
            rows.append(
                {"parametrisation": name, "width": width, "step": step, "kind": kind, "size": size, "change": change}
            )
    return rows


def _slopes(rows: Sequence[Mapping[str, Any]], kind: str, step: int, fall: float) -> dict[str, object]:
    """Return the slopes of a kind after the last step under both parametrisations, and whether muP's are in bounds."""
    found: dict[str, object] = {"kind": kind}
    for name in PARAMETRISATIONS:
        chosen = [row for row in rows if (row["parametrisation"], row["kind"], row["step"]) == (name, kind, step)]
        across = [row["width"] for row in chosen]
        size, change = (slope(across, [row[part] for row in chosen]) for part in ("size", "change"))
        found |= {f"{name}_size": size, f"{name}_change": change, f"{name}_ok": within(size, change, fall)}
    found["ok"] = found["mup_ok"]
    return found


def within(size: float | None, change: float | None, fall: float = FALL) -> bool:
    """Return whether the slopes of a size and a change are those of something that does not depend on the width."""
    return size is not None and change is not None and size <= GROWTH and fall <= change <= GROWTH


def slope(widths: Sequence[float], values: Sequence[float | None]) -> float | None:
    """Return the slope of log(value) against log(width); None where a value is no positive number."""
    across, up = [math.log(width) for width in widths], [math.log(value) for value in values if value]
    if len(up) < len(across):
        return None
    middle, level = sum(across) / len(across), sum(up) / len(up)
    spread = sum((x - middle) ** 2 for x in across)
    return sum((x - middle) * (y - level) for x, y in zip(across, up, strict=True)) / spread
