"""What one microbatch costs a stage in activations, whether it was measured or reckoned."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageMemory:
    """Bytes of activations of one microbatch in one stage; peaks are over what was alive before.

    held: from forward to backward. waiting: from the first half of a backward to the second. input, output: what comes
    from the stage before and goes to the one after (0 at the ends of the model); gradients are as large.
    """

    forward_peak: int
    held: int
    first_backward_peak: int
    backward_peak: int
    waiting: int
    weight_peak: int
    input: int
    output: int
