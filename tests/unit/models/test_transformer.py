"""What the model promises by itself: names, tying, causality, documents, stages that add up, dropout by counter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dist_llm.accounting.flops import forward_flops
from dist_llm.accounting.params import list_parameters, num_parameters
from dist_llm.config.model import ModelConfig
from dist_llm.models.plan import SHARD_PLAN
from dist_llm.models.transformer import Transformer, build_model
from tests.parallel.tiny import GPT2, LLAMA, MOE

VARIANTS = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "qk-norm untied": {**LLAMA, "qk_norm": True, "tie_embeddings": False},
    "experts": {**LLAMA, **MOE},
    "post-norm": {**GPT2, "norm_placement": "post", "tie_embeddings": False},
}


def _model(variant: str, **changes: object) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.model_validate({**VARIANTS[variant], **changes}), seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_are_those_that_accounting_lists(variant: str) -> None:
    config = ModelConfig.model_validate(VARIANTS[variant])
    model = build_model(config)
    assert {spec.name: spec.shape for spec in list_parameters(config)} == {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    }
    assert num_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_sees_only_earlier_ones(variant: str) -> None:
    model = _model(variant).eval()
    tokens = torch.randint(0, 101, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 101
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    # The rows that an expert gets with others are rounded with them.
    same = partial(torch.allclose, atol=1e-5) if variant == "experts" else torch.equal
    assert same(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_documents_do_not_see_each_other() -> None:
    model = _model("llama").eval()
    tokens = torch.randint(0, 101, (1, 16))
    documents = torch.tensor([[0] * 6 + [1] * 10])
    changed = tokens.clone()
    changed[:, :6] = (changed[:, :6] + 1) % 101
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens, documents=documents)[:, 6:], model(changed, documents=documents)[:, 6:]
        )
        assert not torch.allclose(model(tokens)[:, 6:], model(changed)[:, 6:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_stages_compose_to_the_whole(variant: str) -> None:
    whole, first, last = _model(variant), _model(variant), _model(variant)
    first.keep_stage(range(3), first=True, last=False)
    last.keep_stage(range(3, 4), first=False, last=True)
    names = {*dict(first.named_parameters()), *dict(last.named_parameters())}
    assert names >= set(dict(whole.named_parameters()))
    tokens, samples = torch.randint(0, 101, (2, 16)), torch.arange(2)
    assert torch.equal(last(first(tokens, samples), samples), whole(tokens, samples))


def test_tied_head_is_the_token_table() -> None:
    model = _model("llama")
    assert model.embed is not None
    assert model.head is not None
    assert model.head.projection.weight is model.embed.tokens.weight


def test_dropout_depends_on_the_sample_and_not_on_its_row() -> None:
    model = _model("gpt2")
    tokens = torch.randint(0, 101, (3, 16))
    samples = torch.tensor([7, 8, 9])
    rows = torch.tensor([2, 0, 1])
    assert torch.equal(model(tokens, samples)[rows], model(tokens[rows], samples[rows]))
    assert not torch.equal(model(tokens, samples), model(tokens, samples + 3))
    assert torch.equal(model.eval()(tokens), model(tokens, samples))


def test_every_declared_style_names_a_module() -> None:
    from fnmatch import fnmatchcase

    paths = [
        path
        for variant in VARIANTS.values()
        for path, _ in build_model(ModelConfig.model_validate(variant)).named_modules()
    ]
    assert all(any(fnmatchcase(path, pattern) for path in paths) for pattern in SHARD_PLAN)


@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_equal_an_operation_counter(variant: str) -> None:
    """torch counts every matrix product and full (not causal) attention; ours counts the causal half."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    config = ModelConfig.model_validate(VARIANTS[variant])
    model = _model(variant).eval().requires_grad_(False)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 16, dtype=torch.int64))
    full = 4 * config.num_heads * config.head_width * 16 * 16 * config.num_layers
    causal = full * (16 + 1) // (2 * 16)
    assert counter.get_total_flops() == forward_flops(config, 16) - causal + full
