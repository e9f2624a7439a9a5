"""The diffusers-style pipeline: what a diffusers user expects of it, and that it is our sampler."""

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from common import ROOT
from PIL import Image
from pipelines import build

from ldm.constraints import DecodedConstraint, latent_inpainting
from ldm.denoisers import LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.fast_sampler import fast_sampler
from ldm.images import from_uint8
from ldm.inpainting import blend, make_mask
from ldm.newton_pipeline import NewtonConstrainedPipeline
from ldm.newton_sampler import sample
from ldm.operators import downsample
from ldm.sampling import noised

PROMPTS = ["a red cat", "two dogs"]


@pytest.fixture(scope="module")
def pipe():
    return quiet(NewtonConstrainedPipeline(**build("sd").components))


@pytest.fixture(scope="module")
def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def mask():
    return Image.fromarray(np.uint8(255 * (np.arange(16) >= 8))[None].repeat(16, 0))  # the right half is to be filled in


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


FAST = dict(num_inference_steps=3, newton_steps=1, h=0.05)


def test_it_is_the_library_s_sampler(pipe, photo, mask):
    out = pipe(PROMPTS, photo, mask, generator=seeds(3, 4), output_type="latent", negative_prompt="ugly", **FAST)
    model = from_diffusers(pipe.plain_pipeline())
    image = from_uint8(photo).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    constraint = latent_inpainting(model, image, make_mask("right", (16, 16)))
    D = LatentDenoiser(model, PROMPTS, 3.0, "ugly")
    state = sample(D, constraint, constraint.y.shape, [3, 4], steps=3, newton_steps=1, h=0.05)
    assert torch.allclose(out.images, state.x_t, atol=1e-3, rtol=1e-3)  # 1/h magnifies the rounding of the photo's conversion
    decoded = pipe(PROMPTS, photo, mask, generator=seeds(3, 4), output_type="pt", negative_prompt="ugly", **FAST).images
    with torch.no_grad():
        expected = blend(model.decode(state.x_t).clamp(-1, 1), image, make_mask("right", (16, 16)), poisson=True)
    assert torch.allclose(decoded, expected / 2 + 0.5, atol=1e-4)


def test_the_faster_solver(pipe, photo, mask):
    """The library's, with its own eta, from noise by diffusers' generators."""
    image = from_uint8(photo).permute(2, 0, 1)[None].expand(2, -1, -1, -1)
    model = from_diffusers(pipe.plain_pipeline())
    constraint = latent_inpainting(model, image, make_mask("right", (16, 16)))
    out = pipe(PROMPTS, constraint=lambda _: constraint, generator=seeds(3, 4), output_type="latent", method="fast",
               num_inference_steps=4)  # fmt: skip
    *_, state = fast_sampler(LatentDenoiser(model, PROMPTS, 3.0), constraint, constraint.y.shape, [3, 4], steps=4)
    assert torch.equal(out.images, state.x_t)
    known = pipe("a cat", photo, mask, generator=seeds(3), method="fast", num_inference_steps=3).images[0]
    assert np.array_equal(np.asarray(known)[:, :8], np.asarray(photo)[:, :8])


def test_noise(pipe, photo, mask):
    """`latents` are what is started from, later noise (eta) comes from the generator, one for all or a list."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    options = dict(image=photo, mask_image=mask, output_type="latent", eta=1.0, **FAST)
    generator = torch.Generator().manual_seed(5)
    expected = pipe("a cat", generator=generator, **options).images
    later = torch.Generator().manual_seed(5)
    torch.randn(1, 4, 8, 8, generator=later)
    kept = x.clone()
    assert torch.equal(pipe("a cat", latents=x, generator=later, **options).images, expected) and torch.equal(x, kept)
    assert torch.equal(pipe("a cat", generator=seeds(5), **options).images, expected)
    assert not torch.equal(pipe("a cat", generator=seeds(6), **options).images, expected)


@pytest.mark.parametrize("kind, cls", [("pil", list), ("np", np.ndarray), ("pt", torch.Tensor), ("latent", torch.Tensor)])
def test_output_types(kind, cls, pipe, photo, mask):
    images = pipe(PROMPTS, photo, mask, generator=seeds(0, 1), output_type=kind, **FAST).images
    assert isinstance(images, cls) and len(images) == 2
    shape = {"np": (2, 16, 16, 3), "pt": (2, 3, 16, 16), "latent": (2, 4, 8, 8)}
    if kind == "pil":
        assert all(isinstance(image, Image.Image) and image.size == (16, 16) for image in images)
    else:
        assert tuple(images.shape) == shape[kind]


@pytest.mark.parametrize("seam", ["poisson", 0])
def test_known_pixels_are_exact(seam, pipe, photo, mask):
    result = pipe("a cat", photo, mask, generator=seeds(0), seam=seam, **FAST).images[0]
    assert isinstance(result, Image.Image) and result.size == photo.size
    assert np.array_equal(np.asarray(result)[:, :8], np.asarray(photo)[:, :8])
    assert not np.array_equal(np.asarray(result)[:, 8:], np.asarray(photo)[:, 8:])


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_every_family(family, photo, mask):
    """Constrained; and without inner steps what diffusers' own pipeline makes of the same noise."""
    own = build(family)
    pipe = quiet(NewtonConstrainedPipeline(**own.components))
    result = pipe("a cat", photo, mask, generator=seeds(0), **FAST).images[0]
    assert np.array_equal(np.asarray(result)[:, :8], np.asarray(photo)[:, :8])
    guidance = dict(guidance_scale=3.5, true_cfg_scale=2.0) if family == "flux" else dict(guidance_scale=2.0)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    same = dict(height=16, width=16, num_inference_steps=3, output_type="pt", negative_prompt="ugly", **guidance)
    free = pipe("a cat", newton_steps=0, latents=x, **same).images
    theirs = own("a cat", latents=own._pack_latents(x, *x.shape) if family == "flux" else x.clone(), **same).images
    assert (free - theirs).abs().max() < 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    build("sd").save_pretrained(path)
    return path


