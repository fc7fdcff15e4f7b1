"""Which logical tensors Megatron-Core's parameters are made of, and where each part lies.

    linear_qkv   for each group of heads: its queries, its key, its value
    linear_fc1   the gate, then the up-projection (SwiGLU), or the up-projection alone
    experts      a parameter an expert, of which the logical tensor has one after the other

Everything else is one logical tensor, or its tp share. Names of layers count from the layer's place in the whole model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from dist_llm.config.model import ModelConfig
from dist_llm.engine.rectangles import Band
from dist_llm.models.plan import TIED_PAIR

_WHOLE = {
    "input_layernorm": "attention_norm",
    "pre_mlp_layernorm": "mlp_norm",
    "self_attention.q_layernorm": "attention.q_norm",
    "self_attention.k_layernorm": "attention.k_norm",
    # Transformer Engine's linears hold the norm before them.
    "self_attention.linear_qkv.layer_norm": "attention_norm",
    "mlp.linear_fc1.layer_norm": "mlp_norm",
    "mlp.router": "mlp.router",
}
_EXPERT = re.compile(
    r"mlp\.experts\.(?:local_experts\.(?P<module>\d+)\.)?linear_fc(?P<linear>[12])\.weight(?P<leaf>\d*)"
)


_SPLIT = re.compile(
    r"(linear_qkv|linear_fc1|word_embeddings|output_layer)\.(weight|bias)|(linear_proj|linear_fc2)\.weight"
)


def is_split(name: str) -> bool:
    """Return whether tp ranks hold different parts of a parameter."""
    return _SPLIT.search(name) is not None


def _feed_forward(path: str) -> str:
    return "mlp.shared" if "shared_experts" in path else "mlp"


class Names:
    """The parameters of one model as rank `index` of `size` tp ranks holds them; its experts begin at `expert`.

    Experts are whole: tp ranks hold other ones, or the same.
    """

    def __init__(self, model: ModelConfig, index: int, size: int, expert: int) -> None:
        self._model, self._index, self._size, self._first_expert = model, index, size, expert

    def bands(self, name: str, parameter: nn.Parameter, layers: range) -> list[Band]:
        """Return what parameter `name` of a chunk that begins at the first of `layers` is made of."""
        path, _, leaf = name.rpartition(".")
        if path.startswith("decoder.layers."):
            number, _, inner = path.removeprefix("decoder.layers.").partition(".")
            return list(self._of_layer(f"layers.{layers[int(number)]}", inner, leaf, parameter))
        tables = {
            "embedding.word_embeddings": TIED_PAIR[0].rpartition(".")[0],
            "output_layer": TIED_PAIR[0 if self._model.tie_embeddings else 1].rpartition(".")[0],
        }
        if path in tables:
            rows = parameter.shape[0]
            shape = (self._model.vocab_size, self._model.hidden_size)
            return [Band(f"{tables[path]}.weight", shape, (self._index * rows, 0), tuple(parameter.shape))]
        whole = {"embedding.position_embeddings": "embed.positions", "decoder.final_layernorm": "head.norm"}
        return [self._whole(f"{whole[path]}.{leaf}", parameter)]

    def _of_layer(self, layer: str, path: str, leaf: str, parameter: nn.Parameter) -> Iterator[Band]:
        """Yield the bands of a parameter of a layer."""
        if leaf.startswith("layer_norm_"):
            path, leaf = f"{path}.layer_norm", leaf.removeprefix("layer_norm_")
        if path in _WHOLE:
            yield self._whole(f"{layer}.{_WHOLE[path]}.{leaf}", parameter)
        elif path == "self_attention.linear_qkv":
            yield from self._heads(layer, leaf, parameter)
        elif path == "self_attention.linear_proj":
            yield self._row(f"{layer}.attention.wo.{leaf}", parameter)
        elif expert := _EXPERT.fullmatch(f"{path}.{leaf}"):
            number = self._first_expert + int(expert["module"] or expert["leaf"])
            yield from self._expert(f"{layer}.mlp.experts", expert["linear"], number, parameter)
        elif path in ("mlp.linear_fc1", "mlp.shared_experts.linear_fc1"):
            yield from self._columns(f"{layer}.{_feed_forward(path)}", leaf, parameter)
        elif path in ("mlp.linear_fc2", "mlp.shared_experts.linear_fc2"):
            yield self._row(f"{layer}.{_feed_forward(path)}.down.{leaf}", parameter)
        else:
            raise KeyError(f"{path}.{leaf} is no parameter of a layer that is known here")

    @staticmethod
    def _whole(name: str, parameter: nn.Parameter) -> Band:
        shape = tuple(parameter.shape)
        return Band(name, shape, (0,) * len(shape), shape)

    def _row(self, name: str, parameter: nn.Parameter) -> Band:
        """Return the band of a linear that is split over its inputs; its bias is whole."""
        if name.endswith(".bias"):
            return self._whole(name, parameter)
        rows, columns = parameter.shape
        return Band(name, (rows, columns * self._size), (0, self._index * columns), (rows, columns))

    def _columns(self, module: str, leaf: str, parameter: nn.Parameter) -> Iterator[Band]:
        """Yield the bands of the first linear of a feed-forward layer, split over its outputs."""
        parts = ("gate", "up") if self._model.activation == "swiglu" else ("up",)
        rows, inputs = parameter.shape[0] // len(parts), tuple(parameter.shape[1:])
        for place, part in enumerate(parts):
            begin = place * parameter.numel() // len(parts)
            name, shape = f"{module}.{part}.{leaf}", (rows * self._size, *inputs)
            yield self._part(name, shape, self._index * rows, rows, begin)

    def _expert(self, module: str, linear: str, number: int, parameter: nn.Parameter) -> Iterator[Band]:
        """Yield the bands of a linear of expert `number`; the logical tensors have one dim more."""
        alone = Names(self._model, 0, 1, 0)
        plain = alone._columns(module, "weight", parameter) if linear == "1" else [alone._row(module, parameter)]
        for band in plain:
            name = band.name if linear == "1" else f"{module}.down.weight"
            shape = (self._model.moe.num_experts, *band.shape)
            yield Band(name, shape, (number, *band.offsets), (1, *band.sizes), band.begin)

    def _heads(self, layer: str, leaf: str, parameter: nn.Parameter) -> Iterator[Band]:
        """Yield the bands of the projection of queries, keys and values: three for each group of heads."""
        model, inputs = self._model, tuple(parameter.shape[1:])
        row = parameter.numel() // parameter.shape[0]
        queries = model.num_heads // model.kv_heads * model.head_width
        groups = model.kv_heads // self._size
        begin = 0
        for group in range(self._index * groups, (self._index + 1) * groups):
            for part, rows in (("wq", queries), ("wk", model.head_width), ("wv", model.head_width)):
                shape = (rows * model.kv_heads, *inputs)
                yield self._part(f"{layer}.attention.{part}.{leaf}", shape, group * rows, rows, begin)
                begin += rows * row

    @staticmethod
    def _part(name: str, shape: tuple[int, ...], first: int, rows: int, begin: int) -> Band:
        """Return the band of `rows` rows from `first` on of a logical tensor."""
        rest = len(shape) - 1
        return Band(name, shape, (first, *(0,) * rest), (rows, *shape[1:]), begin)
