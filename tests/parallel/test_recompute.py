"""What is computed again is bit for bit what it was, and what is dropped is really gone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.models.plan import RECOMPUTE_PLAN
from dist_llm.models.transformer import Transformer
from dist_llm.parallel import recompute
from dist_llm.parallel.recompute import apply_full_recompute, apply_selective_recompute
from dist_llm.runtime.pool import WorkerPool
from tests.parallel.tiny import GPT2, LLAMA, MOE, build, random_batch, tiny_config

POST_NORM: dict[str, object] = {**GPT2, "norm_placement": "post"}
MODELS: dict[str, dict[str, object]] = {
    "llama": {"qk_norm": True},
    "gpt2": GPT2,
    "post-norm": POST_NORM,
    "experts": MOE,
}
SETTINGS: list[dict[str, object]] = [
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
    *(
        {"recompute": "selective", "recompute_operators": operators}
        for operators in (
            ["core_attn"],
            ["norm"],
            ["activation"],
            ["mlp"],
            ["core_attn", "norm", "activation"],
            ["norm", "mlp"],
        )
    ),
]


def exact_steps(configs: list[RunConfig]) -> list[list[object]]:
    """Train each and return all that its steps report: losses, norms and what routers counted."""
    reports = []
    for config in configs:
        engine = build(config)
        results = [engine.train_step(random_batch(config, engine.data_slice, step)) for step in range(3)]
        reports.append([(result.loss, result.grad_norm, dict(result.figures)) for result in results])
        engine.close()
    return reports


@pytest.mark.parametrize("name", MODELS)
def test_recompute_changes_no_bit(pool: WorkerPool, name: str) -> None:
    configs = [tiny_config(setting, MODELS[name]) for setting in ({}, *SETTINGS)]
    without, *others = pool.run(exact_steps, configs, world=1)[0]
    for setting, report in zip(SETTINGS, others, strict=True):
        assert report == without, setting


def stale_steps(configs: list[RunConfig]) -> list[list[object]]:
    """Train with recompute that gives back zeros in place of results."""
    kept = recompute._Call.result
    recompute._Call.result = lambda call: torch.zeros_like(kept(call))  # type: ignore[method-assign]
    try:
        return exact_steps(configs)
    finally:
        recompute._Call.result = kept  # type: ignore[method-assign]


@pytest.mark.parametrize("operator", ["norm", "activation"])
def test_a_wrong_result_would_show(pool: WorkerPool, operator: str) -> None:
    setting: dict[str, object] = {"recompute": "selective", "recompute_operators": [operator]}
    without, stale = pool.run(stale_steps, [tiny_config(), tiny_config(setting)], world=1)[0]
    assert stale != without


class _Live(TorchDispatchMode):
    """Notes every storage that an operation makes, without keeping it; those of `known` are none of them."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {StorageWeakRef(tensor.untyped_storage()) for tensor in known}
        self._storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._storages[StorageWeakRef(storage)] = storage.nbytes()
        return out

    def nbytes(self) -> int:
        """Return the bytes of those that are still held."""
        made = self._storages.keys() - self._known
        return sum(self._storages[storage] for storage in made if not storage.expired())


BATCH, LAYERS = 3, 2


def live_after_forward(model: dict[str, object], *operators: str) -> int:
    """Return the bytes that a forward leaves for its backward; without operators, of no recompute."""
    config = ModelConfig.model_validate({**LLAMA, **model, "num_layers": LAYERS})
    built = Transformer(config)
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(1))
    blocks = list(built.layers.values())
    if operators == ("all",):
        apply_full_recompute(blocks)
    elif operators:
        apply_selective_recompute(blocks, [RECOMPUTE_PLAN[name] for name in operators])
    tokens = torch.randint(0, 101, (BATCH, 16), generator=torch.Generator().manual_seed(1))
    built(tokens, torch.arange(BATCH))  # what is built on first use is no activation
    with _Live(built.parameters()) as live:
        loss = built(tokens, torch.arange(BATCH)).square().sum()
        held = live.nbytes()
    loss.backward()
    return held


WIDTH, INNER, TOKENS = 32, 64, BATCH * 16


@pytest.mark.parametrize(
    ("model", "operators", "elements"),
    [
        # Of gate, up and what they give two are left; of up and gelu(up) one.
        ({}, ("activation",), TOKENS * INNER),
        ({**GPT2, "dropout": 0.0}, ("activation",), TOKENS * INNER),
        # Two norms, each with its result and, for a token, its scale; LayerNorm has a mean too.
        ({}, ("norm",), 2 * TOKENS * (WIDTH + 1)),
        ({**GPT2, "dropout": 0.0}, ("norm",), 2 * TOKENS * (WIDTH + 2)),
        ({}, ("norm", "activation"), 2 * TOKENS * (WIDTH + 1) + TOKENS * INNER),
        # All of gate, up and what they give; its input is the norm's result, which can go as well.
        ({}, ("mlp",), 3 * TOKENS * INNER),
        ({}, ("norm", "mlp"), 2 * TOKENS * (WIDTH + 1) + 3 * TOKENS * INNER),
    ],
    ids=str,
)
def test_live_bytes_drop_by_what_is_not_kept(
    model: dict[str, object], operators: tuple[str, ...], elements: int
) -> None:
    assert live_after_forward(model) - live_after_forward(model, *operators) == LAYERS * elements * 4


def test_attention_and_whole_blocks_are_dropped() -> None:
    whole, blocks = live_after_forward({}), live_after_forward({}, "all")
    assert blocks < live_after_forward({}, "core_attn") < whole
    assert blocks < live_after_forward({}, "core_attn", "norm", "mlp") < whole / 2
