"""Models from checkpoints: shipped ones by name, files and folders by path, with the config found out where the file tells.

The model is built without memory (on the device "meta") and compared with the file's index (`ldm.weights`). Then one tensor after
the other is read, converted and checked: the peak memory is that of the loaded model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

from ldm.kinds import infer_config, published_names
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.tensor_files import Stored, index
from ldm.util import ROOT, instantiate_from_config, load_config, moved, resolve_device
from ldm.weights import index_own_parts, index_parts, match, respelled

Config: TypeAlias = str | Path | Mapping[str, Any] | DictConfig  # a yaml file's path, or what is in it
SHIPPED = {  # name: (config, weights)
    "mnist": ("configs/mnist/unet.yaml", "checkpoints/mnist/unet.safetensors"),
    "mnist-classifier": ("configs/mnist/classifier.yaml", "checkpoints/mnist/classifier.safetensors"),
    "tiny": ("configs/tiny/unet.yaml", "checkpoints/tiny/unet.safetensors"),
    "tiny-flow": ("configs/tiny/flow.yaml", "checkpoints/tiny/flow.safetensors"),
    "tiny-autoencoder": ("configs/tiny/autoencoder.yaml", "checkpoints/tiny/autoencoder.safetensors"),
    "tiny-clip": ("configs/tiny/clip.yaml", "checkpoints/tiny/clip.safetensors"),
    "tiny-parser": ("configs/tiny/parser.yaml", "checkpoints/tiny/parser.safetensors"),
    "tiny-judge": ("configs/tiny/judge.yaml", "checkpoints/tiny/judge.safetensors"),
}
SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".safetensors")
# Names that were here in version 0.1.
__getattr__ = moved("ldm.checkpoints", "ldm.weights", "save_weights load_parts Stored check_schedule RECOMPUTED")


def load_model(
    source: str | Path = "tiny",
    config: Config | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    prediction: str | None = None,
    *,
    ema: bool | str = "auto",
    parts: Mapping[str, str | Path] | None = None,
    variant: str | None = None,
) -> Any:
    """A pre-trained model: in eval mode, without gradients, its 4-D weights channels-last.

    source      a shipped model (a key of SHIPPED; "tiny" is a small text-to-image model of the kind of Stable Diffusion)
                or the path of a .ckpt, .pt, .pth, .bin or .safetensors file; or a folder that diffusers has saved a
                pipeline to, which then is the model of `ldm.diffusers_models.from_diffusers`
    config      path of a yaml file, or a dict or OmegaConf: {model: {target, params}}. None: of the shipped model, or
                found out from the file's tensors (`ldm.kinds`: Stable Diffusion v1 and v2, ADM, latent diffusion on faces,
                ImageNet and LSUN, autoencoders). Its `parts` name files for those parts of the model that the source
                itself does not hold
    device      "auto" (CUDA, MPS or CPU), or a device's name
    dtype       of the weights: float32 (None), torch.float16 or torch.bfloat16. What goes in and comes out stays
                float32, and the noise schedule float64
    prediction  "eps" or "v", what the network predicts, instead of the config's. Needed for Stable Diffusion v2
                without config: its 512 base models (eps) and its 768 models (v) have the same tensors. None: "v" where the
                file says so (v_pred, ztsnr)
    ema         "auto": averaged weights where the file holds any, which must be near the plain ones; True: averaged ones
                in any case; False: the plain ones
    parts       {part of the model: path of a file}, whose tensors are taken instead of the source's: a fine-tuned
                autoencoder is {"first_stage_model": "vae.safetensors"}, a text encoder {"cond_stage_model": ...}
    variant     of the weights in a diffusers folder ("fp16"); None: the plain ones, or the only variant there is

    Nothing of the file is executed. Tensors that are known to be without a use are ignored, and named. Raises
    FileNotFoundError, or ValueError for a file that cannot be read, is of another kind, does not fit the model in any name
    or shape, or holds NaN or infinity.
    """
    device = resolve_device(device)
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype!r}: give torch.float32, torch.float16, torch.bfloat16 or None")
    if is_pipeline(source):
        for name, value in {"config": config, "parts": parts}.items():
            if value is not None:
                raise ValueError(f"{name} was given, but {source} is a diffusers pipeline with its own: leave {name} out")
        from ldm.diffusers_models import from_diffusers  # takes seconds to import

        return from_diffusers(Path(source).expanduser(), prediction=prediction, device=device, dtype=dtype, variant=variant)
    path, config = locate(source, config)
    stored = respelled(published_names(index(path)))
    prediction, more = predicted(stored, prediction)
    config = infer_config(path, stored, prediction) if config is None else config
    overrides = more if prediction is None else more | {"parameterization": prediction}
    model_config, config_parts = read_config(config)
    with torch.device("meta"):
        model = instantiate_from_config(model_config, **overrides)
    expected = model.state_dict(keep_vars=True)
    stored = index_parts(config_parts) | stored
    if parts:
        replaced = tuple(f"{part.removesuffix('.')}." for part in parts)
        stored = {k: v for k, v in stored.items() if not k.startswith(replaced)} | index_own_parts(parts, model)
    unused = unused_names(model)
    names = match(path, stored, expected, ema, unused)

    tensors = {name: torch.zeros(expected[name].shape, dtype=dtype, device=device) for name in unused - set(names)}
    for name, name_in_file in tqdm(names.items(), f"loading {path.name}", unit=" tensors", delay=1, leave=False):
        own, value = expected[name], stored[name_in_file].read()
        to = dtype if isinstance(own, nn.Parameter) else own.dtype
        value = value.float() if value.dtype.is_floating_point and value.itemsize == 1 else value
        if to.is_floating_point and not all(abs(x) <= torch.finfo(to).max for x in torch.aminmax(value)):
            raise ValueError(f"{stored[name_in_file].path}: the tensor {name_in_file} holds NaN or infinity (as {to})")
        layout = torch.channels_last if own.ndim == 4 else torch.preserve_format
        tensors[name] = value.to(device=device, dtype=to, copy=True, memory_format=layout)
    model.load_state_dict(tensors, strict=False, assign=True)  # `match` was strict
    if any(buffer.is_meta for buffer in model.buffers()):  # those that the model computes itself (CLIP's attention mask)
        computed = dict(instantiate_from_config(model_config, **overrides).named_buffers())
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                module, _, own_name = name.rpartition(".")
                model.get_submodule(module)._buffers[own_name] = computed[name]
    if "scale_factor" in stored and "scale_factor" not in expected:
        model.scale_factor = stored["scale_factor"].read().item()
    return model.to(device).eval().requires_grad_(False)


def predicted(stored: Mapping[str, Stored], prediction: str | None) -> tuple[str | None, dict[str, Any]]:
    """(prediction, further arguments of the model) by the marks that v-prediction models carry in their files.

    `v_pred` is one, and `ztsnr` where the noise schedule ends at pure noise. A prediction that was given wins."""
    marked = "v_pred" in stored or "ztsnr" in stored
    return prediction or ("v" if marked else None), {"zero_terminal_snr": True} if "ztsnr" in stored else {}


def unused_names(model: nn.Module) -> set[str]:
    """The names in the state dict of what a model's text encoder has but never reads (`TextEncoder.unused`)."""
    if not isinstance(model, LatentDiffusion) or model.cond_stage_model is None:
        return set()
    from ldm.modules.encoders.modules import TextEncoder  # takes seconds to import, but for models with one

    encoder = model.cond_stage_model
    prefixes = tuple(f"cond_stage_model.{name}" for name in encoder.unused) if isinstance(encoder, TextEncoder) else ()
    return {name for name in model.state_dict() if name.startswith(prefixes)} if prefixes else set()


