"""What only Megatron-Core has: our attention for documents, its fused parts and scalers, faults that are found."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_llm.config.run import RunConfig
from dist_llm.engine.build import import_megatron
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train.engines import on_engine
from tests.parallel.engines import curve_of, curves, engine_config, gaps, running, same
from tests.parallel.tiny import GPT2, SIGMOID_MOE, Curve, random_batch

SPLIT: dict[str, object] = {"tensor": 2, "sequence": True}


def test_documents_keep_to_themselves(pool: WorkerPool) -> None:
    config = engine_config("megatron", {**SPLIT, "zero": 1})
    masked = config.model_copy(update={"data": config.data.model_copy(update={"document_mask": True})})
    native, ours = pool.run(curves, masked, 3, world=2)[0]
    assert same(ours, native), gaps(ours, native)


def broken_curve(config: RunConfig, fault: str, steps: int) -> Curve:
    """Train with a fault in the engine."""
    megatron = import_megatron(torch.device("cpu"))
    finish = megatron.finalize_model_grads

    def halved(chunks: Any, tokens: torch.Tensor, **more: Any) -> None:
        finish(chunks, 2 * tokens, **more)

    wrap = megatron.wrap_chunks

    def unmarked(config: RunConfig, settings: Any, models: list[torch.nn.Module], device: torch.device) -> Any:
        for model in models:
            for parameter in model.parameters():
                parameter.tensor_model_parallel = False  # type: ignore[attr-defined]
        return wrap(config, settings, models, device)

    faults: dict[str, tuple[Any, str, Any]] = {
        "norms count one rank's part": (megatron, "wrap_chunks", unmarked),
        "gradients are halved": (megatron, "finalize_model_grads", halved),
        "gradients are of a microbatch": (megatron.MegatronEngine, "_scaled", lambda self, loss: loss),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*faults[fault])
        return curve_of(config, steps)


@pytest.mark.parametrize(
    "fault", ["norms count one rank's part", "gradients are halved", "gradients are of a microbatch"]
)
def test_a_fault_is_found(pool: WorkerPool, fault: str) -> None:
    config = engine_config("megatron", {**SPLIT, "data": 2, "zero": 1})
    native = pool.run(curve_of, on_engine(config, "native"), 3, world=4)[0]
    assert not same(pool.run(broken_curve, config, fault, 3, world=4)[0], native)


def scales(config: RunConfig, part: str) -> list[tuple[float, ...]]:
    """Overflow one rank's gradient of a part in the second of three steps; return all loss scales after each."""
    megatron = import_megatron(torch.device("cpu"))
    finish = megatron.finalize_model_grads

    def overflow(chunks: Any, *args: Any, **more: Any) -> None:
        finish(chunks, *args, **more)
        for name, weight in chunks[0].named_parameters():
            if part in name and torch.distributed.get_rank() == 0:  # the other rank hears of it from this one
                weight.main_grad.fill_(torch.inf)

    found = []
    with running(config) as engine:
        for step in range(3):
            with pytest.MonkeyPatch.context() as patch:
                if step == 1:
                    patch.setattr(megatron, "finalize_model_grads", overflow)
                skipped = engine.train_step(random_batch(config, engine.data_slice, step)).skipped
            assert skipped == (step == 1)
            scalers = [part.grad_scaler for part in engine._parts if part.optimizer is not None]  # type: ignore[attr-defined]
            found.append((float(engine.state().facts["loss_scale"]), *(float(each.scale) for each in scalers)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize("part", ["linear_qkv", "local_experts"])
def test_dense_weights_and_experts_have_one_loss_scale(pool: WorkerPool, part: str) -> None:
    precision = {"name": "fp16", "initial_loss_scale": 2.0**10}
    config = engine_config("megatron", {"data": 2, "expert": 2, "zero": 1}, SIGMOID_MOE, precision=precision)
    for found in pool.run(scales, config, part, world=2):
        assert found == [(2.0**10,) * 3, (2.0**9,) * 3, (2.0**9,) * 3]


def counts_of_tokens(config: RunConfig) -> set[str]:
    """Return the formats in which routers count what goes to an expert."""
    with running(config) as engine:
        return {str(router.local_tokens_per_expert.dtype) for router in engine._routers().values()}  # type: ignore[attr-defined]


def test_routers_count_in_fp32(pool: WorkerPool) -> None:
    """In bf16, which Megatron-Core casts counts to, 257 tokens are 256, and fp16 has no number above 65504."""
    config = engine_config("megatron", {}, SIGMOID_MOE, precision={"name": "bf16"})
    assert pool.run(counts_of_tokens, config, world=1) == [{"torch.float32"}]


def fusions(config: RunConfig) -> tuple[bool, bool]:
    """Return Megatron-Core's own fusions on CUDA: activation with bias, softmax with mask."""
    import_megatron(torch.device("cpu"))
    from dist_llm.engine.megatron_fused import Fused
    from dist_llm.engine.megatron_model import _layout_settings

    settings = _layout_settings(config, [], True, Fused())
    return settings["bias_activation_fusion"], settings["masked_softmax_fusion"]


@pytest.mark.parametrize(("model", "fused"), [({}, True), ({**GPT2, "dropout": 0.0}, False)])
def test_fusions_compute_what_is_asked_for(pool: WorkerPool, model: dict[str, object], fused: bool) -> None:
    assert pool.run(fusions, engine_config("megatron", {}, model), world=1) == [(fused, False)]


def fused_parts(config: RunConfig, cuda: bool, present: tuple[str, ...]) -> tuple[bool, bool, bool]:
    """Return which fused parts are chosen where these packages are the real ones: layers, norms, accumulation."""
    import_megatron(torch.device("cpu"))
    from dist_llm.engine import megatron_fused

    spec = megatron_fused.importlib.util.find_spec

    def found(name: str) -> Any:
        return SimpleNamespace(usable=name in present)

    def part(name: str) -> Any:
        return True if name == "fused_weight_gradient_mlp_cuda" and "apex" in present else spec(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron_fused, "find_extension", found)
        patch.setattr(megatron_fused, "HAVE_FUSED_LAYER_NORM", "apex" in present)
        patch.setattr(megatron_fused.importlib.util, "find_spec", part)
        chosen = megatron_fused.find_fused(config, cuda)
    return chosen.layers, chosen.norms, chosen.accumulation


BOTH_FUSED = ("apex", "transformer-engine")
NO_BIAS = {**GPT2, "bias": False, "dropout": 0.0}


@pytest.mark.parametrize(
    ("present", "model", "engine", "chosen"),
    [
        ((), GPT2, {}, (False, False, False)),
        (("apex",), GPT2, {}, (False, True, True)),
        (("apex",), {}, {}, (False, False, True)),
        (("apex",), NO_BIAS, {}, (False, False, True)),
        (("transformer-engine",), GPT2, {}, (True, False, False)),
        (BOTH_FUSED, GPT2, {}, (True, False, True)),
        (BOTH_FUSED, NO_BIAS, {}, (False, False, True)),
        (BOTH_FUSED, {}, {"transformer_engine": "never"}, (False, False, True)),
        (("transformer-engine",), {}, {"transformer_engine": "never"}, (False, False, False)),
    ],
)
def test_fused_parts_are_the_real_ones(
    pool: WorkerPool,
    present: tuple[str, ...],
    model: dict[str, object],
    engine: dict[str, object],
    chosen: tuple[bool, bool, bool],
) -> None:
    config = engine_config("megatron", {}, {**model, "dropout": 0.0}, engine={"name": "megatron", **engine})
    assert pool.run(fused_parts, config, True, present, world=1) == [chosen]
    assert pool.run(fused_parts, config, False, present, world=1) == [(False, False, False)]
