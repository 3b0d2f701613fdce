"""Copies from the threads that read to the device that trains, on a stream of their own so that they overlap with
training.

On the CPU there is nothing to copy. A tensor may be used only after `receive`, which makes the device, not this
process, wait.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sent:
    """Tensors on their way to the device."""

    tensors: Mapping[str, Tensor]
    done: torch.cuda.Event | None
    """Recorded behind the copies; None on the CPU."""


class DeviceCopies:
    """Sends arrays to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def send(self, arrays: Mapping[str, np.ndarray]) -> Sent:
        """Start copying; for any thread. Any shapes and dtypes."""
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._stream is None:
            return Sent(tensors, None)
        with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
            copies = {name: tensor.pin_memory().to(self.device, non_blocking=True) for name, tensor in tensors.items()}
            return Sent(copies, self._stream.record_event())

    def receive(self, sent: Sent) -> dict[str, Tensor]:
        """The tensors, for use on the current stream."""
        if sent.done is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(sent.done)
            for tensor in sent.tensors.values():
                tensor.record_stream(current)
        return dict(sent.tensors)
