import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse.linalg import spsolve

from ldm.images import load_image
from ldm.inpainting import blend, check_mask, fit, harmonic_fill, join, latent_mask, make_mask, outpaint


def laplace_by_scipy(values, mask):
    """The same Dirichlet problem as a sparse linear system: hole pixels are the mean of the neighbours they have."""
    h, w = mask.shape
    index, right = np.arange(h * w).reshape(h, w), np.where(mask, values, 0).astype(float).ravel()
    matrix = scipy.sparse.lil_matrix((h * w, h * w))
    for i, j in np.ndindex(h, w):
        matrix[index[i, j], index[i, j]] = 1
        if not mask[i, j]:
            near = [(a, b) for a, b in ((i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)) if 0 <= a < h and 0 <= b < w]
            for a, b in near:
                matrix[index[i, j], index[a, b]] = -1 / len(near)
    return spsolve(matrix.tocsr(), right).reshape(h, w)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.integers(3, 17), st.integers(3, 17), st.floats(0.05, 0.9))
def test_the_fill_solves_laplace_s_equation(seed, h, w, share):
    g = torch.Generator().manual_seed(seed)
    values, mask = torch.randn(1, 1, h, w, generator=g), (torch.rand(1, 1, h, w, generator=g) < share).float()
    mask[..., 0, 0] = 1
    expected = laplace_by_scipy(values[0, 0].numpy(), mask[0, 0].numpy() > 0)
    filled = harmonic_fill(values, mask)
    assert torch.equal(filled * mask, values * mask)
    assert np.abs(filled[0, 0].numpy() - expected).max() < 5e-3


def test_the_fill_continues_a_constant_and_never_sees_the_hole():
    mask = make_mask("centre", (32, 48))
    assert (harmonic_fill(torch.full((2, 3, 32, 48), 0.3), mask) - 0.3).abs().max() < 1e-5
    image = torch.rand(2, 3, 32, 48)
    other = torch.where(mask > 0, image, torch.rand(2, 3, 32, 48))
    assert torch.equal(harmonic_fill(image, mask), harmonic_fill(other, mask))
    assert torch.equal(harmonic_fill(image, torch.zeros_like(mask)), torch.zeros_like(image))


@pytest.mark.parametrize("feather, poisson", [(0, False), (4, False), (0, True)])
def test_blending_keeps_the_known_pixels(feather, poisson):
    g = torch.Generator().manual_seed(0)
    image, sampled = torch.rand(2, 3, 32, 32, generator=g), torch.rand(2, 3, 32, 32, generator=g)
    mask = make_mask("right", (32, 32))
    out = blend(sampled, image, mask, feather, poisson)
    far = slice(0, 16 - feather)
    assert torch.equal(out[..., far], image[..., far])
    if not poisson:
        assert torch.equal(out[..., 16:], sampled[..., 16:])
    if feather:
        assert not torch.equal(out[..., 12:16], image[..., 12:16])


def test_poisson_blending_takes_out_a_step():
    image = torch.linspace(-0.5, 0.5, 32).expand(1, 3, 32, 32).contiguous()
    mask = make_mask("centre", (32, 32))
    assert (blend(image + 0.3, image, mask, poisson=True) - image).abs().max() < 1e-3


@pytest.mark.parametrize("what", ["left", "right", "top", "bottom", "centre", "strokes", (3, 4, 5, 6)])
def test_masks(what):
    mask = make_mask(what, (32, 48), seed=3)
    assert mask.shape == (1, 1, 32, 48) and set(mask.unique().tolist()) == {0, 1}
    known = mask.mean().item()
    share = {"centre": 0.75, "strokes": 0.75, (3, 4, 5, 6): 1 - 30 / (32 * 48)}.get(what, 0.5)
    assert abs(known - share) < (0.1 if what == "strokes" else 1e-6)
    if what == "strokes":
        assert torch.equal(mask, make_mask(what, (32, 48), seed=3)) and not torch.equal(mask, make_mask(what, (32, 48), seed=4))


def test_a_latent_pixel_is_known_where_all_of_its_pixels_are():
    mask = torch.ones(1, 1, 16, 16)
    mask[..., 5, 5] = 0
    small = latent_mask(mask, 4)
    assert small.sum() == 15 and small[0, 0, 1, 1] == 0
    with pytest.raises(ValueError, match=r"mask has the size \[16, 16\]: give multiples of 5"):
        latent_mask(mask, 5)


