"""A model of this repository as a folder that diffusers loads.

    python -m ldm.export_diffusers checkpoints/tiny out/

    pipe = diffusers.StableDiffusionPipeline.from_pretrained("out/")

The same weights under diffusers' names: U-Net, autoencoder, text encoder and tokenizer, and a scheduler (DDIM, or flow matching)
that takes our steps, so that both libraries make the same images from the same noise. For text-to-image models with an OpenCLIP
text encoder, such as "tiny" and "tiny-flow"; diffusers reads Stable Diffusion's own .ckpt files itself (`from_single_file`).
"""

import argparse
import json
import re
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.checkpoints import Config, load_model, locate, read_config
from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenOpenCLIPEmbedder

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"  # as transformers' tokenizer names them
RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2",
          "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}  # fmt: skip
UNET_ENDS = {"time_embed.0.": "time_embedding.linear_1.", "time_embed.2.": "time_embedding.linear_2.",
             "input_blocks.0.0.": "conv_in.", "out.0.": "conv_norm_out.", "out.2.": "conv_out."}  # fmt: skip
TEXT_LAYER = {"attn.out_proj": "self_attn.out_proj", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
              "mlp.c_proj": "mlp.fc2"}  # fmt: skip


def unet_names(names, blocks):
    """{name in UNetModel: name in UNet2DConditionModel} for a U-Net with spatial transformers and `blocks` residual blocks a level.

    Per level the published lists hold the blocks (residual block, then attention) and, but for the last, a resampling layer: a
    block of its own on the way down, the last layer of the last block on the way up.
    """
    return {name: _unet_name(name, blocks) for name in names}


def _unet_name(name, blocks):
    for ours, theirs in UNET_ENDS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    if match := re.match(r"middle_block\.(\d)\.(.*)", name):
        block, rest = "mid_block", match[2]
        part = ("resnets.0", "attentions.0", "resnets.1")[int(match[1])]
    else:
        side, i, rest = re.match(r"(input|output)_blocks\.(\d+)\.\d\.(.*)", name).groups()
        level, k = divmod(int(i) - (side == "input"), blocks + 1)
        block = f"{'down' if side == 'input' else 'up'}_blocks.{level}"
        if rest.startswith(("op.", "conv.")):
            return f"{block}.{'down' if side == 'input' else 'up'}samplers.0.conv.{rest.split('.')[-1]}"
        part = f"resnets.{k}" if rest.startswith(tuple(RESNET)) else f"attentions.{k}"
    for ours, theirs in RESNET.items():
        rest = rest.replace(ours, theirs)
    return f"{block}.{part}.{rest}"


def autoencoder_state(state, levels):
    """AutoencoderKL's state dict by diffusers' names. Attention's 1x1 convolutions become linear layers; the decoder's levels are
    counted from the other end."""

    def level(match):
        return f"{match[1]}.{'down' if match[1] == 'encoder' else 'up'}_blocks." + (
            match[3] if match[2] == "down" else str(levels - 1 - int(match[3]))) + "."  # fmt: skip

    rules = [(r"^(encoder|decoder)\.(down|up)\.(\d)\.", level), (r"\.block\.", ".resnets."), (r"\.attn\.", ".attentions."),
             (r"\.downsample\.", ".downsamplers.0."), (r"\.upsample\.", ".upsamplers.0."),
             (r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}"), (r"\.mid\.attn_1", ".mid_block.attentions.0"),
             (r"(attentions\.\d)\.norm\.", r"\1.group_norm."), (r"(attentions\.\d)\.([qkv])\.", r"\1.to_\2."),
             (r"(attentions\.\d)\.proj_out\.", r"\1.to_out.0."), (r"nin_shortcut", "conv_shortcut"),
             (r"norm_out", "conv_norm_out")]  # fmt: skip
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value.flatten(1) if ".attentions." in name and value.ndim == 4 else value
    return renamed


