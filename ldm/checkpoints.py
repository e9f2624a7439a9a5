"""Weights on disk: safetensors and published .ckpt files, read strictly and without executing anything.

A file is indexed first (names, shapes, dtypes, and where the data lie) and compared with the model, which is built
without memory (on the device "meta"). Then one tensor after the other is mapped, converted, checked and put in its
place: the peak memory is that of the loaded model.
"""

import json
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from omegaconf import OmegaConf
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from ldm.models.diffusion.ddpm import SCHEDULE_BUFFERS
from ldm.util import ROOT, atomic_write, instantiate_from_config, load_config, resolve_device, resolve_path

SHIPPED = {  # name: (config, weights)
    "mnist": ("configs/mnist/unet.yaml", "checkpoints/mnist/unet.safetensors"),
    "mnist-classifier": ("configs/mnist/classifier.yaml", "checkpoints/mnist/classifier.safetensors"),
    "tiny": ("configs/tiny/unet.yaml", "checkpoints/tiny/unet.safetensors"),
    "tiny-flow": ("configs/tiny/flow.yaml", "checkpoints/tiny/flow.safetensors"),
    "tiny-autoencoder": ("configs/tiny/autoencoder.yaml", "checkpoints/tiny/autoencoder.safetensors"),
    "tiny-clip": ("configs/tiny/clip.yaml", "checkpoints/tiny/clip.safetensors"),
}
# What a file may hold without being loaded, or lack: what the model computes itself, and what only training needs.
RECOMPUTED = re.compile(rf"{'|'.join(SCHEDULE_BUFFERS)}|(.*\.)?position_ids")
TRAINING_ONLY = re.compile(r"(first_stage_model\.)?loss\..*|model_ema\.(decay|num_updates)|logvar|scale_factor")
# Kinds of Stable Diffusion that do more than text to picture, by the channels that their U-Net takes.
OTHER_KINDS = {5: "a depth-conditioned", 7: "an upscaling", 8: "an instruction-editing", 9: "an inpainting"}
# Python's modules whose classes honest checkpoints mention; a stub takes their place. Any other of them is an alarm.
DATA_MODULES = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools",
                "logging", "pathlib", "re", "types", "typing", "uuid"}  # fmt: skip
