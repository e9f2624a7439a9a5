"""Products with the denoiser's Jacobian and its eigenvalues: against closed forms, against each other, on the shipped networks."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ldm import sampling
from ldm.checkpoints import load_model
from ldm.data.emoji import sample_emoji
from ldm.data.mnist import sample_digits
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.jacobian import Jacobian, columns_and_rows
from ldm.linalg import arnoldi, leading_by_step, leading_residual
from ldm.sampling import DenoiserLike, H, seeded_noise

TIMES = [99, 500, 900]


class MixtureDenoiser(DenoiserLike):
    """The exact D for x_0 ~ sum_k w_k N(m_k, C_k), curved; its J is (alpha / sigma^2) Cov[x_0 | x_t] (Tweedie)."""

    def __init__(self, schedule, n=16, components=3):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        factors = draw(components, n, n) / n**0.5
        self.means, self.covs, self.schedule = draw(components, n), 0.3 * factors @ factors.mT, schedule

    def posterior(self, x_t, t):
        """(responsibilities [B, K], means [B, K, n], covariances [K, n, n]) of x_0 given x_t, flattened."""
        _, alpha, sigma = self.schedule.level(t)
        x, identity = x_t.flatten(1).double()[:, None], torch.eye(x_t[0].numel(), dtype=torch.float64)
        marginal = torch.distributions.MultivariateNormal(alpha * self.means, alpha**2 * self.covs + sigma**2 * identity)
        gain = alpha * self.covs @ torch.linalg.inv(marginal.covariance_matrix)  # [K, n, n]
        means = self.means + torch.einsum("kij,bkj->bki", gain, x - alpha * self.means)
        return marginal.log_prob(x).softmax(1), means, self.covs - alpha * gain @ self.covs

    def __call__(self, x_t, t):
        r, means, _ = self.posterior(x_t, t)
        return torch.einsum("bk,bki->bi", r, means).view_as(x_t).to(x_t)

    def jacobian(self, x_t, t):  # [B, n, n]
        _, alpha, sigma = self.schedule.level(t)
        r, means, covs = self.posterior(x_t, t)
        spread = means - torch.einsum("bk,bki->bi", r, means)[:, None]
        cov = torch.einsum("bk,kij->bij", r, covs) + torch.einsum("bk,bki,bkj->bij", r, spread, spread)
        return alpha / sigma**2 * cov


def relative(a, b):
    """|a - b| / |b| of each sample, the largest."""
    return ((a - b).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1)).max().item()


def times(matrices, v):
    return (matrices.to(v) @ v.flatten(1)[..., None]).view_as(v)


@pytest.fixture(params=["gaussian", "mixture"])
def case(request, gaussian, schedule):
    """(D, closed form x_t, t -> J [B, n, n], shape, dtype): float32 for the linear D, float64 for the curved one."""
    if request.param == "gaussian":
        return gaussian, lambda x_t, t: gaussian.jacobian(t).expand(len(x_t), -1, -1), (3, 1, 8, 8), torch.float32
    D = MixtureDenoiser(schedule)
    return D, D.jacobian, (3, 1, 4, 4), torch.float64


def at(D, closed, shape, dtype, t, **kwargs):
    """A Jacobian at seeded points of noise level t, the closed form, and two directions."""
    _, alpha, sigma = D.schedule.level(t)
    x_t, v, u = (seeded_noise(shape, range(i, i + shape[0]), dtype=dtype)() for i in (0, 10, 20))
    x_t = alpha * x_t + sigma * u
    return Jacobian(D, x_t, t, **kwargs), closed(x_t, t), v, u


# ---------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("t", TIMES)
def test_products_and_matrix_equal_the_closed_form(case, t):
    J, exact, v, u = at(*case, t)
    assert relative(J.jvp(v), times(exact, v)) < 1e-5
    assert relative(J.vjp(u), times(exact.mT, u)) < 1e-5
    assert relative(Jacobian(J.D, J.x_t[:1], t).dense()[None].double(), exact[:1]) < 1e-5
    assert relative(J.symmetric(v), times(exact, v)) < 1e-5
    assert (J.skew(v).norm() / v.norm()) < 1e-5  # Tweedie: symmetric


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("method", ["difference", "central"])
def test_differences_equal_the_closed_form(case, t, method):
    """float32 with its own h for the linear D; float64, where h may be shorter, for the curved one."""
    J, exact, v, _ = at(*case, t, h=None if case[3] == torch.float32 else 5e-4)
    assert relative(J.jvp(v, method), times(exact, v)) < 1e-3


def test_errors_of_order_h_and_of_order_h_squared(schedule):
    """Where D is curved, a tenth of h leaves a tenth of the one-sided error and a hundredth of the two-sided one."""
    D = MixtureDenoiser(schedule)
    errors = {}
    for h in (0.1, 0.01):
        J, exact, v, _ = at(D, D.jacobian, (3, 1, 4, 4), torch.float64, 500, h=h)
        for method in ("difference", "central"):
            errors[method, h] = relative(J.jvp(v, method), times(exact, v))
    assert errors["difference", 0.1] / errors["difference", 0.01] == pytest.approx(10, rel=0.3)
    assert errors["central", 0.1] / errors["central", 0.01] == pytest.approx(100, rel=0.3)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("product", ["jvp", "vjp", "symmetric"])
def test_ritz_values_equal_the_closed_form(case, t, product):
    """All products that there are: every eigenvalue, all samples with their own. In float64."""
    D, closed, shape, _ = case
    J, exact, v, _ = at(D, closed, shape, torch.float64, t)
    n = v[0].numel()
    ritz = arnoldi(getattr(J, product), v, n, tolerance=1e-12)
    for i in range(len(v)):
        m = int(ritz.steps[i])
        eigenvalues = torch.linalg.eigvalsh(exact[i]).flip(0)
        assert (ritz.values[i, :5] - eigenvalues[:5]).abs().max() < 1e-5 * eigenvalues[0]
        assert m >= n // 2 and ritz.values[i, :m].imag.abs().max() < 1e-6 * eigenvalues[0]


def test_the_skew_part_s_values_are_imaginary():
    torch.manual_seed(0)
    M = torch.randn(30, 30, dtype=torch.float64)
    J = Jacobian(lambda x, t: x @ M.T, torch.randn(2, 30, dtype=torch.float64), 0)
    ritz = arnoldi(J.skew, torch.randn(2, 30, dtype=torch.float64), 30)
    assert ritz.values.real.abs().max() < 1e-10
    expected = torch.linalg.eigvals((M - M.T) / 2).imag.abs().sort(descending=True).values
    assert torch.allclose(ritz.values.imag.abs().sort(dim=1, descending=True).values, expected.expand(2, -1), atol=1e-8)


# ---------------------------------------------------------------------------------------------------- Arnoldi itself


def nonsymmetric(n=200, seed=0):
    """A matrix with a few large complex pairs and reals outside a disk of radius 1, in a basis that is not orthogonal."""
    rng = np.random.default_rng(seed)
    blocks = rng.uniform(-0.7, 0.7, n)
    M = np.diag(blocks)
    outside = [complex(4, 3), complex(-3, 2.5), complex(0.5, 3)]
    for k, z in enumerate(outside):
        M[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] = [[z.real, z.imag], [-z.imag, z.real]]
    M[6, 6] = 2.5
    basis = np.eye(n) + 0.3 * rng.standard_normal((n, n)) / n**0.5
    return torch.from_numpy(basis @ M @ np.linalg.inv(basis))


def test_extreme_ritz_values_of_a_nonsymmetric_matrix():
    M = nonsymmetric()
    b = seeded_noise((2, 200), [0, 1], dtype=torch.float64)()
    ritz = arnoldi(lambda v: v @ M.T, b, 40)
    exact = np.linalg.eigvals(M.numpy())
    exact = exact[np.argsort(-abs(exact))]
    for i in range(2):
        for value in exact[:7]:
            assert (ritz.values[i].numpy() - value).__abs__().min() < 1e-6
        assert (ritz.residuals[i, :7] < 1e-6).all()
        assert abs(exact[0].imag) > 1 and abs(abs(ritz.values[i, 0]) - abs(exact[0])) < 1e-6


def test_the_residuals_are_those_of_the_ritz_vectors():
    M = nonsymmetric()
    ritz = arnoldi(lambda v: v @ M.T, seeded_noise((1, 200), [0], dtype=torch.float64)(), 12)
    Q, small = ritz.basis[0], ritz.hessenberg[0]
    assert (Q @ Q.T - torch.eye(12, dtype=torch.float64)).abs().max() < 1e-13
    theta, y = torch.linalg.eig(small[:12])
    for k in range(12):
        x = Q.T.to(y) @ (y[:, k] / y[:, k].norm())
        j = (ritz.values[0] - theta[k]).abs().argmin()
        assert (M.to(x) @ x - theta[k] * x).norm() == pytest.approx(ritz.residuals[0, j].item(), rel=1e-6, abs=1e-10)


def test_the_leading_value_by_step_is_that_of_shorter_runs():
    M, b = nonsymmetric(), seeded_noise((2, 200), [0, 1], dtype=torch.float64)()
    values, residuals = leading_by_step(arnoldi(lambda v: v @ M.T, b, 8))
    for n in (1, 3, 8):
        shorter = arnoldi(lambda v: v @ M.T, b, n)
        assert torch.allclose(values[:, n - 1].abs(), shorter.values[:, 0].abs())
        assert torch.allclose(residuals[:, n - 1], shorter.residuals[:, 0])
        assert torch.allclose(leading_residual(lambda v: v @ M.T, shorter, b), shorter.residuals[:, 0])


def test_a_conjugate_pair_s_value_belongs_to_its_vector():
    """Eigenvalues of skew matrices are imaginary and come in pairs of the same size."""
    noise, b = (torch.randn(*n, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for n in ((8, 8), (5, 8)))
    M = noise - noise.T
    assert leading_residual(lambda v: v @ M.T, arnoldi(lambda v: v @ M.T, b, 8), b).max() < 1e-10


def test_a_measured_residual_knows_the_error_of_arnoldi_s_products():
    """Products with M + E: Arnoldi's estimate is that of M + E and falls to nothing; what is measured with M is |E x|."""
    generator = torch.Generator().manual_seed(3)
    M, E, b = (torch.randn(*n, generator=generator, dtype=torch.float64) for n in ((9, 9), (9, 9), (2, 9)))
    E *= 0.01
    ritz = arnoldi(lambda v: v @ (M + E).T, b, 9)
    assert leading_residual(lambda v: v @ (M + E).T, ritz, b).max() < 1e-10 > ritz.residuals[:, 0].max()
    found = leading_residual(lambda v: v @ M.T, ritz, b)
    assert found.min() > 1e-3 and found.max() < torch.linalg.matrix_norm(E, 2)


