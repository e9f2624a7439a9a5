"""What a run is expected to need, against what torch's profiler sees it take."""

import pytest
import torch
from pipelines import build

from ldm.checkpoints import load_model
from ldm.constraints import DecodedConstraint, LinearConstraint, LossConstraint
from ldm.denoisers import LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.memory import FORWARD_AD, expected_peak, peak_bytes
from ldm.modules.diffusionmodules import model as autoencoder
from ldm.operators import downsample
from ldm.sampling import jvp, seeded_noise

SHAPE = (4, 4, 16, 16)


def peak_of(function, x):
    function(x)  # what is made once does not count
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(x)
    events = sorted((e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return torch.tensor([e.nbytes() for e in events]).cumsum(0).max().item()


@pytest.fixture(scope="module")
def model():
    return load_model("tiny", device="cpu")


def test_expected_is_what_is_measured(model):
    D, x = LatentDenoiser(model, "a cat", guidance=3.0), seeded_noise(SHAPE, range(4))()
    with torch.no_grad():
        for use in (lambda x: D(x, 499), lambda x: jvp(D, x, 499, x, x, mode="difference")):
            assert peak_bytes(use, x) == pytest.approx(peak_of(use, x), rel=0.05)
        dual = peak_of(lambda x: jvp(D, x, 499, x, mode="forward-ad"), x)
        assert FORWARD_AD * peak_bytes(lambda x: D(x, 499), x) == pytest.approx(dual, rel=0.15)


def test_the_decoder_s_gradient(model, monkeypatch):
    """Its graph; with large blocks computed again; one sample at a time: less each time, and the same gradient."""
    A, x = downsample((64, 64), 4), seeded_noise(SHAPE, range(4))()
    y, peaks, gradients = torch.zeros(4, 3, 16, 16), [], []
    for large, chunk in ((autoencoder.LARGE, 4), (1, 4), (1, 1)):
        monkeypatch.setattr(autoencoder, "LARGE", large)
        constraint = DecodedConstraint(model.decode, A, y, chunk)
        peaks.append(peak_of(constraint, x))
        with torch.inference_mode():  # as samplers call it
            gradients.append(constraint(x)[0])
        assert 0.9 < peak_bytes(constraint, x) / peaks[-1] < 1.25
    assert peaks[1] < 0.65 * peaks[0] and peaks[2] < 0.3 * peaks[1]
    assert all(torch.allclose(gradient, gradients[0], atol=1e-5) for gradient in gradients)


def test_a_loss_in_parts_is_the_loss():
    loss, x = lambda x0: x0.square().mean((1, 2, 3)), seeded_noise(SHAPE, range(4))()
    for whole, parts in zip(LossConstraint(loss)(x), LossConstraint(loss, chunk=1)(x), strict=True):
        assert torch.equal(whole, parts)
    with pytest.raises(ValueError, match="chunk = 0"):
        LossConstraint(loss, chunk=0)


def test_the_whole_of_a_run(model):
    """Weights, states and the hungriest step: the decoder's gradient counts only where there is one."""
    D, A = LatentDenoiser(model, "a cat", guidance=3.0), downsample((64, 64), 4)
    weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()]) / 2**30
    plain = expected_peak(D, None, SHAPE, model)
    assert weights < plain < weights + 0.02
    assert expected_peak(D, DecodedConstraint(model.decode, A, torch.zeros(4, 3, 16, 16)), SHAPE, model) > plain
    identity = LinearConstraint(downsample((16, 16), 2), torch.zeros(4, 4, 8, 8))
    assert expected_peak(D, identity, SHAPE, model) == pytest.approx(plain, rel=0.05)


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_of_a_pipeline_of_diffusers(family):
    pipeline = build(family)
    model = from_diffusers(pipeline)
    weights = sum(p.nbytes for part in pipeline.components.values() if isinstance(part, torch.nn.Module) for p in part.parameters())
    least = expected_peak(LatentDenoiser(model, "a cat"), None, (1, model.channels, *model.latent_size), model)
    assert weights / 2**30 < least < 1
