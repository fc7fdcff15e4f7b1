"""What engines other than the native one cannot do: rows of the same table, each naming the engines that can.

A row is legal values of one setting under an engine. Where it is broken the setting to change is `engine.name`: its
candidates are the other engines, of which only those remain that break no rule themselves and are installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dist_llm.config.extensions import EXTENSIONS, find_extension
from dist_llm.config.rule import Broken, Rule, reads, value_at
from dist_llm.config.run import RunConfig
from dist_llm.config.wording import shown

ENGINES = ("native", "deepspeed", "megatron")
PACKAGES = {"deepspeed": "deepspeed", "megatron": "megatron-core"}
"""The package in `config/extensions.py` that an engine is made of; ours needs none."""
_OTHERS_CAN = ", not under native or deepspeed"
"""Ends the words of a rule that Megatron-Core alone has."""


@dataclass(frozen=True)
class Limit:
    """Under an engine a setting must be one of `values`, because of `why`.

    unless: what makes the setting mean nothing, so that any value will do; it reads the keys in `reads`.
    """

    engine: str
    key: str
    values: tuple[object, ...]
    why: str
    unless: Callable[[RunConfig], bool] = lambda config: False
    reads: tuple[str, ...] = ()

    def rule(self) -> Rule:
        """Return the rule that the row stands for."""

        def check(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
            value = value_at(config, world_size, self.key)
            if config.engine.name != self.engine or value in self.values or self.unless(config):
                return
            words = f"{self.why}: {self.key}={shown(value)} would have to be {self._listed()}"
            yield Broken("engine.name", words, tuple(name for name in ENGINES if name != self.engine))

        check.__name__ = "_".join([self.engine, *self._setting()])
        check.__doc__ = f"Under `engine={self.engine}`, `{self.key}` is {self._listed()}: it {self.why}."
        return Rule(check, ("engine.name", self.key, *self.reads))

    def _setting(self) -> list[str]:
        """Return the key without its section, or the section where the key is its name."""
        section, *words = self.key.removesuffix(".name").split(".")
        return words or [section]

    def _listed(self) -> str:
        texts = ["null" if value is None else str(shown(value)) for value in self.values]
        return texts[0] if len(texts) == 1 else ", ".join(texts[:-1]) + " or " + texts[-1]


def _no_pipeline(config: RunConfig) -> bool:
    return config.parallel.pipeline == 1


def _no_experts(config: RunConfig) -> bool:
    return config.model.num_expert_layers == 0


def _no_context(config: RunConfig) -> bool:
    return config.parallel.context == 1


_EXPERTS = ("model.num_layers", "model.moe.num_experts", "model.moe.num_dense_layers")

_DEEPSPEED = (
    ("parallel.pipeline", (1,), "runs no pipeline"),
    ("parallel.expert", (1,), "keeps all experts on every rank"),
    ("parallel.zero", (1, 2, 3), "is its ZeRO"),
    ("parallel.replicate", (1,), "spreads shards over all data ranks"),
    ("parallel.compile", (False,), "follows modules with hooks that a graph does not hold"),
    ("parallel.fused_accumulation", (False,), "adds gradients up itself"),
    ("parallel.async_tensor", (False,), "waits for a region's gather"),
    ("precision.name", ("fp32", "bf16", "fp16"), "keeps masters in fp32"),
)

_MEGATRON = (
    ("parallel.zero", (0, 1), "shards optimizer state alone (its distributed optimizer)"),
    ("parallel.replicate", (1,), "spreads shards over all data ranks"),
    ("parallel.offload", ("none",), "keeps all state on the device"),
    ("parallel.compile", (False,), "brings its own fusions"),
    ("parallel.async_tensor", (False,), "waits for a region's gather"),
    ("parallel.recompute", ("none", "full"), "recomputes whole layers here"),
    ("parallel.recompute_layers", (None,), "recomputes every layer or none"),
    ("model.norm_placement", ("pre",), "norms before each half of a layer"),
    ("model.dropout", (0.0,), "draws masks that depend on the layout"),
    ("model.attention_dropout", (0.0,), "draws masks that depend on the layout"),
    ("model.mup.base_width", (None,), "has no muP"),
    ("model.rope.scaling", ("none", "llama3"), "lowers frequencies as Llama 3.1 alone"),
    ("precision.name", ("fp32", "bf16", "fp16"), "keeps masters in fp32"),
)


@reads("engine.name")
def engine_is_installed(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`engine` is `native`, or one whose package is installed: the extra `deepspeed` or `megatron` brings it.

    Another package of that name does not count.
    """
    name = config.engine.name
    if name not in PACKAGES:
        return
    found = find_extension(PACKAGES[name])
    if not found.usable:
        words = f"needs {EXTENSIONS[found.name].title}"
        words += f", but {found.problem}" if found.problem is not None else f": {found.install}"
        yield Broken("engine.name", words, tuple(other for other in ENGINES if other != name))


