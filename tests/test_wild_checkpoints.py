"""Checkpoints as people have them: other spellings, averages, containers and kinds. The right weights, or what the file is."""

import builtins
import io
import json
import os
import pickle
import random
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import Calls, archive, as_lightning, assert_equal, refused
from common import PIXELS, UNET, randomised
from pipelines import build
from published import tiny_config
from safetensors.torch import load_file, save_file

from ldm.checkpoints import load_model
from ldm.kinds import infer_config
from ldm.tensor_files import SAFETENSORS_DTYPES, Stored, as_protocol_2, index
from ldm.util import instantiate_from_config

OPEN_CLIP = {"target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
             "params": {"layer": "penultimate", "text_config": dict(width=32, heads=2, layers=3, embed_dim=32)}}  # fmt: skip


TEXT = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=9, bos_token_id=7,
            eos_token_id=8)  # fmt: skip
SMALL_UNET = dict(image_size=8, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=1, attention_resolutions=[1],
                  channel_mult=[1], num_heads=4, use_spatial_transformer=True, context_dim=32)  # fmt: skip
SMALL_VAE = dict(double_z=True, z_channels=4, resolution=16, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1], num_res_blocks=1,
                 attn_resolutions=[])  # fmt: skip
SMALL = tiny_config(
    unet_config={"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": SMALL_UNET},
    first_stage_config={"target": "ldm.models.autoencoder.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": SMALL_VAE}},
    cond_stage_config={"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder", "params": {"text_config": TEXT}},
)


@pytest.fixture(scope="module")
def model():
    return randomised(instantiate_from_config(SMALL))


def averages(state, factor=1.0):
    """The published averages of a state's U-Net, each times a factor."""
    return {"model_ema." + k.removeprefix("model.").replace(".", ""): v * factor for k, v in state.items() if k.startswith(UNET)}


# ---- containers


@pytest.mark.parametrize("suffix, protocol", [(".ckpt", 2), (".pt", 3), (".pth", 4), (".bin", 5)])
def test_every_suffix_and_pickle_protocol(suffix, protocol, pixels, tmp_path):
    path = tmp_path / f"a{suffix}"
    torch.save(as_lightning(pixels.state_dict(), tags={"a", "b"}, raw=b"\x00\xff"), path, pickle_protocol=protocol)
    assert_equal(load_model(path, PIXELS, device="cpu"), pixels)


def test_a_pickle_of_protocol_2_says_the_same():
    repeated = "a name that occurs twice"
    content = {"a": [1, -1, 2**40, 1.5, True, None, repeated], "b": {"c": (repeated, "ü\n"), "d": {3: 4}}, "e": ("x",) * 300}
    for protocol in (4, 5):
        data = as_protocol_2(pickle.dumps(content, protocol))
        assert data[1] == 2 and pickle.loads(data) == content
    assert pickle.loads(as_protocol_2(pickle.dumps([{1, 2}, b"\xe9", frozenset((3,))], 4))) == [[1, 2], "é", (3,)]


@pytest.mark.parametrize("wrap", [
    lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}, lambda s: {"epoch": torch.tensor(3), "model_state_dict": s},
    lambda s: {"checkpoint": {"model": {"state_dict": s}}}, lambda s: {"my_weights": s, "optimizer": {"state": {0: {"step": 1}}}},
    lambda s: {"module": s, "ema": {k: v * 1.01 for k, v in s.items()}, "lr": 0.1}, lambda s: {"params_ema": s},
])  # fmt: skip
def test_weights_inside_a_training_state(wrap, pixels, tmp_path):
    torch.save(wrap(pixels.state_dict()), tmp_path / "a.pt", pickle_protocol=4)
    assert_equal(load_model(tmp_path / "a.pt", PIXELS, device="cpu", ema=False), pixels)


@pytest.mark.parametrize("kind", ["os.system", "eval", "nested", "getattr"])
def test_protocol_4_runs_nothing_either(kind, tmp_path):
    canary = tmp_path / "canary"
    for protocol in (4, 5):  # the same calls, with STACK_GLOBAL
        data = repickled(kind, canary, protocol)
        assert b"\x93" in data
        archive(tmp_path / "evil.ckpt", data)
        refused(tmp_path / "evil.ckpt", "evil.ckpt")
        assert not canary.exists()


def repickled(kind, canary, protocol):
    calls = {"os.system": Calls(os.system, f"touch {canary}"), "eval": Calls(builtins.eval, f"open({str(canary)!r}, 'w')"),
             "nested": {"a": {"state_dict": Calls(subprocess.getoutput, f"touch {canary}")}},
             "getattr": Calls(getattr, Path(canary), "touch")}  # fmt: skip
    return pickle.dumps(calls[kind], protocol)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_float8_is_converted(dtype, suffix, pixels, tmp_path):
    state = {k: v.to(dtype) if v.is_floating_point() and v.ndim > 1 else v for k, v in pixels.state_dict().items()}
    path = tmp_path / f"a{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    for to in (torch.float32, torch.float16):
        loaded = dict(load_model(path, PIXELS, device="cpu", dtype=to).named_parameters())
        assert all(torch.equal(p, state[name].to(to)) for name, p in loaded.items())