def text_encoder_state(clip, layers):
    """The text tower of an open_clip.CLIP by transformers' names, with one more token: `PAD`, a copy of token 0, with which
    open_clip pads. (In transformers a padding token "!", which token 0 is, would also be cut out of prompts.)"""
    own = clip.state_dict()
    tokens = own["token_embedding.weight"]
    state = {"embeddings.token_embedding.weight": torch.cat([tokens, tokens[:1]]),
             "embeddings.position_embedding.weight": own["positional_embedding"]}  # fmt: skip
    for kind in ("weight", "bias"):
        state[f"final_layer_norm.{kind}"] = own[f"ln_final.{kind}"]
        for i in range(layers):
            ours, theirs = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            for x, part in zip("qkv", own[f"{ours}.attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{theirs}.self_attn.{x}_proj.{kind}"] = part
            for a, b in TEXT_LAYER.items():
                state[f"{theirs}.{b}.{kind}"] = own[f"{ours}.{a}.{kind}"]
    return state


def to_unet(network, params):
    """UNetModel, made with the config's `params` -> UNet2DConditionModel."""
    levels, blocks = len(params["channel_mult"]), params["num_res_blocks"]
    widths = [params["model_channels"] * mult for mult in params["channel_mult"]]
    crossed = [2**i in params["attention_resolutions"] for i in range(levels)]
    head = params.get("num_head_channels", -1)
    unet = UNet2DConditionModel(
        sample_size=params["image_size"], in_channels=params["in_channels"], out_channels=params["out_channels"],
        block_out_channels=widths, layers_per_block=blocks, cross_attention_dim=params["context_dim"],
        down_block_types=["CrossAttnDownBlock2D" if cross else "DownBlock2D" for cross in crossed],
        up_block_types=["CrossAttnUpBlock2D" if cross else "UpBlock2D" for cross in reversed(crossed)],
        attention_head_dim=params["num_heads"] if head == -1 else [width // head for width in widths],  # the *number* of heads
        use_linear_projection=params.get("use_linear_in_transformer", False),
        transformer_layers_per_block=params.get("transformer_depth", 1))  # fmt: skip
    state = network.state_dict()
    unet.load_state_dict({new: state[old] for old, new in unet_names(state, blocks).items()})
    return unet


def to_autoencoder(vae, ddconfig, scale_factor):
    """ldm.models.autoencoder.AutoencoderKL -> diffusers' AutoencoderKL."""
    levels = len(ddconfig["ch_mult"])
    theirs = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[ddconfig["ch"] * mult for mult in ddconfig["ch_mult"]], layers_per_block=ddconfig["num_res_blocks"],
        latent_channels=vae.embed_dim, sample_size=ddconfig["resolution"], scaling_factor=float(scale_factor))  # fmt: skip
    theirs.load_state_dict(autoencoder_state(vae.state_dict(), levels))
    return theirs


def to_text_encoder(encoder):
    """FrozenOpenCLIPEmbedder -> CLIPTextModel; the blocks that the encoder leaves out ("penultimate") are not there."""
    clip, tokenizer = encoder.model, encoder.tokenizer
    blocks = clip.transformer.resblocks
    layers, (size, width) = len(blocks) - encoder.skipped, clip.token_embedding.weight.shape
    theirs = CLIPTextModel(CLIPTextConfig(
        vocab_size=size + 1, hidden_size=width, intermediate_size=blocks[0].mlp.c_fc.out_features, num_hidden_layers=layers,
        num_attention_heads=blocks[0].attn.num_heads, max_position_embeddings=encoder.max_length,
        hidden_act="gelu" if type(blocks[0].mlp.gelu) is torch.nn.GELU else "quick_gelu", bos_token_id=tokenizer.sot_token_id,
        eos_token_id=tokenizer.eot_token_id, pad_token_id=size))  # fmt: skip
    prefix = "text_model." if any(name.startswith("text_model.") for name in theirs.state_dict()) else ""  # by version
    theirs.load_state_dict({prefix + name: value for name, value in text_encoder_state(clip, layers).items()})
    return theirs


def to_tokenizer(encoder):
    """Its byte-pair vocabulary as a CLIPTokenizer. The same ids for every prompt but for what only open_clip rewrites: typographic
    quotes, ligatures and HTML entities."""
    ours = encoder.tokenizer
    names = {ours.decoder[ours.sot_token_id]: START, ours.decoder[ours.eot_token_id]: END}
    vocabulary = {names.get(token, token): i for token, i in ours.encoder.items()}
    vocabulary[PAD] = len(encoder.model.token_embedding.weight)
    with tempfile.TemporaryDirectory() as folder:  # in the form that transformers of every version reads
        Path(folder, "vocab.json").write_text(json.dumps(vocabulary))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, filter(None, ours.bpe_ranks))]))
        return CLIPTokenizer.from_pretrained(folder, pad_token=PAD, model_max_length=encoder.max_length)


