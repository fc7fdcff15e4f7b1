"""A plan before its layout: the size that a law asks for, shapes near it, the batch, and the run that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from dist_llm.config.request import PlanRequest
from dist_llm.config.run import RunConfig
from dist_llm.errors import ConfigError, Violation
from dist_llm.planner.batch_laws import Recommendation, recommend
from dist_llm.planner.cost.step import node_devices
from dist_llm.planner.cures import NoPlan
from dist_llm.planner.draft import draft_config, warmup_steps
from dist_llm.planner.laws import Law, ParametricLaw
from dist_llm.planner.pins import Pins, filled_sequences, pins_of
from dist_llm.planner.proposals import propose_layouts
from dist_llm.planner.published_laws import DEFAULT_LAW
from dist_llm.planner.refusals import (
    FEWEST_STEPS,
    MOST_DAYS,
    MOST_STEPS,
    early_slips,
    refuse_batch,
    refuse_batch_of,
    refuse_little,
    refuse_repetition,
    refuse_shapes,
    refuse_steps,
    refuse_text,
    refuse_years,
)
from dist_llm.planner.shapes import FEWEST_PARAMS, Shape, law_parameters, measure, search_shapes
from dist_llm.planner.sizing import Size, choose_size, size_of_model, with_params

IDLE = 0.15
"""What halving the data ranks is worth, in ln of the batch: it is made up for by tensor or pipeline ranks."""

USUAL_MFU = 0.35


@dataclass(frozen=True)
class Outline:
    """What is planned of a request for so many training FLOPs before layouts are weighed. draft: the run, not split."""

    request: PlanRequest
    flops: float
    size: Size
    shapes: tuple[Shape, ...]
    batch: Recommendation
    draft: RunConfig

    @property
    def machines(self) -> tuple[int, int]:
        """Nodes and devices."""
        return machines_of(self.request)

    @cached_property
    def pins(self) -> Pins:
        """What is fixed of the layout."""
        return pins_of(self.request)


def outline(request: PlanRequest, law: Law, flops: float) -> Outline:
    """Return the outline of so many training FLOPs; some layout has its batch. Raises NoPlan."""
    devices = machines_of(request)[1]
    days = flops / (USUAL_MFU * devices * peak_flops_per_second(request)) / 86400
    if days > 2 * MOST_DAYS:
        raise refuse_years(request, days)
    if slips := early_slips(request):
        raise NoPlan(slips, slips)
    size, shapes = _model(request, law, flops)
    batch, draft = _draft(request, size, shapes[0])
    first, pins = draft, pins_of(request)
    while not (dealt := _has_layout(draft, devices, pins)) and not request.data.global_batch:
        if _sequences(draft) >= 4 * batch.batch_sequences:
            break
        draft = _resized(draft, size, 2 * _sequences(draft))
    if not dealt:
        raise refuse_batch(request, first if pins.values else draft, devices)
    if size.tokens < FEWEST_STEPS * _sequences(draft) * draft.data.seq_len:
        raise refuse_steps(request, draft, size.tokens)
    return Outline(request, flops, size, shapes, batch, draft)


def _has_layout(draft: RunConfig, devices: int, pins: Pins) -> bool:
    return any(propose_layouts(draft, devices, node_devices(draft.cluster), pins))


def _draft(request: PlanRequest, size: Size, shape: Shape) -> tuple[Recommendation, RunConfig]:
    """Return what is advised of the batch, and the run, not yet split."""
    seq_len = request.data.seq_len or min(4096, shape.model.max_seq_len)
    devices = machines_of(request)[1]
    batch = recommend(law_parameters(shape, embeddings=False), size.tokens, seq_len)
    filled = filled_sequences(request)
    sequences = request.data.global_batch or round_batch(batch.batch_sequences, devices, filled)
    sizes = (sequences, seq_len, _steps(size, sequences * seq_len))
    if sizes[2] > MOST_STEPS:
        raise refuse_batch_of(request, sequences, sizes[2])
    try:
        return batch, draft_config(request, shape.model, batch, sizes, hosts_of(request))
    except ConfigError as error:
        raise NoPlan(error.violations) from None


def _resized(draft: RunConfig, size: Size, sequences: int) -> RunConfig:
    """Return a run of as many tokens with another batch."""
    data = draft.data.model_copy(update={"global_batch": sequences})
    steps = _steps(size, sequences * data.seq_len)
    schedule = draft.schedule.model_copy(update={"warmup_steps": warmup_steps(steps)})
    run = draft.run.model_copy(update={"steps": steps})
    return draft.model_copy(update={"data": data, "schedule": schedule, "run": run})


def _steps(size: Size, batch_tokens: int) -> int:
    return max(1, round(size.tokens / batch_tokens))


def _sequences(draft: RunConfig) -> int:
    return draft.data.global_batch


def _model(request: PlanRequest, law: Law, flops: float) -> tuple[Size, tuple[Shape, ...]]:
    """Return size and shapes, the best first, for a budget."""
    unique = request.data.tokens
    if request.preset is not None:
        shape = measure(request.preset)
        params = law_parameters(shape, law.counts_embeddings)
        return _learning(request, law, size_of_model(law, params, flops, unique), shape), (shape,)
    if request.serving.tokens and not isinstance(law, ParametricLaw):
        rule = "says nothing of the loss, which serving.tokens is weighed by"
        raise NoPlan([Violation("law", request.law, rule, (DEFAULT_LAW, "hoffmann-3"))])
    size = choose_size(law, flops, unique, request.serving.tokens)
    if size.num_params < FEWEST_PARAMS:
        if unique and choose_size(law, flops, None, request.serving.tokens).num_params >= FEWEST_PARAMS:
            raise refuse_text(request, size.num_params, FEWEST_PARAMS)
        rule = f"{law.name} asks for {size.num_params:.2g} parameters"
        raise refuse_little(request, rule, least_flops(law) / flops)
    seq_len = _seq_len(request, size.num_params)
    judge = law if size.loss is not None else None

    def loss_ratio(num_params: float) -> float:
        if judge is None or size.loss is None:
            return 1 + 0.02 * math.log(num_params / size.num_params) ** 2
        return (with_params(judge, size, num_params, unique).loss or size.loss) / size.loss

    target, tensor = size.num_params, request.parallel.tensor or 1
    shapes = tuple(search_shapes(request.model, seq_len, target, law.counts_embeddings, loss_ratio, tensor))
    if not shapes:
        raise refuse_shapes(request, size.num_params)
    exact = with_params(law, size, law_parameters(shapes[0], law.counts_embeddings), unique)
    return _learning(request, law, exact, shapes[0]), shapes


def _learning(request: PlanRequest, law: Law, size: Size, shape: Shape) -> Size:
    """Return a size. Raises NoPlan where repeated text teaches less than a guess at a token, and fresh text more."""
    guess = math.log(shape.model.vocab_size)
    if size.epochs > 1 and size.loss is not None and size.loss > guess:
        losses = (law.loss(size.num_params, size.tokens), law.optimal(size.flops).loss)
        if any(fresh is not None and fresh < guess for fresh in losses):
            raise refuse_repetition(request, size, guess)
    return size


def least_flops(law: Law) -> float:
    """Return a budget for which the law asks for the smallest model that is searched."""
    flops = 1e6
    while law.optimal(flops).num_params < FEWEST_PARAMS:
        flops *= 1.5
    return flops


def precision_of(request: PlanRequest) -> str:
    """Return the format of products: as asked, else bf16 on GPUs and fp32 on CPUs."""
    return request.precision or ("fp32" if request.cluster.device == "cpu" else "bf16")


def peak_flops_per_second(request: PlanRequest) -> float:
    """Return the peak of one device in that format, in FLOP/s."""
    return float(getattr(request.cluster.peak_tflops, precision_of(request)) * 1e12)


def _seq_len(request: PlanRequest, num_params: float) -> int:
    if request.data.seq_len is not None:
        return request.data.seq_len
    return 4096 if num_params >= 1e9 else 2048 if num_params >= 1e8 else 512


def machines_of(request: PlanRequest) -> tuple[int, int]:
    """Return nodes and devices."""
    nodes = request.cluster.nodes or 1
    return nodes, nodes * node_devices(request.cluster)


def hosts_of(request: PlanRequest) -> tuple[int, int]:
    """Return the hosts on which ranks are started, and how many on each."""
    nodes, devices = machines_of(request)
    each = request.cluster.devices_per_host or devices // nodes
    return devices // each, each


def round_batch(sequences: float, devices: int, filled: int = 1) -> int:
    """Return a number near to a batch that many layouts of so many devices divide, a multiple of `filled`.

    2^k or 3 x 2^k, times the odd part of the devices where that changes the batch by less than a half. Published laws
    lie further apart than these: each time that devices must be halved to divide it counts as IDLE in ln of the batch.
    """

    def cost(number: int) -> float:
        return abs(math.log(number / wanted)) + IDLE * math.log2(devices / math.gcd(devices, unit * number))

    odd = devices
    while odd % 2 == 0:
        odd //= 2
    unit = odd if odd not in (1, 3) and odd < 1.5 * sequences else 1
    unit = math.lcm(unit, filled)
    wanted = max(1.0, sequences / unit)
    exponent = max(0, math.floor(math.log2(wanted)))
    near = [2**exponent, 3 * 2 ** (exponent - 1) if exponent else 2, 2 ** (exponent + 1)]
    best: int = min(near, key=cost)
    return unit * best
