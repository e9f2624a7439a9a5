from itertools import pairwise

import diffusers
import pytest
import torch

from ldm.denoisers import PREDICTIONS, Denoiser
from ldm.sampling import seeded_noise
from ldm.schedules import CLEAN, DiffusionSchedule, FlowSchedule, make_beta_schedule

NAMES = {"linear": "scaled_linear", "sqrt_linear": "linear"}  # ours (published configs') -> diffusers'


def scheduler(prediction, beta_schedule="linear", spacing="trailing"):
    return diffusers.DDIMScheduler(
        1000, 0.00085, 0.012, NAMES[beta_schedule], clip_sample=False, set_alpha_to_one=True, steps_offset=1,
        prediction_type={"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[prediction], timestep_spacing=spacing)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_betas_equal_diffusers(name):
    betas = make_beta_schedule(name, 1000, 0.00085, 0.012)
    assert torch.allclose(betas.float(), scheduler("eps", name).betas, atol=1e-8)


def test_cosine_schedule_equals_diffusers():
    expected = diffusers.DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2").betas
    assert torch.allclose(make_beta_schedule("cosine", 1000).float(), expected, atol=1e-6)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps, spacing", [(20, "trailing"), (50, "leading"), (8, "trailing"), (1000, "trailing")])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_equals_diffusers(prediction, steps, spacing, eta):
    """Every step at the same x_t, network output and noise; the last one gives x0."""
    theirs = scheduler(prediction, spacing=spacing)
    theirs.set_timesteps(steps)
    ours = DiffusionSchedule(make_beta_schedule("linear", 1000, 0.00085, 0.012))
    levels = ours.levels(steps, spacing)
    assert [now.t for now in levels[:-1]] == theirs.timesteps.tolist()
    for i, (now, to) in enumerate(pairwise(levels)):
        if i % max(1, steps // 20) and to is not CLEAN:
            continue
        x_t, out, z = (seeded_noise((2, 3, 4, 4), [3 * i + k, 7 * i + k], dtype=torch.float64)() for k in range(3))
        expected = theirs.step(out, now.t, x_t, eta=eta, variance_noise=z)
        D = Denoiser(lambda x, t: out, ours, prediction)  # noqa: B023
        x0 = D(x_t, now.t)
        scale = expected.pred_original_sample.abs().max().clamp_min(1)  # at t = 999 the estimate is a hundred times x_t
        assert (x0 - expected.pred_original_sample).abs().max() / scale < 1e-5
        x_s = ours.step(x_t, x0, now, to, eta, lambda: z)  # noqa: B023
        if to is CLEAN:
            assert torch.equal(x_s, x0)
        else:
            assert (x_s - expected.prev_sample).abs().max() < 1e-5


def test_euler_step_of_a_flow_equals_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(sigmas=[1 - i / 10 for i in range(10)])
    ours = FlowSchedule(shift=3.0)
    x = theirs_x = seeded_noise((2, 3, 4, 4), [0, 1], dtype=torch.float64)()
    for i, (now, to) in enumerate(pairwise(ours.levels(10))):
        u = seeded_noise((2, 3, 4, 4), [2 * i, 3 * i], dtype=torch.float64)()
        x = ours.step(x, Denoiser(lambda x, t: u, ours, "velocity")(x, now.t), now, to)  # noqa: B023
        theirs_x = theirs.step(u, theirs.timesteps[i], theirs_x).prev_sample
        assert (x - theirs_x).abs().max() < 1e-5


@pytest.mark.parametrize("schedule", [DiffusionSchedule(make_beta_schedule("linear", 1000)), FlowSchedule()], ids=["ddpm", "flow"])
def test_every_prediction_recovers_x0(schedule):
    """What the network is trained to predict, put through the denoiser, is x0 again."""
    x0, eps = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    for now in schedule.levels(13)[:-1]:
        if now.alpha == 0:
            continue
        x_t = now.alpha * x0 + now.sigma * eps
        for name, (_, target) in PREDICTIONS.items():
            if (name == "velocity") != isinstance(schedule, FlowSchedule):
                continue
            D = Denoiser(lambda x, t: target(x0, eps, now.alpha, now.sigma), schedule, name)  # noqa: B023
            assert torch.allclose(D(x_t, now.t), x0)


def test_add_noise_agrees_with_the_levels(schedule):
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 500, 999])
    x_t, alpha, sigma = schedule.add_noise(x0, t, noise)
    for i in range(3):
        level = schedule.level(t[i].item())
        assert torch.allclose(x_t[i], level.alpha * x0[i] + level.sigma * noise[i], atol=1e-6)
        assert abs(alpha[i].item() - level.alpha) < 1e-6 and abs(sigma[i].item() - level.sigma) < 1e-6


def test_ancestral_noise_is_the_ddpm_posterior(schedule):
    """eta = 1 between neighbouring times is Ho et al. 2020's beta_tilde."""
    now, to = schedule.level(500), schedule.level(499)
    beta = 1 - now.alpha**2 / to.alpha**2
    x_s = schedule.step(torch.zeros(1), torch.zeros(1), now, to, 1.0, lambda: torch.ones(1))
    assert abs(x_s.item() ** 2 - to.sigma**2 / now.sigma**2 * beta) < 1e-9


def test_levels_go_down_to_the_clean_end(schedule):
    for levels in (schedule.levels(20), schedule.levels(20, "leading"), schedule.levels(1), FlowSchedule(2.0).levels(20)):
        assert levels[-1] == CLEAN and all(a.sigma > b.sigma and a.alpha < b.alpha for a, b in pairwise(levels))
    assert schedule.levels(20)[0].t == 999


@pytest.mark.parametrize("call, message", [
    (lambda s: s.level(1000), "t = 1000"), (lambda s: s.level(-1), "t = -1"), (lambda s: s.level(3.5), "t = 3.5"),
    (lambda s: s.levels(0), "steps = 0"), (lambda s: s.levels(1001), "1 to 1000"), (lambda s: s.levels(10, "karras"), "'karras'"),
    (lambda s: FlowSchedule().level(0), "t = 0"), (lambda s: FlowSchedule().level(1.5), "t = 1.5"),
    (lambda s: FlowSchedule().levels(0), "steps = 0"),
    (lambda s: make_beta_schedule("sigmoid", 10), "'sigmoid'"), (lambda s: Denoiser(None, s, "score"), "prediction = 'score'"),
    (lambda s: Denoiser(lambda x, t: x, s)(torch.zeros(1, 1), 1000), "t = 1000"),
])  # fmt: skip
def test_bad_input_is_one_clear_sentence(schedule, call, message):
    with pytest.raises(ValueError, match=message):
        call(schedule)


def test_a_flow_s_time_may_have_another_scale():
    one, thousand = FlowSchedule(shift=2.0), FlowSchedule(shift=2.0, scale=1000)
    for a, b in zip(one.levels(7)[:-1], thousand.levels(7)[:-1], strict=True):
        assert b.t == pytest.approx(1000 * a.t) and b[1:] == pytest.approx(a[1:])
    t = thousand.random_times(1000, torch.Generator().manual_seed(0))
    assert 0 < t.min() and t.max() < 1000 and abs(t.median() - 500) < 50
    x0, noise = torch.randn(2, 1000, 3, 4)
    x_t, alpha, sigma = thousand.add_noise(x0, t, noise)
    now = thousand.level(t[5].item())
    assert alpha.shape == (1000, 1, 1) and alpha[5].item() == pytest.approx(now.alpha, abs=1e-6)
    torch.testing.assert_close(x_t[5], now.alpha * x0[5] + now.sigma * noise[5])
    with pytest.raises(ValueError, match="0 < t <= 1000"):
        thousand.level(1001)
