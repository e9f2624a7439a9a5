import re
from pathlib import Path

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.distributions import Independent, Normal, kl_divergence

from ldm.models.autoencoder import AutoencoderKL, VQModel, VQModelInterface
from ldm.modules.diffusionmodules.model import Decoder, Encoder
from ldm.modules.distributions.distributions import DiagonalGaussianDistribution
from ldm.modules.tiling import tiled, windows
from ldm.util import instantiate_from_config

SD_V1 = """
target: ldm.models.autoencoder.AutoencoderKL
params:
  embed_dim: 4
  monitor: val/rec_loss
  ddconfig:
    double_z: true
    z_channels: 4
    resolution: 256
    in_channels: 3
    out_ch: 3
    ch: 128
    ch_mult: [1, 2, 4, 4]
    num_res_blocks: 2
    attn_resolutions: []
    dropout: 0.0
  lossconfig:
    target: torch.nn.Identity
"""
SMALL = dict(double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=(1, 2),
             num_res_blocks=1, attn_resolutions=(), dropout=0.0)  # fmt: skip


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def small(embed_dim=4, **ddconfig):
    """A narrow autoencoder; norms and biases are random too, so that no term is trivially zero or one."""
    torch.manual_seed(0)
    model = AutoencoderKL({**SMALL, **ddconfig}, embed_dim=embed_dim).eval()
    for p in model.parameters():
        if p.ndim == 1:
            p += 0.3 * torch.randn_like(p)
    return model


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The network


