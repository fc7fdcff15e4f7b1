"""What scaling laws foretell, against published tables and runs: part of `make foresight`.

    python benchmarks/foresight_laws.py FOLDER_OF_TABLES

Each line is an item, the figure reached, the bound it is held to, and whether it holds. Tables of others are read from
the folder given and never enter the repository.
"""

from __future__ import annotations

import csv
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from dist_llm.planner.batch_laws import BATCH_LAWS, advise, nearest_setting
from dist_llm.planner.chinchilla_models import chinchilla_parameters
from dist_llm.planner.fitting import PUBLISHED_PRIOR, Run
from dist_llm.planner.published_laws import PUBLISHED, parametric
from dist_llm.planner.repetition import repeated_loss
from dist_llm.planner.serving import cheapest_as_good_as
from dist_llm.planner.trust import fit_law

Row = tuple[str, str, str, bool]
"""Item, figure, bound, whether it holds."""

LARGEST_SMALL = 8e8
"""OLMo runs below are fitted, those above predicted: 190M, 370M and 760M against 1B."""


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a table, lines on its source left out."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("# source")))


def chinchilla_runs(anchors: Path) -> list[Run]:
    """Return the 240 runs that Besiroglu et al. 2024 fit: the 245 of Hoffmann's Figure 4 without the 5 of most loss."""
    runs = []
    for index, row in enumerate(read_table(anchors / "chinchilla_epoch_245_points.csv")):
        num_params, flops = float(row["Model Size"]), float(row["Training FLOP"])
        runs.append(Run(str(index), num_params, flops / (6 * num_params), float(row["loss"])))
    return sorted(runs, key=lambda run: run.loss)[:-5]


def olmo_runs(anchors: Path, column: str) -> list[Run]:
    """Return the final losses of the OLMo ladder on one of its evaluation sets."""
    rows = read_table(anchors / "olmo_ladder_final_losses.csv")
    return [Run(row["run"], float(row["params"]), float(row["total_tokens"]), float(row[column])) for row in rows]


def olmo_columns(anchors: Path) -> list[str]:
    """Return the evaluation sets of the OLMo ladder."""
    return list(read_table(anchors / "olmo_ladder_final_losses.csv")[0])[6:]


def rows(anchors: Path) -> list[Row]:
    """Return every figure."""
    parts = (_refit, _models, _repetition, _serving, _tables, _olmo, _batch)
    return [row for part in parts for row in part(anchors)]


def _refit(anchors: Path) -> Iterator[Row]:
    runs = chinchilla_runs(anchors)
    started = time.perf_counter()
    fit = fit_law(runs)
    seconds = time.perf_counter() - started
    yield _bounded("refit of 240 Chinchilla points: Huber sum - 0.00101827", abs(fit.huber_sum - 0.00101827), 1e-6)
    published = {
        row["parameter"]: float(row["value"])
        for row in read_table(anchors / "scaling_law_constants.csv")
        if row["law"].startswith("Besiroglu 2024 (Huber")
    }
    for name, value in published.items():
        reached = getattr(fit.law.constants, name)
        yield _bounded(f"  {name} {reached:.6g}, published {value:.6g}: relative gap", abs(reached / value - 1), 5e-4)
    yield _bounded("  seconds, resamples and runs left out included", seconds, 30)


def _models(anchors: Path) -> Iterator[Row]:
    table = read_table(anchors / "chinchilla_tableA9_models.csv")
    names = ("d_model", "ffw_size", "kv_size", "n_heads", "n_layers")
    gaps = [
        abs(chinchilla_parameters(*(int(row[name]) for name in names)) / 1e6 / float(row["params_M"]) - 1)
        for row in table
    ]
    close = sum(gap <= 0.01 for gap in gaps)
    yield f"Table A9: counts within 1 %, worst {max(gaps):.2%}", f"{close} of {len(gaps)}", "all", close == len(gaps)


def _repetition(anchors: Path) -> Iterator[Row]:
    checks = {(6.34e9, 242e9): "L(N=6.34e9,D=242e9,U=25e9)", (8.67e9, 178e9): "L(N=8.67e9,D=178e9,U=25e9)"}
    values = {row["parameter"]: row["value"] for row in read_table(anchors / "scaling_law_constants.csv")}
    law = parametric("muennighoff")
    gap = max(abs(repeated_loss(law, *run, 25e9) - float(values[name])) for run, name in checks.items())
    yield _bounded("Muennighoff check values: gap", gap, 1e-12)