def test_loads_from_a_folder_and_as_a_custom_pipeline(folder, photo, mask, pipe, tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path))  # where the file is copied to
    custom = diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=str(ROOT / "ldm/newton_pipeline.py"), trust_remote_code=True)  # fmt: skip
    assert type(custom).__name__ == "NewtonConstrainedPipeline" and type(custom).__module__ != NewtonConstrainedPipeline.__module__
    named = NewtonConstrainedPipeline.from_pretrained(folder)
    expected = pipe("a cat", photo, mask, generator=seeds(0), output_type="np", **FAST).images
    for loaded in (custom, named):
        result = quiet(loaded)("a cat", photo, mask, generator=seeds(0), output_type="np", **FAST).images
        assert result.shape == (1, 16, 16, 3) and np.allclose(result, expected, atol=1e-4)
    named.save_pretrained(tmp_path / "again")
    assert "NewtonConstrainedPipeline" in Path(tmp_path / "again/model_index.json").read_text()


def test_batches_and_generators(pipe, photo, mask):
    both = pipe(PROMPTS, photo, mask, generator=seeds(3, 4), output_type="pt", **FAST).images
    alone = pipe(PROMPTS[1], [photo], mask, generator=seeds(4), output_type="pt", **FAST).images
    assert (both[1] - alone[0]).abs().max() < 1e-3
    twice = pipe(PROMPTS, photo, mask, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **FAST).images
    assert len(twice) == 4
    assert len(pipe("a cat", [photo, photo], mask, generator=torch.Generator().manual_seed(0), **FAST).images) == 2
    assert isinstance(pipe("a cat", photo, mask, return_dict=False, **FAST), tuple)


def test_callbacks_see_and_change_the_latents(pipe, photo, mask):
    seen = []

    def watch(own, i, t, values):
        assert own is pipe and set(values) == {"latents", "x0"}
        seen.append((i, float(t)))
        return {"latents": torch.zeros_like(values["latents"])} if i == 2 else values

    watched = dict(callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["latents", "x0"], output_type="latent")
    out = pipe("a cat", photo, mask, **watched, **FAST)
    assert [t for _, t in seen] == [999, 666, 332] and pipe.num_timesteps == 3 and not out.images.any()
    free = dict(num_inference_steps=4, newton_steps=0, latents=torch.ones(1, 4, 8, 8), output_type="latent")
    changed, steps = [], []

    def change(own, i, t, values):
        changed.append(values["latents"].clone())
        return {"latents": values["latents"] + 1.0} if i == 1 else {}

    result = pipe("a cat", height=16, width=16, callback_on_step_end=change, **free).images
    other = pipe("a cat", height=16, width=16, callback_on_step_end=lambda own, i, t, v: steps.append(v["latents"].clone()) or v,
                 **free).images  # fmt: skip
    assert torch.equal(changed[1], steps[1]) and not torch.allclose(changed[2], steps[2], atol=1e-2)  # it went on from there
    assert not torch.allclose(result, other, atol=1e-2)

    def stop(own, i, t, values):
        own._interrupt = i == 0
        seen.append(i)
        return {}

    seen.clear()
    pipe("a cat", photo, mask, callback_on_step_end=stop, **FAST)
    assert seen == [0]


def test_a_progress_bar_is_shown(pipe, photo, mask, capsys):
    pipe.set_progress_bar_config(disable=False)
    pipe("a cat", photo, mask, **FAST)
    quiet(pipe)
    assert "3/3" in capsys.readouterr().err


