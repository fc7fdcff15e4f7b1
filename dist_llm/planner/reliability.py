"""How often a run is interrupted, what that costs, and how often it should save.

    interval = sqrt(2 d M)                                                   (Young 1974, first order)
    interval = sqrt(2 d M) (1 + x/3 + x^2/9) - d,   x = sqrt(d / (2 M)), d < 2 M      (Daly 2006, equation 37)
    wall     = M exp(R / M) (exp((interval + d) / M) - 1) work / interval            (Daly 2006, equation 20)

d: seconds that training stands still while it saves; M: mean time between failures of the job, that of a device over
the number of devices; R: seconds to restart. Failures come at random, whenever the run goes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LLAMA3_DEVICE_MTBF_HOURS = 54 * 24 * 16384 / 419
"""Of an H100 with its share of node and network, 50 677 h: 419 unexpected interruptions in 54 days on 16 384 GPUs
(Llama 3 405B, arXiv 2407.21783, section 3.3.4)."""


@dataclass(frozen=True)
class Reliability:
    """What failures cost a run; `goodput` is the share of the wall clock in which steps advance."""

    job_mtbf_hours: float
    checkpoint_interval_seconds: float
    interruptions: float
    wall_seconds: float
    saving_seconds: float
    lost_seconds: float
    goodput: float


def young_interval_seconds(save_seconds: float, job_mtbf_seconds: float) -> float:
    """Return Young's first-order checkpoint interval: seconds of work between saves."""
    return math.sqrt(2 * save_seconds * job_mtbf_seconds)


def daly_interval_seconds(save_seconds: float, job_mtbf_seconds: float) -> float:
    """Return Daly's higher-order checkpoint interval: seconds of work between saves."""
    if save_seconds >= 2 * job_mtbf_seconds:
        return job_mtbf_seconds
    small = math.sqrt(save_seconds / (2 * job_mtbf_seconds))
    return young_interval_seconds(save_seconds, job_mtbf_seconds) * (1 + small / 3 + small**2 / 9) - save_seconds


def wall_seconds(
    work_seconds: float, interval_seconds: float, save_seconds: float, restart_seconds: float, job_mtbf_seconds: float
) -> float:
    """Return the expected wall-clock seconds of `work_seconds` of training with failures, saves and restarts."""
    if max(interval_seconds + save_seconds, restart_seconds) / job_mtbf_seconds > 500:
        return math.inf  # beyond what numbers hold: it never ends
    segment = math.expm1((interval_seconds + save_seconds) / job_mtbf_seconds)
    restarts = math.exp(restart_seconds / job_mtbf_seconds)
    return job_mtbf_seconds * restarts * segment * work_seconds / interval_seconds


def expected_reliability(
    work_seconds: float,
    devices: int,
    save_seconds: float,
    restart_seconds: float,
    device_mtbf_hours: float = LLAMA3_DEVICE_MTBF_HOURS,
) -> Reliability:
    """Return what failures cost `work_seconds` of training on so many devices, saving at Daly's interval."""
    mtbf = device_mtbf_hours * 3600 / devices
    interval = daly_interval_seconds(max(save_seconds, 1e-3), mtbf)
    wall = wall_seconds(work_seconds, interval, save_seconds, restart_seconds, mtbf)
    saving = save_seconds * work_seconds / interval
    return Reliability(
        mtbf / 3600, interval, wall / mtbf, wall, saving, max(0.0, wall - work_seconds - saving), work_seconds / wall
    )
