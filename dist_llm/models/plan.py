"""How the transformer may be split, starts and learns: declarations about names, no arithmetic on ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dist_llm.config.model import ModelConfig
from dist_llm.types import Recomputable, RecomputePlan, ShardPlan, Style

SHARD_PLAN: ShardPlan = {
    "embed.tokens": Style.VOCAB,
    "embed.positions": Style.POSITION,
    "layers.*.attention": Style.REGION,
    "layers.*.attention.w[qkv]": Style.COLUMN,
    "layers.*.attention.wo": Style.ROW,
    "layers.*.attention.[qk]_norm": Style.HEADWISE,
    "layers.*.attention_norm": Style.TOKENWISE,
    "layers.*.mlp": Style.REGION,
    "layers.*.mlp.gate": Style.COLUMN,
    "layers.*.mlp.up": Style.COLUMN,
    "layers.*.mlp.down": Style.ROW,
    "layers.*.mlp.router": Style.HEADWISE,
    "layers.*.mlp.experts.gate": Style.EXPERT_COLUMN,
    "layers.*.mlp.experts.up": Style.EXPERT_COLUMN,
    "layers.*.mlp.experts.down": Style.EXPERT_ROW,
    "layers.*.mlp.shared.gate": Style.COLUMN,
    "layers.*.mlp.shared.up": Style.COLUMN,
    "layers.*.mlp.shared.down": Style.PARTIAL_ROW,
    "layers.*.mlp.leave": Style.LEAVE,
    "layers.*.mlp_norm": Style.TOKENWISE,
    "head.norm": Style.TOKENWISE,
    "head.projection": Style.HEAD,
}
"""The Megatron split of the model: two REGIONs a layer, the vocabulary split at both ends."""

RECOMPUTE_PLAN: RecomputePlan = {
    "core_attn": Recomputable("attention", "attend"),
    "norm": Recomputable("*norm", "forward", gives_up=True),
    "activation": Recomputable("mlp*", "activation", gives_up=True),
    "mlp": Recomputable("mlp", "forward"),
}
"""The operators of a block by the names of Megatron-LM's recompute modules."""

TIED_PAIR = ("embed.tokens.weight", "head.projection.weight")
"""The logical name of a tied weight, and where the last stage keeps its copy."""


@dataclass(frozen=True)
class Init:
    """The distribution that a parameter starts from; std in the parameter's own units."""

    kind: Literal["normal", "ones", "zeros"]
    std: float = 0.0


def plan_init(config: ModelConfig, name: str) -> Init:
    """Return how parameter `name` starts: GPT-2's scheme, with residual projections scaled by 1 / sqrt(2 L).

    Under muP a hidden matrix starts smaller by the root of its fan-in over the base model's, a router by all of it.
    """
    module, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return Init("zeros")
    if module.endswith("norm"):
        return Init("ones")
    ratio = _fan_in_ratio(config, module)
    shrunk = config.init_std / (ratio if module.endswith(".router") else math.sqrt(ratio))
    if module.endswith((".wo", ".down")):
        return Init("normal", shrunk / math.sqrt(2 * config.num_layers))
    return Init("normal", shrunk)


def plan_rate(config: ModelConfig, name: str) -> float:
    """Return what the learning rate of parameter `name` is multiplied by (Yang et al. 2022, Table 8, for Adam)."""
    module, _, leaf = name.rpartition(".")
    return 1.0 if leaf == "bias" or module.endswith("norm") else 1.0 / _fan_in_ratio(config, module)


def _fan_in_ratio(config: ModelConfig, module: str) -> float:
    """Return how many times more inputs a matrix has than in the base model.

    1 for embeddings, which have none that grow, and for the output projection: its input is divided instead, so that
    tied and untied weights start and learn alike.
    """
    if module.startswith(("embed.", "head.")):
        return 1.0
    if module.endswith((".experts.down", ".shared.down")):
        return config.expert_ratio
    if module.endswith(".wo"):
        return config.heads_ratio
    return config.ffn_ratio if module.endswith(".down") else config.width_ratio
