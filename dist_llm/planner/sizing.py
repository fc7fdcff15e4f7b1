"""How large a model, and how many tokens, for a budget of training FLOPs: by a scaling law, the data and the serving.

plain      the law's optimum                                                       planner/laws.py
little data    tokens are repeated, and a smaller model trained longer             planner/repetition.py
much serving   as good as the plain optimum, but smaller and trained longer        planner/serving.py
a model given  tokens = FLOPs / (6 N)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dist_llm.planner.laws import Interval, Law, Optimum, ParametricLaw, spread
from dist_llm.planner.published_laws import COMPARED, PUBLISHED
from dist_llm.planner.repetition import optimal_repeated, repeated_loss
from dist_llm.planner.serving import cheapest_served

FAR = 1.3
"""Times off the optimum from which a model is no longer the law's."""


@dataclass(frozen=True)
class Size:
    """Parameters as the law counts them, training tokens, how often each is seen, and the loss foretold.

    saved_flops: of training and serving together, against the plain optimum. why: the reason, one sentence.
    """

    num_params: float
    tokens: float
    epochs: float
    loss: float | None
    why: str
    num_params_interval: Interval | None = None
    tokens_interval: Interval | None = None
    loss_interval: Interval | None = None
    saved_flops: float = 0.0
    saved_share: float = 0.0

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 N D."""
        return 6 * self.num_params * self.tokens


def choose_size(law: Law, flops: float, unique_tokens: float | None, serving_tokens: float) -> Size:
    """Return the size for a training budget; of the budget's loss where the model is to serve, which costs more."""
    if serving_tokens and isinstance(law, ParametricLaw):
        return _repeat(law, _served(law, flops, serving_tokens), unique_tokens)
    best = law.optimal(flops)
    if unique_tokens is not None and best.tokens > unique_tokens and isinstance(law, ParametricLaw):
        return _repeated(law, flops, unique_tokens)
    return _repeat(law, _described(law, best), unique_tokens)


def size_of_model(law: Law, num_params: float, flops: float, unique_tokens: float | None) -> Size:
    """Return the tokens of a given model for a training budget."""
    tokens = flops / (6 * num_params)
    why = f"the model is given, and {flops:.3g} FLOPs train its {num_params:.3g} parameters on {tokens:.3g} tokens"
    return _repeat(law, Size(num_params, tokens, 1.0, law.loss(num_params, tokens), why), unique_tokens)


def with_params(law: Law, size: Size, num_params: float, unique_tokens: float | None) -> Size:
    """Return the size with the parameters of a real model, of the same training FLOPs.

    Intervals are of the optimum, and hold what is taken for it; a model far from it has none.
    """
    tokens = size.flops / (6 * num_params)
    exact = replace(
        size,
        num_params=num_params,
        tokens=tokens,
        epochs=1.0,
        loss=law.loss(num_params, tokens),
        loss_interval=law.loss_interval(num_params, tokens) if isinstance(law, ParametricLaw) else None,
        num_params_interval=holding(size.num_params_interval, num_params),
        tokens_interval=holding(size.tokens_interval, tokens),
    )
    if not 1 / FAR < num_params / size.num_params < FAR:
        why = (
            f"{law.name} would train {size.num_params:.3g} parameters with {size.flops:.3g} FLOPs, "
            f"but the nearest shape has {num_params:.3g}"
        )
        exact = replace(exact, num_params_interval=None, tokens_interval=None, why=why)
    return _repeat(law, exact, unique_tokens)


def holding(interval: Interval | None, value: float) -> Interval | None:
    """Return an interval as wide as holds a value too."""
    return None if interval is None else (min(interval[0], value), max(interval[1], value))


def compared_laws(law: Law, flops: float) -> list[tuple[Law, Optimum]]:
    """Return what the chosen law and the published ones of the same runs advise for a budget, and Kaplan's."""
    names = [name for name in (*COMPARED, "muennighoff", "llama-3", "kaplan") if name != law.name]
    return [(each, each.optimal(flops)) for each in (law, *(PUBLISHED[name] for name in names))]


def spread_of(compared: Sequence[tuple[Law, Optimum]]) -> tuple[Interval, Interval]:
    """Return between which parameters, and which tokens, the laws of the Chinchilla runs lie."""
    found = [best for law, best in compared if law.name in COMPARED] or [compared[0][1]]
    return spread(found)


def _described(law: Law, best: Optimum) -> Size:
    ratio = best.tokens / best.num_params
    why = f"{law.name} has the least loss of {best.flops:.3g} FLOPs at {ratio:.3g} tokens a parameter"
    interval = law.loss_interval(best.num_params, best.tokens) if isinstance(law, ParametricLaw) else None
    return Size(
        best.num_params,
        best.tokens,
        1.0,
        best.loss,
        why,
        best.num_params_interval,
        best.tokens_interval,
        interval,
    )


def _repeated(law: ParametricLaw, flops: float, unique_tokens: float) -> Size:
    found = optimal_repeated(law, flops, unique_tokens)
    why = (
        f"there are {unique_tokens:.3g} tokens, fewer than {law.name} asks for with {flops:.3g} FLOPs, and repeated "
        f"tokens and parameters beyond them are worth less: {found.num_params:.3g} parameters are best "
        "(Muennighoff et al. 2023)"
    )
    return Size(found.num_params, found.tokens, found.epochs, found.loss, why)


def _served(law: ParametricLaw, flops: float, serving_tokens: float) -> Size:
    found = cheapest_served(law, flops, serving_tokens)
    more = found.training_flops / flops - 1
    why = (
        f"as good as the best of {flops:.3g} FLOPs but smaller: training costs {more:.0%} more, and with "
        f"{serving_tokens:.3g} tokens served {found.saved_share:.0%} of all FLOPs are saved (Sardana et al. 2024)"
    )
    interval = law.loss_interval(found.num_params, found.tokens)
    return Size(
        found.num_params,
        found.tokens,
        1.0,
        found.loss,
        why,
        loss_interval=interval,
        saved_flops=found.saved_flops,
        saved_share=found.saved_share,
    )


def _repeat(law: Law, size: Size, unique_tokens: float | None) -> Size:
    """Return the size when only so many tokens exist."""
    if unique_tokens is None or size.tokens <= unique_tokens:
        return size
    epochs = size.tokens / unique_tokens
    loss = repeated_loss(law, size.num_params, size.tokens, unique_tokens) if isinstance(law, ParametricLaw) else None
    return replace(size, epochs=epochs, loss=loss, loss_interval=None)
