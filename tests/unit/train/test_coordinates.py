"""The coordinate check passes muP and fails the standard parametrisation and a part of muP that is missing."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from dist_llm.cli.main import main
from dist_llm.config.model import ModelConfig
from dist_llm.errors import ConfigError, ExitCode
from dist_llm.models import plan
from dist_llm.runtime.pool import WorkerPool
from dist_llm.telemetry.coordinates import draw_coordinates
from dist_llm.train import coordinates
from dist_llm.train.coordinates import FALL, GROWTH, KINDS, Figures, Widths, slope, verify_coordinates, within
from tests.parallel.tiny import GPT2, MOE, tiny_config

WIDTHS = (32, 64, 128)
SHORT = {"num_layers": 2, "num_kv_heads": None}


@pytest.fixture
def shared(pool: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the check use the ranks that are there, where it would start its own."""
    monkeypatch.setattr(coordinates, "WorkerPool", lambda size, timeout_seconds: nullcontext(pool))


def _check(model: dict[str, object], wider_heads: bool = False) -> dict[str, Any]:
    config = tiny_config({}, {**SHORT, **model}, {"microbatch": 4}, optimizer={"lr": 2e-3})
    return verify_coordinates(config, Widths.choose(config.model, WIDTHS, wider_heads), steps=10)


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize("model", [{}, GPT2, MOE], ids=["llama", "gpt2", "experts"])
def test_mup_passes_and_the_standard_parametrisation_does_not(model: dict[str, object]) -> None:
    facts = _check(model)
    assert facts["ok"] is True, facts["kinds"]
    for row in facts["kinds"]:
        if row["kind"] in ("mlp", "attention", "hidden", "logits"):
            assert row["standard_ok"] is False, row
    json.dumps(facts, allow_nan=False)


@pytest.mark.usefixtures("shared")
def test_wider_heads_need_their_scale() -> None:
    facts = _check({}, wider_heads=True)
    assert facts["ok"] is True, facts["kinds"]


def watch_with_the_same_rate(config: Any, steps: int) -> list[Figures]:
    """Train with muP's starts but one learning rate for all."""
    from dist_llm.engine import recipe

    recipe.plan_rate = lambda model, name: 1.0
    try:
        return watch(config, steps)
    finally:
        recipe.plan_rate = plan.plan_rate


watch = coordinates.watch_training


@pytest.mark.usefixtures("shared")
def test_a_learning_rate_that_does_not_follow_the_width_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinates, "watch_training", watch_with_the_same_rate)
    assert _check({})["ok"] is False


def test_slopes() -> None:
    assert slope([1, 2, 4], [3, 6, 12]) == pytest.approx(1)
    assert slope([1, 4], [1.0, 0.5]) == pytest.approx(-0.5)
    assert slope([1, 2], [1.0, 0.0]) is None
    assert slope([1, 2], [None, 1.0]) is None
    assert within(GROWTH, FALL)
    assert within(-1.0, 0.0)
    assert not any((within(GROWTH + 0.1, 0), within(0, GROWTH + 0.1), within(0, FALL - 0.1), within(None, 0)))


def test_widths_keep_heads_in_proportion() -> None:
    model = tiny_config().model
    assert Widths.choose(model, None, wider_heads=False).widths == (64, 128, 256, 512)
    more = Widths.choose(model, (16, 64), wider_heads=False).resize(model, 64, mup=True)
    assert (more.num_heads, more.kv_heads, more.head_width, more.ffn_hidden_size) == (8, 4, 8, 128)
    assert (more.mup.base_width, more.mup.base_ffn_width, more.query_scale) == (16, 32, 1.0)
    wider = Widths.choose(model, (16, 64), wider_heads=True).resize(model, 64, mup=True)
    assert (wider.num_heads, wider.kv_heads, wider.head_width) == (4, 2, 16)
    assert wider.query_scale == pytest.approx(math.sqrt(4 / 16))
    given = ModelConfig.model_validate({**model.model_dump(), "mup": {"base_width": 32, "output_multiplier": 2.0}})
    resized = Widths.choose(given, (16, 64), wider_heads=False)
    assert (resized.base, resized.resize(given, 64, mup=True).output_scale) == (32, 1.0)
    assert resized.resize(given, 64, mup=False).output_scale == 1.0
    with pytest.raises(ConfigError, match=r"--widths=16,40 must be multiples of 16"):
        Widths.choose(model, (16, 40), wider_heads=False)


def _facts(ok: bool) -> dict[str, Any]:
    rows = [
        {"parametrisation": name, "width": width, "step": step, "kind": kind, "size": 1.0, "change": 0.1 * width * step}
        for name in ("mup", "standard")
        for width in WIDTHS
        for step in range(3)
        for kind in KINDS
    ]
    slopes = {f"{name}_{part}": 1.0 for name in ("mup", "standard") for part in ("size", "change")}
    kinds = [{"kind": kind, **slopes, "mup_ok": ok, "standard_ok": False, "ok": ok} for kind in KINDS]
    bounds = {"growth": 0.25, "fall": dict.fromkeys(KINDS, -0.35)}
    return {"ok": ok, "base_width": 32, "steps": 2, "lr": 1e-3, "bounds": bounds, "kinds": kinds, "figures": rows}


def test_pictures_are_what_their_names_say() -> None:
    facts = _facts(ok=False)
    facts["figures"][-1]["change"] = None
    facts["kinds"][0]["mup_change"] = None
    assert draw_coordinates(facts, Path("a.png"))[:4] == b"\x89PNG"
    assert b"<svg" in draw_coordinates(facts, Path("a.svg"))


@pytest.mark.parametrize("ok", [True, False])
def test_the_command_reports(
    ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}

    def check(config: Any, widths: Widths, **options: Any) -> dict[str, Any]:
        asked.update(options, widths=widths)
        return _facts(ok)

    monkeypatch.setattr(coordinates, "verify_coordinates", check)
    picture = tmp_path / "c.png"
    words = [
        "verify",
        "coordinates",
        "model=llama-tiny",
        "--widths",
        "64,128",
        "--steps",
        "3",
        "--picture",
        str(picture),
    ]
    assert main([*words, "--json"]) == (ExitCode.DONE if ok else ExitCode.NUMERICS)
    assert json.loads(capsys.readouterr().out)["ok"] is ok
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert (asked["widths"].widths, asked["steps"], asked["seeds"]) == ((64, 128), 3, 1)
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == ("muP holds" if ok else "muP does NOT hold")
    assert any(line.startswith("attention logits") for line in lines)


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--widths", "64"], "--widths=64 must be two or more whole numbers", 78),
        (["--widths", "64,a"], "--widths=64,a must be two or more whole numbers", 78),
        (["--widths", "128,64"], "--widths=128,64 must be", 78),
        (["--widths", "64,100"], "--widths=64,100 must be multiples of 64", 78),
        (["--steps", "0"], "--steps=0 must be from 1 to 1000", 78),
        (["--seeds", "0", "--picture", "a.jpg"], "--picture=a.jpg must end with .png or .svg", 78),
        (["--picture", "/nowhere/a.png"], "there is no folder /nowhere", 74),
    ],
)
def test_bad_words(words: list[str], message: str, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "coordinates", "model=llama-tiny", *words]) == code
    assert message in capsys.readouterr().err
