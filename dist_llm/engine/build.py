"""Choose the engine by name; nothing of an engine that was not chosen is imported."""

from __future__ import annotations

from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.native import NativeEngine
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.mesh import Mesh


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Return the configured engine over the mesh. Raises EngineUnavailable where its library is missing."""
    if config.engine.name == "deepspeed":
        from dist_llm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh)
    if config.engine.name != "native":
        raise EngineUnavailable(f"engine={config.engine.name} is not part of this version; use engine=native")
    return NativeEngine(config, mesh)
