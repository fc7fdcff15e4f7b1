"""Random (model, cluster, layout) triples: tiny models of each kind, worlds of up to 64 ranks, any setting of a layout.

Half of them break no rule, and half just one, where a wrong rule shows: others are drawn anew.
"""

from __future__ import annotations

from random import Random

from dist_llm.config.checks import check
from dist_llm.config.run import RunConfig
from tests.parallel.tiny import GPT2, MOE, SIGMOID_MOE, tiny_config

MODELS: tuple[dict[str, object], ...] = ({}, {"tie_embeddings": False}, GPT2, MOE, SIGMOID_MOE)
MOE_DEFAULTS: dict[str, object] = {"num_experts": 4, "top_k": 2, "num_shared": 1}
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "zbv", "dualpipev")
CLUSTERS = ("cpu", "l40s", "h100-sxm")


def draw(random: Random) -> tuple[RunConfig, int]:
    """Return a config and the ranks that it is to run on, legal or not."""
    broken = random.randrange(2)
    while True:
        config, ranks = _any(random)
        if len(check(config, ranks)) == broken:
            return config, ranks


def _any(random: Random) -> tuple[RunConfig, int]:
    parallel = _layout(random)
    ranks = int(str(parallel["tensor"])) * int(str(parallel["pipeline"])) * int(str(parallel["context"]))
    ranks *= random.choice((1, 1, 2, 4)) if random.random() < 0.9 else 1
    if random.random() < 0.05:
        ranks += 1
    data = {
        "seq_len": random.choice((16, 16, 16, 12, 24)),
        "global_batch": random.choice((4, 8, 8, 16, 16, 12)),
        "microbatch": random.choice((1, 1, 2)),
    }
    precision = {"name": random.choice(("fp32", "fp32", "bf16", "fp16", "fp64"))}
    config = tiny_config(parallel, _model(random), data, precision=precision)
    cluster = config.cluster.model_copy(update={"name": random.choice(CLUSTERS)})
    return config.model_copy(update={"cluster": cluster}), ranks


def _model(random: Random) -> dict[str, object]:
    model = {**random.choice(MODELS), "num_layers": random.choice((2, 3, 4, 4, 4)), "max_seq_len": 32}
    if random.random() < 0.3:
        model |= {"num_heads": 6, "hidden_size": 48, "num_kv_heads": random.choice((None, 2, 3))}
    if random.random() < 0.2:
        model["ffn_hidden_size"] = 60
    if "moe" in model and random.random() < 0.3:
        kinds = {"num_dense_layers": random.choice((0, 2, 4)), "ffn_hidden_size": random.choice((None, 20, 30))}
        model |= {"moe": {**MOE_DEFAULTS, **kinds}, "ffn_hidden_size": random.choice((50, 64))}
    if random.random() < 0.1:
        model["attention_dropout"] = 0.1
    if random.random() < 0.1:
        model["mup"] = {"base_width": 16, "base_num_heads": random.choice((None, 2))}
    return model


def _layout(random: Random) -> dict[str, object]:
    pipeline = random.choice((1, 2, 2, 4, 3))
    context = random.choice((1, 1, 2, 4))
    method = random.choice(("ring", "ulysses", "mixed"))
    schedule = random.choice(SCHEDULES)
    chunks = 2 if schedule == "interleaved" and pipeline > 1 else 1
    layout: dict[str, object] = {
        "tensor": random.choice((1, 1, 2, 2, 4, 3)),
        "sequence": random.random() < 0.4,
        "pipeline": pipeline,
        "schedule": schedule,
        "virtual_pipeline": chunks if random.random() < 0.8 else random.choice((1, 2, 3)),
        "context": context,
        "context_method": method,
        "context_heads": random.choice((1, 2)) if method == "mixed" or random.random() < 0.05 else 1,
        "expert": random.choice((1, 1, 1, 2, 4)),
        "zero": random.choice((0, 1, 2, 3)),
        "replicate": random.choice((1, 1, 1, 1, 2)),
        "recompute": random.choice(("none", "none", "full", "selective")),
    }
    return layout | _options(random)


def _options(random: Random) -> dict[str, object]:
    """Return some of the settings that most layouts leave alone."""
    operators = ("core_attn", "norm", "activation", "mlp")
    options: dict[str, object] = {
        "offload": random.choice(("optimizer", "parameters")),
        "recompute_operators": random.choices(operators, k=random.choice((1, 2, 3))),
        "recompute_layers": random.choice((1, 2)),
        "async_tensor": True,
        "compile": True,
        "fused_accumulation": True,
        "unit_blocks": random.choice((2, 3)),
        "prefetch": random.choice((0, 2)),
        "bucket_mib": 1,
    }
    return {name: value for name, value in options.items() if random.random() < 0.2}
