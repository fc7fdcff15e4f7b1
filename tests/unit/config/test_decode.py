"""Decoding: strict types, unknown keys with a hint, nothing that names code, all slips at once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dist_llm.config.checks import check
from dist_llm.config.decode import decode, decode_partly
from dist_llm.config.keys import all_fields, closest_key, takes_text
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, ExitCode
from tests.unit.config.trees import set_key, small_tree


def _messages(tree: dict[str, Any]) -> list[str]:
    return [str(violation) for violation in decode_partly(tree).violations]


def test_small_tree_decodes() -> None:
    config = decode(small_tree())
    assert isinstance(config, RunConfig)
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.parallel.data is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("run.steps", True, "run.steps=true must be a whole number"),
        ("run.steps", "07", "run.steps=07 must be a whole number; use 7"),
        ("run.steps", 1e3, "run.steps=1000.0 must be a whole number; use 1000"),
        ("run.steps", None, "run.steps=unset must be a whole number"),
        ("run.steps", -1, "run.steps=-1 must be at least 0; use 0"),
        ("run.steps", 2**31, "run.steps=2147483648 must be at most 2147483647; use 2147483647"),
        ("run.steps", 10**200, "run.steps=a number of many digits must be at most 2147483647; use 2147483647"),
        ("run.seed", -3, "run.seed=-3 must be at least 0; use 0"),
        ("parallel.tensor", 0, "parallel.tensor=0 must be at least 1; use 1"),
        ("parallel.data", 1.5, "parallel.data=1.5 must be a whole number; use 2"),
        ("parallel.tensor", "-2", "parallel.tensor=-2 must be a whole number"),
        ("parallel.sequence", "no", "parallel.sequence=no is not a switch; use true or false"),
        ("parallel.sequence", 1, "parallel.sequence=1 is not a switch; use true or false"),
        ("parallel.zero", True, "parallel.zero=true must be a whole number"),
        ("parallel.zero", 4, "parallel.zero=4 is not one of its choices; use 0, 1, 2 or 3"),
        ("parallel.schedule", "1f1", "parallel.schedule=1f1 is not one of its choices; use 1f1b, gpipe, interleaved"),
        ("optimizer.lr", "fast", "optimizer.lr=fast must be a number"),
        ("optimizer.lr", "0.1", "optimizer.lr=0.1 must be a number; use 0.1"),
        ("optimizer.lr", float("nan"), "optimizer.lr=nan must be finite"),
        ("optimizer.lr", float("inf"), "optimizer.lr=inf must be finite"),
        ("optimizer.lr", 0, "optimizer.lr=0 must be greater than 0"),
        ("optimizer.betas", [0.9], "optimizer.betas[1]=unset must be given"),
        ("optimizer.betas", [0.9, 1], "optimizer.betas[1]=1 must be less than 1"),
        ("optimizer.betas", 0.9, "optimizer.betas=0.9 must be a list"),
        ("run.name", "../x", "run.name=../x must be a folder name"),
        ("run.name", "", "run.name= must be a folder name"),
        ("run.name", "a\nb", "run.name=a\\nb must be a folder name"),
        ("run.name", "x" * 200, "run.name=" + "x" * 77 + "... must be a folder name"),
        ("run.name", 7, "run.name=7 must be text"),
        ("run.dir", "a\0b", "run.dir=a\\x00b must be a path"),
        ("run.dir", "", "run.dir= must be a path"),
        ("data.path", "\udcff", "data.path=\\udcff must be valid Unicode text"),
        ("model", 3, "model=3 must be a section of settings"),
        ("model.rope", None, "model.rope=unset must be a section of settings"),
        ("optimizer.lrr", 1, "optimizer.lrr=1 is not a setting: did you mean optimizer.lr?"),
        ("model.rope.thetta", 1, "model.rope.thetta=1 is not a setting: did you mean model.rope.theta?"),
        ("paralel", {"tensor": 2}, "paralel.tensor=2 is not a setting: did you mean parallel.tensor?"),
        ("tp", 2, "tp=2 is not a setting: did you mean parallel.tensor?"),
        ("qqq", 2, "qqq=2 is not a setting: dist-llm train --cfg prints them all"),
        ("model._target_", "os.system", "model._target_=os.system is refused: keys are names of settings"),
        ("_partial_", True, "_partial_=true is refused: keys are names of settings"),
        ("data.path", "${oc.env:HOME}", "data.path=${oc.env:HOME} is refused: a config has no interpolation"),
        ("optimizer.betas", [0.9, "${x}"], "optimizer.betas=[0.9, '${x}'] is refused: a config has no interpolation"),
    ],
)
def test_slip_is_named(key: str, value: object, message: str) -> None:
    tree = small_tree()
    set_key(tree, key, value)
    messages = _messages(tree)
    assert len(messages) == 1
    assert messages[0].startswith(message)


def test_all_slips_at_once() -> None:
    tree = small_tree()
    for key, value in {"run.steps": "x", "model.num_heads": 0, "optimizer.lrr": 1, "engine.name": "mine"}.items():
        set_key(tree, key, value)
    del tree["data"]["seq_len"], tree["cluster"]
    decoded = decode_partly(tree)
    assert {violation.key for violation in decoded.violations} == {
        "run.steps",
        "model.num_heads",
        "optimizer.lrr",
        "engine.name",
        "data.seq_len",
        "cluster",
    }
    assert decoded.unusable == {"run.steps", "model.num_heads", "engine.name", "data.seq_len", "cluster"}
    assert decoded.config.model.hidden_size == tree["model"]["hidden_size"]
    with pytest.raises(ConfigError, match="6 settings cannot be used") as caught:
        decode(tree)
    assert caught.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 1.5, 1e-3, 10**400, float("nan"), "", "07", "1.5", "x", [], [1], {}]
)
def test_any_value_of_any_key_is_taken_or_refused(value: object) -> None:
    for key in all_fields():
        tree = small_tree()
        set_key(tree, key, value)
        decoded = decode_partly(tree)
        check(decoded.config, 4, decoded.unusable)
        assert all(str(violation).isprintable() for violation in decoded.violations)


def test_decoding_leaves_the_tree_alone() -> None:
    tree = small_tree()
    set_key(tree, "model._target_", "os.system")
    set_key(tree, "run.steps", "x")
    before = copy.deepcopy(tree)
    decode_partly(tree)
    assert tree == before


def test_deep_and_odd_keys_are_refused() -> None:
    tree = small_tree()
    node = tree["model"]
    for _ in range(40):
        node["rope"] = {}
        node = node["rope"]
    tree[7] = {"a": 1}  # type: ignore[index]
    messages = _messages(tree)
    assert any(message.startswith("7=") for message in messages)
    assert any("nested deeper than" in message for message in messages)


def test_config_is_frozen() -> None:
    config = decode(small_tree())
    with pytest.raises(ValueError, match="frozen"):
        config.run.steps = 3


@pytest.mark.parametrize(
    ("slip", "meant"),
    [
        ("optimizer.lrr", "optimizer.lr"),
        ("lr", "optimizer.lr"),
        ("model.seq_len", "data.seq_len"),
        ("parallel.tp", "parallel.tensor"),
        ("learning_rate", "optimizer.lr"),
        ("model.hiden_size", "model.hidden_size"),
        ("modle", "model"),
        ("experimnt", "experiment"),
        ("zzz", None),
    ],
)
def test_closest_key(slip: str, meant: str | None) -> None:
    assert closest_key(slip) == meant


def test_keys_know_their_kind() -> None:
    assert {"model.rope.theta", "parallel.tensor", "device", "model"} <= set(all_fields())
    assert [key for key in all_fields() if takes_text(key)] == [
        "run.name",
        "run.dir",
        "engine.nvme_path",
        "data.path",
        "data.cache_dir",
        "tokenizer.path",
        "telemetry.sample_prompt",
        "cluster.name",
        "cluster.source",
    ]
