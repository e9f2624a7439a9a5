"""Loading of models: every format gives the same model, every name leads to one or to a clear sentence."""

import zipfile

import pytest
import torch
from checkpoint_files import as_lightning, assert_equal, refused
from common import PIXELS, ROOT, UNET, randomised, reference
from omegaconf import OmegaConf
from published import X_T, tiny_config

from ldm import checkpoints, tensor_files, weights
from ldm.checkpoints import infer_config, load_model
from ldm.denoisers import LatentDenoiser
from ldm.util import instantiate_from_config, resolve_device
from ldm.weights import save_weights


@pytest.fixture(scope="module")
def model():
    return randomised(instantiate_from_config(tiny_config()))


@pytest.fixture(scope="module")
def x0(model):
    return LatentDenoiser(model, ["a cat", "a dog"], 3.0)(X_T, 500)


# The same model from every format


def test_the_tiny_model_has_the_full_names(model):
    assert set(model.state_dict()) == set(reference())


def test_lightning_ckpt(model, x0, tmp_path):
    torch.save(as_lightning(model.state_dict()), tmp_path / "v1.ckpt")
    loaded = load_model(tmp_path / "v1.ckpt", tiny_config(), device="cpu")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    conv = loaded.unet.input_blocks[0][0].weight
    assert conv.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(LatentDenoiser(loaded, ["a cat", "a dog"], 3.0)(X_T, 500), x0, rtol=1e-4, atol=1e-4)
    assert_equal(loaded, model)


def test_ema_weights_are_used_and_announced(model, x0, tmp_path, capsys):
    state = dict(model.state_dict())
    for name in [k for k in state if k.startswith("model.")]:
        state["model_ema." + name.removeprefix("model.").replace(".", "")] = state[name]
        state[name] = torch.zeros_like(state[name])
    state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    assert "model_ema.diffusion_modeltime_embed0weight" in state
    torch.save(as_lightning(state), tmp_path / "full-ema.ckpt")
    loaded = load_model(tmp_path / "full-ema.ckpt", tiny_config(), device="cpu")
    assert "averaged (EMA)" in capsys.readouterr().out
    torch.testing.assert_close(LatentDenoiser(loaded, ["a cat", "a dog"], 3.0)(X_T, 500), x0, rtol=1e-4, atol=1e-4)

    del state["model_ema.diffusion_modeltime_embed0weight"]
    torch.save(state, tmp_path / "half-ema.ckpt")
    with pytest.raises(ValueError, match=r"missing tensors \(1\): model_ema.diffusion_modeltime_embed0weight"):
        load_model(tmp_path / "half-ema.ckpt", tiny_config(), device="cpu")


def test_float16_safetensors(model, x0, tmp_path):
    save_weights(model, tmp_path / "v1.safetensors", torch.float16)
    loaded = load_model(tmp_path / "v1.safetensors", tiny_config(), device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(LatentDenoiser(loaded, ["a cat", "a dog"], 3.0)(X_T, 500), x0, rtol=0.01, atol=0.02)
    betas = loaded.betas
    half = load_model(tmp_path / "v1.safetensors", tiny_config(), device="cpu", dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert half.betas.dtype == torch.float32 and torch.equal(half.betas, betas)
    assert half.schedule.alphas_cumprod.dtype == torch.float64


def test_weights_only_files_parameters_strides_and_bfloat16(pixels, tmp_path):
    """A bare state dict; channels-last, transposed and sliced tensors and Parameters in it; bfloat16."""
    state = {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in pixels.state_dict().items()}
    name = UNET + "input_blocks.0.0.weight"
    state[name] = pixels.state_dict()[name].to(memory_format=torch.channels_last)
    linear = UNET + "time_embed.2.weight"
    state[linear] = torch.cat([torch.zeros(3, 128), pixels.state_dict()[linear].T]).T[:, 3:]
    torch.save(state, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", PIXELS, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), pixels.parameters(), strict=True))
    save_weights(pixels, tmp_path / "a.safetensors", torch.bfloat16)
    loaded = load_model(tmp_path / "a.safetensors", {"model": PIXELS}, device="cpu", dtype=torch.bfloat16)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(loaded.parameters(), pixels.parameters(), strict=True))


def test_files_of_older_torch_versions(pixels, tmp_path):
    """Before torch 2.6 the records were neither aligned in a known way nor in a known order."""
    torch.save(pixels.state_dict(), tmp_path / "a.ckpt")
    with zipfile.ZipFile(tmp_path / "a.ckpt") as source, zipfile.ZipFile(tmp_path / "old.ckpt", "w") as target:
        for info in reversed(source.infolist()):
            if info.filename.rpartition("/")[2] not in (".format_version", ".storage_alignment", "byteorder"):
                target.writestr(info.filename, source.read(info))
    assert_equal(load_model(tmp_path / "old.ckpt", PIXELS, device="cpu"), pixels)


def test_the_file_can_go_once_loaded(pixels, tmp_path):
    torch.save(pixels.state_dict(), tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", PIXELS, device="cpu")
    (tmp_path / "a.ckpt").write_bytes(b"")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), pixels.parameters(), strict=True))


