"""What a checkpoint holds: the config that its tensors belong to, found out from their names and shapes.

    a U-Net of configs/adm or configs/latent-diffusion    ADM, latent diffusion on VQ-f4 and KL-f8
    the paper's U-Net for MNIST                           configs/mnist/authors-22m.yaml
    another U-Net that takes text                         Stable Diffusion v1 and v2
    an autoencoder alone                                  any AutoencoderKL or VQModelInterface, its config read off the shapes

Only a few shapes are looked at here. Whether all of them fit is for `ldm.weights.match` to say.
"""

import re
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from ldm.tensor_files import Stored, some
from ldm.util import ROOT, load_config

UNET = "model.diffusion_model."
# Kinds of Stable Diffusion that do more than text to image, by the channels that their U-Net takes.
OTHER_KINDS = {5: "a depth-conditioned", 7: "an upscaling", 8: "an instruction-editing", 9: "an inpainting"}

FOLDER = "in diffusers, {}.from_single_file(file).save_pretrained(folder) makes a folder of it, which load_model takes"
MERGE = (
    "merge it into its model: in diffusers pipeline.load_lora_weights(file), pipeline.fuse_lora(), then from_diffusers(pipeline)"
)
PART = 'give it next to the model that it belongs to, load_model(model, parts={{"{}": file}})'
# Files of other kinds: (how the name of a tensor begins that tells, what the file is, what to do).
OTHER_FILES = [
    (r"conditioner\.embedders\.1\.|.*\.add_embedding\.", "a Stable Diffusion XL model", FOLDER.format("StableDiffusionXLPipeline")),
    (r"conditioner\.embedders\.0\.", "a Stable Diffusion XL refiner", "give the base model, as a diffusers folder"),
    (r"(model\.diffusion_model\.)?joint_blocks\.", "a Stable Diffusion 3 model", FOLDER.format("StableDiffusion3Pipeline")),
    (r"(model\.diffusion_model\.)?double_blocks\.", "a FLUX model", FOLDER.format("FluxPipeline")),
    (r".*(lora_up|lora_down|lora_A|lora_B|lora\.up|lora\.down)\.|.*\.(hada_w1_a|lokr_w1|oft_blocks)", "a LoRA", MERGE),
    (r"control_model\.|.*controlnet_(cond_embedding|down_blocks)\.", "a ControlNet",
     "give its base model: constraints need no ControlNet"),
    (r".*motion_modules\.|.*\.time_stack\.", "a video model", "only image models can be loaded"),
    (r"emb_params$|\*$|clip_[lg]$|<.*>$", "a textual-inversion embedding",
     "give a model; in diffusers pipeline.load_textual_inversion(file) adds it to one"),
    (r"image_proj(_model)?\.", "an IP-Adapter", "give its base model"),
    (r"(encoder|decoder)\.(down|up)_blocks\.0\.", "an autoencoder in diffusers' format",
     "give its pipeline's folder, or set pipeline.vae and call from_diffusers(pipeline)"),
    (r"down_blocks\.0\.(resnets|attentions)\.", "a U-Net in diffusers' format",
     "give the folder of its whole pipeline, with model_index.json"),
    (r"(cond_stage_model\.)?(transformer\.)?text_model\.encoder\.layers\.0\.|(model\.)?transformer\.resblocks\.0\.",
     "a text encoder alone", PART.format("cond_stage_model")),
]  # fmt: skip


Shapes = dict[str, list[int]]  # of tensors, by name


class Signature(NamedTuple):
    """What tells the known U-Nets from each other."""

    in_channels: int
    out_channels: int
    width: int  # of the first level
    blocks: int  # input_blocks
    context: int | None  # width of the tokens
    classes: int | None


def published_names(stored: dict[str, Stored]) -> dict[str, Stored]:
    """The tensors of a file by the names of published configs: ADM's files hold the U-Net alone, without a prefix."""
    bare = "time_embed.0.weight" in stored and "input_blocks.0.0.weight" in stored
    return {UNET + name: tensor for name, tensor in stored.items()} if bare else stored


def infer_config(path: str | Path, stored: dict[str, Stored], prediction: str | None = None) -> Path | dict[str, Any]:
    """The config that the tensors of a file belong to: the path of a yaml file, or for an autoencoder a dict.

    stored: {name: Stored} as `ldm.tensor_files.index` and `published_names` give it; prediction: "eps", "v" or None, for Stable
    Diffusion v2. ValueError, saying what the file is, where it is of no known kind.
    """
    if "encoder.conv_in.weight" in stored and "decoder.conv_in.weight" in stored:
        return autoencoder_config(shapes_of(stored))
    first = stored.get(UNET + "input_blocks.0.0.weight")
    for pattern, kind, advice in OTHER_FILES:
        whole = first is not None and pattern.startswith("(cond_stage_model")  # a part of many models
        if not whole and any(re.match(pattern, name) for name in stored):
            raise ValueError(f"{path} is {kind}: {advice}")
    if first is None:
        raise ValueError(f"{path} holds no U-Net under model.diffusion_model and no autoencoder ({some(stored)}): give its config")
    signature = unet_signature(shapes_of(stored))
    if signature in known_unets():
        return known_unets()[signature]
    if signature.context is None:
        raise ValueError(
            f"{path} is of no known kind: its U-Net takes {signature.in_channels} channels, gives {signature.out_channels}, is "
            f"{signature.width} wide and has {'no' if signature.classes is None else signature.classes} classes; give its config"
        )
    return stable_diffusion_config(path, signature, prediction)


