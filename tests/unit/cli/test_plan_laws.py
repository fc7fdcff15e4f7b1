"""`plan fit` reads runs and tables and says how far to trust it; `plan ladder` writes runs that can be started."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dist_llm.accounting.params import num_parameters
from dist_llm.cli.compose import compose
from dist_llm.cli.launch import LAUNCH
from dist_llm.cli.parse import Answer, Command, parse_arguments
from dist_llm.cli.plan_fit import FIT
from dist_llm.cli.plan_ladder import LADDER
from dist_llm.config.checks import check
from dist_llm.config.decode import decode
from dist_llm.config.document import read_document, render_document
from dist_llm.errors import ConfigError, DataError, DistLLMError, ExitCode
from dist_llm.planner.law_file import read_law
from dist_llm.planner.laws import Constants
from dist_llm.telemetry.records import VALIDATION_FILE, RunFiles
from dist_llm.types import StepRecord

TRUTH = Constants(E=1.7, A=300.0, B=900.0, alpha=0.33, beta=0.31)
WIDTHS = (64, 128, 192)


def _call(command: Command, *words: object) -> Answer:
    return command.run(parse_arguments(command, "dist-llm plan", [str(word) for word in words]))


def _data(answer: Answer) -> dict[str, object]:
    """Return the answer as --json prints it."""
    return dict(json.loads(json.dumps(answer.data)))


def _write_run(
    folder: Path,
    name: str,
    width: int,
    steps: int,
    done: int | None = None,
    end: str = "",
    more: tuple[str, ...] = (),
) -> Path:
    """Write the folder of a run whose loss falls to what TRUTH says, with a step that was skipped in between.

    end: `evaluated` or `diverged`.
    """
    words = [f"run.name={name}", f"run.dir={folder}", f"run.steps={steps}", f"model.hidden_size={width}"]
    config = decode(compose([*words, f"model.ffn_hidden_size={4 * width}", *more]))
    batch = config.data.global_batch * config.data.seq_len
    last = TRUTH.loss(num_parameters(config.model), steps * batch)
    with RunFiles(config.run.folder) as files:
        files.write_config(render_document(config))
        for step in range(1, (steps if done is None else done) + 1):
            lost = step == 7 or (end == "diverged" and step > 0.9 * steps)
            loss = math.nan if lost else last + max(0.0, 3 - 4 * step / steps)
            files.record(StepRecord(step, step * batch, loss, 1.0, 1e-3, 0.1, 1e4, None, 0.1, skipped=step == 7))
        if end == "evaluated":
            files.validation(steps, last + 0.25, 4096)
    return config.run.folder


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    names = [(width, steps) for width in WIDTHS for steps in (60, 120, 240)]
    return [_write_run(tmp_path, f"run-{width}-{steps}", width, steps) for width, steps in names]


def _table(path: Path, count: int = 12) -> Path:
    lines = ["# source: made here", "Run,N,D,c4"]
    for index in range(count):
        num_params, tokens = 1e6 * 2 ** (index % 4), 2e7 * 3 ** (index % 3)
        lines.append(f"r{index},{num_params},{tokens},{TRUTH.loss(num_params, tokens) * (1 + 1e-3 * (-1) ** index)}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_folders_of_runs_are_fitted(folders: list[Path], tmp_path: Path) -> None:
    law, picture = tmp_path / "law.json", tmp_path / "fit.png"
    answer = _call(FIT, *folders, "--hold-out", "run-192-240", "--write", law, "--curves", picture)
    assert answer.code == ExitCode.DONE
    data = _data(answer)
    assert data["num_runs"] == 8
    (held,) = data["held_out"]  # type: ignore[misc]
    assert held["contained"]
    assert abs(held["error"]) < 0.02
    assert "held out: run-192-240" in answer.text
    assert "trust it to about" in answer.text
    assert "last twentieth" in answer.text
    assert picture.read_bytes().startswith(b"\x89PNG")
    written = read_law(law)
    assert written.loss(1e6, 1e8) == pytest.approx(TRUTH.loss(1e6, 1e8), rel=0.1)
    largest = max(run["flops"] for run in data["runs"])  # type: ignore[attr-defined]
    assert data["optimal"][0]["flops"] == largest  # type: ignore[index]


def test_evaluations_count_where_every_run_has_one(tmp_path: Path, folders: list[Path]) -> None:
    evaluated = [
        _write_run(tmp_path / "e", f"e{steps}", 64 + steps % 3 * 64, steps, end="evaluated")
        for steps in (20, 30, 40, 50, 60, 80)
    ]
    answer = _call(FIT, *evaluated)
    assert "loss: the last evaluation" in answer.text
    first = _data(answer)["runs"][0]  # type: ignore[index]
    assert first["loss"] == pytest.approx(TRUTH.loss(first["num_params"], first["tokens"]) + 0.25)
    assert "last twentieth" in _call(FIT, *evaluated, *folders).text
    assert "evaluations are of 4,096 tokens only" in answer.text
    training = _call(FIT, *evaluated, "--loss", "training")
    assert "last twentieth" in training.text
    assert _data(training)["runs"][0]["loss"] < first["loss"] - 0.1  # type: ignore[index]
    with pytest.raises(ConfigError, match="needs an evaluation after the last step, and run-64-60"):
        _call(FIT, *evaluated, *folders, "--loss", "validation")
    lines = evaluated[0] / VALIDATION_FILE
    lines.write_text(lines.read_text().replace("4096", "9000"))
    assert "evaluations are of 4,096 to 9,000 tokens, so not of one text" in _call(FIT, *evaluated).text


def test_runs_on_different_text_are_spoken_of(tmp_path: Path, folders: list[Path]) -> None:
    other = _write_run(tmp_path / "other", "other", 64, 60, more=("data.path=other.jsonl",))
    assert "runs read different text" in _call(FIT, *folders, other).text
    assert "different text" not in _call(FIT, *folders).text


def test_unfinished_runs_are_left_out(folders: list[Path], tmp_path: Path) -> None:
    stopped = _write_run(tmp_path, "stopped", 64, 500, done=100)
    answer = _call(FIT, *folders, stopped)
    assert "stopped is left out" in answer.text
    assert _data(answer)["num_runs"] == 9


def test_too_few_runs_say_which_were_left_out(folders: list[Path], tmp_path: Path) -> None:
    stopped = _write_run(tmp_path, "stopped", 64, 500, done=100)
    with pytest.raises(ConfigError, match=r"are too few .* stopped is left out"):
        _call(FIT, *folders[:2], stopped)


def test_diverged_runs_are_left_out(folders: list[Path], tmp_path: Path) -> None:
    answer = _call(FIT, *folders, _write_run(tmp_path, "diverged", 64, 500, end="diverged"))
    assert "diverged is left out: its last steps have no finite loss" in answer.text
    assert _data(answer)["num_runs"] == 9


def test_experts_count_by_what_a_token_meets(folders: list[Path], tmp_path: Path) -> None:
    sparse = _write_run(tmp_path, "sparse", 64, 60, more=("model.moe.num_experts=8", "model.moe.top_k=1"))
    rows: Any = _data(_call(FIT, *folders, sparse))["runs"]
    dense, experts = rows[0]["num_params"], rows[-1]["num_params"]
    assert dense < experts < 1.1 * dense


def test_a_law_is_trusted_as_far_as_it_was_right(tmp_path: Path) -> None:
    table = _table(tmp_path / "runs.csv")
    assert "trust it to about" in _call(FIT, table, "--columns", "loss=c4").text
    lines = table.read_text().splitlines()
    wild = [f"{line}{'5' * (index % 2)}" for index, line in enumerate(line.rpartition(".")[0] for line in lines[2:])]
    table.write_text("\n".join([*lines[:2], *wild]))
    assert "trust it no further than them" in _call(FIT, table, "--columns", "loss=c4").text


def test_what_runs_do_not_show_stays_as_uncertain_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    sizes = [(1e6, 2e7 * 2**index) for index in range(6)] + [(1.05e6, 2e7)]
    losses = [TRUTH.loss(*size) * (1 + 3e-3 * (-1) ** index) for index, size in enumerate(sizes)]
    rows = [f"{n},{d},{loss}" for (n, d), loss in zip(sizes, losses, strict=True)]
    path.write_text("\n".join(["params,tokens,loss", *rows]))
    law: Any = _data(_call(FIT, path))["law"]
    low, high = law["intervals"]["alpha"]
    assert high - low > 0.2
    assert low <= law["alpha"] <= high


def test_embeddings_may_be_left_out(folders: list[Path]) -> None:
    whole, bare = (_data(_call(FIT, *folders, *more)) for more in ([], ["--non-embedding"]))
    config = decode(read_document(folders[0] / "config.yaml"))
    tables = (config.model.vocab_size + config.model.max_seq_len) * config.model.hidden_size
    first, fewer = whole["runs"][0], bare["runs"][0]  # type: ignore[index]
    assert first["num_params"] - fewer["num_params"] == tables
    assert bare["law"]["counts_embeddings"] is False  # type: ignore[index]


def test_few_runs_are_said_to_test_nothing(folders: list[Path]) -> None:
    answer = _call(FIT, *folders[:7])
    assert "how far to trust it is not known" in answer.text
    assert _data(answer)["tested_reach"] is None


def test_tables_are_fitted(tmp_path: Path) -> None:
    table = _table(tmp_path / "runs.csv")
    answer = _call(FIT, table, "--columns", "params=N,tokens=D,loss=c4", "--exclude", "r1*", "--exclude-worst", "1")
    data = _data(answer)
    assert data["num_runs"] == 8
    assert data["prior"] == {"exponent": 0.35, "deviation": 0.1}
    assert _data(_call(FIT, table, "--columns", "loss=c4", "--prior", "none"))["prior"] is None


def test_jsonl_with_flops_is_fitted(tmp_path: Path) -> None:
    lines = []
    for index in range(12):
        num_params, tokens = 1e6 * 2 ** (index % 4), 2e7 * 3 ** (index % 3)
        lines.append(
            json.dumps({"params": num_params, "flops": 6 * num_params * tokens, "loss": TRUTH.loss(num_params, tokens)})
        )
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(lines))
    data = _data(_call(FIT, path, "--isoflop"))
    assert data["runs"][0]["tokens"] == pytest.approx(2e7)  # type: ignore[index]
    assert data["isoflop"] == {"profiles": [], "law": None}


@pytest.mark.parametrize(
    ("words", "error", "text"),
    [
        (["nowhere"], ConfigError, "neither the folder of a run nor a table"),
        (["{empty}"], ConfigError, "not the folder of a run"),
        (["{table}"], ConfigError, "column=loss is missing"),
        (["{table}", "--columns", "loss=c5"], ConfigError, "is no column"),
        (["{table}", "--columns", "c4"], ConfigError, "must be pairs"),
        (["{table}", "--columns", "loss=c4", "--exclude", "zz*"], ConfigError, "--exclude=zz* matches no run"),
        (["{table}", "--columns", "loss=c4", "--hold-out", "*"], ConfigError, "are too few"),
        (["{table}", "--columns", "loss=c4", "--exclude-worst", "-1"], ConfigError, "must be from 0 to 12"),
        (["{table}", "--columns", "loss=c4", "--seed", "-1"], ConfigError, "--seed=-1"),
        (["{table}", "--columns", "loss=c4", "--name", "../x"], ConfigError, "name=../x"),
        (["{table}", "--columns", "loss=Run"], DataError, "row 1: Run must be a positive number"),
        (["{alone}"], ConfigError, "all have 1,000,000 parameters"),
        (["{torn}"], DataError, "row 1: not a JSON object"),
        (["{bare}"], DataError, "no step with a finite loss"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    words: list[str], error: type[DistLLMError], text: str, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "alone.csv").write_text("n,d,loss\n" + "".join(f"1e6,{10**k},{9 - k}\n" for k in range(1, 8)))
    (tmp_path / "torn.jsonl").write_text('{"params": 1,\n')
    places = {
        "table": _table(tmp_path / "runs.csv"),
        "empty": tmp_path / "empty",
        "torn": tmp_path / "torn.jsonl",
        "alone": tmp_path / "alone.csv",
        "bare": _write_run(tmp_path, "bare", 64, 10, done=0),
    }
    with pytest.raises(error) as caught:
        _call(FIT, *(word.format(**places) for word in words))
    assert text in str(caught.value)
    assert caught.value.exit_code == (ExitCode.CONFIG if error is ConfigError else ExitCode.BAD_DATA)


@pytest.mark.parametrize("more", [[], ["--isoflop"]], ids=["ladder", "isoflop"])
def test_a_ladder_is_legal_and_spans_its_budgets(more: list[str]) -> None:
    data = _data(_call(LADDER, "model=llama-quickstart", "--flops", "2e13:2e15", "--runs", "12", *more))
    runs: list[dict[str, object]] = data["runs"]  # type: ignore[assignment]
    assert len({run["name"] for run in runs}) == 12
    budgets = [float(str(run["flops"])) for run in runs]
    assert min(budgets) == pytest.approx(2e13, rel=0.05)
    assert max(budgets) == pytest.approx(2e15, rel=0.05)
    ratios = [float(str(run["tokens"])) / float(str(run["num_params"])) for run in runs]
    assert max(ratios) / min(ratios) > 8
    for run in runs:
        overrides: dict[str, object] = run["overrides"]  # type: ignore[assignment]
        words = [f"{key}={'null' if value is None else value}" for key, value in overrides.items()]
        config = decode(compose(["model=llama-quickstart", *words]))
        assert not check(config, 1)
        assert num_parameters(config.model) == run["num_params"]
        assert config.run.steps * config.data.global_batch * config.data.seq_len == run["tokens"]
        assert config.optimizer.lr <= 0.004
        evaluated = config.telemetry.eval_batches * config.data.global_batch * config.data.seq_len
        assert 2**18 <= evaluated < 1.1 * 2**18
    if more:
        assert len({(round(math.log(budget), 1)) for budget in budgets}) == 2
        assert len({(run["num_params"], round(math.log(float(str(run["flops"]))), 1)) for run in runs}) == 12


def test_what_is_said_is_all_runs(tmp_path: Path) -> None:
    said = {"model.num_layers": 3, "data.global_batch": 24, "optimizer.lr": 2e-3, "telemetry.eval_batches": 7}
    words = ["data.microbatch=8", "data.validation_fraction=0.1", *(f"{key}={value}" for key, value in said.items())]
    data = _data(_call(LADDER, *words, "--flops", "1e12:1e13", "--runs", "5", "--write", tmp_path))
    runs: list[dict[str, object]] = data["runs"]  # type: ignore[assignment]
    assert len({run["num_params"] for run in runs}) > 2
    for run in runs:
        config = decode(read_document(tmp_path / "configs" / f"{run['name']}.yaml"))
        found = (config.model.num_layers, config.data.global_batch, config.optimizer.lr, config.telemetry.eval_batches)
        assert found == tuple(said.values())
        assert config.run.steps * 24 * config.data.seq_len == run["tokens"]


def test_ladder_files_start_what_was_planned(tmp_path: Path) -> None:
    folder = tmp_path / "a ladder; touch hacked"
    answer = _call(LADDER, "--flops", "1e12:1e13", "--runs", "3", "--write", folder)
    assert "10 files written" in answer.text
    runs = _data(answer)["runs"]
    names = [str(run["name"]) for run in runs]  # type: ignore[attr-defined]
    paths = [str(folder / "configs" / f"{name}.yaml") for name in names]
    for run, path in zip(runs, paths, strict=True):  # type: ignore[call-overload]
        assert num_parameters(decode(read_document(Path(path))).model) == run["num_params"]
    stub = tmp_path / "dist-llm"
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$3"\n')
    stub.chmod(0o755)
    path = f"{tmp_path}:/usr/bin:/bin"
    assert _run(["sh", str(folder / "run.sh")], {"PATH": path}, tmp_path) == paths
    (tmp_path / "slurm.sh").write_text('scontrol() { echo node1; }\nsrun() { printf "%s\\n" "${@: -1}"; }\n')
    slurm = {"PATH": path, "BASH_ENV": "slurm.sh", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}
    array = str(folder / "array.sbatch")
    assert _run(["bash", array], {**slurm, "SLURM_ARRAY_TASK_ID": "1"}, tmp_path) == [paths[1]]
    assert not (tmp_path / "hacked").exists()


def test_an_array_asks_for_what_its_runs_need(tmp_path: Path) -> None:
    words = ["launcher=slurm", "device=cuda", "launcher.nproc=8", "launcher.nodes=2", "precision=bf16"]
    _call(LADDER, "--flops", "1e15:1e16", "--runs", "3", "--write", tmp_path, *words)
    script = (tmp_path / "array.sbatch").read_text()
    for line in ("--array=0-2", "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"):
        assert f"#SBATCH {line}\n" in script


def test_a_sweep_is_the_ladder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"s-ladder-0{index}" for index in range(3)]
    words = ["run.name=s", f"run.dir={tmp_path / 'runs'}", "--flops", "1e12:1e13", "--runs", "3", "--write", tmp_path]
    _call(LADDER, *words)
    written = {name: (tmp_path / "configs" / f"{name}.yaml").read_text() for name in names}
    started: list[list[str]] = []
    monkeypatch.setattr("dist_llm.launcher.local.launch_local", lambda argv, *_, **__: started.append(argv) or 0)
    assert _call(LAUNCH, "--multirun", tmp_path / "sweep.yaml").code == ExitCode.DONE
    assert [argv[-1] for argv in started] == [str(tmp_path / "configs" / f"{name}.yaml") for name in names]
    assert {name: (tmp_path / "configs" / f"{name}.yaml").read_text() for name in names} == written
    codes = iter([0, 75])
    monkeypatch.setattr("dist_llm.launcher.local.launch_local", lambda *_, **__: next(codes))
    assert _call(LAUNCH, "--multirun", tmp_path / "sweep.yaml").code == ExitCode.PREEMPTED


def test_a_sweep_is_checked_before_it_starts(tmp_path: Path) -> None:
    _call(LADDER, "--flops", "1e12:1e13", "--runs", "3", "--write", tmp_path)
    sweep = tmp_path / "sweep.yaml"
    params = "{optimizer.lr: '1e-3,-1', data.seq_len: '0'}"
    sweep.write_text(f"defaults: [base, _self_]\nhydra: {{sweeper: {{params: {params}}}}}\n")
    with pytest.raises(ConfigError) as caught:
        _call(LAUNCH, "--multirun", sweep)
    assert "optimizer.lr=-1" in str(caught.value)
    assert "data.seq_len=0" in str(caught.value)
    sweep.write_text("defaults: [base, _self_]\nhydra: {sweeper: {params: {optimizer.lr: '1e-3,2e-3'}}}\n")
    with pytest.raises(ConfigError, match="is the name of 2 runs of the sweep"):
        _call(LAUNCH, "--multirun", sweep)
    sweep.write_text("defaults: [base, {ladder: nothing}, _self_]\n")
    with pytest.raises(ConfigError, match="does not compose"):
        _call(LAUNCH, "--multirun", sweep)
    with pytest.raises(ConfigError, match="takes no overrides"):
        _call(LAUNCH, "--multirun", sweep, "run.steps=1")


def _run(words: list[str], environment: dict[str, str], folder: Path) -> list[str]:
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--flops", "many"], "must be two budgets in FLOPs"),
        (["--flops", "1e15:1e13"], "the lower first"),
        (["--flops", "0:1e13"], "must be two budgets"),
        (["--flops", "1e13:1e15", "--runs", "7", "--isoflop"], "--runs=7 must be at least 10"),
        (["--flops", "1e13:1e14", "--runs", "0"], "--runs=0 must be from 1"),
        (["--flops", "1e13:1e14", "--law", "besirogluu"], "use besiroglu"),
        (["--flops", "1e3:1e4"], "leaves too few shapes"),
        (["--flops", "1e12:1e13", "model.num_layers=500"], "model.num_layers=500 leaves too few shapes"),
        (
            [*"model=llama-tiny model.vocab_size=512 model.num_layers=2 data.seq_len=64 --flops 1e10:1.5e10".split()],
            "makes all runs of 14,928 parameters",
        ),
        (["--flops", "1e12:1e13", "data.global_batch=4096", "data.microbatch=4096"], "steps of 4096 sequences"),
        (["--flops", "1e13:1e14", "optimizer.lrr=1"], "optimizer.lrr"),
    ],
)
def test_ladders_that_cannot_be_are_refused(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _call(LADDER, *words)
    assert text in str(caught.value)


def test_a_ladder_beyond_all_shapes_names_budgets_that_have_them(tmp_path: Path) -> None:
    words = ["run.name=far", "model=llama-tiny", "--runs", "6"]
    with pytest.raises(ConfigError, match="as no shape is larger") as caught:
        _call(LADDER, *words, "--flops", "1e26:1e27")
    ((budgets,),) = [violation.legal for violation in caught.value.violations]
    assert float(str(budgets).partition(":")[0]) < 1e26
    assert _data(_call(LADDER, *words, "--flops", budgets))["runs"]
