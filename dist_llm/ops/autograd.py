"""What torch must know of an op beside its kernels: the shapes of its results, and its gradient.

An op is known in two ways: to torch's dispatcher, which is what torch.compile, fake tensors and opcheck see, and as an
autograd function of ours, by which eager code calls it: that costs some 30 us less of the host's time a forward and
backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dist_llm.ops.backends import kernel, overload

Function = Callable[..., Any]


def dense_like(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return a tensor of x's shape and format without gaps and with no values yet."""
    return x.new_empty(x.shape)


def row_numbers(x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows"]:
    """Return an fp32 number for each row of x, with no values yet."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


_FUNCTIONS: dict[tuple[str, str], type[torch.autograd.Function]] = {}
"""By the op's name and the backend."""


def call_op(name: str, backend: str, *inputs: Any) -> Any:
    """Call the overload of a registered op: past the dispatcher's autograd, unless it is being compiled."""
    if torch.compiler.is_compiling():
        return kernel(name, backend)(*inputs)
    return _FUNCTIONS[name, backend].apply(*inputs)  # type: ignore[no-untyped-call]


def _function(name: str, backend: str, keep: Function, gradients: Function) -> type[torch.autograd.Function]:
    compute = kernel(name, backend)

    class Called(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = compute(*inputs)
            ctx.set_materialize_grads(False)
            ctx.backend = backend
            keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # to be differentiated again
                return gradients(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return gradients(ctx, *grads)

    Called.__name__ = Called.__qualname__ = f"dist_llm_{overload(name, backend)}"
    return Called


def register_op(name: str, backend: str, shapes: Function, keep: Function, backward: Function) -> None:
    """Register an op's results without values (`shapes`), what a backward needs of a call (`keep`), and the backward.

    Of the overload that the backend computes, whose name a backward finds as `ctx.backend`. Gradients that are None
    reach it as they are.
    """
    _FUNCTIONS[name, backend] = _function(name, backend, keep, backward)

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.backend = backend
        keep(ctx, inputs, output)

    full_name = f"dist_llm::{overload(name, backend)}"
    torch.library.register_fake(full_name, shapes)
    torch.library.register_autograd(full_name, backward, setup_context=setup)


def register_last(name: str, backend: str, shapes: Function) -> None:
    """Register an op that has no gradient: asking for one raises NotImplementedError; by default it is silently 0."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"dist_llm::{name} has no gradient: differentiate twice through the op it belongs to")

    register_op(name, backend, shapes, lambda ctx, inputs, output: None, backward)
