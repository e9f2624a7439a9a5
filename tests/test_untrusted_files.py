"""Files that are not what they should be: hostile ones run nothing, broken ones are one clear sentence."""

import builtins
import os
import pickle
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoint_files import Calls, archive, as_lightning, assert_equal, refused
from common import PIXELS, UNET
from pytorch_lightning.callbacks import ModelCheckpoint

from ldm.checkpoints import load_model
from ldm.weights import save_weights

# Pickles


def hostile(kind, canary):
    """The bytes of a pickle that creates the file `canary` when it is executed."""
    command = f"touch {canary}"
    if kind == "os.system":
        return pickle.dumps(Calls(os.system, command), 2)
    if kind == "eval":
        return pickle.dumps({"state_dict": {}, "x": Calls(builtins.eval, f"open({str(canary)!r}, 'w')")}, 2)
    if kind == "nested":  # as the argument of an innocent class, next to weights
        return pickle.dumps({"callbacks": {ModelCheckpoint: Calls(subprocess.getoutput, command)}}, 2)
    if kind == "setstate":  # an object gets os.system as its __setstate__, and then a state
        state = b"}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"
        argument = b"X" + struct.pack("<I", len(command)) + command.encode() + b"b"
        innocent = b"\x80\x02cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n)\x81"
        return innocent + state + argument + b"."
    if kind == "getattr":
        return pickle.dumps(Calls(getattr, Path(canary), "touch"), 2)
    return pickle.dumps(Calls(os.system, command), 4)


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
