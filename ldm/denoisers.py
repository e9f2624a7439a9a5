"""From a network to the denoised estimate x0 = D(x_t, t), for whatever the network was trained to predict."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.tiling import tiled
from ldm.sampling import DenoiserLike
from ldm.schedules import Schedule
from ldm.util import memory_advice

# With x_t = alpha x_0 + sigma eps:          x0 from the network's output         what the network is trained to predict
PREDICTIONS = {
    "eps":      (lambda out, x_t, a, s: (x_t - s * out) / a, lambda x0, eps, a, s: eps),
    "v":        (lambda out, x_t, a, s: a * x_t - s * out,   lambda x0, eps, a, s: a * eps - s * x0),
    "x0":       (lambda out, x_t, a, s: out,                 lambda x0, eps, a, s: x0),
    "velocity": (lambda out, x_t, a, s: x_t - s * out,       lambda x0, eps, a, s: eps - x0),  # rectified flow only
}  # fmt: skip


@contextmanager
def full_precision() -> Iterator[None]:
    """TF32 off, and as it was afterwards. It is on by default for convolutions on recent GPUs, and takes 13 bits of a float32's
    mantissa: the difference of two evaluations would be mostly rounding."""
    cudnn: Any = torch.backends.cudnn
    switches: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


class Denoiser(DenoiserLike):
    """D(x_t, t) -> x0: a network, the schedule it was trained with, and what it predicts.

    network     callable (x_t [B, ...], t [B]) -> prediction of x_t's shape: a network, or any function
    schedule    ldm.schedules: the owner of (t, alpha, sigma); samplers read it from here, so that the two cannot disagree
    prediction  "eps", "v", "x0" or "velocity"
    weights     whose dtype and device D's are: a module, or a model with `dtype` and `device`; None: the network if it is a module,
                otherwise float32 on the CPU
    tf32        whether float32 weights may be used in TF32. False by default: exact differences are worth more than its speed. True
                also turns `jvp` to forward-mode differentiation

    Calling it: x_t [B, ...] float tensor, t a time of the schedule (ValueError otherwise); returns x0, same shape and dtype.
    One call is one network evaluation (NFE). MemoryError, saying what to change, where the memory does not suffice.

    What is about machines is set here, by `tile` and `compile`: samplers do not know of it.
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        schedule: Schedule,
        prediction: str = "eps",
        weights: Any = None,
        tf32: bool = False,
    ):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {prediction!r}: known are {', '.join(map(repr, PREDICTIONS))}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction
        self.tf32 = tf32
        self.weights = network if weights is None and isinstance(network, nn.Module) else weights
        self.tile(None)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network's weights."""
        weights = self.weights
        if isinstance(weights, nn.Module):
            return next((p.dtype for p in weights.parameters() if p.is_floating_point()), torch.float32)
        return torch.float32 if weights is None else weights.dtype

    @property
    def device(self) -> torch.device:
        """Where x_t belongs: the device of the network's weights."""
        weights = self.weights
        if isinstance(weights, nn.Module):
            return next((p.device for p in weights.parameters()), torch.device("cpu"))
        return torch.device("cpu") if weights is None else torch.device(weights.device)

    @property
    def arithmetic(self) -> str:
        """How the network computes, a key of ldm.sampling.ARITHMETIC: what h and mode of Jacobian products follow."""
        name = str(self.dtype).removeprefix("torch.")
        return "tf32" if name == "float32" and self.tf32 and self.device.type == "cuda" else name

    def __call__(self, x_t: Tensor, t: float) -> Tensor:
        _, alpha, sigma = self.schedule.level(t)
        with (
            nullcontext() if self.tf32 else full_precision(),
            memory_advice(
                f"x_t of shape {list(x_t.shape)} is too much for the memory of {x_t.device}: take fewer samples at "
                "once, windows of D.tile(size), or weights of half precision, load_model(..., dtype=torch.bfloat16)"
            ),
        ):
            out = self.predict(x_t, torch.full(x_t.shape[:1], t, device=x_t.device))
        return PREDICTIONS[self.prediction][0](out, x_t, alpha, sigma)

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        """What the network predicts at x_t [B, ...] and t [B]; x_t's shape."""
        return self._on_windows(x_t, t)

    def tile(self, size: int | None, overlap: float = 0.5, batch: int = 1) -> "Denoiser":
        """Show the network a large x_t [B, C, H, W] in overlapping windows, and take the mean of what it predicts for each place,
        weighted by linear ramps (MultiDiffusion, Bar-Tal et al. 2023); None: all at once. Returns self.

        size     of the windows in pixels of x_t, best what the network was trained at: `model.image_size`
        overlap  of neighbouring windows, as a fraction of size, 0 to 0.9; windows that do not fit evenly overlap more
        batch    windows per call of the network, of each sample

        Memory is that of `batch` windows, time grows as their number. Still one smooth function of x_t, so that its Jacobian
        product is taken as ever, and the same as the plain one where x_t fits into one window. ValueError on other values.
        """
        if size is not None and (int(size) != size or size < 1):
            raise ValueError(f"size = {size}: give a positive integer, or None for no windows")
        if not 0 <= overlap <= 0.9:
            raise ValueError(f"overlap = {overlap}: give a fraction of the window from 0 to 0.9")
        if int(batch) != batch or batch < 1:
            raise ValueError(f"batch = {batch}: give a positive integer")
        self._windows = None if size is None else (int(size), int(overlap * size), int(batch))
        return self

    def compile(self, **options: Any) -> "Denoiser":
        """Compile the network by torch.compile(**options); mode="reduce-overhead": as a CUDA graph, on a GPU. Returns self.

        The first evaluation takes minutes at the size of Stable Diffusion, others of the same shape and dtype no compilation,
        whatever t and the prompts; denoisers of one model share it. Forward-mode differentiation (`jvp`) runs uncompiled.
        """
        compiled = torch.compile(self.network, dynamic=False, **options)
        # A CUDA graph writes every result to the same place: the sampler's x0 must not change under its hands.
        self.network = lambda *inputs: compiled(*inputs).clone()
        return self

    def _on_windows(self, x_t: Tensor, *others: Tensor) -> Tensor:
        """network(x_t, *others), others [B, ...], on the windows of `tile`."""
        if self._windows is None:
            return self.network(x_t, *others)
        size, overlap, batch = self._windows

        def network(tiles: Tensor) -> Tensor:
            n = len(tiles) // len(x_t)
            return self.network(tiles, *(v.repeat(n, *[1] * (v.ndim - 1)) for v in others))

        return tiled(network, x_t, size, overlap, batch=batch)