def test_names_and_shapes_are_those_of_stable_diffusion_v1():
    rows = (Path(__file__).parent / "data" / "sd-v1-state-dict.tsv").read_text().splitlines()
    rows = [row.removeprefix("first_stage_model.").split("\t") for row in rows if row.startswith("first_stage_model.")]
    with torch.device("meta"):
        model = instantiate_from_config(OmegaConf.create(SD_V1))
    assert {k: "x".join(map(str, v.shape)) for k, v in model.state_dict().items()} == dict(rows)
    assert sum(p.numel() for p in model.parameters()) == 83_653_863
    assert model.downsampling == 8
    assert {m.eps for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {1e-6}


def to_diffusers(state, levels):
    """Our state dict by the names of diffusers' AutoencoderKL."""
    rules = [
        (r"\.down\.(\d)\.block\.(\d)\.", r".down_blocks.\1.resnets.\2."),
        (r"\.down\.(\d)\.attn\.(\d)\.", r".down_blocks.\1.attentions.\2."),
        (r"\.down\.(\d)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d)\.block\.(\d)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.resnets.{m[2]}."),
        (r"\.up\.(\d)\.attn\.(\d)\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.attentions.{m[2]}."),
        (r"\.up\.(\d)\.upsample\.", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.upsamplers.0."),
        (r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
        (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
        (r"(attentions\.\d)\.norm\.", r"\1.group_norm."),
        (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
        (r"(attentions\.\d)\.proj_out\.", r"\1.to_out.0."),
        (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    ]
    converted = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        converted[name] = value[..., 0, 0] if "attentions" in name and value.ndim == 4 else value
    return converted


@pytest.mark.parametrize("attended, ch_mult, num_res_blocks", [(False, (1, 2, 2), 2), (True, (1, 2), 1)])
def test_equals_diffusers(attended, ch_mult, num_res_blocks):
    model = small(ch_mult=ch_mult, num_res_blocks=num_res_blocks, attn_resolutions=(16, 8) if attended else ())
    prefix = "Attn" if attended else ""
    reference = diffusers.AutoencoderKL(
        down_block_types=[prefix + "DownEncoderBlock2D"] * len(ch_mult),
        up_block_types=[prefix + "UpDecoderBlock2D"] * len(ch_mult),
        block_out_channels=[32 * m for m in ch_mult],
        layers_per_block=num_res_blocks,
        latent_channels=4,
    ).eval()
    reference.load_state_dict(to_diffusers(model.state_dict(), len(ch_mult)), strict=True)

    x, z = randn(2, 3, 24, 40), randn(2, 4, 6, 10)
    posterior, expected = model.encode(x), reference.encode(x).latent_dist
    assert posterior.mean.std() > 0.1
    torch.testing.assert_close(posterior.mean, expected.mean, atol=1e-4, rtol=0)
    torch.testing.assert_close(posterior.logvar, expected.logvar, atol=1e-4, rtol=0)
    torch.testing.assert_close(model.decode(z), reference.decode(z).sample, atol=1e-4, rtol=0)


def test_a_sample_does_not_depend_on_its_batch_and_slicing_changes_nothing():
    model, x, z = small(), randn(3, 3, 16, 24), randn(3, 4, 8, 12)
    encoded, decoded = model.encode(x).mean, model.decode(z)
    torch.testing.assert_close(model.encode(x[1:2]).mean, encoded[1:2], atol=1e-5, rtol=1e-5)
    model.slicing = True
    torch.testing.assert_close(model.encode(x).mean, encoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.decode(z), decoded, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_half_precision_weights_take_and_give_float32(dtype, tolerance):
    model, x = small(), randn(1, 3, 16, 16)
    expected, _ = model(x)
    reconstruction, posterior = model.to(dtype)(x)
    assert reconstruction.dtype == posterior.mean.dtype == posterior.logvar.dtype == torch.float32
    assert (reconstruction - expected).norm() < tolerance * expected.norm()


def test_forward_decodes_the_mean_or_a_seeded_sample():
    model, x = small(), randn(1, 3, 16, 16)
    reconstruction, posterior = model(x)
    assert torch.equal(reconstruction, model.decode(posterior.mean))
    sampled, _ = model(x, sample_posterior=True, generator=torch.Generator().manual_seed(1))
    z = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(sampled, model.decode(z)) and not torch.equal(sampled, reconstruction)


def test_remaining_constructor_arguments():
    model = small(embed_dim=6, resamp_with_conv=False, attn_type="none", tanh_out=True, in_channels=1, out_ch=2)
    assert not any("attn" in name or "sample" in name for name in model.state_dict())
    reconstruction, posterior = model(randn(1, 1, 8, 8))
    assert posterior.mean.shape == (1, 6, 4, 4) and reconstruction.shape == (1, 2, 8, 8)
    assert reconstruction.abs().max() < 1
    assert Decoder(**SMALL, give_pre_end=True)(randn(1, 4, 4, 4)).shape == (1, 32, 8, 8)
    assert Encoder(**{**SMALL, "double_z": False})(randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)


# The quantised latent


def quantised(cls=VQModelInterface, n_embed=50, embed_dim=3, **ddconfig):
    """A narrow VQ autoencoder, its codes spread as widely as its latents."""
    torch.manual_seed(0)
    return cls(ddconfig={**SMALL, "double_z": False, "z_channels": 3, **ddconfig}, n_embed=n_embed, embed_dim=embed_dim).eval()


@pytest.mark.parametrize("embed_dim", [3, 5])
def test_vq_model_equals_diffusers(embed_dim):
    model = quantised(embed_dim=embed_dim, ch_mult=(1, 2, 2))
    reference = diffusers.VQModel(
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        block_out_channels=[32, 64, 64],
        latent_channels=3,
        num_vq_embeddings=50,
        vq_embed_dim=embed_dim,
    ).eval()
    reference.load_state_dict(to_diffusers(model.state_dict(), 3), strict=True)
    x, z = randn(2, 3, 24, 40), randn(2, embed_dim, 6, 10)
    latents, decoded = model.encode(x), model.decode(z)
    assert latents.std() > 0.1 and decoded.std() > 0.1
    torch.testing.assert_close(latents, reference.encode(x).latents, atol=1e-4, rtol=0)
    torch.testing.assert_close(decoded, reference.decode(z).sample, atol=1e-4, rtol=0)
    plain = model.decode(z, force_not_quantize=True)
    torch.testing.assert_close(plain, reference.decode(z, force_not_quantize=True).sample, atol=1e-4, rtol=0)
    assert (plain - decoded).norm() > 0.1 * decoded.norm()


def test_the_nearest_code_of_all():
    """Against every distance written out, in more pixels than one part of the search holds."""
    quantize, z = quantised().quantize, randn(2, 3, 50, 90)
    distances = (z[:, None] - quantize.embedding.weight[..., None, None]).square().sum(2)  # [B, n_embed, h, w]
    assert torch.equal(quantize.indices(z), distances.argmin(1))
    codes = quantize.embedding.weight[distances.argmin(1)].movedim(-1, 1)
    torch.testing.assert_close(quantize(z), codes)
    torch.testing.assert_close(quantize(codes), codes)  # a code is its own nearest
    assert quantize(z.half()).dtype == torch.float16


@torch.inference_mode(False)
@torch.enable_grad()
def test_the_gradient_passes_straight_through_the_quantiser():
    """The gradient of the decoder at the codes, as if they were z; the derivative forwards likewise."""
    model, z, w = quantised(), randn(1, 3, 4, 4), randn(1, 3, 4, 4, seed=1)
    z.requires_grad_()
    codes = model.quantize(z).detach().requires_grad_()
    (through,) = torch.autograd.grad(model.decode(z).square().sum(), z)
    (at_the_codes,) = torch.autograd.grad(model.decode(codes, force_not_quantize=True).square().sum(), codes)
    torch.testing.assert_close(through, at_the_codes)
    assert through.abs().max() > 0
    assert torch.equal(torch.func.jvp(model.quantize, (z.detach(),), (w,))[1], w)


def test_vq_model_quantises_where_the_interface_does_not():
    model, interface, x = quantised(VQModel), quantised(), randn(1, 3, 16, 16)
    z = model.encode(x)
    assert torch.equal(z, model.quantize(interface.encode(x))) and not torch.equal(z, interface.encode(x))
    reconstruction, latent = model(x)
    assert torch.equal(latent, z) and torch.equal(reconstruction, interface.decode(z, force_not_quantize=True))
    torch.testing.assert_close(interface.decode(interface.encode(x)), reconstruction, atol=1e-5, rtol=0)


def test_vq_in_slices_tiles_and_half_precision():
    model, x = quantised(), randn(2, 3, 32, 48)
    z = model.encode(x)
    decoded = model.decode(z)
    model.slicing = True
    torch.testing.assert_close(model.decode(z), decoded, atol=1e-5, rtol=1e-5)
    assert model.tile(16).decode(z).shape == decoded.shape
    half = model.tile(None).to(torch.bfloat16)
    assert half.encode(x).dtype == half.decode(z).dtype == torch.float32
    assert (half.decode(z, force_not_quantize=True) - model.decode(z, force_not_quantize=True)).norm() < 0.1 * decoded.norm()


# The distribution


def test_distribution_agrees_with_torch():
    p, q = (DiagonalGaussianDistribution(randn(3, 8, 2, 5, seed=seed)) for seed in (0, 1))
    torch_p, torch_q = (Independent(Normal(d.mean, d.std), 3) for d in (p, q))
    standard = Independent(Normal(torch.zeros_like(p.mean), 1.0), 3)
    x = randn(3, 4, 2, 5, seed=2)
    torch.testing.assert_close(p.var, torch_p.variance)
    torch.testing.assert_close(p.mode(), torch_p.mode)
    torch.testing.assert_close(p.nll(x), -torch_p.log_prob(x))
    torch.testing.assert_close(p.kl(q), kl_divergence(torch_p, torch_q))
    torch.testing.assert_close(p.kl(), kl_divergence(torch_p, standard))
    torch.testing.assert_close(p.kl(p), torch.zeros(3))


def test_distribution_samples_by_generator_with_its_moments():
    p = DiagonalGaussianDistribution(torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(1, 2, 100, 100))
    draw = [p.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1]) and not torch.equal(draw[0], draw[2])
    assert abs(draw[0].mean() - 0.5) < 0.03 and abs(draw[0].std() - p.std[0, 0, 0, 0]) < 0.03


def test_distribution_clamps_the_variance():
    p = DiagonalGaussianDistribution(torch.tensor([0.0, 0.0, -1e9, 1e9]).view(1, 4, 1, 1))
    assert p.logvar.flatten().tolist() == [-30, 20]
    assert p.std.isfinite().all() and p.sample().isfinite().all() and p.kl().isfinite().all()
    with pytest.raises(ValueError, match=r"parameters has shape \[1, 3, 2, 2\]"):
        DiagonalGaussianDistribution(torch.zeros(1, 3, 2, 2))


# Tiling


@given(st.integers(1, 60), st.integers(1, 20), st.floats(0, 0.5), st.integers(1, 3))
def test_windows_cover_evenly_and_sum_to_one(length, size, fraction, cell):
    overlap = round(fraction * size)
    total, end = torch.zeros(length * cell), 0
    for start, weights in windows(length, size, overlap, cell):
        assert len(weights) == min(size, length) * cell and (weights > 0).all()
        assert start == 0 or end - start >= overlap
        end = start + len(weights) // cell
        total[start * cell : end * cell] += weights
    assert end == length
    torch.testing.assert_close(total, torch.ones_like(total))


def test_tiles_of_a_local_network_are_exact():
    x = randn(2, 3, 20, 33)
    up = tiled(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3), x, 8, 2, cell_out=2)
    torch.testing.assert_close(up, x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    down = tiled(torch.nn.AvgPool2d(2), x[..., :32], 4, 1, cell_in=2)
    torch.testing.assert_close(down, torch.nn.functional.avg_pool2d(x[..., :32], 2))


def test_the_step_between_two_tiles_becomes_a_ramp_over_their_overlap():
    calls = []

    def network(x):  # each tile another constant, as different normalisation statistics would make it
        calls.append(x.shape)
        return torch.full_like(x, float(len(calls) % 2))

    out = tiled(network, torch.zeros(1, 1, 80, 150), 32, 8)
    assert len(calls) == 3 * 6 and set(calls) == {(1, 1, 32, 32)}
    assert out.min() == 0 and out.max() == 1
    assert max(out.diff(dim=2).abs().max(), out.diff(dim=3).abs().max()) <= 1 / 8 + 1e-6


def test_tiling_changes_nothing_where_the_image_fits_or_it_is_off():
    model, x, z = small(), randn(1, 3, 16, 24), randn(1, 4, 8, 12)
    encoded, decoded = model.encode(x).mean, model.decode(z)
    for size in (24, 512, None):
        assert model.tile(size) is model
        assert torch.equal(model.encode(x).mean, encoded) and torch.equal(model.decode(z), decoded)
    assert not torch.equal(model.tile(16).decode(z), decoded)


def test_tiled_autoencoder_is_close_to_the_untiled_without_a_seam():
    model, x, z = small(), randn(1, 3, 96, 160).clamp(-1, 1), randn(1, 4, 48, 80)
    encoded, decoded = model.encode(x).mean, model.decode(z)

    def seam():  # the largest step of the error from one column to the next, in units of the median step
        steps = (model.decode(z) - decoded).diff(dim=3).abs().mean(dim=(0, 1, 2))
        return steps.max() / steps.median()

    model.tile(96, overlap=0.25)
    assert (model.encode(x).mean - encoded).norm() < 0.05 * (encoded - encoded.mean()).norm()
    assert (model.decode(z) - decoded).norm() < 0.1 * (decoded - decoded.mean()).norm()
    assert seam() < 4
    model.tile(96, overlap=0)
    assert seam() > 8  # the measure sees a seam where there is one


# Errors


@pytest.mark.parametrize("method, shape, message", [
    ("encode", (1, 4, 16, 16), r"x has shape \[1, 4, 16, 16\], but this autoencoder takes \[B, 3, H, W\]"),
    ("encode", (1, 3, 16, 18), r"x has shape \[1, 3, 16, 18\].*positive multiples of 4 as H and W"),
    ("encode", (1, 3, 0, 16), r"x has shape \[1, 3, 0, 16\]"),
    ("encode", (3, 16, 16), r"x has shape \[3, 16, 16\]"),
    ("decode", (1, 3, 4, 4), r"z has shape \[1, 3, 4, 4\], but this autoencoder takes \[B, 4, H, W\]"),
])  # fmt: skip
def test_wrong_shapes_are_named(method, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(small(ch_mult=(1, 1, 1)), method)(torch.zeros(shape))


def test_integer_images_are_refused():
    with pytest.raises(ValueError, match="x has dtype torch.uint8"):
        small().encode(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("size, overlap, message", [
    (15, 0.25, "size = 15: give a positive multiple of 2"),
    (0, 0.25, "size = 0"),
    (-16, 0.25, "size = -16"),
    (16, 0.75, "overlap = 0.75: give a fraction of the tile from 0 to 0.5"),
    (16, float("nan"), "overlap = nan"),
])  # fmt: skip
def test_wrong_tiles_are_refused(size, overlap, message):
    with pytest.raises(ValueError, match=message):
        small().tile(size, overlap)


@pytest.mark.parametrize("ddconfig, kwargs, message", [
    ({"attn_type": "linear"}, {}, "attn_type = 'linear'.*not supported"),
    ({"use_linear_attn": True}, {}, "use_linear_attn = True.*not supported"),
    ({"double_z": False}, {}, "double_z = False"),
    ({"ch": 48}, {}, "ch = 48: GroupNorm with 32 groups needs a multiple of 32"),
])  # fmt: skip
def test_unsupported_configs_are_refused(ddconfig, kwargs, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKL({**SMALL, **ddconfig}, **kwargs)


def test_unsupported_configs_of_vq_are_refused():
    with pytest.raises(ValueError, match="double_z = True in ddconfig"):
        quantised(double_z=True)
    with pytest.raises(ValueError, match="n_embed = None: give the number of codes"):
        quantised(n_embed=None)
    with pytest.raises(ValueError, match=r"z has shape \[1, 4, 4, 4\], but this autoencoder takes \[B, 3, H, W\]"):
        quantised().decode(torch.zeros(1, 4, 4, 4))
