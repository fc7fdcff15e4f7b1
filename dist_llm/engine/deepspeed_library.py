"""DeepSpeed brought up on our process groups, and taken down again: nothing of it stays for the next layout.

It meets no ranks, reads no MPI and prints nothing. Its groups are those of the mesh: ZeRO over
`zero` (dp x cp folded), and as model-parallel ranks those of `tp`, which count in its gradient norm.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from dist_llm.config.training import OptimizerConfig
from dist_llm.errors import EngineUnavailable
from dist_llm.runtime.log import adopt_logger, get_logger
from dist_llm.runtime.mesh import Mesh
from dist_llm.runtime.variables import lend_variables

log = get_logger(__name__)


def groups_of(mesh: Mesh) -> SimpleNamespace:
    """Return DeepSpeed's `mpu`: functions `get_<axis>_{group,rank,world_size}` of its axes."""
    axes = {"data_parallel": mesh.zero, "model_parallel": mesh.tp, "tensor_model_parallel": mesh.tp}
    answers: dict[str, Callable[[], Any]] = {}
    for name, axis in axes.items():
        for kind, value in (("group", axis.group), ("rank", axis.index), ("world_size", axis.size)):
            answers[f"get_{name}_{kind}"] = partial(_return, value)
    return SimpleNamespace(**answers)


def _return(value: Any) -> Any:
    return value


def import_deepspeed(device: torch.device) -> ModuleType:
    """Return the library, for a kind of device. Raises EngineUnavailable where it is missing, or broken."""
    try:
        # The second it would set for good, for fear of what asks for CUDA before this.
        with _quiet(), lend_variables({"DS_ACCELERATOR": device.type, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}):
            import deepspeed
            from deepspeed.accelerator import get_accelerator
    except ImportError as error:
        missing = getattr(error, "name", None) or "deepspeed"
        if missing.partition(".")[0] != "deepspeed":
            raise EngineUnavailable(f"engine=deepspeed: DeepSpeed needs the package {missing}; {_INSTALL}") from error
        raise EngineUnavailable(f"engine=deepspeed needs DeepSpeed; {_INSTALL}") from error
    accelerator: Any = get_accelerator()
    kind = accelerator.device_name()
    if kind != device.type:
        raise EngineUnavailable(
            f"device={device.type}: DeepSpeed computes on {kind} in this process; use device={kind}"
        )
    if device.type == "cpu":
        # It asks for hardware that is fast at fp16; torch computes it on any CPU.
        accelerator.is_fp16_supported = lambda: True
    library: ModuleType = deepspeed
    return library


_INSTALL = "pip install 'dist-llm[deepspeed]'"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop what DeepSpeed prints, and let its errors go to our log: its warnings are about settings that we make."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
    adopt_logger("DeepSpeed")


class Session:
    """DeepSpeed's engine for a model that each rank of `zero` holds whole, and what it needs of the process meanwhile.

    Collectives: broadcasts of all weights over zero, and barriers over the world.
    """

    def __init__(
        self, deepspeed: ModuleType, mesh: Mesh, model: torch.nn.Module, optimizer: Any, settings: dict[str, Any]
    ) -> None:
        local = str(mesh.device.index or 0)
        with contextlib.ExitStack() as closers:
            # ZeRO 3 asks for it in its steps; the engine, as it is built, compares it with Open MPI's.
            closers.enter_context(lend_variables({"LOCAL_RANK": local}))
            closers.enter_context(_backend(deepspeed))
            closers.callback(_forget_groups)
            _count_from_zero()
            with _quiet(), lend_variables({"OMPI_COMM_WORLD_LOCAL_RANK": local}):
                self.engine: Any = deepspeed.initialize(
                    model=model, optimizer=optimizer, mpu=groups_of(mesh), dist_init_required=False, config=settings
                )[0]
            self._closers = closers.pop_all()

    def close(self) -> None:
        """Remove the engine's hooks, and what DeepSpeed's modules remember of its model and groups."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        with _quiet():
            self.engine.destroy()
        FWD_MODULE_STACK[:] = [module for module in FWD_MODULE_STACK if module is not self.engine.module]
        # Under ZeRO 3 these hold each other and their groups through autograd's hooks: a cycle that Python cannot see.
        zero = self.engine.optimizer
        for held in (*self.engine.module.parameters(), getattr(zero, "parameter_offload", None), zero, self.engine):
            if held is not None:
                vars(held).clear()
        self._closers.close()
        del self.engine


@contextlib.contextmanager
def _backend(deepspeed: ModuleType) -> Iterator[None]:
    """Put DeepSpeed's collectives on the default group of torch.distributed that is there."""
    from deepspeed.comm import comm
    from deepspeed.comm.torch import TorchBackend

    # Said to be none: asking runs compilers, to build collectives in shared memory that training does not use.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    try:
        comm.cdb = TorchBackend(dist.get_backend(), timedelta(0), None)
    finally:
        del deepspeed.ops.__dict__["__compatible_ops__"]
    # The names that torch has for them from 2.13 on, where the old ones warn.
    for name in ("all_gather", "reduce_scatter"):
        kept = f"{name}_function"
        setattr(comm.cdb, kept, getattr(dist, f"{name}_single", getattr(comm.cdb, kept)))
    try:
        yield
    finally:
        comm.cdb = None


