"""What torch must know of an op beside its kernels: the shapes of its results, and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.backends import overload

Function = Callable[..., Any]


def dense_like(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor of x's shape and format without gaps and with no values yet."""
    return x.new_empty(x.shape)


def row_numbers(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """Return an fp32 number for each row of x, with no values yet."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def register_op(name: str, backend: str, shapes: Function, keep: Function, backward: Function) -> None:
    """Register an op's results without values (`shapes`), what a backward needs of a call (`keep`), and the backward.

    Of the overload that the backend computes, whose name a backward finds as `ctx.backend`. Gradients that are None
    reach it as they are.
    """
    name = f"dist_llm::{overload(name, backend)}"

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        keep(ctx, inputs, output)

    torch.library.register_fake(name, shapes)
    torch.library.register_autograd(name, backward, setup_context=setup)


def register_last(name: str, backend: str, shapes: Function) -> None:
    """Register an op that has no gradient: asking for one raises NotImplementedError; by default it is silently 0."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"dist_llm::{name} has no gradient: differentiate twice through the op it belongs to")

    register_op(name, backend, shapes, lambda ctx, inputs, output: None, backward)
