import inspect
from importlib import import_module
from itertools import pairwise

import pytest
import torch
from common import NoBackward, draw, half_mask, known, tiny_unet

from ldm.constraints import LinearConstraint
from ldm.denoisers import Denoiser
from ldm.fast_sampler import fast_sampler
from ldm.linalg import unit
from ldm.newton_sampler import PAPER, newton_sampler, sample, step_lengths
from ldm.operators import Mask, box_average, downsample, gaussian_blur
from ldm.sampling import jvp, seeded_noise
from ldm.schedules import CLEAN, FlowSchedule, Level, make_beta_schedule

SHAPE = (8, 1, 8, 8)


# ---------------------------------------------------------------------------------------------------- the product J e


@pytest.mark.parametrize("t", [0, 49, 500, 999])
@pytest.mark.parametrize("mode, tolerance", [("difference", 1e-3), ("forward-ad", 1e-5)])
def test_jvp_equals_the_closed_form(gaussian, t, mode, tolerance):
    x_t, v = seeded_noise(SHAPE, range(8))(), seeded_noise(SHAPE, range(8, 16))()
    exact = (v.flatten(1).double() @ gaussian.jacobian(t).T).view(SHAPE)
    product = jvp(gaussian, x_t, t, v, mode=mode)
    error = (product - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    # In float32 the difference of a flat D (J ~ alpha Cov at t = 999, a hundredth of D) keeps fewer digits: take a longer h there.
    if mode == "difference" and t == 999:
        product = jvp(gaussian, x_t, t, v, h=0.5)
        error = (product - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert error.max() < tolerance


def test_jvp_scales_with_v_and_reuses_x0(gaussian):
    x_t, v = seeded_noise(SHAPE, range(8))(), seeded_noise(SHAPE, range(8, 16))()
    x0 = gaussian(x_t, 500)
    calls = gaussian.calls
    product = jvp(gaussian, x_t, 500, v, x0)
    assert gaussian.calls == calls + 1
    assert torch.allclose(jvp(gaussian, x_t, 500, 1000 * v, x0), 1000 * product, rtol=1e-3)


def test_jvp_of_zero_is_zero(gaussian):
    x_t = seeded_noise(SHAPE, range(8))()
    v = torch.zeros(SHAPE)
    v[3] = 1.0  # one sample's zero must not depend on its neighbours, nor spoil them
    for mode in ("difference", "forward-ad"):
        product = jvp(gaussian, x_t, 500, v, mode=mode)
        assert (product[[0, 1, 2, 4, 5, 6, 7]] == 0).all() and product[3].abs().max() > 0


@pytest.mark.parametrize("mode", ["difference", "forward-ad"])
def test_jvp_of_a_unet_equals_autograd(schedule, mode):
    """On a real network with attention: forward modes against the exact product from reverse-mode AD twice, in float64."""
    D = Denoiser(tiny_unet().double(), schedule, "v")
    x_t, v = (seeded_noise((2, 1, 8, 8), seeds, dtype=torch.float64)() for seeds in ((0, 1), (2, 3)))
    exact = torch.autograd.functional.jvp(lambda x: D(x, 500), x_t, v)[1]
    product = jvp(D, x_t, 500, v, h=1e-5, mode=mode)
    assert ((product - exact).norm() / exact.norm()) < (1e-5 if mode == "forward-ad" else 1e-4)


# ---------------------------------------------------------------------------------------------------- the sampler


@pytest.mark.parametrize("A, lr", [
    (Mask(half_mask()), (0.5, 0.1)), (box_average((8, 8), 2), (0.5, 0.05)),
    (downsample((8, 8), 4), (0.5, 0.02)), (gaussian_blur((8, 8), 0.7), (0.5, 0.05)),
], ids=["half", "box", "super-resolution", "blur"])  # fmt: skip
def test_the_constraint_is_met_in_20_steps(gaussian, A, lr):
    """Below 5 % of the start. The paper's steps have a fixed length, so the last lr sets the floor: it suits each A."""
    constraint = LinearConstraint(A, A(draw(gaussian, 8)))
    start = constraint(gaussian(seeded_noise(SHAPE, range(8))(), 999))[1].mean()
    final = constraint(sample(gaussian, constraint, SHAPE, range(8), lr=lr).x_t)[1].mean()
    assert final / start < 0.05


def test_the_constraint_is_met_from_the_posterior_not_by_pasting(gaussian):
    """With the left half known, the error of the unknown half falls well below the prior's, towards the posterior's."""
    truth = draw(gaussian, 64)
    x = sample(gaussian, known(truth, half_mask()), truth.shape, range(64), eta=1.0).x_t
    free = sample(gaussian, None, truth.shape, range(64), eta=1.0).x_t
    border = (..., 4)  # the column next to the known half: correlation exp(-1/2) with it, posterior variance 0.63 of the prior's
    assert (x - truth)[border].square().mean() < 0.75 * (free - truth)[border].square().mean()


def test_unconstrained_sampling_has_the_prior_s_mean_and_variance(gaussian):
    """DDIM with the exact denoiser transports noise to N(mean, cov) up to discretisation: 100 steps, 2,000 samples."""
    x = sample(gaussian, None, (2000, 1, 8, 8), range(2000), steps=100).x_t.flatten(1).double()
    assert (x.mean(0) - gaussian.mean).abs().max() < 5 / 2000**0.5  # five standard errors
    assert abs(x.var(0).mean() / gaussian.cov.diagonal().mean() - 1) < 0.1


@pytest.mark.parametrize("mode", ["difference", "forward-ad"])
@pytest.mark.parametrize("steps, newton_steps", [(4, 0), (3, 1), (2, 5)])
def test_nfe_is_1_plus_2k_per_step(gaussian, steps, newton_steps, mode):
    constraint = known(draw(gaussian, 8), half_mask())
    gaussian.calls = 0
    states = list(newton_sampler(gaussian, constraint, SHAPE, range(8), steps, newton_steps, mode=mode))
    assert [s.nfe for s in states] == [(1 + 2 * newton_steps) * (i + 1) for i in range(steps)]
    assert gaussian.calls == states[-1].nfe


def test_the_paper_s_setting_takes_220_evaluations(gaussian):
    assert sample(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8)).nfe == 220


class NoBackwardForwardAD(NoBackward):
    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def jvp(ctx, v):
        return v.clone()


@pytest.mark.parametrize("mode, wall", [("difference", NoBackward), ("forward-ad", NoBackwardForwardAD)])
def test_no_autograd_graph(gaussian, schedule, mode, wall):
    unet = tiny_unet()
    assert all(p.requires_grad for p in unet.parameters())  # nothing but the sampler keeps a graph from being recorded
    D = Denoiser(lambda x, t: wall.apply(unet(x, t)), schedule, "v")
    for state in newton_sampler(D, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), 2, 2, mode=mode):
        assert not state.x_t.requires_grad and state.x_t.grad_fn is None and state.x0.grad_fn is None
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_nothing_leaks_between_the_steps_of_the_generator(gaussian):
    """The caller's own code between two states runs in its own autograd mode."""
    for _ in newton_sampler(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), 2, 1):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_samples_of_a_batch_are_independent(gaussian, schedule):
    """Eight different images, masks and seeds, alone and together, on a network with attention and GroupNorm.

    In float64, so that a batch's other order of summation, magnified by the difference quotient, does not count.
    """
    images, masks = draw(gaussian, 8).double(), (torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    masks[5] = 0  # nothing known: e = 0 in one sample only
    images[6] *= 0.01  # errors of other sizes than its neighbours'
    for D in (gaussian, Denoiser(tiny_unet().double(), schedule, "v")):
        arguments = dict(steps=5, newton_steps=3, eta=0.5, dtype=torch.float64)
        together = sample(D, known(images, masks), SHAPE, range(8), **arguments)
        for i in range(8):
            constraint = known(images[i : i + 1], masks[i : i + 1])
            alone = sample(D, constraint, (1, 1, 8, 8), [i], **arguments)
            assert (alone.x_t - together.x_t[i]).abs().max() < 1e-6
            assert (alone.residual - together.residual[i]).abs().max() < 1e-6


def test_same_seed_same_result_other_seed_other_result(gaussian):
    constraint = known(draw(gaussian, 8), half_mask())
    a, b, c = (sample(gaussian, constraint, SHAPE, s, 3, 2, eta=1.0).x_t for s in (range(8), range(8), range(1, 9)))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_the_loop_written_out(gaussian):
    """The generator equals the dozen lines that the notebooks show."""
    constraint = known(draw(gaussian, 8), half_mask())
    steps, newton_steps, h, eta = 6, 2, 0.005, 0.3
    noise = seeded_noise(SHAPE, range(8))
    x = noise()
    for now, to in pairwise(gaussian.schedule.levels(steps)):
        x0 = gaussian(x, now.t)
        for lr in (0.5, 0.1):
            e, residual = constraint(x0)
            x = x + lr * unit(jvp(gaussian, x, now.t, e, x0, h))
            x0 = gaussian(x, now.t)
        x = gaussian.schedule.step(x, x0, now, to, eta, noise)
    state = sample(gaussian, constraint, SHAPE, range(8), steps, newton_steps, (0.5, 0.1), h, eta)
    assert torch.allclose(x, state.x_t, atol=1e-5)


def test_lr_is_a_number_a_pair_over_the_inner_steps_or_a_list():
    assert step_lengths((0.5, 0.1), 5) == pytest.approx([0.5, 0.4, 0.3, 0.2, 0.1])  # the paper's, the same at every t
    assert step_lengths(0.1, 10) == [0.1] * 10 and step_lengths([0.3, 0.2, 0.7], 3) == [0.3, 0.2, 0.7]
    assert step_lengths((0.5, 0.1), 2) == [0.5, 0.1] and step_lengths((0.5, 0.1), 1) == [0.5] and step_lengths((0.5, 0.1), 0) == []


def test_the_paper_s_noise(schedule):
    """beta_s (1 - abar_s) / (1 - abar_t), with the beta of one training step, from the betas themselves."""
    betas = make_beta_schedule("sqrt_linear", 1000)
    now, to = schedule.level(499), schedule.level(449)
    variance = betas[449].item() * to.sigma**2 / now.sigma**2
    assert schedule.added_noise(now, to, "paper") == pytest.approx(variance**0.5, rel=1e-9)
    assert 0 < schedule.added_noise(now, to, "paper") < 0.3 * schedule.added_noise(now, to, 1.0)
    flow = FlowSchedule()
    with pytest.raises(ValueError, match="paper"):
        flow.added_noise(flow.level(0.5), flow.level(0.4), "paper")


def test_the_published_algorithm(gaussian):
    """Algorithm 1 with the authors' settings, transcribed in the symbols of its paper (abar, eps), in float64 to 1e-6."""
    abar, mask = gaussian.schedule.alphas_cumprod, half_mask().double()
    y = mask * draw(gaussian, 2).double()
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    z = lambda: torch.stack([torch.randn(1, 8, 8, generator=g, dtype=torch.float64) for g in generators])  # noqa: E731
    x, times = z(), [999 - 50 * i for i in range(20)]
    for t, s in pairwise([*times, None]):
        for lr in (0.5, 0.4, 0.3, 0.2, 0.1):
            x0 = gaussian(x, t)
            e = mask * (y - x0)
            Je = gaussian(x + 0.005 * e / e.abs().amax((1, 2, 3), keepdim=True), t) - x0
            x = x + lr * Je / Je.abs().amax((1, 2, 3), keepdim=True)
        x0 = gaussian(x, t)
        if s is None:
            break
        eps = (x - abar[t] ** 0.5 * x0) / (1 - abar[t]) ** 0.5
        variance = (1 - abar[s] / abar[s - 1]) * (1 - abar[s]) / (1 - abar[t])
        x = abar[s] ** 0.5 * x0 + (1 - abar[s] - variance) ** 0.5 * eps + variance**0.5 * z()
    state = sample(gaussian, known(y, mask), x.shape, (5, 6), dtype=torch.float64, **PAPER["inpainting"])
    assert state.nfe == 220 and (state.x_t - x0).abs().max() < 1e-6


def test_an_x_t_that_is_sent_in_is_where_the_sampler_goes_on(gaussian):
    run = lambda **start: newton_sampler(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), 4, 1, **start)  # noqa: E731
    sent, alone = run(), run()
    next(sent), next(alone)
    x_t = torch.zeros(SHAPE)
    state = sent.send(x_t)
    assert not torch.equal(state.x0, next(alone).x0)
    assert torch.equal(state.x0, next(run(start=(x_t, gaussian.schedule.levels(4)[1]))).x0)


