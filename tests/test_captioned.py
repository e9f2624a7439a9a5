"""Captioned images: folders with all their faults, encoding in advance, and a text-to-image training from end to end."""

import warnings

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from ldm.checkpoints import load_model
from ldm.data.captioned import Captioned, CaptionedFolder, Encoded, fingerprint
from ldm.data.emoji import entries, held_out_names, pixels, readable
from ldm.denoisers import LatentDenoiser
from ldm.newton_sampler import sample
from ldm.train import train
from ldm.training import jitter
from ldm.util import instantiate_from_config
from ldm.weights import save_weights

AUTOENCODER = {"embed_dim": 4, "ddconfig": {"double_z": True, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3,
                                            "ch": 32, "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": []}}  # fmt: skip
TEXT = {"vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def write_image(path, size=(16, 16), mode="RGB", color="red", **options):
    Image.new(mode, size, color).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, color in enumerate(("red", "green", "blue", "white")):
        write_image(folder / f"{color}.png", (16 + 4 * i, 16), color=color)
        (folder / f"{color}.txt").write_text(f"a {color} square\n")
    return folder


def test_a_folder_with_text_files(folder):
    data, held_out = CaptionedFolder(folder, 16), CaptionedFolder(folder, 16, train=False)
    assert [data[i][1] for i in range(3)] == ["a blue square", "a green square", "a red square"] and len(held_out) == 1
    x, _ = data[0]
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32 and x[:, 5, 5].tolist() == [-1, -1, 1]


def test_a_folder_with_a_table(folder):
    (folder / "captions.csv").write_text('red.png,"red, and square"\nblue.png,blue\n')
    with pytest.warns(UserWarning, match="captions.csv has no line for it"):
        data = CaptionedFolder(folder, 16)
    assert data[0][1] == "blue" and data.captions == ["blue"]


def test_converted_images(folder):
    """Grey, palette, transparent (on white) and 16-bit images, and one on its side."""
    for mode in ("L", "P", "LA"):
        write_image(folder / f"a{mode}.png", mode=mode, color=(0, 0) if mode == "LA" else 0)
        (folder / f"a{mode}.txt").write_text("dark")
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(folder / "b.png")
    (folder / "b.txt").write_text("dark")
    data = CaptionedFolder(folder, 16)
    found = {caption: x[0, 8, 8].item() for x, caption in (data[i] for i in range(3))}
    assert len(data) == 7 and found == {"dark": -1.0} and data.images[1].min() == 255


@pytest.mark.parametrize("fault", ["broken", "text", "tiny", "no caption"])
def test_faulty_images_are_named_and_left_out(folder, fault):
    bad = folder / "bad.png"
    write_image(bad, (8, 16) if fault == "tiny" else (64, 64))
    if fault == "broken":
        bad.write_bytes(bad.read_bytes()[:60])
    if fault == "text":
        bad.write_text("not an image")
    if fault != "no caption":
        (folder / "bad.txt").write_text("bad")
    with pytest.warns(UserWarning, match=r"bad\.png is left out: "):
        data = CaptionedFolder(folder, 16)
    assert len(data) == 3


def test_folders_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder"):
        CaptionedFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has 0 usable images"):
        CaptionedFolder(tmp_path)


def test_an_item_is_one_of_its_group():
    class Numbers(Captioned):
        def item(self, i):
            return i

    data = Numbers([[0], [1, 2, 3]])
    torch.manual_seed(0)
    assert len(data) == 2 and data[0] == 0 and {data[1] for _ in range(50)} == {1, 2, 3}


def test_encoded_images_are_the_image_s_and_its_mirror_s(folder):
    data = CaptionedFolder(folder, 16)
    data.images[0, :, :, :8] = 0
    encoded = Encoded(data, lambda x: x[:, :, ::4, ::4], lambda texts: torch.tensor([[[len(t)]] for t in texts]).float(), batch=2)
    x, _ = data[0]
    torch.manual_seed(0)
    seen = {tuple(encoded[0][0].flatten().tolist()) for _ in range(20)}
    assert seen == {tuple(v[:, ::4, ::4].flatten().tolist()) for v in (x, x.flip(2))}
    assert encoded[1][1].item() == len("a green square")


def test_encoded_images_are_kept_in_a_file_for_the_same_data_and_networks(folder, tmp_path):
    data, network = CaptionedFolder(folder, 16), torch.nn.Linear(2, 2)
    calls = []

    def encode_images(x):
        calls.append(len(x))
        return x[:, :, ::4, ::4]

    def encoded(**options):
        return Encoded(data, encode_images, lambda texts: torch.tensor([[[len(t)]] for t in texts]).float(), **options)

    file = tmp_path / "cache" / f"{fingerprint(data, network)}.safetensors"
    first, second = encoded(file=file), encoded(file=file, mirrored=False)
    assert len(calls) == 1 and torch.equal(first.latents, second.latents) and torch.equal(first.tokens, second.tokens)
    assert (
        all(torch.equal(second[0][0], data[0][0][:, ::4, ::4].half().float()) for _ in range(5)) and second.caption == first.caption
    )
    same, before = CaptionedFolder(folder, 16), fingerprint(data, network)
    assert fingerprint(same, network) == before
    same.captions[0] += "!"
    assert fingerprint(same, network) != before
    network.weight.data[0, 0] += 1
    assert fingerprint(data, network) != before


def test_emoji_captions():
    assert readable({"name": "HEAVY BLACK HEART", "short_name": "heart"}) == "heart"
    assert readable({"name": "BLACK CAT", "short_name": "black_cat"}) == "black cat"
    entry = {"name": "WAVING HAND SIGN", "short_name": "wave", "category": "People & Body", "subcategory": "hand", "image": "a.png",
             "has_img_google": True, "sort_order": 1, "skin_variations": {"1F3FB": {"image": "b.png"},
                                                                         "1F3FB-1F3FF": {"image": "c.png"}}}  # fmt: skip
    flag = {**entry, "name": "FLAG", "category": "Flags"}
    assert list(entries([entry, flag])) == [
        ("waving hand sign", "waving hand sign", "People & Body", "a.png"),
        ("waving hand sign", "waving hand sign, light skin tone", "People & Body", "b.png"),
        ("waving hand sign", "waving hand sign, light and dark skin tones", "People & Body", "c.png"),
    ]
    assert len(held_out_names()) == 79


def test_transparency_becomes_white(tmp_path):
    image = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 0, 64, 128))
    image.save(tmp_path / "a.webp", lossless=True)
    x = pixels(Image.open(tmp_path / "a.webp"))
    assert x.shape == (64, 64, 3) and x[10, 60].tolist() == [255] * 3 and x[10, 10].tolist() == [0, 0, 255]


