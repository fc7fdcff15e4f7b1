"""A ladder of small runs to fit a law to: budgets from low to high, sizes on either side of the best.

    ladder    one run a budget, N = N*(C) times 1, 1/2, 2, 1/1.4, 1.4 in turn: exponents of N and D come apart
    IsoFLOP   a few budgets, at each sizes from N*(C) / 3 to 3 N*(C)                (Hoffmann et al. 2022, approach 2)

Every run has the base config's family, vocabulary, heads' width, data and layout; its learning rate is the median of
the published batch laws, and all of them end their decay, for a loss before that is no point of a law. All are
evaluated on the same sequences, enough of them for their losses to differ by what the models differ.
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
FEWEST_DISTINCT = 3
"""Sizes without which nothing is said of how loss falls with size."""

FEWEST_SIZES = 5
"""Sizes at each budget of an IsoFLOP sweep."""
MOST_LEARNING_RATE = 4e-3
"""The laws were fitted above 50M parameters; below, they ask for more than small models bear: 0.5M in 4,000 steps of
1,024 tokens end 7 % above 0.004 with 0.01, and 0.2M with as much as 2 % between two seeds."""
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
DEPTHS = range(2, 129)
EVAL_TOKENS = 2**18
"""Least tokens that a run is evaluated on. Of 4096 the loss depends on which text they are by several per cent."""
KEEPABLE = ("model.num_layers", "data.global_batch", "optimizer.lr", "telemetry.eval_batches")
"""What all runs share where the user sets it, and each has its own of else."""
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


@dataclass(frozen=True)
class LadderBase:
    """What a ladder starts from: a config, on so many ranks, and which of KEEPABLE all its runs share."""

    config: RunConfig
    ranks: int
    kept: frozenset[str] = frozenset()


def plan_ladder(
    base: LadderBase, law: Law, budgets: tuple[float, float], num_runs: int, isoflop: bool = False
) -> list[LadderRun]:
    """Return runs from the least to the greatest of `budgets` (FLOPs). Raises ConfigError where a budget has no run."""
    targets = list(_isoflop_targets(law, budgets, num_runs) if isoflop else _ladder_targets(law, budgets, num_runs))
    model, name = base.config.model, base.config.run.name
    depths = range(model.num_layers, model.num_layers + 1) if "model.num_layers" in base.kept else DEPTHS
    shapes = list(_shapes(model, max(size for _, size in targets), depths))
    kind = "isoflop" if isoflop else "ladder"
    taken: set[tuple[float, int]] = set()
    runs = []
    for index, (flops, size) in enumerate(targets):
        free = [shape for shape in shapes if (flops, shape[1]) not in taken]
        if not free:
            raise _too_few_shapes(base)
        shape = _nearest(free, size)
        taken.add((flops, shape[1]))
        runs.append(_plan_run(base, shape, flops, f"{name}-{kind}-{index:02d}"))
    sizes = sorted({run.num_params for run in runs})
    if len(sizes) < min(FEWEST_DISTINCT, 1 + num_runs // 2):
        raise _few_sizes(law, budgets, sizes)
    return runs


def _few_sizes(law: Law, budgets: tuple[float, float], sizes: list[int]) -> ConfigError:
    """Return the error of budgets for which most runs are of the smallest shape, or the largest, with ones that do."""
    wanted = law.optimal(budgets[0]).num_params
    beyond = "larger" if wanted > sizes[-1] else "smaller"
    which = " and ".join(f"{size:,}" for size in sizes)
    rule = f"makes all runs of {which} parameters, as no shape is {beyond}, and shows too little of how loss falls"
    if beyond == "larger":
        times = (sizes[-1] / 4 / law.optimal(budgets[1]).num_params) ** 2
    else:
        times = max(2.0, (2 * sizes[0] / wanted) ** 2)
    other = ":".join(f"{budget * times:.1e}" for budget in budgets)
    return ConfigError([Violation("--flops", f"{budgets[0]:g}:{budgets[1]:g}", rule, (other,))])


def _too_few_shapes(base: LadderBase) -> ConfigError:
    """Return the error of budgets for which no shape is small enough."""
    model = base.config.model
    if "model.num_layers" in base.kept:
        rule = "leaves too few shapes so small; use fewer layers or more FLOPs"
        return ConfigError([Violation("model.num_layers", model.num_layers, rule)])
    rule = "leaves too few shapes so small: the vocabulary alone has nearly as many parameters; use more FLOPs"
    return ConfigError([Violation("model.vocab_size", model.vocab_size, rule)])


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


def _shapes(base: ModelConfig, most_params: float, depths: range) -> Iterator[tuple[ModelConfig, int]]:
    """Yield shapes of the base's family up to twice `most_params`, with their parameters; of one depth, all widths."""
    for hidden, heads in _widths(base.head_width):
        for layers in depths:
            model = _resized(base, layers, hidden, heads)
            params = num_parameters(model.model_copy(update={"num_layers": 1}))
            params += (num_parameters(model.model_copy(update={"num_layers": 2})) - params) * (layers - 1)
            if params > 2 * most_params:
                break
            if len(depths) == 1 or 1 / WIDEST_ASPECT <= hidden / layers / usual_aspect(params) <= WIDEST_ASPECT:
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


def _plan_run(base: LadderBase, shape: tuple[ModelConfig, int], flops: float, name: str) -> LadderRun:
    """Return the run of one shape and budget. Raises ConfigError where no rule-abiding run has so few FLOPs."""
    model, params = shape
    config, seq_len, tokens = base.config, base.config.data.seq_len, flops / (6 * params)
    advice = recommend(params - sum(spec.numel for spec in embedding_parameters(model)), tokens, seq_len)
    batch = _batch(base, statistics.median(each.batch_tokens for each in advice.each), tokens)
    steps = round(tokens / seq_len / batch)
    if steps < FEWEST_STEPS:
        rule = f"gives a run of {params} parameters only {steps} steps of {batch} sequences of {seq_len} tokens"
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
        "telemetry.eval_interval": steps if config.data.validation_fraction else 0,
        "telemetry.eval_batches": math.ceil(EVAL_TOKENS / (batch * seq_len)),
    }
    overrides = {key: value for key, value in overrides.items() if key not in base.kept}
    run = with_values(config, overrides)
    if broken := check(run, base.ranks):
        raise ConfigError(broken)
    return LadderRun(run, params, steps * batch * seq_len, overrides)


def _batch(base: LadderBase, advised: float, tokens: float) -> int:
    """Return the sequences of a step: those kept, or what fills all data ranks and is nearest to `advised` tokens."""
    data = base.config.data
    if "data.global_batch" in base.kept:
        return data.global_batch
    fill = (data_ranks(base.config, base.ranks) or 1) * data.microbatch
    return max(1, round(min(advised, tokens / ENOUGH_STEPS) / data.seq_len / fill)) * fill