# ---- names


@pytest.mark.parametrize("rename", [
    lambda k: "module." + k, lambda k: k.replace("diffusion_model.", "diffusion_model._orig_mod."),
    lambda k: k.replace("cond_stage_model.", "cond_stage_model.wrapped."), lambda k: k.replace("text_model.", ""),
    lambda k: k.replace("token_embedding.", "token_embedding.wrapped."),
])  # fmt: skip
def test_other_spellings(rename, model, tmp_path):
    state = {rename(k): v for k, v in model.state_dict().items()}
    assert set(state) != set(model.state_dict())
    torch.save(state, tmp_path / "a.ckpt")
    assert_equal(load_model(tmp_path / "a.ckpt", SMALL, device="cpu"), model)


def test_useless_tensors_are_named_and_ignored_unknown_ones_refused(model, tmp_path, capsys):
    useless = ["cond_stage_model.logit_scale", "cond_stage_model.transformer.text_model.text_projection.weight",
               "embedding_manager.string_to_param_dict.*", "cond_stage_model.transformer.text_projection.weight"]  # fmt: skip
    state = model.state_dict() | {name: torch.ones(1) for name in useless}
    save_file(state, tmp_path / "a.safetensors")
    assert_equal(load_model(tmp_path / "a.safetensors", SMALL, device="cpu"), model)
    notice = capsys.readouterr().out
    assert "without a use here, which are ignored" in notice and all(name in notice for name in useless)
    save_file(state | {"cond_stage_model.transformer.adapter.weight": torch.ones(1)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"unexpected tensors \(1\): cond_stage_model.transformer.adapter.weight"):
        load_model(tmp_path / "b.safetensors", SMALL, device="cpu")


def test_what_the_text_encoder_never_reads_may_be_missing(tmp_path):
    config = {**SMALL, "params": {**SMALL["params"], "cond_stage_config": OPEN_CLIP}}
    model = randomised(instantiate_from_config(config))
    state = {k: v for k, v in model.state_dict().items()
             if not k.endswith(("logit_scale", "text_projection")) and "resblocks.2." not in k}  # fmt: skip
    assert len(state) == len(model.state_dict()) - 14
    save_file(state, tmp_path / "a.safetensors")
    loaded = load_model(tmp_path / "a.safetensors", config, device="cpu", dtype=torch.float32)
    assert torch.equal(loaded.encode_prompts(["a lake"]), model.encode_prompts(["a lake"]))
    assert not any(p.is_meta for p in loaded.parameters())
    del state["cond_stage_model.model.transformer.resblocks.1.ln_1.weight"]
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"missing tensors \(1\): .*resblocks.1.ln_1.weight"):
        load_model(tmp_path / "b.safetensors", config, device="cpu")


