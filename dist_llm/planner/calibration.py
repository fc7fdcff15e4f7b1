"""A hardware file from runs: the few figures of it that make predicted step times those that were measured.

    minimise   sum over runs (ln (predicted / measured) / NOISE)^2 + sum over figures (ln (figure / preset) / WIDE)^2

The second sum keeps a figure at the preset's where runs say nothing of it. Rates of products are the peak's on a CPU,
which no data sheet gives, and the part of it that is reached on a GPU.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from dist_llm.config.cluster import ClusterConfig, PeakTflops
from dist_llm.config.run import RunConfig
from dist_llm.planner.cost.step import predict_step

WIDE = 1.5
"""Standard deviation of a figure about the preset's, in logarithms: a factor of 4.5."""

NOISE = 0.03
"""Standard deviation of a run's median step about a right prediction, in logarithms."""

STEP_SECTIONS = ("model", "parallel", "engine", "cluster")
STEP_SETTINGS = (
    ("run", "deterministic"),
    ("optimizer", "name"),
    ("precision", "name"),
    ("data", "seq_len"),
    ("data", "global_batch"),
    ("data", "microbatch"),
    ("data", "document_mask"),
    ("launcher", "nodes"),
    ("launcher", "nproc"),
    ("launcher", "threads"),
)
"""What of a config changes the time of a step, beside how the machine is that day."""

FARTHEST = math.log(50)
_COMMON = ("memory_gb_per_second", "dispatch_microseconds", "link_gb_per_second", "link_microseconds")


@dataclass(frozen=True)
class Observation:
    """A run that was timed: its config, its ranks, the time of a step and of the fastest; repeats: medians of each."""

    name: str
    config: RunConfig
    ranks: int
    step_seconds: float
    fastest_seconds: float
    repeats: tuple[float, ...] = ()

    @property
    def usual_seconds(self) -> float:
        """Median step, of repeats the median of theirs."""
        return median(self.repeats or (self.step_seconds,))


@dataclass(frozen=True)
class Calibration:
    """The hardware as the runs show it; errors are relative, by run, before and after."""

    cluster: ClusterConfig
    moved: dict[str, tuple[float, float]]
    before: dict[str, float]
    after: dict[str, float]

    @property
    def mean_error(self) -> float:
        """Mean of the absolute errors after."""
        return sum(map(abs, self.after.values())) / len(self.after)


def calibrate(cluster: ClusterConfig, observations: Sequence[Observation]) -> Calibration:
    """Return the hardware whose predictions are nearest to the observations, seen from a preset."""
    from scipy.optimize import least_squares

    figures = _figures(cluster)

    def gaps(logs: Sequence[float]) -> list[float]:
        moved = _moved(cluster, figures, logs)
        missed = [math.log(predicted_seconds(each, moved) / each.step_seconds) / NOISE for each in observations]
        return [*missed, *(log / WIDE for log in logs)]

    most = [FARTHEST if name != "matmul_efficiency" else -math.log(cluster.matmul_efficiency) for name in figures]
    start = [min(0.0, high - 1e-6) for high in most]
    found = least_squares(gaps, start, bounds=([-FARTHEST] * len(figures), most), x_scale=0.3)
    after = _moved(cluster, figures, [float(log) for log in found.x])
    return Calibration(
        after,
        {name: (_value(cluster, name), _value(after, name)) for name in figures},
        _errors(observations, cluster),
        _errors(observations, after),
    )


def predicted_seconds(observation: Observation, cluster: ClusterConfig) -> float:
    """Return the predicted time of a step of an observed run on a cluster."""
    return predict_step(observation.config.model_copy(update={"cluster": cluster}), observation.ranks).seconds


def step_key(observation: Observation) -> str:
    """Return what a step's time follows from, as text that is equal for repeats: not names, lengths, saves or reports.

    Ranks, threads and the kind of optimizer are of it; how long a run is, what it learns from and how fast are not.
    """
    config = observation.config
    whole = {name: config.model_dump(mode="json")[name] for name in STEP_SECTIONS}
    parts = {f"{section}.{name}": getattr(getattr(config, section), name) for section, name in STEP_SETTINGS}
    return json.dumps([observation.ranks, config.device, whole, parts], sort_keys=True, default=str)


def settled_seconds(step_seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the least of a run's steps without its first quarter, in which it warms up."""
    settled = step_seconds[len(step_seconds) // 4 :]
    return median(settled), min(settled)


def join_repeats(observations: Sequence[Observation]) -> list[Observation]:
    """Return one observation of runs whose steps do the same, in order; its step is the fastest of them all.

    What else a machine does lengthens a step and never shortens it, and repeats that are spread over time tell it from
    the run. Nothing tells it in a run that is alone, whose median stays.
    """
    found: dict[str, list[Observation]] = {}
    for each in observations:
        found.setdefault(step_key(each), []).append(each)
    return [same[0] if len(same) == 1 else _joined(same) for same in found.values()]


def _joined(same: Sequence[Observation]) -> Observation:
    fastest = min(each.fastest_seconds for each in same)
    repeats = tuple(each.step_seconds for each in same)
    return replace(same[0], step_seconds=fastest, fastest_seconds=fastest, repeats=repeats)


def _figures(cluster: ClusterConfig) -> tuple[str, ...]:
    figures = ("peak_tflops" if cluster.device == "cpu" else "matmul_efficiency", *_COMMON)
    return tuple(name for name in figures if _value(cluster, name))  # factors move what is 0 nowhere


def _moved(cluster: ClusterConfig, figures: Sequence[str], logs: Sequence[float]) -> ClusterConfig:
    """Return a cluster with figures multiplied; the peaks of all formats together."""
    changes: dict[str, object] = {}
    for name, log in zip(figures, logs, strict=True):
        if name == "peak_tflops":
            peaks = {key: value * math.exp(log) for key, value in cluster.peak_tflops.model_dump().items()}
            changes[name] = PeakTflops(**peaks)
        else:
            changes[name] = getattr(cluster, name) * math.exp(log)
    return cluster.model_copy(update=changes)


def _value(cluster: ClusterConfig, name: str) -> float:
    return float(cluster.peak_tflops.fp32 if name == "peak_tflops" else getattr(cluster, name))


def _errors(observations: Sequence[Observation], cluster: ClusterConfig) -> dict[str, float]:
    return {each.name: predicted_seconds(each, cluster) / each.step_seconds - 1 for each in observations}
