"""Large images: the network on overlapping windows."""

import math

import pytest
import torch

from ldm.checkpoints import load_model
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.newton_sampler import sample
from ldm.sampling import jvp


class Recorder:
    """A network of one place and its channel, which notes the shapes that it sees."""

    def __init__(self):
        self.shapes = []

    def __call__(self, x, t, context=None):
        self.shapes.append(tuple(x.shape))
        scale = t.view(-1, 1, 1, 1) / 1000
        return x * scale if context is None else x * scale + context.mean((1, 2)).view(-1, 1, 1, 1)


class Model:
    """What LatentDenoiser asks of a LatentDiffusion; prompts are numbers."""

    def __init__(self, schedule):
        self.network, self.schedule, self.parameterization = Recorder(), schedule, "v"

    def encode_prompts(self, prompts):
        return torch.tensor([float(p or 0) for p in ([prompts] if isinstance(prompts, str) else prompts)]).view(-1, 1, 1)

    encode_negatives = encode_prompts


def x_t(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size, overlap, batch", [(8, 0.5, 1), (8, 0.5, 4), (8, 0, 3), (7, 0.9, 50), (5, 0.3, 2)])
@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_windows_of_a_local_network_are_exact_and_prompts_stay_with_their_samples(schedule, size, overlap, batch, guidance):
    model = Model(schedule)
    D = LatentDenoiser(model, ["1", "2", "3"], guidance, ["4", "5", "6"])
    x = x_t(3, 4, 12, 25)
    expected = D(x, 500)
    torch.testing.assert_close(D.tile(size, overlap, batch)(x, 500), expected)
    assert torch.equal(D.tile(None)(x, 500), expected)


def test_several_windows_go_into_one_call_and_memory_does_not_grow(schedule):
    for length in (8, 16, 32, 64):
        network = Recorder()
        D = Denoiser(network, schedule).tile(8, overlap=0.5, batch=3)
        D(x_t(2, 4, 8, length), 500)
        count = length // 4 - 1  # every half window: linear in the length
        assert len(network.shapes) == math.ceil(count / 3)
        assert sum(shape[0] for shape in network.shapes) == 2 * count
        assert all(shape[0] <= 6 and shape[1:] == (4, 8, 8) for shape in network.shapes)


def test_what_fits_into_one_window_is_not_changed():
    D = LatentDenoiser(load_model("tiny", device="cpu"), "a taco", 2.0)
    x = x_t(1, 4, 16, 8)
    with torch.inference_mode():
        assert torch.equal(D(x, 500), D.tile(16)(x, 500))


@pytest.mark.parametrize("mode", ["difference", "forward-ad"])
def test_jacobian_products_on_windows(schedule, mode):
    """Against reverse-mode AD twice, in float64; the network couples places."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.Conv2d(4, 1, 3, padding=1))
    layers.double().requires_grad_(False)
    D = Denoiser(lambda x, t: layers(x), schedule, "v").tile(8, batch=2)
    x, v = x_t(2, 1, 16, 20).double(), x_t(2, 1, 16, 20, seed=1).double()
    exact = torch.autograd.functional.jvp(lambda x: D(x, 500), x, v)[1]
    with torch.inference_mode():  # weights of the windows made here serve both
        product = jvp(D, x, 500, v, h=1e-4, mode=mode)
    assert (product - exact).norm() / exact.norm() < (1e-8 if mode == "forward-ad" else 1e-3)


def test_no_seams():
    """A 128x128 image on windows of 64x64: the steps from pixel to pixel where windows begin or end, over those elsewhere at the
    same place of the decoder's 4x4 blocks. Without overlap, windows know nothing of each other, and the measure shows it."""
    model = load_model("tiny", device="cpu")

    def seam(overlap, borders):
        D = LatentDenoiser(model, "", guidance=1.0).tile(16, overlap, batch=9)
        z = sample(D, None, (2, 4, 32, 32), [0, 1], steps=8).x_t
        steps = [model.decode(z).diff(dim=d).abs().mean(dim=(0, 1, 5 - d)) for d in (2, 3)]  # [127], rows and columns
        steps = sum(steps)[3::4]  # between blocks
        at = torch.zeros(len(steps), dtype=bool)
        at[[b - 1 for b in borders]] = True
        return (steps[at].mean() / steps[~at].mean()).item()

    assert seam(0.5, [8, 16, 24]) < 1.2
    assert seam(0.0, [16]) > 1.5


@pytest.mark.parametrize("arguments, message", [
    ((0,), "size = 0"), ((1.5,), "size = 1.5"), ((8, -0.1), "overlap = -0.1"), ((8, 0.95), "overlap = 0.95"),
    ((8, 0.5, 0), "batch = 0"), ((8, 0.5, 1.5), "batch = 1.5"),
])  # fmt: skip
def test_wrong_windows_are_refused(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(Recorder(), schedule).tile(*arguments)
