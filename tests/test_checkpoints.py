"""Loading of weights: every format gives the same model, hostile files run nothing, faults are one clear sentence."""

import argparse
import builtins
import collections
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, randomised, reference
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict
from safetensors.torch import load_file, save_file
from test_latent_diffusion import X_T, tiny_config

from ldm import checkpoints, tensor_files, weights
from ldm.checkpoints import infer_config, load_model
from ldm.denoisers import LatentDenoiser
from ldm.util import instantiate_from_config, resolve_device
from ldm.weights import save_weights

UNET = "model.diffusion_model."
PIXELS = {
    "target": "ldm.models.diffusion.ddpm.DDPM",
    "params": {
        "timesteps": 10,
        "unet_config": {
            "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
            "params": dict(image_size=8, in_channels=1, out_channels=1, model_channels=32, num_res_blocks=1,
                           attention_resolutions=[], channel_mult=[1], num_heads=4),
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return randomised(instantiate_from_config(tiny_config()))


@pytest.fixture(scope="module")
def x0(model):
    return LatentDenoiser(model, ["a cat", "a dog"], 3.0)(X_T, 500)


@pytest.fixture
def pixels():
    return randomised(instantiate_from_config(PIXELS))


def as_lightning(state, **extra):
    """What Lightning's files hold beside the weights, class references and foreign objects included."""
    return {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {ModelCheckpoint: {"monitor": "loss", "best_model_score": torch.tensor(0.1), "score": np.float64(0.1),
                                        "dirpath": Path("logs"), "history": np.ones(3)}},
        "optimizer_states": [torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [{}]}],
        "hyper_parameters": AttributeDict(lr=1e-4, config=OmegaConf.create({"a": [1, {"b": None}]})),
        "args": argparse.Namespace(seed=1), "counts": collections.defaultdict(list, {"a": [1]}), **extra,
    }  # fmt: skip


def refused(path, *words, error=ValueError, config=PIXELS, **kwargs):
    """Loading raises one sentence, in one line, with these words in it."""
    with pytest.raises(error) as caught:
        load_model(path, config, device="cpu", **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def assert_equal(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


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


# Pickles


class Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def hostile(kind, canary):
    """The bytes of a pickle that creates the file `canary` when it is executed."""
    command = f"touch {canary}"
    if kind == "os.system":
        return pickle.dumps(Calls(os.system, command), 2)
    if kind == "eval":
        return pickle.dumps({"state_dict": {}, "x": Calls(builtins.eval, f"open({str(canary)!r}, 'w')")}, 2)
    if kind == "nested":  # as the argument of an innocent class, beside weights
        return pickle.dumps({"callbacks": {ModelCheckpoint: Calls(subprocess.getoutput, command)}}, 2)
    if kind == "setstate":  # an object gets os.system as its __setstate__, and then a state
        state = b"}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
        argument = b"X" + struct.pack("<I", len(command)) + command.encode() + b"b"
        innocent = b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81"
        return innocent + state + argument + b"."
    if kind == "getattr":
        return pickle.dumps(Calls(getattr, Path(canary), "touch"), 2)
    return pickle.dumps(Calls(os.system, command), 4)


def archive(path, data):
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/byteorder", "little")


@pytest.mark.parametrize("kind", ["os.system", "eval", "nested", "setstate", "getattr", "protocol 4"])
def test_hostile_pickles_are_refused_and_nothing_runs(kind, tmp_path):
    canary = tmp_path / "canary"
    if kind != "getattr":  # which only prepares a call
        pickle.loads(hostile(kind, canary))
        canary.unlink()  # it was really hostile
    archive(tmp_path / "evil.ckpt", hostile(kind, canary))
    refused(tmp_path / "evil.ckpt", "evil.ckpt")
    assert not canary.exists()
    (tmp_path / "bare.ckpt").write_bytes(hostile(kind, canary))  # the format from before torch 1.6
    refused(tmp_path / "bare.ckpt", "bare.ckpt")
    assert not canary.exists()


def touch(path):
    Path(path).touch()


class Touches:
    def __init__(self, path):
        self.path = path

    def __setstate__(self, state):
        Path(state["path"]).touch()


def test_foreign_functions_and_classes_are_stubs(pixels, tmp_path):
    """Nothing is imported for them either: the weights load, and the functions that the pickle calls do not run."""
    canary = tmp_path / "canary"
    extra = {"a": Calls(touch, str(canary)), "b": Touches(str(canary)), "c": Calls(Touches, str(canary))}
    torch.save(as_lightning(pixels.state_dict(), **extra), tmp_path / "a.ckpt")
    data = zipfile.ZipFile(tmp_path / "a.ckpt").read("a/data.pkl")
    assert b"touch" in data and b"Touches" in data
    load_model(tmp_path / "a.ckpt", PIXELS, device="cpu")
    assert not canary.exists()
    assert "Stub" not in str(torch.serialization.get_safe_globals())


# Broken files


def test_broken_files_are_one_sentence(pixels, tmp_path):
    good = tmp_path / "good.ckpt"
    torch.save(as_lightning(pixels.state_dict()), good)
    save_weights(pixels, tmp_path / "good.safetensors", torch.float16)
    for name in ("good.ckpt", "good.safetensors"):
        data, bad = (tmp_path / name).read_bytes(), tmp_path / f"bad{Path(name).suffix}"
        for part in (len(data) - 1, len(data) // 2, 100, 4):
            bad.write_bytes(data[:part])
            refused(bad, str(bad))
        bad.write_bytes(b"")
        refused(bad, "is empty")
        bad.write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
        refused(bad, str(bad), "no readable")
    (tmp_path / "swapped.safetensors").write_bytes(good.read_bytes())
    refused(tmp_path / "swapped.safetensors", "no readable safetensors")

    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):  # by another program: other places
        with zipfile.ZipFile(good) as source, zipfile.ZipFile(tmp_path / "re.ckpt", "w", compression) as target:
            for info in source.infolist():
                target.writestr(info.filename, source.read(info))
        if compression == zipfile.ZIP_DEFLATED:
            refused(tmp_path / "re.ckpt", "compressed")
        else:
            assert_equal(load_model(tmp_path / "re.ckpt", PIXELS, device="cpu"), pixels)
    torch.save({"epoch": 3}, tmp_path / "none.ckpt")
    refused(tmp_path / "none.ckpt", "holds no tensors")
    torch.save([1, 2], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", "list.ckpt")
    torch.save(pixels, tmp_path / "module.ckpt")
    refused(tmp_path / "module.ckpt", "module.ckpt")


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


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_named(value, pixels, tmp_path):
    name = UNET + "time_embed.2.weight"
    state = pixels.state_dict()
    state[name][3, 4] = value
    torch.save(state, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", name, "NaN or infinity")


def test_overflow_in_half_precision_is_named(pixels, tmp_path):
    state = pixels.state_dict()
    state[UNET + "out.2.bias"][0] = 1e6
    torch.save(state, tmp_path / "a.ckpt")
    assert load_model(tmp_path / "a.ckpt", PIXELS, device="cpu").unet.out[2].bias[0] == 1e6
    refused(tmp_path / "a.ckpt", "out.2.bias", "float16", dtype=torch.float16)


def test_dtype_and_device_are_checked(pixels, tmp_path):
    save_weights(pixels, tmp_path / "a.safetensors", torch.float16)
    refused(tmp_path / "a.safetensors", "dtype", dtype="half")
    refused(tmp_path / "a.safetensors", "dtype", dtype=torch.int8)
    with pytest.raises(ValueError, match="device = 'cuba'"):
        load_model(tmp_path / "a.safetensors", PIXELS, device="cuba")
    assert load_model(tmp_path / "a.safetensors", PIXELS).betas.device == resolve_device("auto")


# Strictness


def test_everything_that_does_not_fit_is_in_one_error(pixels, tmp_path):
    state = pixels.state_dict()
    state = {k: v for k, v in state.items() if "middle_block.0" not in k}  # ten tensors
    state |= {f"extra.{i:02}": torch.ones(1) for i in range(12)}
    state[UNET + "out.2.weight"] = torch.ones(3, 32, 3, 3)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "a.safetensors", PIXELS, device="cpu")
    message = str(caught.value)
    assert "its U-Net is of another architecture" in message
    assert "missing tensors (10): model.diffusion_model.middle_block.0.in_layers.0.weight" in message
    assert "unexpected tensors (12): extra.00" in message and "extra.09 and 2 more" in message
    assert "extra.10" not in message
    assert "tensors of another shape (1): model.diffusion_model.out.2.weight [3, 32, 3, 3] instead of [1, 32" in message


def test_what_training_left_behind_and_the_schedule_are_not_errors(model, tmp_path):
    state = {k: v for k, v in model.state_dict().items() if not weights.RECOMPUTED.fullmatch(k)}
    state |= {"first_stage_model.loss.discriminator.main.0.weight": torch.ones(1), "loss.logvar": torch.ones(1),
              "logvar": torch.zeros(9), "model_ema.decay": torch.tensor(0.9), "betas": model.betas.half()}  # fmt: skip
    torch.save(state, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", tiny_config(), device="cpu")
    assert_equal(loaded, model)


def test_another_noise_schedule_is_refused(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "noise schedule", config=tiny_config(linear_end=0.02))


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


# Memory


def sparse_file(path, shapes):
    """A float16 .safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [begin, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)


MEASURE = """
import gc, json, re, sys, time, torch
from ldm.checkpoints import load_model

def status(key):
    return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024  # MiB

for path, config, dtype in json.loads(sys.argv[1]):
    gc.collect()
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before, start = status("VmRSS"), time.perf_counter()
    model = load_model(path, config, "cpu", getattr(torch, dtype))
    print("RESULT", status("VmHWM"), status("VmHWM") - before, time.perf_counter() - start)
    if config is None:
        assert model.encode_prompts([""]).shape == (1, 77, 768)
    del model
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory(tmp_path):
    """At most 1.3 times the file; Stable Diffusion v1 in float16, in full size, in less than 3 GB."""
    config = json.loads(json.dumps(PIXELS))
    config["params"]["unet_config"]["params"] |= {"model_channels": 256, "channel_mult": [1, 2, 2]}
    model = instantiate_from_config(config)
    torch.save(as_lightning(model.state_dict()), tmp_path / "a.ckpt")
    save_weights(model, tmp_path / "a.safetensors", torch.float32)
    sparse_file(tmp_path / "v1.safetensors", {k: v for k, v in reference().items() if "betas" not in k})
    size = (tmp_path / "a.ckpt").stat().st_size / 2**20
    assert size > 150
    files = [str(tmp_path / name) for name in ("a.ckpt", "a.safetensors")]
    runs = [(file, config, dtype) for file in files for dtype in ("float32", "float16")]
    runs.append((str(tmp_path / "v1.safetensors"), None, "float16"))
    out = subprocess.run([sys.executable, "-c", MEASURE, json.dumps(runs)], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr
    results = [[float(n) for n in line.split()[1:]] for line in out.stdout.splitlines() if line.startswith("RESULT")]
    for (_, _, dtype), (_, growth, _) in zip(runs[:4], results, strict=False):
        assert growth <= (1.3 if dtype == "float32" else 0.8) * size
    print(size, results)
    assert results[4][0] < 3000


# Saving


def test_saving_leaves_out_the_schedule_and_never_half_a_file(pixels, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_weights(pixels, path, torch.float16)
    saved = load_file(path)
    assert set(saved) == {k for k, _ in pixels.named_parameters()}
    assert {v.dtype for v in saved.values()} == {torch.float16}
    assert path.stat().st_mode & 0o777 == 0o644
    before = path.read_bytes()
    monkeypatch.setattr(weights, "save_file", lambda tensors, file: Path(file).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_weights(pixels, path, torch.float32)
    assert path.read_bytes() == before
