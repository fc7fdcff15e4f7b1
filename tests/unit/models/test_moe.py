"""A layer of experts is the sum of its formula, token by token; its losses and counts come once a backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import MixtralConfig, MixtralForCausalLM

from dist_llm.config.model import ModelConfig
from dist_llm.models.moe import MoE, Tally
from dist_llm.models.transformer import Transformer
from tests.parallel.tiny import LLAMA

SOFTMAX: dict[str, object] = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24, "num_shared": 2}
SIGMOID: dict[str, object] = {"num_experts": 8, "top_k": 3, "score": "sigmoid", "scale": 2.5}
LOSSES: dict[str, object] = {"balance_loss": 0.3, "z_loss": 0.1}


def layer(moe: dict[str, object], **model: object) -> MoE:
    """Return a layer with random weights in fp64."""
    config = ModelConfig.model_validate({**LLAMA, **model, "moe": moe})
    built = MoE(config, 3, Tally()).double()
    generator = torch.Generator().manual_seed(5)
    for parameter in built.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return built


def hidden(requires_grad: bool = False) -> Tensor:
    x = torch.randn((2, 6, 32), generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return x.requires_grad_(requires_grad)


def scores_of(built: MoE, x: Tensor) -> Tensor:
    logits = x @ built.router.weight.t()
    return logits.softmax(-1) if built.config.score == "softmax" else logits.sigmoid()


def expert(built: MoE, number: int, token: Tensor) -> Tensor:
    gate, up, down = built.experts.gate, built.experts.up, built.experts.down
    inner = up.weight[number] @ token
    inner = functional.gelu(inner) if gate is None else functional.silu(gate.weight[number] @ token) * inner
    return down.weight[number] @ inner


@pytest.mark.parametrize("moe", [SOFTMAX, {**SOFTMAX, "normalize": False}, SIGMOID], ids=["softmax", "raw", "sigmoid"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_output_is_the_weighted_sum_of_the_chosen(moe: dict[str, object], activation: str) -> None:
    built, x = layer(moe, activation=activation), hidden()
    built.router.bias[0] = 0.7
    scores = scores_of(built, x)
    out = built(x)
    for batch in range(2):
        for token in range(6):
            mine = scores[batch, token]
            chosen = (mine + built.router.bias).topk(built.config.top_k).indices
            weights = mine[chosen] / (mine[chosen].sum() if built.config.normalize else 1.0) * built.config.scale
            parts = [w * expert(built, int(e), x[batch, token]) for w, e in zip(weights, chosen, strict=True)]
            expected = torch.stack(parts).sum(0)
            if built.shared is not None:
                expected = expected + built.shared(x)[batch, token]
            torch.testing.assert_close(out[batch, token], expected)


def test_logits_are_those_of_mixtral() -> None:
    moe = {"num_experts": 4, "top_k": 2}
    config = ModelConfig.model_validate({**LLAMA, "tie_embeddings": False, "moe": moe})
    ours = Transformer(config)
    torch.manual_seed(0)
    theirs = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_width,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            num_local_experts=4,
            num_experts_per_tok=2,
            tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope.theta},
            attn_implementation="eager",
        )
    ).eval()
    given = theirs.state_dict()
    weights = {"embed.tokens.weight": "model.embed_tokens.weight", "head.norm.weight": "model.norm.weight"}
    weights["head.projection.weight"] = "lm_head.weight"
    for index in range(config.num_layers):
        here, there = f"layers.{index}", f"model.layers.{index}"
        for name in "qkvo":
            weights[f"{here}.attention.w{name}.weight"] = f"{there}.self_attn.{name}_proj.weight"
        weights[f"{here}.attention_norm.weight"] = f"{there}.input_layernorm.weight"
        weights[f"{here}.mlp_norm.weight"] = f"{there}.post_attention_layernorm.weight"
        weights[f"{here}.mlp.router.weight"] = f"{there}.mlp.gate.weight"
        weights[f"{here}.mlp.experts.down.weight"] = f"{there}.mlp.experts.down_proj"
    state = {name: given[other] for name, other in weights.items()}
    for index in range(config.num_layers):
        gate, up = given[f"model.layers.{index}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        state[f"layers.{index}.mlp.experts.gate.weight"] = gate
        state[f"layers.{index}.mlp.experts.up.weight"] = up
        state[f"layers.{index}.mlp.router.bias"] = torch.zeros(4)
    ours.load_state_dict(state)
    tokens = torch.randint(0, config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("moe", [{**SOFTMAX, **LOSSES}, {**SIGMOID, **LOSSES}], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize("recomputed", [False, True])
def test_losses_enter_the_gradient_and_are_told_once(moe: dict[str, object], recomputed: bool) -> None:
    built, x = layer(moe), hidden(requires_grad=True)
    tally = built.router.tally
    tally.unit, tally.share = 0.25, 0.5
    (checkpoint(built, x, use_reentrant=False) if recomputed else built(x)).square().sum().backward()
    router_grad, grads = built.router.weight.grad, [p.grad for p in built.parameters()]

    plain, y = layer({**moe, "balance_loss": 0.0, "z_loss": 0.0}), hidden(requires_grad=True)
    out = plain(y)
    logits = y @ plain.router.weight.t()
    scores = scores_of(plain, y)
    chosen = functional.one_hot(scores.topk(plain.config.top_k).indices, plain.config.num_experts).sum((1, 2))
    share = chosen / (6 * plain.config.top_k) * plain.config.num_experts
    balance = 0.3 * (share[:, None] * scores / scores.sum(-1, keepdim=True)).sum()
    z = 0.1 * logits.logsumexp(-1).square().sum()
    (out.square().sum() + 0.25 * 0.5 * (balance + z)).backward()
    for ours, theirs in zip(grads, plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.grad)
    torch.testing.assert_close(x.grad, y.grad)
    assert router_grad is not None
    torch.testing.assert_close(tally.losses[3], torch.stack((balance, z, torch.zeros_like(z))).detach() * 0.5)
    assert torch.equal(tally.counts[3], chosen.sum(0))
    tally.clear()
    assert not tally.counts


def test_beyond_the_capacity_rows_are_dropped() -> None:
    x = hidden()
    dropless, tight = layer(SOFTMAX), layer({**SOFTMAX, "capacity_factor": 0.5})
    ample = layer({**SOFTMAX, "capacity_factor": 4.0})
    assert torch.equal(ample(x), dropless(x))
    assert not torch.allclose(tight(x), dropless(x))
    chosen = torch.tensor([[0, 1], [0, 2], [0, 1], [0, 3]])
    rows, counts = layer({**SOFTMAX, "capacity_factor": 1.0})._sorted_rows(chosen)
    assert counts.tolist() == [2, 2, 1, 1]
    assert rows.tolist() == [0, 2, 1, 5, 3, 7]


def test_an_evaluation_tells_nothing() -> None:
    built = layer({**SOFTMAX, **LOSSES})
    with torch.no_grad():
        built(hidden())
    assert not built.router.tally.counts