def test_masks_from_files(tmp_path):
    """White is filled in; a file of another size is resized, conservatively; transparency is a hole."""
    drawn = np.zeros((32, 32), np.uint8)
    drawn[8:16, 8:16] = 255
    Image.fromarray(drawn).save(tmp_path / "mask.png")
    mask = make_mask(tmp_path / "mask.png", (32, 32))
    assert torch.equal(mask[0, 0], torch.from_numpy(drawn == 0).float())
    larger = make_mask(tmp_path / "mask.png", (48, 48))
    assert not larger[..., 12:24, 12:24].any() and larger[..., :8, :8].all()
    rgba = np.full((32, 32, 4), 255, np.uint8)
    rgba[:, 20:, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "holed.png")
    assert make_mask("alpha", (32, 32), image_path=tmp_path / "holed.png")[0, 0].sum() == 32 * 20


def test_wrong_masks_are_one_sentence_each(tmp_path):
    Image.new("L", (40, 20)).save(tmp_path / "wide.png")
    Image.new("L", (20, 20)).save(tmp_path / "black.png")
    Image.new("L", (20, 20), 255).save(tmp_path / "white.png")
    (tmp_path / "text.png").write_text("no picture")
    for what, message in {
        "middle": "mask = 'middle': no such file; otherwise give 'left', ",
        str(tmp_path / "text.png"): "not a readable picture",
        str(tmp_path / "wide.png"): "20 x 40 pixels, but the image has 32 x 32: give one of the same aspect ratio",
        str(tmp_path / "black.png"): "mask has no hole",
        str(tmp_path / "white.png"): "mask is all hole",
        (30, 0, 5, 5): r"give \(top, left, height, width\) inside the picture of 32 x 32",
        (0, 0, 0, 0): "mask has no hole",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_mask(what, (32, 32))
    with pytest.raises(ValueError, match="image = 'None': no such file"):
        make_mask("alpha", (32, 32))
    with pytest.raises(ValueError, match="all hole"):
        check_mask(torch.stack([torch.ones(1, 4, 4).tril(), torch.zeros(1, 4, 4)]))


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 90), st.integers(2, 90))
def test_any_size_fits_the_model_s_grid(h, w):
    image, mask = torch.rand(1, 3, h, w) * 2 - 1, torch.ones(1, 1, h, w)
    mask[..., : h // 2, : w // 2] = 0
    canvas, known, (height, width) = fit(image, mask, short_side=32, multiple=16)
    assert canvas.shape[2:] == known.shape[2:] and not any(n % 16 for n in canvas.shape[2:])
    assert min(height, width) == 32 and abs(width / height - w / h) <= 0.6 * max(w, h) / min(w, h) / 32
    assert canvas.abs().max() <= 1 and set(known.unique().tolist()) <= {0, 1}
    assert not known[..., height:, :].any() and not known[..., width:].any()
    assert known[..., height - 1, width - 1].all()


def test_a_picture_that_fits_is_left_alone():
    image, mask = torch.rand(2, 3, 64, 96), make_mask("left", (64, 96))
    canvas, known, size = fit(image, mask, 64, 16)
    assert torch.equal(canvas, image) and torch.equal(known, mask.expand_as(known)) and size == (64, 96)
    with pytest.raises(ValueError, match="image has 1 x 1 pixels"):
        fit(image[..., :1, :1], mask[..., :1, :1], 64, 16)
    with pytest.raises(ValueError, match="short_side = 60: give a multiple of 16"):
        fit(image, mask, 60, 16)


def test_outpainting_and_joining():
    image = torch.rand(1, 3, 8, 9)
    canvas, mask = outpaint(image, left=4, bottom=2)
    assert canvas.shape == (1, 3, 10, 13) and mask.sum() == 72 and torch.equal(canvas[..., :8, 4:], image)
    with pytest.raises(ValueError, match="not all 0"):
        outpaint(image)
    other = torch.rand(1, 3, 8, 9)
    joined, mask = join(image, other)
    assert torch.equal(joined[..., :3], image[..., :3]) and torch.equal(joined[..., -3:], other[..., -3:])
    assert mask[0, 0, 0].tolist() == [1] * 3 + [0] * 3 + [1] * 3 and not joined[..., 3:6].any()
    with pytest.raises(ValueError, match="give two of one size"):
        join(image, other[..., 1:])
    with pytest.raises(ValueError, match="known = 0.7"):
        join(image, other, 0.7)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "I;16", "LA"])
def test_pictures_of_every_kind_convert(mode, tmp_path):
    grey = np.linspace(0, 255, 64).reshape(8, 8).round().astype(np.uint8)
    picture = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    picture.save(tmp_path / "picture.png")
    image = load_image(tmp_path / "picture.png")
    assert image.shape == (1, 3, 8, 8)
    assert (image[0, 0] - (torch.from_numpy(grey) / 127.5 - 1)).abs().max() < 0.01
