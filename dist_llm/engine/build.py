"""Choose the engine by name; nothing of an engine that was not chosen is imported."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from types import ModuleType

import torch

from dist_llm.config.run import RunConfig
from dist_llm.engine.base import Engine
from dist_llm.engine.native import NativeEngine
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.cpu_torch import without_compiler
from dist_llm.runtime.log import adopt_logger
from dist_llm.runtime.mesh import Mesh
from dist_llm.runtime.variables import keep_variables


def build_engine(config: RunConfig, mesh: Mesh) -> Engine:
    """Return the configured engine over the mesh. Raises EngineUnavailable where its library is missing."""
    if config.engine.name == "deepspeed":
        from dist_llm.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config, mesh)
    if config.engine.name == "megatron":
        engine: Engine = import_megatron(mesh.device).MegatronEngine(config, mesh)
        return engine
    return NativeEngine(config, mesh)


def import_megatron(device: torch.device) -> ModuleType:
    """Return the module of the Megatron-Core engine, without compiled fusions on a CPU. Raises EngineUnavailable.

    What the library warns of, for good, are packages and switches of its own.
    """
    adopt_logger("megatron")
    warnings.filterwarnings("ignore", module=r"megatron\.")
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    try:
        with keep_variables(), without_compiler() if device.type == "cpu" else nullcontext():
            from dist_llm.engine import megatron
    except ImportError as error:
        missing = getattr(error, "name", None) or "megatron.core"
        raise EngineUnavailable(f"engine=megatron needs {missing}; pip install 'dist-llm[megatron]'") from error
    return megatron
