"""What a step does for routers: their losses' unit, the counts of the global batch, and the biases that these move.

bias_e <- bias_e + rate sign(mean count - count_e)      once a step (Wang et al. 2024, loss-free balancing)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from jaxtyping import Float32, Float64
from torch import Tensor, nn

from dist_llm.config.model import MoEConfig
from dist_llm.models.moe import Router, Tally
from dist_llm.parallel.collectives import all_reduce_sum
from dist_llm.runtime.mesh import Mesh
from dist_llm.types import TensorShard


class Routing:
    """The routers of this rank's stages; does nothing where there are none."""

    def __init__(self, models: list[nn.Module], config: MoEConfig, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self._named = [(name, m) for model in models for name, m in model.named_modules() if isinstance(m, Router)]
        self._tallies: list[Tally] = list({id(router.tally): router.tally for _, router in self._named}.values())
        for tally in self._tallies:
            tally.share = 1.0 / mesh.tp.size
            if mesh.cp.size > 1:
                tally.sum_over_sequence = lambda counts: all_reduce_sum(counts, mesh.cp)
        self.counts: dict[int, Tensor] = {}

    def begin(self, unit: float) -> None:
        """Begin a step whose token losses are multiplied by `unit` before the backward."""
        for tally in self._tallies:
            tally.clear()
            tally.unit = unit

    def gather(self) -> None:
        """Add up what the routers counted. Issues one all-reduce over zero where this rank has routers."""
        if not self._named:
            return
        layers = [router.layer for _, router in self._named]
        counts = torch.stack([router.tally.counts[router.layer] for _, router in self._named])
        if self._mesh.zero.size > 1:
            dist.all_reduce(counts, group=self._mesh.zero.group)
        self.counts = dict(zip(layers, counts.unbind(0), strict=True))

    def sums(self, device: torch.device) -> Float64[Tensor, " sums"]:
        """Return what is to be added up over the world: balance loss, z loss, largest loads, layers.

        With a capacity also the rows that were dropped, and all rows.
        """
        if not self._config.num_experts:
            return torch.zeros(0, dtype=torch.float64, device=device)
        sums = torch.zeros(6, dtype=torch.float64, device=device)
        for _, router in self._named:
            sums[[0, 1, 4]] += router.tally.losses[router.layer]
            if self._mesh.tp.index == 0 and self._mesh.zero.index == 0:
                count = self.counts[router.layer].double()
                sums[[2, 3, 5]] += torch.stack((count.max() / count.mean(), torch.ones_like(sums[0]), count.sum()))
        return sums if self._config.capacity_factor is not None else sums[:4]

    def figures(self, sums: Sequence[float], tokens: int) -> dict[str, float]:
        """Return what a person watches: both losses by token, and the largest load over the mean, mean over layers.

        With a capacity also the part of the rows that was dropped.
        """
        if not sums:
            return {}
        balance, z, load, layers, *capacity = sums
        figures = {
            "router_balance_loss": balance / max(1, tokens),
            "router_z_loss": z / max(1, tokens),
            "router_max_load": load / max(1.0, layers),
        }
        if capacity:
            figures["router_dropped_fraction"] = capacity[0] / max(1.0, capacity[1])
        return figures

    @torch.no_grad()
    def move_biases(self, skip: Float32[Tensor, ""] | None = None) -> None:
        """Move each bias towards equal loads, unless `skip` is 1."""
        if not self._config.bias_rate:
            return
        for _, router in self._named:
            count = self.counts[router.layer].to(router.bias.dtype)
            way = torch.sign(count.mean() - count)
            router.bias.add_(way if skip is None else way * (1 - skip), alpha=self._config.bias_rate)

    def state(self) -> Iterator[TensorShard]:
        """Yield the biases, which are no parameters and yet part of the model."""
        primary = self._mesh.zero.index == 0 and self._mesh.tp.index == 0
        for name, router in self._named:
            shape = tuple(router.bias.shape)
            yield TensorShard(f"model.{name}.bias", shape, (0,) * len(shape), router.bias, primary)
