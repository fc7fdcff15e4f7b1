"""Runs to fit a law to: from folders of runs, or from a table of others' runs.

A folder gives parameters by the counter (its config.yaml; of experts those that a token meets), tokens of its last
step, and as loss its last evaluation (validation.jsonl) or the mean over the last twentieth of its steps
(metrics.jsonl). A table is CSV or JSONL.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dist_llm.accounting.params import embedding_parameters
from dist_llm.config.decode import decode
from dist_llm.config.document import read_document
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, DataError, StorageError, Violation
from dist_llm.planner.fitting import Run
from dist_llm.planner.shapes import active_parameters
from dist_llm.telemetry.records import CONFIG_FILE, VALIDATION_FILE, MetricsLine, read_lines, read_metrics

SMOOTHED_SHARE = 0.05
"""Share of a run's steps, the last, over which its training loss is averaged."""
COLUMNS = {
    "name": ("name", "run", "exp_name"),
    "params": ("params", "num_params", "n", "model size"),
    "tokens": ("tokens", "total_tokens", "d"),
    "flops": ("flops", "training flop", "training flops", "c"),
    "loss": ("loss", "val_loss", "final_loss"),
}
"""What columns of a table may be called, in any case; tokens may be left out where FLOPs are given."""
MAX_TABLE_BYTES = 2**26


@dataclass(frozen=True)
class FolderRun:
    """A run read from its folder, with both kinds of loss and both counts of parameters."""

    name: str
    num_params: int
    num_embedding_params: int
    tokens: int
    training_loss: float
    validation_loss: float | None
    validation_tokens: int
    """Tokens of the last evaluation, 0 where there is none."""
    finished: bool
    converged: bool
    """Whether most of its last steps have a loss: a run that diverged is no point of a law."""
    text: str
    """Setting data.path: losses on other text are of another law."""

    @property
    def fault(self) -> str | None:
        """Why it is left out, None where it is not."""
        if not self.finished:
            return "it has not reached run.steps"
        return None if self.converged else "its last steps have no finite loss"

    def as_run(self, validation: bool, embeddings: bool) -> Run:
        """Return the run as a fit takes it."""
        loss = self.validation_loss if validation else self.training_loss
        assert loss is not None
        params = self.num_params if embeddings else self.num_params - self.num_embedding_params
        return Run(self.name, float(params), float(self.tokens), loss)


def read_folder(folder: Path) -> FolderRun:
    """Return the run in a folder. Raises ConfigError where it is no run's, DataError where it has no usable loss."""
    if not (folder / CONFIG_FILE).is_file():
        raise ConfigError([Violation("RUN", str(folder), f"holds no {CONFIG_FILE}: it is not the folder of a run")])
    config = decode(read_document(folder / CONFIG_FILE))
    lines = read_metrics(folder)
    losses = [line.loss for line in lines if _usable(line)]
    if not lines or not losses:
        raise DataError(f"{folder}: metrics.jsonl has no step with a finite loss")
    last = lines[-max(1, round(SMOOTHED_SHARE * len(lines))) :]
    final = [line.loss for line in last if line.loss is not None and _usable(line)]
    return FolderRun(
        config.run.name,
        active_parameters(config.model),
        _embedding_params(config),
        lines[-1].tokens,
        sum(final) / len(final) if final else math.nan,
        *_last_evaluation(folder, lines[-1].step),
        lines[-1].step >= config.run.steps,
        2 * len(final) >= len(last),
        str(config.data.path),
    )


def read_table(path: Path, names: Mapping[str, str] | None = None) -> list[Run]:
    """Return the runs of a CSV or JSONL table; `names`: which column holds params, tokens, flops, loss or name.

    Raises ConfigError where a column is missing, DataError naming the row that holds no number.
    """
    rows = list(_rows(path))
    if not rows:
        raise DataError(f"{path}: no rows")
    columns = _columns(path, list(rows[0]), names or {})
    return [_table_run(path, number, row, columns) for number, row in enumerate(rows, 1)]


def _usable(line: MetricsLine) -> bool:
    return line.loss is not None and math.isfinite(line.loss) and line.loss > 0 and not line.skipped


def _embedding_params(config: RunConfig) -> int:
    """Return the parameters of token and position tables, and of the output projection where it is not tied."""
    model = config.model
    head = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return head + sum(spec.numel for spec in embedding_parameters(model))


def _last_evaluation(folder: Path, last_step: int) -> tuple[float | None, int]:
    """Return the loss of the evaluation after the last step and its tokens; None and 0 where there was none then."""
    found = [line for line in read_lines(folder / VALIDATION_FILE) if line.get("step") == last_step]
    loss, tokens = (found[-1].get("loss"), found[-1].get("tokens")) if found else (None, None)
    if not (isinstance(loss, int | float) and math.isfinite(loss) and loss > 0):
        return None, 0
    return float(loss), tokens if isinstance(tokens, int) else 0


def _rows(path: Path) -> Iterator[dict[str, object]]:
    """Yield the rows of a table, lines that begin with `# ` and a small letter left out as comments."""
    try:
        if path.stat().st_size > MAX_TABLE_BYTES:
            raise DataError(f"{path}: a table of runs must not exceed {MAX_TABLE_BYTES} bytes")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(
            [Violation("RUN", str(path), "is neither the folder of a run nor a table of runs")]
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("# source")]
    if path.suffix in (".jsonl", ".json"):
        for number, line in enumerate(lines, 1):
            yield _json_row(path, number, line)
        return
    for row in csv.DictReader(lines):
        yield {str(key): value for key, value in row.items()}


def _json_row(path: Path, number: int, line: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, row {number}: not a JSON object on one line") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: not a JSON object on one line")
    return row


def _columns(path: Path, present: list[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return which column holds what. Raises ConfigError with all that is missing."""
    by_name = {column.strip().lower(): column for column in reversed(present)}
    found = {}
    missing = []
    for wanted, known in COLUMNS.items():
        if wanted in names:
            if names[wanted] in present:
                found[wanted] = names[wanted]
            else:
                missing.append(Violation("--columns", f"{wanted}={names[wanted]}", f"is no column of {path}"))
        elif column := next((by_name[name] for name in known if name in by_name), None):
            found[wanted] = column
    needed = ["params", "loss", *([] if "flops" in found else ["tokens"])]
    for wanted in needed:
        if wanted not in found and wanted not in names:
            words = f"is missing from {path}, which has {', '.join(present[:12])}: name it by --columns {wanted}=..."
            missing.append(Violation("column", wanted, words))
    if missing:
        raise ConfigError(missing)
    return found


def _table_run(path: Path, number: int, row: Mapping[str, object], columns: Mapping[str, str]) -> Run:
    def figure(wanted: str) -> float:
        try:
            value = float(str(row.get(columns[wanted])))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise DataError(f"{path}, row {number}: {columns[wanted]} must be a positive number")
        return value

    params = figure("params")
    tokens = figure("tokens") if "tokens" in columns else figure("flops") / (6 * params)
    name = str(row.get(columns["name"])) if "name" in columns else f"row {number}"
    return Run(name, params, tokens, figure("loss"))
