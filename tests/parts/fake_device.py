"""A GPU that is not there: torch's fake tensors have a shape, a dtype and a device but no values, and mix as real ones.

What loads runs while `moved_to` is entered: tensors are real until they move to the device. What computes runs in
`running_on`: each tensor that is made there is fake, and one that is left on the CPU meets those of the device with an
error, as it would on a machine that has it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

CUDA = "cuda"
META = "meta"
"""In its place for backward passes, in which torch looks for cuda's driver; devices are checked alike."""
_FAKES = FakeTensorMode(allow_non_fake_inputs=True)
_ASKS_WHETHER_FINITE = (Tensor.isfinite, Tensor.all, Tensor.__bool__)
"""What a loader does with weights that moved; the answer is yes."""


class _Moves(TorchFunctionMode):
    """What moves to the device, or is made there, becomes fake."""

    def __init__(self, device: str, loads: bool) -> None:
        super().__init__()
        self.device, self.loads = device, loads

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.pin_memory:
            return args[0]
        if args and isinstance(args[0], FakeTensor):
            if self.loads and func in _ASKS_WHETHER_FINITE:
                return True if func is Tensor.__bool__ else args[0]
            if func is Tensor.__deepcopy__:
                return _copy(args[0])
        if not any(isinstance(value, str | torch.device) and self._names(value) for value in (*args, *kwargs.values())):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor):
            args, kwargs, func = (func(*args, **kwargs | {"device": "cpu"}), kwargs["device"]), {}, Tensor.to
        if func in (Tensor.to, Tensor.cuda):
            args = (_without_values(args[0]), *args[1:])
        with _FAKES:
            return func(*args, **kwargs)

    def _names(self, device: str | torch.device) -> bool:
        return str(device).partition(":")[0] == self.device


def _without_values(tensor: Tensor) -> FakeTensor:
    fake = tensor if isinstance(tensor, FakeTensor) else _FAKES.from_tensor(tensor)
    fake.constant = None  # small ones that were made of numbers remember them, and would be moved for real
    return fake


def _copy(tensor: FakeTensor) -> Tensor:
    """Torch's own copies the storage, which there is none of."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


class _RefusesFloat64(TorchFunctionMode):
    """Nothing of the device is float64."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **dict(kwargs or {}))
        if isinstance(result, Tensor) and (result.device.type, result.dtype) == (self.device, torch.float64):
            raise TypeError(f"{self.device} has no float64, and {getattr(func, '__name__', func)} makes some there")
        return result


@contextmanager
def moved_to(device: str) -> Iterator[None]:
    """For what loads: what moves to the device is fake from then on."""
    with _Moves(device, loads=True):
        yield


@contextmanager
def running_on(device: str, float64: bool = True) -> Iterator[None]:
    """For what computes: all that is made is fake. Without `float64`, what makes some there raises, as on Apple's."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
        stack.enter_context(_Moves(device, loads=False))
        stack.enter_context(_FAKES)
        if not float64:
            stack.enter_context(_RefusesFloat64(device))
        yield


def blank(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fake on the device."""
    with running_on(device):
        return torch.empty(shape, dtype=dtype, device=device)
