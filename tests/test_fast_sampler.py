from importlib import import_module

import pytest
import torch
from common import OPERATORS, NoBackward, draw, half_mask, known, matrix, posterior, tiny_unet
from torch.utils._python_dispatch import TorchDispatchMode

from ldm.baselines import solve_without_J
from ldm.checkpoints import load_model
from ldm.constraints import DecodedConstraint, LinearConstraint, LossConstraint
from ldm.correction import correction
from ldm.data.mnist import sample_digits
from ldm.denoisers import Denoiser
from ldm.fast_sampler import fast_sampler, steps_for
from ldm.linalg import gcr
from ldm.newton_sampler import sample
from ldm.nonlinear import clipped
from ldm.operators import Mask, downsample, gaussian_blur, measure
from ldm.sampling import jvp, seeded_noise
from ldm.schedules import FlowSchedule

SHAPE = (8, 1, 8, 8)
fast = import_module("ldm.fast_sampler")  # the room, not the function of its name


def last(*args, **kwargs):
    for state in fast_sampler(*args, **kwargs):  # noqa: B007
        pass
    return state


def step_from_the_moved_x0(D, constraint, x_t, x0, now, to, noise, s):
    """`step_with_J` with eps fitted to the moved x0, exact for a Gaussian (and worse on digits with few steps)."""
    gamma = now.sigma**2 / max(now.alpha, 1e-3)
    d = correction(constraint, x0, lambda v: gamma * jvp(D, x_t, now.t, v, x0, s.h, s.mode), s.vectors, s.sigma_y)
    return D.schedule.step(x_t, x0 + d, now, to, s.eta, noise), x0 + d


# ------------------------------------------------------------------------------------------------ generalised conjugate residuals


def test_gcr_solves_systems_that_are_not_symmetric():
    generator = torch.Generator().manual_seed(0)
    M = torch.eye(6, dtype=torch.float64) + 0.3 * torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    r = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    product = lambda u: (2 * u, (M @ u[..., None])[..., 0])  # noqa: E731
    exact = torch.linalg.solve(M + 0.5 * torch.eye(6), r)
    w, left = gcr(r, product, 6, 0.5)
    assert (w - 2 * exact).abs().max() < 1e-8 and left.abs().max() < 1e-8


@pytest.mark.parametrize("name", ["super-resolution", "blur"])
def test_one_preconditioned_vector_is_the_solution_where_V_is_as_it_was_taken_to_be(gaussian, name):
    A, sigma_y, v, x0 = OPERATORS[name], 0.2, 0.3, draw(gaussian, 8).double()
    constraint = LinearConstraint(A, measure(A, draw(gaussian, 8, seed=1).double(), sigma_y, range(8)))
    M, r = matrix(A).double(), constraint.difference(x0).flatten(1)
    exact = v * torch.linalg.solve(v * M @ M.T + sigma_y**2 * torch.eye(len(M)), r.T).T @ M
    products, errors = [], []
    for about in (v, None):
        d = correction(constraint, x0, lambda w: products.append(w) or v * w, 1, sigma_y, about=about).flatten(1)
        errors.append(((d - exact).norm() / exact.norm()).item())
    assert errors[0] < 0.01 and errors[0] < 0.1 * errors[1]
    assert len(products) == 2


