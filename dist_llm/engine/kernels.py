"""Joins the config's section `kernels` to the registry of ops, which knows no config, and says once what was chosen."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

from dist_llm.config.run import RunConfig
from dist_llm.engine.recipe import DTYPES
from dist_llm.ops.native import native_library
from dist_llm.ops.registry import NATIVE, Choice, Kernels, choose_kernels
from dist_llm.runtime.log import get_logger
from dist_llm.runtime.machine import processor_maker

log = get_logger(__name__)


def kernels_for(config: RunConfig, device: torch.device) -> Kernels:
    """Return the backend of each op for a run on a device; rank 0 logs each choice once a process.

    Raises ConfigError where `kernels.required` and one cannot be had.
    """
    choice = _choice(config, device.type, config.kernels.required)
    if not dist.is_initialized() or dist.get_rank() == 0:
        _say(str(choice), _is_worth_a_warning(choice))
    return choice.kernels


def foretold_kernels(config: RunConfig) -> Kernels:
    """Return the backend of each op for a run on the cluster that the config names, as far as it can be told here."""
    return _choice(config, config.cluster.device, required=False).kernels


def _choice(config: RunConfig, device: str, required: bool) -> Choice:
    wanted = config.kernels.model_dump(exclude={"required"})
    return choose_kernels(wanted, required, device, DTYPES[config.precision.compute], processor_maker())


def _is_worth_a_warning(choice: Choice) -> bool:
    """Whether something could be done: the library is of no use, and an op was to have it."""
    return bool(choice.fallbacks) and NATIVE not in vars(choice.kernels).values() and bool(native_library().problem)


@cache
def _say(line: str, warns: bool) -> None:
    (log.warning if warns else log.info)(line)
