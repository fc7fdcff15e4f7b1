"""Rules across sections, each a named function, and the check that reports every broken one with legal alternatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from dist_llm.config.decode import decode_partly
from dist_llm.config.engine_rules import ENGINE_RULES
from dist_llm.config.extensions import find_extension
from dist_llm.config.legal import fitting_layouts, legal_values
from dist_llm.config.model import MupConfig
from dist_llm.config.rule import RANKS, Broken, Rule, reads, value_at
from dist_llm.config.rules import LATER, LAYOUT_RULES, data_ranks, divisors, multiples
from dist_llm.config.run import RunConfig
from dist_llm.config.wording import shown
from dist_llm.errors import ConfigError, LayoutError, Violation


@reads("model.hidden_size", "model.num_heads", "model.head_dim")
def heads_divide_hidden(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.num_heads` divides `model.hidden_size`, unless `model.head_dim` is given."""
    model = config.model
    if model.head_dim is None and model.hidden_size % model.num_heads:
        words = f"must divide model.hidden_size={model.hidden_size} (or set model.head_dim)"
        yield Broken("model.num_heads", words, divisors(model.hidden_size))


@reads("model.num_heads", "model.num_kv_heads")
def kv_heads_divide_heads(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.num_kv_heads` divides `model.num_heads`: every key-value head serves equally many query heads."""
    model = config.model
    if model.num_heads % model.kv_heads:
        words = f"must divide model.num_heads={model.num_heads}"
        yield Broken("model.num_kv_heads", words, divisors(model.num_heads))


@reads("model.position", "model.hidden_size", "model.num_heads", "model.head_dim")
def rotary_heads_are_even(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `model.position=rope` the width of a head is even: it is turned in pairs of features."""
    model = config.model
    if model.position != "rope" or model.head_width % 2 == 0:
        return
    if model.head_dim is not None:
        yield Broken("model.head_dim", "must be even under model.position=rope", multiples(2, model.head_dim))
    elif model.hidden_size % model.num_heads == 0:
        words = f"makes heads of odd width {model.head_width} under model.position=rope"
        yield Broken("model.num_heads", words, divisors(model.hidden_size))


@reads("model.moe.top_k", "model.moe.num_experts")
def choices_fit_experts(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.moe.top_k` is at most `model.moe.num_experts`."""
    moe = config.model.moe
    if moe.num_experts and moe.top_k > moe.num_experts:
        near = tuple(range(1, min(moe.num_experts, 64) + 1))
        yield Broken("model.moe.top_k", f"must not exceed model.moe.num_experts={moe.num_experts}", near)


_MUP_DEFAULTS = MupConfig().model_dump()


@reads(*(f"model.mup.{name}" for name in _MUP_DEFAULTS))
def mup_needs_base_width(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Other settings of `model.mup` keep their defaults without `model.mup.base_width`, which turns muP on."""
    mup = config.model.mup
    if mup.base_width is None:
        for name, default in _MUP_DEFAULTS.items():
            if getattr(mup, name) != default:
                yield Broken(f"model.mup.{name}", "needs model.mup.base_width, which turns muP on", (default,))


@reads(
    *(f"model.mup.{name}" for name in ("base_width", "base_head_width", "base_num_heads")),
    *(f"model.{name}" for name in ("hidden_size", "num_heads", "head_dim")),
)
def base_heads_divide_base_width(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.mup.base_head_width` divides `model.mup.base_width`, unless heads are of their own width.

    The base model has whole heads, as wide as this model's unless `model.mup.base_head_width` says otherwise. With
    `model.head_dim`, or `model.mup.base_num_heads`, they need not add up to the hidden size.
    """
    model, mup = config.model, config.model.mup
    own = model.head_dim is not None or mup.base_num_heads is not None
    if mup.base_width is None or own or model.hidden_size % model.num_heads:
        return
    if mup.base_width % (mup.base_head_width or model.head_width):
        as_here = f"means heads of {model.head_width}, as here; their width " if mup.base_head_width is None else ""
        words = f"{as_here}must divide model.mup.base_width={mup.base_width}"
        as_many = (mup.base_width // model.num_heads,) if mup.base_width % model.num_heads == 0 else ()
        yield Broken("model.mup.base_head_width", words, as_many or divisors(mup.base_width))


@reads("model.max_seq_len", "data.seq_len")
def sequence_fits_positions(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`data.seq_len` is at most `model.max_seq_len`."""
    longest = config.model.max_seq_len
    if config.data.seq_len > longest:
        yield Broken("data.seq_len", f"must not exceed model.max_seq_len={longest}", (longest, *multiples(8, longest)))


@reads("model.position", "model.rope.scaling")
def scaling_needs_rope(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.rope.scaling` is `none` unless `model.position` is `rope`."""
    if config.model.position != "rope" and config.model.rope.scaling != "none":
        yield Broken("model.rope.scaling", f"needs model.position=rope, not {config.model.position}", ("none",))


@reads("model.rope.scaling", "model.rope.factor")
def factor_needs_scaling(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`model.rope.factor` is 1 without `model.rope.scaling`, where it would silently do nothing."""
    if config.model.rope.scaling == "none" and config.model.rope.factor != 1:
        yield Broken("model.rope.factor", "has no effect under model.rope.scaling=none", (1,))


@reads(
    "model.rope.scaling",
    "model.rope.low_freq_factor",
    "model.rope.high_freq_factor",
    "model.rope.beta_fast",
    "model.rope.beta_slow",
)
def rope_bands_are_ordered(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """The slow end of a scaled band lies below its fast end.

    `model.rope.low_freq_factor` < `high_freq_factor` under `llama3`, `beta_slow` < `beta_fast` under `yarn`.
    """
    rope = config.model.rope
    if rope.scaling == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
        words = f"must be below model.rope.high_freq_factor={rope.high_freq_factor}"
        yield Broken("model.rope.low_freq_factor", words, (rope.high_freq_factor / 4,))
    if rope.scaling == "yarn" and rope.beta_slow >= rope.beta_fast:
        words = f"must be below model.rope.beta_fast={rope.beta_fast}"
        yield Broken("model.rope.beta_slow", words, (rope.beta_fast / 32,))


@reads("schedule.name", "schedule.warmup_steps", "schedule.decay_steps", "run.steps")
def decay_ends_within_run(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `schedule.name=wsd`, warm-up and decay (`schedule.decay_steps`) together fit into `run.steps`."""
    schedule, steps = config.schedule, config.run.steps
    room = steps - schedule.warmup_steps
    if schedule.name == "wsd" and schedule.decay_steps is not None and steps > 0 and 0 <= room < schedule.decay_steps:
        words = f"+ schedule.warmup_steps={schedule.warmup_steps} must not exceed run.steps={steps}"
        yield Broken("schedule.decay_steps", words, (room,) if room else ())


@reads("telemetry.eval_interval", "data.validation_fraction")
def evaluation_has_data(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`telemetry.eval_interval` above 0 needs `data.validation_fraction` above 0: a part of the corpus held out."""
    if config.telemetry.eval_interval and not config.data.validation_fraction:
        words = "needs data.validation_fraction above 0, such as 0.01"
        yield Broken("telemetry.eval_interval", words, (0,))


@reads("telemetry.wandb")
def wandb_is_installed(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`telemetry.wandb` needs the extra: `pip install 'dist-llm[wandb]'`."""
    if config.telemetry.wandb and not find_extension("wandb").usable:
        yield Broken("telemetry.wandb", "needs the extra: pip install 'dist-llm[wandb]'", (False,))


@reads("precision.name", "device")
def double_precision_is_on_cpu(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`precision=fp64` is the reference that layouts are verified in, on CPU: `device` is `auto` or `cpu`."""
    if config.precision.name == "fp64" and config.device == "cuda":
        yield Broken("precision.name", "is for verification on device=cpu", ("fp32", "bf16", "fp16"))


@reads("launcher.name")
def launcher_is_built(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`launcher` is `local` or `slurm`; others come later. `torchrun -m dist_llm train` starts ranks too."""
    if config.launcher.name not in ("local", "slurm"):
        yield Broken("launcher.name", f"{LATER}; start ranks with torchrun -m dist_llm train", ("local", "slurm"))


@reads("launcher.name", "launcher.nodes")
def local_launcher_has_one_node(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`launcher.nodes` is 1 under `launcher=local`, which starts ranks on this node."""
    if config.launcher.name == "local" and config.launcher.nodes > 1:
        yield Broken("launcher.nodes", "must be 1 under launcher=local, which starts ranks on this node", (1,))


@reads("checkpoint.asynchronous")
def asynchronous_save_is_built(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`checkpoint.asynchronous` is false: saving beside the training steps comes later."""
    if config.checkpoint.asynchronous:
        yield Broken("checkpoint.asynchronous", LATER, (False,))


SECTION_RULES: tuple[Rule, ...] = (
    heads_divide_hidden,
    kv_heads_divide_heads,
    rotary_heads_are_even,
    choices_fit_experts,
    mup_needs_base_width,
    base_heads_divide_base_width,
    sequence_fits_positions,
    scaling_needs_rope,
    factor_needs_scaling,
    rope_bands_are_ordered,
    decay_ends_within_run,
    evaluation_has_data,
    wandb_is_installed,
    double_precision_is_on_cpu,
    launcher_is_built,
    local_launcher_has_one_node,
    asynchronous_save_is_built,
)

RULES: tuple[Rule, ...] = (*LAYOUT_RULES, *ENGINE_RULES, *SECTION_RULES)

OF_THIS_MACHINE = frozenset(
    {
        "launcher_is_built",
        "local_launcher_has_one_node",
        "engine_is_installed",
        "transformer_engine_is_installed",
        "wandb_is_installed",
    }
)
"""Rules that say what can run here and now, which no prediction and no plan asks."""


def check(config: RunConfig, world_size: int | None, unusable: frozenset[str] = frozenset()) -> list[Violation]:
    """Return every broken rule with the nearest values that break none. world_size None: not known yet.

    Rules that read an `unusable` key (see `decode_partly`) are skipped.
    """
    return violations_of([rule for rule in RULES if not rule.touches(unusable)], config, world_size)


def violations_of(rules: Sequence[Rule], config: RunConfig, world_size: int | None) -> list[Violation]:
    """Return how the config breaks these rules, with the nearest values that break none of them."""
    broken = [(rule, slip) for rule in rules for slip in rule(config, world_size)]
    return [
        Violation(
            slip.key,
            shown(value_at(config, world_size, slip.key)),
            slip.words,
            legal_values(slip, rule, rules, config, world_size),
        )
        for rule, slip in broken
    ]


def decode_and_check(
    tree: Mapping[str, object],
    world_size: int | None,
    earlier: Sequence[Violation] = (),
    unusable: frozenset[str] = frozenset(),
) -> RunConfig:
    """Return the config in `tree` if it can run on `world_size` ranks (None: not known yet).

    Raises ConfigError with `earlier` violations, those of single settings and those across settings, all at once;
    LayoutError when the number of ranks is all that is wrong. Rules that read an `unusable` key are skipped.
    """
    decoded = decode_partly(tree)
    bad = decoded.unusable | unusable
    violations = [*earlier, *decoded.violations, *check(decoded.config, world_size, bad)]
    if not violations:
        return decoded.config
    if any(violation.key != RANKS for violation in violations):
        raise ConfigError(violations)
    raise _layout_error(violations, decoded.config, world_size)


def resolve_data(config: RunConfig, world_size: int) -> int:
    """Return the size of the data axis on `world_size` ranks. Raises LayoutError naming counts of ranks that fit."""
    violations = [violation for violation in check(config, world_size) if violation.key == RANKS]
    if violations:
        raise _layout_error(violations, config, world_size)
    data = data_ranks(config, world_size)
    assert data is not None
    return data


def _layout_error(violations: list[Violation], config: RunConfig, world_size: int | None) -> LayoutError:
    """Return the error of a wrong number of ranks, with the layouts that would fit it."""
    error = LayoutError(violations)
    fits = fitting_layouts(config, world_size, RULES) if world_size is not None else []
    if fits:
        error.add_note(f"layouts that fit {world_size} rank{'s' if world_size != 1 else ''}: " + "; ".join(fits))
    return error
