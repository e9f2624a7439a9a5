"""The published models of configs/adm and configs/latent-diffusion, as narrow as they get: for tests."""

from common import ROOT, randomised
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config, load_config

CONFIGS = ROOT / "configs"


def tiny(name, **params):
    """A shipped config, its networks as narrow as they get, with all their blocks."""
    config = OmegaConf.to_container(load_config(CONFIGS / f"{name}.yaml"))["model"]
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
