"""What a plan says of itself is true of it, and what a refusal names is possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_llm.accounting.params import num_parameters
from dist_llm.cli.main import main
from dist_llm.config.decode import decode
from dist_llm.errors import ExitCode

EIGHT = ("cluster=h100-sxm", "cluster.nodes=8")


class Asked:
    """The command's answers under --json, strictly read."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def answer(self, code: ExitCode, words: tuple[str, ...]) -> dict[str, Any]:
        """Return what the command answers with this exit code."""
        assert main(["plan", *words, "--json"]) == code

        def refuse(word: str) -> None:
            raise ValueError(f"{word} is not JSON")

        found: dict[str, Any] = json.loads(self._capsys.readouterr().out, parse_constant=refuse)
        return found

    def plan(self, *words: str) -> dict[str, Any]:
        """Return a plan."""
        return self.answer(ExitCode.DONE, words)

    def near(self, *words: str) -> dict[str, Any]:
        """Return what a refusal says is near, by key."""
        refusal = self.answer(ExitCode.CONFIG, words)
        assert all(v["key"].partition(".")[0] != "preset" for v in refusal["violations"])
        return {violation["key"]: violation["legal"] for violation in refusal["violations"]}

    def why(self, *words: str) -> str:
        """Return all reasons of a plan."""
        return "\n".join(reason["because"] for reason in self.plan(*words)["reasons"])


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Asked:
    """Return the command."""
    return Asked(capsys)


