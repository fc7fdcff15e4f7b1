"""From a budget to a plan: it spends what it may, fits, is legal, and says what comes nearest when there is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dist_llm.cli.main import main
from dist_llm.config.checks import OF_THIS_MACHINE, RULES, check
from dist_llm.config.decode import decode
from dist_llm.errors import ExitCode
from dist_llm.planner.outline import round_batch
from dist_llm.planner.published_laws import PUBLISHED
from dist_llm.planner.ranking import FULL
from tests.planner.conftest import Plan

CLUSTER = ("cluster=h100-sxm", "cluster.nodes=1")


def test_it_is_the_law_s_optimum(plan: Plan) -> None:
    found = plan("budget.flops=1e20", *CLUSTER)
    best = PUBLISHED["besiroglu"].optimal(1e20)
    assert found["law"]["name"] == "besiroglu"
    assert found["model"]["num_params"] == pytest.approx(best.num_params, rel=0.1)
    assert found["tokens"] * found["model"]["num_params"] * 6 == pytest.approx(1e20, rel=0.01)
    assert found["loss"] == pytest.approx(best.loss, rel=1e-3)
    low, high = found["loss_interval"]
    assert low < found["loss"] < high
    assert {"besiroglu", "hoffmann-1", "hoffmann-2", "hoffmann-3", "kaplan"} <= {law["name"] for law in found["laws"]}


def test_layouts_fit_and_are_sorted(plan: Plan) -> None:
    found = plan("budget.flops=1e20", *CLUSTER, "--top", "50")
    layouts = found["layouts"]
    assert [each["step_seconds"] for each in layouts] == sorted(each["step_seconds"] for each in layouts)
    assert all(each["memory_gib"]["peak"] <= FULL * 79.6 for each in layouts)
    assert all(sum(each["components"].values()) == pytest.approx(each["step_seconds"]) for each in layouts)
    front = found["pareto"]
    assert [point["step_seconds"] for point in front] == sorted((p["step_seconds"] for p in front), reverse=True)
    assert front[-1]["step_seconds"] == layouts[0]["step_seconds"]


def test_time_money_and_energy_follow_from_the_step(plan: Plan) -> None:
    found = plan("budget.flops=1e20", *CLUSTER)
    work = found["steps"] * found["step_seconds"]
    hours = found["interruptions"]["wall_seconds"] * 8 / 3600
    assert found["interruptions"]["wall_seconds"] > work
    assert found["gpu_hours"] == pytest.approx(hours)
    assert found["usd"] == pytest.approx(hours * 2.3)
    assert found["days"] == pytest.approx(hours / 8 / 24)
    dear = plan("budget.flops=1e20", *CLUSTER, "cluster.usd_per_device_hour=4.6")
    assert dear["usd"] == pytest.approx(2 * found["usd"])


@pytest.mark.parametrize("budget", [("gpu_hours", 100.0), ("usd", 300.0)])
def test_a_budget_of_hours_or_money_is_met(plan: Plan, budget: tuple[str, float]) -> None:
    name, amount = budget
    found = plan(f"budget.{name}={amount}", *CLUSTER)
    assert found[name] == pytest.approx(amount, rel=0.02)


def test_hours_have_a_plan_though_a_guess_on_the_way_has_none(plan: Plan) -> None:
    found = plan("budget.gpu_hours=96090", "cluster=l40s")
    assert 0.95 * 96090 < found["gpu_hours"] <= 96090


def test_heads_of_odd_widths_are_nearly_as_wide_as_usual(plan: Plan) -> None:
    model = plan("budget.flops=1e22", *CLUSTER, "model.num_layers=30", "model.hidden_size=5000")["model"]
    assert model["hidden_size"] // model["num_heads"] == 100


@pytest.mark.parametrize(
    "words",
    [
        ["budget.flops=2.61e24", "cluster=l40s", "cluster.nodes=3"],
        ["budget.flops=6.17e21", "cluster=a100-40gb", "cluster.nodes=3", "model=llama2-13b", "parallel.schedule=gpipe"],
        ["budget.flops=4.21e18", "cluster=h100-sxm", "cluster.nodes=6", "model=mixtral-8x7b", "data.microbatch=32"],
        ["budget.gpu_hours=1e4", "cluster=h200", "cluster.nodes=4", "model.num_kv_heads=2", "parallel.tensor=4"],
    ],
    ids=" ".join,
)
def test_all_that_is_proposed_is_possible(plan: Plan, refused: Callable[..., str], words: list[str]) -> None:
    proposed = re.findall(r"^  ([\w.]+)=.*; use (.+)$", refused(*words), re.MULTILINE)
    assert proposed
    for key, values in proposed:
        rest = [word for word in words if not word.startswith(f"{key}=")]
        for value in re.split(", | or ", values):
            assert plan(*rest, f"{key}={value}")["layouts"]


def test_too_few_hours_are_told_what_the_smallest_plan_takes(plan: Plan, refused: Callable[..., str]) -> None:
    said = refused("budget.gpu_hours=1e-9", *CLUSTER)
    enough = re.search(r"smallest plan found takes .* device-hours; use (\S+)", said)
    assert enough
    found = plan(f"budget.gpu_hours={enough[1]}", *CLUSTER)
    assert 0.3 * float(enough[1]) < found["gpu_hours"] <= float(enough[1])


def test_text_that_would_do_is_named(plan: Plan, refused: Callable[..., str]) -> None:
    enough = re.search(r"a guess has .*; use (\S+)", refused("budget.flops=1e20", *CLUSTER, "data.tokens=2"))
    assert enough
    assert plan("budget.flops=1e20", *CLUSTER, f"data.tokens={enough[1]}")["loss"] < 12


def test_a_run_of_nearly_a_billion_has_a_name(plan: Plan) -> None:
    assert plan("budget.flops=4.816e22", "cluster=h100-sxm", "cluster.nodes=8", "model=llama3-8b")["layouts"]


def test_the_written_config_trains_what_was_planned(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    found = plan("budget.flops=1e20", "cluster=a100-80gb", "cluster.nodes=4", "--write", str(path))
    config = decode(yaml.safe_load(path.read_text()))
    assert [v for v in check(config, 32) if v.key != "launcher.name"] == []
    assert (config.launcher.name, config.launcher.nodes, config.launcher.nproc) == ("slurm", 4, 8)
    tokens = config.run.steps * config.data.global_batch * config.data.seq_len
    assert tokens == found["tokens"]
    assert config.optimizer.lr == found["optimizer"]["lr"]
    layout = {f"parallel.{key}": value for key, value in config.parallel.model_dump(mode="json").items()}
    layout["data.microbatch"] = config.data.microbatch
    chosen = found["layouts"][0]["overrides"]
    assert chosen == {key: layout[key] for key in chosen}
    assert main(["launch", "--dry-run", "--config", str(path)]) == ExitCode.DONE


def test_a_node_of_several_hosts_has_its_ranks_started_on_each(plan: Plan, tmp_path: Path) -> None:
    """A rack of GB200 is one domain of NVLink and 18 hosts."""
    path = tmp_path / "plan.yaml"
    plan("budget.flops=1e21", "cluster=gb200", "cluster.nodes=2", "--write", str(path))
    launcher = decode(yaml.safe_load(path.read_text())).launcher
    assert (launcher.name, launcher.nodes, launcher.nproc) == ("slurm", 36, 4)
    assert main(["launch", "--dry-run", "--config", str(path)]) == ExitCode.DONE


def test_pictures_are_drawn(plan: Plan, tmp_path: Path) -> None:
    found = plan("budget.flops=1e19", *CLUSTER, "--pictures", str(tmp_path / "drawn"))
    assert [Path(path).name for path in found["pictures"]] == ["isoflop.png", "layouts.png"]
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in found["pictures"])


def test_little_data_is_repeated_and_serving_makes_it_smaller(plan: Plan) -> None:
    plain = plan("budget.flops=1e20", *CLUSTER)
    repeated = plan("budget.flops=1e20", *CLUSTER, "data.tokens=4e9")
    assert repeated["epochs"] == pytest.approx(repeated["tokens"] / 4e9, rel=0.02)
    assert repeated["tokens"] > plain["tokens"]
    assert repeated["loss"] > plain["loss"]
    served = plan("budget.flops=1e20", *CLUSTER, "serving.tokens=1e11")
    assert served["model"]["num_params"] < 0.8 * plain["model"]["num_params"]
    assert served["serving"]["saved_flops"] > 0


def test_a_given_model_keeps_its_shape(plan: Plan) -> None:
    found = plan("budget.flops=1e19", *CLUSTER, "model=gpt2-124m", "data.seq_len=1024")
    assert found["model"]["num_params"] == 124439808
    assert found["tokens"] == pytest.approx(1e19 / 6 / 124439808, rel=0.01)


def test_experts_count_by_what_a_token_meets(plan: Plan) -> None:
    found = plan("budget.flops=1e20", *CLUSTER, "model.moe.num_experts=8", "model.moe.top_k=2")
    model = found["model"]
    assert model["active_params"] < 0.6 * model["num_params"]
    assert 6 * model["active_params"] * found["tokens"] == pytest.approx(1e20, rel=0.01)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cluster=h100-sxm"], "budget.flops=unset must be given"),
        (["budget.flops=1e20", "budget.usd=5"], "budget.usd=5.0 is one of budget.flops and budget.usd: give one"),
        (["budget.flops=-1"], "budget.flops=-1 must be greater than 0"),
        (["budget.flops=1e20", "data.tokens=-5"], "data.tokens=-5 must be at least 1"),
        (["budget.flops=1e20", *CLUSTER, "data.tokens=2"], "data.tokens=2.0 would be seen"),
        (
            ["budget.flops=1e22", *CLUSTER, "cluster.nodes=8", "data.seq_len=100000000"],
            "data.seq_len=100000000 or train",
        ),
        (["budget.flops=1e20", "cluster=h200-sx"], "cluster=h200-sx is not one of the"),
        (["budget.flops=1e20", "law=chinchila"], "is neither a published law nor a law file"),
        (["budget.flops=10"], "is too little to train anything"),
        (["budget.usd=0.00001", "cluster=h100-sxm"], "budget.usd=1e-05 is too little to train anything"),
        (["budget.flops=1e20", "cluster=h100-sxm", "cluster.memory_gib=2"], "holds no layout of"),
        (["budget.flops=1e20", *CLUSTER, "cluster.mtbf_device_hours=0.01"], "lets 8 devices fail every"),
        (["budget.flops=1e20", *CLUSTER, "model.num_heads=13", "model.hidden_size=1792"], "model.num_heads=13"),
        (["budget.flops=1e20", *CLUSTER, "cluster.devices_per_node=null"], "must be given where devices are GPUs"),
        (["budget.flop=1e20"], "did you mean budget.flops?"),
        (["budget.flops=1e27", *CLUSTER], "cluster.nodes=1 would take"),
        (
            ["budget.flops=1e20", "model=llama3-405b", *CLUSTER],
            "cluster.nodes=1 holds no layout of 4.06e+11 parameters",
        ),
        (["budget.flops=1e19", "model=gpt2-124m", "data.seq_len=4096", *CLUSTER], "data.seq_len=4096 must not exceed"),
        (["budget.flops=1e18", "cluster=h100-sxm", "cluster.nodes=4096"], "can be dealt to so many in no layout"),
    ],
)
def test_what_cannot_be_is_said_with_what_is_near(refused: Callable[..., str], words: list[str], said: str) -> None:
    assert said in refused(*words)


def test_more_nodes_than_said_hold_the_model(refused: Callable[..., str], plan: Plan) -> None:
    said = refused("budget.flops=1e22", "model=llama3-70b", "cluster=a100-80gb", "cluster.nodes=1")
    nodes = said.partition("; use ")[2].split()[0]
    assert plan("budget.flops=1e22", "model=llama3-70b", "cluster=a100-80gb", f"cluster.nodes={nodes}")["layouts"]


@pytest.mark.parametrize(
    ("sequences", "devices", "rounded"),
    [
        (1, 8, 1),
        (2.4, 8, 2),
        (5.5, 8, 8),
        (100, 64, 96),
        (400, 64, 384),
        (700, 24, 768),
        (200, 56, 224),
        (3, 56, 4),
        (370, 512, 512),
    ],
)
def test_batches_are_round(sequences: float, devices: int, rounded: int) -> None:
    assert round_batch(sequences, devices) == rounded


def test_an_odd_number_of_nodes_is_used_as_well(plan: Plan) -> None:
    seven, eight = (plan("budget.flops=1e20", "cluster=h100-sxm", f"cluster.nodes={nodes}") for nodes in (7, 8))
    assert seven["mfu"] > 0.85 * eight["mfu"]


def test_what_is_said_to_be_near_is_possible(refused: Callable[..., str], plan: Plan) -> None:
    """Values that a refusal names make a plan, or one that is refused for another reason no more."""
    said = refused("budget.flops=2e24", *CLUSTER)
    nodes, flops = (part.split()[0] for part in said.split("; use ")[1:])
    assert plan("budget.flops=2e24", "cluster=h100-sxm", f"cluster.nodes={nodes}")["days"] < 3653
    assert float(flops) < 2e24


def test_a_batch_of_a_million_is_weighed_at_once(plan: Plan) -> None:
    assert plan("budget.flops=1e20", *CLUSTER, "data.global_batch=1000000", "data.seq_len=512")["steps"] >= 1


def test_what_lies_outside_of_the_law_is_said(plan: Plan) -> None:
    small, usual = plan("budget.flops=1e15", *CLUSTER), plan("budget.flops=1e20", *CLUSTER)
    assert (small["law"]["extrapolates"], usual["law"]["extrapolates"]) == (True, False)
    assert "outside of the" in small["reasons"][0]["because"]
    assert small["optimizer"]["lr"] == 0.01


def test_laws_without_a_loss_count_repeats(plan: Plan, refused: Callable[..., str]) -> None:
    found = plan("budget.flops=1e20", *CLUSTER, "law=llama-3", "data.tokens=1e9")
    assert found["epochs"] == pytest.approx(found["tokens"] / 1e9, rel=0.02)
    assert "law=llama-3 says nothing of the loss" in refused(
        "budget.flops=1e20", *CLUSTER, "law=llama-3", "serving.tokens=1e12"
    )


def test_rules_of_this_machine_exist() -> None:
    assert {rule.name for rule in RULES} >= OF_THIS_MACHINE
