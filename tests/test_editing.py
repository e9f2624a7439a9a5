"""Beginning in the middle: editing, variations, and runs that go on from a saved state."""

import pytest
import torch
from common import draw, half_mask, known, psld_on_pixels

from ldm.baselines import ddnm, diffpir, dps, gradient_steps, mpgd, repaint
from ldm.fast_sampler import fast_sampler
from ldm.newer_baselines import daps, resample, sitcom
from ldm.newton_sampler import newton_sampler, sample
from ldm.sampling import State, noised, seeded_noise
from ldm.schedules import CLEAN, FlowSchedule, Level

SHAPE = (2, 1, 8, 8)
SAMPLERS = {
    "newton": (newton_sampler, dict(newton_steps=2, eta=0.5)), "fast": (fast_sampler, {}), "dps": (dps, {}),
    "gradient steps": (gradient_steps, dict(gradient_steps=2, eta=0.5)), "mpgd": (mpgd, dict(eta=0.5)), "ddnm": (ddnm, {}),
    "diffpir": (diffpir, {}), "psld": (psld_on_pixels, {}), "repaint": (repaint, dict(resamples=2)),
    "daps": (daps, dict(langevin_steps=3)), "resample": (resample, dict(every=2)), "sitcom": (sitcom, dict(gradient_steps=2)),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_goes_on_from_a_saved_state(name, gaussian, tmp_path):
    """All of them with noise; the state from a file that only holds tensors and numbers."""
    sampler, settings = SAMPLERS[name]
    constraint = known(draw(gaussian, 2), half_mask())
    run = lambda **start: list(sampler(gaussian, constraint, SHAPE, seeds=[3, 4], steps=6, **settings, **start))  # noqa: E731
    whole = run()
    assert [state.to for state in whole] == [*(state.t for state in whole[1:]), None]
    torch.save(whole[2]._asdict(), tmp_path / "state.pt")
    rest = run(start=State(**torch.load(tmp_path / "state.pt", weights_only=True)))
    assert len(rest) == len(whole) - 3
    for a, b in zip(rest, whole[3:], strict=True):
        assert torch.equal(a.x_t, b.x_t) and torch.equal(a.x0, b.x0) and torch.equal(a.residual, b.residual)
        assert (a.t, a.to, a.drawn) == (b.t, b.to, b.drawn)
    with pytest.raises(ValueError, match="start is the last state of a run: there is nothing left to sample"):
        run(start=whole[-1])
    edited = run(start=noised(gaussian, whole[-1].x_t, 0.3, [3, 4]))
    assert edited[0].t == 299 and torch.isfinite(edited[-1].x_t).all()


def test_noise_of_one_s_own_goes_on_by_itself(gaussian):
    noise = seeded_noise(SHAPE, [3, 4])
    states = [state._replace(drawn=0) for state in newton_sampler(gaussian, None, SHAPE, noise=noise, steps=6, eta=1.0)]
    noise = seeded_noise(SHAPE, [3, 4])
    for _ in range(4):
        noise()
    rest = list(newton_sampler(gaussian, None, SHAPE, noise=noise, steps=6, eta=1.0, start=states[2]))
    assert torch.equal(rest[-1].x_t, states[-1].x_t)


@pytest.mark.parametrize("schedule", [None, FlowSchedule(scale=1000)])
def test_the_strength_is_the_part_of_the_times(gaussian, schedule):
    gaussian.schedule = schedule or gaussian.schedule
    x0, noise = draw(gaussian, 2), seeded_noise(SHAPE, [5, 6])()
    for strength in (0.001, 0.25, 1):
        x_t, level = noised(gaussian, x0, strength, [5, 6])
        assert level == gaussian.schedule.levels(1000)[-1 - round(1000 * strength)]
        assert torch.allclose(x_t, level.alpha * x0 + level.sigma * noise)
    for strength in (0, 1.1, -1):
        with pytest.raises(ValueError, match=f"strength = {strength}: give a number above 0 and up to 1"):
            noised(gaussian, x0, strength, [5, 6])
    with pytest.raises(ValueError, match="seeds and noise: give one"):
        noised(gaussian, x0, 0.5)


def test_editing_changes_more_the_stronger_it_is_and_seeds_make_variations(gaussian):
    """The distance from x0 on a Gaussian by its closed form: x_t -> x_0 is the deterministic map of DDIM, eta = 0."""
    x0 = draw(gaussian, 2).double()
    values, vectors = torch.linalg.eigh(gaussian.cov)
    distances = []
    for strength in (0.1, 0.3, 0.6):
        start = noised(gaussian, x0, strength, [0, 1])
        out = sample(gaussian, None, SHAPE, [0, 1], levels=gaussian.schedule.levels(500), start=start, dtype=torch.float64).x_t
        x_t, (_, alpha, sigma) = start
        scale = (values / (alpha**2 * values + sigma**2)).sqrt()  # from the covariance of x_t to that of x_0
        whitened = (x_t.flatten(1) - alpha * gaussian.mean) @ vectors
        exact = gaussian.mean + whitened * scale @ vectors.T
        assert (out.flatten(1) - exact).square().mean().sqrt() < 0.03
        distances.append((out - x0).square().mean().sqrt().item())
        other = sample(gaussian, None, SHAPE, [2, 3], 50, start=noised(gaussian, x0, strength, [2, 3]), dtype=torch.float64).x_t
        assert (other - out).square().mean().sqrt() > 0.5 * distances[-1]
    assert distances == sorted(distances)


def test_a_start_at_no_level_of_the_schedule_is_one_sentence(gaussian):
    x = draw(gaussian, 2)
    for start in [(x, Level(400, 0.5, 0.5)), (x, Level(2000, 0.5, 0.5)), (x, CLEAN), (x, 400), (x, 0.5), x, x[0], (400, x), 400]:
        with pytest.raises(ValueError, match=r"start is .*: give \(x_t, level\), a level of D's schedule such as .*, or a State$"):
            newton_sampler(gaussian, None, SHAPE, [0, 1], start=start)
    with pytest.raises(ValueError, match="start has an x_t of shape"):
        newton_sampler(gaussian, None, SHAPE, [0, 1], start=(x[:1], gaussian.schedule.level(400)))