@pytest.mark.parametrize("sampler, settings", [(newton_sampler, dict(newton_steps=2)), (fast_sampler, dict(eta=0.0, late=0.0))])
def test_a_run_that_begins_at_a_saved_state_ends_as_the_whole_run(gaussian, sampler, settings):
    constraint, levels = known(draw(gaussian, 8), half_mask()), gaussian.schedule.levels(6)
    run = lambda **start: list(sampler(gaussian, constraint, SHAPE, range(8), levels=levels, **settings, **start))  # noqa: E731
    whole = run()
    rest = run(start=(whole[2].x_t, levels[3]))
    assert len(rest) == 3 and torch.equal(rest[-1].x_t, whole[-1].x_t)
    assert rest[0].step == 1 and rest[0].t == levels[3].t
    with pytest.raises(ValueError, match="start has an x_t of shape"):
        run(start=(whole[0].x_t[:2], levels[3]))
    with pytest.raises(ValueError, match="start is at"):
        run(start=(whole[0].x_t, Level(400, 0.5, 0.5)))


def test_noise_from_elsewhere(gaussian):
    a = sample(gaussian, None, SHAPE, noise=seeded_noise(SHAPE, range(8)), steps=3, eta=1.0)
    assert torch.equal(a.x_t, sample(gaussian, None, SHAPE, range(8), 3, eta=1.0).x_t)
    with pytest.raises(ValueError, match="seeds and noise"):
        newton_sampler(gaussian, None, SHAPE, range(8), noise=torch.randn)