def test_prediction_overrides_the_config_and_yaml_paths_work(pixels, tmp_path):
    save_weights(pixels, tmp_path / "a.safetensors", torch.float32)
    OmegaConf.save(OmegaConf.create({"model": PIXELS}), tmp_path / "a.yaml")
    assert load_model(tmp_path / "a.safetensors", tmp_path / "a.yaml", "cpu").parameterization == "eps"
    assert load_model(str(tmp_path / "a.safetensors"), PIXELS, "cpu", prediction="v").parameterization == "v"
    refused(tmp_path / "a.safetensors", "parameterization = 'w'", prediction="w")
    refused(tmp_path / "a.safetensors", "b.yaml", "no such file", config=tmp_path / "b.yaml", error=FileNotFoundError)


def test_a_measured_scale_factor_comes_from_the_file(tmp_path):
    for by_std in (True, False):
        config = tiny_config(scale_factor=1.0, scale_by_std=by_std, cond_stage_config=None)
        state = randomised(instantiate_from_config(config)).state_dict() | {"scale_factor": torch.tensor(0.75)}
        torch.save(state, tmp_path / "a.ckpt")
        assert float(load_model(tmp_path / "a.ckpt", config, "cpu", dtype=torch.float16).scale_factor) == 0.75


# Names, devices and configs


def test_names_that_lead_nowhere(tmp_path):
    refused("mnits", "mnits", "mnist, mnist-classifier", config=None)
    refused(tmp_path, "neither a shipped model")
    (tmp_path / "a.onnx").write_bytes(b"1")
    refused(tmp_path / "a.onnx", "a.onnx", ".ckpt, .pt, .pth, .bin or .safetensors file")
    refused(tmp_path / "absent.ckpt", "absent.ckpt", "no such file", error=FileNotFoundError)


@pytest.mark.parametrize("name", checkpoints.SHIPPED)
def test_shipped_models(name, monkeypatch, tmp_path):
    config, file = checkpoints.SHIPPED[name]
    assert (ROOT / config).is_file()
    if (ROOT / file).is_file():
        load_model(name, device="cpu")
    monkeypatch.setattr(checkpoints, "ROOT", tmp_path)
    refused(name, "python -m ldm.train", config, config=None, error=FileNotFoundError)


def test_dtype_and_device_are_checked(pixels, tmp_path):
    save_weights(pixels, tmp_path / "a.safetensors", torch.float16)
    refused(tmp_path / "a.safetensors", "dtype", dtype="half")
    refused(tmp_path / "a.safetensors", "dtype", dtype=torch.int8)
    with pytest.raises(ValueError, match="device = 'cuba'"):
        load_model(tmp_path / "a.safetensors", PIXELS, device="cuba")
    assert load_model(tmp_path / "a.safetensors", PIXELS).betas.device == resolve_device("auto")


def names_only(**shapes):
    """Stored tensors by shape, as `index` gives them, without a file."""
    keys = {"first": UNET + "input_blocks.0.0.weight",
            "to_k": UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"}  # fmt: skip
    return {keys[k]: tensor_files.Stored(None, 0, torch.empty(v, device="meta")) for k, v in shapes.items()}


def test_the_config_is_found_from_the_tensors():
    v1 = names_only(first=(320, 4, 3, 3), to_k=(320, 768))
    v2 = names_only(first=(320, 4, 3, 3), to_k=(320, 1024))
    assert infer_config("a", v1, None).name == "v1-inference.yaml"
    assert infer_config("a", v2, "v").name == "v2-inference-v.yaml"
    assert infer_config("a", v2, "eps").name == "v2-inference.yaml"
    wrong = {
        'give prediction="v"': (v2, None),
        "an inpainting model": (names_only(first=(320, 9, 3, 3), to_k=(320, 768)), None),
        "a depth-conditioned model": (names_only(first=(320, 5, 3, 3), to_k=(320, 1024)), None),
        "another model, its U-Net takes 6 channels": (names_only(first=(320, 6, 3, 3), to_k=(320, 768)), None),
        "no known kind: its U-Net takes 4 channels": (names_only(first=(96, 4, 3, 3)), None),
        "text of width 2048": (names_only(first=(320, 4, 3, 3), to_k=(640, 2048)), None),
        "no U-Net under model.diffusion_model and no autoencoder": ({"unet.conv_in.weight": None}, None),
    }
    for words, (stored, prediction) in wrong.items():
        with pytest.raises(ValueError, match=words):
            infer_config("a", stored, prediction)


def test_names_of_version_0_1_are_found_at_their_old_place():
    with pytest.warns(DeprecationWarning, match="ldm.weights.save_weights"):
        assert checkpoints.save_weights is save_weights
    assert checkpoints.index is weights.index
    with pytest.raises(ImportError, match="no_such"):
        from ldm.checkpoints import no_such  # noqa: F401