@pytest.mark.parametrize("marks, given, prediction, alpha", [
    ([], None, "eps", 0.963), (["v_pred"], None, "v", 0.963), (["ztsnr"], None, "v", 2.2e-4),
    (["v_pred", "ztsnr"], None, "v", 2.2e-4), (["v_pred"], "eps", "eps", 0.963),
])  # fmt: skip
def test_marks_decide_the_prediction(marks, given, prediction, alpha, pixels, tmp_path):
    torch.save(pixels.state_dict() | {mark: torch.tensor([]) for mark in marks}, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", PIXELS, device="cpu", prediction=given)
    assert loaded.parameterization == prediction
    assert loaded.schedule.level(9).alpha == pytest.approx(alpha, rel=0.01)
    assert loaded.schedule.level(0).alpha == pytest.approx(pixels.schedule.level(0).alpha, abs=1e-9)


# ---- averages


SPELLED = {
    "published": lambda k: "model_ema." + k.removeprefix("model.").replace(".", ""),
    "with dots": lambda k: "model_ema." + k.removeprefix("model."),
    "whole name": lambda k: "model_ema." + k,
    "ema": lambda k: "ema." + k,
    "ema_model": lambda k: "ema_model." + k,
}


@pytest.mark.parametrize("spelling", SPELLED)
@pytest.mark.parametrize("ema, factor", [("auto", 1.1), (True, 1.1), (False, 1.0)])
def test_averages_in_every_spelling(spelling, ema, factor, pixels, tmp_path):
    state = pixels.state_dict()
    names = [name for name, _ in pixels.named_parameters()]
    torch.save(state | {SPELLED[spelling](name): state[name] * 1.1 for name in names}, tmp_path / "a.ckpt")
    loaded = load_model(tmp_path / "a.ckpt", PIXELS, device="cpu", ema=ema)
    assert all(torch.equal(p, state[name] * factor) for name, p in loaded.named_parameters())


@pytest.mark.parametrize("stale", ["zeros", "another model", "nan"])
def test_averages_that_do_not_belong_are_an_error(stale, pixels, tmp_path):
    other = randomised(instantiate_from_config(PIXELS), seed=1).state_dict()
    ema = averages(other) if stale == "another model" else averages(other, 0.0 if stale == "zeros" else float("nan"))
    torch.save(pixels.state_dict() | ema, tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "averaged (EMA) weights do not belong to its plain ones", "ema=False", "ema=True")
    assert_equal(load_model(tmp_path / "a.ckpt", PIXELS, device="cpu", ema=False), pixels)
    if stale == "another model":
        name = UNET + "time_embed.2.weight"
        assert torch.equal(load_model(tmp_path / "a.ckpt", PIXELS, device="cpu", ema=True).state_dict()[name], other[name])


def test_wrong_values_of_ema(pixels, tmp_path):
    torch.save(pixels.state_dict(), tmp_path / "a.ckpt")
    refused(tmp_path / "a.ckpt", "ema = True", "holds no averaged", ema=True)
    refused(tmp_path / "a.ckpt", "ema = 'yes'", 'give True, False or "auto"', ema="yes")


# ---- kinds


def names_only(*names, shape=(1,)):
    return {name: Stored(None, 0, torch.empty(shape, device="meta")) for name in names}


@pytest.mark.parametrize("name, words", [
    ("conditioner.embedders.1.model.ln_final.weight", "a Stable Diffusion XL model: .*StableDiffusionXLPipeline"),
    ("conditioner.embedders.0.model.ln_final.weight", "a Stable Diffusion XL refiner: give the base model"),
    ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "a Stable Diffusion 3 model: .*StableDiffusion3Pipeline"),
    ("double_blocks.0.img_attn.proj.weight", "a FLUX model: .*FluxPipeline.from_single_file"),
    ("lora_unet_down_blocks_0_attentions_0.lora_up.weight", "a LoRA: merge it into its model"),
    ("unet.down_blocks.0.attentions.0.to_k.lora_A.weight", "a LoRA: merge it"),
    ("lora_te_text_model_0.hada_w1_a", "a LoRA: merge it"),
    ("control_model.input_blocks.0.0.weight", "a ControlNet: give its base model: constraints need no ControlNet"),
    ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"), ("emb_params", "a textual-inversion embedding"),
    ("*", "a textual-inversion embedding"), ("image_proj.norm.weight", "an IP-Adapter"),
    ("down_blocks.0.motion_modules.0.norm.weight", "a video model"),
    ("decoder.up_blocks.0.resnets.0.conv1.weight", "an autoencoder in diffusers' format: give its pipeline's folder"),
    ("down_blocks.0.resnets.0.conv1.weight", "a U-Net in diffusers' format: give the folder of its whole pipeline"),
    ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder alone: give it next to the model .*parts="),
    ("something.else", "holds no U-Net under model.diffusion_model and no autoencoder"),
])  # fmt: skip
def test_files_of_other_kinds_are_named(name, words):
    with pytest.raises(ValueError, match=f"a.safetensors (is )?{words}"):
        infer_config("a.safetensors", names_only(name))


def test_a_folder_that_holds_only_a_variant(tmp_path):
    made = build("sd")
    made.to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    for variant in (None, "fp16"):
        loaded = load_model(tmp_path / "half", device="cpu", variant=variant)
        assert torch.equal(loaded.net.conv_in.weight, made.unet.conv_in.weight.float())
    file = next((tmp_path / "half/unet").glob("*.fp16.safetensors"))
    for component in ("unet", "vae"):
        file = next((tmp_path / "half" / component).glob("*.fp16.safetensors"))
        file.rename(file.with_name(file.name.replace("fp16", component)))
    with pytest.raises(ValueError, match="holds no plain weights, but several variants: give variant=fp16 or unet or vae"):
        load_model(tmp_path / "half", device="cpu")


# ---- parts