def test_columns_and_rows_of_a_pixel_are_those_of_the_matrix(gaussian):
    x_t = seeded_noise((1, 1, 8, 8), [0], dtype=torch.float64)()
    J = Jacobian(gaussian, x_t, 500)
    matrix = J.dense().view(*x_t.shape[1:], *x_t.shape[1:])
    column, row = columns_and_rows(J, [(2, 3)])
    assert torch.allclose(column[0], matrix[..., :, 2, 3].square().sum(-1))
    assert torch.allclose(row[0], matrix[:, 2, 3].square().sum(0))


def test_the_basis_stays_orthogonal_where_one_gram_schmidt_would_not():
    """Eigenvalues over twelve orders of magnitude."""
    M = torch.diag(10.0 ** -torch.linspace(0, 12, 60, dtype=torch.float64))
    ritz = arnoldi(lambda v: v @ M, torch.ones(1, 60, dtype=torch.float64), 30, tolerance=1e-15)
    assert (ritz.basis[0] @ ritz.basis[0].T - torch.eye(30, dtype=torch.float64)).abs().max() < 1e-12


@pytest.mark.parametrize("dtype, accuracy", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_breakdown_ends_cleanly_for_its_sample_alone(dtype, accuracy):
    """Samples that begin in invariant subspaces of one and of three dimensions, next to one that does not, and one that M kills."""
    values = torch.arange(20, dtype=dtype)
    b = torch.zeros(4, 20, dtype=dtype)
    b[0, 7] = -2.0
    b[1, [3, 11, 19]] = torch.tensor([1.0, 2.0, 3.0], dtype=dtype)
    b[2] = 1.0
    b[3, 0] = 5.0  # eigenvalue 0: M b = 0
    ritz = arnoldi(lambda v: v * values, b, 6)
    assert ritz.steps.tolist() == [1, 3, 6, 1]
    assert abs(ritz.values[0, 0] - 7) < accuracy and ritz.residuals[0, 0] == 0
    assert torch.allclose(ritz.values[1, :3].real, torch.tensor([19.0, 11, 3], dtype=torch.float64), atol=20 * accuracy)
    assert ritz.values[3, 0].abs() < accuracy
    assert ritz.values[0, 1:].isnan().all() and ritz.residuals[1, 3:].isnan().all() and not ritz.values[2].isnan().any()
    assert not ritz.basis.isnan().any() and (ritz.basis[0, 1:] == 0).all()


def test_arnoldi_of_a_batch_is_that_of_each_sample(gaussian):
    x_t, b = (seeded_noise((3, 1, 8, 8), range(i, i + 3), dtype=torch.float64)() for i in (0, 3))
    together = arnoldi(Jacobian(gaussian, x_t, 500).jvp, b, 5)
    alone = arnoldi(Jacobian(gaussian, x_t[1:2], 500).jvp, 100 * b[1:2], 5)
    assert torch.allclose(together.values[1], alone.values[0], atol=1e-10)


@pytest.mark.parametrize("b, n, message", [
    (torch.ones(2, 5), 0, "n = 0"), (torch.ones(2, 5), 6, "1 to 5"), (torch.ones(2, 5), 2.5, "n = 2.5"),
    (torch.tensor([[1.0, 1], [0, 0]]), 2, r"samples \[1\]"), (torch.tensor([[float("nan"), 1]]), 1, "not finite"),
])  # fmt: skip
def test_wrong_beginnings_are_refused(b, n, message):
    with pytest.raises(ValueError, match=message):
        arnoldi(lambda v: pytest.fail("a product was taken"), b, n)


def test_products_that_are_not_finite_are_an_error():
    with pytest.raises(FloatingPointError, match="number 1"):
        arnoldi(lambda v: v / 0, torch.ones(1, 4), 2)


# ---------------------------------------------------------------------------------------------------- one point, one function


def test_wrong_arguments(gaussian):
    x_t = seeded_noise((2, 1, 8, 8), [0, 1])()
    for arguments, message in (((gaussian, x_t, 1000), "t = 1000"), ((gaussian, x_t, 5, -1.0), "h = -1.0")):
        with pytest.raises(ValueError, match=message):
            Jacobian(*arguments)
    J = Jacobian(gaussian, x_t, 500)
    with pytest.raises(ValueError, match="batch size 2"):
        J.dense()
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 8\].*\[2, 1, 8, 8\]"):
        J.jvp(x_t[:1])
    with pytest.raises(ValueError, match="u has shape"):
        J.vjp(x_t[:1])
    with pytest.raises(ValueError, match="'backward'"):
        J.jvp(x_t, "backward")


