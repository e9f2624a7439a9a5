"""The models that papers report on: names, shapes and counts of the published checkpoints, on "meta"."""

import gzip
from pathlib import Path

import pytest
import torch
from common import ROOT
from omegaconf import OmegaConf
from published import CONFIGS, built, on_meta, shapes, shipped, tiny

from ldm.checkpoints import load_model
from ldm.kinds import infer_config, known_unets, published_names, unet_signature
from ldm.models.autoencoder import AutoencoderKL, VQModel
from ldm.modules.encoders.labels import class_labels
from ldm.modules.encoders.modules import ClassEmbedder
from ldm.tensor_files import Stored
from ldm.util import instantiate_from_config, load_config
from ldm.weights import match

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
    model = on_meta(shipped(config))
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
    model = on_meta(shipped(config))
    counts = [sum(p.numel() for p in part.parameters()) for part in (model.unet, model)]
    assert [round(n / 1e6) for n in (counts[0], counts[1] - counts[0])] == [unet, rest]


def test_a_published_yaml_works_unchanged():
    ours = on_meta(shipped("latent-diffusion/ffhq-ldm-vq-4"))
    theirs = on_meta(OmegaConf.to_container(OmegaConf.create(PUBLISHED))["model"])
    assert shapes(theirs) == shapes(ours) and torch.equal(theirs.betas, ours.betas)
    assert theirs.image_size == 64 and theirs.first_stage_model.downsampling == 4


# The networks behind one call: (x_t, t, condition) -> a prediction of x_t's shape


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_the_variance_is_dropped():
    model, x, t = built("adm/ffhq-256"), randn(2, 3, 8, 8), torch.tensor([3, 977])
    whole = model.unet(x, t)
    assert whole.shape == (2, 6, 8, 8) and torch.equal(model.network(x, t), whole[:, :3]) and model(x, t).shape == x.shape
    with pytest.raises(ValueError, match="takes no prompts and no labels: it is unconditional"):
        model.encode_prompts(3)


@torch.inference_mode()
def test_labels_on_pixels_are_the_networks_y():
    model, x, t = built("adm/imagenet-256-classes"), randn(2, 3, 8, 8), torch.tensor([3, 977])
    y = torch.tensor([3, 9])
    out = model.network(x, t, model.encode_prompts([3, 9]))
    assert torch.equal(out, model.unet(x, t, y=y)[:, :3])
    assert not torch.equal(out, model.network(x, t, model.encode_prompts([4, 9])))
    with pytest.raises(ValueError, match="y is missing"):
        model.network(x, t)


@torch.inference_mode()
def test_labels_on_latents_are_one_token():
    model, x, t = built("latent-diffusion/cin256-v2"), randn(2, 3, 8, 8), torch.tensor([3, 977])
    tokens = model.encode_prompts([3, ""])
    assert torch.equal(tokens, model.cond_stage_model.embedding.weight[[3, 1000]][:, None])
    assert torch.equal(model.network(x, t, tokens), model.unet(x, t, tokens))


@torch.inference_mode()
def test_a_small_image_is_concatenated():
    model, x, t = built("latent-diffusion/bsr_sr"), randn(2, 3, 8, 8), torch.tensor([3, 977])
    small = randn(2, 3, 8, 8, seed=1)
    assert torch.equal(model.network(x, t, model.encode_prompts(small)), model.unet(torch.cat([x, small], dim=1), t))


@pytest.mark.parametrize("given, labels", [
    (7, [7]), ([3, 9], [3, 9]), ("7", [7]), (["7", " 8 "], [7, 8]), (torch.tensor([1, 2]), [1, 2]), (range(3), [0, 1, 2]),
    ("", [10]), (None, [10]), (["", 4], [10, 4]), (torch.tensor(5), [5]),
])  # fmt: skip
def test_labels_as_people_give_them(given, labels):
    found = class_labels(given, 11, empty=10)
    assert found.tolist() == labels and found.dtype == torch.int64


@pytest.mark.parametrize("given", [11, -1, [0, 11], "cat", "3.5", 3.5, [None], [], True, torch.tensor([0.5]), ["²"]])
def test_wrong_labels_are_one_sentence(given):
    with pytest.raises(ValueError, match="labels = .*: give integers from 0 to 10, one for all samples or one for each"):
        class_labels(given, 11)


def test_no_class_needs_a_label_for_it():
    assert [ClassEmbedder(8, n, empty=empty).empty for n, empty in ((1001, None), (1000, None), (11, 10))] == [1000, None, 10]
    with pytest.raises(ValueError, match="no label for no class"):
        ClassEmbedder(8, 1000).encode("")


def test_latents_of_vq_and_of_kl():
    """VQ: before quantisation, without a scale; KL: the posterior's mean, scaled. Both decode to the autoencoder's own image."""
    images = randn(2, 3, 32, 32).clamp(-1, 1)
    for name, scale in (("latent-diffusion/ffhq-ldm-vq-4", 1.0), ("latent-diffusion/lsun_churches-ldm-kl-8", 0.22)):
        model = built(name, scale_factor=scale)
        encoded = model.first_stage_model.encode(images)
        expected = encoded if name.endswith("vq-4") else encoded.mode()
        z = model.encode(images)
        torch.testing.assert_close(z, scale * expected)
        torch.testing.assert_close(model.decode(z), model.first_stage_model.decode(expected), rtol=1e-4, atol=1e-4)
        assert torch.equal(model.encode(images, sample=True), z) == name.endswith("vq-4")


