"""What torch must know of a native op beside its code: the shapes of its results, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Function = Callable[..., Any]


def dense_like(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor of x's shape and format without gaps and with no values yet."""
    return x.new_empty(x.shape)


def row_numbers(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """Return an fp32 number for each row of x, with no values yet."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def register_op(name: str, shapes: Function, keep: Function, backward: Function) -> None:
    """Register an op's results without values (`shapes`), what a backward needs of a call (`keep`), and the backward.

    Gradients that are None reach the backward as they are.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)

    torch.library.register_fake(f"dist_llm::{name}", shapes)
    torch.library.register_autograd(f"dist_llm::{name}", backward, setup_context=setup)


def register_last(name: str, shapes: Function) -> None:
    """Register an op that has no gradient: asking for one raises NotImplementedError; by default it is silently 0."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"dist_llm::{name} has no gradient: differentiate twice through the op it belongs to")

    register_op(name, shapes, lambda ctx, inputs, output: None, backward)
