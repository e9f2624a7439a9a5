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
