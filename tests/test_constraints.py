"""Error directions against autograd and dense linear algebra."""

import open_clip
import pytest
import torch
from common import GaussianDenoiser, randomised
from safetensors.torch import save_file

from ldm.clip import ClipVision, load_clip_vision
from ldm.constraints import (
    DecodedConstraint,
    EncoderConstraint,
    LossConstraint,
    latent_inpainting,
)
from ldm.denoisers import Denoiser
from ldm.guidance import gram, gram_distance
from ldm.inpainting import make_mask
from ldm.models.autoencoder import AutoencoderKL
from ldm.newton_sampler import newton_sampler, sample
from ldm.operators import Compose, Identity, Mask, downsample, gaussian_blur


class Codec:
    """A random autoencoder with f = 4, with encode and decode as a LatentDiffusion has them; counts what is called."""

    def __init__(self):
        ddconfig = dict(double_z=True, z_channels=4, resolution=32, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 1],
                        num_res_blocks=1, attn_resolutions=[], dropout=0.0)  # fmt: skip
        torch.manual_seed(0)
        self.autoencoder = AutoencoderKL(ddconfig, embed_dim=4).eval().requires_grad_(False)
        self.encoded, self.decoded = [], []

    def encode(self, x):
        self.encoded.append(x)
        return self.autoencoder.encode(x).mode()

    def decode(self, z):
        self.decoded.append(z)
        return self.autoencoder.decode(z)


@pytest.fixture
def codec():
    return Codec()


def latents(n=2, seed=0):
    return torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


def some_images(n=2, seed=0):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_the_decoded_constraint_is_the_decoder_s_gradient(codec):
    A, y, z = downsample((32, 32), 4), torch.rand(2, 3, 8, 8), latents()
    constraint = DecodedConstraint(codec.decode, A, y)
    with torch.inference_mode():  # as in the sampler
        e, residual = constraint(z)
    _, pullback = torch.func.vjp(lambda z: A(codec.autoencoder.decode(z)), z)
    r = y - A(codec.autoencoder.decode(z))
    assert (e - pullback(r)[0]).abs().max() < 1e-5 * e.abs().max()
    assert torch.allclose(residual, r.square().mean((1, 2, 3)).sqrt())
    assert constraint.backward_passes == 1 and not e.requires_grad


def test_the_encoder_s_difference_is_the_encoder_s_derivative(codec):
    """e = J_Enc A^+ (y - A x), by forward-mode differentiation, plus what the encoder makes of x less x0; no graph, one decoding
    and two encodings."""
    A, y, z = downsample((32, 32), 4), torch.rand(2, 3, 8, 8), latents()
    constraint = EncoderConstraint(codec.decode, codec.encode, A, y, h=0.01, retraction=0)
    with torch.inference_mode():
        e, residual = constraint(z)
    assert [len(x) for x in codec.encoded] == [4] and len(codec.decoded) == 1 and constraint.backward_passes == 0
    x = codec.autoencoder.decode(z)
    p = torch.linalg.pinv(A.rows) @ (y - A(x)).double() @ torch.linalg.pinv(A.columns).T
    exact = torch.func.jvp(lambda x: codec.autoencoder.encode(x).mode(), (x,), (p.float(),))[1]
    assert (e - exact).norm() < 0.02 * exact.norm()
    retracted, _ = EncoderConstraint(codec.decode, codec.encode, A, y, h=0.01)(z)
    assert torch.allclose(retracted - e, codec.autoencoder.encode(x).mode() - z, atol=1e-4)
    assert torch.allclose(residual, DecodedConstraint(codec.decode, A, y)(z)[1])


