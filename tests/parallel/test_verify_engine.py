"""`verify engine`: equal where engines are, red where one learns otherwise, loses a sum or forgets what it saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError
from dist_llm.runtime.pool import WorkerPool
from dist_llm.train import verify_engine as verify
from dist_llm.train.verify_engine import verify_engine
from tests.parallel import stand_ins
from tests.parallel.verifying import corpus_config, lending

SWITCHED = "ranks=2 data=2 zero=1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A tiny run on a text corpus, at a learning rate whose steps do not amplify rounding."""
    return corpus_config(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def shared(pool: WorkerPool) -> Iterator[None]:
    """Let it use the ranks that are there, where it would start its own."""
    with lending(pool, verify):
        yield


def _rows(facts: dict[str, Any], table: str, **wanted: str) -> list[dict[str, Any]]:
    return [row for row in facts[table] if all(row[key] == value for key, value in wanted.items())]


@pytest.mark.usefixtures("shared")
def test_sound_engines_are_equal_and_all_pairs_switch(config: RunConfig) -> None:
    facts = verify_engine(config, layouts=SWITCHED, steps=2, build=stand_ins.sound)
    assert facts["ok"] is True, facts
    assert [row["engine"] for row in _rows(facts, "layouts")] == ["deepspeed", "megatron"]
    assert len({(row["saved_by"], row["resumed_by"]) for row in _rows(facts, "switches")}) == 6
    alone = verify_engine(config, engines=("megatron",), layouts=SWITCHED, steps=2, switch=False, build=stand_ins.sound)
    assert (alone["ok"], alone["switches"]) == (True, [])
    assert [row["engine"] for row in _rows(alone, "layouts")] == ["megatron"]


@pytest.mark.usefixtures("shared")
@pytest.mark.parametrize(
    ("build", "layouts", "gap"),
    [
        (stand_ins.other_rate, SWITCHED, "weights"),
        (stand_ins.lost_sum, "ranks=2 tensor=2 sequence", "weights"),
        (stand_ins.averaged, SWITCHED, "grad_norm"),
    ],
)
def test_a_broken_engine_turns_it_red(config: RunConfig, build: Callable[..., Any], layouts: str, gap: str) -> None:
    facts = verify_engine(config, layouts=layouts, steps=3, switch=False, build=build)
    assert facts["ok"] is False
    (broken,) = _rows(facts, "layouts", engine="deepspeed")
    (sound,) = _rows(facts, "layouts", engine="megatron")
    assert (broken["ok"], sound["ok"]) == (False, True)
    assert broken[gap] > 10 * facts["bounds"][gap]  # type: ignore[index]


@pytest.mark.usefixtures("shared")
def test_an_engine_that_forgets_its_moments_turns_its_switches_red(config: RunConfig) -> None:
    facts = verify_engine(config, layouts=SWITCHED, steps=4, build=stand_ins.forgetful)
    assert facts["ok"] is False
    assert all(row["ok"] for row in _rows(facts, "layouts"))
    assert {row["resumed_by"] for row in _rows(facts, "switches") if not row["ok"]} == {"deepspeed"}


@pytest.mark.usefixtures("shared")
def test_an_engine_that_cannot_be_built_is_named_and_left_out(config: RunConfig) -> None:
    facts = verify_engine(config, layouts=SWITCHED, steps=1, build=stand_ins.missing)
    assert (facts["ok"], facts["left_out"]) == (True, {"deepspeed": "pip install 'dist-llm[deepspeed]'"})
    assert [row["engine"] for row in _rows(facts, "layouts")] == ["megatron"]
    with pytest.raises(ConfigError, match=r"only native can.*\n  deepspeed: pip install"):
        verify_engine(config, engines=("deepspeed",), layouts=SWITCHED, steps=1, build=stand_ins.missing)


def test_nothing_is_started_where_there_is_nothing_to_compare(config: RunConfig, tmp_path: Path) -> None:
    nowhere = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "missing")})})
    with pytest.raises(ConfigError, match="no two engines"):
        verify_engine(nowhere, engines=("native",))
