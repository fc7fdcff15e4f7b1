"""What a run takes: days, device-hours, money and energy, with the interruptions that its cluster leads to expect.

work = steps x seconds of a step;  wall = work, saves, lost work and restarts      (planner/reliability.py)
usd  = device-hours x price;  kWh = device-hours x watts / 1000
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_llm.config.cluster import ClusterConfig
from dist_llm.planner.reliability import Reliability, expected_reliability

STATE_BYTES = 12
"""Bytes a parameter of a checkpoint: fp32 masters and Adam's two moments."""

RESTART_SECONDS = 300.0
"""Time from a failure to the next step beside reading the checkpoint: noticing, placing, starting, compiling."""


@dataclass(frozen=True)
class Spending:
    """The cost of a run on so many devices; wall-clock time includes what interruptions cost."""

    devices: int
    work_seconds: float
    save_seconds: float
    restart_seconds: float
    reliability: Reliability
    usd: float
    kilowatt_hours: float

    @property
    def days(self) -> float:
        """Wall-clock days."""
        return self.reliability.wall_seconds / 86400

    @property
    def device_hours(self) -> float:
        """Hours of all devices."""
        return self.devices * self.reliability.wall_seconds / 3600


def spend(cluster: ClusterConfig, devices: int, nodes: int, num_params: int, work_seconds: float) -> Spending:
    """Return what `work_seconds` of steps of a model take on the devices of so many nodes."""
    save = STATE_BYTES * num_params / (nodes * cluster.storage_gb_per_second * 1e9)
    restart = RESTART_SECONDS + save
    reliability = expected_reliability(work_seconds, devices, save, restart, cluster.mtbf_device_hours)
    hours = devices * reliability.wall_seconds / 3600
    return Spending(
        devices,
        work_seconds,
        save,
        restart,
        reliability,
        hours * cluster.usd_per_device_hour,
        hours * cluster.watts_per_device / 1000,
    )
