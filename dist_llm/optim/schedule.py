"""Learning rate as a pure function of the step: linear warm-up, then the named decay.

    cosine  floor + (1 - floor)(1 + cos(pi t)) / 2      linear  1 - (1 - floor) t      inverse_sqrt  sqrt(w / step)
    wsd     1, then linear to the floor over the last `decay_steps` (warmup-stable-decay, Hu et al. 2024)

t runs from 0 at the end of warm-up to 1 at the end of decay; `floor` is min_ratio.
"""

from __future__ import annotations

import math

from dist_llm.config.training import ScheduleConfig


def learning_rate(step: int, peak: float, schedule: ScheduleConfig, num_steps: int) -> float:
    """Return the learning rate of step `step` (0-based) in a run of `num_steps`."""
    warmup = schedule.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * _decayed(step, schedule, num_steps)


def _decayed(step: int, schedule: ScheduleConfig, num_steps: int) -> float:
    """Return the factor on the peak rate after warm-up."""
    warmup, floor = schedule.warmup_steps, schedule.min_ratio
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "inverse_sqrt":
        return max(floor, math.sqrt(max(warmup, 1) / max(step + 1, 1))) if step >= max(warmup, 1) else 1.0
    if schedule.name == "wsd":
        decay = schedule.decay_steps if schedule.decay_steps is not None else max(1, num_steps // 10)
        progress = min(1.0, max(0.0, (step - (num_steps - decay)) / decay))
        return 1.0 - (1.0 - floor) * progress
    span = schedule.decay_steps if schedule.decay_steps is not None else max(1, num_steps - warmup)
    progress = min(1.0, (step - warmup) / span)
    if schedule.name == "linear":
        return 1.0 - (1.0 - floor) * progress
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))