def test_the_point_stays_what_it_was(gaussian):
    """x_t is copied, every evaluation is at the same t, and products under inference_mode are the same."""
    seen = []

    def D(x, t):
        seen.append(t)
        return gaussian(x, t)

    x_t, v = seeded_noise((1, 1, 8, 8), [0])(), seeded_noise((1, 1, 8, 8), [1])()
    J = Jacobian(D, x_t, 500)
    before = [J.jvp(v), J.vjp(v), J.jvp(v, "difference"), J.symmetric(v)]
    x_t += 1.0
    with torch.inference_mode():
        again = [J.jvp(v), J.vjp(v), J.jvp(v, "difference"), J.symmetric(v)]
        inside = Jacobian(D, J.x_t + 0.0, 500)
        assert torch.allclose(inside.vjp(v + 0.0), before[1])
    assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
    assert set(seen) == {500}
    assert not any(p.requires_grad for p in before)


# ---------------------------------------------------------------------------------------------------- the shipped networks


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


def mnist():
    model = load_model("mnist", device="cpu")
    return Denoiser(model.network, model.schedule, model.parameterization)


def network(name, tiny):
    """(D, clean inputs [2, ...])"""
    if name == "mnist":
        return mnist(), sample_digits([3, 8], each=1)[0]
    images, captions = sample_emoji()
    with torch.no_grad():
        z = tiny.encode(images[:2])
    D = LatentDenoiser(tiny, captions[:2], guidance=3.0)
    if name == "tiny, decoded":  # pixels of the denoised estimate: what a gradient of a pixel loss goes through
        return (lambda x, t: tiny.decode(D(x, t))), z
    if name == "tiny, round trip":  # latent -> image -> latent
        return (lambda x, t: tiny.encode(tiny.decode(x))), z
    return D, z


