"""What only DeepSpeed has: offload to the host and to files, and faults of its own that the comparison finds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.errors import EngineUnavailable, ExitCode
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.engines import on_engine
from tests.parallel.engines import curve_of, curves, engine_config, gaps, journey, same, without_host_adam
from tests.parallel.tiny import Curve, tiny_config

SPLIT: dict[str, object] = {"tensor": 2, "sequence": True}


def broken_curve(config: RunConfig, fault: str, steps: int) -> Curve:
    """Train with a fault in the engine."""
    from dist_llm.engine import deepspeed

    def mark(split: bool) -> Any:
        def marks(shards: Any, tp: Any) -> None:
            for shard in shards:
                shard.parameter.tensor_model_parallel = shard.split or split
                if split and shard.partial:
                    shard.parameter.register_hook(lambda gradient: _summed(gradient, tp))

        return marks

    def _summed(gradient: torch.Tensor, tp: Any) -> torch.Tensor:
        torch.distributed.all_reduce(gradient, group=tp.group)
        return gradient

    def double(self: Any, divisor: float) -> None:
        self._zero.custom_loss_scaler, self._zero.external_loss_scale = True, 2 * divisor if divisor != 1 else 1.0

    faults = {
        "partial sums are forgotten": (deepspeed, "_mark_parts", mark(False)),
        "replicas count twice": (deepspeed, "_mark_parts", mark(True)),
        "the divisor is twice too large": (deepspeed.DeepSpeedEngine, "_set_divisor", double),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[fault])
        return curve_of(config, steps)


@pytest.mark.parametrize(
    "fault", ["partial sums are forgotten", "replicas count twice", "the divisor is twice too large"]
)
def test_a_fault_is_found(pool: WorkerPool, fault: str) -> None:
    config = engine_config("deepspeed", {"zero": 2, **SPLIT})
    native = pool.run(curve_of, on_engine(config, "native"), 3, world=4)[0]
    assert not same(pool.run(broken_curve, config, fault, 3, world=4)[0], native)


OFFLOADS = [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]


@pytest.mark.parametrize(("zero", "offload"), OFFLOADS)
def test_offload_trains_alike(pool: WorkerPool, zero: int, offload: str) -> None:
    config = engine_config("deepspeed", {"zero": zero, "offload": offload})
    native, ours = pool.run(without_host_adam, curves, config, 5, world=2)[0]
    assert same(ours, native), gaps(ours, native)


@pytest.mark.slow
def test_the_host_adam_of_deepspeed_trains_alike_and_resumes(pool: WorkerPool, tmp_path: Path) -> None:
    config = engine_config("deepspeed", {"zero": 3, "offload": "parameters"})
    native, ours = pool.run(curves, config, 8, world=2)[0]
    assert same(ours, native), gaps(ours, native)
    assert pool.run(journey, [(config, 5), (config, 8)], tmp_path, world=2)[0] == ours


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["optimizer", "parameters"])
def test_files_train_alike_and_resume(pool: WorkerPool, tmp_path: Path, offload: str) -> None:
    """ZeRO-Infinity on a model large enough for its files to be used (1 MiB a tensor)."""
    wide: dict[str, object] = {"hidden_size": 256, "ffn_hidden_size": 512, "vocab_size": 3000}
    there = {"name": "deepspeed", "offload_to": "nvme", "nvme_path": str(tmp_path / "nvme")}
    sections: dict[str, Any] = {"optimizer": {"lr": 1e-3}, "engine": there}
    config = tiny_config({"zero": 3, "offload": offload}, wide, {"microbatch": 2}, **sections)
    try:
        ours = pool.run(curve_of, config, 6, world=2)[0]
    except EngineUnavailable as error:
        pytest.skip(str(error))
    native = pool.run(curve_of, on_engine(config, "native"), 6, world=2)[0]
    assert same(ours, native), gaps(ours, native)
    files = [path.name for path in (tmp_path / "nvme").rglob("*.swp")]
    assert any("exp_avg" in name for name in files)
    assert any("param" in name for name in files) == (offload == "parameters")
    assert pool.run(journey, [(config, 3), (config, 6)], tmp_path / "saved", world=2)[0] == ours


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from dist_llm.engine.deepspeed_library import import_deepspeed

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(EngineUnavailable, match=r"pip install 'dist-llm\[deepspeed\]'") as caught:
        import_deepspeed(torch.device("cpu"))
    assert caught.value.exit_code == ExitCode.CONFIG
    assert "\n" not in str(caught.value)
