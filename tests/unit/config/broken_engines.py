"""A broken config for every rule about engines, as in broken.py; both other engines are taken to be installed here.

But under `engine_is_installed`, where neither is.
"""

from __future__ import annotations

_DEEPSPEED: dict[str, object] = {"engine__name": "deepspeed"}
_MEGATRON: dict[str, object] = {"engine__name": "megatron"}
_ASYNC = {"parallel__tensor": 2, "parallel__sequence": True, "parallel__async_tensor": True}

_LIMITS: list[tuple[str, dict[str, object], int | None, str]] = [
    ("deepspeed_pipeline", {"parallel__pipeline": 2}, None, "runs no pipeline: parallel.pipeline=2 would have to be 1"),
    (
        "deepspeed_expert",
        {"parallel__expert": 2, "model__moe__num_experts": 4},
        2,
        "keeps all experts on every rank: parallel.expert=2 would have to be 1",
    ),
    ("deepspeed_zero", {"parallel__zero": 0}, None, "is its ZeRO: parallel.zero=0 would have to be 1, 2 or 3"),
    (
        "deepspeed_replicate",
        {"parallel__replicate": 2},
        4,
        "spreads shards over all data ranks: parallel.replicate=2 would have to be 1",
    ),
    (
        "deepspeed_compile",
        {"parallel__compile": True},
        None,
        "follows modules with hooks that a graph does not hold: parallel.compile=true would have to be false",
    ),
    (
        "deepspeed_fused_accumulation",
        {"parallel__fused_accumulation": True, "precision__name": "bf16"},
        None,
        "adds gradients up itself: parallel.fused_accumulation=true would have to be false",
    ),
    (
        "deepspeed_async_tensor",
        {**_ASYNC},
        None,
        "waits for a region's gather: parallel.async_tensor=true would have to be false",
    ),
    (
        "deepspeed_precision",
        {"precision__name": "fp64"},
        None,
        "keeps masters in fp32: precision.name=fp64 would have to be fp32, bf16 or fp16",
    ),
    (
        "megatron_zero",
        {"parallel__zero": 3},
        None,
        "shards optimizer state alone (its distributed optimizer): parallel.zero=3 would have to be 0 or 1",
    ),
    (
        "megatron_replicate",
        {"parallel__replicate": 2},
        4,
        "spreads shards over all data ranks: parallel.replicate=2 would have to be 1",
    ),
    (
        "megatron_offload",
        {"parallel__offload": "optimizer"},
        None,
        "keeps all state on the device: parallel.offload=optimizer would have to be none",
    ),
    (
        "megatron_compile",
        {"parallel__compile": True},
        None,
        "brings its own fusions: parallel.compile=true would have to be false",
    ),
    (
        "megatron_async_tensor",
        {**_ASYNC},
        None,
        "waits for a region's gather: parallel.async_tensor=true would have to be false",
    ),
    (
        "megatron_recompute",
        {"parallel__recompute": "selective"},
        None,
        "recomputes whole layers here: parallel.recompute=selective would have to be none or full",
    ),
    (
        "megatron_recompute_layers",
        {"parallel__recompute": "full", "parallel__recompute_layers": 2},
        None,
        "recomputes every layer or none: parallel.recompute_layers=2 would have to be null",
    ),
    (
        "megatron_norm_placement",
        {"model__norm_placement": "post"},
        None,
        "norms before each half of a layer: model.norm_placement=post would have to be pre",
    ),
    (
        "megatron_dropout",
        {"model__dropout": 0.1},
        None,
        "draws masks that depend on the layout: model.dropout=0.1 would have to be 0.0",
    ),
    (
        "megatron_attention_dropout",
        {"model__attention_dropout": 0.1},
        None,
        "draws masks that depend on the layout: model.attention_dropout=0.1 would have to be 0.0",
    ),
    (
        "megatron_mup_base_width",
        {"model__mup__base_width": 32},
        None,
        "has no muP: model.mup.base_width=32 would have to be null",
    ),
    (
        "megatron_rope_scaling",
        {"model__rope__scaling": "yarn", "model__rope__factor": 4.0},
        None,
        "lowers frequencies as Llama 3.1 alone: model.rope.scaling=yarn would have to be none or llama3",
    ),
    (
        "megatron_precision",
        {"precision__name": "fp64"},
        None,
        "keeps masters in fp32: precision.name=fp64 would have to be fp32, bf16 or fp16",
    ),
    (
        "megatron_schedule",
        {"parallel__pipeline": 2, "parallel__schedule": "zero_bubble"},
        None,
        "schedules pipelines as 1f1b or interleaved: parallel.schedule=zero_bubble would have to be 1f1b or "
        "interleaved",
    ),
    (
        "megatron_moe_capacity_factor",
        {"model__moe__num_experts": 4, "model__moe__capacity_factor": 1.5},
        None,
        "drops no rows here: model.moe.capacity_factor=1.5 would have to be null",
    ),
]

ALONE = {
    f"{engine}_{setting}"
    for engine in ("deepspeed", "megatron")
    for setting in ("replicate", "compile", "async_tensor", "precision")
} | {"megatron_schedule"}
"""What the native engine alone can do; the other rows name two engines."""


def _limits() -> list[tuple[str, dict[str, object], int | None, str]]:
    """Return the broken rows of the table, each under its engine and with the engines that can do it."""
    cases = []
    for name, changes, ranks, words in _LIMITS:
        engine = name.partition("_")[0]
        others = "native" if name in ALONE else "native or " + {"deepspeed": "megatron"}.get(engine, "deepspeed")
        message = f"engine.name={engine} {words}; use {others}"
        cases.append((name, {"engine__name": engine, **changes}, ranks, message))
    return cases


