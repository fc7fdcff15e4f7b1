"""muP: how each kind of parameter starts and learns, and what is multiplied, against Yang et al. 2022, Table 8."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dist_llm.accounting.params import list_parameters
from dist_llm.config.model import ModelConfig
from dist_llm.models.attention import Attention
from dist_llm.models.plan import plan_init, plan_rate
from dist_llm.models.transformer import Transformer
from tests.parallel.tiny import GPT2, LLAMA, MOE

L = math.sqrt(2 * 4)
TABLE: dict[str, tuple[float, float]] = {
    "embed.tokens": (1, 1),
    "embed.positions": (1, 1),
    "head.projection": (1, 1),
    "attention.wq": (1 / 2, 1 / 4),
    "attention.wk": (1 / 2, 1 / 4),
    "attention.wv": (1 / 2, 1 / 4),
    "attention.wo": (1 / 2 / L, 1 / 4),
    "mlp.gate": (1 / 2, 1 / 4),
    "mlp.up": (1 / 2, 1 / 4),
    "mlp.down": (1 / math.sqrt(2) / L, 1 / 2),
    "mlp.router": (1 / 4, 1 / 4),
    "experts.gate": (1 / 2, 1 / 4),
    "experts.up": (1 / 2, 1 / 4),
    "experts.down": (1 / math.sqrt(3) / L, 1 / 3),
    "shared.gate": (1 / 2, 1 / 4),
    "shared.up": (1 / 2, 1 / 4),
    "shared.down": (1 / math.sqrt(3) / L, 1 / 3),
}
"""Initial deviation over init_std, and factor on the learning rate, of a model 4 times as wide as its base.

Its feed-forward layers are twice and its experts three times as wide inside.
"""
BASE = {"base_width": 8, "base_ffn_width": 32, "base_expert_width": 8}
MODELS = {
    "gpt2": GPT2,
    "llama untied": {**LLAMA, "tie_embeddings": False, "qk_norm": True},
    "experts": {**LLAMA, **MOE},
}


def _config(model: str, **mup: object) -> ModelConfig:
    return ModelConfig.model_validate({**MODELS[model], "mup": mup})


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_is_in_the_table(model: str) -> None:
    config, standard = _config(model, **BASE), _config(model)
    for name in (spec.name for spec in list_parameters(config)):
        plain = plan_init(standard, name)
        assert plan_rate(standard, name) == 1.0
        if plain.kind != "normal":
            assert plan_init(config, name) == plain
            assert plan_rate(config, name) == 1.0
            continue
        deviation, rate = next(row for kind, row in TABLE.items() if f"{kind}.weight" in name)
        assert plan_init(config, name).std == pytest.approx(deviation * config.init_std, rel=1e-12), name
        assert plan_rate(config, name) == pytest.approx(rate, rel=1e-12), name


@pytest.mark.parametrize("model", MODELS)
def test_at_the_base_width_it_is_the_standard_parametrisation(model: str) -> None:
    standard = _config(model)
    heads = {"base_head_width": standard.head_width, "base_ffn_width": standard.ffn_hidden_size}
    config = _config(model, base_width=standard.hidden_size, **heads)
    for name in (spec.name for spec in list_parameters(config)):
        assert plan_init(config, name) == plan_init(standard, name)
        assert plan_rate(config, name) == 1.0
    assert (config.query_scale, config.output_scale, config.width_ratio) == (1.0, 1.0, 1.0)


def test_inner_widths_go_in_proportion_where_none_is_named() -> None:
    config = _config("experts", base_width=8)
    assert (config.heads_ratio, config.ffn_ratio, config.expert_ratio) == (4.0, 4.0, 4.0)


@pytest.mark.parametrize(
    ("model", "mup", "ratio"),
    [
        ({"head_dim": 8}, {"base_num_heads": 4}, 1),
        ({"head_dim": 16}, {"base_num_heads": 4, "base_head_width": 8}, 2),
        ({"head_dim": 16}, {"base_num_heads": 1, "base_head_width": 8}, 8),
    ],
)
def test_heads_that_do_not_widen_with_the_model_leave_what_ends_attention(
    model: dict[str, object], mup: dict[str, object], ratio: float
) -> None:
    """Four heads under twice the hidden size: wo's inputs are those of all heads together."""
    config = ModelConfig.model_validate({**LLAMA, **model, "mup": {"base_width": 16, **mup}})
    assert plan_rate(config, "layers.0.attention.wo.weight") == 1 / ratio
    assert plan_init(config, "layers.0.attention.wo.weight").std == pytest.approx(0.02 / math.sqrt(ratio) / L)
    assert plan_rate(config, "layers.0.attention.wq.weight") == 1 / 2


def _logits(model: dict[str, object], **mup: object) -> tuple[Tensor, Transformer]:
    built = Transformer(ModelConfig.model_validate({**model, "dropout": 0.0, "mup": mup})).double()
    with torch.no_grad():
        for index, parameter in enumerate(built.parameters()):
            draw = torch.Generator().manual_seed(index)
            parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64) * 0.2)
        tokens = torch.arange(24).view(2, 12)
        return built(tokens), built


@pytest.mark.parametrize("model", MODELS)
def test_logits_are_divided_by_the_ratio_of_widths(model: str) -> None:
    wide, _ = _logits(MODELS[model], base_width=8, output_multiplier=3.0)
    standard, _ = _logits(MODELS[model])
    torch.testing.assert_close(wide, standard * 3 / 4, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", ["gpt2", "llama untied"])
def test_embeddings_are_multiplied_with_their_positions(model: str) -> None:
    _, built = _logits(MODELS[model], base_width=32, embedding_multiplier=5.0)
    assert built.embed is not None
    tokens = torch.arange(12).view(1, 12)
    expected = built.embed.tokens.weight[:12][None]
    if built.embed.positions is not None:
        expected = expected + built.embed.positions.weight[:12]
    torch.testing.assert_close(built.embed(tokens, torch.arange(1)), 5 * expected)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"num_kv_heads": 1}])
def test_attention_logits_go_as_one_over_the_width_of_a_head(changes: dict[str, object]) -> None:
    """Against softmax written out, with no position so that queries and keys are the projections'."""
    mup = {"base_width": 16, "base_head_width": 2}
    config = ModelConfig.model_validate({**LLAMA, **changes, "position": "none", "mup": mup})
    attention = Attention(config, None).double()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        x = torch.randn(2, 5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        query, key, value = (w(x).unflatten(-1, (-1, 8)) for w in (attention.wq, attention.wk, attention.wv))
        if attention.q_norm is not None and attention.k_norm is not None:
            query, key = attention.q_norm(query), attention.k_norm(key)
        key, value = (kv.repeat_interleave(4 // config.kv_heads, dim=2) for kv in (key, value))
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * math.sqrt(2) / 8
        scores = scores.masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
        expected = attention.wo(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value).flatten(-2))
        torch.testing.assert_close(attention(x, None), expected)