def test_samples_do_not_mix_in_any_constraint(codec):
    A, y, z = downsample((32, 32), 4), torch.rand(3, 3, 8, 8), latents(3)
    features = lambda x: x.flatten(2).transpose(1, 2)  # noqa: E731
    reference = some_images(3)
    make = {
        "decoded": lambda i: DecodedConstraint(codec.decode, A, y[i]),
        "encoder": lambda i: EncoderConstraint(codec.decode, codec.encode, A, y[i]),
        "loss": lambda i: LossConstraint(gram_distance(features, codec.decode, reference[i])),
    }
    for name, constraint in make.items():
        together, r = constraint(slice(None))(z)
        for i in range(3):
            alone, r_alone = constraint(slice(i, i + 1))(z[i : i + 1])
            assert (together[i] - alone[0]).norm() < 2e-3 * alone.norm(), name
            assert torch.allclose(r[i], r_alone[0], rtol=1e-4), name


def test_losses_are_differentiated_and_have_one_number_per_sample():
    constraint = LossConstraint(lambda x: x.square().flatten(1).sum(1))
    x = torch.randn(2, 3, 4, 4)
    e, residual = constraint(x)
    assert torch.allclose(e, -2 * x) and torch.allclose(residual, x.square().sum((1, 2, 3)))
    with pytest.raises(ValueError, match=r"loss gives a tensor of shape \[\] for 2 samples"):
        LossConstraint(lambda x: x.square().sum())(x)


@pytest.mark.parametrize("chunk", [None, 1])
def test_samples_whose_loss_is_low_enough_are_not_moved(chunk, schedule):
    energy, x = lambda x: x.square().flatten(1).sum(1), torch.tensor([[1.0], [3.0]]).view(2, 1, 1, 1)  # noqa: E731
    for until in (4.0, torch.tensor(4.0), torch.tensor([4.0, 5.0])):
        e, residual = LossConstraint(energy, chunk, until)(x)
        assert e.flatten().tolist() == [0, -6] and residual.tolist() == [1, 9]
    with pytest.raises(ValueError, match=r"until has shape \[3\]: give a number, or one for each of 2 samples"):
        LossConstraint(energy, chunk, torch.zeros(3))(x)
    D, ends = GaussianDenoiser(torch.zeros(4), torch.eye(4), schedule), []
    for until in (None, 0.5, torch.tensor([1e9, 0.5])):
        ends.append(sample(D, LossConstraint(energy, chunk, until), (2, 1, 2, 2), [0, 1], lr=0.05).x0)
    free = sample(D, None, (2, 1, 2, 2), [0, 1]).x0
    assert energy(ends[0]).max() < energy(ends[1]).max() < 0.6 < energy(free).min()  # 0.5, and the last steps without a push
    assert torch.allclose(ends[2][0], free[0], atol=1e-5) and torch.equal(ends[2][1], ends[1][1])


