"""What is asked for and what is to be had decide what computes an op; what is of no use is named and never fatal."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
import torch

from dist_llm.config.decode import decode
from dist_llm.config.kernels import KernelsConfig
from dist_llm.engine.kernels import foretold_kernels, kernels_for
from dist_llm.errors import ConfigError, ExitCode
from dist_llm.models.kernels import apply_kernels
from dist_llm.models.transformer import Transformer
from dist_llm.ops import native
from dist_llm.ops.backends import AUTO, NATIVE, REFERENCE, TORCH, TRITON, kernel
from dist_llm.ops.native import FACTS, LIBRARY, NativeLibrary, native_library, open_library
from dist_llm.ops.registry import BACKENDS, CUSTOM_OPS, Kernels, Place, choose_kernels, native_problem
from dist_llm.ops.triton.here import triton_problem
from tests.parallel.tiny import LLAMA, MOE, tiny_config

needs_library = pytest.mark.skipif(
    native_library().problem is not None, reason=f"kernels: no native library here: {native_library().problem}"
)

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton: not installed (it is for Linux alone)")
CPU, GPU = Place("cpu", torch.float32), Place("cuda", torch.bfloat16)


def _copy(folder: Path) -> Path:
    source = Path(native.__file__).parent
    for name in (LIBRARY, FACTS):
        shutil.copy(source / name, folder / name)
    return folder


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("dist_llm.ops.registry.native_library", lambda: NativeLibrary("there was no compiler: buy"))
    native_problem.cache_clear()
    yield
    native_problem.cache_clear()


@needs_library
def test_the_fastest_is_taken_and_a_wish_is_heard() -> None:
    assert choose_kernels({}, True, CPU).kernels == Kernels(
        rms_norm=NATIVE, gelu=NATIVE, swiglu=NATIVE, rope=NATIVE, cross_entropy=NATIVE
    )
    in_bf16 = replace(CPU, dtype=torch.bfloat16)
    chosen = choose_kernels({"rms_norm": "torch", "layer_norm": "native"}, True, in_bf16)
    assert (chosen.kernels.rms_norm, chosen.kernels.layer_norm) == (TORCH, NATIVE)
    assert "native (" in str(chosen)
    assert choose_kernels({}, True, in_bf16).kernels == Kernels()


@needs_triton
def test_a_gpu_computes_with_triton_where_that_moves_fewer_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_llm.ops.registry.triton_problem", lambda device: None)
    chosen = choose_kernels({}, True, GPU).kernels
    kernels = dict.fromkeys(("rms_norm", "layer_norm", "swiglu", "rope", "cross_entropy"), TRITON)
    assert chosen == Kernels(**kernels)
    for name, schema in ((name, schema) for op in kernels for name, schema in CUSTOM_OPS[op].schemas.items()):
        assert str(kernel(name, TRITON)._schema) == f"dist_llm::{name}.triton{schema}"  # type: ignore[attr-defined]
        key = f"dist_llm::{name}.triton", "CUDA"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(*key)
    # What inductor compiles it fuses; the loss is outside of that.
    assert choose_kernels({}, True, replace(GPU, compiled=True)).kernels == Kernels(cross_entropy=TRITON)
    assert choose_kernels({"rope": "triton"}, True, replace(GPU, compiled=True)).kernels.rope == TRITON
    assert choose_kernels({}, True, replace(GPU, dtype=torch.float64)).kernels == Kernels()


@needs_triton
def test_a_row_that_triton_cannot_hold_falls_back_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_llm.ops.registry.triton_problem", lambda device: None)
    wide = tiny_config(None, {**LLAMA, "hidden_size": 12288, "num_heads": 96})
    chosen = kernels_for(wide, torch.device("cuda"))
    assert (chosen.rms_norm, chosen.layer_norm, chosen.swiglu) == (TORCH, TORCH, TRITON)
    required = wide.model_copy(update={"kernels": KernelsConfig(rms_norm="triton", required=True)})
    with pytest.raises(
        ConfigError, match="rms_norm=triton cannot be had: triton's rms_norm holds rows of up to 8192 "
    ) as caught:
        kernels_for(required, torch.device("cuda"))
    assert caught.value.exit_code == ExitCode.CONFIG


def test_a_gpus_kernels_are_foretold_as_the_defaults() -> None:
    """A dry run is where the GPU is not: what computes there holds no more."""
    config = tiny_config(None, LLAMA)
    cluster = config.cluster.model_copy(update={"device": "cuda"})
    asked = config.model_copy(update={"kernels": KernelsConfig(rope="triton"), "cluster": cluster})
    assert foretold_kernels(asked) == Kernels()


def test_without_triton_or_a_gpu_the_next_best_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_llm.ops.triton.here.find_spec", lambda name: None)
    monkeypatch.setattr("dist_llm.ops.registry.triton_problem", triton_problem.__wrapped__)
    chosen = choose_kernels({}, False, GPU)
    assert chosen.kernels == Kernels(rms_norm=TORCH)
    assert "(triton is not installed: pip install 'dist-llm[triton]')" in str(chosen)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_triton_without_a_gpu_says_so() -> None:
    assert str(triton_problem("cuda")).startswith("triton finds no GPU that it can use: 0 active drivers")
    fallback = choose_kernels({"gelu": "triton"}, False, CPU).fallbacks["gelu"]
    assert fallback == "triton's kernels are for GPUs, not cpu; TRITON_INTERPRET=1 tests them on a CPU"


def test_what_no_kernel_computes_falls_back_and_says_why() -> None:
    wide = replace(CPU, dtype=torch.float64)
    chosen = choose_kernels({"rms_norm": "native"}, False, wide)
    assert chosen.kernels == Kernels()
    assert "native kernels compute fp32, bf16 and fp16, not float64" in str(chosen)
    cuda = choose_kernels({"gelu": "native"}, False, GPU)
    assert cuda.fallbacks["gelu"] == "native gelu is for cpu alone, not cuda"
    split = choose_kernels({"cross_entropy": "torch"}, False, replace(CPU, vocabulary_ranks=2))
    assert split.fallbacks["cross_entropy"] == "torch's cross_entropy needs the whole vocabulary, which 2 ranks share"


def test_required_makes_a_fallback_an_error() -> None:
    wanted = {"rms_norm": "native", "swiglu": "native"}
    with pytest.raises(ConfigError, match=r"kernels.rms_norm=native cannot be had: native kernels compute") as caught:
        choose_kernels(wanted, True, replace(CPU, dtype=torch.float64))
    assert caught.value.exit_code == ExitCode.CONFIG
    assert [violation.key for violation in caught.value.violations] == ["kernels.rms_norm", "kernels.swiglu"]


def test_settings_offer_what_the_registry_has() -> None:
    for op, backends in BACKENDS.items():
        known = get_args(KernelsConfig.model_fields[op].annotation)
        assert sorted(known) == sorted((AUTO, *backends))
    assert set(BACKENDS) == set(vars(Kernels()))


@pytest.mark.usefixtures("without_library")
def test_without_a_library_the_reference_computes_and_one_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(None, LLAMA)
    logging.getLogger("dist_llm").propagate = True
    with caplog.at_level(logging.INFO, "dist_llm"):
        for _ in range(2):
            assert replace(kernels_for(config, torch.device("cpu")), linear=REFERENCE) == Kernels()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "there was no compiler: buy" in caplog.text
    required = config.model_copy(update={"kernels": config.kernels.model_copy(update={"required": True})})
    with pytest.raises(ConfigError, match=r"kernels.rms_norm=auto cannot be had: there is no native library"):
        kernels_for(required, torch.device("cpu"))


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    tree = tiny_config(None, LLAMA).model_dump(mode="json")
    tree["kernels"] = {"rope": "torch"}
    with pytest.raises(ConfigError, match=r"kernels.rope=torch.*use auto, reference, native or triton"):
        decode(tree)


def test_every_module_of_a_model_takes_the_choice() -> None:
    model = Transformer(tiny_config(None, {**LLAMA, "qk_norm": True}).model)
    apply_kernels(model, Kernels(rms_norm="native"))
    norms = [module for name, module in model.named_modules() if name.endswith("norm")]
    assert len(norms) > 4
    assert all(norm.kernels.rms_norm == "native" for norm in norms)


@needs_library
@pytest.mark.parametrize(
    ("op", "settings"), [("gelu", {"activation": "gelu_tanh"}), ("swiglu", {}), ("rope", {}), ("swiglu", MOE)], ids=str
)
def test_a_model_computes_with_the_kernel_it_was_given(op: str, settings: dict[str, object]) -> None:
    assert native_problem(op) is None
    model = Transformer(tiny_config(None, {**LLAMA, **settings}).model)
    apply_kernels(model, Kernels(**{op: NATIVE}))
    tokens = torch.arange(8).view(1, 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.1, 0.1)
        model(tokens)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            model(tokens)
    assert f"dist_llm::{op}" in {event.key for event in profile.key_averages()}


@needs_library
def test_a_damaged_library_is_not_loaded(tmp_path: Path) -> None:
    library = _copy(tmp_path) / LIBRARY
    whole = library.read_bytes()
    for damage in (whole[: len(whole) // 2], whole[:5000] + b"\xff" + whole[5001:], b""):
        library.write_bytes(damage)
        assert "is damaged (its checksum is another" in str(open_library(tmp_path).problem)
    library.unlink()
    assert "holds no whole build (FileNotFoundError" in str(open_library(tmp_path).problem)
    (tmp_path / FACTS).write_text("{")
    assert "holds no whole build (JSONDecodeError" in str(open_library(tmp_path).problem)


@needs_library
def test_a_library_that_torch_cannot_load_is_named(tmp_path: Path) -> None:
    """As with a torch that lacks a symbol: the checksum is right, and the loader refuses."""
    import hashlib

    _copy(tmp_path)
    (tmp_path / LIBRARY).write_bytes(b"\x7fELF no library of this machine")
    facts = json.loads((tmp_path / FACTS).read_text())
    facts["sha256"] = hashlib.sha256((tmp_path / LIBRARY).read_bytes()).hexdigest()
    (tmp_path / FACTS).write_text(json.dumps(facts))
    problem = str(open_library(tmp_path).problem)
    assert f"torch {torch.__version__} cannot load {tmp_path / LIBRARY} (" in problem


def test_a_build_without_a_compiler_says_so(tmp_path: Path) -> None:
    assert "none is installed: pip install" in str(open_library(tmp_path).problem)
    (tmp_path / FACTS).write_text('{"built": false, "reason": "no C++ compiler"}')
    assert str(open_library(tmp_path).problem).startswith("there was no C++ compiler: pip install")


@needs_library
@pytest.mark.parametrize("isa", ["base", "avx2", "avx512", "sse9"])
def test_every_instruction_set_computes_the_same(isa: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, since the set is picked once. One that the processor lacks is refused by name."""
    program = (
        "from dist_llm.ops.native import native_library; from tests.kernels.every_isa import largest_gap;"
        "l = native_library(); print(l.isa, largest_gap() if l.problem is None else l.problem)"
    )
    monkeypatch.setenv("DIST_LLM_CPU_ISA", isa)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    name, _, rest = done.stdout.strip().partition(" ")
    if name == isa:
        assert float(rest) <= 1.0
    else:
        assert f"DIST_LLM_CPU_ISA={isa} must be one that this processor has: base" in done.stdout
        assert isa != "base"
