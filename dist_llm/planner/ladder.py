"""A ladder of small runs to fit a law to: budgets from low to high, sizes on either side of the best.

    ladder    one run a budget, N = N*(C) times 1, 1/2, 2, 1/1.4, 1.4 in turn: exponents of N and D come apart
    IsoFLOP   a few budgets, at each sizes from N*(C) / 3 to 3 N*(C)                (Hoffmann et al. 2022, approach 2)

Every run has the base config's family, vocabulary, heads' width, data and layout; its learning rate is the median of
the published batch laws, and all of them end their decay, for a loss before that is no point of a law.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from dist_llm.accounting.params import embedding_parameters, num_parameters
from dist_llm.config.checks import check
from dist_llm.config.model import ModelConfig
from dist_llm.config.rule import with_values
from dist_llm.config.rules import data_ranks
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.batch_laws import recommend
from dist_llm.planner.laws import Law
from dist_llm.planner.shapes import usual_aspect

AROUND_BEST = (1.0, 1 / 2, 2.0, 1 / 1.4, 1.4)
"""Sizes of a ladder's runs over the best of their budget, in turn."""
ISOFLOP_REACH = 3.0
FEWEST_SIZES = 5
"""Sizes at each budget of an IsoFLOP sweep."""
MOST_LEARNING_RATE = 1e-2
"""The laws were fitted above 50M parameters; below, they ask for more than small models bear."""
ENOUGH_STEPS, FEWEST_STEPS = 2000, 50
"""The batch is made smaller where a run would have fewer steps than the first, for the laws' batches are too large for
runs so short: of 2M to 10M tokens, 4096 a step end 3 to 5 % above 2048. With fewer than the second there is no run."""
WARMUP_SHARE = 0.05
WIDEST_ASPECT = 4
"""How many times off the usual hidden_size / num_layers shapes may be (shapes.usual_aspect)."""
ASPECT_WEIGHT = 0.5
"""How much being off it counts against being off the size: a jump in depth is a jump in loss, and tokens make up for
the size."""
STEP = 16
SHAPE_KEYS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "ffn_hidden_size")


@dataclass(frozen=True)
class LadderRun:
    """One run: its config, parameters with embeddings, tokens, and 6 N D."""

    config: RunConfig
    num_params: int
    tokens: int
    overrides: dict[str, object]

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.run.name

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 N D."""
        return 6.0 * self.num_params * self.tokens


def plan_ladder(
    base: RunConfig, ranks: int, law: Law, budgets: tuple[float, float], num_runs: int, isoflop: bool = False
) -> list[LadderRun]:
    """Return runs from the least to the greatest of `budgets` (FLOPs). Raises ConfigError where a budget has no run."""
    targets = list(_isoflop_targets(law, budgets, num_runs) if isoflop else _ladder_targets(law, budgets, num_runs))
    shapes = list(_shapes(base.model, max(size for _, size in targets)))
    kind = "isoflop" if isoflop else "ladder"
    taken: set[tuple[float, int]] = set()
    runs = []
    for index, (flops, size) in enumerate(targets):
        free = [shape for shape in shapes if (flops, shape[1]) not in taken]
        if not free:
            rule = "leaves too few shapes so small: the vocabulary alone has nearly as many parameters; use more FLOPs"
            raise ConfigError([Violation("model.vocab_size", base.model.vocab_size, rule)])
        shape = _nearest(free, size)
        taken.add((flops, shape[1]))
        runs.append(_plan_run(base, ranks, shape, flops, f"{base.run.name}-{kind}-{index:02d}"))
    return runs


def _budgets(low: float, high: float, count: int) -> list[float]:
    return [low * (high / low) ** (index / max(1, count - 1)) for index in range(count)]


def _ladder_targets(law: Law, budgets: tuple[float, float], num_runs: int) -> Iterator[tuple[float, float]]:
    """Yield (FLOPs, parameters) of each run."""
    for index, flops in enumerate(_budgets(*budgets, num_runs)):
        yield flops, law.optimal(flops).num_params * AROUND_BEST[index % len(AROUND_BEST)]


def _isoflop_targets(law: Law, budgets: tuple[float, float], num_runs: int) -> Iterator[tuple[float, float]]:
    """Yield (FLOPs, parameters): as many budgets as have FEWEST_SIZES sizes, the first ones more if some are left."""
    count = num_runs // FEWEST_SIZES if budgets[0] < budgets[1] else 1
    if count < 2 and budgets[0] < budgets[1]:
        rule = f"must be at least {2 * FEWEST_SIZES}: an IsoFLOP sweep has {FEWEST_SIZES} sizes at each of its budgets"
        raise ConfigError([Violation("--runs", num_runs, rule, (2 * FEWEST_SIZES,))])
    for index, flops in enumerate(_budgets(*budgets, count)):
        sizes = num_runs // count + (index < num_runs % count)
        for place in range(sizes):
            reach = ISOFLOP_REACH ** (2 * place / max(1, sizes - 1) - 1)
            yield flops, law.optimal(flops).num_params * reach


def _shapes(base: ModelConfig, most_params: float) -> Iterator[tuple[ModelConfig, int]]:
    """Yield shapes of the base's family up to twice `most_params`, with their parameters."""
    for hidden, heads in _widths(base.head_width):
        for layers in range(2, 129):
            model = _resized(base, layers, hidden, heads)
            params = num_parameters(model.model_copy(update={"num_layers": 1}))
            params += (num_parameters(model.model_copy(update={"num_layers": 2})) - params) * (layers - 1)
            if params > 2 * most_params:
                break
            if 1 / WIDEST_ASPECT <= hidden / layers / usual_aspect(params) <= WIDEST_ASPECT:
                yield model, params