BROKEN_ENGINES: list[tuple[str, dict[str, object], int | None, str]] = [
    (
        "engine_is_installed",
        {**_DEEPSPEED},
        None,
        "engine.name=deepspeed needs DeepSpeed: pip install 'dist-llm[deepspeed]'; use native",
    ),
    (
        "engine_is_installed",
        {**_MEGATRON},
        None,
        "engine.name=megatron needs Megatron-Core: pip install 'dist-llm[megatron]'; use native",
    ),
    (
        "nvme_has_a_folder",
        {"engine__nvme_path": "fast"},
        None,
        "engine.nvme_path=fast has no effect under engine.offload_to=cpu; use null",
    ),
    (
        "nvme_has_a_folder",
        {"engine__offload_to": "nvme", "engine__nvme_path": "fast", "parallel__offload": "optimizer"},
        None,
        "engine.offload_to=nvme is for engine=deepspeed, not native",
    ),
    (
        "nvme_has_a_folder",
        {**_DEEPSPEED, "engine__offload_to": "nvme", "engine__nvme_path": "fast"},
        None,
        "engine.offload_to=nvme has nothing to move under parallel.offload=none",
    ),
    (
        "nvme_has_a_folder",
        {**_DEEPSPEED, "engine__offload_to": "nvme", "parallel__offload": "optimizer"},
        None,
        "engine.nvme_path=unset must name a folder under engine.offload_to=nvme; use /local_nvme",
    ),
    (
        "deepspeed_offloads_whole_shards",
        {**_DEEPSPEED, "parallel__offload": "parameters", "parallel__zero": 2},
        None,
        "parallel.offload=parameters needs parallel.zero=3 under engine=deepspeed, not under native; "
        "use optimizer or none",
    ),
    (
        "nvme_needs_zero_3",
        {
            **_DEEPSPEED,
            "engine__offload_to": "nvme",
            "engine__nvme_path": "fast",
            "parallel__offload": "optimizer",
            "parallel__zero": 2,
        },
        None,
        "engine.offload_to=nvme needs parallel.zero=3, without which nothing goes to files",
    ),
    (
        "megatron_splits_experts",
        {**_MEGATRON, "model__moe__num_experts": 4, "parallel__tensor": 2},
        None,
        "parallel.sequence=false must be true with experts under engine=megatron and parallel.tensor above 1, "
        "not under native or deepspeed; use true",
    ),
    (
        "megatron_splits_experts",
        {**_MEGATRON, "model__moe__num_experts": 4, "model__bias": True},
        None,
        "model.bias=true must be false with experts under engine=megatron, not under native or deepspeed; use false",
    ),
    (
        "megatron_weighs_experts",
        {**_MEGATRON, "model__moe__num_experts": 4, "model__moe__top_k": 1},
        None,
        "model.moe.normalize=true must be false with top_k=1 under engine=megatron, "
        "not under native or deepspeed; use false",
    ),
    (
        "megatron_weighs_experts",
        {
            **_MEGATRON,
            "model__moe__num_experts": 4,
            "model__moe__score": "sigmoid",
            "model__moe__normalize": False,
        },
        None,
        "model.moe.normalize=false must be true of sigmoid scores under engine=megatron, "
        "not under native or deepspeed; use true",
    ),
    (
        "megatron_weighs_experts",
        {**_MEGATRON, "model__moe__num_experts": 4, "model__moe__bias_rate": 0.1},
        None,
        "model.moe.bias_rate=0.1 must be 0 with softmax scores under engine=megatron, "
        "not under native or deepspeed; use 0.0",
    ),
    (
        "megatron_recomputes_with_documents",
        {**_MEGATRON, "data__document_mask": True, "parallel__context": 2, "parallel__recompute": "full"},
        2,
        "data.document_mask=true must be false over context ranks under engine=megatron and parallel.recompute=full, "
        "not under native or deepspeed; "
        "use false",
    ),
    (
        "fp8_is_of_transformer_engine",
        {"engine__fp8": "hybrid"},
        None,
        "engine.fp8=hybrid is for engine=megatron, not native; use none",
    ),
    (
        "fp8_is_of_transformer_engine",
        {**_MEGATRON, "engine__fp8": "e4m3", "engine__transformer_engine": "never"},
        None,
        "engine.fp8=e4m3 needs engine.transformer_engine=auto; use none",
    ),
    (
        "fp8_is_of_transformer_engine",
        {**_MEGATRON, "engine__fp8": "e4m3", "device": "cpu"},
        None,
        "engine.fp8=e4m3 needs CUDA, and device=cpu; use none",
    ),
    (
        "fp8_is_of_transformer_engine",
        {**_MEGATRON, "engine__fp8": "e4m3", "model__norm": "layernorm", "model__bias": False},
        None,
        "model.bias=false must be true with model.norm=layernorm under engine.fp8: Transformer Engine's LayerNorm has "
        "biases; use true",
    ),
    (
        "transformer_engine_is_installed",
        {**_MEGATRON, "engine__fp8": "hybrid"},
        None,
        "engine.fp8=hybrid needs Transformer Engine: pip install --no-build-isolation 'transformer-engine[pytorch]'; "
        "use none",
    ),
    *_limits(),
]
