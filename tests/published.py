"""The published models of configs/, whole without weights, or as narrow as they get."""

import torch
from common import ROOT, randomised
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config, load_config

CONFIGS = ROOT / "configs"
X_T = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))  # for `tiny_config`
WIDTH = 32  # of its text
TEXT = {"text_config": dict(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=12, num_attention_heads=4)}


def shipped(name):
    """The model's node of a shipped config."""
    return OmegaConf.to_container(load_config(CONFIGS / f"{name}.yaml"))["model"]


def on_meta(config):
    with torch.device("meta"):
        return instantiate_from_config(config)


def shapes(model):
    return {k: list(v.shape) for k, v in model.state_dict().items()}


def tiny_config(**params):
    """Stable Diffusion v1 with all its blocks and names, a tenth as wide."""
    config = shipped("stable-diffusion/v1-inference")
    config["params"]["unet_config"]["params"] |= {"model_channels": 32, "context_dim": WIDTH}
    config["params"]["first_stage_config"]["params"]["ddconfig"] |= {"ch": 32}
    config["params"]["cond_stage_config"]["params"] = TEXT
    config["params"] |= params
    return config


def tiny(name, **params):
    """A shipped config, its networks as narrow as they get, with all their blocks."""
    config = shipped(name)
    unet = config["params"]["unet_config"]["params"]
    unet |= {"model_channels": 32, "num_res_blocks": 1, "channel_mult": unet["channel_mult"][-2:], "attention_resolutions": [2]}
    unet |= {"num_head_channels": 16, "num_heads": -1} | ({"num_classes": 10} if "num_classes" in unet else {})
    if "context_dim" in unet:
        unet["context_dim"] = config["params"]["cond_stage_config"]["params"]["embed_dim"] = 24
    if "first_stage_config" in config["params"]:
        ddconfig = config["params"]["first_stage_config"]["params"]["ddconfig"]
        ddconfig |= {"ch": 32, "num_res_blocks": 1, "ch_mult": [1] * len(ddconfig["ch_mult"])}
    config["params"] |= {"image_size": 8} | params
    return config


def built(name, **params):
    return randomised(instantiate_from_config(tiny(name, **params)))
