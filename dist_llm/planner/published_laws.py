"""The published scaling laws, each with its source. Constants are unrounded where their authors gave them so.

Rounding matters: a 13B model wants 76 tokens a parameter by the printed constants of approach 3, 47 by the unrounded,
20 by the 2024 refit. Approaches 1 and 2 were published as exponents of two digits and as tables; these constants give
back Tables 3 and A3 but for their 67B row, which holds Gopher's budget and rounded parameters. So does the power law of
approach 3's column, whose exponent is not that of its own constants (0.4586 against 0.4565).
"""

from __future__ import annotations

from dist_llm.planner.laws import NORMAL_95, PF_DAY, Constants, Interval, KaplanLaw, Law, ParametricLaw, PowerLaw

_HOFFMANN = "Hoffmann et al. 2022, arXiv 2203.15556"
_ISOFLOP_BUDGETS = (6e18, 3e21)
"""Of approach 2, and roughly of the training curves of approach 1, in FLOPs."""
_POINTS = (1.4e18, 1.3e22)
"""Budgets of the 240 runs that Besiroglu et al. read off Hoffmann's Figure 4, in FLOPs."""

_REFIT_COVARIANCE = (
    (6.323929e-02, -2.591389e-02, 2.034082e-03, 3.770518e-03, -1.300199e-03),
    (-2.591389e-02, 1.766127e-01, 3.694312e-03, -1.612473e-03, 8.639651e-03),
    (2.034082e-03, 3.694312e-03, 1.972465e-04, 1.200573e-04, 1.800512e-04),
    (3.770518e-03, -1.612473e-03, 1.200573e-04, 2.251158e-04, -8.095457e-05),
    (-1.300199e-03, 8.639651e-03, 1.800512e-04, -8.095457e-05, 4.229123e-04),
)
"""Of this project's refit of those runs, 4000 resamples. Besiroglu et al. publish its diagonal alone: standard errors
0.0154 of alpha and 0.0206 of beta, 0.020 of the exponent; here 0.0150, 0.0206 and 0.0197. It stands in for approach 3
itself, whose published interval of the exponent, 0.454 to 0.455, 240 runs cannot give."""
_REFIT_SCATTER = 0.0076
"""Standard deviation of ln L of those runs about the refit."""


def _percentiles_to_95(middle: float, low: float, high: float) -> Interval:
    """Return the 95 % interval of which (low, high) are the 10th and 90th percentiles of a normal distribution."""
    wider = NORMAL_95 / 1.281552
    return middle - (middle - low) * wider, middle + (high - middle) * wider


_LAWS: tuple[Law, ...] = (
    ParametricLaw(
        "besiroglu",
        "Besiroglu et al. 2024, arXiv 2404.10102, maximum likelihood, constants as their notebook prints them",
        Constants(E=1.81686, A=482.00572, B=2085.43420, alpha=0.34781, beta=0.36585),
        _REFIT_COVARIANCE,
        scatter=_REFIT_SCATTER,
        fitted_flops=_POINTS,
    ),
    PowerLaw(
        "hoffmann-1",
        f"{_HOFFMANN}, approach 1 (envelope of training curves), Tables 2 and 3",
        coefficient=0.0993,
        exponent=0.4981,
        exponent_interval=_percentiles_to_95(0.4981, 0.488, 0.502),
        fitted_flops=_ISOFLOP_BUDGETS,
    ),
    PowerLaw(
        "hoffmann-2",
        f"{_HOFFMANN}, approach 2 (IsoFLOP profiles), Tables 2 and A3",
        coefficient=0.1458,
        exponent=0.4899,
        exponent_interval=_percentiles_to_95(0.4899, 0.462, 0.534),
        fitted_flops=_ISOFLOP_BUDGETS,
    ),
    ParametricLaw(
        "hoffmann-3",
        f"{_HOFFMANN}, approach 3, unrounded constants of the paper's TeX source",
        Constants.from_logs((6.0073404, 6.0179186, 0.5267228, 0.33917084, 0.2849083)),
        _REFIT_COVARIANCE,
        scatter=_REFIT_SCATTER,
        fitted_flops=_POINTS,
    ),
    ParametricLaw(
        "hoffmann-3-rounded",
        f"{_HOFFMANN}, approach 3 as printed: for comparison, too coarse to plan with",
        Constants(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28),
        fitted_flops=_POINTS,
    ),
    PowerLaw(
        "hoffmann-3-table",
        f"{_HOFFMANN}, approach 3 as Table A3 tabulates it",
        coefficient=0.5389,
        exponent=0.4586,
        fitted_flops=_POINTS,
    ),
    ParametricLaw(
        "muennighoff",
        "Muennighoff et al. 2023, arXiv 2305.16264, on C4, constants of their repository datablations",
        Constants.from_logs((6.255414, 7.3049974, 0.6254804, 0.3526596, 0.3526596)),
    ),
    PowerLaw(
        "llama-3",
        "Grattafiori et al. 2024, arXiv 2407.21783, section 3.2.1: D* = k C^0.53 through 16.55T tokens at 3.8e25 FLOPs",
        coefficient=(3.8e25**0.53 / 16.55e12) / 6,
        exponent=0.47,
        fitted_flops=(6e18, 1e22),
    ),
    KaplanLaw(
        "kaplan",
        "Kaplan et al. 2020, arXiv 2001.08361, equation 1.5 and Table 6: for reference, superseded by Hoffmann et al.",
        params_scale=8.8e13,
        params_exponent=0.076,
        tokens_scale=5.4e13,
        tokens_exponent=0.095,
        params_of_pf_day=1.3e9,
        budget_exponent=0.73,
        fitted_flops=(1e-8 * PF_DAY, 10 * PF_DAY),
    ),
)

PUBLISHED: dict[str, Law] = {law.name: law for law in _LAWS}
"""Laws by name."""
DEFAULT_LAW = "besiroglu"
"""The 2024 refit of Hoffmann's approach 3, on which approaches 1 and 2 agree with it."""
COMPARED = ("besiroglu", "hoffmann-1", "hoffmann-2", "hoffmann-3")
"""Laws of the Chinchilla runs whose spread a plan states."""


def parametric(name: str) -> ParametricLaw:
    """Return a published law that has a loss of the form E + A / N^alpha + B / D^beta."""
    law = PUBLISHED[name]
    assert isinstance(law, ParametricLaw), name
    return law