class LatentDenoiser(Denoiser):
    """D(x_t, t) -> x0 on latents of a LatentDiffusion, for prompts, with classifier-free guidance (Ho & Salimans 2022).

    The network's output (eps or v) is out_u + s (out_c - out_u) at any s = `guidance`: one doubled batch per call, but
    s = 1 (the prompt alone), s = 0 (the negative prompt alone) and equal prompts take a single one. The paper's w is s = 1 + w.

    model             ldm.models.diffusion.ddpm.LatentDiffusion with a text encoder
    prompts           a list of strings, one per sample of x_t, or one string for all samples
    guidance          s
    negative_prompts  likewise; None: empty prompts, or what the model's pipeline takes (zeros for SDXL)

    The text is encoded once, here. Calling it: x_t [B, C, h, w] float32, t a time of the schedule -> x0, same shape and
    dtype. Raises ValueError if the number of prompts is neither one nor B.
    """

    def __init__(
        self,
        model: Any,
        prompts: str | Sequence[str] | Any,
        guidance: float = 1.0,
        negative_prompts: str | Sequence[str] | Any = None,
        tf32: bool = False,
    ):
        super().__init__(model.network, model.schedule, model.parameterization, model, tf32)
        # Ordinary tensors even inside torch.inference_mode(), so that forward-mode differentiation may use them.
        with torch.inference_mode(False), torch.no_grad():
            # Text: tokens [1 or B, M, context_dim]; classes: labels [.]
            self.condition = self.negative = model.encode_prompts(prompts)
            if guidance != 1:
                self.negative = model.encode_negatives(negative_prompts)
                self.condition, self.negative = _same_length(self.condition, self.negative)
        same = self.condition.shape == self.negative.shape and torch.equal(self.condition, self.negative)
        self.guidance = 1.0 if same else guidance  # equal outputs: no doubled batch for nothing

    def predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.guidance == 1:
            return self._on_windows(x_t, t, self._per_sample("prompts", self.condition, x_t))
        negative = self._per_sample("negative_prompts", self.negative, x_t)
        if self.guidance == 0:
            return self._on_windows(x_t, t, negative)
        condition = torch.cat([negative, self._per_sample("prompts", self.condition, x_t)])
        out_u, out_c = self._on_windows(torch.cat([x_t, x_t]), torch.cat([t, t]), condition).chunk(2)
        return out_u + self.guidance * (out_c - out_u)

    def _per_sample(self, name: str, condition: Tensor, x_t: Tensor) -> Tensor:
        if len(condition) not in (1, len(x_t)):
            raise ValueError(
                f"{name} has {len(condition)} entries, but x_t has {len(x_t)} samples: give one for each, or one for all"
            )
        return condition.expand(len(x_t), *condition.shape[1:])


def _same_length(*contexts: Tensor) -> Sequence[Tensor]:
    """Tokens [B, M, width], the shorter ones followed by zeros: contexts of different lengths have a channel for the mask."""
    if contexts[0].ndim < 3:
        return contexts
    most = max(x.shape[1] for x in contexts)
    return [nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in contexts]