def test_a_function_is_no_denoiser_until_it_has_a_schedule():
    with pytest.raises(TypeError, match="Denoiser"):
        newton_sampler(lambda x, t: x, None, SHAPE, range(8), levels=[CLEAN, CLEAN])


def test_the_result_is_the_last_x0(gaussian):
    state = sample(gaussian, known(draw(gaussian, 8), half_mask()), SHAPE, range(8), 4, 1)
    assert torch.equal(state.x_t, state.x0)


def test_unknown_all_known_and_exact_fit(gaussian):
    images = draw(gaussian, 8)
    nothing = sample(gaussian, known(images, torch.zeros(1, 1, 8, 8)), SHAPE, range(8))
    free = sample(gaussian, None, SHAPE, range(8))
    assert torch.allclose(nothing.x_t, free.x_t, atol=1e-5) and (nothing.residual == 0).all() and free.residual is None
    everything = sample(gaussian, known(images, torch.ones(1, 1, 8, 8)), SHAPE, range(8))
    assert (everything.x_t - images).square().mean().sqrt() < 0.05

    def satisfied(x0):
        return torch.zeros_like(x0), x0.new_zeros(len(x0))

    assert torch.allclose(sample(gaussian, satisfied, SHAPE, range(8)).x_t, free.x_t, atol=1e-5)