def test_any_other_constraint(pipe):
    """Super-resolution: a function that makes the constraint of the model."""
    y = torch.zeros(1, 3, 8, 8)
    options = dict(generator=seeds(0), output_type="latent", **FAST)
    free = pipe("a cat", **{**options, "newton_steps": 0}).images
    made = pipe("a cat", constraint=lambda model: DecodedConstraint(model.decode, downsample((16, 16), 2), y),
                **{**options, "generator": seeds(0)}).images  # fmt: skip
    assert made.shape == (1, 4, 8, 8) and not torch.allclose(made, free, atol=1e-2)


def test_sizes(pipe, photo, mask):
    wide, wide_mask = photo.resize((27, 17)), mask.resize((27, 17))
    assert pipe("a cat", wide, wide_mask, **FAST).images[0].size == (24, 16)  # rounded down to multiples of 4
    assert pipe("a cat", photo, mask, height=24, width=32, **FAST).images[0].size == (32, 24)


def test_images_and_masks_are_read_as_everywhere(pipe, photo, mask, tmp_path):
    """Files and PIL images upright and on white; arrays and tensors of a mask of any dtype and number of channels."""
    turned, exif = photo.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    read = lambda image, mask_image: pipe.read_inputs(image, mask_image, None, None, 4)  # noqa: E731
    image, known = read(photo, mask)
    assert torch.equal(known, make_mask("right", (16, 16)))
    for source in (
        tmp_path / "turned.png",
        Image.open(tmp_path / "turned.png"),
        np.asarray(photo),
        np.asarray(photo) / np.float32(255),
    ):
        assert (read(source, mask)[0] - image).abs().max() < 1e-6
    clear = photo.convert("RGBA")
    clear.putalpha(Image.fromarray(255 - np.asarray(mask)))
    on_white, hole = read(clear, clear)
    assert torch.equal(on_white[..., :8], image[..., :8]) and (on_white[..., 8:] == 1).all() and torch.equal(hole, known)
    array = np.asarray(mask)
    for same in (array, array > 0, array // 255, array / 255, np.stack([array] * 3, 2), array[None, ..., None], array[None],
                 torch.tensor(array > 0), torch.tensor(array), torch.tensor(array / 255)[None, None],
                 torch.tensor(array > 0)[None].expand(3, -1, -1), mask.resize((8, 8), 0), mask.convert("P")):  # fmt: skip
        assert torch.equal(read(photo, same)[1], known)
    assert torch.equal(read([photo] * 2, torch.tensor(array > 0)[None].expand(2, -1, -1))[1], known.expand(2, -1, -1, -1))
    assert torch.equal(read(photo, [mask, array > 0])[1], known.expand(2, -1, -1, -1))


def test_a_photo_comes_back_at_its_own_size(pipe):
    """Two holes, two prompts, a shape that is no square: known pixels bit-equal; each hole at the model's size, 16 pixels."""
    photo = Image.effect_noise((90, 61), 60).convert("RGB")
    hole = np.zeros((61, 90), np.uint8)
    hole[5:15, 10:20], hole[40:55, 60:90] = 255, 255
    seen = []
    watch = lambda pipe, step, t, tensors: seen.append(tensors["latents"].shape) or tensors  # noqa: E731
    out = pipe(PROMPTS, photo, Image.fromarray(hole), context=0.5, generator=seeds(0, 1), callback_on_step_end=watch, **FAST).images
    assert [image.size for image in out] == [(90, 61)] * 2 and seen[0] == (2, 4, 8, 8) and len(seen) == 6
    for image in out:
        before, after = np.asarray(photo), np.asarray(image)
        assert np.array_equal(before[hole == 0], after[hole == 0]) and (before[hole > 0] != after[hole > 0]).mean() > 0.9
    with pytest.raises(ValueError, match="context = 0.5: leave out constraint and latents as output"):
        pipe("a cat", photo, Image.fromarray(hole), context=0.5, output_type="latent", **FAST)
    with pytest.raises(ValueError, match="context = 0.5 with several images or masks: give one of each"):
        pipe("a cat", [photo] * 2, Image.fromarray(hole), context=0.5, **FAST)


def test_editing_with_a_strength(pipe, photo, mask):
    """Without a mask the whole image, with one its hole; the less, the nearer to the image."""
    model = from_diffusers(pipe.plain_pipeline())
    with torch.no_grad():
        z = model.encode(from_uint8(photo).permute(2, 0, 1)[None])
    options = dict(output_type="latent", num_inference_steps=10, newton_steps=0, guidance_scale=1.0)
    out = [pipe("a cat", photo, strength=s, generator=seeds(3), **options).images for s in (0.002, 0.1, 0.5)]
    distances = [(x - z).square().mean().sqrt().item() for x in out]
    assert distances == sorted(distances) and distances[0] < 0.1
    start = noised(LatentDenoiser(model, ["a cat"]), z, 0.5, [3])
    own = sample(LatentDenoiser(model, ["a cat"]), None, z.shape, [3], 10, start=start)
    assert torch.allclose(out[2], own.x_t, atol=1e-4)
    result = pipe("a cat", photo, mask, strength=0.5, generator=seeds(3), **FAST).images[0]
    assert np.array_equal(np.asarray(result)[:, :8], np.asarray(photo)[:, :8])
    with pytest.raises(ValueError, match="strength = 0.5 without an image"):
        pipe("a cat", strength=0.5, newton_steps=0)
    with pytest.raises(ValueError, match="strength = 0: give a number above 0"):
        pipe("a cat", photo, mask, strength=0, **FAST)


