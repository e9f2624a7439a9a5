"""From a network to the denoised estimate x0 = D(x_t, t), for whatever the network was trained to predict."""

import torch

# With x_t = alpha x_0 + sigma eps:          x0 from the network's output         what the network is trained to predict
PREDICTIONS = {
    "eps":      (lambda out, x_t, a, s: (x_t - s * out) / a, lambda x0, eps, a, s: eps),
    "v":        (lambda out, x_t, a, s: a * x_t - s * out,   lambda x0, eps, a, s: a * eps - s * x0),
    "x0":       (lambda out, x_t, a, s: out,                 lambda x0, eps, a, s: x0),
    "velocity": (lambda out, x_t, a, s: x_t - s * out,       lambda x0, eps, a, s: eps - x0),  # rectified flow only
}  # fmt: skip


class Denoiser:
    """D(x_t, t) -> x0: a network, the schedule it was trained with, and what it predicts.

    network     callable (x_t [B, ...], t [B]) -> prediction of x_t's shape
    schedule    ldm.schedules: the owner of (t, alpha, sigma); samplers read it from here, so that the two cannot disagree
    prediction  "eps", "v", "x0" or "velocity"

    Calling it: x_t [B, ...] float tensor, t a time of the schedule (ValueError otherwise); returns x0, same shape and dtype.
    One call is one network evaluation (NFE).
    """

    def __init__(self, network, schedule, prediction="eps"):
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction = {prediction!r}: known are {', '.join(map(repr, PREDICTIONS))}")
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def __call__(self, x_t, t):
        _, alpha, sigma = self.schedule.level(t)
        out = self.network(x_t, torch.full(x_t.shape[:1], t, device=x_t.device))
        return PREDICTIONS[self.prediction][0](out, x_t, alpha, sigma)


class LatentDenoiser(Denoiser):
    """D(x_t, t) -> x0 on latents of a LatentDiffusion, for prompts, with classifier-free guidance (Ho & Salimans 2022).

    The network's output (eps or v) is out_u + s (out_c - out_u) at any s = `guidance`: one doubled batch per call, but
    s = 1 (the prompt alone) and s = 0 (the negative prompt alone) take a single one. The paper's w is s = 1 + w.

    model             ldm.models.diffusion.ddpm.LatentDiffusion with a text encoder
    prompts           a list of strings, one per sample of x_t, or one string for all samples
    guidance          s
    negative_prompts  likewise; None: empty prompts

    The text is encoded once, here. Calling it: x_t [B, C, h, w] float32, t a time of the schedule -> x0, same shape and
    dtype. Raises ValueError if the number of prompts is neither one nor B.
    """

    def __init__(self, model, prompts, guidance=1.0, negative_prompts=None):
        super().__init__(self._guided, model.schedule, model.parameterization)
        self.unet = model.network
        self.guidance = guidance
        # Ordinary tensors even inside torch.inference_mode(), so that forward-mode differentiation may use them.
        with torch.inference_mode(False), torch.no_grad():
            self.tokens = model.encode_prompts(prompts)  # [1 or B, M, context_dim]
            self.negative_tokens = model.encode_prompts("" if negative_prompts is None else negative_prompts)

    def _guided(self, x_t, t):
        if self.guidance == 1:
            return self.unet(x_t, t, self._per_sample("prompts", self.tokens, x_t))
        negative = self._per_sample("negative_prompts", self.negative_tokens, x_t)
        if self.guidance == 0:
            return self.unet(x_t, t, negative)
        context = torch.cat([negative, self._per_sample("prompts", self.tokens, x_t)])
        out_u, out_c = self.unet(torch.cat([x_t, x_t]), torch.cat([t, t]), context).chunk(2)
        return out_u + self.guidance * (out_c - out_u)

    def _per_sample(self, name, tokens, x_t):
        if len(tokens) not in (1, len(x_t)):
            raise ValueError(f"{name} has {len(tokens)} entries, but x_t has {len(x_t)} samples: give one for each, or "
                             "one for all")
        return tokens.expand(len(x_t), -1, -1)
