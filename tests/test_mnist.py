"""The shipped MNIST model, at its default settings."""

import pytest
import torch

from ldm.checkpoints import ROOT, SHIPPED, load_model
from ldm.constraints import LinearConstraint, inpainting
from ldm.data.mnist import sample_digits
from ldm.denoisers import Denoiser
from ldm.newton_sampler import sample
from ldm.operators import downsample
from ldm.sampling import jvp, seeded_noise
from ldm.util import instantiate_from_config, load_config


@pytest.fixture(scope="module")
def D():
    model = load_model("mnist", device="cpu")
    return Denoiser(model.network, model.schedule, model.parameterization)


def task(name, images):
    mask = torch.ones(1, 1, 32, 32)
    if name == "super-resolution":
        A = downsample((32, 32), 4)
        return LinearConstraint(A, A(images))
    mask[(..., slice(16, 32)) if name == "half" else (..., slice(9, 23), slice(9, 23))] = 0
    return inpainting(images, mask)


@pytest.mark.parametrize("name", ["half", "hole", "super-resolution"])
def test_the_paper_s_loop_meets_the_constraint(D, name):
    """220 evaluations: the residual ends below 8 % of where it starts (3.1, 6.6 and 4.3 % were measured: the fixed length of the
    steps, not their direction, keeps it from falling further)."""
    images, _ = sample_digits(range(5), each=1)
    constraint = task(name, images)
    start = constraint(D(seeded_noise(images.shape, range(5))(), 999))[1].mean()
    state = sample(D, constraint, images.shape, range(5), lr=0.1)
    assert state.nfe == 220 and state.residual.mean() < 0.08 * start


def test_the_judge_recognises_test_digits_and_samples():
    classifier = load_model("mnist-classifier", device="cpu")
    images, labels = sample_digits()
    with torch.no_grad():
        assert (classifier(images).argmax(1) == labels).float().mean() >= 0.97


def test_unconditional_samples_look_like_digits(D):
    """64 samples in 20 steps; the card has the full measurement on 1,000."""
    classifier = load_model("mnist-classifier", device="cpu")
    x = sample(D, None, (64, 1, 32, 32), range(64), steps=20).x_t
    with torch.no_grad():
        p = classifier(x).softmax(1)
    assert (p.amax(1) >= 0.9).float().mean() >= 0.75
    assert len(p.argmax(1).unique()) >= 8


@pytest.mark.parametrize("t", [99, 499])
def test_forward_difference_on_the_network_equals_forward_ad(D, t):
    images, _ = sample_digits([3], each=4)
    now = D.schedule.level(t)
    x_t = now.alpha * images + now.sigma * seeded_noise(images.shape, range(4))()
    v = seeded_noise(images.shape, range(4, 8))()
    exact = jvp(D, x_t, t, v, mode="forward-ad")
    assert (jvp(D, x_t, t, v) - exact).norm() / exact.norm() < 0.02


def test_alone_or_in_a_batch(D):
    """The same image to 1e-4 in float64, where rounding does not hide a dependence on the neighbours."""
    model = load_model("mnist", device="cpu").double()
    D = Denoiser(model.network, model.schedule, model.parameterization)
    images = sample_digits(range(8), each=1)[0].double()
    constraint, arguments = task("half", images), dict(steps=4, newton_steps=2, dtype=torch.float64)
    together = sample(D, constraint, images.shape, range(8), **arguments).x_t
    for i in (0, 5):
        alone = sample(D, task("half", images[i : i + 1]), (1, 1, 32, 32), [i], **arguments).x_t
        assert (alone - together[i]).abs().max() < 1e-4


def test_the_shipped_files_are_small():
    assert sum((ROOT / SHIPPED[name][1]).stat().st_size for name in ("mnist", "mnist-classifier")) < 4.5 * 2**20
    assert (ROOT / SHIPPED["mnist"][1]).stat().st_size <= 4 * 2**20


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_authors_network_has_22_million_parameters_and_its_pth_files_load(prefix, tmp_path):
    torch.manual_seed(0)
    model = instantiate_from_config(load_config(ROOT / "configs/mnist/authors-22m.yaml").model)
    assert sum(p.numel() for p in model.unet.parameters()) == 22_078_017
    path = tmp_path / "mnist.pth"
    torch.save({prefix + name: value for name, value in model.unet.state_dict().items()}, path)
    loaded = load_model(path, device="cpu")  # its config found out
    assert loaded.parameterization == "eps" and loaded.image_size == 32
    x, t = torch.randn(1, 1, 32, 32), torch.tensor([500])
    with torch.no_grad():
        assert torch.allclose(loaded.network(x, t), model.eval().network(x, t), atol=1e-5)