def test_jitter_is_of_each_image_and_seeded():
    x = torch.randn(4, 3, 16, 16)
    a, b = (jitter(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == x.shape and not torch.allclose(a, x, atol=0.1)
    assert torch.allclose(jitter(x, torch.Generator(), turn=0, scale=0, shift=0), x, atol=1e-5)


def config(folder, parameterization, **trainer):
    unet = {"image_size": 8, "in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": [1], "num_res_blocks": 1,
            "attention_resolutions": [1], "num_heads": 2, "use_spatial_transformer": True, "context_dim": 16}  # fmt: skip
    model = {"parameterization": parameterization, "image_size": 8, "channels": 4, "conditioning_key": "crossattn",
             "scale_by_std": True, "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": unet},
             "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": AUTOENCODER},
             "cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
                                   "params": {"arch": "ViT-B-32", "max_length": 8,
                                              "text_config": {**TEXT, "embed_dim": 8}}}}  # fmt: skip
    return {
        "model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": model},
        "parts": {"first_stage_model.": {"path": str(folder / "autoencoder.safetensors")},
                  "cond_stage_model.model.": {"path": str(folder / "clip.safetensors"), "without": "visual."}},
        "data": {"folder": str(folder / "images"), "size": 16},
        "training": {"target": "ldm.training.TextToImageTraining", "params": {"warmup": 1, "prompts": ["a red square"]}},
        "batch_size": 2,
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
                    "check_val_every_n_epoch": None, "val_check_interval": 4, **trainer},
    }  # fmt: skip


@pytest.mark.parametrize("parameterization", ["eps", "velocity"])
def test_text_to_image_training(folder, tmp_path, parameterization):
    """Parts from files, encoding, training, weights without the parts; load_model puts them together again."""
    torch.manual_seed(0)
    autoencoder = instantiate_from_config({"target": "ldm.models.autoencoder.AutoencoderKL", "params": AUTOENCODER})
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    save_weights(autoencoder, tmp_path / "autoencoder.safetensors", torch.float32)
    save_weights(open_clip.CLIP(8, vision, {"context_length": 8, **TEXT}), tmp_path / "clip.safetensors", torch.float32)
    spec = config(tmp_path, parameterization)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = train(spec, tmp_path / "run")
    assert list((tmp_path / "run").glob("samples_*.png"))
    model = load_model(weights, spec, device="cpu")
    data = CaptionedFolder(tmp_path / "images", 16)
    z = model.encode(torch.cat([torch.stack([data[i][0] for i in range(3)])] * 2))
    assert abs(torch.cat([z, model.encode(data[0][0][None].flip(3))]).std() - 1) < 0.3
    torch.testing.assert_close(model.first_stage_model.state_dict(), autoencoder.state_dict())
    state = sample(LatentDenoiser(model, "a red square", guidance=2.0), None, (1, 4, 8, 8), [0], steps=3)
    assert state.nfe == 3 and model.decode(state.x_t).shape == (1, 3, 16, 16)
    # Fine-tuning begins with those weights and their scale_factor, whatever the new images' latents are like.
    model.scale_factor *= 2
    save_weights(model, tmp_path / "begin.safetensors", torch.float32, without=tuple(spec["parts"]))
    spec["init"], spec["training"]["params"]["lr"] = str(tmp_path / "begin.safetensors"), 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = load_model(train(spec, tmp_path / "tuned"), spec, device="cpu")
    torch.testing.assert_close(again.state_dict(), model.state_dict(), atol=1e-3, rtol=1e-3)

    (tmp_path / "clip.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"clip\.safetensors"):
        load_model(weights, spec, device="cpu")
