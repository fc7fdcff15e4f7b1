"""`dist-llm plan predict`: rows of settings, what they leave out, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.compose import compose
from dist_llm.cli.main import main
from dist_llm.cli.rows import read_row
from dist_llm.config.decode import decode
from dist_llm.config.document import render_document
from dist_llm.errors import ConfigError, ExitCode

GPT: dict[str, object] = {
    "cluster": "a100-80gb",
    "model.num_layers": 24,
    "model.hidden_size": 2048,
    "data.seq_len": 1024,
    "data.global_batch": 32,
    "data.microbatch": 2,
}


def answers(tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str]) -> list[dict[str, Any]]:
    """Return what a file of rows is answered with."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert main(["plan", "predict", "--rows", str(path)]) == ExitCode.DONE
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_rows_are_answered_in_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    batches = [8, 16, 32]
    lines = [json.dumps({"overrides": GPT | {"data.global_batch": batch}}) for batch in batches]
    found = answers(tmp_path, capsys, lines)
    seconds = [answer["step_seconds"] for answer in found]
    assert seconds == sorted(seconds)
    assert len(seconds) == 3
    assert {"components", "stages", "mfu", "bound_by", "ranks", "nodes", "memory_gib"} <= found[0].keys()
    assert sum(found[0]["components"].values()) == pytest.approx(seconds[0])


def test_a_bad_row_is_answered_with_its_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = [
        json.dumps({"overrides": GPT | {"parallel.tensor": 5}}),
        json.dumps({"overrides": GPT | {"model.num_heds": 4}}),
        json.dumps({"overrides": GPT | {"cluster": "a100"}}),
        json.dumps({"overrides": GPT | {"data.global_batch": -1}}),
        json.dumps({"overrides": GPT | {"model.num_layers": "many"}}),
        json.dumps({"overrides": GPT | {"cluster.nodes": 2, "parallel.data": 32}}),
        json.dumps(["overrides"]),
        "{",
        "",
    ]
    good = json.dumps({"overrides": GPT})
    found = answers(tmp_path, capsys, [*bad, good])
    named = ("parallel.tensor=5", "model.num_heads", "a100-80gb", "data.global_batch=-1", "model.num_layers")
    named += ("cluster.nodes=2 have 16 devices for 32 ranks; use 4", "", "", "")
    for answer, words in zip(found, named, strict=False):
        assert answer.keys() == {"error"}
        assert words in answer["error"]
    assert found[-1]["step_seconds"] > 0


