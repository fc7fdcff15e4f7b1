"""The commands: help without weight, answers as text or JSON, errors as exit codes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dist_llm.cli import exit as cli_exit
from dist_llm.cli.main import COMMANDS, main
from dist_llm.cli.parse import Answer, Command
from dist_llm.config.checks import RULES
from dist_llm.config.reference import json_schema, list_settings, rules_page, settings_page
from dist_llm.errors import (
    CheckpointMismatch,
    ConfigError,
    DataError,
    ExitCode,
    LayoutError,
    NumericsError,
    PeerLostError,
    StorageError,
)

ROOT = Path(__file__).parents[3]


def _leaves() -> list[list[str]]:
    leaves = []
    for name, entry in COMMANDS.items():
        leaves.extend([[name]] if isinstance(entry, Command) else [[name, leaf] for leaf in entry])
    return leaves


@pytest.mark.parametrize("words", [[], *_leaves()], ids=" ".join)
def test_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--help"]) == 0
    printed = capsys.readouterr()
    assert "usage: " + " ".join(["dist-llm", *words]) in printed.out
    assert printed.err == ""


def test_help_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "-h"]) == 0
    assert "prepare " in capsys.readouterr().out


def test_help_loads_nothing_heavy() -> None:
    program = (
        "import sys; from dist_llm.cli.main import main; main(['--help']); main(['train', '--help']); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'pydantic', 'numpy', 'yaml') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dist-llm 0.")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "a command is missing"),
        (["verify"], "a command is missing"),
        (["trian"], "'trian' is not a command of dist-llm: did you mean train?"),
        (["data", "prepar"], "'prepar' is not a command of dist-llm data: did you mean prepare?"),
        (["zzz"], "use one of train, launch"),
        (["train", "--json"], "--json goes with --cfg"),
        (["launch", "--json"], "--json goes with --dry-run"),
        (["generate"], "the following arguments are required: RUN"),
        (["generate", "x", "--top-k", "many"], "argument --top-k: invalid int value: 'many'"),
        (
            ["generate", "x", "--temperature", "nan", "--max-tokens", "0"],
            "--temperature=nan must be a number from 0 up",
        ),
        (["verify", "layout", "--steps", "0"], "--steps=0 must be from 1"),
        (["verify", "engine", "--engines", "fairscale"], "--engines=fairscale is no engine"),
        (["bench", "step", "--repeats", "0"], "--repeats=0 must be from 1"),
        (["bench", "collectives", "--kinds", "all_sum"], "--kinds=all_sum is no kind that is timed; use all_reduce,"),
        (
            ["bench", "collectives", "--sizes", "64KB"],
            "--sizes=64KB must be sizes from 4 bytes to 16 GiB",
        ),
        (["bench", "collectives"], "launcher.nproc=1 is too few for ranks that talk; use 2"),
        (["bench", "step", "engine=native,fairscale"], "engine=fairscale is no engine"),
        (["bench", "step", "parallel.tensors=2", "run.steps=x"], "parallel.tensors=2 is not a setting"),
        (["config", "presets", "modl"], "'modl' is not a group of presets"),
        (["config", "settings", "learning_rate"], "no setting has 'learning_rate' in its key or description: did you"),
        (["config", "settings", "qqqq"], "'qqqq' in its key or description: dist-llm config settings prints them all"),
        (["config", "settings", "zero", "--markdown"], "--markdown prints the whole page: leave 'zero' out"),
        (["data", "verify", "--prefix", "x"], "--vocab-size=unset must be given with --prefix"),
        (
            ["data", "inspect", "--prefix", "x", "run.steps=3"],
            "--prefix names a data set: give it or a config, not both",
        ),
    ],
)
def test_bad_words_are_config_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == ExitCode.CONFIG
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err


def test_cfg_prints_what_composes_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--cfg", "experiment=quickstart", "run.steps=70"]) == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["run"]["steps"] == 70
    (tmp_path / "c.yaml").write_text(text)
    assert main(["train", "--cfg", "--config", str(tmp_path / "c.yaml")]) == 0
    assert capsys.readouterr().out == text
    assert main(["train", "--cfg", "--json", "--config", str(tmp_path / "c.yaml"), "run.steps=80"]) == 0
    assert json.loads(capsys.readouterr().out)["run"]["steps"] == 80


def test_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema == json_schema()
    assert schema["properties"].keys() >= {"model", "parallel", "run"}
    assert main(["config", "schema", "--output", str(tmp_path / "s.json")]) == 0
    assert json.loads((tmp_path / "s.json").read_text()) == schema
    assert main(["config", "schema", "--output", str(tmp_path / "no" / "s.json")]) == ExitCode.IO


def test_rules_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "rules", "--markdown"]) == 0
    assert capsys.readouterr().out == rules_page()
    page = (ROOT / "docs" / "reference" / "layout-rules.md").read_text(encoding="utf-8")
    assert page == rules_page(), "run: dist-llm config rules --markdown > docs/reference/layout-rules.md"
    assert all(f"`{rule.name}`" in page for rule in RULES)


def test_settings_page_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "--markdown"]) == 0
    assert capsys.readouterr().out == settings_page()
    page = (ROOT / "docs" / "reference" / "settings.md").read_text(encoding="utf-8")
    assert page == settings_page(), "run: dist-llm config settings --markdown > docs/reference/settings.md"


def test_settings_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "Parallel.Zero"]) == 0
    head, meaning = capsys.readouterr().out.splitlines()
    assert head == "parallel.zero: 0, 1, 2 or 3 (default 1)"
    assert meaning.startswith("    ZeRO stage (Rajbhandari et al. 2020): ")
    assert main(["config", "settings", "base of the angular"]) == 0
    assert capsys.readouterr().out.startswith("model.rope.theta: number above 1 (default 10000.0)\n")
    assert main(["config", "settings"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 * len(list_settings())


def test_settings_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "settings", "cluster.device", "--json"]) == 0
    device, count, host = json.loads(capsys.readouterr().out)["settings"]
    assert device == {
        "key": "cluster.device",
        "takes": "cpu or cuda",
        "required": True,
        "description": "Kind of device; a run on another kind has no MFU.",
    }
    assert (count["key"], count["required"]) == ("cluster.devices_per_node", True)
    assert (host["key"], host["required"], host["default"]) == ("cluster.devices_per_host", False, None)
    assert main(["config", "settings", "model.head_dim", "--json"]) == 0
    (width,) = json.loads(capsys.readouterr().out)["settings"]
    assert (width["required"], width["default"]) == (False, None)


def test_settings_load_nothing_heavy() -> None:
    program = (
        "import sys; from dist_llm.cli.main import main; main(['config', 'settings', '--markdown']); "
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_presets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "presets", "engine"]) == 0
    assert capsys.readouterr().out == "engine= deepspeed megatron native\n"
    assert main(["config", "presets", "--json"]) == 0
    assert "llama3-8b" in json.loads(capsys.readouterr().out)["model"]


def test_dry_run_shows_the_map(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "--dry-run", "--json", "experiment=quickstart", "run.name=a b"]) == ExitCode.CONFIG
    capsys.readouterr()
    assert main(["launch", "--dry-run", "--json", "experiment=quickstart", "run.dir=a b", "--debug"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["argv"][1:] == ["-m", "dist_llm", "train", "--debug", "experiment=quickstart", "run.dir=a b"]
    assert len(plan["ranks"]) == 8


def test_launch_checks_the_ranks_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "experiment=quickstart", "launcher.nproc=3"]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "ranks=3 must be a multiple of 4 = parallel.pipeline=2 x parallel.tensor=2; use 4, 8 or 16" in error
    assert "layouts that fit 3 ranks: parallel.tensor=1 parallel.pipeline=3 parallel.data=1" in error
    assert main(["launch", "launcher.nproc=x", "parallel.tensor=3"]) == ExitCode.CONFIG
    error = capsys.readouterr().err
    assert "launcher.nproc=x must be a whole number" in error
    assert "ranks=" not in error


def test_alone_is_told_how_to_launch(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "parallel.tensor=2", "run.dir=a b"]) == ExitCode.CONFIG
    assert "dist-llm launch parallel.tensor=2 'run.dir=a b' launcher.nproc=2" in capsys.readouterr().err


def _arguments(debug: bool = False, as_json: bool = False) -> argparse.Namespace:
    return argparse.Namespace(debug=debug, as_json=as_json, speaker="dist-llm", follows=False)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("c"), 78),
        (LayoutError("l"), 78),
        (CheckpointMismatch("m"), 78),
        (DataError("d"), 65),
        (StorageError("s"), 74),
        (NumericsError("n"), 76),
        (PeerLostError("p"), 69),
        (FileNotFoundError(2, "No such file or directory", "x"), 74),
        (ValueError("v"), 70),
        (AssertionError(), 70),
    ],
)
def test_errors_have_their_codes(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(arguments: argparse.Namespace) -> Answer:
        raise error

    assert cli_exit.execute(fail, _arguments()) == code
    printed = capsys.readouterr()
    assert ("Traceback" in printed.err) == (code == ExitCode.BUG)
    assert printed.err.splitlines()[-1].startswith("dist-llm: ")
    assert cli_exit.execute(fail, _arguments(as_json=True)) == code
    assert json.loads(capsys.readouterr().out)["exit_code"] == code


@pytest.mark.parametrize(("shared", "follows", "said"), [(True, True, 0), (True, False, 1), (False, True, 1)])
def test_what_all_ranks_share_is_said_once_a_node(
    shared: bool, follows: bool, said: int, capsys: pytest.CaptureFixture[str]
) -> None:
    error = DataError("the corpus is empty")
    error.shared = shared

    def fail(arguments: argparse.Namespace) -> Answer:
        raise error

    arguments = _arguments()
    arguments.follows = follows
    assert cli_exit.execute(fail, arguments) == ExitCode.BAD_DATA
    assert capsys.readouterr().err.count("the corpus is empty") == said


def test_lost_peers_of_torch_are_retried() -> None:
    import torch.distributed as dist

    assert cli_exit.exit_code(dist.DistNetworkError("Connection reset by peer")) == ExitCode.PEER_LOST
    assert cli_exit.exit_code(ConnectionResetError(104, "Connection reset by peer")) == ExitCode.PEER_LOST


def test_interrupt_has_a_shells_code(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: argparse.Namespace) -> Answer:
        raise KeyboardInterrupt

    assert cli_exit.execute(interrupted, _arguments()) == 130
    assert capsys.readouterr().err == "dist-llm: interrupted\n"


def test_json_keeps_stdout_clean(capsys: pytest.CaptureFixture[str]) -> None:
    def chatty(arguments: argparse.Namespace) -> Answer:
        print("a library talks")
        return Answer("text", {"value": 1}, 3)

    assert cli_exit.execute(chatty, _arguments(as_json=True)) == 3
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"value": 1}
    assert printed.err == "a library talks\n"
    assert cli_exit.execute(chatty, _arguments()) == 3
    assert capsys.readouterr().out == "a library talks\ntext\n"


def test_closed_pipe_is_no_error() -> None:
    words = [sys.executable, "-m", "dist_llm", "config", "schema"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=60) == 0
    assert error == b""


def test_answer_of_a_narrow_terminal() -> None:
    words = [sys.executable, "-X", "utf8=0", "-m", "dist_llm", "train", "modèl=x"]
    done = subprocess.run(words, capture_output=True, cwd=ROOT, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == ExitCode.CONFIG
    assert b"is not an override" in done.stderr


def _checkpoint_commands(path: Path) -> list[list[str]]:
    return [["checkpoint", leaf, str(path)] for leaf in ("list", "inspect", "verify")]


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()], ids=["missing", "empty"])
def test_no_checkpoint(make: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "run")
    codes = [main(words) for words in _checkpoint_commands(tmp_path / "run")]
    expected = [74, 74, 74] if not (tmp_path / "run").exists() else [0, 65, 65]
    assert codes == expected
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code"),
    [("config settings", 74), ("--help", 74), ("train --help", 74), ("train --json run.steps=-1", 78)],
)
def test_streams_that_cannot_be_written_leave_the_exit_code(words: str, code: int) -> None:
    """Nobody reads a traceback of the interpreter's last flush; stdout that was closed is nobody to tell."""
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

    def end(redirections: str) -> tuple[int, list[str]]:
        command = f"{sys.executable} -m dist_llm {words} {redirections}"
        done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=buffered)
        return done.returncode, done.stderr.splitlines()

    full, said = end("> /dev/full")
    assert (full, said[-1]) == (code, "dist-llm: cannot write to stdout: No space left on device")
    assert len(said) == (1 if code == 74 else 2)
    assert end("> /dev/full 2>&1")[0] == code
    left = 0 if code == 74 else code
    assert end("2> /dev/full")[0] == left
    assert end(">&-")[0] == left
    assert end("2>&- >&-")[0] == left