def test_one_vector_is_the_exact_line_search_and_zero_stays_zero():
    r = torch.randn(4, 1, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r[2] = 0
    product = lambda u: (u.flip(-1), u.roll(1, -1) + u)  # noqa: E731
    w, left = gcr(r, product, 1)
    for c in (0.99, 1.01):
        assert ((r - c * (r - left)).flatten(1).norm(dim=1) >= left.flatten(1).norm(dim=1)).all()
    assert (w[2] == 0).all() and torch.isfinite(w).all()


@pytest.mark.parametrize("name", OPERATORS)
def test_without_J_is_the_regularised_solution(name):
    A = OPERATORS[name]
    r = A.measured(seeded_noise(A(torch.zeros(SHAPE)).shape, range(8), dtype=torch.float64)())
    d = solve_without_J(A, r, 2.0, 0.1, vectors=40).flatten(1)
    dense = matrix(A)
    wanted = 2 * dense.T @ torch.linalg.solve(2 * dense @ dense.T + 0.1 * torch.eye(len(dense)), r[r != 0].view(8, -1).T)
    assert (d - wanted.T).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------ exact where it should be


@pytest.mark.parametrize("name, sigma_y", [(name, s) for name in OPERATORS for s in (0.0, 0.2) if (name, s) != ("blur", 0.0)])
def test_enough_vectors_reach_the_mean_given_x_t_and_y(gaussian, name, sigma_y):
    """d of (*) against the posterior mean of the Gaussian, at three noise levels, to 1e-2."""
    A, x = OPERATORS[name], draw(gaussian, 1, seed=3).double()
    y = measure(A, x, sigma_y, [4])
    for t in (900, 500, 200):
        _, alpha, sigma = gaussian.schedule.level(t)
        x_t = alpha * x + sigma * seeded_noise((1, 1, 8, 8), [5], dtype=torch.float64)()
        V = lambda v: (sigma**2 / alpha * v.flatten(1) @ gaussian.jacobian(t).T).view_as(v)  # noqa: B023, E731
        x0 = gaussian(x_t, t)
        d = correction(LinearConstraint(A, y), x0, V, 32, sigma_y)
        exact, _ = posterior(gaussian, A, y, sigma_y, alpha, sigma, x_t)
        assert ((x0 + d).flatten() - exact).abs().max() < 1e-2, t


@pytest.mark.parametrize("sigma_y", [0.0, 0.2])
def test_the_gaussian_posterior_s_mean_and_variance(gaussian, sigma_y, monkeypatch):
    """Moment matching (eps fitted to the moved x0, uniform levels, J throughout) is exact for Gaussians but for discretisation.
    Over 2,000 samples: variance to 10 %, mean to 1e-2 in the root mean square on top of its standard error."""
    A, n = OPERATORS["half"], 2000
    y = measure(A, draw(gaussian, 1, seed=3).double(), sigma_y, [4])
    monkeypatch.setattr(fast, "step_with_J", step_from_the_moved_x0)
    state = last(gaussian, LinearConstraint(A, y.expand(n, -1, -1, -1)), (n, 1, 8, 8), range(n), steps=100, vectors=4,
                 late=0.0, eta=1.0, levels=gaussian.schedule.levels(100), sigma_y=sigma_y, dtype=torch.float64)  # fmt: skip
    mean, cov = posterior(gaussian, A, y, sigma_y)
    x, expected = state.x_t.flatten(1), cov.diagonal().mean()
    assert abs(x.var(0).mean() / expected - 1) < 0.1
    assert (x.mean(0) - mean).square().mean().sqrt() < 1e-2 + 2 * (expected / n) ** 0.5


def test_the_default_s_bias_is_as_documented(gaussian):
    """A push of 2.3 is worth several times the Gaussian's exact one: the mean is off by about 0.15 in the root mean square (the
    prior's by 1.0), the variance about a sixth too small."""
    A, n = OPERATORS["half"], 500
    y = A(draw(gaussian, 1, seed=0).double())
    x = last(gaussian, LinearConstraint(A, y.expand(n, -1, -1, -1)), (n, 1, 8, 8), range(n), dtype=torch.float64).x_t.flatten(1)
    mean, cov = posterior(gaussian, A, y, 0.0)
    assert 0.05 < (x.mean(0) - mean).square().mean().sqrt() < 0.25
    assert 0.75 < x.var(0).mean() / cov.diagonal().mean() < 0.95


# ------------------------------------------------------------------------------------------------ the contract


@pytest.mark.parametrize("vectors", [1, 3])
def test_nfe_is_1_plus_vectors_and_1_without_J(gaussian, vectors):
    constraint = known(draw(gaussian, 8), half_mask())
    for late in (0.0, 0.3, 1e6):
        gaussian.calls = 0
        states = list(fast_sampler(gaussian, constraint, SHAPE, range(8), steps=12, vectors=vectors, late=late))
        levels = gaussian.schedule.log_levels(12)[:-1]
        with_J = sum(level.sigma >= late * level.alpha for level in levels[:-1])
        assert states[-1].nfe == gaussian.calls == 12 + vectors * with_J
        assert steps_for(states[-1].nfe, gaussian.schedule, vectors, late) == 12
    assert last(gaussian, constraint, SHAPE, range(8)).nfe <= 44  # the default
    assert last(gaussian, None, SHAPE, range(8), steps=9).nfe == 9


@pytest.mark.parametrize("name", OPERATORS)
def test_consistent_measurements_are_met(gaussian, name):
    constraint = LinearConstraint(OPERATORS[name], OPERATORS[name](draw(gaussian, 8)))
    assert last(gaussian, constraint, SHAPE, range(8)).residual.max() < (1e-2 if name == "blur" else 1e-4)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("fresh", [0.5, 0.85, 1.0])
def test_without_J_x_s_has_the_noise_of_its_level(schedule, name, fresh):
    """A D that knows the image: x_s - alpha_s x_0 has the variance sigma_s^2 in every direction, to 10 % over 4,000 samples. y is
    as noisy as x_s: unaccounted for, the noise taken from it would add a quarter where A neither weakens nor hides."""
    A, n = OPERATORS[name], 4000
    _, to = schedule.log_levels(5)[:2]
    sigma_y = to.sigma / to.alpha
    image = seeded_noise((1, 1, 8, 8), [0])()
    D = Denoiser(lambda x_t, t: image.expand_as(x_t), schedule, "x0")
    y = measure(A, image.expand(n, -1, -1, -1), sigma_y, range(10_000, 10_000 + n))
    states = fast_sampler(D, LinearConstraint(A, y), (n, 1, 8, 8), range(n), steps=5, late=1e6, sigma_y=sigma_y, fresh=fresh)
    noise = (next(states).x_t - to.alpha * image).flatten(1) / to.sigma
    along = torch.linalg.svd(matrix(A).float())[2]  # singular vectors, measured ones first
    assert (((noise @ along.T).var(0) - 1).abs() < 0.1).all()


def test_noise_is_not_fitted(gaussian):
    """Told of the noise, samples keep their distance from y and are closer to the posterior's mean in what is known."""
    A, sigma_y, n = OPERATORS["half"], 0.2, 200
    y = measure(A, draw(gaussian, 1, seed=3), sigma_y, [4])
    mean, _ = posterior(gaussian, A, y.double(), sigma_y)
    error = {}
    for told in (0.0, sigma_y):
        state = last(gaussian, LinearConstraint(A, y.expand(n, -1, -1, -1)), (n, 1, 8, 8), range(n), sigma_y=told)
        error[told] = A(state.x_t.mean(0, keepdim=True) - mean.view(1, 1, 8, 8)).square().mean().sqrt()
        assert state.residual.mean() < 1e-4 if told == 0 else 0.5 < state.residual.mean() / sigma_y < 1.2
    assert error[sigma_y] < 0.8 * error[0.0]


def test_samples_of_a_batch_are_independent(gaussian, schedule):
    images, masks = draw(gaussian, 8).double(), (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    masks[5] = 0  # nothing known
    images[6] *= 0.01
    for D in (gaussian, Denoiser(tiny_unet().double(), schedule, "v")):
        arguments = dict(steps=7, vectors=2, sigma_y=0.01, dtype=torch.float64)
        together = last(D, known(images, masks), SHAPE, range(8), **arguments)
        for i in range(8):
            alone = last(D, known(images[i : i + 1], masks[i : i + 1]), (1, 1, 8, 8), [i], **arguments)
            assert (alone.x_t - together.x_t[i]).abs().max() < 1e-5
            assert (alone.residual - together.residual[i]).abs().max() < 1e-5


def test_no_autograd_graph(gaussian, schedule):
    """A network whose backward raises."""
    unet = tiny_unet()
    D = Denoiser(lambda x, t: NoBackward.apply(unet(x, t)), schedule, "v")
    for state in fast_sampler(D, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), 5):
        assert not state.x_t.requires_grad and state.x_t.grad_fn is None
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


class NoReading(TorchDispatchMode):
    """Raises where Python asks for the value of a tensor, which makes a GPU wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        reading = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.item.default, torch.ops.aten.is_nonzero.default)
        assert func not in reading, "a tensor's value was read"
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_values_of_a_tensor(gaussian):
    D, steps = Denoiser(tiny_unet(), FlowSchedule(), "velocity"), 6  # DiffusionSchedule reads its own tensor, on the CPU
    states = fast_sampler(D, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), steps, vectors=2, sigma_y=0.1)
    with NoReading():
        for _ in range(steps - 1):
            next(states)
        with pytest.raises(AssertionError, match="read"):  # the one check for NaN, and the proof that this test can fail
            next(states)


def test_an_error_direction_alone_gives_the_same_line_search(gaussian, monkeypatch):
    """A mask's constraint stripped of A and y: e = r for masks, so that the general rule has to find the same steps."""
    monkeypatch.setattr("ldm.correction.TRUST", 100.0)
    constraint = known(draw(gaussian, 8).double(), half_mask())
    stripped = lambda x0: constraint(x0)  # noqa: E731
    a = last(gaussian, constraint, SHAPE, range(8), steps=8, dtype=torch.float64)
    b = last(gaussian, stripped, SHAPE, range(8), steps=8, dtype=torch.float64)
    assert (a.x_t - b.x_t).abs().max() < 1e-6


def test_a_measurement_through_a_decoder_that_does_nothing_is_the_measurement(gaussian, monkeypatch):
    """Decoder: the identity. The linearised rule has to find the same steps, but for those without J, where it takes one vector."""
    monkeypatch.setattr("ldm.correction.TRUST", 100.0)
    A, images = OPERATORS["super-resolution"], draw(gaussian, 8).double()
    settings = dict(steps=8, late=0.0, dtype=torch.float64)
    a, b = (list(fast_sampler(gaussian, c, SHAPE, range(8), **settings))[-2]
            for c in (LinearConstraint(A, A(images)), DecodedConstraint(lambda x: x, A, A(images))))  # fmt: skip
    assert (a.x_t - b.x_t).abs().max() < 1e-6 and (a.residual - b.residual).abs().max() < 1e-6


def test_the_last_step_meets_what_one_correction_through_a_decoder_leaves(gaussian, monkeypatch):
    A, images, decode = OPERATORS["super-resolution"], draw(gaussian, 8), lambda x: x + 0.4 * torch.sin(2 * x)
    constraint = DecodedConstraint(decode, A, A(decode(images)))
    state = last(gaussian, constraint, SHAPE, range(8), steps=8)
    monkeypatch.setattr(fast, "LAST", 1)
    once = last(gaussian, constraint, SHAPE, range(8), steps=8)
    assert state.residual.max() < 0.1 * once.residual.max() and state.nfe == once.nfe


def test_an_encoder_that_does_nothing_changes_nothing(gaussian):
    """Decoder and encoder: the identity. The steps without J have to be those on x0."""
    A, images = OPERATORS["super-resolution"], draw(gaussian, 8).double()
    settings = dict(steps=8, late=float("inf"), dtype=torch.float64)
    same = lambda x: x  # noqa: E731
    a, b = (last(gaussian, c, SHAPE, range(8), **settings)
            for c in (LinearConstraint(A, A(images)), DecodedConstraint(same, A, A(images), encode=same)))  # fmt: skip
    assert (a.x_t - b.x_t).abs().max() < 1e-6


@pytest.mark.parametrize("sigma_y", [0.0, 0.1])
def test_with_an_encoder_the_image_is_corrected_and_encoded(gaussian, sigma_y):
    """One step from any x_t, against the closed form; only the last step differentiates the decoder, and only for an exact y."""
    A, images = downsample((8, 8), 2), draw(gaussian, 8).double()
    decode, encode = lambda z: z.sinh() + 0.5, lambda x: (x - 0.5).asinh() + 0.01  # noqa: E731
    y = measure(A, decode(images), sigma_y, range(8))
    constraint = DecodedConstraint(decode, A, y, encode=encode)
    settings = dict(steps=4, late=float("inf"), sigma_y=sigma_y, dtype=torch.float64)
    *_, start, before, state = fast_sampler(gaussian, constraint, SHAPE, range(8), **settings)
    assert constraint.backward_passes == (0 if sigma_y else fast.LAST)
    level = next(level for level in gaussian.schedule.log_levels(4) if level.t == before.t)
    x, v, M = decode(gaussian(start.x_t, level.t)).flatten(1), (level.sigma / level.alpha) ** 2, matrix(A).double()
    r = y.flatten(1) - x @ M.T
    d = v * torch.linalg.solve(v * M @ M.T + sigma_y**2 * torch.eye(len(M)), r.T).T @ M
    assert (before.x0 - encode(x + d).view(SHAPE)).abs().max() < 1e-4
    if sigma_y == 0:  # what this encoder is off by
        assert before.residual.min() > 0.01 and state.residual.max() < 0.003


def test_with_an_encoder_and_noise_J_is_left_out_earlier(gaussian):
    A, images, same = downsample((8, 8), 2), draw(gaussian, 8), lambda x: x
    constraint = DecodedConstraint(same, A, measure(A, images, 0.1, range(8)), encode=same)
    default, later = (last(gaussian, constraint, SHAPE, range(8), steps=12, sigma_y=0.1, **late) for late in ({}, dict(late=0.3)))
    assert default.nfe < later.nfe
    assert default.nfe == last(gaussian, constraint, SHAPE, range(8), steps=12, sigma_y=0.1, late=0.6).nfe


def test_what_an_encoder_cannot_take_goes_another_way(gaussian):
    """A soft mask, and an operator that is not linear."""
    same = lambda x: x  # noqa: E731
    weights = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    for A in (Mask(weights, soft=True), clipped()):
        assert not DecodedConstraint(same, A, A(draw(gaussian, 8)), encode=same).through_encoder
    A = downsample((8, 8), 2)
    assert not DecodedConstraint(same, A, A(draw(gaussian, 8))).through_encoder


def test_a_loss_falls(gaussian):
    target = draw(gaussian, 8)
    loss = lambda x0: (x0.mean((1, 2, 3)) - target.mean((1, 2, 3)) - 0.5).square()  # noqa: E731
    x = last(gaussian, LossConstraint(loss), SHAPE, range(8)).x_t
    free = sample(gaussian, None, SHAPE, range(8), eta=1.0).x_t
    assert loss(x).mean() < 0.05 * loss(free).mean()


def test_levels(schedule):
    for s in (schedule, FlowSchedule(), FlowSchedule(scale=1000)):
        levels = s.log_levels(24)
        ratios = [level.sigma / max(level.alpha, 1e-9) for level in levels]
        assert len(levels) == 25 and ratios == sorted(ratios, reverse=True) and ratios[-1] == 0
        assert levels[0] == s.levels(1000)[0] and 0.08 < ratios[-2] < 0.13


def test_a_flow_starts_without_an_image(gaussian):
    """alpha = 0 at the first level: no division by it."""
    flow = type(gaussian)(gaussian.mean, gaussian.cov, FlowSchedule())
    constraint = known(draw(gaussian, 8), half_mask())
    assert last(flow, constraint, SHAPE, range(8)).residual.max() < 1e-4


@pytest.mark.parametrize("wrong, words", [
    (dict(vectors=0), "vectors = 0"), (dict(vectors=1.5), "vectors = 1.5"),
    (dict(late=-1), "late = -1"), (dict(sigma_y=-0.1), "sigma_y = -0.1"), (dict(h=0), "h = 0"), (dict(strength=0), "strength = 0"),
    (dict(eta=2), "eta = 2"), (dict(mode="reverse"), "reverse"), (dict(steps=2), "steps = 2"),
    (dict(fresh=1.1), "fresh = 1.1"), (dict(fresh=0.4, sigma_y=0.1), "from 0.5 to 1"), (dict(seeds=[0]), "seeds has 1"),
])  # fmt: skip
def test_wrong_arguments_are_named_at_once(gaussian, wrong, words):
    with pytest.raises(ValueError, match=words):
        fast_sampler(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, **({"seeds": range(8)} | wrong))


def test_too_few_evaluations_for_any_step(schedule):
    with pytest.raises(ValueError, match="evaluations = 4"):
        steps_for(4, schedule)


def test_sigma_y_needs_A(gaussian):
    with pytest.raises(ValueError, match="no A"):
        fast_sampler(gaussian, LossConstraint(lambda x: x.mean((1, 2, 3))), SHAPE, range(8), sigma_y=0.1)


def test_nan_does_not_leave_the_sampler(gaussian):
    broken = Denoiser(lambda x_t, t: x_t * float("nan"), gaussian.schedule, "x0")
    with pytest.raises(FloatingPointError, match="not finite"):
        last(broken, None, SHAPE, range(8))


def test_mnist_constraints_are_met():
    """The default, on the shipped network, for the three noise-free tasks: RMSE below 0.02."""
    model = load_model("mnist")
    D, images = Denoiser(model.network, model.schedule, model.parameterization), sample_digits((3, 8), 1)[0]
    hole = torch.ones(1, 1, 32, 32)
    hole[..., 9:23, 9:23] = 0
    for A in (Mask(half_mask(32)), Mask(hole), downsample((32, 32), 4)):
        state = last(D, LinearConstraint(A, A(images)), images.shape, range(2))
        assert state.residual.max() < 0.02 and state.nfe <= 44


def test_a_noisy_blur_on_the_shipped_network_is_met_as_far_as_its_noise():
    model = load_model("mnist")
    D, images = Denoiser(model.network, model.schedule, model.parameterization), sample_digits((3, 8), 2)[0]
    A, sigma_y = gaussian_blur((32, 32), 1.5), 0.05
    y = measure(A, images, sigma_y, range(len(images)))
    told, untold = (last(D, LinearConstraint(A, y), images.shape, range(len(images)), sigma_y=s) for s in (sigma_y, 0.0))
    assert abs(told.residual.mean() / sigma_y - 1) < 0.15
    error = lambda state: (state.x_t - images).square().mean()  # noqa: E731
    assert error(told) < 0.5 * error(untold)
