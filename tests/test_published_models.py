"""The models that papers report on: names, shapes and counts of the published checkpoints, on "meta"."""

import gzip

import pytest
import torch
from common import ROOT
from omegaconf import OmegaConf

from ldm.util import instantiate_from_config, load_config

CONFIGS = ROOT / "configs"
# As published, with everything that only training uses: what bsr_sr, cin256-v2, churches and the autoencoders add together.
PUBLISHED = """
model:
  base_learning_rate: 2.0e-06
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    linear_start: 0.0015
    linear_end: 0.0195
    num_timesteps_cond: 1
    log_every_t: 200
    timesteps: 1000
    loss_type: l1
    first_stage_key: image
    cond_stage_key: class_label
    image_size: 64
    channels: 3
    cond_stage_trainable: false
    concat_mode: false
    monitor: val/loss
    scheduler_config:
      target: ldm.lr_scheduler.LambdaLinearScheduler
      params: {warm_up_steps: [10000]}
    unet_config:
      target: ldm.modules.diffusionmodules.openaimodel.UNetModel
      params:
        image_size: 64
        in_channels: 3
        out_channels: 3
        model_channels: 224
        attention_resolutions:
        # note: this is not the resolution but the down-sampling factor
        - 8
        - 4
        - 2
        num_res_blocks: 2
        channel_mult:
        - 1
        - 2
        - 3
        - 4
        num_head_channels: 32
    first_stage_config:
      target: ldm.models.autoencoder.VQModelInterface
      params:
        embed_dim: 3
        n_embed: 8192
        ckpt_path: models/first_stage_models/vq-f4/model.ckpt
        monitor: val/rec_loss
        ddconfig:
          double_z: false
          z_channels: 3
          resolution: 256
          in_channels: 3
          out_ch: 3
          ch: 128
          ch_mult:
          - 1
          - 2
          - 4
          num_res_blocks: 2
          attn_resolutions: []
          dropout: 0.0
        lossconfig:
          target: torch.nn.Identity
    cond_stage_config: __is_unconditional__
data:
  target: main.DataModuleFromConfig
"""


def on_meta(config):
    with torch.device("meta"):
        return instantiate_from_config(config["model"])


def shapes(model):
    return {k: list(v.shape) for k, v in model.state_dict().items()}


def published(name):
    """{tensor: shape} of a published checkpoint, without what a model computes itself."""
    rows = gzip.decompress((ROOT / f"tests/data/{name}.tsv.gz").read_bytes()).decode().splitlines()
    return {k: [int(n) for n in shape.split("x")] for k, shape in (row.split("\t") for row in rows if not row.startswith("#"))}


@pytest.mark.parametrize("name, config, count", [
    ("adm-ffhq-256", "adm/ffhq-256", 93_563_910), ("adm-imagenet-256-uncond", "adm/imagenet-256", 552_814_086),
    ("ldm-ffhq-ldm-vq-4", "latent-diffusion/ffhq-ldm-vq-4", 329_378_945),
    ("ldm-cin256-v2", "latent-diffusion/cin256-v2", 456_755_873),
])  # fmt: skip
def test_names_shapes_and_counts_are_those_of_the_checkpoints(name, config, count):
    model = on_meta(load_config(CONFIGS / f"{config}.yaml"))
    prefix = "model.diffusion_model." if name.startswith("adm") else ""
    found = {k.removeprefix(prefix): v for k, v in shapes(model).items() if k not in dict(model.named_buffers())}
    assert found == published(name)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("config, unet, rest", [
    # millions of parameters, as the papers' tables have them (Dhariwal & Nichol 2021; Rombach et al. 2022)
    ("adm/imagenet-64-classes", 296, 0), ("adm/imagenet-128-classes", 422, 0), ("adm/imagenet-256-classes", 554, 0),
    ("adm/imagenet-512-classes", 559, 0), ("latent-diffusion/lsun_churches-ldm-kl-8", 295, 84),
    ("latent-diffusion/bsr_sr", 114, 55),
])  # fmt: skip
def test_sizes_are_those_of_the_papers(config, unet, rest):
    model = on_meta(load_config(CONFIGS / f"{config}.yaml"))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model)]
    assert [round(n / 1e6) for n in (counts[0], counts[1] - counts[0])] == [unet, rest]


def test_a_published_yaml_works_unchanged():
    ours = on_meta(load_config(CONFIGS / "latent-diffusion/ffhq-ldm-vq-4.yaml"))
    theirs = on_meta(OmegaConf.to_container(OmegaConf.create(PUBLISHED)))
    assert shapes(theirs) == shapes(ours) and torch.equal(theirs.betas, ours.betas)
    assert theirs.image_size == 64 and theirs.first_stage_model.downsampling == 4
