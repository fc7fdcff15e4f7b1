"""Approach 2 of Hoffmann et al. 2022: at each budget a parabola through loss over ln N, its bottom the best N.

    L(N | C) = c0 + c1 x + c2 x^2,  x = ln N;   N*(C) = exp(-c1 / (2 c2)),   then   N* = k C^a over the budgets

Runs far above the bottom count less: weight 1 / (1 + ((L - L_min) / (width L_min))^2), for a parabola is right near it
alone. The power law has one constant for the parabolas' own errors: budgets weigh by the inverse of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dist_llm.planner.fitting import Run
from dist_llm.planner.laws import NORMAL_95, Interval, PowerLaw

SAME_BUDGET = 0.1
"""Runs whose FLOPs differ by at most this share belong to one budget."""
WIDTH = 0.05
"""Excess over the least loss, as a share of it, at which a run counts half."""
FEWEST_POINTS = 4


@dataclass(frozen=True)
class Profile:
    """Runs of one budget, the parabola over ln N through them, and its bottom."""

    flops: float
    runs: tuple[Run, ...]
    parabola: tuple[float, float, float]
    num_params: float
    loss: float
    log_error: float
    """Standard error of ln N at the bottom."""

    @property
    def inside(self) -> bool:
        """Whether the bottom lies among the sizes that were run; else it is a guess."""
        sizes = [run.num_params for run in self.runs]
        return min(sizes) <= self.num_params <= max(sizes)


def group_budgets(runs: Sequence[Run], tolerance: float = SAME_BUDGET) -> list[list[Run]]:
    """Return runs by budget, budgets in rising order."""
    groups: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.flops):
        if groups and run.flops <= groups[-1][0].flops * (1 + tolerance):
            groups[-1].append(run)
        else:
            groups.append([run])
    return groups


def fit_profile(runs: Sequence[Run], width: float = WIDTH) -> Profile | None:
    """Return the parabola of one budget's runs; None with fewer than FEWEST_POINTS sizes, or without a bottom."""
    import numpy as np

    if len({run.num_params for run in runs}) < FEWEST_POINTS:
        return None
    sizes, losses = np.log([run.num_params for run in runs]), np.array([run.loss for run in runs])
    least, middle = losses.min(), float(sizes.mean())
    weights = 1 / (1 + ((losses - least) / (width * least)) ** 2)
    x = sizes - middle
    design = np.stack([np.ones_like(x), x, x**2], axis=-1)
    normal = design.T @ (weights[:, None] * design)
    c0, c1, c2 = np.linalg.solve(normal, design.T @ (weights * losses))
    if c2 <= 0:
        return None
    residuals = losses - design @ np.array([c0, c1, c2])
    variance = float((weights * residuals**2).sum() / max(1, len(runs) - 3))
    bottom = -c1 / (2 * c2)
    slope = np.array([0.0, -1 / (2 * c2), c1 / (2 * c2**2)])
    error = math.sqrt(max(0.0, float(slope @ np.linalg.solve(normal, slope)) * variance))
    parabola = (float(c0 - c1 * middle + c2 * middle**2), float(c1 - 2 * c2 * middle), float(c2))
    flops = math.exp(sum(math.log(run.flops) for run in runs) / len(runs))
    loss = float(c0 + c1 * bottom + c2 * bottom**2)
    return Profile(flops, tuple(runs), parabola, math.exp(bottom + middle), loss, error)


def fit_profiles(runs: Sequence[Run], width: float = WIDTH) -> list[Profile]:
    """Return the profiles of all budgets that have one."""
    found = [fit_profile(group, width) for group in group_budgets(runs)]
    return [profile for profile in found if profile is not None]


def fit_power_law(profiles: Sequence[Profile], name: str = "own-isoflop") -> PowerLaw | None:
    """Return N* = k C^a through the bottoms that lie among the sizes run; None with fewer than two."""
    import numpy as np

    used = [profile for profile in profiles if profile.inside]
    if len(used) < 2:
        return None
    budgets = np.log([profile.flops for profile in used])
    sizes = np.log([profile.num_params for profile in used])
    errors = np.array([profile.log_error for profile in used])
    weights = 1 / (errors**2 + np.median(errors) ** 2 + 1e-12)
    middle = float((weights * budgets).sum() / weights.sum())
    x = budgets - middle
    exponent = float((weights * x * sizes).sum() / (weights * x * x).sum())
    level = float((weights * sizes).sum() / weights.sum())
    residuals = sizes - level - exponent * x
    variance = float((weights * residuals**2).sum() / max(1, len(used) - 2)) if len(used) > 2 else 1.0
    half = NORMAL_95 * math.sqrt(max(variance, 1.0) / float((weights * x * x).sum()))
    interval: Interval = (exponent - half, exponent + half)
    budget_range = (used[0].flops, used[-1].flops)
    coefficient = math.exp(level - exponent * middle)
    return PowerLaw(name, f"IsoFLOP profiles of {len(used)} budgets", coefficient, exponent, interval, budget_range)
