"""Host memory that a device copies from and to beside its computation: pinned where there is a device, plain on CPU.

fetch   device -> host, in the order of the device's queue; the caller waits for the tensors that it reads
send    host -> device, in a queue of its own, so that both directions of the bus are busy at once
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class HostMemory:
    """Buffers in host memory for tensors of one device, and the copies between them."""

    def __init__(self, device: torch.device) -> None:
        self._sends: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._sends = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty_like(self, tensor: Tensor) -> Tensor:
        """Return a buffer for `tensor`."""
        layout = torch.contiguous_format
        return torch.empty_like(tensor, device="cpu", pin_memory=self._sends is not None, memory_format=layout)

    @torch.no_grad()
    def fetch(self, host: Tensor, source: Tensor) -> Callable[[], None]:
        """Begin to copy `source` to the host; return what waits until it is there."""
        host.copy_(source, non_blocking=True)
        if self._sends is None:
            return lambda: None
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        arrived.record(torch.cuda.current_stream(source.device))
        return arrived.synchronize

    @torch.no_grad()
    def send(self, target: Tensor, host: Tensor) -> None:
        """Begin to copy a buffer to the device; `finish` says until when the buffer has to stay as it is."""
        if self._sends is None:
            target.copy_(host)
            return
        with torch.cuda.stream(self._sends):
            target.copy_(host, non_blocking=True)

    def finish(self) -> None:
        """Let the device wait for what was sent before it goes on; what is fetched from then on comes after that."""
        if self._sends is not None:
            torch.cuda.current_stream(self._sends.device).wait_stream(self._sends)
