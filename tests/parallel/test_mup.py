"""muP is the same training on every layout and after a resume, and the standard one at the base width."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.errors import CheckpointMismatch
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.identity import identity_of
from dist_llm.train.verify_resume import Leg, Outcome, run_leg
from tests.golden.curves import EOS, SIZES, write_tokens
from tests.parallel.tiny import GPT2, MOE, build, curve, largest_gap, random_batch, tiny_config
from tests.tolerances import FP64_FEW_STEPS, VISIBLE

MUP: dict[str, object] = {
    "base_width": 8,
    "base_head_width": 2,
    "output_multiplier": 2.0,
    "embedding_multiplier": 3.0,
}
LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (2, {"pipeline": 2, "schedule": "zero_bubble"}),
    (2, {"context": 2}),
    (2, {"context": 2, "context_method": "ulysses"}),
    (2, {"zero": 3}),
]
EXPERT_LAYOUTS: list[tuple[int, dict[str, object]]] = [
    (2, {"tensor": 2, "sequence": True}),
    (4, {"expert": 2, "zero": 3}),
]
FP64: dict[str, object] = {"name": "fp64"}


def _config(parallel: dict[str, object], model: dict[str, object], **sections: object) -> RunConfig:
    return tiny_config(parallel, {"mup": MUP, **model}, precision=FP64, **sections)


@pytest.mark.parametrize(
    ("model", "layouts"),
    [({}, LAYOUTS), ({**GPT2, "tie_embeddings": False}, LAYOUTS[:3]), (MOE, EXPERT_LAYOUTS)],
    ids=["llama", "gpt2", "experts"],
)
def test_layouts_agree_in_fp64(
    pool: WorkerPool, model: dict[str, object], layouts: list[tuple[int, dict[str, object]]]
) -> None:
    one = pool.run(curve, _config({}, model), world=1)[0]
    for ranks, parallel in layouts:
        for ours in pool.run(curve, _config(parallel, model), world=ranks):
            assert largest_gap(ours, one) <= FP64_FEW_STEPS, parallel


@pytest.mark.parametrize("setting", MUP)
def test_every_setting_acts(pool: WorkerPool, setting: str) -> None:
    """So that the layouts above would show one that is lost."""
    strong: dict[str, object] = {"init_std": 0.1}
    with_all = pool.run(curve, _config({}, strong), 3, world=1)[0]
    without = {name: value for name, value in MUP.items() if name != setting}
    if setting == "base_width":
        without = {**MUP, "base_width": 16}
    less = pool.run(curve, _config({}, {**strong, "mup": without}), 3, world=1)[0]
    assert largest_gap(less, with_all) > VISIBLE


@pytest.mark.parametrize("model", [{}, GPT2, MOE], ids=["llama", "gpt2", "experts"])
def test_at_the_base_width_every_bit_is_as_without(pool: WorkerPool, model: dict[str, object]) -> None:
    base = {"base_width": 32, "base_head_width": 8, "base_ffn_width": 64, "base_expert_width": 24}
    plain = pool.run(curve_and_weights, tiny_config({}, {**model}), world=1)[0]
    mup = pool.run(curve_and_weights, tiny_config({}, {**model, "mup": base}), world=1)[0]
    assert mup[0] == plain[0]
    assert mup[1].keys() == plain[1].keys()
    assert all(torch.equal(weight, plain[1][name]) for name, weight in mup[1].items())


def curve_and_weights(config: RunConfig) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train; return losses, and the weights at the end."""
    engine = build(config)
    losses = [engine.train_step(random_batch(config, engine.data_slice, step)).loss for step in range(4)]
    return losses, {shard.name: shard.tensor.clone() for shard in engine.shards}


def first_update(config: RunConfig) -> dict[str, tuple[float, float, float]]:
    """Return of each parameter the deviation it starts with, and how far it moves and should move, in the mean."""
    engine = build(config)
    before = [shard.tensor.clone() for shard in engine.shards]
    lr = engine.train_step(random_batch(config, engine.data_slice, 0)).lr
    found = {}
    eps = config.optimizer.eps / 4
    for shard, slot, start in zip(engine.shards, engine.optimizer.slots, before, strict=True):
        gradient = slot.exp_avg / (1 - config.optimizer.betas[0])
        step = lr * slot.rate * gradient / (gradient.abs() + eps)
        decay = lr * config.optimizer.weight_decay * start if slot.decays else torch.zeros_like(start)
        moved = shard.tensor - start
        found[shard.name] = (start.std().item(), moved.norm().item(), (moved + step + decay).norm().item())
    return found


def test_weights_start_and_move_by_the_table(pool: WorkerPool) -> None:
    """With an epsilon as large as gradients are, and a decay that moves weights as much as they do."""
    config = _config({}, {**MOE, "bias": False}, optimizer={"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.9})
    found = pool.run(first_update, config, world=1)[0]
    for name, (_, moved, gap) in found.items():
        assert moved > 0, name
        assert gap <= 1e-9 * moved, name
    for name, expected in {
        "layers.0.attention.wq.weight": 0.01,
        "layers.1.mlp.router.weight": 0.005,
        "embed.tokens.weight": 0.02,
    }.items():
        assert found[name][0] == pytest.approx(expected, rel=0.2)


def test_resume_is_exact_and_another_setting_is_another_model(pool: WorkerPool, tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path)
    config = tiny_config({"zero": 1}, {**SIZES, "mup": MUP})

    def run(leg: Leg, folder: str, chosen: RunConfig = config) -> Outcome:
        outcomes: list[Outcome] = pool.run(run_leg, chosen, Path(prefix), EOS, tmp_path / folder, leg, world=2)
        return outcomes[0]

    whole = run(Leg(0, 4), "whole")
    run(Leg(0, 2, save_at=2), "stopped")
    resumed = run(Leg(2, 4), "stopped")
    assert resumed.losses == {step: whole.losses[step] for step in (2, 3)}
    assert all((mine[3] == theirs[3]).all() for mine, theirs in zip(resumed.state, whole.state, strict=True))
    other = tiny_config({"zero": 1}, {**SIZES, "mup": {**MUP, "base_width": 16}})
    with pytest.raises(CheckpointMismatch, match=r"model\.mup\.base_width=16 differs"):
        run(Leg(2, 4), "stopped", other)
    assert identity_of(config, "", "") != identity_of(other, "", "")