@pytest.mark.parametrize("name", ["mnist", "tiny", "tiny, decoded", "tiny, round trip"])
@pytest.mark.parametrize("t", [300, 700])
def test_forward_and_backward_products_are_adjoint(name, t, tiny):
    """<u, J v> = <J^T u, v> in float32, to 1e-4 (and 1e-6 of |u| |J v|, which the product may be far below)."""
    D, clean = network(name, tiny)
    now = (mnist() if name == "mnist" else tiny).schedule.level(t)
    J = Jacobian(D, now.alpha * clean + now.sigma * seeded_noise(clean.shape, range(2))(), t)
    v, u = seeded_noise(clean.shape, range(2, 4))(), seeded_noise(J.x0.shape, range(4, 6))()
    Jv, JTu = J.jvp(v).flatten(1).double(), J.vjp(u).flatten(1).double()
    forward, backward = (u.flatten(1) * Jv).sum(1), (JTu * v.flatten(1)).sum(1)
    assert ((forward - backward).abs() <= 1e-4 * forward.abs() + 1e-6 * u.flatten(1).norm(dim=1) * Jv.norm(dim=1)).all()


class GroupNorms(TorchDispatchMode):
    """Remembers of each group norm whether its tensor was contiguous."""

    def __init__(self):
        super().__init__()
        self.contiguous = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.native_group_norm.default:
            self.contiguous.append(args[0].is_contiguous())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mnist", "tiny, decoded"])
