"""The denoiser's Jacobian J = dD/dx_t, measured."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def dense(D, x_t, t, chunk=128):
    """J at one x_t [1, ...] with n values, as a matrix [n, n]: column j is the response of the whole x0 to value j of x_t.

    Exact, by forward-mode differentiation, `chunk` columns at a time; costs about 2n evaluations of D.
    """
    if x_t.shape[0] != 1:
        raise ValueError(f"x_t has batch size {x_t.shape[0]}: the dense Jacobian is of one sample, give [1, ...]")
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        J = torch.func.jacfwd(lambda x: D(x.view_as(x_t), t).flatten(), chunk_size=chunk)(x_t.flatten())
    return J