def _count_from_zero() -> None:
    """Number modules and weights from 0 on every rank: one that had an engine before would count on."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
    from deepspeed.runtime.zero.partition_parameters import Init

    Init.param_id = 0
    for default in DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ or ():
        if isinstance(default, list):
            default[:] = [0]


def _forget_groups() -> None:
    from deepspeed.utils import groups

    groups.mpu = None


def build_adam(
    mesh: Mesh, weights: Iterable[dict[str, Any]], update: OptimizerConfig, offloaded: bool
) -> torch.optim.Optimizer:
    """Return the optimizer for groups of weights: DeepSpeed's where it is faster and builds everywhere, else torch's.

    offloaded: the update runs on the host. Its compiler may run for minutes, once on a machine (torch keeps the result
    and lets the other processes wait). Collective: one all-reduce of a number over the world, so that ranks agree.
    """
    options: dict[str, Any] = {"betas": tuple(update.betas), "eps": update.eps, "lr": update.lr}
    groups = list(weights)
    load = _host_adam if offloaded else _device_adam if mesh.device.type == "cuda" else None
    kind = None if load is None else _agreed(load, "Adam", mesh)
    if kind is not None:
        log_once(mesh, f"DeepSpeed's {kind.__name__} updates the weights")
        with _quiet():
            adam: torch.optim.Optimizer = kind(groups, **options)
        if offloaded:
            adam.register_step_pre_hook(_compute_powers)
        return adam
    log_once(mesh, "torch's AdamW updates the weights")
    return torch.optim.AdamW(groups, fused=True, **options)


def _agreed(load: Callable[[], Any], name: str, mesh: Mesh) -> Any:
    """Return what `load` returns, or None where it fails on any rank; each that it fails on says why."""
    kind, reason = None, ""
    try:
        with _quiet():
            kind = load()
    except Exception as error:  # a compiler fails in many ways, and none may end the run
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    everywhere = torch.tensor(int(kind is not None), device=mesh.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=mesh.world.group)
    if everywhere.item():
        return kind
    if reason:
        log.warning("DeepSpeed's %s cannot be built here: %s", name, reason)
    return None


def _host_adam() -> Any:
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    from deepspeed.ops.op_builder import CPUAdamBuilder

    CPUAdamBuilder().load(verbose=False)
    return DeepSpeedCPUAdam


def _compute_powers(adam: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Make DeepSpeed's host Adam compute beta^step in this step, by a step 0 of nothing.

    It multiplies by beta from step to step, which after a resume would differ in the last bit.
    """
    group, nothing = adam.param_groups[0], torch.empty(0)
    rule = (group["lr"], *group["betas"], group["eps"], 0.0, True)
    adam.ds_opt_adam.adam_update(adam.opt_id, 0, *rule, nothing, nothing, nothing, nothing)


def _device_adam() -> Any:
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.ops.op_builder import FusedAdamBuilder

    FusedAdamBuilder().load(verbose=False)
    return FusedAdam


def require_async_io(mesh: Mesh) -> None:
    """Raise EngineUnavailable on every rank unless DeepSpeed's async_io can be built, which files of weights need."""

    def load() -> Any:
        from deepspeed.ops.op_builder import AsyncIOBuilder

        return AsyncIOBuilder().load(verbose=False)

    if _agreed(load, "async_io", mesh) is None:
        raise EngineUnavailable(
            "engine.offload_to=nvme needs DeepSpeed's async_io, which does not build here: "
            "install libaio's headers (libaio-dev, libaio-devel) or use engine.offload_to=cpu"
        )


def log_once(mesh: Mesh, message: str) -> None:
    """Log on the first rank of the world alone."""
    if mesh.world.index == 0:
        log.info(message)
