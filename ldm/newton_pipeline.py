"""A diffusers pipeline that inpaints by inexact Newton steps, with any text-to-image model: forward passes only, no training.

    from ldm.newton_pipeline import NewtonConstrainedPipeline
    pipe = NewtonConstrainedPipeline.from_pretrained("path or hub name")
    image = pipe("a mountain lake", image=photo, mask_image=mask).images[0]     # white in the mask: to be filled in

or `DiffusionPipeline.from_pretrained(..., custom_pipeline="ldm/newton_pipeline.py", trust_remote_code=True)`, or around a pipeline
that is loaded already, `NewtonConstrainedPipeline(**pipe.components)`. The sampler, the constraints and the models' adapters are
those of this repository, which has to be installed (pip install -e .).
"""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import (
    DiffusionPipeline,
    FluxPipeline,
    ImagePipelineOutput,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from ldm.constraints import latent_inpainting
from ldm.denoisers import LatentDenoiser
from ldm.diffusers_models import from_diffusers
from ldm.fast_sampler import fast_sampler
from ldm.images import on_white, open_image
from ldm.inpainting import blend, fill_photo
from ldm.masks import check_mask, read_mask, resize_mask
from ldm.newton_sampler import newton_sampler
from ldm.sampling import States, noised

SAMPLERS: dict[str, Callable[..., States]] = {"newton": newton_sampler, "fast": fast_sampler}


class NewtonConstrainedPipeline(DiffusionPipeline):
    """Components as in StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline or FluxPipeline; which of them
    it is follows from the network. The scheduler gives the noise levels; the steps are DDIM's or Euler's, whatever its solver."""

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"
    _optional_components = ["unet", "transformer", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
                            "tokenizer_3", "safety_checker", "feature_extractor", "image_encoder"]  # fmt: skip
    _exclude_from_cpu_offload = ["safety_checker"]
    _callback_tensor_inputs = ["latents", "x0"]

    def __init__(self, vae: Any, scheduler: Any, unet: Any = None, transformer: Any = None, text_encoder: Any = None,
                 tokenizer: Any = None, text_encoder_2: Any = None, tokenizer_2: Any = None, text_encoder_3: Any = None,
                 tokenizer_3: Any = None, safety_checker: Any = None, feature_extractor: Any = None, image_encoder: Any = None,
                 force_zeros_for_empty_prompt: bool = True):  # fmt: skip
        super().__init__()
        self.register_modules(
            vae=vae, scheduler=scheduler, unet=unet, transformer=transformer, text_encoder=text_encoder, tokenizer=tokenizer,
            text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
            safety_checker=safety_checker, feature_extractor=feature_extractor, image_encoder=image_encoder)  # fmt: skip
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        from_diffusers(self.plain_pipeline())  # refuses at once what cannot be sampled

    def plain_pipeline(self) -> DiffusionPipeline:
        """Diffusers' own pipeline of these components."""
        network = type(self.unet if self.transformer is None else self.transformer).__name__
        names, options = ["vae", "scheduler", "text_encoder", "tokenizer"], {}
        if network == "UNet2DConditionModel" and self.text_encoder_2 is None:
            cls, names = StableDiffusionPipeline, [*names, "unet", "safety_checker", "feature_extractor"]
            options = {"requires_safety_checker": False}
        elif network == "UNet2DConditionModel":
            cls, names = StableDiffusionXLPipeline, [*names, "unet", "text_encoder_2", "tokenizer_2"]
            options = {"force_zeros_for_empty_prompt": self.config.force_zeros_for_empty_prompt, "add_watermarker": False}
        elif network == "SD3Transformer2DModel":
            cls = StableDiffusion3Pipeline
            names = [*names, "transformer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
        elif network == "FluxTransformer2DModel":
            cls, names = FluxPipeline, [*names, "transformer", "text_encoder_2", "tokenizer_2"]
        else:
            raise ValueError(
                f"the network is {network}; known are UNet2DConditionModel, SD3Transformer2DModel and FluxTransformer2DModel"
            )
        return cls(**{name: self.components[name] for name in names}, **options)

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt` ends the sampling after its step."""
        return self._interrupt

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,                          # PIL images, paths, arrays or tensors in 0 .. 1: one for all, or a list
        mask_image: Any = None,                     # white (1): to be filled in, black (0): kept
        height: int | None = None,                  # in pixels; None: the image's, rounded down to what the network takes
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,                # classifier-free guidance s, at any value; of Flux the scale that is its input
        true_cfg_scale: float = 1.0,                # of Flux: classifier-free guidance s
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        method: str = "newton",                     # "newton": the paper's loop (ldm.newton_sampler), or "fast": ours
        newton_steps: int = 5,                      # newton: inner steps at each diffusion step, 2 evaluations each; 0: none
        lr: float | tuple[float, float] = (0.5, 0.1),  # newton: their length in |.|_inf, or (first, last) of each diffusion step
        h: float | None = None,                     # finite-difference length; None: by the network's arithmetic
        eta: float | str | None = None,             # 0: DDIM, 1: ancestral noise; None: the method's own default
        seam: str | float = "poisson",              # known pixels are kept bit-equal; or a width in pixels to mix over, 0: none
        strength: float = 1.0,                      # of editing: begin at the image with noise (ldm.sampling.noised)
        context: float | None = None,               # fill what is around holes with this margin (ldm.inpainting.fill_photo)
        soft: bool = False,                         # grey values of the mask stay, as weights (ldm.operators.Mask)
        constraint: Callable | None = None,         # instead of image and mask: a function model -> constraint (ldm/constraints.py)
        generator: Any = None,                      # one torch.Generator, or a list of one per image
        latents: Tensor | None = None,              # the noise to start from [B, channels, h, w]
        output_type: str = "pil",                   # "pil", "np", "pt" or "latent"
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,  # (pipe, step, t, {"latents": ...}) -> dict, where other latents may stand
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:  # fmt: skip
        """Images whose known part is the image's: ImagePipelineOutput with `.images`, or a tuple. With a strength below 1 and no
        mask, the whole image is edited. With `context` the image comes back at its own size. ValueError for what does not fit."""
        given = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        if method == "paper":
            warnings.warn('method = "paper" is now "newton"', DeprecationWarning, stacklevel=2)
            method = "newton"
        if method not in SAMPLERS:
            raise ValueError(f"method = {method!r}: known are {', '.join(map(repr, SAMPLERS))}")
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(f"callback_on_step_end_tensor_inputs has {sorted(unknown)}: known are {self._callback_tensor_inputs}")
        if context is not None:
            return self.at_own_size(**given)
        plain, device = self.plain_pipeline(), self._execution_device

        # What is asked for: images, masks and prompts, a row of each for every result.
        images = masks = None
        if constraint is not None and (image is not None or mask_image is not None):
            raise ValueError("constraint was given next to image or mask_image: give either")
        if constraint is None and (image is not None or newton_steps != 0 or method == "fast"):
            own = from_diffusers(plain)
            multiple = own.downsampling * own.multiple
            images, masks = self.read_inputs(image, mask_image, height, width, multiple, soft, whole=strength < 1)
            height, width = images.shape[2:]
        size = None if height is None or width is None else (height, width)
        model: Any = from_diffusers(plain, size=size)
        prompt, negative_prompt, images, masks = self.as_batch(num_images_per_prompt, prompt, negative_prompt, images, masks)
        noise = self.read_noise((len(prompt), model.channels, *model.latent_size), generator, latents, device)

        # The denoiser and the constraint.
        if isinstance(plain, FluxPipeline):
            model.embedded_guidance, guidance_scale = guidance_scale, true_cfg_scale
        D = LatentDenoiser(model, prompt, guidance_scale, negative_prompt)
        if masks is not None:
            constraint = latent_inpainting(model, images, masks, soft=soft)
        elif constraint is not None:
            constraint = constraint(model)

        # The sampler.
        options: dict[str, Any] = {"h": h} | ({} if eta is None else {"eta": eta})
        options |= {"newton_steps": newton_steps, "lr": lr} if method == "newton" else {}
        shape = (len(prompt), model.channels, *model.latent_size)
        if strength != 1:
            if images is None:
                raise ValueError(f"strength = {strength} without an image: there is nothing to begin at, give image")
            options["start"] = noised(D, model.encode(images), strength, noise=noise)
        states = SAMPLERS[method](D, constraint, shape, steps=num_inference_steps, noise=noise, device=device, **options)
        x_t = self.run(states, num_inference_steps, callback_on_step_end, callback_on_step_end_tensor_inputs)
        results = x_t if output_type == "latent" else self.finish(plain, model.decode(x_t), images, masks, seam, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(results) if return_dict else (results,)

    def run(self, states: States, steps: int, callback: Callable | None, names: Sequence[str]) -> Tensor:
        """The sampler's steps, with a progress bar; a callback may change x_t or interrupt. Returns the last x_t."""
        self._num_timesteps, self._interrupt = steps, False
        with self.progress_bar(total=steps) as bar:
            state = next(states, None)
            while state is not None:
                x_t = state.x_t
                if callback is not None:
                    values = {"latents": x_t, "x0": state.x0}
                    values = callback(self, state.step - 1, torch.tensor(state.t), {name: values[name] for name in names})
                    x_t = values.get("latents", x_t)
                bar.update()
                if self.interrupt:
                    break
                try:
                    state = states.send(x_t)
                except StopIteration:
                    break
        return x_t

    @staticmethod
    def read_noise(shape: tuple[int, ...], generator: Any, latents: Tensor | None, device: torch.device) -> Callable[[], Tensor]:
        """A function that draws noise of `shape`, the first time `latents` if they were given."""
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"latents have shape {list(latents.shape)}: {list(shape)} is needed")
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise ValueError(f"generator is a list of {len(generator)}: give one for each of the {shape[0]} images")
        first = [] if latents is None else [latents.to(device, torch.float32)]
        return lambda: first.pop() if first else randn_tensor(shape, generator, device, torch.float32)

    def read_inputs(
        self,
        image: Any,
        mask_image: Any,
        height: int | None,
        width: int | None,
        multiple: int,
        soft: bool = False,
        whole: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Images [n, 3, H, W] in -1 .. 1 and masks [m, 1, H, W], 1 where known, with H and W multiples of `multiple`. Files and PIL
        images are read as everywhere (ldm/images.py, ldm/masks.py); arrays and tensors of a mask are 1 where it is filled in.
        whole: there may be no mask (None)."""
        for name, value in {"image": image, "mask_image": mask_image}.items():
            if value is None and not (whole and name == "mask_image"):
                raise ValueError(f"{name} is missing: give image and mask_image, or constraint")
        images = [as_pil(x) for x in entries(image)]
        own = VaeImageProcessor(vae_scale_factor=1).preprocess(images).shape[2:]
        images = VaeImageProcessor(vae_scale_factor=multiple).preprocess(images, height, width)
        if images.shape[1] != 3:
            raise ValueError(f"image has {images.shape[1]} channels: give 3")
        images = images.to(self._execution_device, torch.float32)
        if mask_image is None:
            return images, None
        if torch.is_tensor(mask_image):
            mask_image = mask_image.detach().float().cpu().numpy()
        if isinstance(mask_image, np.ndarray) and mask_image.ndim == 3 and mask_image.shape[2] not in (1, 3, 4):
            mask_image = mask_image[None] if len(mask_image) == 3 != len(images) else mask_image[:, None]  # channels, or a batch
        masks = [x.detach().float().cpu().numpy() if torch.is_tensor(x) else x for x in entries(mask_image)]
        known = torch.cat([read_mask(x, own, name="mask_image", soft=soft) for x in masks])
        known = check_mask(known if images.shape[2:] == own else resize_mask(known, images.shape[2:]))
        return images, known.to(self._execution_device, torch.float32)

    def at_own_size(
        self,
        image: Any,
        mask_image: Any,
        height: int | None,
        width: int | None,
        context: float,
        soft: bool,
        seam: str | float,
        constraint: Callable | None,
        output_type: str,
        return_dict: bool,
        **given: Any,
    ) -> ImagePipelineOutput | tuple:
        """`__call__` with `context`: each part around a hole at the model's size, height or width if given, the rest untouched."""
        if output_type == "latent" or constraint is not None or height != width:
            raise ValueError(f"context = {context}: leave out constraint and latents as output, and give height = width, if any")
        photo, known = self.read_inputs(image, mask_image, None, None, 1, soft)
        if known is None or len(photo) != 1 or len(known) != 1:
            raise ValueError(f"context = {context} with several images or masks: give one of each")
        plain = self.plain_pipeline()
        model = from_diffusers(plain)
        side = model.image_size * model.downsampling if height is None else height

        def fill(part: Tensor, mask: Tensor) -> Tensor:
            own: dict[str, Any] = dict(
                image=part / 2 + 0.5, mask_image=1 - mask, soft=soft, seam=seam, output_type="pt", return_dict=False
            )
            return self(**{**given, **own})[0] * 2 - 1

        how = {"poisson": True} if seam == "poisson" else {"feather": seam}
        images = fill_photo(photo, known, fill, side, model.downsampling * model.multiple, context, **how)
        images = plain.image_processor.postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images) if return_dict else (images,)

    @staticmethod
    def as_batch(
        each: int,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None,
        image: Tensor | None,
        mask: Tensor | None,
    ) -> Iterable[Any]:
        """The four with one row for each result: `each` for each prompt, or for each image where these are more."""
        given: dict[str, Any] = {"prompt": prompt, "negative_prompt": negative_prompt, "image": image, "mask_image": mask}
        given = {name: [x] if isinstance(x, str) else x for name, x in given.items()}
        for name in ("prompt", "negative_prompt"):
            if not isinstance(given[name], (list, tuple)) and (given[name] is not None or name == "prompt"):
                raise ValueError(f"{name} = {given[name]!r}: give a string or a list of strings")
        batch = max(len(x) for x in given.values() if x is not None)
        for name, x in given.items():
            if x is not None and len(x) not in (1, batch):
                raise ValueError(f"{name} has {len(x)} entries where another argument has {batch}: give as many, or one for all")
            if isinstance(x, (list, tuple)):
                given[name] = [text for text in list(x) * (batch // len(x)) for _ in range(each)]
            elif x is not None:
                given[name] = x.expand(batch, *x.shape[1:]).repeat_interleave(each, 0)
        return given.values()

    def finish(
        self,
        plain: DiffusionPipeline,
        images: Tensor,
        image: Tensor | None,
        mask: Tensor | None,
        seam: str | float,
        output_type: str,
    ) -> Any:
        """Decoded images with the known pixels put back, past the safety checker if there is one, in the form asked for."""
        images = images.clamp(-1, 1)
        if image is not None and mask is not None:
            images = blend(images, image, mask, **({"poisson": True} if seam == "poisson" else {"feather": seam}))
        safe = None
        if plain.components.get("safety_checker") is not None:
            images, flagged = plain.run_safety_checker(images, images.device, self.vae.dtype)
            safe = [not flag for flag in flagged]  # a flagged image comes back black
        return plain.image_processor.postprocess(images, output_type=output_type, do_denormalize=safe)


def entries(x: Any) -> list[Any]:
    """A list, or the entries of a batch [B, ...], or the one thing that is given, as a list."""
    return list(x) if isinstance(x, (list, tuple)) or isinstance(x, (np.ndarray, torch.Tensor)) and x.ndim == 4 else [x]


def as_pil(x: Any) -> Any:
    """A file, a PIL image or an array of bytes [H, W, 3] as an upright RGB image, on white; other arrays and tensors as given."""
    if isinstance(x, np.ndarray) and x.dtype == np.uint8:
        x = Image.fromarray(x)
    return x if isinstance(x, (np.ndarray, torch.Tensor)) else on_white(open_image(x)).convert("RGB")