def test_parts_from_their_own_files(model, tmp_path):
    """A fine-tuned autoencoder alone, with what its training leaves; a text encoder as transformers names it; of a whole model."""
    other = randomised(instantiate_from_config(SMALL), seed=1).state_dict()
    torch.save(model.state_dict(), tmp_path / "model.ckpt")
    vae = {k.removeprefix("first_stage_model."): v for k, v in other.items() if k.startswith("first_stage_model.")}
    text = {k.removeprefix("cond_stage_model.transformer."): v for k, v in other.items() if k.startswith("cond_stage_model.")}
    files = {"vae.safetensors": vae | {"loss.logvar": torch.ones(1)}, "text.safetensors": text | {"logit_scale": torch.ones(1)},
             "whole.safetensors": other}  # fmt: skip
    for name, state in files.items():
        save_file(state, tmp_path / name)
    for part, file in {"first_stage_model": "vae", "cond_stage_model.": "text", "first_stage_model.": "whole"}.items():
        loaded = load_model(tmp_path / "model.ckpt", SMALL, "cpu", parts={part: tmp_path / f"{file}.safetensors"}).state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(loaded[name], other[name] if name.startswith(part) else value), name

    load = lambda **parts: load_model(tmp_path / "model.ckpt", SMALL, "cpu", parts=parts)  # noqa: E731
    with pytest.raises(ValueError, match="the model has no first_stage, did you mean first_stage_model?"):
        load(first_stage=tmp_path / "vae.safetensors")
    with pytest.raises(FileNotFoundError, match="absent.safetensors: there is no such file"):
        load(first_stage_model=tmp_path / "absent.safetensors")
    with pytest.raises(ValueError, match="text.safetensors holds nothing of first_stage_model"):
        load(first_stage_model=tmp_path / "text.safetensors")
    missing = vae.pop("decoder.conv_out.bias")
    save_file(vae | {"decoder.conv_out.scale": missing}, tmp_path / "vae.safetensors")
    with pytest.raises(
        ValueError, match=r"missing tensors \(1\): first_stage_model.decoder.conv_out.bias(.|\n)*unexpected tensors \(1\)"
    ):
        load(first_stage_model=tmp_path / "vae.safetensors")


# ---- damaged files


def mutated(data, draw):
    """Bytes with a few changes: flipped, cut out, repeated, or set to extreme values."""
    data = bytearray(data)
    for _ in range(draw.randint(1, 4)):
        i, n = draw.randrange(len(data)), draw.randint(1, 8)
        kind = draw.randrange(5)
        if kind == 0:
            data[i] = draw.randrange(256)
        elif kind == 1:
            del data[i : i + n]
        elif kind == 2:
            data[i:i] = data[i : i + n]
        elif kind == 3:
            data[i : i + n] = draw.choice([b"\xff", b"\x00", b"\x80", b"9", b"-"]) * n
        else:
            j = draw.randrange(len(data))
            data[i], data[j] = data[j], data[i]
        data = data or bytearray(b"\x00")
    return bytes(data)


def test_two_thousand_damaged_headers(tmp_path):
    """Each is read, or refused by a ValueError of one line; no other error, no hang, nothing run. What is read lies in the file."""
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.tensor(3)}
    save_file(state, tmp_path / "good.safetensors")
    whole = (tmp_path / "good.safetensors").read_bytes()
    pickles = {}
    for protocol in (2, 4):
        file = io.BytesIO()
        torch.save({"state_dict": state, "epoch": 3, "path": tmp_path}, file, pickle_protocol=protocol)
        pickles[protocol] = file.getvalue()
        (tmp_path / "good.pt").write_bytes(pickles[protocol])
        assert set(index(tmp_path / "good.pt")) == set(state)
    draw, outcomes = random.Random(0), {"read": 0, "refused": 0}
    length = 8 + struct.unpack("<Q", whole[:8])[0]
    for i in range(2000):
        kind = i % 4
        if kind == 0:
            path, data = tmp_path / "a.safetensors", mutated(whole[:length], draw) + whole[length:]
        elif kind == 1:  # the zip archive itself
            path, data = tmp_path / "a.ckpt", mutated(pickles[draw.choice([2, 4])], draw)
        else:  # its pickle, in a whole archive
            path, source = tmp_path / "a.pt", pickles[2 if kind == 2 else 4]
            file = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(file, "w") as new:
                for info in old.infolist():
                    content = old.read(info)
                    new.writestr(info.filename, mutated(content, draw) if info.filename.endswith("data.pkl") else content)
            data = file.getvalue()
        path.write_bytes(data)
        try:
            for stored in index(path).values():
                stored.read()
            outcomes["read"] += 1
        except ValueError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), (i, error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 700 and outcomes["read"] > 50, outcomes


def test_every_dtype_of_a_header_is_read(tmp_path):
    state = {name: torch.ones(3).to(dtype) for name, dtype in SAFETENSORS_DTYPES.items()}
    save_file(state, tmp_path / "a.safetensors")
    found = index(tmp_path / "a.safetensors")
    assert all(
        torch.equal(found[name].read().float(), value.float()) for name, value in load_file(tmp_path / "a.safetensors").items()
    )
    header = json.dumps({"x": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [0, 1]}}).encode()
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\x00")
    refused(tmp_path / "b.safetensors", "F8_E8M0", "not supported")
