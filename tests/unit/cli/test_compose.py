"""Composition: presets, experiments, overrides and config files make the tree a user meant; every preset is legal."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from dist_llm.cli.compose import compose, compose_partly, list_presets, preset_folder
from dist_llm.config.checks import check, decode_and_check, resolve_data
from dist_llm.config.decode import decode
from dist_llm.config.document import parse_document, render_document
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError

NOT_YET = {"launcher": ("container", "mpi", "torchrun")}
"""Names that the design promises and the rules of this version refuse."""


def _config(*overrides: str) -> RunConfig:
    return decode_and_check(compose(overrides), None)


def test_nothing_said_is_legal() -> None:
    config = _config()
    assert check(config, 1) == []
    assert config.run.name == "default"
    assert config.parallel.data is None


@pytest.mark.parametrize(
    ("group", "name"),
    [(group, name) for group, names in list_presets().items() for name in names if group != "experiment"],
)
def test_every_preset_is_legal(group: str, name: str) -> None:
    tree = compose([f"{group}={name}", *(["data.seq_len=64"] if group == "model" else [])])
    if group == "data":
        tree["model"]["max_seq_len"] = tree["data"]["seq_len"]
    config = decode(tree)
    if group == "parallel":
        # A layout for a large model: give it one, and enough microbatches to fill its pipeline.
        config = decode(compose([f"parallel={name}", "model=llama2-70b", "data.global_batch=64", "data.microbatch=1"]))
    keys = [violation.key for violation in check(config, None)]
    assert keys == ([f"{group}.name"] if name in NOT_YET.get(group, ()) else [])


@pytest.mark.parametrize(
    ("name", "ranks", "data"), [("quickstart", 8, 2), ("quickstart", 4, 1), ("gpt2-124m", 8, 8), ("llama2-7b", 8, 4)]
)
def test_every_experiment_is_legal(name: str, ranks: int, data: int) -> None:
    config = _config(f"experiment={name}")
    assert check(config, ranks) == []
    assert resolve_data(config, ranks) == data
    assert config.run.name == name


def test_experiments_are_all_tested() -> None:
    assert set(list_presets()["experiment"]) == {"quickstart", "gpt2-124m", "llama2-7b"}


def test_quickstart_is_as_promised() -> None:
    config = _config("experiment=quickstart")
    parallel, model = config.parallel, config.model
    assert (parallel.tensor, parallel.sequence, parallel.pipeline, parallel.data, parallel.zero) == (
        2,
        True,
        2,
        None,
        1,
    )
    assert (model.dropout, model.attention_dropout, config.data.path) == (0.0, 0.0, "stdlib")
    assert config.run.steps >= 200
    assert config.launcher.nproc * config.launcher.nodes == 8


@pytest.mark.parametrize(
    "path", sorted(preset_folder().glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_presets_are_commented_and_strict(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    tree = parse_document(text, str(path))
    if path.parent.name != "experiment":
        assert tree.get("name", path.stem) == path.stem or path.parent.name in ("optimizer", "tokenizer")


def test_order_of_precedence() -> None:
    config = _config("optimizer.lr=5e-4", "experiment=quickstart", "model=llama-tiny", "run.steps=30", "run.steps=40")
    assert (config.optimizer.lr, config.model.vocab_size, config.run.steps) == (5e-4, 2048, 40)
    assert config.run.name == "quickstart"
    assert _config("model=llama-tiny", "model=gpt2-124m").model.hidden_size == 768
    assert _config("experiment=quickstart", "experiment=null").run.name == "default"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("run.name=007", "run.name", "007"),
        ("run.name=1e3", "run.name", "1e3"),
        ("run.name='a-b'", "run.name", "a-b"),
        ("run.dir=/tmp/été (1) #x;y~", "run.dir", "/tmp/été (1) #x;y~"),
        ("run.dir=~/runs", "run.dir", "~/runs"),
        ("run.dir=a=b", "run.dir", "a=b"),
        ("run.dir=C:\\x", "run.dir", "C:\\x"),
        ("data.path=true", "data.path", "true"),
        ('data.path="a, b"', "data.path", "a, b"),
        ("tokenizer.path=null", "tokenizer.path", None),
        ("telemetry.sample_prompt=", "telemetry.sample_prompt", ""),
        ("telemetry.sample_prompt=def f(x):", "telemetry.sample_prompt", "def f(x):"),
        ("run.steps=1_000", "run.steps", 1000),
        ("optimizer.lr=1e-3", "optimizer.lr", 1e-3),
        ("optimizer.betas=[0.8,0.9]", "optimizer.betas", (0.8, 0.9)),
        ("parallel.sequence=TRUE", "parallel.sequence", True),
        ("model.num_kv_heads=null", "model.num_kv_heads", None),
        ("+run.seed=3", "run.seed", 3),
        ("++run.seed=3", "run.seed", 3),
        ("model.rope={theta: 5e5}", "model.rope.theta", 5e5),
        ("parallel='tp2'", "parallel.tensor", 2),
    ],
)
def test_override_means_what_it_says(override: str, key: str, value: object) -> None:
    node: object = decode(compose([override]))
    for name in key.split("."):
        node = getattr(node, name)
    assert node == value
    assert type(node) is type(value)


def test_dictionary_keeps_the_rest() -> None:
    config = _config("model=llama3.1-8b", "model.rope={theta: 1e4}", "data.seq_len=64")
    assert (config.model.rope.theta, config.model.rope.factor) == (1e4, 8.0)


def test_config_file_takes_the_place_of_presets(tmp_path: Path) -> None:
    config = _config("experiment=quickstart", "run.dir=/tmp/é x", "optimizer.lr=1.1e-3")
    path = tmp_path / "config.yaml"
    path.write_text(render_document(config), encoding="utf-8")
    assert decode(compose([], path)) == config
    changed = decode(compose(["parallel=pp2", "run.steps=7"], path))
    assert (changed.parallel.pipeline, changed.parallel.tensor, changed.run.steps) == (2, 1, 7)
    assert changed.optimizer == config.optimizer
    with pytest.raises(ConfigError, match="experiment=quickstart composes a whole run, as --config"):
        compose(["experiment=quickstart"], path)


def test_presets_of_a_wheel_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "dist_llm"
    (package / "conf").mkdir(parents=True)
    monkeypatch.setattr("dist_llm.__file__", str(package / "__init__.py"))
    with pytest.raises(ConfigError, match="this installation has no presets"):
        preset_folder()
    (package / "conf" / "config.yaml").write_text("defaults: []\n")
    assert preset_folder() == package / "conf"


def test_every_preset_survives_a_file() -> None:
    for name in list_presets()["model"]:
        config = decode(compose([f"model={name}"]))
        assert decode(parse_document(render_document(config), name)) == config


def test_wrong_preset_silences_only_its_section() -> None:
    composed = compose_partly(["model=lama", "parallel.tensor=3", "model.layerz=1", "data.global_batch=7"])
    with pytest.raises(ConfigError) as caught:
        decode_and_check(composed.tree, None, composed.violations, frozenset(composed.unusable))
    assert [violation.key for violation in caught.value.violations] == ["model", "model.layerz", "data.global_batch"]


def test_any_override_is_taken_or_refused() -> None:
    pick = random.Random(5)
    keys = [
        "run.name",
        "run.steps",
        "optimizer.lr",
        "data.path",
        "model",
        "model.rope",
        "experiment",
        "x",
        "",
        "parallel",
    ]
    alphabet = "a1.,=[]{}()'\"\\$~!#@:;&|<> \t\n\0é\u2028\udcff-+*?%/_"
    base = compose([])
    for _ in range(400):
        value = "".join(pick.choice(alphabet) for _ in range(pick.randrange(8)))
        text = f"{pick.choice(['', '', '+', '~'])}{pick.choice(keys)}{pick.choice(['=', '=', '', '=='])}{value}"
        composed = compose_partly([text])
        if composed.violations:
            assert all(str(violation).isprintable() for violation in composed.violations)
        try:
            config = decode_and_check(composed.tree, 1, composed.violations, frozenset(composed.unusable))
        except ConfigError:
            continue
        raw = text.partition("=")[2]
        if text.startswith("data.path=") and raw[:1] not in ("'", '"'):
            assert config.data.path == raw
    assert compose([]) == base