# What load_model knows from the tensors


def stored(shapes):
    """Tensors by shape, as `ldm.weights.index` gives them, without a file."""
    return {k: Stored(None, 0, torch.empty(shape, device="meta")) for k, shape in shapes.items()}


@pytest.mark.parametrize("name, config", [
    ("adm-ffhq-256", "adm/ffhq-256"), ("adm-imagenet-256-uncond", "adm/imagenet-256"),
    ("ldm-ffhq-ldm-vq-4", "latent-diffusion/ffhq-ldm-vq-4"), ("ldm-cin256-v2", "latent-diffusion/cin256-v2"),
])  # fmt: skip
def test_published_checkpoints_are_known(name, config):
    tensors = published_names(stored(published(name)))
    path = infer_config("a.pt", tensors)
    assert path == CONFIGS / f"{config}.yaml"
    assert len(match(Path("a.pt"), tensors, on_meta(load_config(path)["model"]).state_dict(keep_vars=True))) == len(tensors)


def test_every_shipped_config_is_known_by_its_own_tensors():
    paths = sorted([*(CONFIGS / "adm").glob("*.yaml"), *(CONFIGS / "latent-diffusion").glob("*.yaml")])
    assert len(paths) == 10 == len(known_unets()) - 1  # and the authors' network for MNIST
    for path in paths:
        with torch.device("meta"):
            unet = instantiate_from_config(load_config(path).model.params.unet_config)
        assert infer_config("a.pt", published_names(stored(shapes(unet)))) == path


F4, F8 = dict(ch_mult=(1, 2, 4), attn_resolutions=()), dict(ch_mult=(1, 2, 4, 4), attn_resolutions=())


@pytest.mark.parametrize("cls, z, embed_dim, n_embed, ddconfig, count", [
    # count: millions of parameters
    (AutoencoderKL, 3, 3, None, F4, 55), (AutoencoderKL, 4, 4, None, F8, 84),
    (AutoencoderKL, 16, 16, None, dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)), None),
    (AutoencoderKL, 64, 64, None, dict(ch_mult=(1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8)), None),
    (VQModel, 3, 3, 8192, F4, 55), (VQModel, 3, 3, 8192, F4 | dict(attn_type="none"), None),
    (VQModel, 4, 4, 16384, dict(ch_mult=(1, 2, 2, 4), attn_resolutions=(32,)), None),
    (VQModel, 8, 6, 16384, dict(ch_mult=(1, 1, 2, 2, 4), attn_resolutions=(16,)), None),
])  # fmt: skip
def test_autoencoders_are_read_off_their_shapes(cls, z, embed_dim, n_embed, ddconfig, count):
    """autoencoder_kl_64x64x3, 32x32x4, 16x16x16, 8x8x64; vq-f4, vq-f4-noattn, vq-f8, and one whose embed_dim is not z_channels."""
    sizes = dict(double_z=n_embed is None, z_channels=z, resolution=256, in_channels=3, out_ch=3, ch=128, num_res_blocks=2)
    ddconfig = sizes | ddconfig
    with torch.device("meta"):
        theirs = cls(ddconfig=ddconfig, embed_dim=embed_dim, **({} if n_embed is None else {"n_embed": n_embed}))
        ours = instantiate_from_config(infer_config("a.ckpt", stored(shapes(theirs))))
    assert shapes(ours) == shapes(theirs) and isinstance(ours, cls)
    if count:
        assert round(sum(p.numel() for p in ours.parameters()) / 1e6) == count


def test_other_files_are_one_sentence():
    adm = published("adm-ffhq-256")
    for change, words in [
        ({"input_blocks.0.0.weight": [96, 3, 3, 3]}, "its U-Net takes 3 channels, gives 6, is 96 wide and has no classes"),
        ({"label_emb.weight": [10, 512]}, "has 10 classes; give its config"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            infer_config("a.pt", published_names(stored(adm | change)))


def test_a_bare_state_dict_loads_with_and_without_its_config(tmp_path, monkeypatch):
    """A .pt as guided diffusion writes it; safely, strictly, and to the same network."""
    model = built("adm/imagenet-256-classes")
    torch.save(model.unet.state_dict(), tmp_path / "a.pt")
    OmegaConf.save(OmegaConf.create({"model": tiny("adm/imagenet-256-classes")}), tmp_path / "tiny.yaml")
    known = {unet_signature(shapes(model)): tmp_path / "tiny.yaml"}
    monkeypatch.setattr("ldm.kinds.known_unets", lambda: known)
    for config in (None, tmp_path / "tiny.yaml"):
        loaded = load_model(tmp_path / "a.pt", config, device="cpu")
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    state = model.unet.state_dict()
    del state["label_emb.weight"]
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=r"missing tensors \(1\): model.diffusion_model.label_emb.weight"):
        load_model(tmp_path / "less.pt", tmp_path / "tiny.yaml", device="cpu")


@pytest.mark.parametrize("name", ["latent-diffusion/cin256-v2", "latent-diffusion/lsun_churches-ldm-kl-8"])
def test_latent_diffusion_loads_with_its_scale(name, tmp_path):
    model = built(name)
    state = model.state_dict() | ({"scale_factor": torch.tensor(0.22)} if "churches" in name else {})
    state |= {"logvar": torch.zeros(1000), "first_stage_model.loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    loaded = load_model(tmp_path / "model.ckpt", {"model": tiny(name)}, device="cpu")
    assert float(loaded.scale_factor) == pytest.approx(0.22 if "churches" in name else 1.0)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