def test_a_row_is_what_the_command_line_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = answers(tmp_path, capsys, [json.dumps({"overrides": GPT | {"precision": "fp16", "parallel.data": 4}})])
    words = [f"{key}={value}" for key, value in GPT.items()]
    assert main(["plan", "predict", *words, "precision=fp16", "parallel.data=4", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out) == row


def test_numbers_are_read_as_writers_of_json_write_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = GPT | {"parallel.tensor": 2, "parallel.sequence": True, "parallel.data": None}
    odd = GPT | {"parallel.tensor": 2.0, "parallel.sequence": "True", "parallel.data": "null", "data.seq_len": "1024"}
    first, second = answers(tmp_path, capsys, [json.dumps({"overrides": row}) for row in (plain, odd)])
    assert first == second


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["cluster=a100-80gb", "model.hidden_size=12288", "data.seq_len=2048"]
    for layers, fits in ((1, True), (96, False)):
        assert main(["plan", "predict", *words, f"model.num_layers={layers}", "--json"]) == ExitCode.DONE
        found = json.loads(capsys.readouterr().out)
        assert found["fits"] is fits
        assert (found["memory_gib"]["peak"] <= found["memory_gib"]["capacity"]) is fits
        assert main(["plan", "predict", *words, f"model.num_layers={layers}"]) == ExitCode.DONE
        assert ("NOT FIT" in capsys.readouterr().out) is not fits


def test_a_written_plan_is_foretold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "plan.yaml")
    asked = ["budget.flops=1e20", "cluster=h100-sxm", "cluster.nodes=1", "--write", file, "--json"]
    assert main(["plan", *asked]) == ExitCode.DONE
    plan = json.loads(capsys.readouterr().out)
    assert main(["plan", "predict", "--config", file, "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["step_seconds"] == pytest.approx(plan["step_seconds"])
    assert main(["plan", "predict", "--config", file, "parallel.recompute=full", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["step_seconds"] > plan["step_seconds"]


def test_ranks_of_a_config_file_are_its_launchers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(render_document(decode(compose(["model=llama-tiny", "launcher.nproc=2", "parallel.zero=3"]))))
    assert main(["plan", "predict", "--config", str(file), "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["ranks"] == 2


def test_without_a_batch_each_pipeline_is_filled_once(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=llama3-8b", "cluster=h100-sxm", "parallel.data=8", "parallel.pipeline=2", "data.seq_len=4096"]
    assert main(["plan", "predict", *words, "data.microbatch=2", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["global_batch"] == 8 * 2 * 2


def test_overrides_stand_before_those_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"overrides": {"cluster": "h100-sxm"}}), encoding="utf-8")
    words = [f"{key}={value}" for key, value in GPT.items()]
    assert main(["plan", "predict", *words, "--rows", str(path)]) == ExitCode.DONE
    fast = json.loads(capsys.readouterr().out)["step_seconds"]
    assert main(["plan", "predict", *words, "--json"]) == ExitCode.DONE
    assert fast < json.loads(capsys.readouterr().out)["step_seconds"]


def test_text_names_what_takes_longest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "predict", *[f"{key}={value}" for key, value in GPT.items()]]) == ExitCode.DONE
    text = capsys.readouterr().out
    assert "MFU" in text
    assert "matmul" in text


def test_a_file_that_is_not_there() -> None:
    assert main(["plan", "predict", "--rows", "nowhere.jsonl"]) == ExitCode.CONFIG


def test_rows_are_lines_of_json_under_json_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([json.dumps({"overrides": GPT})] * 2))
    assert main(["plan", "predict", "--rows", str(path), "--json"]) == ExitCode.DONE
    assert [json.loads(line)["ranks"] for line in capsys.readouterr().out.splitlines()] == [1, 1]


def test_a_row_that_is_no_text_or_too_long_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, good = tmp_path / "rows.jsonl", json.dumps({"overrides": GPT}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join([good, b"\xff\xfe", b'{"overrides": {"x": "' + b"y" * 2**20, good]))
    assert main(["plan", "predict", "--rows", str(path)]) == ExitCode.DONE
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert ["error" in answer for answer in found] == [False, True, True, False]


def test_sizes_alone_make_a_gpt() -> None:
    model = read_row(GPT)[0].model
    assert (model.family, model.ffn_hidden_size, model.num_heads, model.vocab_size) == ("gpt2", 8192, 16, 51200)
    assert (model.position, model.activation, model.tie_embeddings, model.max_seq_len) == (
        "learned",
        "gelu_tanh",
        True,
        1024,
    )


def test_sizes_and_a_family_make_a_llama() -> None:
    model = read_row(GPT | {"model.family": "llama", "model.hidden_size": 4096})[0].model
    assert (model.ffn_hidden_size, model.num_heads, model.kv_heads) == (11008, 32, 32)
    assert (model.position, model.norm, model.activation, model.bias) == ("rope", "rmsnorm", "swiglu", False)


def test_what_a_row_gives_is_kept() -> None:
    given = {"model.ffn_hidden_size": 4096, "model.num_heads": 32, "model.vocab_size": 1000, "precision": "fp32"}
    config, _ = read_row(GPT | given)
    model = config.model
    assert (model.ffn_hidden_size, model.num_heads, model.vocab_size, config.precision.name) == (4096, 32, 1000, "fp32")


def test_a_preset_is_not_completed() -> None:
    config, _ = read_row({"model": "llama3-8b", "cluster": "h100-sxm", "model.num_layers": 16, "data.seq_len": 4096})
    assert (config.model.num_layers, config.model.ffn_hidden_size, config.model.num_kv_heads) == (16, 14336, 8)
    assert config.precision.name == "bf16"


@pytest.mark.parametrize(
    ("changes", "ranks"),
    [
        ({"parallel.tensor": 2, "parallel.pipeline": 2}, 4),
        ({"parallel.tensor": 2, "parallel.data": 4}, 8),
        ({"cluster.nodes": 2, "parallel.tensor": 2}, 16),
        ({"launcher.nproc": 8}, 8),
        ({"launcher.nodes": 2, "launcher.nproc": 4, "cluster.nodes": 64}, 8),
    ],
)
def test_ranks(changes: dict[str, object], ranks: int) -> None:
    assert read_row(GPT | changes)[1] == ranks


def test_chunks_are_interleaved() -> None:
    config, _ = read_row(GPT | {"parallel.pipeline": 2, "parallel.virtual_pipeline": 3})
    assert config.parallel.schedule == "interleaved"


def test_published_steps_may_leave_a_pipeline_unfilled() -> None:
    config, ranks = read_row(GPT | {"parallel.pipeline": 4, "data.global_batch": 4})
    assert (config.parallel.schedule, ranks) == ("1f1b", 4)
    with pytest.raises(ConfigError, match=r"parallel\.pipeline=4"):
        read_row(GPT | {"parallel.pipeline": 4, "data.global_batch": 4, "parallel.schedule": "dualpipev"})


def test_former_names_of_clusters() -> None:
    assert read_row(GPT | {"cluster": "h200-sxm"})[0].cluster.name == "h200"


@pytest.mark.parametrize(
    "odd", [{"model.family": ["x"]}, {"data": 5}, {"parallel": 5}, {"cluster": 7}, {"model": None}]
)
def test_an_odd_row_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: dict[str, object]
) -> None:
    lines = [json.dumps({"overrides": each}) for each in (GPT, GPT | odd, GPT)]
    found = answers(tmp_path, capsys, lines)
    assert [*found[1]] == ["error"]
    assert found[0] == found[2]