def test_group_norms_may_need_contiguous_tensors(name, tiny, monkeypatch):
    """As in forward mode in some versions of PyTorch: the same products there, of networks that are channels-last."""
    D, clean = network(name, tiny)
    J, v, found = Jacobian(D, clean, 500), seeded_noise(clean.shape, range(2))(), []
    for any_format in (sampling._differentiates_any_group_norm(), False):
        monkeypatch.setattr(sampling, "_differentiates_any_group_norm", lambda any_format=any_format: any_format)
        with GroupNorms() as group_norms:
            found.append(J.jvp(v))
        assert group_norms.contiguous and all(group_norms.contiguous) != any_format
    assert relative(*found) < 1e-4


@pytest.mark.parametrize("name", ["mnist", "tiny"])
def test_products_of_the_networks_equal_the_dense_matrix(name, tiny):
    """The convolutional networks at half their size, where the matrix is quick to have: 256 values."""
    D, clean = network(name, tiny)
    clean = clean[:1, :, 8:24, 8:24] if name == "mnist" else clean[:1, :, 4:12, 4:12]
    D = D if name == "mnist" else LatentDenoiser(tiny, "red apple", guidance=1.0)
    now = D.schedule.level(500)
    J = Jacobian(D, now.alpha * clean + now.sigma * seeded_noise(clean.shape, [0])(), 500)
    v, u = (seeded_noise(clean.shape, [seed])() for seed in (1, 2))
    matrix = J.dense()
    assert matrix.shape == (256, 256)
    assert relative(J.jvp(v), times(matrix, v)) < 1e-4 and relative(J.vjp(u), times(matrix.T, u)) < 1e-4
    assert relative(J.jvp(v, "difference"), times(matrix, v)) < 0.03
    assert relative(J.jvp(v, "central"), times(matrix, v)) < 0.01
    ritz = arnoldi(J.jvp, v, 40)
    largest = np.abs(np.linalg.eigvals(matrix.double().numpy())).max()
    assert abs(abs(ritz.values[0, 0]) / largest - 1) < 1e-3
    assert H[torch.float32] == J.h