def is_pipeline(source: str | Path) -> bool:
    """Whether it is a folder that diffusers has saved a pipeline to."""
    return (Path(source).expanduser() / "model_index.json").is_file()


def locate(source: str | Path, config: Config | None) -> tuple[Path, Config | None]:
    """(path of the weights, config or None) of a shipped model's name or a path."""
    if str(source) in SHIPPED:
        shipped_config, weights = SHIPPED[str(source)]
        if not (path := ROOT / weights).is_file():
            run = "_".join(Path(shipped_config).with_suffix("").parts[-2:])
            raise FileNotFoundError(
                f"the weights of {str(source)!r} are not at {path}: take them from the repository, or run `python -m "
                f"ldm.train --config {shipped_config}` and copy runs/{run}/weights.safetensors there"
            )
        return path, ROOT / shipped_config if config is None else config
    path = Path(source).expanduser()
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"{str(source)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor the path of a "
            f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file or of a diffusers pipeline's folder (with model_index.json)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    return path, config


def read_config(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the node {target, params}, the parts) of a config: a yaml file's path, a dict or an OmegaConf; `model` may stand above
    the node, and `parts` next to `model`."""
    if isinstance(config, (str, Path)):
        config = load_config(config)
    config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    return config.get("model", config), config.get("parts") or {}
