"""Our transformer gives the logits of Hugging Face's for the same weights: GPT-2 and Llama layouts, RoPE scalings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dist_llm.config.model import ModelConfig
from dist_llm.models.transformer import Transformer

TOLERANCE = 2e-5
"""Largest absolute difference of fp32 logits that are of order one."""


def _llama(scaling: dict[str, object], theta: float) -> tuple[ModelConfig, LlamaForCausalLM]:
    ours = ModelConfig.model_validate(
        {
            "family": "llama",
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 96,
            "vocab_size": 50,
            "max_seq_len": 64,
            "position": "rope",
            "rope": {"theta": theta, **scaling},
            "norm": "rmsnorm",
            "norm_eps": 1e-5,
            "activation": "swiglu",
            "bias": False,
            "tie_embeddings": False,
        }
    )
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": theta}
    if scaling:
        rope = {"rope_type": scaling["scaling"], "rope_theta": theta}
        rope["factor"] = scaling["factor"]
        rope["original_max_position_embeddings"] = scaling["original_max_seq_len"]
        if scaling["scaling"] == "llama3":
            rope.update(low_freq_factor=1.0, high_freq_factor=4.0)
    theirs = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        vocab_size=50,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters=rope,
        attn_implementation="eager",
    )
    return ours, LlamaForCausalLM(theirs)


LLAMA_NAMES = {
    "embed.tokens": "model.embed_tokens",
    "attention.w": "self_attn.",
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "head.norm": "model.norm",
    "head.projection": "lm_head",
}


def _llama_name(name: str) -> str:
    for ours, theirs in LLAMA_NAMES.items():
        if ours in name:
            name = name.replace(ours, theirs)
            break
    if "self_attn." in name:
        name = name.replace(".weight", "_proj.weight")
    return f"model.{name}" if name.startswith("layers.") else name


def _logits(ours: Transformer, theirs: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return ours.eval()(tokens), theirs.eval()(tokens).logits


@pytest.mark.parametrize(
    "scaling",
    [
        {},
        {"scaling": "llama3", "factor": 8.0, "original_max_seq_len": 16},
        {"scaling": "yarn", "factor": 4.0, "original_max_seq_len": 16},
    ],
    ids=lambda scaling: str(scaling.get("scaling", "none")),
)
def test_llama(scaling: dict[str, object]) -> None:
    torch.manual_seed(0)
    config, theirs = _llama(scaling, 10000.0)
    ours = Transformer(config)
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.copy_(weights[_llama_name(name)] * (3.0 if "norm" not in name else 1.0))
            weights[_llama_name(name)].copy_(parameter)
    mine, reference = _logits(ours, theirs, torch.randint(0, 50, (2, 48)))
    assert reference.abs().max() > 0.5
    assert (mine - reference).abs().max() < TOLERANCE


def test_gpt2() -> None:
    torch.manual_seed(0)
    config = ModelConfig.model_validate(
        {
            "family": "gpt2",
            "num_layers": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "ffn_hidden_size": 256,
            "vocab_size": 50,
            "max_seq_len": 32,
            "position": "learned",
            "norm": "layernorm",
            "activation": "gelu_tanh",
            "bias": True,
            "tie_embeddings": True,
        }
    )
    reference_config = GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=50, n_positions=32, attn_implementation="eager"
    )
    theirs = GPT2LMHeadModel(reference_config)
    ours = Transformer(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.15)
        _copy_gpt2(ours, theirs.state_dict())
    mine, reference = _logits(ours, theirs, torch.randint(0, 50, (2, 32)))
    assert reference.abs().max() > 0.5
    assert (mine - reference).abs().max() < 10 * TOLERANCE


def _copy_gpt2(ours: Transformer, weights: dict[str, Tensor]) -> None:
    """Copy Hugging Face's GPT-2 weights, whose linears are transposed and whose q, k, v are one matrix."""
    assert ours.embed is not None
    assert ours.embed.positions is not None
    ours.embed.tokens.weight.copy_(weights["transformer.wte.weight"])
    ours.embed.positions.weight.copy_(weights["transformer.wpe.weight"])
    for index in range(2):
        prefix, target = f"transformer.h.{index}", f"layers.{index}"
        parts = weights[f"{prefix}.attn.c_attn.weight"].T.chunk(3), weights[f"{prefix}.attn.c_attn.bias"].chunk(3)
        for name, weight, bias in zip("qkv", *parts, strict=True):
            ours.get_parameter(f"{target}.attention.w{name}.weight").copy_(weight)
            ours.get_parameter(f"{target}.attention.w{name}.bias").copy_(bias)
        for mine, his in (("attention.wo", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
            ours.get_parameter(f"{target}.{mine}.weight").copy_(weights[f"{prefix}.{his}.weight"].T)
            ours.get_parameter(f"{target}.{mine}.bias").copy_(weights[f"{prefix}.{his}.bias"])
        for mine, his in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for leaf in ("weight", "bias"):
                ours.get_parameter(f"{target}.{mine}.{leaf}").copy_(weights[f"{prefix}.{his}.{leaf}"])
    for leaf in ("weight", "bias"):
        ours.get_parameter(f"head.norm.{leaf}").copy_(weights[f"transformer.ln_f.{leaf}"])
