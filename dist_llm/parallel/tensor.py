"""Tensor and sequence parallelism (Shoeybi et al. 2019; Korthikanti et al. 2022), from any model's shard plan.

COLUMN and HEAD linears only get shorter weights: their input already entered a REGION. ROW and VOCAB modules sum
their output over tp. Under sequence parallelism what lies between regions holds [B, T/tp, D], so the gradients of
replicated parameters there are partial: `partial_parameters` names them, and the engine sums them once a step.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from dist_llm.accounting.params import padded_vocab
from dist_llm.ops.linear import Linear, linear
from dist_llm.parallel.collectives import enter_region, leave_region
from dist_llm.runtime.mesh import Axis
from dist_llm.types import ShardPlan, Style


@dataclass(frozen=True)
class LogicalTensor:
    """A parameter as the checkpoint knows it: global shape, dim split over tp, whether its gradient is partial over tp.

    expert: dim 0 is split over ep, and replicas are those of the expert axes.
    """

    shape: tuple[int, ...]
    split_dim: int | None = None
    partial: bool = False
    expert: bool = False


ShardTable = Mapping[str, LogicalTensor]
"""Parameter name to its logical tensor, for the parameters of one stage."""


class RowParallelLinear(Linear):
    """A linear over this rank's input features; its output is summed over tp, then the bias is added once."""

    axis: Axis
    sequence: bool

    def forward(self, x: Float[Tensor, "batch seq inputs"]) -> Float[Tensor, "batch _ outputs"]:
        """Map this rank's inputs (seq or seq/tp tokens come back). One all-reduce, or reduce-scatter, over tp."""
        out = leave_region(linear(x, self.weight, None, self.later, self.kernels.linear), self.axis, self.sequence)
        bias: Tensor | None = self.bias
        return out if bias is None else out + bias


class Leave(nn.Identity):
    """The end of a tensor-parallel region whose output is still partial."""

    axis: Axis
    sequence: bool

    def forward(self, x: Float[Tensor, "batch seq width"]) -> Float[Tensor, "batch _ width"]:
        """Sum x over tp (seq or seq/tp tokens come back). One all-reduce, or reduce-scatter, over tp."""
        return leave_region(x, self.axis, self.sequence)


class VocabParallelEmbedding(nn.Embedding):
    """A look-up in this rank's rows of the table; tokens of other ranks give zero and the sum over tp completes it."""

    axis: Axis
    sequence: bool

    def forward(self, tokens: Int64[Tensor, "batch seq"]) -> Float[Tensor, "batch _ width"]:
        """Return the embeddings of tokens (seq or seq/tp of them). One all-reduce, or reduce-scatter, over tp."""
        rows = self.weight.shape[0]
        local = tokens - self.axis.index * rows
        outside = (local < 0) | (local >= rows)
        hidden = functional.embedding(local.masked_fill(outside, 0), self.weight)
        return leave_region(hidden.masked_fill(outside[..., None], 0.0), self.axis, self.sequence)


def style_of(plan: ShardPlan, path: str) -> Style | None:
    """Return the style that the plan declares for a module path."""
    return next((style for pattern, style in plan.items() if fnmatchcase(path, pattern)), None)


def _shrink(module: nn.Module, dim: int, size: int, rows: int | None = None) -> None:
    """Replace the meta weight of a module by this rank's share along `dim`; `rows`: dim 0 of the whole when padded."""
    weight = module.get_parameter("weight")
    shape = list(weight.shape)
    if rows is not None:
        shape[0] = rows
    if shape[dim] % size:
        raise ValueError(f"{size} ranks cannot share {shape[dim]} rows or columns of a weight alike")
    shape[dim] //= size
    module.weight = nn.Parameter(weight.new_empty(shape))
    bias = getattr(module, "bias", None)
    if bias is not None and dim == 0:
        module.bias = nn.Parameter(bias.new_empty(shape[0]))


def _become(module: nn.Module, kind: type[Any], axis: Axis, sequence: bool) -> None:
    """Turn a module into its parallel kind in place: same name, same parameters."""
    module.__class__ = kind
    module.axis = axis  # type: ignore[assignment]
    module.sequence = sequence  # type: ignore[assignment]