def test_nan_never_leaves_silently(gaussian, schedule):
    broken = Denoiser(lambda x, t: x * float("nan") if t[0] < 500 else x, schedule, "v")
    with pytest.raises(FloatingPointError, match="not finite at t ="):
        sample(broken, None, SHAPE, range(8))


@pytest.mark.parametrize("argument, value, message", [
    ("steps", 0, "steps = 0"), ("steps", -3, "steps = -3"), ("steps", 1001, "1 to 1000"), ("steps", 2.5, "steps = 2.5"),
    ("newton_steps", -1, "newton_steps = -1"), ("lr", 0, "lr = 0"), ("lr", (0.5, -1), r"lr = \(0.5, -1\)"), ("h", 0.0, "h = 0.0"),
    ("eta", 1.5, "eta = 1.5"), ("mode", "backward", "'backward'"), ("seeds", [1, 2], "2 entries"), ("lr", [0.1] * 3, "3 entries"),
    ("seeds", None, "seeds and noise"), ("levels", [CLEAN], "two or more"), ("eta", "theirs", "theirs"),
])  # fmt: skip
def test_wrong_arguments_are_refused_before_any_evaluation(gaussian, argument, value, message):
    arguments = {"seeds": range(8), argument: value}
    with pytest.raises(ValueError, match=message):
        newton_sampler(gaussian, None, SHAPE, **arguments)  # at the call, not at the first step
    assert gaussian.calls == 0


def test_the_sampler_fits_on_one_page():
    assert len(inspect.getsource(import_module("ldm.newton_sampler")).splitlines()) <= 105
