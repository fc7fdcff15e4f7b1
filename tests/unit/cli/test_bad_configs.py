"""Every bad command line ends with exit code 78, says what is wrong and what would do, and shows no traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from dist_llm.cli.main import main
from dist_llm.errors import ExitCode
from tests.work import counted

ISSUE = "parallel.tensor=3 model.num_heads=8 optimizer.lrr=1 data.global_batch=7 data.microbatch=2"

BAD: list[tuple[str | list[str], list[str]]] = [
    (
        ISSUE,
        [
            "parallel.tensor=3 must divide model.num_heads=8 and model.ffn_hidden_size=512; use 1, 2, 4 or 8",
            "optimizer.lrr=1 is not a setting: did you mean optimizer.lr?",
            "data.global_batch=7 must be a multiple of data.microbatch=2; use 4, 6, 8 or 10",
        ],
    ),
    ("model.num_heads=3", ["model.num_heads=3 must divide model.hidden_size=128", "use 1, 2, 4 or 8"]),
    ("model.num_kv_heads=3", ["model.num_kv_heads=3 must divide model.num_heads=4; use 1, 2 or 4"]),
    ("model=llama3-8b parallel.tensor=6", ["model.num_heads=32, model.num_kv_heads=8", "use 1, 2, 4 or 8"]),
    ("parallel.pipeline=5", ["parallel.pipeline=5 must not exceed model.num_layers=4; use 1, 2, 3 or 4"]),
    (
        "parallel.pipeline=2 parallel.schedule=zbv parallel.virtual_pipeline=3",
        ["=3 must be 2 under parallel.schedule=zbv"],
    ),
    ("parallel.pipeline=2 parallel.schedule=interleaved", ["parallel.virtual_pipeline=1 must be at least 2"]),
    ("parallel.pipeline=4 data.global_batch=4", ["data.global_batch=4 gives a rank 2 of the 4 microbatches"]),
    ("parallel.virtual_pipeline=2", ["parallel.virtual_pipeline=2 must be 1 when parallel.pipeline=1; use 1"]),
    ("parallel=tp2 data.seq_len=63", ["data.seq_len=63 must be a multiple of parallel.tensor=2"]),
    ("data.seq_len=512", ["data.seq_len=512 must not exceed model.max_seq_len=256"]),
    ("parallel=single launcher.nproc=2 parallel.data=2", ["ranks=1 must be parallel.data=2; use 2"]),
    ("parallel=tp2pp2dp2", ["ranks=1 must be 8 = parallel.data=2 x parallel.pipeline=2 x parallel.tensor=2; use 8"]),
    ("experiment=quickstart", ["ranks=1 must be a multiple of 4", "dist-llm launch experiment=quickstart"]),
    ("parallel.context=2", ["ranks=1 must be a multiple of parallel.context=2; use 2, 4, 8 or 16"]),
    ("parallel.expert=2", ["parallel.expert=2 must be 1 without model.moe.num_experts; use 1"]),
    (
        "parallel.recompute=selective parallel.recompute_operators=[attention]",
        ["parallel.recompute_operators[0]=attention is not one of its choices; use", "core_attn"],
    ),
    ("parallel.recompute_layers=2", ["parallel.recompute_layers=2 must be null under parallel.recompute=none"]),
    ("parallel.zero=4", ["parallel.zero=4 is not one of its choices; use 0, 1, 2 or 3"]),
    ("parallel.zero=3 parallel.replicate=2", ["parallel.replicate=2 must divide the data axis of 1 ranks; use 1"]),
    (
        "engine=deepspeed parallel.pipeline=2",
        ["engine.name=deepspeed runs no pipeline: parallel.pipeline=2 would have to be 1; use native or megatron"],
    ),
    (
        "engine=megatron parallel.zero=3",
        ["engine.name=megatron shards optimizer state alone", "parallel.zero=3 would have to be 0 or 1; use native"],
    ),
    ("engine.fp8=hybrid", ["engine.fp8=hybrid is for engine=megatron, not native; use none"]),
    ("engine=native2", ["engine=native2 is not one of the 3 presets of engine; use native, deepspeed or megatron"]),
    (
        "launcher=mpi",
        ["launcher.name=mpi is not part of this version", "torchrun -m dist_llm train", "use local or slurm"],
    ),
    ("launcher.nodes=2", ["launcher.nodes=2 must be 1 under launcher=local"]),
    ("model=lama-tiny", ["model=lama-tiny is not one of the", "use llama-tiny"]),
    ("model=", ["model='' is not one of the"]),
    ("model=null", ["model=null is not one of the"]),
    ("model=../../etc/passwd", ["model=../../etc/passwd is not one of the"]),
    ("model=[llama-tiny,gpt2-tiny]", ["is not one of the"]),
    ("model@parallel=llama-tiny", ["argument=model@parallel=llama-tiny is not an override"]),
    ("experiment=quickstat", ["experiment=quickstat is not one of the", "use quickstart"]),
    ("cluster=h100", ["cluster=h100 is not one of the", "h100-sxm"]),
    ("paralel.tensor=2", ["paralel.tensor=2 is not a setting: did you mean parallel.tensor?"]),
    ("tensor=2", ["tensor=2 is not a setting: did you mean parallel.tensor?"]),
    ("model.layers=2", ["model.layers=2 is not a setting: did you mean model.num_layers?"]),
    ("run.stpes=2", ["run.stpes=2 is not a setting: did you mean run.steps?"]),
    ("device=gpu", ["device=gpu is not one of its choices; use auto, cpu or cuda"]),
    ("device.name=cpu", ["device.name=cpu is inside device, which is no section; use device"]),
    ("run.steps.x=1", ["run.steps.x=1 is inside run.steps, which is no section; use run.steps"]),
    ("run.steps=1.5", ["run.steps=1.5 must be a whole number; use 2"]),
    ("run.steps=1e3", ["run.steps=1000.0 must be a whole number; use 1000"]),
    ("run.steps=1e400", ["run.steps=inf must be a whole number"]),
    ("run.steps=07", ["run.steps=07 must be a whole number; use 7"]),
    ("run.steps=-1", ["run.steps=-1 must be at least 0; use 0"]),
    ("run.steps=true", ["run.steps=true must be a whole number"]),
    ("run.steps=null", ["run.steps=unset must be a whole number"]),
    ("run.steps=", ["run.steps= must be a whole number"]),
    ("run.steps=[1]", ["run.steps=[1] must be a whole number"]),
    ("run.steps={a:1}", ["run.steps={'a': 1} must be a whole number"]),
    ("run.steps=" + "9" * 40, ["must be at most 2147483647"]),
    ("run.steps=" + "9" * 5000, ["is longer than 4096 characters"]),
    ("run.steps=1,2", ["run.steps=1,2 is a sweep: start one run a value"]),
    ("run.steps=range(1,5)", ["run.steps=range(1,5) is a sweep"]),
    ("run.steps='1", ["run.steps='1 cannot be parsed"]),
    ("run.steps=[1,2", ["run.steps=[1,2 cannot be parsed"]),
    ("run.steps=" + "[" * 2000, ["cannot be parsed"]),
    ("run.steps=$(id)", ["run.steps=$(id) cannot be parsed"]),
    ("run.resume=maybe", ["run.resume=maybe is not one of its choices; use auto, must or never"]),
    ("run.name=../x", ["run.name=../x must be a folder name"]),
    ("run.name=", ["run.name= must be a folder name"]),
    ("run.name=a,b", ["run.name=a,b must be a folder name"]),
    (["run.name=a\nb"], ["run.name=a\\nb must be a folder name"]),
    (["run.dir=a\x1bb"], ["run.dir=a\\x1bb must be a path"]),
    ("run.dir=", ["run.dir= must be a path"]),
    (["data.path=\udcff"], ["data.path=\\udcff must be valid Unicode text"]),
    ("run.name=null", ["run.name=unset must be text"]),
    ("optimizer.lr=nan", ["optimizer.lr=nan must be finite"]),
    ("optimizer.lr=0", ["optimizer.lr=0 must be greater than 0"]),
    ("optimizer.lr=fast", ["optimizer.lr=fast must be a number"]),
    ("optimizer.betas=[0.9]", ["optimizer.betas[1]=unset must be given"]),
    ("optimizer.betas=[0.9,1.0]", ["optimizer.betas[1]=1.0 must be less than 1"]),
    ("optimizer.betas=0.9", ["optimizer.betas=0.9 must be a list"]),
    ("optimizer=sgd", ["optimizer=sgd is not one of the"]),
    ("optimizer.name=muon", ["optimizer.name=muon is not one of its choices; use adamw"]),
    ("parallel.sequence=no", ["parallel.sequence=no is not a switch; use true or false"]),
    ("parallel={tensor:2}", ["is not one of the", "presets of parallel"]),
    ("model.rope={thetta:2}", ["model.rope.thetta=2 is not a setting: did you mean model.rope.theta?"]),
    ("model.rope.factor=2", ["model.rope.factor=2.0 has no effect under model.rope.scaling=none; use 1"]),
    ("telemetry.eval_interval=5", ["telemetry.eval_interval=5 needs data.validation_fraction above 0"]),
    ("checkpoint.asynchronous=true", ["checkpoint.asynchronous=true is not part of this version; use false"]),
    ("checkpoint.keep=0", ["checkpoint.keep=0 must be at least 1; use 1"]),
    ("precision=fp64 device=cuda", ["precision.name=fp64 is for verification on device=cpu"]),
    ("precision=fp8", ["precision=fp8 is not one of the 4 presets of precision"]),
    ("data.path=${oc.env:HOME}", ["data.path=${oc.env:HOME} is refused: a config has no interpolation"]),
    ("run.seed=${now:%s}", ["run.seed=${now:%s} is refused"]),
    ("model._target_=os.system", ["model._target_=os.system is refused: keys are names of settings"]),
    ("_target_=os.system", ["_target_=os.system is refused"]),
    ("hydra.searchpath=[/tmp]", ["hydra.searchpath=['/tmp'] is not a setting"]),
    ("hydra/launcher=x", ["argument=hydra/launcher=x is not an override"]),
    ("hydra.run.dir=/tmp", ["hydra.run.dir=/tmp is not a setting"]),
    ("~model", ["argument=~model deletes a setting"]),
    ("+model.x=1", ["model.x=1 is not a setting"]),
    ("++parallel.tensor=3", ["parallel.tensor=3 must divide"]),
    ("=3", ["argument==3 is not an override"]),
    ("steps", ["argument=steps is not an override: write key=value"]),
    ([""], ["argument='' is not an override"]),
    ([" "], ["is not an override"]),
    ("a..b=1", ["argument=a..b=1 is not an override"]),
    ("modèl=x", ["argument=modèl=x is not an override"]),
    ("--run.steps=3", ["unrecognized arguments: --run.steps=3 (settings are written key=value without dashes"]),
    ("--config", ["argument --config: expected one argument"]),
    ("--config /nowhere/config.yaml", ["--config /nowhere/config.yaml: No such file or directory"]),
    ("--config /tmp", ["--config /tmp: Is a directory"]),
    ("--con /tmp", ["unrecognized arguments: --con"]),
]


@pytest.mark.parametrize(("words", "fragments"), BAD, ids=[str(case[0])[:60] for case in BAD])
def test_is_refused(words: str | list[str], fragments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with counted() as work:
        code = main(["train", *(words.split() if isinstance(words, str) else words)])
    printed = capsys.readouterr()
    assert code == ExitCode.CONFIG
    assert printed.out == ""
    assert "Traceback" not in printed.err
    for fragment in fragments:
        assert fragment in printed.err
    assert work.lines < 20_000_000


def test_there_are_many() -> None:
    assert len({str(case[0]) for case in BAD}) == len(BAD) >= 100


def test_the_issue_at_once_without_torch() -> None:
    program = (
        "import sys; from dist_llm.cli.main import main; code = main(sys.argv[1:]); "
        "print('torch' in sys.modules, code); raise SystemExit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, "train", *ISSUE.split()], capture_output=True, text=True)
    assert done.returncode == ExitCode.CONFIG
    assert done.stdout.split() == ["False", "78"]
    assert done.stderr.splitlines()[1:] == [
        "  optimizer.lrr=1 is not a setting: did you mean optimizer.lr?",
        "  parallel.tensor=3 must divide model.num_heads=8 and model.ffn_hidden_size=512; use 1, 2, 4 or 8",
        "  data.global_batch=7 must be a multiple of data.microbatch=2; use 4, 6, 8 or 10",
        "  ranks=1 must be a multiple of parallel.tensor=3; use 3, 6, 9 or 12",
    ]


def test_json_error_is_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["train", "--cfg", "--json", "parallel.tensor=3", "run.steps=nan"])
    printed = capsys.readouterr()
    facts = json.loads(printed.out)
    assert code == facts["exit_code"] == ExitCode.CONFIG
    assert facts["ok"] is False
    assert [violation["key"] for violation in facts["violations"]] == ["run.steps", "parallel.tensor"]
    assert facts["violations"][1]["legal"] == [1, 2, 4]


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--debug", "parallel.tensor=3"]) == ExitCode.CONFIG
    assert "Traceback" in capsys.readouterr().err