def to_scheduler(model, params):
    """Our steps in diffusers' words: trailing times, and an end at the clean image."""
    if model.parameterization == "velocity":
        return FlowMatchEulerDiscreteScheduler(int(model.schedule.scale), shift=model.schedule.shift)
    name = {"linear": "scaled_linear", "sqrt_linear": "linear"}.get(params.get("beta_schedule", "linear"))
    prediction = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}[model.parameterization]
    if name is None:
        raise ValueError(f'beta_schedule = {params["beta_schedule"]!r}: diffusers knows "linear" and "sqrt_linear"')
    return DDIMScheduler(len(model.schedule), params["linear_start"], params["linear_end"], name, prediction_type=prediction,
                         timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True, steps_offset=1)  # fmt: skip


def to_pipeline(model, config):
    """A LatentDiffusion, loaded with `config` (as in load_model), as a StableDiffusionPipeline; float32, on the CPU. ValueError for
    a model that this file does not translate."""
    if not isinstance(model, LatentDiffusion) or not isinstance(model.cond_stage_model, FrozenOpenCLIPEmbedder):
        raise ValueError("the model has no OpenCLIP text encoder: only text-to-image models with one can be exported")
    params = read_config(config)[0]["params"]
    unet, vae = params["unet_config"]["params"], params["first_stage_config"]["params"]["ddconfig"]
    if not unet.get("use_spatial_transformer") or unet.get("num_classes") or not isinstance(unet["num_res_blocks"], int):
        raise ValueError("the U-Net is of another kind than Stable Diffusion's (spatial transformers, no classes, as many residual "
                         "blocks on each level): it cannot be exported")  # fmt: skip
    if vae["attn_resolutions"] or vae["z_channels"] != model.first_stage_model.embed_dim:
        raise ValueError("the autoencoder has attention outside its middle, or embed_dim is not z_channels: it cannot be exported")
    model = model.float().cpu()
    text = model.cond_stage_model
    return StableDiffusionPipeline(
        unet=to_unet(model.unet, unet), vae=to_autoencoder(model.first_stage_model, vae, model.scale_factor),
        text_encoder=to_text_encoder(text), tokenizer=to_tokenizer(text), scheduler=to_scheduler(model, params),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)  # fmt: skip


def export(source: str | Path, out: str | Path, config: Config | None = None) -> StableDiffusionPipeline:
    """Write the model `source`, with `config` where needed, to the folder `out`. Returns the pipeline.

    source: a shipped model's name, its folder (checkpoints/tiny), or a .safetensors or .ckpt file. Errors are those of load_model.
    """
    source, out = str(Path(source).expanduser()), Path(out).expanduser()
    if Path(source).is_dir():
        source = Path(source).resolve().name
    path, config = locate(source, config)
    if config is None:
        raise ValueError(f"config is missing for {path}: give the yaml file that the model was trained with")
    pipeline = to_pipeline(load_model(source, config, device="cpu"), config)
    pipeline.save_pretrained(out)
    for file in Path(out).rglob("*.safetensors"):
        file.chmod(0o644)  # safetensors leaves them readable to their owner only
    return pipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="tiny, tiny-flow, their folder, or a file of weights")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--config", help="of a file of weights: the yaml file that it was trained with")
    args = parser.parse_args()
    export(args.source, args.out, args.config)
    print(f"wrote {args.out}: diffusers.StableDiffusionPipeline.from_pretrained({args.out!r}), or, with constraints,\n"
          f"ldm.diffusers_models.from_diffusers({args.out!r})")  # fmt: skip


if __name__ == "__main__":
    main()
