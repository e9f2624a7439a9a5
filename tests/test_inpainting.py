import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse.linalg import spsolve
from torchvision.transforms.functional import gaussian_blur

from ldm.images import load_image, save_image
from ldm.inpainting import (
    blend,
    check_mask,
    fill_photo,
    fit,
    harmonic_fill,
    join,
    latent_mask,
    make_mask,
    outpaint,
    parts_around,
    seam_step,
)


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


def test_the_fill_of_a_large_image_solves_it_too():
    """Through coarser solutions, and in the window of the hole."""
    g = torch.Generator().manual_seed(0)
    values, mask = torch.randn(1, 1, 150, 140, generator=g), torch.ones(1, 1, 150, 140)
    mask[..., 20:90, 30:140], mask[..., 40:43, 50:55] = 0, 1
    filled = harmonic_fill(values, mask)
    assert torch.equal(filled * mask, values * mask)
    assert np.abs(filled[0, 0].numpy() - laplace_by_scipy(values[0, 0].numpy(), mask[0, 0].numpy() > 0)).max() < 2e-2


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


def test_a_image_that_fits_is_left_alone():
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


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
def test_masks_of_any_dtype_are_taken(dtype):
    image, mask = torch.rand(1, 3, 16, 24), make_mask("left", (16, 24))
    known = mask.to(dtype)
    assert torch.equal(latent_mask(known, 4).float(), latent_mask(mask, 4))
    assert torch.equal(check_mask(known).float(), mask)
    assert torch.equal(harmonic_fill(image, known), harmonic_fill(image, mask))
    assert torch.equal(blend(image.flip(3), image, known), blend(image.flip(3), image, mask))
    for a, b in zip(fit(image, known, 32, 16)[:2], fit(image, mask, 32, 16)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"feather": 2}, {"poisson": True}])
def test_blending_names_what_is_not_finite(options):
    image, mask = torch.zeros(1, 3, 8, 8), make_mask("left", (8, 8))
    bad = image.clone()
    bad[0, 0, 0, 7] = float("nan")
    with pytest.raises(FloatingPointError, match="the sampled image, .*, has 1 of 192 values that are NaN or infinite: .*float32"):
        blend(bad, image, mask, **options)
    with pytest.raises(FloatingPointError, match="the known image, .*, has 1 of 192 values"):
        blend(image, bad, mask, **options)


# ---- photos at their own size


def smooth(h, w):
    """A random image without a preferred direction, details of about eight pixels."""
    x = gaussian_blur(torch.randn(1, 3, h, w, generator=torch.Generator().manual_seed(0)), 25, 4.0)
    return (x / x.abs().max() * 0.8).clamp(-1, 1)


def holes(h, w, *rectangles):
    mask = torch.ones(1, 1, h, w)
    for top, left, height, width in rectangles:
        mask[..., top : top + height, left : left + width] = 0
    return mask


PHOTOS = {  # size, holes, parts
    "two holes": ((300, 400), [(40, 50, 60, 60), (220, 330, 30, 40)], 2),
    "upright, at the edge": ((500, 120), [(420, 0, 80, 40)], 1),
    "wide": ((90, 700), [(20, 300, 50, 90)], 1),
    "near each other": ((300, 400), [(100, 100, 60, 60), (100, 200, 60, 60)], 1),
    "smaller than the model": ((40, 50), [(10, 10, 20, 20)], 1),
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_come_back_at_their_own_size(name, tmp_path):
    """Known pixels bit-equal by file, no seam (to 10 %) although the model's images are brighter and smaller, and filled."""
    (h, w), rectangles, count = PHOTOS[name]
    save_image(smooth(h, w)[0], tmp_path / "photo.png")
    photo, mask, seen = load_image(tmp_path / "photo.png"), holes(h, w, *rectangles), []

    def fill(image, known):
        seen.append(image)
        assert min(image.shape[2:]) >= 64 and not any(n % 8 for n in image.shape[2:]) and (known == 0).any()
        return torch.cat([image + 0.15, image - 0.1])

    out = fill_photo(photo, mask, fill, 64, 8)
    assert out.shape == (2, 3, h, w) and len(seen) == count
    save_image(out[0], tmp_path / "filled.png")
    before, after = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("photo", "filled"))
    known = mask[0, 0].numpy() == 1
    assert np.array_equal(before[known], after[known])
    assert abs(seam_step(out, mask) / seam_step(photo, mask) - 1) < 0.1
    assert seam_step(fill_photo(photo, mask, fill, 64, 8, feather=0), mask) > 1.5
    assert (out - photo).abs().max() < 0.15  # the truth was there


def test_parts_hold_their_holes_with_context_and_never_overlap():
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        h, w = torch.randint(50, 600, (2,), generator=g).tolist()
        places = [torch.rand(4, generator=g) for _ in range(3)]
        mask = holes(h, w, *((int(p[0] * h), int(p[1] * w), int(p[2] * 60) + 1, int(p[3] * 60) + 1) for p in places))
        parts, count = parts_around(mask, 64, 0.5), torch.zeros(1, 1, h, w)
        for part in parts:
            part.of(count).add_(1)
            inside = part.of(mask)
            assert part.height >= min(64, h) and part.width >= min(64, w) and (inside == 0).any()
            assert inside.shape[2:] == (part.height, part.width)
        assert count.max() == 1 and (count[mask == 0] == 1).all()
    assert parts_around(holes(900, 900, (400, 400, 100, 100)), 64, 1.0) == [(300, 300, 300, 300)]
    assert parts_around(holes(900, 900, (400, 400, 100, 100)), 512, 1.0) == [(194, 194, 512, 512)]
    for context in (-1, float("nan")):
        with pytest.raises(ValueError, match="context = .*: give a number >= 0"):
            parts_around(holes(90, 90, (4, 4, 10, 10)), 64, context)
    with pytest.raises(ValueError, match=r"mask has shape \[1, 1, 9, 9\] and photo \[1, 3, 8, 9\]: give one of each"):
        fill_photo(torch.zeros(1, 3, 8, 9), holes(9, 9, (1, 1, 2, 2)), None, 64, 8)
    with pytest.raises(ValueError, match="mask has no hole"):
        fill_photo(torch.zeros(1, 3, 9, 9), torch.ones(1, 1, 9, 9), None, 64, 8)


def test_the_seam_is_a_step_or_none():
    image, mask = smooth(100, 120), holes(100, 120, (30, 30, 40, 50))
    assert abs(seam_step(image, mask) - 1) < 0.2
    assert seam_step(image + 0.3 * (1 - mask), mask) > 3
    flat = torch.zeros(1, 3, 100, 120)
    flat[..., 1::2] = 1  # columns of two colours: across a vertical border, along a horizontal one
    assert seam_step(flat, holes(100, 120, (0, 60, 100, 60))) > 1e6 and seam_step(flat, holes(100, 120, (50, 0, 50, 120))) < 1e-6
