"""Joins the config's section `kernels` to the registry of ops, which knows no config, and says once what was chosen."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist

from dist_llm.config.run import RunConfig
from dist_llm.engine.recipe import DTYPES
from dist_llm.ops.registry import Choice, Kernels, Place, choose_kernels
from dist_llm.runtime.log import get_logger
from dist_llm.runtime.machine import processor_maker

log = get_logger(__name__)


def kernels_for(config: RunConfig, device: torch.device) -> Kernels:
    """Return the backend of each op for a run on a device; rank 0 logs each choice once a process.

    Raises ConfigError where `kernels.required` and one cannot be had.
    """
    choice = _choice(config, device.type, config.kernels.required)
    if not dist.is_initialized() or dist.get_rank() == 0:
        _say(str(choice), bool(choice.fallbacks))
    return choice.kernels


def foretold_kernels(config: RunConfig) -> Kernels:
    """Return the backend of each op for a run on the cluster that the config names, as far as it can be told here.

    Of a GPU it cannot: there the defaults stand for what computes, which holds no more than they do.
    """
    device = config.cluster.device
    return _choice(config, device, required=False).kernels if device == "cpu" else Kernels()


def _choice(config: RunConfig, device: str, required: bool) -> Choice:
    wanted = config.kernels.model_dump(exclude={"required"})
    parallel = config.parallel
    place = Place(
        device,
        DTYPES[config.precision.compute],
        widest_row=config.model.hidden_size,
        vocabulary_ranks=parallel.tensor,
        compiled=parallel.compile and parallel.compile_backend == "inductor",
        maker=processor_maker(),
    )
    return choose_kernels(wanted, required, place)


@cache
def _say(line: str, warns: bool) -> None:
    (log.warning if warns else log.info)(line)
