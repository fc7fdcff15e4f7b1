"""Each command calls one function of a lower layer with what the user said, and answers with an exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.config.document import parse_document
from dist_llm.errors import ExitCode


class _Call:
    """A function that remembers how it was called and returns what it is told to."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.args, self.kwargs = answer, (), {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.args, self.kwargs = args, kwargs
        return self.answer


@pytest.fixture
def replace(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Any], _Call]:
    """Put a remembering function in place of `module.name`."""

    def put(path: str, answer: Any) -> _Call:
        call = _Call(answer)
        monkeypatch.setattr(path, call)
        return call

    return put


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Return overrides that read a small corpus and cache beside it."""
    (tmp_path / "text").mkdir()
    for index, source in enumerate((json.__file__, argument_source())):
        (tmp_path / "text" / f"{index}.txt").write_text(Path(source).read_text())
    cache = f"data.cache_dir={tmp_path / 'cache'}"
    return [f"data.path={tmp_path / 'text'}", cache, "model.vocab_size=500", "data.seq_len=64"]


def argument_source() -> str:
    """Return the path of a long file of code."""
    import argparse

    return argparse.__file__


@pytest.mark.parametrize("code", [ExitCode.DONE, ExitCode.PREEMPTED])
def test_launch_starts_the_ranks(code: ExitCode, replace: Callable[[str, Any], _Call]) -> None:
    call = replace("dist_llm.launcher.local.launch_local", int(code))
    assert main(["launch", "parallel=tp2", "launcher.nproc=4", "run.name=x"]) == code
    assert call.args[0][1:] == ("-m", "dist_llm", "train", "parallel=tp2", "launcher.nproc=4", "run.name=x")
    assert call.args[1] == 4


@pytest.mark.parametrize("ok", [True, False])
def test_verify_layout_compares(
    ok: bool, replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]
) -> None:
    facts = {
        "ok": ok,
        "steps": 3,
        "bounds": {"relative": 1e-5},
        "layouts": [{"layout": "tp2", "loss": 1.251e-7, "ok": ok}],
        "not_legal": {"pp4": "parallel.pipeline=4 is too many"},
    }
    call = replace("dist_llm.train.verify.verify_layout", facts)
    words = ["verify", "layout", "experiment=quickstart", "--fp64", "--steps", "3", "--layouts", "tp"]
    assert main([*words, "--json"]) == (ExitCode.DONE if ok else ExitCode.NUMERICS)
    assert json.loads(capsys.readouterr().out) == facts
    assert {key: call.kwargs[key] for key in ("precision", "steps", "layouts", "chosen")} == {
        "precision": "fp64",
        "steps": 3,
        "layouts": "tp",
        "chosen": "quick",
    }
    assert call.args[0].run.name == "quickstart"
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "steps: 3",
        "bounds: relative 1e-05",
        "",
        "layout  loss     ok",
        f"tp2     1.3e-07  {'yes' if ok else 'NO'}",
        "",
        "not legal: pp4 parallel.pipeline=4 is too many",
        "equal" if ok else "NOT EQUAL",
    ]


def test_verify_layout_says_where_it_first_differs(
    replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"step": 2, "phase": "gradient", "parameter": "embed.tokens.weight", "axis": "dp", "gap": 0.5125}
    more = {"differing": 38, "evidence": "replicas differ", "smallest_layout": "data=2"}
    rows = [
        {"layout": "dp2", "ok": False, "first_divergence": {**found, **more}},
        {"layout": "tp2", "ok": True, "first_divergence": None},
    ]
    call = replace("dist_llm.train.verify.verify_layout", {"ok": False, "layouts": rows})
    words = ["verify", "layout", "experiment=quickstart", "--precision", "bf16", "--set", "all"]
    assert main(words) == ExitCode.NUMERICS
    assert (call.kwargs["precision"], call.kwargs["chosen"]) == ("bf16", "all")
    assert capsys.readouterr().out.splitlines() == [
        "",
        "layout  ok",
        "dp2     NO",
        "tp2     yes",
        "",
        "dp2: first differs at step 2 in the gradient, embed.tokens.weight (0.51; 38 beyond the bound), over dp "
        "(replicas differ); the smallest layout that differs: data=2",
        "NOT EQUAL",
    ]


def test_verify_resume_compares(replace: Callable[[str, Any], _Call]) -> None:
    call = replace("dist_llm.train.verify_resume.verify_resume", {"ok": True, "cases": []})
    assert main(["verify", "resume", "--steps", "4"]) == 0
    assert call.kwargs["steps"] == 4


def test_verify_engine_compares(replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]) -> None:
    row = {"layout": "dp2", "engine": "deepspeed", "loss": 3.21e-7, "grad_norm": None, "ok": False}
    facts = {"ok": False, "layouts": [row], "left_out": {"megatron": "pip install 'dist-llm[megatron]'"}}
    call = replace("dist_llm.train.verify_engine.verify_engine", facts)
    words = ["verify", "engine", "--engines", "native,deepspeed", "--steps", "4", "--layouts", "data", "--no-switch"]
    assert main(words) == ExitCode.NUMERICS
    assert {name: call.kwargs[name] for name in ("engines", "layouts", "steps", "switch")} == {
        "engines": ("native", "deepspeed"),
        "layouts": "data",
        "steps": 4,
        "switch": False,
    }
    assert capsys.readouterr().out.splitlines() == [
        "",
        "layout  engine     loss     grad norm  ok",
        "dp2     deepspeed  3.2e-07  -          NO",
        "",
        "left out: megatron pip install 'dist-llm[megatron]'",
        "NOT EQUAL",
    ]


BENCH_ROW = {
    "engine": "native",
    "step_seconds": 0.5,
    "fastest_step_seconds": 0.25,
    "slowest_step_seconds": 1.0,
    "tokens_per_second": 4096.0,
    "ratio": 1.0,
    "least_ratio": 1.0,
    "greatest_ratio": 1.0,
    "mfu": 0.125,
    "peak_memory_gib": 0.5,
    "state_bytes": 2**20,
    "collectives": 3,
    "sent_bytes": 2**21,
    "loss": 2.0,
}
BENCH_TRAFFIC = {
    "engine": "native",
    "kind": "send",
    **dict.fromkeys(("count", "all_count"), 3),
    **{f"{which}{what}_bytes": 2**21 for which in ("", "all_") for what in ("payload", "sent")},
}
BENCH_SETTING = dict.fromkeys(
    ("layout", "batch", "precision", "device", "processor", "cores", "threads", "torch", "steps", "repeats"), 1
)


@pytest.mark.parametrize(
    ("words", "engines"),
    [
        ([], None),
        (["engine=all"], None),
        (["engine=native"], ("native",)),
        (["engine=deepspeed"], ("native", "deepspeed")),
        (["engine.name=megatron"], ("native", "megatron")),
        (["engine=[megatron,deepspeed]", "engine.overlap=false"], ("megatron", "deepspeed")),
    ],
    ids=str,
)
def test_bench_step_times_engines(
    words: list[str],
    engines: tuple[str, ...] | None,
    replace: Callable[[str, Any], _Call],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = {"engines": [BENCH_ROW], "collectives": [BENCH_TRAFFIC], "left_out": {"megatron": "it is missing"}}
    call = replace("dist_llm.train.bench_step.bench_step", {**BENCH_SETTING, **rows})
    assert main(["bench", "step", *words, "--steps", "2", "--repeats", "7"]) == 0
    assert {name: call.kwargs[name] for name in ("engines", "steps", "repeats")} == {
        "engines": engines,
        "steps": 2,
        "repeats": 7,
    }
    lines = capsys.readouterr().out.splitlines()
    native = "native  500.0 (250.0-1000.0)     4,096  1.000 (1.000-1.000)      2.00            3     0.500       1.00"
    assert f"{native}  12.5 %  2.000000" in lines
    assert "left out: megatron: it is missing" in lines


def test_generate_passes_all_on(replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]) -> None:
    call = replace("dist_llm.evaluate.generate.generate_text", "def f(): pass")
    words = [
        "generate",
        "runs/x",
        "--prompt",
        "def",
        "--max-tokens",
        "5",
        "--temperature",
        "0",
        "--top-k",
        "3",
        "--seed",
        "9",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == "def f(): pass\n"
    assert call.args == (Path("runs/x"), "def", 5, 0.0, 3, 9)


def test_checkpoint_verify_says_damaged(
    tmp_path: Path, replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    call = replace("dist_llm.checkpoint.inspect.verify", ["rank-00000.safetensors: chunk 3 is damaged"])
    assert main(["checkpoint", "verify", str(tmp_path)]) == ExitCode.BAD_DATA
    assert "chunk 3 is damaged" in capsys.readouterr().out
    assert call.args == (tmp_path,)
    replace("dist_llm.checkpoint.inspect.verify", [])
    assert main(["checkpoint", "verify", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True


def test_checkpoint_inspect_takes_the_newest(
    tmp_path: Path, replace: Callable[[str, Any], _Call], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "checkpoints").mkdir()
    newest = tmp_path / "checkpoints" / "step-00000020"
    row = {"step": 20, "path": str(newest), "ranks": 2, "tensors": 3, "bytes": 2**20, "problem": None}
    replace("dist_llm.checkpoint.inspect.list_checkpoints", [row, {**row, "step": 10, "problem": "cut short"}])
    tensor = {"dtype": "F32", "shape": [2, 3], "bytes": 24}
    call = replace("dist_llm.checkpoint.inspect.describe", {"step": 20, "tensors": {"model.x": tensor}})
    assert main(["checkpoint", "inspect", str(tmp_path)]) == 0
    assert call.args == (newest,)
    assert "model.x  F32 [2, 3]" in capsys.readouterr().out
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "step 20  3 tensors  1.00 MiB  written by 2 ranks" in listed[0]
    assert "damaged: cut short" in listed[1]


def test_train_hands_over_the_resolved_config(
    replace: Callable[[str, Any], _Call], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, {"RANK": "3", "LOCAL_RANK": "3"}.get(name, "4"))
    outcome = type("Outcome", (), {"report_due": True, "code": ExitCode.PREEMPTED})()
    call = replace("dist_llm.train.setup.run", outcome)
    assert main(["train", "experiment=quickstart", "run.dir=/tmp/a b"]) == ExitCode.PREEMPTED
    config, text, ranks = call.args
    assert (ranks.rank, ranks.world_size) == (3, 4)
    assert parse_document(text, "test")["run"] == config.run.model_dump()


def test_data_commands(corpus: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "prepare", "--json", *corpus]) == 0
    prepared = json.loads(capsys.readouterr().out)
    assert prepared["num_documents"] == 2
    assert main(["data", "tokenizer", "--json", "--text", "def f(x): é", *corpus]) == 0
    tokenizer = json.loads(capsys.readouterr().out)
    assert tokenizer["vocab_size"] == 500
    assert len(tokenizer["tokens"]) == len(tokenizer["pieces"])
    assert main(["data", "inspect", "--json", "--document", "1", *corpus]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith(Path(argument_source()).read_text()[:20])
    assert main(["data", "inspect", "--document", "2", *corpus]) == ExitCode.CONFIG
    assert main(["data", "verify", *corpus]) == 0
    assert main(["data", "verify", "--prefix", prepared["prefix"], "--vocab-size", "20"]) == ExitCode.BAD_DATA
    assert "outside model.vocab_size=20" in capsys.readouterr().out
    assert main(["data", "tokenizer", "--output", str(tmp_path / "new.model"), *corpus]) == 0
    assert (tmp_path / "new.model").stat().st_size > 1000


def test_data_errors_have_their_codes(corpus: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["data", "prepare", *corpus, f"data.path={tmp_path / 'empty'}"]) == ExitCode.BAD_DATA
    assert main(["data", "prepare", *corpus, f"data.path={tmp_path / 'missing'}"]) == ExitCode.IO
    assert main(["data", "prepare", *corpus, "model.vocab_size=90000"]) == ExitCode.CONFIG


def test_plan_layouts_judges_lists_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "schedule.png"
    words = [
        "plan",
        "layouts",
        "experiment=quickstart",
        "parallel.schedule=zbv",
        "--json",
        "--schedule-trace",
        str(picture),
    ]
    assert main(words) == ExitCode.DONE
    answer = json.loads(capsys.readouterr().out)
    assert answer["legal"]
    assert answer["ranks"] == 8
    assert len(answer["layouts"]) > 50
    assert 0 < answer["schedule"]["idle_share"] < 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(["plan", "layouts", "experiment=quickstart", "parallel.tensor=3", "--json"]) == ExitCode.CONFIG
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"]
    assert [violation["key"] for violation in answer["violations"]] == ["parallel.tensor", "data.seq_len", "ranks"]
    assert len(answer["nearest"]) == 3
    assert main(["plan", "layouts", "parallel.tensor=3", "parallel.zero=5", "--ranks", "8"]) == ExitCode.CONFIG
    errors = capsys.readouterr().err
    assert all(key in errors for key in ("parallel.tensor=3", "parallel.zero=5", "ranks=8"))
    words = ["plan", "layouts", "model=llama-tiny", "--ranks", "4"]
    assert [main(words), main([*words, "--all"])] == [ExitCode.DONE, ExitCode.DONE]
    few, every = capsys.readouterr().out.split("ranks: 4\n")[1:]
    assert "the 20 nearest" in few
    assert len(few.splitlines()) < len(every.splitlines()) > 100
    assert main(["plan", "layouts", "--ranks", "0"]) == ExitCode.CONFIG
    assert main(["plan", "layouts", "--ranks", "1", "--schedule-trace", str(picture)]) == ExitCode.CONFIG