def _widths(head_width: int) -> Iterator[tuple[int, int]]:
    """Yield (hidden size, heads): whole heads of the base's width, and below eight of them steps of STEP elements."""
    for hidden in range(STEP, 256 * head_width + 1, STEP):
        if hidden % head_width == 0:
            yield hidden, hidden // head_width
        elif hidden < 8 * head_width and hidden % max(STEP, head_width // 4) == 0:
            counts = [count for count in range(1, hidden // 2 + 1) if hidden % (2 * count) == 0]
            yield hidden, min(counts, key=lambda count: abs(math.log(hidden / count / head_width)))


def _resized(base: ModelConfig, layers: int, hidden: int, heads: int) -> ModelConfig:
    """Return the base at another size, its ratio of feed-forward to hidden width and of query to key heads kept."""
    groups = base.num_heads // base.kv_heads
    kv_heads = None if base.num_kv_heads is None else heads // groups if heads % groups == 0 else heads
    inner = max(8, round(hidden * base.ffn_hidden_size / base.hidden_size / 8) * 8)
    sizes = (layers, hidden, heads, kv_heads, inner)
    return base.model_copy(update=dict(zip(SHAPE_KEYS, sizes, strict=True)) | {"head_dim": None})


def _nearest(shapes: list[tuple[ModelConfig, int]], num_params: float) -> tuple[ModelConfig, int]:
    """Return the shape nearest in parameters, and of those nearly as near the one nearest to the usual aspect."""

    def distance(shape: tuple[ModelConfig, int]) -> float:
        model, params = shape
        aspect = model.hidden_size / model.num_layers / usual_aspect(params)
        return abs(math.log(params / num_params)) + ASPECT_WEIGHT * abs(math.log(aspect))

    return min(shapes, key=distance)


def _plan_run(base: RunConfig, ranks: int, shape: tuple[ModelConfig, int], flops: float, name: str) -> LadderRun:
    """Return the run of one shape and budget. Raises ConfigError where no rule-abiding run has so few FLOPs."""
    model, params = shape
    tokens = flops / (6 * params)
    data, seq_len = data_ranks(base, ranks) or 1, base.data.seq_len
    fill = data * base.data.microbatch
    advice = recommend(params - sum(spec.numel for spec in embedding_parameters(model)), tokens, seq_len)
    batch = statistics.median(each.batch_tokens for each in advice.each) / seq_len
    batch = max(1, round(min(batch, tokens / seq_len / ENOUGH_STEPS) / fill)) * fill
    steps = round(tokens / seq_len / batch)
    if steps < FEWEST_STEPS:
        rule = f"gives a run of {params} parameters only {steps} steps of {fill} sequences of {seq_len} tokens"
        raise ConfigError(
            [Violation("--flops", f"{flops:.3g}", rule, (f"{4 * flops * FEWEST_STEPS / max(1, steps):.1e}",))]
        )
    rate = min(MOST_LEARNING_RATE, statistics.median(each.learning_rate for each in advice.each))
    overrides = {
        "run.name": name,
        "run.steps": steps,
        **{f"model.{key}": getattr(model, key) for key in SHAPE_KEYS},
        "data.global_batch": batch,
        "optimizer.lr": float(f"{rate:.3g}"),
        "schedule.warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "telemetry.eval_interval": steps if base.data.validation_fraction else 0,
    }
    config = with_values(base, overrides)
    if broken := check(config, ranks):
        raise ConfigError(broken)
    return LadderRun(config, params, steps * batch * seq_len, overrides)
