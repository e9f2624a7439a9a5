"""Diffusers' own means against short memory stay in force through our adapter: weights that come and go, attention in slices."""

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from PIL import Image
from pipelines import PROMPTS, build, denoiser

from ldm.constraints import DecodedConstraint, EncoderConstraint
from ldm.diffusers_models import from_diffusers
from ldm.inpainting import make_mask
from ldm.newton_pipeline import NewtonConstrainedPipeline
from ldm.newton_sampler import sample
from ldm.operators import Mask

OPTIONS = dict(steps=2, newton_steps=1, h=0.1)


def inpainted(model, device="cpu"):
    """Constrained by decoded pixels, so that U-Net and decoder take turns, and the decoder's gradient is needed."""
    images = 0.5 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(device)
    A = Mask(make_mask("right", (16, 16)).to(device))
    constraint = DecodedConstraint(model.decode, A, A(images))
    shape = model.encode(images).shape
    return sample(denoiser(model), constraint, shape, [0, 1], device=device, **OPTIONS).x_t


def offload(pipe, kind):
    """As enable_model_cpu_offload and enable_sequential_cpu_offload do it, with the CPU as the device of the computation."""
    if kind == "model":
        return pipe.enable_model_cpu_offload(device="cpu")
    for module in pipe.components.values():  # "cpu:0", to which diffusers turns "cpu", is more than accelerate's hooks can take
        if isinstance(module, torch.nn.Module):
            cpu_offload(module, "cpu", offload_buffers=len(module._parameters) > 0)


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_weights(kind, family):
    """Sequential offloading leaves no weights behind: they are on the device "meta" before and after."""
    pipe = build(family)
    expected = inpainted(from_diffusers(pipe, size=(16, 16)))
    offload(pipe, kind)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    meta = [p.device.type for p in network.parameters()].count("meta")
    assert hasattr(network, "_hf_hook") and (meta > 0) == (kind == "sequential")
    model = from_diffusers(pipe, size=(16, 16))
    assert model.device.type == "cpu" and torch.allclose(inpainted(model), expected, atol=1e-5)
    assert [p.device.type for p in network.parameters()].count("meta") == meta


class Moved(ModelHook):
    """What offloading does to the weights when it takes them to another device: new tensors, made where the call is."""

    def pre_forward(self, module, *args, **kwargs):
        for p in module.parameters():
            p.data = p.data.clone()
        return args, kwargs


def test_weights_that_arrive_within_inference_mode_can_be_differentiated_later():
    pipe = build("sd")
    for module in (pipe.vae, pipe.unet):
        add_hook_to_module(module, Moved())
    model = from_diffusers(pipe)
    images, A = torch.zeros(2, 3, 16, 16), Mask(make_mask("right", (16, 16)))
    vae = EncoderConstraint(model.decode, model.encode, A, A(images))
    sample(denoiser(model), vae, (2, 4, 8, 8), [0, 1], **OPTIONS)  # in inference mode from beginning to end
    parameters = [*pipe.vae.parameters(), *pipe.unet.parameters()]
    assert not any(p.is_inference() for p in parameters)
    add_hook_to_module(pipe.vae, ModelHook())  # the weights stay as they are now
    gradient, _ = DecodedConstraint(model.decode, A, A(images))(torch.zeros(2, 4, 8, 8))
    assert gradient.abs().max() > 0


def test_attention_in_slices_changes_nothing():
    pipe = build("sd")
    expected = inpainted(from_diffusers(pipe))
    pipe.enable_attention_slicing("max")
    assert any("Sliced" in type(p).__name__ for p in pipe.unet.attn_processors.values())
    torch.testing.assert_close(inpainted(from_diffusers(pipe)), expected, atol=1e-3, rtol=1e-3)


def newton_images(pipe):
    photo = Image.fromarray(np.uint8(np.arange(256 * 3).reshape(16, 16, 3) % 256))
    mask = Image.fromarray(np.uint8(255 * (np.arange(16) >= 8))[None].repeat(16, 0))
    generator = [torch.Generator().manual_seed(n) for n in (0, 1)]
    return pipe(PROMPTS, photo, mask, generator=generator, num_inference_steps=2, newton_steps=1, h=0.1, output_type="pt").images


@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_the_pipeline_itself_offloaded(kind):
    pipe = NewtonConstrainedPipeline(**build("sd").components)
    pipe.set_progress_bar_config(disable=True)
    expected = newton_images(pipe)
    offload(pipe, kind)
    for _ in range(2):  # the hooks are there again after the first call
        assert torch.allclose(newton_images(pipe), expected, atol=1e-4)
    assert hasattr(pipe.unet, "_hf_hook")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_offloaded_weights_on_a_gpu(kind, family):
    """The real thing: computed on the GPU, weights on the CPU (sequential: nowhere) before and after."""
    pipe = build(family)
    expected = inpainted(from_diffusers(pipe, size=(16, 16)))
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    model = from_diffusers(pipe, size=(16, 16))
    assert model.device.type == "cuda"
    for _ in range(2):
        x = inpainted(model, model.device)
        assert x.device.type == "cuda" and torch.allclose(x.cpu(), expected, atol=1e-2)
    vae = EncoderConstraint(model.decode, model.encode, Mask(make_mask("right", (16, 16)).cuda()), torch.zeros(2, 3, 16, 16).cuda())
    sample(denoiser(model), vae, x.shape, [0, 1], device=model.device, **OPTIONS)
    assert torch.allclose(inpainted(model, model.device), x, atol=1e-3)
    pipe.maybe_free_model_hooks()
    assert {p.device.type for p in pipe.vae.parameters()} == {"cpu" if kind == "model" else "meta"}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_the_pipeline_itself_offloaded_on_a_gpu(kind):
    pipe = NewtonConstrainedPipeline(**build("sd").components)
    pipe.set_progress_bar_config(disable=True)
    expected = newton_images(pipe)
    getattr(pipe, f"enable_{kind}_cpu_offload")()
    for _ in range(2):
        assert torch.allclose(newton_images(pipe).cpu(), expected.cpu(), atol=1e-2)
    assert next(pipe.unet.parameters()).device.type != "cuda"
