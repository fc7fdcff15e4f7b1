"""The layouts and model variants that `verify layout` compares with one process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dist_llm.config.model import ModelConfig
from dist_llm.config.parallel import ParallelConfig
from dist_llm.config.run import RunConfig
from dist_llm.config.training import PrecisionConfig

_DEFAULTS = ParallelConfig().model_dump()


@dataclass(frozen=True)
class Case:
    """A model variant on a layout: `ranks` ranks, `accumulation` microbatches in each rank's share of a batch.

    quick: one of the few that tell most.
    """

    variant: str
    parallel: Mapping[str, object]
    ranks: int
    accumulation: int
    quick: bool = False

    @property
    def settings(self) -> dict[str, object]:
        """All settings of `parallel`, those of the layout and the others as they are then."""
        return {**_DEFAULTS, "data": 1, **self.parallel}

    @property
    def name(self) -> str:
        """A short unique name, axes in the field's words."""
        axes = [f"{key}={value}" for key, value in self.parallel.items()]
        return " ".join([self.variant, f"ranks={self.ranks}", *axes, f"accumulation={self.accumulation}"])

    def is_like(self, other: Case) -> bool:
        """Say whether both are the same training, however they spell it."""
        mine, theirs = ((case.variant, case.ranks, case.accumulation, case.settings) for case in (self, other))
        return mine == theirs


def case(variant: str, ranks: int, accumulation: int, **parallel: object) -> Case:
    """Return a case of the settings of `parallel`."""
    return Case(variant, parallel, ranks, accumulation)


def quick_case(variant: str, ranks: int, accumulation: int, **parallel: object) -> Case:
    """Return a case that is one of those that tell most."""
    return Case(variant, parallel, ranks, accumulation, quick=True)


def staged_case(variant: str, ranks: int, schedule: str, chunks: int, **parallel: object) -> Case:
    """Return a case of two pipeline ranks and four microbatches."""
    stages = {"pipeline": 2, "schedule": schedule, "virtual_pipeline": chunks}
    return Case(
        variant, {**{key: value for key, value in stages.items() if value != _DEFAULTS[key]}, **parallel}, ranks, 4
    )


MOST_RANKS = 16
"""The largest layout that is tried: each rank is a process of this machine."""

_EXPERTS: dict[str, object] = {"num_experts": 4, "top_k": 2, "num_shared": 1, "num_dense_layers": 1}
_ROUTING: dict[str, dict[str, object]] = {
    "experts": {"balance_loss": 0.01, "z_loss": 0.001, "bias_rate": 0.001},
    "experts-sigmoid": {"score": "sigmoid", "scale": 2.0, "bias_rate": 0.01},
}


def variant_model(model: ModelConfig, variant: str) -> ModelConfig:
    """Return the model of a variant: the given one, or it with tying, vocabulary or family changed."""
    changes: dict[str, object] = {}
    if variant == "odd-vocabulary":
        changes["vocab_size"] = model.vocab_size + 1 + model.vocab_size % 2
    if variant in ("untied", "gpt2-untied"):
        changes["tie_embeddings"] = False
    if variant in _ROUTING:
        changes["moe"] = {**_EXPERTS, **_ROUTING[variant]}
    if variant in ("gpt2", "gpt2-untied"):
        changes.update(family="gpt2", position="learned", norm="layernorm", activation="gelu", bias=True)
        changes.update(num_kv_heads=None, qk_norm=False, dropout=0.1, tie_embeddings=variant == "gpt2")
    return ModelConfig.model_validate({**model.model_dump(), **changes})


def misfit(config: RunConfig, case: Case) -> str | None:
    """Return why one machine cannot try the case, or its global batch not be cut as the case wants it; or None."""
    if case.ranks > MOST_RANKS:
        return f"it takes {case.ranks} ranks, and one machine tries layouts of at most {MOST_RANKS}"
    data = int(str(case.parallel.get("data", 1)))
    pieces, batch = data * case.accumulation, config.data.global_batch
    if batch % pieces == 0:
        return None
    rule = f"must be a multiple of {pieces} for {case.accumulation} microbatches on each of {data} data-parallel ranks"
    return f"data.global_batch={batch} {rule}; use {-(-batch // pieces) * pieces}"


def is_mixed(precision: str) -> bool:
    """Return whether activations have a narrower format than weights."""
    formats = PrecisionConfig.model_validate({"name": precision})
    return formats.compute != formats.master


def case_config(config: RunConfig, case: Case, precision: str) -> RunConfig:
    """Return the run of a case that fits: the given one with the variant's model, the case's layout and microbatch."""
    tree = config.model_dump()
    data = int(str(case.parallel.get("data", 1)))
    tree["model"] = variant_model(config.model, case.variant).model_dump()
    tree["model"]["attention_dropout"] = 0.0
    tree["model"]["moe"]["capacity_factor"] = None
    tree["parallel"] = {"zero": 1, **case.parallel, "data": data}
    if not is_mixed(precision):
        tree["parallel"]["fused_accumulation"] = False
    tree["data"]["microbatch"] = config.data.global_batch // (data * case.accumulation)
    tree["precision"] = {"name": precision}
    tree["engine"]["fp8"] = "none"
    tree["launcher"]["nproc"] = case.ranks
    return RunConfig.model_validate(tree)


def ranks_for(config: RunConfig) -> int:
    """Return the ranks that the launcher starts, or, where they are too few for the layout, the fewest it can have."""
    parallel = config.parallel
    fewest = parallel.model_ranks * (parallel.data or parallel.replicate)
    return max(config.launcher.nproc * config.launcher.nodes, fewest)


def given(config: RunConfig) -> Case:
    """Return the case of the layout that the run itself asks for, all its settings kept."""
    parallel = {key: value for key, value in config.parallel.model_dump().items() if value != _DEFAULTS[key]}
    ranks = ranks_for(config)
    data = ranks // config.parallel.model_ranks
    accumulation = max(1, config.data.global_batch // (data * config.data.microbatch))
    return Case("as-given", {**parallel, "zero": config.parallel.zero, "data": data}, ranks, accumulation)


def baseline(variant: str) -> Case:
    """Return the one-process case of a variant: the whole batch at once."""
    return Case(variant, {}, 1, 1)
