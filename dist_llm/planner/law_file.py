"""A fitted law as a file: JSON with constants, those of resampled runs, and what the fit is worth; read without trust.

Numbers only, checked by type and range: nothing in the file can name code, and a field that is not known is an error.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from dist_llm.config.base import Section
from dist_llm.config.wording import describe_error
from dist_llm.errors import ConfigError, StorageError, Violation
from dist_llm.planner.laws import Constants, Law, ParametricLaw
from dist_llm.planner.published_laws import PUBLISHED
from dist_llm.planner.trust import Fit

MAX_BYTES = 2**20

Positive = Annotated[float, Field(gt=0, lt=1e60)]
Exponent = Annotated[float, Field(gt=0, le=3)]
Range = Annotated[tuple[Positive, Positive], Field(strict=False)]
Resample = Annotated[tuple[Positive, Positive, Positive, Exponent, Exponent], Field(strict=False)]


class LawFile(Section):
    """What the file holds; loss in nats a token, compute in FLOPs as 6 N D."""

    version: Literal[1] = 1
    """Of this layout of fields."""
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$", description="letters, digits, '.', '_' and '-'")
    """Name by which plans call the law."""
    source: str = Field(max_length=400)
    """What it was fitted to."""
    E: Positive
    """Loss that no model and no data go below."""
    A: Positive
    """Coefficient of N^-alpha."""
    B: Positive
    """Coefficient of D^-beta."""
    alpha: Exponent
    """Exponent of parameters."""
    beta: Exponent
    """Exponent of tokens."""
    resamples: Annotated[tuple[Resample, ...], Field(strict=False, min_length=20, max_length=2000)]
    """E, A, B, alpha and beta of the same fit to resampled runs."""
    scatter: float = Field(ge=0, le=10)
    """Standard deviation of ln L of a run about the law."""
    widening: float = Field(ge=1, le=1000)
    """What intervals of losses are multiplied by: see planner/trust.py."""
    counts_embeddings: bool = True
    """Whether N includes the embeddings."""
    num_params: Range
    """Least and greatest of the runs."""
    tokens: Range
    """Least and greatest of the runs."""
    flops: Range
    """Least and greatest of the runs."""
    left_out_error: float = Field(ge=0)
    """Mean relative error of each run predicted from all others."""
    largest_runs_error: float | None = Field(None, ge=0)
    """Mean relative error of the runs of most compute predicted from the rest; null where there were too few."""
    huber_sum: float = Field(ge=0)
    """Objective at the fit."""

    def law(self) -> ParametricLaw:
        """Return the law."""
        constants = Constants(self.E, self.A, self.B, self.alpha, self.beta)
        return ParametricLaw(
            self.name,
            self.source,
            constants,
            resamples=tuple(Constants(*found) for found in self.resamples),
            scatter=self.scatter,
            widening=self.widening,
            fitted_flops=self.flops,
            counts_embeddings=self.counts_embeddings,
        )


def describe_fit(fit: Fit) -> LawFile:
    """Return a fit as the fields of a law file. Raises ConfigError where an exponent is 0: that has no optimum."""
    law, trust, constants = fit.law, fit.trust, fit.law.constants
    worst = trust.largest_runs_error
    try:
        return LawFile(
            name=law.name,
            source=law.citation,
            E=constants.E,
            A=constants.A,
            B=constants.B,
            alpha=constants.alpha,
            beta=constants.beta,
            resamples=tuple((found.E, found.A, found.B, found.alpha, found.beta) for found in law.resamples),
            scatter=law.scatter,
            widening=law.widening,
            counts_embeddings=law.counts_embeddings,
            num_params=trust.num_params,
            tokens=trust.tokens,
            flops=trust.flops,
            left_out_error=trust.left_out_error,
            largest_runs_error=worst if worst == worst else None,
            huber_sum=fit.huber_sum,
        )
    except ValidationError as error:
        raise _refusal(error, "the fit is no law that can be kept") from error


def render_law(fit: Fit) -> str:
    """Return the text of a law file."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}" for key, value in describe_fit(fit).model_dump(mode="json").items()
    ]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_law(path: Path) -> ParametricLaw:
    """Return the law in a file. Raises StorageError if unreadable, ConfigError with all that is wrong with it."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file; `dist-llm plan fit RUN... --write {path}` makes one") from error
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: a law file must not exceed {MAX_BYTES} bytes")
    try:
        tree = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a law file: {str(error).splitlines()[0]}") from error
    try:
        return LawFile.model_validate(tree).law()
    except ValidationError as error:
        raise _refusal(error, str(path)) from error


def find_law(name: str, key: str = "law") -> Law:
    """Return a published law by name, or the law in a file (*.json). Raises ConfigError naming the setting `key`."""
    if name in PUBLISHED:
        return PUBLISHED[name]
    if Path(name).suffix != ".json":
        rule = "is neither a published law nor a law file (*.json)"
        near = difflib.get_close_matches(name, PUBLISHED, n=1)
        raise ConfigError([Violation(key, name, rule, tuple(near or PUBLISHED))])
    return read_law(Path(name))


def _refusal(error: ValidationError, origin: str) -> ConfigError:
    """Return what pydantic found, each violation by its key."""
    details = error.errors(include_url=False)
    found = [
        describe_error(
            ".".join(str(part) for part in detail["loc"][:1]) or "file",
            detail,
            LawFile.model_fields.get(str(detail["loc"][0])) if detail["loc"] else None,
        )
        for detail in details
    ]
    refusal = ConfigError(found)
    refusal.args = (f"{origin}: {refusal}",)
    return refusal
