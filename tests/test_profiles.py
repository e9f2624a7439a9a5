"""The settings that follow from the model and the task, and those that the user sets instead."""

import pytest
import torch
from common import ROOT, randomised
from PIL import Image
from pipelines import build

from ldm import profiles
from ldm.checkpoints import load_model
from ldm.data.examples import examples
from ldm.denoisers import Denoiser, LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.images import load_image
from ldm.newton_sampler import PAPER, newton_sampler, sample, step_lengths
from ldm.profiles import KINDS, OWN, denoiser, kind_of, profile
from ldm.util import instantiate_from_config, load_config


@pytest.fixture(scope="module")
def tiny():
    return load_model("tiny", device="cpu")


def of_config(name):
    with torch.device("meta"):
        return instantiate_from_config(load_config(ROOT / f"configs/{name}.yaml").model)


@pytest.mark.parametrize("name, kind, size", [
    ("stable-diffusion/v1-inference", "sd-v1", 512), ("stable-diffusion/v2-inference", "sd-v2", 512),
    ("stable-diffusion/v2-inference-v", "sd-v2", 768), ("tiny/unet", "tiny", 64), ("tiny/flow", "tiny-flow", 64),
    ("latent-diffusion/ffhq-ldm-vq-4", "ldm", 256), ("latent-diffusion/cin256-v2", "ldm", 256), ("adm/ffhq-256", "pixels", 256),
    ("adm/imagenet-64-classes", "pixels", 64), ("mnist/unet", "mnist", 32),
])  # fmt: skip
def test_the_kind_follows_from_the_model(name, kind, size):
    model = of_config(name)
    assert kind_of(model) == kind and profile(model, "inpainting").size == size


@pytest.mark.parametrize("family, kind", [("pixels", "pixels"), ("sd", "sd-v1"), ("sdxl", "sdxl"), ("sd3", "sd3"), ("flux", "flux"),
                                          ("instaflow", "sd-v1")])  # fmt: skip
def test_the_kind_of_a_pipeline(family, kind, monkeypatch):
    model = from_diffusers(build(family))
    small = {"pixels": "pixels", "sd3": "tiny-flow", "flux": "flux", "instaflow": "tiny-flow"}.get(family, "tiny")
    assert kind_of(model) == small
    monkeypatch.setattr(profiles, "SMALL", 0)
    assert kind_of(model) == kind
    assert profile(model, "style").eta == (0.0 if model.parameterization == "velocity" else "paper")


@pytest.mark.parametrize("task", PAPER)
def test_stable_diffusion_gets_the_paper_s_settings(task):
    p = profile(of_config("stable-diffusion/v1-inference"), task)
    assert p.sampler == {name: value for name, value in PAPER[task].items() if name != "h"}
    assert p.clip == "openai" and p.block == 2
    if task == "style":
        assert p.guidance == 3.0 and len(p.prompts) == len(p.seeds) == len(KINDS["sd-v1"].subjects)
    else:
        assert p.prompts == [""] and p.seeds == [0]


def test_what_the_user_sets_wins(tiny):
    p = profile(tiny, "style", "a cat", 7, lr="0.5, 0.2", eta=0.5, steps=3, newton_steps=None, guidance=1.0, block=1, clip="openai")
    assert (p.prompts, p.seeds) == (["a cat"] * KINDS["tiny"].samples, [7, 8, 9, 10])
    assert p.sampler == dict(steps=3, newton_steps=PAPER["style"]["newton_steps"], lr=(0.5, 0.2), eta=0.5)
    assert (p.guidance, p.clip, p.block) == (1.0, "openai", 1)
    assert profile(tiny, "inpainting", ["a", "b"], count=6).prompts == ["a"] * 3 + ["b"] * 3


def test_own_settings_are_those_of_known_kinds_and_tasks(tiny):
    assert all(kind in KINDS and task in PAPER for kind, task in OWN)
    own = profile(tiny, "style")
    assert (own.lr, own.free, own.enough) == tuple(OWN["tiny", "style"].values())
    assert profile(tiny, "style", free=0).free == profile(tiny, "inpainting").free == 0
    with pytest.raises(ValueError, match="enough = 1: give a fraction, from 0 to less than 1"):
        profile(tiny, "style", enough=1)
    assert all(step_lengths(own["lr"], 5) for own in OWN.values() if "lr" in own)


def test_errors_name_what_is_wrong(tiny):
    with pytest.raises(ValueError, match="task = 'inpaint': known are 'inpainting'"):
        profile(tiny, "inpaint")
    with pytest.raises(ValueError, match="length: a profile has batch, guidance, steps"):
        profile(tiny, "inpainting", length=0.1)
    with pytest.raises(ValueError, match="eta = 'papers'"):
        profile(tiny, "inpainting", eta="papers")


def test_a_denoiser_of_every_model(tiny):
    assert type(denoiser(tiny, ["a cat"], 3.0)) is LatentDenoiser
    model = randomised(instantiate_from_config(load_config(ROOT / "configs/mnist/unet.yaml").model))
    p = profile(model, "inpainting", count=2)
    D = denoiser(model, p.prompts, p.guidance)
    assert type(D) is Denoiser
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = Denoiser(model.network, model.schedule, model.parameterization)(x, 500)
    assert torch.equal(D(x, 500), expected)
    assert torch.equal(model.decode(model.encode(x)), x)
    with pytest.raises(ValueError, match="prompts = 'a cat': this model is unconditional"):
        denoiser(model, "a cat")
    assert sample(D, None, x.shape, p.seeds, sampler=newton_sampler, **p.sampler | dict(steps=1)).x_t.shape == x.shape


def test_words_of_examples_are_the_default_prompts(tiny):
    images, words = examples(tiny, "inpainting")
    assert len(images) == len(words) == 8 and images.shape[1:] == (3, 64, 64)
    assert profile(tiny, "inpainting", words=words).prompts == words
    assert profile(tiny, "inpainting", seeds=[5, 3], words=words).prompts == words[:2]
    p = profile(tiny, "inpainting", "a cat", words=words, batch=3)
    assert p.prompts == ["a cat"] * 8 and [len(p.seeds[part]) for part in p.parts] == [3, 3, 2]


@pytest.mark.parametrize("task, n", [("inpainting", 1), ("super-resolution", 1), ("style", 1), ("restyling", 1), ("set", 3),
                                     ("joining", 2)])  # fmt: skip
def test_large_models_get_photographs(task, n):
    images, words = examples(of_config("latent-diffusion/ffhq-ldm-vq-4"), task)
    assert images.shape == (n, 3, 256, 256) and len(words) == n and 0.1 < images.std() < 1


def test_one_s_own_image_is_cropped_not_squashed(tiny):
    own = Image.effect_noise((100, 80), 60)
    image, words = examples(tiny, "super-resolution", own)
    expected = load_image(own.crop((10, 0, 90, 80)), (64, 64))
    assert torch.allclose(image[..., 4:-4], expected[..., 4:-4], atol=0.02) and words == [""]  # without the filter's reach
    assert examples(tiny, "inpainting", own)[0].shape == (1, 3, 80, 100)
    left, right = examples(tiny, "joining", own)[0]
    assert torch.equal(left, right.flip(2))
    with pytest.raises(ValueError, match="task = 'convergence': known are 'inpainting'"):
        examples(tiny, "convergence")