@pytest.mark.parametrize("method", ["newton", "fast"])
def test_a_soft_mask_keeps_by_its_weights(pipe, photo, method):
    """As the library's; what is black in the mask stays bit-equal."""
    grey = np.zeros((16, 16), np.uint8)
    grey[:, 6:], grey[:, 10:] = 100, 255
    options = dict(generator=seeds(3), method=method, num_inference_steps=3, **({"newton_steps": 1} if method == "newton" else {}))
    soft, hard = (pipe("a cat", photo, Image.fromarray(grey), soft=s, **options).images[0] for s in (True, False))
    before, soft, hard = (np.asarray(x) for x in (photo, soft, hard))
    assert np.array_equal(before[:, :6], soft[:, :6]) and np.array_equal(before[:, :6], hard[:, :6])
    assert not np.array_equal(soft, hard)


def test_half_precision_and_the_safety_checker(photo, mask):
    class Features:
        pixel_values = torch.zeros(2, 3, 8, 8)

        def __call__(self, images, return_tensors):
            return self

        def to(self, device):
            return self

    own = build("sd")
    only_the_second = lambda images, clip_input: (images * torch.tensor([0.0, 1.0]).view(2, 1, 1, 1), [True, False])  # noqa: E731
    own.register_modules(safety_checker=only_the_second, feature_extractor=Features())
    pipe = quiet(NewtonConstrainedPipeline(**own.components)).to(torch.bfloat16)
    black, result = pipe(PROMPTS, photo, mask, generator=seeds(0, 1), num_inference_steps=2, newton_steps=1).images
    assert not np.asarray(black).any()
    assert np.array_equal(np.asarray(result)[:, :8], np.asarray(photo)[:, :8])


def test_wrong_arguments_are_one_sentence(pipe, photo, mask):
    for arguments, message in [
        (dict(image=photo), "mask_image is missing"), (dict(mask_image=mask), "image is missing"),
        (dict(image=photo, mask_image=mask.resize((8, 16))), "mask_image has 16 x 8 pixels, but the image has 16 x 16"),
        (dict(image="nowhere.png", mask_image=mask), "image = 'nowhere.png': no such file"),
        (dict(image=photo, mask_image="nowhere.png"), "mask_image = 'nowhere.png': no such file"),
        (dict(image=photo, mask_image=Image.new("L", (16, 16))), "mask has no hole"),
        (dict(image=photo, mask_image=mask, constraint=print), "constraint was given next to"),
        (dict(image=[photo] * 3, mask_image=mask, prompt=PROMPTS), "prompt has 2 entries where another argument has 3"),
        (dict(image=photo, mask_image=mask, latents=torch.zeros(1, 4, 4, 4)), r"latents have shape \[1, 4, 4, 4\]"),
        (dict(image=photo, mask_image=mask, generator=seeds(0, 1)), "generator is a list of 2"),
        (dict(image=photo, mask_image=mask, newton_steps=-1), "newton_steps = -1"),
        (dict(image=photo, mask_image=mask, lr=0.0), "lr = 0.0"), (dict(image=photo, mask_image=mask, h=0.0), "h = 0.0"),
        (dict(image=photo, mask_image=mask, eta=2), "eta = 2"),
        (dict(image=photo, mask_image=mask, method="ddim"), "method = 'ddim': known are 'newton', 'fast'"),
        (dict(image=photo, mask_image=mask, prompt=3), "prompt = 3: give a string"),
        (dict(), "image is missing: give image and mask_image, or constraint"),
        (dict(image=photo, mask_image=mask, callback_on_step_end_tensor_inputs=["noise"]), "tensor_inputs has"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            pipe(**{"prompt": "a cat", **arguments})
    components = build("sd").components
    with pytest.raises(ValueError, match="EDMEulerScheduler is not supported"):
        NewtonConstrainedPipeline(**{**components, "scheduler": diffusers.EDMEulerScheduler()})
    with pytest.raises(ValueError, match="the network is PixArtTransformer2DModel; known are"):
        NewtonConstrainedPipeline(components["vae"], components["scheduler"],
                                  transformer=diffusers.PixArtTransformer2DModel(num_layers=1))  # fmt: skip
