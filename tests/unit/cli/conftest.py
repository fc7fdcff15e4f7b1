"""Presets do not change while tests run: what Hydra composes of the same choices is composed once."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dist_llm.cli import compose


@pytest.fixture(autouse=True, scope="session")
def _composed_once() -> Any:
    """Remember the trees that presets compose to; every caller gets its own copy."""
    compose_presets, known = compose._compose_presets, {}

    def remembered(choices: dict[str, str]) -> dict[str, Any]:
        key = tuple(sorted(choices.items()))
        if key not in known:
            known[key] = compose_presets(choices)
        return copy.deepcopy(known[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compose, "_compose_presets", remembered)
        yield