def _enter_hook(axis: Axis, sequence: bool) -> Any:
    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        # parallel/async_tensor.py puts a gather here that multiplies too.
        gather = getattr(module, "gather", None)
        return (enter_region(args[0], axis, sequence) if gather is None else gather(args[0]), *args[1:])

    return enter


def _slice_hook(axis: Axis) -> Any:
    def keep_part(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        length = out.shape[0] // axis.size
        return out.narrow(0, axis.index * length, length)

    return keep_part


def _apply_style(module: nn.Module, style: Style, axis: Axis, expert: int, sequence: bool) -> None:
    if style in (Style.VOCAB, Style.HEAD):
        rows = module.get_parameter("weight").shape[0]
        _shrink(module, 0, axis.size, padded_vocab(rows, axis.size))
    if style in (Style.EXPERT_COLUMN, Style.EXPERT_ROW):
        _shrink(module, 0, expert)
    if axis.size == 1:
        return
    if style is Style.COLUMN:
        _shrink(module, 0, axis.size)
    elif style in (Style.PARTIAL_ROW, Style.EXPERT_COLUMN):
        _shrink(module, 1, axis.size)
    elif style is Style.EXPERT_ROW:
        _shrink(module, 2, axis.size)
    elif style is Style.LEAVE:
        _become(module, Leave, axis, sequence)
    elif style is Style.ROW:
        _shrink(module, 1, axis.size)
        _become(module, RowParallelLinear, axis, sequence)
    elif style is Style.VOCAB:
        _become(module, VocabParallelEmbedding, axis, sequence)
    elif style in (Style.REGION, Style.HEAD):
        module.register_forward_pre_hook(_enter_hook(axis, sequence))
    elif style is Style.POSITION and sequence:
        module.register_forward_hook(_slice_hook(axis))


def _logical(name: str, shape: torch.Size, style: Style | None, sequence: bool) -> LogicalTensor:
    """Return the logical tensor of a parameter whose module has `style`."""
    bias = name.endswith(".bias")
    if style in (Style.COLUMN, Style.VOCAB, Style.HEAD):
        return LogicalTensor(tuple(shape), 0)
    if style in (Style.EXPERT_COLUMN, Style.EXPERT_ROW):
        return LogicalTensor(tuple(shape), 1 if style is Style.EXPERT_COLUMN else 2, expert=True)
    if style in (Style.ROW, Style.PARTIAL_ROW) and not bias:
        return LogicalTensor(tuple(shape), 1)
    between = style in (Style.TOKENWISE, Style.POSITION, Style.ROW)
    return LogicalTensor(tuple(shape), None, partial=style is Style.HEADWISE or (between and sequence))


def apply_tensor(model: nn.Module, plan: ShardPlan, axis: Axis, expert: int, sequence: bool) -> ShardTable:
    """Split the meta model in place over tp, and its experts over `expert` ranks; return its logical tensors.

    Issues nothing now; the split model issues per REGION one all-reduce (or all-gather and reduce-scatter) each way.
    """
    sequence = sequence and axis.size > 1
    table = {
        name: _logical(name, parameter.shape, style_of(plan, name.rpartition(".")[0]), sequence)
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }
    tied: dict[int, nn.Module] = {}
    for path, module in model.named_modules():
        style = style_of(plan, path)
        if style is None:
            continue
        whole = getattr(module, "weight", None)
        _apply_style(module, style, axis, expert, sequence)
        if whole is not None and id(whole) in tied:
            module.weight = tied[id(whole)].weight
        elif whole is not None:
            tied[id(whole)] = module
    if sequence:
        for module in model.modules():
            if hasattr(module, "sequence_part"):
                module.sequence_part, module.sequence_parts = axis.index, axis.size  # type: ignore[assignment]
    return table


LAYER_INDEX = re.compile(r"^layers\.(\d+)\.")
"""Matches a parameter or module of a block and captures the block's number."""