DATA_BUILTINS = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str",
                 "tuple"}  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save_weights(model, path, dtype, without=()):
    """Write the model's state dict, floating-point tensors as `dtype` (single numbers as they are), as safetensors. Left out
    are the schedule's buffers and the names that begin with one of `without`. Never leaves half a file."""
    tensors = {k: v for k, v in model.state_dict().items() if k not in SCHEDULE_BUFFERS and not k.startswith(tuple(without))}
    tensors = {k: (v.to(dtype) if v.is_floating_point() and v.ndim else v).contiguous().cpu() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def load_model(source="tiny", config=None, device="auto", dtype=None, prediction=None):
    """A pre-trained model: in eval mode, without gradients, its 4-D weights channels-last.

    source      a shipped model (a key of SHIPPED; "tiny" is a small text-to-image model of the kind of Stable Diffusion)
                or the path of a .ckpt or .safetensors file; or a folder that diffusers has saved a pipeline to, which
                then is the model of `ldm.diffusers_models.from_diffusers`
    config      path of a yaml file, or a dict or OmegaConf: {model: {target, params}}. None: of the shipped model, or
                found out from the file's tensors (Stable Diffusion v1 and v2). Its `parts` name files for those parts
                of the model that the source itself does not hold
    device      "auto" (CUDA, MPS or CPU), or a device's name
    dtype       of the weights: float32 (None), torch.float16 or torch.bfloat16. What goes in and comes out stays
                float32, and the noise schedule float64
    prediction  "eps" or "v", what the network predicts, instead of the config's. Needed for Stable Diffusion v2
                without config: its 512 base models (eps) and its 768 models (v) have the same tensors

    Nothing of the file is executed. Of a file with averaged weights (model_ema.*), these are used. Raises
    FileNotFoundError, or ValueError for a file that cannot be read, does not fit the model in any name or shape, or
    holds NaN or infinity.
    """
    device = resolve_device(device)
    dtype = torch.float32 if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype = {dtype!r}: give torch.float32, torch.float16, torch.bfloat16 or None")
    if (Path(source).expanduser() / "model_index.json").is_file():
        if config is not None:
            raise ValueError(f"config was given, but {source} is a diffusers pipeline, which has its own: leave config out")
        from ldm.diffusers_models import from_diffusers  # takes seconds to import

        return from_diffusers(Path(source).expanduser(), prediction=prediction, device=device, dtype=dtype)
    path, config = locate(source, config)
    stored = index(path)
    config = infer_config(path, stored, prediction) if config is None else config
    overrides = {} if prediction is None else {"parameterization": prediction}
    model_config, parts = read_config(config)
    stored = index_parts(parts) | stored
    with torch.device("meta"):
        model = instantiate_from_config(model_config, **overrides)
    expected = model.state_dict(keep_vars=True)
    names = match(path, stored, expected)

    tensors = {}
    for name, name_in_file in tqdm(names.items(), f"loading {path.name}", unit=" tensors", delay=1, leave=False):
        own, value = expected[name], stored[name_in_file].read()
        to = dtype if isinstance(own, nn.Parameter) else own.dtype
        if to.is_floating_point and not all(abs(x) <= torch.finfo(to).max for x in torch.aminmax(value)):
            raise ValueError(f"{path}: the tensor {name_in_file} holds NaN or infinity (as {to})")
        layout = torch.channels_last if own.ndim == 4 else torch.preserve_format
        tensors[name] = value.to(device=device, dtype=to, copy=True, memory_format=layout)
    model.load_state_dict(tensors, strict=False, assign=True)  # `match` was strict
    if any(buffer.is_meta for buffer in model.buffers()):  # those that the model computes itself (CLIP's attention mask)
        computed = dict(instantiate_from_config(model_config, **overrides).named_buffers())
        for name, buffer in list(model.named_buffers()):
            if buffer.is_meta:
                module, _, own_name = name.rpartition(".")
                model.get_submodule(module)._buffers[own_name] = computed[name]
    if "scale_factor" in stored and "scale_factor" not in expected:
        model.scale_factor = stored["scale_factor"].read().item()
    return model.to(device).eval().requires_grad_(False)


def locate(source, config):
    """(path of the weights, config or None) of a shipped model's name or a path."""
    if str(source) in SHIPPED:
        shipped_config, weights = SHIPPED[str(source)]
        if not (path := ROOT / weights).is_file():
            run = "_".join(Path(shipped_config).with_suffix("").parts[-2:])
            raise FileNotFoundError(
                f"the weights of {str(source)!r} are not at {path}: take them from the repository, or run `python -m "
                f"ldm.train --config {shipped_config}` and copy runs/{run}/weights.safetensors there"
            )
        return path, ROOT / shipped_config if config is None else config
    path = Path(source).expanduser()
    if path.suffix not in (".ckpt", ".safetensors"):
        raise ValueError(
            f"{str(source)!r} is neither a shipped model ({', '.join(SHIPPED)}) nor the path of a .ckpt "
            "or .safetensors file or of a diffusers pipeline's folder (with model_index.json)"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    return path, config


def read_config(config):
    """(the node {target, params}, the parts) of a config: a yaml file's path, a dict or an OmegaConf; `model` may stand above
    the node, and `parts` beside `model`."""
    if isinstance(config, (str, Path)):
        config = load_config(config)
    config = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    return config.get("model", config), config.get("parts") or {}


def infer_config(path, stored, prediction):
    """The path of the config that the tensors of a Stable Diffusion checkpoint belong to."""
    first = stored.get("model.diffusion_model.input_blocks.0.0.weight")
    to_k = stored.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if first is None or to_k is None:
        raise ValueError(
            f"{path} holds no text-conditioned U-Net under model.diffusion_model (its tensors: {some(stored)}): give its config"
        )
    if (channels := first.meta.shape[1]) != 4:
        kind = OTHER_KINDS.get(channels, "another")
        raise ValueError(
            f"{path} is {kind} model, its U-Net takes {channels} channels: give the text-to-picture model "
            "(4 channels), constraints need no model of their own"
        )
    width = to_k.meta.shape[1]
    if width not in (768, 1024):
        raise ValueError(
            f"{path} is neither Stable Diffusion v1 nor v2: its U-Net takes text of width {width}, not 768 or 1024; give its config"
        )
    if width == 1024 and prediction is None:
        raise ValueError(
            f"{path} is Stable Diffusion v2, and its tensors do not tell what it predicts: give "
            'prediction="v" (the 768 models) or prediction="eps" (the 512 base models)'
        )
    name = "v1-inference" if width == 768 else "v2-inference-v" if prediction == "v" else "v2-inference"
    return ROOT / f"configs/stable-diffusion/{name}.yaml"


def match(path, stored, expected):
    """{name in the model: name in the file} of all tensors to load; one ValueError lists all that does not fit."""
    ema = [k for k in stored if k.startswith("model_ema.") and not TRAINING_ONLY.fullmatch(k)]
    if ema:
        print(f"{path.name} holds averaged (EMA) weights of the U-Net: these are used")
    names = {}
    for name, own in expected.items():
        averaged = bool(ema) and name.startswith("model.") and isinstance(own, nn.Parameter)
        if not RECOMPUTED.fullmatch(name):
            names[name] = "model_ema." + name.removeprefix("model.").replace(".", "") if averaged else name

    missing = [k for k in names.values() if k not in stored]
    known = {*names, *names.values()}
    known |= {k for k in stored if RECOMPUTED.fullmatch(k) or TRAINING_ONLY.fullmatch(k)}
    unexpected = [k for k in stored if k not in known]
    shapes = {k: (list(stored[k].meta.shape), list(expected[n].shape)) for n, k in names.items() if k in stored}
    misshaped = [f"{k} {found} instead of {needed}" for k, (found, needed) in shapes.items() if found != needed]
    lists = {"missing tensors": missing, "unexpected tensors": unexpected, "tensors of another shape": misshaped}
    if problems := [f"\n  {kind} ({len(v)}): {some(v)}" for kind, v in lists.items() if v]:
        unet = any(k.startswith("model") for k in missing + unexpected + misshaped)
        raise ValueError(
            f"{path} does not fit the config{', its U-Net is of another architecture' if unet else ''}:" + "".join(problems)
        )
    check_schedule(path, stored, expected)
    return names


def check_schedule(path, stored, expected):
    """The file's noise schedule is not loaded (the model's own is exact), but has to be the same."""
    if "betas" in stored and "betas" in expected:
        found, own = stored["betas"].read().double(), expected["betas"].double()
        if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-2):
            raise ValueError(
                f"{path} was trained with another noise schedule ({len(found)} betas, {found[0]:.3g} to "
                f"{found[-1]:.3g}) than the config's ({len(own)}, {own[0]:.3g} to {own[-1]:.3g})"
            )


def some(names, most=10):
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Stored(NamedTuple):
    """A tensor in a file, not read yet: dtype, shape and strides as a tensor on "meta", and where its bytes begin."""

    path: Path
    offset: int
    meta: torch.Tensor

    def read(self):
        """The tensor, mapped into memory (copy-on-write); the mapping ends with the tensor."""
        length = 1 + sum((n - 1) * stride for n, stride in zip(self.meta.shape, self.meta.stride(), strict=True))
        data = np.memmap(self.path, mode="c", offset=self.offset, shape=length * self.meta.itemsize)
        return torch.from_numpy(data).view(self.meta.dtype).as_strided(self.meta.shape, self.meta.stride())


def index(path):
    """{name: Stored} of the tensors in a .safetensors or .ckpt file."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    stored = index_safetensors(path) if path.suffix == ".safetensors" else index_ckpt(path)
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return stored


def index_parts(parts):
    """{name in the model: Stored} of the files for parts of a model, {prefix in the model: {path, without}}: tensors whose
    name in the file begins with `without` belong to something else."""
    stored = {}
    for prefix, part in parts.items():
        without = (part["without"],) if "without" in part else ()
        found = index(resolve_path(part["path"]))
        stored |= {prefix + name: tensor for name, tensor in found.items() if not name.startswith(without)}
    return stored


def load_parts(model, parts):
    """Copy the tensors of `parts` into a model that exists already, strictly."""
    stored = index_parts(parts)
    expected = {k: v for k, v in model.state_dict(keep_vars=True).items() if k.startswith(tuple(parts))}
    files = ", ".join(part["path"] for part in parts.values())
    model.load_state_dict({k: stored[name].read() for k, name in match(Path(files), stored, expected).items()}, strict=False)


def index_safetensors(path):
    try:
        with safe_open(path, "pt"):  # checks the header and the length of the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        metas = {name: torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]], device="meta")
                 for name, entry in header.items()}  # fmt: skip
    except Exception as error:  # of many types
        raise ValueError(f"{path} is no readable safetensors file: truncated or of another kind ({one_line(error)})") from None
    return {k: Stored(path, 8 + length + header[k]["data_offsets"][0], meta) for k, meta in metas.items()}


def index_ckpt(path):
    """Unpickled by torch's restricted unpickler, which builds tensors and containers only. Lightning's files also
    mention classes (callbacks, hyper-parameters ...): each name is bound to a stub, the class itself never looked up."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no readable checkpoint: truncated, of another kind, or from before torch 1.6")
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        alarming = sorted(filter(is_alarming, unknown))
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint ({one_line(error)})") from None
    if alarming:
        raise ValueError(
            f"{path} is refused, nothing of it was run: it asks for {some(alarming)}, which can execute "
            "code and which no weights need"
        )
    try:
        with torch.serialization.safe_globals([(stub(name), name) for name in unknown]):
            content = torch.load(path, map_location="meta", weights_only=True)
        content = content.get("state_dict", content)
        metas = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        begins = {k: v.untyped_storage()._checkpoint_offset for k, v in metas.items()}
    except Exception as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and plain data ({one_line(error)})") from None
    # torch computes the offsets from the order of the records: wrong where another program has rewritten the archive.
    if not set(begins.values()) <= set(record_offsets(path)):
        raise ValueError(f"{path} was compressed or repacked: load it with torch and save it again with torch.save")
    return {k: Stored(path, begins[k] + v.storage_offset() * v.itemsize, v) for k, v in metas.items()}


def is_alarming(name):
    """Whether a global is one of Python itself and not plain data: os.system, builtins.eval ..."""
    module, _, attribute = name.rpartition(".")
    if module == "builtins":
        return attribute not in DATA_BUILTINS
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names and package not in DATA_MODULES


def stub(name):
    """A class that takes any arguments and any state and does nothing with them; a kind of dict becomes a plain one."""

    class Stub:
        def __new__(cls, *args):
            return OrderedDict() if "dict" in name.lower() else super().__new__(cls)

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            pass

    return Stub


def record_offsets(path):
    """Where the bytes of each uncompressed record of a zip archive begin."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)  # in the record's own header: the lengths of its two variable fields
                yield info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def one_line(error):
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