def _serving(anchors: Path) -> Iterator[Row]:
    found = cheapest_as_good_as(parametric("hoffmann-3"), 13e9, 2e12)
    item = "Sardana: 13B quality, 2T tokens served"
    size, saved = found.num_params / 1e9, found.saved_share
    yield f"{item}: billions of parameters", f"{size:.2f}", "7 +- 0.3", abs(size - 7) <= 0.3
    yield f"{item}: saved", f"{saved:.1%}", "16 to 17 %", 0.16 <= saved <= 0.17


def _tables(anchors: Path) -> Iterator[Row]:
    table = read_table(anchors / "chinchilla_table3_tableA3.csv")
    for column, name in (("a1", "hoffmann-1"), ("a2", "hoffmann-2"), ("a3", "hoffmann-3-table"), ("a3", "hoffmann-3")):
        gaps = []
        for row in table:
            num_params, flops = float(row["params"]), float(row[f"{column}_flops"])
            flops *= 10 if (column, row["params"]) == ("a3", "1.75e+11") else 1
            gaps.append((abs(PUBLISHED[name].optimal(flops).num_params / num_params - 1), row["params"] == "6.7e+10"))
        rounded = max(gap for gap, rough in gaps if rough)
        item = f"Tables 3 and A3 by {name}: 8 rows' parameters (the 67B row {rounded:.1%}): worst"
        yield _bounded(item, max(gap for gap, rough in gaps if not rough), 0.08 if name == "hoffmann-3" else 0.005)


def _olmo(anchors: Path) -> Iterator[Row]:
    errors, contained = {}, 0
    for column in olmo_columns(anchors):
        runs = olmo_runs(anchors, column)
        fit = fit_law([run for run in runs if run.num_params < LARGEST_SMALL], prior=PUBLISHED_PRIOR)
        predictions = [fit.predict(run) for run in runs if run.num_params >= LARGEST_SMALL]
        errors[column] = sum(abs(prediction.error) for prediction in predictions) / len(predictions)
        contained += sum(prediction.contained for prediction in predictions)
    for column, error in errors.items():
        item, repeats = f"OLMo 190M to 760M predict 1B, {column}: mean error", _repeat_gap(olmo_runs(anchors, column))
        if repeats <= 0.01:
            yield _bounded(item, error, 0.01)
        else:
            yield item, f"{error:.3g}", f"none: runs made twice differ by {repeats:.1%}", True
    count = 6 * len(errors)
    yield "  inside their 95 % intervals", f"{contained} of {count}", "95 %", contained >= 0.95 * count


def _repeat_gap(runs: list[Run]) -> float:
    """Return the most by which the loss of a run made again differs from its first."""
    losses = {run.name: run.loss for run in runs}
    again = [name for name in losses if name.endswith("-rerun")]
    return max(abs(losses[name] / losses[name.removesuffix("-rerun")] - 1) for name in again)


def _batch(anchors: Path) -> Iterator[Row]:
    groups = defaultdict(list)
    for row in read_table(anchors / "steplaw_dense_lr_bs_loss.csv"):
        groups[float(row["N"]), float(row["D"])].append(row)
    for name, bound in (("step-law", 0.00096), ("deepseek", 0.00756), ("olmo-ladder", 0.00622)):
        gaps = []
        for (num_params, tokens), settings in groups.items():
            grid = [(float(row["lr"]), 2048 * float(row["bs"])) for row in settings]
            losses = [float(row["smooth loss"]) for row in settings]
            place = nearest_setting(advise(BATCH_LAWS[name], num_params, tokens, 2048), grid)
            gaps.append(losses[place] / min(losses) - 1)
        item = f"learning rate and batch by {name}: mean gap to the best of {len(gaps)} sweeps"
        yield _bounded(item, sum(gaps) / len(gaps), bound + 5e-6)


def _bounded(item: str, figure: float, bound: float) -> Row:
    return item, f"{figure:.3g}", f"<= {bound:.3g}", math.isfinite(figure) and figure <= bound


def main() -> int:
    """Print every figure; return 1 where one does not hold."""
    found = rows(Path(sys.argv[1]))
    for item, figure, bound, holds in found:
        print(f"{'  ' if holds else '! '}{item}: {figure} ({bound})")
    return 0 if all(holds for *_, holds in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
