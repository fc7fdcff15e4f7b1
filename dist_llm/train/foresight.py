"""What is foretold of a run, kept beside what is measured: `prediction.json`, which the report and calibration read."""

from __future__ import annotations

import json
import math
from pathlib import Path

from dist_llm.config.run import RunConfig
from dist_llm.planner.cost.step import predict_step
from dist_llm.planner.footprint import GIB, predict_memory
from dist_llm.planner.published_laws import DEFAULT_LAW, PUBLISHED
from dist_llm.planner.shapes import active_parameters
from dist_llm.runtime.log import get_logger
from dist_llm.telemetry.records import PREDICTION_FILE, write_whole

log = get_logger(__name__)


def write_prediction(config: RunConfig, ranks: int, run_dir: Path) -> None:
    """Write the step time, rank 0's memory and the loss that are foretold of a run into its folder.

    A run does not fail for what it cannot foretell. Raises StorageError where the system refuses.
    """
    try:
        step, memory = predict_step(config, ranks), predict_memory(config, ranks, by_stage=False)
    except Exception as error:
        log.warning("nothing is foretold of this run: %s", error)
        return
    tokens = config.run.steps * config.data.global_batch * config.data.seq_len
    found = {
        "cluster": config.cluster.name,
        "step_seconds": step.seconds,
        "components": dict(step.components),
        "memory_gib": memory.ranks[0].peak_bytes / GIB,
        "loss": _loss(config, tokens),
        "law": DEFAULT_LAW,
    }
    write_whole(run_dir / PREDICTION_FILE, json.dumps(found, indent=2) + "\n")


def _loss(config: RunConfig, tokens: int) -> float | None:
    """Return the loss that the default law foretells; None where it says more than that of guessing, ln(vocabulary)."""
    loss = PUBLISHED[DEFAULT_LAW].loss(active_parameters(config.model), tokens) if tokens else None
    return loss if loss is not None and loss < math.log(config.model.vocab_size) else None