@reads("engine.name", "engine.offload_to", "engine.nvme_path", "parallel.offload")
def nvme_has_a_folder(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`engine.offload_to: nvme` is under `engine=deepspeed`, with a `parallel.offload` and a folder in `nvme_path`.

    Without `nvme` there is no `engine.nvme_path`, which would silently do nothing.
    """
    engine = config.engine
    if engine.offload_to == "cpu":
        if engine.nvme_path is not None:
            yield Broken("engine.nvme_path", "has no effect under engine.offload_to=cpu", (None,))
        return
    if engine.name != "deepspeed":
        yield Broken("engine.offload_to", f"is for engine=deepspeed, not {engine.name}", ("cpu",))
    if config.parallel.offload == "none":
        yield Broken("engine.offload_to", "has nothing to move under parallel.offload=none", ("cpu",))
    if engine.nvme_path is None:
        yield Broken("engine.nvme_path", "must name a folder under engine.offload_to=nvme", ("/local_nvme",))


@reads("engine.offload_to", "parallel.zero", "parallel.offload")
def nvme_needs_zero_3(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`engine.offload_to: nvme` needs `parallel.zero: 3`: under 1 and 2 DeepSpeed keeps all of it in host memory."""
    parallel = config.parallel
    if config.engine.offload_to == "nvme" and parallel.offload != "none" and parallel.zero != 3:
        yield Broken("engine.offload_to", "needs parallel.zero=3, without which nothing goes to files", ("cpu",))


@reads("engine.name", "engine.offload_to", "parallel.zero", "parallel.offload")
def deepspeed_offloads_whole_shards(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `engine=deepspeed`, `parallel.offload: parameters` needs `parallel.zero: 3`, which shards parameters."""
    parallel = config.parallel
    if config.engine.name == "deepspeed" and parallel.offload == "parameters" and parallel.zero != 3:
        elsewhere = ", not under native" if config.engine.offload_to == "cpu" else ""
        words = f"needs parallel.zero=3 under engine=deepspeed{elsewhere}"
        yield Broken("parallel.offload", words, ("optimizer", "none"))


@reads("engine.name", "parallel.tensor", "parallel.sequence", "model.bias", *_EXPERTS)
def megatron_splits_experts(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `engine=megatron`, a model with experts has `parallel.sequence` with `parallel.tensor`, and no biases."""
    if config.engine.name != "megatron" or _no_experts(config):
        return
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        words = f"must be true with experts under engine=megatron and parallel.tensor above 1{_OTHERS_CAN}"
        yield Broken("parallel.sequence", words, (True,))
    if config.model.bias:
        yield Broken("model.bias", f"must be false with experts under engine=megatron{_OTHERS_CAN}", (False,))


@reads("engine.name", *(f"model.moe.{name}" for name in ("score", "top_k", "normalize", "bias_rate")), *_EXPERTS)
def megatron_weighs_experts(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `engine=megatron`, one chosen expert has its score for a weight, and sigmoid scores are what biases move.

    With `model.moe.top_k` of 1 `model.moe.normalize` is false; sigmoid scores of more are normalised.
    """
    moe = config.model.moe
    if config.engine.name != "megatron" or _no_experts(config):
        return
    if moe.top_k == 1 and moe.normalize:
        yield Broken("model.moe.normalize", f"must be false with top_k=1 under engine=megatron{_OTHERS_CAN}", (False,))
    if moe.top_k > 1 and moe.score == "sigmoid" and not moe.normalize:
        yield Broken(
            "model.moe.normalize", f"must be true of sigmoid scores under engine=megatron{_OTHERS_CAN}", (True,)
        )
    if moe.score == "softmax" and moe.bias_rate:
        yield Broken("model.moe.bias_rate", f"must be 0 with softmax scores under engine=megatron{_OTHERS_CAN}", (0.0,))


@reads("engine.name", "parallel.context", "parallel.recompute", "data.document_mask")
def megatron_recomputes_with_documents(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `engine=megatron`, `data.document_mask` over context ranks is without `parallel.recompute: full`.

    It hands tensors alone to a layer that it runs again, and the documents of a ring are more than that.
    """
    parallel, ours = config.parallel, config.engine.name == "megatron" and config.data.document_mask
    if ours and parallel.context > 1 and parallel.recompute == "full":
        words = f"must be false over context ranks under engine=megatron and parallel.recompute=full{_OTHERS_CAN}"
        yield Broken("data.document_mask", words, (False,))


@reads("engine.name", "engine.fp8", "engine.transformer_engine", "device", "model.norm", "model.bias")
def fp8_is_of_transformer_engine(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """`engine.fp8` is under `engine=megatron` with Transformer Engine's layers.

    These are on CUDA, and their LayerNorm has biases.
    """
    engine, model = config.engine, config.model
    if engine.fp8 == "none":
        return
    if engine.name != "megatron":
        yield Broken("engine.fp8", f"is for engine=megatron, not {engine.name}", ("none",))
        return
    if engine.transformer_engine == "never":
        yield Broken("engine.fp8", "needs engine.transformer_engine=auto", ("none",))
    if config.device == "cpu":
        yield Broken("engine.fp8", "needs CUDA, and device=cpu", ("none",))
    if model.norm == "layernorm" and not model.bias:
        words = "must be true with model.norm=layernorm under engine.fp8: Transformer Engine's LayerNorm has biases"
        yield Broken("model.bias", words, (True,))


@reads("engine.name", "engine.fp8")
def transformer_engine_is_installed(config: RunConfig, world_size: int | None) -> Iterator[Broken]:
    """Under `engine.fp8` Transformer Engine is installed."""
    if config.engine.fp8 != "none" and config.engine.name == "megatron":
        found = find_extension("transformer-engine")
        if not found.usable:
            yield Broken("engine.fp8", f"needs Transformer Engine: {found.problem or found.install}", ("none",))


ENGINE_RULES: tuple[Rule, ...] = (
    engine_is_installed,
    nvme_has_a_folder,
    nvme_needs_zero_3,
    deepspeed_offloads_whole_shards,
    megatron_splits_experts,
    megatron_weighs_experts,
    megatron_recomputes_with_documents,
    fp8_is_of_transformer_engine,
    transformer_engine_is_installed,
    *(Limit("deepspeed", key, values, why).rule() for key, values, why in _DEEPSPEED),
    *(Limit("megatron", key, values, why).rule() for key, values, why in _MEGATRON),
    Limit(
        "megatron",
        "parallel.schedule",
        ("1f1b", "interleaved"),
        "schedules pipelines as 1f1b or interleaved",
        _no_pipeline,
        ("parallel.pipeline",),
    ).rule(),
    Limit("megatron", "model.moe.capacity_factor", (None,), "drops no rows here", _no_experts, _EXPERTS).rule(),
)
"""One rule a row, in the order of the tables."""
