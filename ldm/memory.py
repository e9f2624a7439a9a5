"""The memory that a run will need, before it: the same code on tensors without data."""

from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm.constraints import Constraint
from ldm.sampling import ARITHMETIC, DenoiserLike

FORWARD_AD = 2.4  # memory of a forward-mode product to that of an evaluation: values and tangents, and attention by its formula


class Live(TorchDispatchMode):
    """Follows the storages that are alive: `peak` is the most bytes there were at a time, each rounded up to 512."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: WeakKeyDictionary = WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if torch.is_tensor(x) and id(storage := x.untyped_storage()) not in known and storage not in self.seen:
                self.add(storage)
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        size = -(-storage.nbytes() // 512) * 512
        self.now, self.peak = self.now + size, max(self.peak, self.now + size)
        self.seen[storage] = _Freed(self, size)


class _Freed:
    """Takes its bytes back when its storage, the key of the dictionary that holds it, is gone."""

    def __init__(self, live: Live, size: int):
        self.live, self.size = live, size

    def __del__(self) -> None:
        self.live.now -= self.size


def peak_bytes(function: Callable[..., Any], *args: Any) -> int:
    """The most bytes that `function(*args)` has alive beyond its arguments and what it holds already, without computing anything.

    Tensors among args, and those that the function holds (weights, y ...), keep their shape, dtype and device.
    """
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        args = tree_map_only(torch.Tensor, fake.from_tensor, args)
        with Live() as live:
            function(*args)
    return live.peak


def expected_peak(D: DenoiserLike, constraint: Constraint | None, shape: Sequence[int], weights: Any = None) -> float:
    """GiB that sampling with J will need at its peak: the weights, x_t, x0, e and J e, and the hungriest of one evaluation
    of D, one product J e (its mode follows the arithmetic of D) and one call of the constraint. On a CPU on the safe side by up to
    a fifth; on a GPU the workspaces of cuDNN come on top, up to 0.7 GiB at the size of Stable Diffusion on an H200.

    shape: [B, C, h, w] of x_t; weights: the model whose parameters() and buffers() count, autoencoder and text encoder
    included; None: none.
    """
    x, t = torch.zeros(shape, device=D.device), D.schedule.levels(20)[10].t
    with torch.no_grad():
        peak = peak_bytes(lambda x: D(x, t), x)
    if ARITHMETIC[D.arithmetic].mode == "forward-ad":
        peak = round(peak * FORWARD_AD)
    if constraint is not None:
        peak = max(peak, peak_bytes(constraint, x))
    held = 0 if weights is None else sum(p.nbytes for p in [*weights.parameters(), *weights.buffers()])
    return (held + peak + 4 * x.nbytes) / 2**30
