"""benchmarks/peers.py: what is timed is the same work, who is left out is said, and every case can be run."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from benchmarks import peers
from benchmarks.peers_rounds import CONTESTANTS, Start, run_rounds
from dist_llm.cli.compose import compose
from dist_llm.config.checks import decode_and_check
from dist_llm.config.run import RunConfig
from dist_llm.runtime.mesh import build_mesh
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.bench_step import random_batch

TINY = ("data.seq_len=16", "data.global_batch=4", "data.microbatch=2", "schedule=wsd", "schedule.warmup_steps=0")
FAMILIES = (
    ("model=gpt2-tiny", "model.norm=rmsnorm", "model.bias=false"),
    ("model=gpt2-tiny",),
    ("model=llama-quickstart",),
)


def tiny(family: tuple[str, ...], *layout: str, ranks: int = 1) -> RunConfig:
    """Return a config of a small model whose learning rate is the same at every step."""
    words = (*family, *TINY, "parallel=single", f"launcher.nproc={ranks}", "device=cpu", *layout)
    return decode_and_check(compose(list(words)), ranks)


def losses(config: RunConfig, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Return the losses of three steps of each contestant on the same batch, the mean over ranks."""
    mesh = build_mesh(config.parallel, torch.device("cpu"))
    found = {}
    for name in names:
        contestant = CONTESTANTS[name](config, mesh)
        own = [contestant.step(random_batch(config, contestant.share, 0)) for _ in range(3)]
        mean = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(mean)
        found[name] = (mean / mesh.world.size).tolist()
    return found


@pytest.mark.parametrize("family", FAMILIES, ids=("gpt", "gpt2", "llama"))
def test_ours_and_plain_train_alike(pool: WorkerPool, family: tuple[str, ...]) -> None:
    (found,) = pool.run(losses, tiny(family), ("ours", "bare", "plain"), world=1)
    assert found["bare"] == pytest.approx(found["ours"], rel=1e-5)
    assert found["plain"] == pytest.approx(found["ours"], rel=1e-5)
    assert found["ours"][2] < found["ours"][0] - 0.01, "a step that changes nothing proves nothing"


def test_plain_is_data_parallel(pool: WorkerPool) -> None:
    config = tiny(FAMILIES[0], "parallel.data=2", "parallel.zero=1", "data.microbatch=1", ranks=2)
    found, _ = pool.run(losses, config, ("ours", "plain"), world=2)
    assert found["plain"] == pytest.approx(found["ours"], rel=1e-5)


def test_who_cannot_run_says_why_and_others_are_timed(pool: WorkerPool) -> None:
    config = tiny(FAMILIES[0], "parallel.tensor=2", ranks=2)
    stream = pool.stream(run_rounds, config, ("ours", "plain", "gemm_floor"), 2, 1, world=2)
    starts = next(stream)
    assert starts[0].left_out == {
        "plain": "plain PyTorch does not split this model over tp or pp",
        "gemm_floor": "the floor of matrix products is timed in one process only",
    }
    rounds = list(stream)
    assert len(rounds) == 2
    assert all(set(rank) == {"ours"} and rank["ours"] > 0 for ranks in rounds for rank in ranks)


def test_other_work_is_not_compared() -> None:
    start = Start({"ours": 9.0, "plain": 9.1, "megatron": 9.1, "deepspeed": 1.1}, ("ours", "plain"), {"bare": "no"})
    assert set(peers.left_out_of([start])) == {"plain", "deepspeed", "bare"}
    with pytest.raises(RuntimeError, match="ours fails"):
        peers.left_out_of([Start({}, (), {"ours": "ours fails"})])


@pytest.mark.parametrize("name", peers.CASES)
def test_cases_can_run(name: str) -> None:
    case = peers.CASES[name]
    config = case.config()
    assert config.launcher.threads == case.threads
    assert config.precision.name == "fp32"


def test_table_shows_null() -> None:
    row = {"name": "a", "ranks": 1, **dict.fromkeys(CONTESTANTS), "ours": 1234.5, "ratios": {"plain": 1.25}}
    first, second = (line for line in peers.table([row]).splitlines() if line.startswith("a "))
    assert first.split()[1:] == ["1,234", *["null"] * 6]
    assert second.split()[1:] == ["1.250"]