def shapes_of(stored: dict[str, Stored]) -> Shapes:
    return {name: list(tensor.meta.shape) for name, tensor in stored.items()}


def unet_signature(shapes: Shapes) -> Signature:
    """The Signature of the U-Net among the shapes of a file's tensors."""
    blocks = next(i for i in count() if not any(k.startswith(f"{UNET}input_blocks.{i}.") for k in shapes))
    width, in_channels = shapes[UNET + "input_blocks.0.0.weight"][:2]
    context = next((shape[1] for k, shape in shapes.items() if k.startswith(UNET) and k.endswith("attn2.to_k.weight")), None)
    out_channels = shapes.get(UNET + "out.2.weight", [0])[0]
    classes = shapes[UNET + "label_emb.weight"][0] if UNET + "label_emb.weight" in shapes else None
    return Signature(in_channels, out_channels, width, blocks, context, classes)


@cache
def known_unets() -> dict[Signature, Path]:
    """{Signature: path of the config} of the U-Nets in configs/adm and configs/latent-diffusion, and of the authors' for MNIST."""
    known: dict[Signature, Path] = {}
    configs = ROOT / "configs"
    paths = [*configs.glob("adm/*.yaml"), *configs.glob("latent-diffusion/*.yaml"), configs / "mnist/authors-22m.yaml"]
    for path in sorted(paths):
        unet = load_config(path).model.params.unet_config.params
        width = int(unet.channel_mult[0] * unet.model_channels)
        blocks = len(unet.channel_mult) * (unet.num_res_blocks + 1)
        context, classes = unet.get("context_dim"), unet.get("num_classes")
        known[Signature(unet.in_channels, unet.out_channels, width, blocks, context, classes)] = path
    return known


def stable_diffusion_config(path: str | Path, signature: Signature, prediction: str | None) -> Path:
    """The path of the config of a Stable Diffusion v1 or v2 with this U-Net."""
    if (channels := signature.in_channels) != 4:
        kind = OTHER_KINDS.get(channels, "another")
        raise ValueError(
            f"{path} is {kind} model, its U-Net takes {channels} channels: give the text-to-image model "
            "(4 channels), constraints need no model of their own"
        )
    width = signature.context
    if width not in (768, 1024):
        raise ValueError(
            f"{path} is neither Stable Diffusion v1 nor v2: its U-Net takes text of width {width}, not 768 or 1024; give its config"
        )
    if width == 1024 and prediction is None:
        raise ValueError(
            f"{path} is Stable Diffusion v2, and its tensors do not tell what it predicts: give "
            'prediction="v" (the 768 models) or prediction="eps" (the 512 base models)'
        )
    name = "v1-inference" if width == 768 else "v2-inference-v" if prediction == "v" else "v2-inference"
    return ROOT / f"configs/stable-diffusion/{name}.yaml"


def autoencoder_config(shapes: Shapes) -> dict[str, Any]:
    """The config of an autoencoder: everything but the size it was trained at can be read off the shapes of its tensors."""
    ch, in_channels = shapes["encoder.conv_in.weight"][:2]
    levels = next(i for i in count() if f"encoder.down.{i}.block.0.conv1.weight" not in shapes)
    resolution = 256
    ddconfig = {
        "double_z": "quantize.embedding.weight" not in shapes,
        "z_channels": shapes["decoder.conv_in.weight"][1],
        "resolution": resolution,
        "in_channels": in_channels,
        "out_ch": shapes["decoder.conv_out.weight"][0],
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] // ch for i in range(levels)],
        "num_res_blocks": next(i for i in count() if f"encoder.down.0.block.{i}.conv1.weight" not in shapes),
        "attn_resolutions": [resolution // 2**i for i in range(levels) if f"encoder.down.{i}.attn.0.q.weight" in shapes],
        "attn_type": "vanilla" if "encoder.mid.attn_1.q.weight" in shapes else "none",
    }
    params = {"ddconfig": ddconfig, "embed_dim": shapes["post_quant_conv.weight"][1]}
    if ddconfig["double_z"]:
        return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}
    params["n_embed"] = shapes["quantize.embedding.weight"][0]
    return {"target": "ldm.models.autoencoder.VQModelInterface", "params": params}
