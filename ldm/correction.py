"""The correction that `fast_sampler` and its particles share: y moves the mean of x_0 by V A^T lambda.

    d = V A^T lambda,   (sigma_y^2 I + A V A^T) lambda = r = y - A x0                                                    (*)

V = gamma J where a step uses J (ldm/fast_sampler.py), the identity where it does not.
"""

from collections.abc import Callable

from torch import Tensor

from ldm.constraints import Constraint, DecodedConstraint
from ldm.linalg import gcr, max_norm, shortened
from ldm.operators import Mask

INNER = 10  # vectors where J is left out: they cost no evaluation of D. One is exact for masks, ten are for down-sampling
TRUST = 1.0  # largest |d|_inf of a step, where the constraint is not linear


def correction(
    constraint: Constraint,
    x0: Tensor,
    V: Callable[[Tensor], Tensor],
    vectors: int,
    sigma_y: float = 0.0,
    shift: Tensor | None = None,
    about: float | None = None,
) -> Tensor:
    """d [B, ...] of (*) by `vectors` vectors, with A linearised at x0 [B, ...]; V a function v -> V v. With shift, r is that of
    x0 + shift.

    about: V is about so many times the identity. Then (*) is preconditioned by P = (sigma_y^2 / about I + A A^T)^-1, which takes no
    product with V: lambda = P mu, and with one vector d is along V A^T P r. Nothing changes for masks, whose A A^T is the identity.
    """
    variance: Tensor | float = sigma_y**2
    if constraint.linearised is not None:
        A, r = constraint.linearised(x0)
        variance = variance + A.variance
        r = r if shift is None else r - A(shift)
        P = preconditioner(constraint, variance, about)

        def product(u):
            u = P(u)
            w = V(A.adjoint(u))
            return w, variance * u + A(w)

    else:
        r, _ = constraint(x0)

        def product(u):
            w = V(u)
            length = 0.1 / max_norm(w).clamp_min(1e-30)
            return w, (r - constraint(x0 + length * w)[0]) / length

    d, _ = gcr(r, product, vectors)
    return d if constraint.linear else shortened(d, TRUST)


def preconditioner(constraint: Constraint, variance: Tensor | float, about: float | None) -> Callable[[Tensor], Tensor]:
    """u -> P u by INNER vectors; of a decoded image A A^T is that of the image's operator. The identity where there is none."""
    A = getattr(constraint.pixels if isinstance(constraint, DecodedConstraint) else constraint, "A", None)
    if about is None or A is None or isinstance(A, Mask) or not A.linear:
        return lambda u: u

    def product(u):
        return u, A(A.adjoint(u))

    return lambda u: gcr(u, product, INNER, variance / about)[0]
