"""Constraints: callables x0 [B, ...] -> (e, residual), the error direction in x0 space and one number per sample [B].

`e` has x0's shape and points to where the constraint wants x0 to go; its length does not matter to the paper's loop. `residual`
is a root mean square over what is measured.
"""

import torch

from ldm.images import check_image
from ldm.operators import Mask


class LinearConstraint:
    """y = A x0 + sigma_y n with a linear operator A (ldm/operators.py):  e = A^T (y - A x0),  residual = RMS(y - A x0).

    y: [B, ...] in A's output space, finite. A sample that measures nothing (mask of zeros) has e = 0 and residual 0.
    """

    def __init__(self, A, y):
        if not torch.isfinite(y).all():
            raise ValueError(f"y has {int((~torch.isfinite(y)).sum())} values that are NaN or infinite: all must be finite")
        self.A, self.y = A, y
        self.measured = A.measured(torch.ones_like(y)).flatten(1).sum(1).clamp_min(1)  # [B] values per sample

    def __call__(self, x0):
        r = self.A.measured(self.y) - self.A(x0)
        return self.A.adjoint(r), (r.flatten(1).square().sum(1) / self.measured).sqrt()


def inpainting(image, mask):
    """The pixels where mask is 1 are known:  e = M * (image - x0).

    image: [B, C, H, W] in [-1, 1]; mask: [B or 1, 1, H, W] of 0 (fill in) and 1 (keep). ValueError where they do not fit.
    """
    A = Mask(mask)
    return LinearConstraint(A, A(check_image(image)))