def test_the_gram_distance_is_zero_at_the_reference_and_takes_one_for_all():
    x = some_images(2)
    features = lambda x: torch.stack([x.flatten(2)[:, 0], x.flatten(2).mean(1)], -1)  # noqa: E731
    assert gram(features(x)).shape == (2, 2, 2)
    assert torch.allclose(gram(features(x))[0, 0, 1], (x[0, 0] * x[0].mean(0)).mean())
    distance = gram_distance(features, lambda z: z, x)
    assert distance(x).abs().max() < 1e-6 and (distance(x.flip(0)) > 1e-3).all()
    for_all = gram_distance(features, lambda z: z, x[:1])
    assert for_all(x)[0] < 1e-6 < for_all(x)[1]
    with pytest.raises(ValueError, match="reference has 2 images, but x0 has 3 samples"):
        distance(some_images(3))
    with pytest.raises(ValueError, match="reference is torch.uint8"):
        gram_distance(features, None, torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_latent_inpainting_hides_the_hole_from_the_encoder(codec):
    """What lies in the hole changes nothing; only whole known cells are measured; whole=True encodes everything."""
    image, mask = some_images(), make_mask((0, 10, 32, 22), (32, 32))
    constraint = latent_inpainting(codec, image, mask)
    other = latent_inpainting(codec, torch.where(mask > 0, image, -image), mask)
    assert torch.equal(constraint.y, other.y)
    assert constraint.A.mask[0, 0, 0].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    whole = latent_inpainting(codec, image, mask, whole=True)
    assert torch.equal(whole.y, constraint.A.mask * codec.autoencoder.encode(image).mode())
    grey = torch.where(mask > 0, image, 0)
    true, filled, greyed = (codec.autoencoder.encode(x).mode() for x in (image, codec.encoded[0], grey))
    assert not torch.equal(filled, greyed) and true.shape == filled.shape
    with pytest.raises(ValueError, match="no hole"):
        latent_inpainting(codec, image, torch.ones_like(mask))
    with pytest.raises(ValueError, match="give the same height"):
        latent_inpainting(codec, image, torch.ones(1, 1, 16, 16))
    with pytest.raises(ValueError, match="image has values from"):
        latent_inpainting(codec, image * 3, mask)


@pytest.mark.parametrize("make", [lambda: downsample((12, 12), 3), lambda: gaussian_blur((12, 12), 0.7), Identity,
                                  lambda: Mask(torch.ones(1, 1, 12, 12).tril())])  # fmt: skip
def test_pseudo_inverses(make):
    """A A^+ A = A."""
    A, x = make(), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    assert (A(A.pseudo_inverse(A(x))) - A(x)).abs().max() < 1e-8


def test_a_composition_says_that_it_has_no_pseudo_inverse(codec):
    A = Compose(Identity(), downsample((32, 32), 4))
    with pytest.raises(ValueError, match="Compose has no pseudo-inverse here: give a function"):
        EncoderConstraint(codec.decode, codec.encode, A, torch.rand(2, 3, 8, 8))(latents())
    EncoderConstraint(codec.decode, codec.encode, A, torch.rand(2, 3, 8, 8), lift=A.adjoint)(latents())


def test_the_constraints_work_inside_the_sampler(codec, schedule):
    """The denoiser's backward pass is never taken, whatever the constraint does with the decoder."""

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 0.5 * x

        @staticmethod
        def backward(ctx, g):
            raise AssertionError("back-propagated through the denoiser")

    D = Denoiser(lambda x, t: NoBackward.apply(x), schedule, "x0")
    A, y = downsample((32, 32), 4), torch.rand(2, 3, 8, 8)
    for constraint in (DecodedConstraint(codec.decode, A, y), EncoderConstraint(codec.decode, codec.encode, A, y)):
        states = list(newton_sampler(D, constraint, (2, 4, 8, 8), [0, 1], steps=4, newton_steps=3))
        assert torch.isfinite(states[-1].x_t).all() and states[-1].nfe == 28
        assert (states[-1].residual < sample(D, None, (2, 4, 8, 8), [0, 1], steps=4).x_t.abs().max()).all()


def test_clip_s_tokens_are_those_after_the_block():
    """Against a hook on open_clip's own block; other sizes are resized, values normalised."""
    torch.manual_seed(0)
    vision = dict(image_size=32, patch_size=8, width=64, head_width=32, layers=3)
    text = dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1)
    clip, seen = randomised(open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)), []
    clip.visual.transformer.resblocks[1].register_forward_hook(lambda module, args, out: seen.append(out))
    mean, std = (0.1, 0.2, 0.3), (0.3, 0.4, 0.5)
    tokens = ClipVision(clip.visual, 1, 32, mean, std)(some_images())
    clip.encode_image(((some_images() + 1) / 2 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    assert tokens.shape == (2, 16, 64) and torch.allclose(tokens, seen[-1][:, 1:], atol=1e-5)
    assert ClipVision(clip.visual, 0, 32)(torch.rand(1, 3, 48, 40)).shape == (1, 16, 64)
    with pytest.raises(ValueError, match="block = 3: this CLIP has the blocks 0 to 2"):
        ClipVision(clip.visual, 3)
    z = some_images().requires_grad_()
    ClipVision(clip.visual, 1, 32)(z).square().sum().backward()
    assert z.grad.abs().sum() > 0


def test_missing_clip_weights_say_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.clip.try_to_load_from_cache", lambda *args: None)
    with pytest.raises(FileNotFoundError, match="not in open_clip's cache.*puts them there"):
        load_clip_vision("openai")
    with pytest.raises(FileNotFoundError, match='nowhere.safetensors\': there is no such file; give "tiny-clip"'):
        load_clip_vision(tmp_path / "nowhere.safetensors")


@pytest.mark.slow
def test_openai_s_clip_loads_from_a_file(tmp_path):
    """ViT-B/16 of random weights, as open_clip writes it."""
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-16", load_weights=False, force_quick_gelu=True).eval()
    save_file(clip.state_dict(), tmp_path / "clip.safetensors")
    seen = []
    clip.visual.transformer.resblocks[2].register_forward_hook(lambda module, args, out: seen.append(out))
    x = torch.rand(1, 3, 224, 224) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    with torch.no_grad():
        clip.encode_image(((x + 1) / 2 - mean) / std)
        tokens = load_clip_vision(tmp_path / "clip.safetensors", device="cpu")(x)
    assert torch.allclose(tokens, seen[0][:, 1:], atol=1e-5)


def test_the_decoded_measurement_s_derivative_is_linear_with_its_adjoint():
    """A Dec' of a decoder that is not linear: the product against torch's exact derivative, <A Dec' w, u> = <w, (A Dec')^T u>."""
    generator = torch.Generator().manual_seed(0)
    x0, w = torch.randn(2, 3, 1, 4, 4, generator=generator, dtype=torch.float64).transpose(0, 1)[:2]
    weights = torch.randn(16, 64, generator=generator, dtype=torch.float64) / 8
    decode = lambda z: torch.tanh(z.flatten(1) @ weights).view(-1, 1, 8, 8)  # noqa: E731
    A = downsample((8, 8), 2)
    constraint = DecodedConstraint(decode, A, torch.zeros(len(x0), 1, 4, 4, dtype=torch.float64))
    derivative, r = constraint.linearised(x0)
    exact = torch.func.jvp(lambda z: A(decode(z)), (x0,), (w,))[1]
    assert torch.equal(constraint.pixels.rms(r), constraint.residual(x0))
    assert (derivative(w) - exact).abs().max() < 0.05 * exact.abs().max()  # a difference of length 0.05
    u = torch.randn(r.shape, generator=generator, dtype=torch.float64)
    assert torch.allclose((exact * u).sum((1, 2, 3)), (w * derivative.adjoint(u)).sum((1, 2, 3)))
    e, residual = constraint(x0)
    assert torch.allclose(e, derivative.adjoint(r)) and torch.allclose(residual, r.square().mean((1, 2, 3)).sqrt())


def test_large_latents_are_decoded_and_encoded_one_by_one():
    """From 4,096 values on nothing takes the whole batch: 64 x 64 latents of Stable Diffusion."""
    sizes = []

    def decode(z):
        sizes.append(len(z))
        return z.tanh()

    def encode(x):
        sizes.append(len(x))
        return x.clamp(-0.9, 0.9).atanh()

    A, x0 = downsample((64, 64), 4), torch.randn(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    constraint = DecodedConstraint(decode, A, A(torch.zeros(3, 1, 64, 64)), encode=encode)
    B, _ = constraint.linearised(x0)
    B.adjoint(B(x0))
    assert torch.equal(constraint.residual(x0), constraint.pixels.residual(x0.tanh()))
    assert torch.equal(constraint.encoded(constraint.image(x0), x0), encode(x0.tanh()))
    assert set(sizes[:-1]) == {1} and sizes[-1] == 3
