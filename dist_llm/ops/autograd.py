"""What torch must know of a native op beside its code: the shapes of its results, and its gradient.

An op is known in two ways: to torch's dispatcher, which is what torch.compile, fake tensors and opcheck see, and as an
autograd function of ours, by which eager code calls it: that costs some 30 us less of the host's time each way.
"""

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


_FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}


def call_op(name: str, *inputs: Any) -> Any:
    """Call a registered op: past the dispatcher's autograd, unless it is being compiled."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.dist_llm, name)(*inputs)
    return _FUNCTIONS[name].apply(*inputs)  # type: ignore[no-untyped-call]


def _function(name: str, keep: Function, backward: Function) -> type[torch.autograd.Function]:
    op = getattr(torch.ops.dist_llm, name).default

    class Called(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            ctx.set_materialize_grads(False)
            keep(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # to be differentiated again
                return backward(ctx, *grads)
            with torch._C._AutoDispatchBelowAutograd():
                return backward(ctx, *grads)

    Called.__name__ = Called.__qualname__ = f"dist_llm_{name}"
    return Called


def register_op(name: str, shapes: Function, keep: Function, backward: Function) -> None:
    """Register an op's results without values (`shapes`), what a backward needs of a call (`keep`), and the backward.

    Gradients that are None reach the backward as they are.
    """

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)
        keep(ctx, inputs, output)

    _FUNCTIONS[name] = _function(name, keep, backward)
    torch.library.register_fake(f"dist_llm::{name}", shapes)
    torch.library.register_autograd(f"dist_llm::{name}", backward, setup_context=setup)


def register_last(name: str, shapes: Function) -> None:
    """Register an op that has no gradient: asking for one raises NotImplementedError; by default it is silently 0."""

    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"dist_llm::{name} has no gradient: differentiate twice through the op it belongs to")

    register_op(name, shapes, lambda ctx, inputs, output: None, backward)