def test_dense_layers_before_experts_are_counted(asked: Asked, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    experts = ("num_experts=8", "top_k=2", "num_shared=1", "num_dense_layers=3", "ffn_hidden_size=512")
    moe = [f"model.moe.{setting}" for setting in experts]
    found = asked.plan("budget.flops=1e20", *EIGHT, *moe, "--write", str(path))
    assert found["model"]["num_params"] == num_parameters(decode(yaml.safe_load(path.read_text())).model)
    assert 6 * found["model"]["active_params"] * found["tokens"] == pytest.approx(1e20, rel=0.01)


def test_intervals_hold_what_is_planned(asked: Asked) -> None:
    for words in ((), ("law=hoffmann-1",), ("model.moe.num_experts=8",), ("law=hoffmann-1", "data.tokens=1e9")):
        found = asked.plan("budget.flops=1e20", *EIGHT, *words)
        for value, interval in (
            (found["tokens"], found["tokens_interval"]),
            (found["model"]["num_params"], found["model"]["num_params_interval"]),
        ):
            assert interval[0] <= value * (1 + 1e-9), words
            assert value <= interval[1] * (1 + 1e-9), words


def test_a_shape_far_from_the_law_is_not_called_its_optimum(asked: Asked) -> None:
    words = ("budget.flops=1e20", *EIGHT, "model.num_layers=4", "model.hidden_size=512")
    found = asked.plan(*words)
    assert (found["model"]["num_params_interval"], found["tokens_interval"]) == (None, None)
    assert "has the least loss" not in asked.why(*words)
    assert "num_layers, hidden_size as given" in asked.why(*words)


def test_reasons_say_what_was_given_and_what_is_not_known(asked: Asked) -> None:
    plain = ("budget.flops=1e20", *EIGHT)
    assert "the batch is given" in asked.why(*plain, "data.global_batch=64")
    assert "the batch is given" not in asked.why(*plain)
    assert "the law is of dense models" in asked.why(*plain, "model.moe.num_experts=8")
    assert "the law is of dense models" not in asked.why(*plain)
    assert "times" not in asked.why(*plain, "data.tokens=1e12").split("\n")[0]
    repeated = asked.plan(*plain, "data.tokens=4e9")
    assert f"each of the 4e+09 tokens is seen {repeated['epochs']:.3g} times" in repeated["reasons"][0]["because"]
    assert "repeats teach next to nothing" in asked.why(*plain, "data.tokens=1e8")


def test_a_budget_is_not_overdrawn(asked: Asked) -> None:
    """Where shapes leave a gap, and where larger models use devices much better than smaller ones."""
    gap = ("cluster=gb200", "serving.tokens=1.93e10", "data.global_batch=64")
    found = asked.plan("budget.gpu_hours=1956", *gap)
    assert 0.85 * 1956 < found["gpu_hours"] <= 1.01 * 1956
    steep = ("cluster=b200", "cluster.nodes=32", "data.seq_len=1024", "data.global_batch=5000")
    moe = ("model.moe.num_experts=64", "model.moe.top_k=1", "model.moe.ffn_hidden_size=2048")
    found = asked.plan("budget.usd=19350", *steep, *moe, "serving.tokens=3.18e11")
    assert 0.85 * 19350 < found["usd"] <= 1.01 * 19350


@pytest.mark.parametrize(
    "words",
    [
        ("budget.gpu_hours=10000", "cluster.memory_gib=4", "cluster.reserve_gib=3.5"),
        ("budget.flops=1e24", "cluster.memory_gib=0.5"),
        ("budget.flops=1e30",),
        ("budget.usd=1e8",),
        ("budget.flops=1e12", "data.global_batch=1000"),
        ("budget.flops=1e22", "data.global_batch=10000000"),
        ("budget.flops=1e22", "model.num_layers=2000"),
        ("budget.flops=5e21", "serving.tokens=8e15", "data.global_batch=1", "cluster.nodes=100"),
        ("budget.flops=1e22", "cluster.nodes=1000000"),
        ("budget.flops=1e22", "launcher=local"),
        ("budget.flops=1e22", "cluster.mtbf_device_hours=1"),
        ("budget.flops=1e22", "model=gpt2-124m", "model.num_layers=-1"),
        ("budget.flops=1e22", "precision=fp8"),
    ],
)
def test_a_refusal_names_what_is_near(asked: Asked, words: tuple[str, ...]) -> None:
    near = asked.near(*EIGHT, *words)
    assert any(near.values())
    given = {word.partition("=")[0] for word in (*EIGHT, *words)}
    assert near.keys() <= given | {"cluster.memory_gib"}


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("budget.gpu_hours=10000", "cluster.memory_gib=4", "cluster.reserve_gib=3.5"), "budget.gpu_hours"),
        (("budget.flops=1e24", "cluster.memory_gib=0.5"), "cluster.memory_gib"),
        (("budget.flops=1e30",), "budget.flops"),
        (("budget.flops=1e18", "data.global_batch=16", "cluster.nodes=128"), "cluster.nodes"),
        (("budget.flops=1e22", "model.num_layers=2000"), "model.num_layers"),
    ],
)
def test_what_is_near_makes_a_plan(asked: Asked, words: tuple[str, ...], key: str) -> None:
    (value,) = asked.near(*EIGHT, *words)[key]
    others = [word for word in (*EIGHT, *words) if not word.startswith(f"{key}=")]
    assert asked.plan(*others, f"{key}={'null' if value is None else value}")["layouts"]


def test_long_runs_have_names(asked: Asked) -> None:
    assert asked.plan("budget.flops=1e24", *EIGHT, "model=gpt2-124m")["tokens"] > 1e15


def test_errors_are_json(asked: Asked) -> None:
    for value in ("nan", "inf"):
        assert "budget.flops" in asked.near(f"budget.flops={value}", *EIGHT)


def test_choices_that_may_be_null_are_said_by_name(asked: Asked) -> None:
    assert asked.near("budget.flops=1e22", "precision=fp8", *EIGHT) == {"precision": ["fp32", "bf16", "fp16", None]}


def test_heads_that_are_given_leave_widths_that_are_legal(asked: Asked) -> None:
    found = asked.plan("budget.flops=1e17", *EIGHT, "model.num_heads=32")["model"]
    assert found["hidden_size"] % 64 == 0
