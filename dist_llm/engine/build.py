"""Choose the engine by name; nothing of an engine that was not chosen is imported."""

from __future__ import annotations

from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.mesh import Mesh


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Return the configured engine over the mesh. Raises EngineUnavailable where its library is not installed."""
    if config.engine.name == "megatron":
        try:
            from dist_llm.engine.megatron import MegatronEngine
        except ImportError as error:
            raise EngineUnavailable(f"engine=megatron: {error}; pip install 'dist-llm[megatron]'") from error
        return MegatronEngine(config, mesh)
    if config.engine.name == "deepspeed":
        raise EngineUnavailable("engine=deepspeed: pip install 'dist-llm[deepspeed]'")
    from dist_llm.engine.native import NativeEngine

    return NativeEngine(config, mesh)
