"""The denoiser's Jacobian J = dD/dx_t, measured."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm


def dense(D, x_t, t, chunk=64):
    """J at one x_t [1, ...] with n values, as a matrix [n, n]: column j is the response of the whole x0 to value j of x_t.

    Exact, by forward-mode differentiation in batches of `chunk` columns; costs about 2n evaluations of D.
    """
    if x_t.shape[0] != 1:
        raise ValueError(f"x_t has batch size {x_t.shape[0]}: the dense Jacobian is of one sample, give [1, ...]")
    n = x_t.numel()
    units = torch.eye(n, dtype=x_t.dtype, device=x_t.device).view(n, *x_t.shape[1:])
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        rows = [
            torch.func.jvp(lambda x: D(x, t), (x_t.expand_as(v).contiguous(),), (v.contiguous(),))[1].flatten(1)
            for v in tqdm(units.split(chunk), "dense Jacobian", leave=False, delay=1)
        ]
    return torch.cat(rows).T.contiguous()
