"""Shapes of a model of about so many parameters: legal, on sizes that matrix units like, not too deep and not too wide.

    cost(shape) = L(N, C / 6N) / L(optimum) - 1 + 0.01 (ln(aspect / usual) / ln 4)^2,    aspect = hidden / layers

Loss hardly depends on the aspect ratio: about 1 % at four times the usual (Kaplan et al. 2020, figure 5). Usual is from
64 (GPT-2 124M: 768 / 12) to 128 (Llama 7B: 4096 / 32; GPT-3 175B: 12288 / 96).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import ValidationError

from dist_llm.accounting.params import num_parameters
from dist_llm.config.families import FAMILIES, usual_ffn_width, usual_head_width
from dist_llm.config.model import ModelConfig
from dist_llm.config.request import ModelRequest

SMALL, MIDDLE, LARGE = 1e9, 3e9, 8e9
"""Parameters from which heads are 128 wide and embeddings apart, the vocabulary is large, and key heads are shared."""

MOST_SHAPES = 5
MOST_LAYERS = 1024
FEWEST_PARAMS = 2e4
"""Parameters of the smallest model that is searched."""


@dataclass(frozen=True)
class Shape:
    """A model, its parameters (embeddings included), those that a token meets, and its cost against the optimum."""

    model: ModelConfig
    num_params: int
    active_params: int
    cost: float = 0.0


def active_parameters(model: ModelConfig) -> int:
    """Return the parameters that a token meets, embeddings included: of experts those of the top k."""
    if not model.num_expert_layers:
        return num_parameters(model)
    matrices = 3 if model.activation == "swiglu" else 2
    idle = model.moe.num_experts - min(model.moe.top_k, model.moe.num_experts)
    return num_parameters(model) - model.num_expert_layers * idle * matrices * model.hidden_size * model.expert_width


def measure(model: ModelConfig) -> Shape:
    """Return a model as a shape."""
    return Shape(model, num_parameters(model), active_parameters(model))


def law_parameters(shape: Shape, embeddings: bool) -> int:
    """Return the parameters that a token meets as a law counts them: with the embeddings or without."""
    model = shape.model
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    positions = model.max_seq_len * model.hidden_size if model.position == "learned" else 0
    return shape.active_params - (0 if embeddings else tables + positions)


def search_shapes(
    wish: ModelRequest, seq_len: int, target: float, embeddings: bool, loss_ratio: Callable[[float], float], tensor: int
) -> list[Shape]:
    """Return the cheapest shapes of about `target` parameters that a token meets, the best first.

    embeddings: whether they count. loss_ratio(N): predicted loss with N parameters and the same compute, over the
    optimum's. tensor: ranks that heads must split over. Empty where no shape agrees with what is fixed.
    """
    found = []
    for shape in _shapes(wish, seq_len, target, embeddings, tensor):
        aspect = shape.model.hidden_size / shape.model.num_layers
        counted = law_parameters(shape, embeddings)
        apart = math.log(aspect / usual_aspect(counted)) / math.log(4)
        cost = loss_ratio(counted) - 1 + 0.01 * apart**2
        found.append(Shape(shape.model, shape.num_params, shape.active_params, cost))
    return sorted(found, key=lambda shape: (shape.cost, shape.num_params))[:MOST_SHAPES]


def usual_aspect(num_params: float) -> float:
    """Return hidden / layers of published models of that size."""
    return float(min(128.0, max(24.0, 64 * (num_params / 1.24e8) ** 0.172)))


def _shapes(wish: ModelRequest, seq_len: int, target: float, embeddings: bool, tensor: int) -> Iterator[Shape]:
    """Yield for each width the depth that comes closest to the target from below and from above."""
    for width in [wish.hidden_size] if wish.hidden_size else _widths(target, wish.num_heads or 1):
        # Layers beyond these are alike: the first may be dense where others have experts.
        start = 1 + (wish.moe.num_dense_layers if wish.moe.num_experts else 0)
        try:
            one, two = (
                measure(build_model(wish, seq_len, target, width, layers, tensor)) for layers in (start, start + 1)
            )
        except ValidationError:
            continue  # a width whose other sizes are beyond all bounds
        total, active = two.num_params - one.num_params, two.active_params - one.active_params
        exact = start + (target - law_parameters(one, embeddings)) / active
        step = _layer_step(target)
        near = {max(1, step * math.floor(exact / step)), max(1, step * math.ceil(exact / step))}
        for layers in [wish.num_layers] if wish.num_layers else sorted(near):
            if layers > MOST_LAYERS:
                continue
            model, more = build_model(wish, seq_len, target, width, layers, tensor), layers - start
            if model.num_heads % model.kv_heads or model.head_width % 2:
                continue
            if model.kv_heads % tensor or model.ffn_hidden_size % tensor:
                continue
            known = Shape(model, one.num_params + more * total, one.active_params + more * active)
            yield known if more >= 0 else measure(model)


def _widths(target: float, heads: int) -> Iterator[int]:
    """Yield widths in whole heads: the wider, the coarser, so that tensor parallelism can split them."""
    steps = (
        ((512, 4096, 512), (4096, 65537, 1024)) if target >= SMALL else ((16, 64, 16), (64, 512, 64), (512, 4096, 128))
    )
    for low, high, step in steps:
        unit = math.lcm(step, heads)
        yield from (width for width in range(unit, high, unit) if width >= low and 2 * width**2 < 8 * target)


def _layer_step(target: float) -> int:
    """Return what the number of layers is a multiple of, so that pipelines can split it."""
    return 1 if target < SMALL else 2 if target < 1e10 else 4


def build_model(
    wish: ModelRequest, seq_len: int, target: float, width: int, layers: int, tensor: int = 1
) -> ModelConfig:
    """Return the model of that width and depth; what the request leaves open follows its family and size.

    tensor: ranks over which key heads are to split, where that is left open.
    """
    options = dict(FAMILIES[wish.family])
    if wish.tie_embeddings is not None or target < SMALL:
        options["tie_embeddings"] = True if wish.tie_embeddings is None else wish.tie_embeddings
    heads = wish.num_heads or _num_heads(width, target)
    usual = math.lcm(8, tensor)
    kv_heads = wish.num_kv_heads or (
        usual if wish.family == "llama" and target >= LARGE and heads % usual == 0 else heads
    )
    vocab = wish.vocab_size or usual_vocab(wish.family, target)
    return ModelConfig(
        family=wish.family,
        num_layers=layers,
        hidden_size=width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        ffn_hidden_size=wish.ffn_hidden_size or usual_ffn_width(wish.family, width),
        vocab_size=vocab,
        max_seq_len=seq_len,
        moe=wish.moe,
        **options,
    )


def usual_vocab(family: str, num_params: float) -> int:
    """Return the tokens of the vocabulary: GPT-2's or Llama's, and fewer for models whose tables would be most of them.

    The best vocabulary grows with the model (Tao et al. 2024).
    """
    small = ((3e6, 1024), (1e7, 4096), (3e7, 8192), (1e8, 16384))
    large = 50304 if family == "gpt2" else 128256 if num_params >= MIDDLE else 32000
    return next((vocab for most, vocab in small if num_params < most), large)


def _num_heads(width: int, target: float) -> int:
    """Return the heads of a width: 64 wide below a billion parameters, else 128; narrower where the model is."""
    return width // usual_head_width(width, 64 if target < SMALL else 128)
