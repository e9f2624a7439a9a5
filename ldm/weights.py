"""Weights on disk: safetensors and published .ckpt files, read strictly and without executing anything.

A file is indexed first (names, shapes, dtypes, and where the data lie) and compared with the model's own names and shapes.
Then one tensor after the other is mapped into memory, converted and put in its place (`ldm.checkpoints.load_model`).
"""

import json
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ldm.models.diffusion.ddpm import SCHEDULE_BUFFERS
from ldm.util import atomic_write, resolve_path

# What a file may hold without being loaded, or lack: what the model computes itself, and what only training needs.
RECOMPUTED = re.compile(rf"{'|'.join(SCHEDULE_BUFFERS)}|(.*\.)?position_ids")
TRAINING_ONLY = re.compile(r"(first_stage_model\.)?loss\..*|model_ema\.(decay|num_updates)|logvar|scale_factor")
# Python's modules whose classes honest checkpoints mention; a stub takes their place. Any other of them is an alarm.
DATA_MODULES = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools",
                "logging", "pathlib", "re", "types", "typing", "uuid"}  # fmt: skip
DATA_BUILTINS = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str",
                 "tuple"}  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def save_weights(model: nn.Module, path: str | Path, dtype: torch.dtype, without: Iterable[str] = ()) -> None:
    """Write the model's state dict, floating-point tensors as `dtype` (single numbers as they are), as safetensors. Left out
    are the schedule's buffers and the names that begin with one of `without`. Never leaves half a file."""
    tensors = {k: v for k, v in model.state_dict().items() if k not in SCHEDULE_BUFFERS and not k.startswith(tuple(without))}
    tensors = {k: (v.to(dtype) if v.is_floating_point() and v.ndim else v).contiguous().cpu() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def match(path: Path, stored: Mapping[str, "Stored"], expected: Mapping[str, torch.Tensor]) -> dict[str, str]:
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


def check_schedule(path: Path, stored: Mapping[str, "Stored"], expected: Mapping[str, torch.Tensor]) -> None:
    """The file's noise schedule is not loaded (the model's own is exact), but has to be the same."""
    if "betas" in stored and "betas" in expected:
        found, own = stored["betas"].read().double(), expected["betas"].double()
        if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-2):
            raise ValueError(
                f"{path} was trained with another noise schedule ({len(found)} betas, {found[0]:.3g} to "
                f"{found[-1]:.3g}) than the config's ({len(own)}, {own[0]:.3g} to {own[-1]:.3g})"
            )


def some(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class Stored(NamedTuple):
    """A tensor in a file, not read yet: dtype, shape and strides as a tensor on "meta", and where its bytes begin."""

    path: Path
    offset: int
    meta: torch.Tensor

    def read(self) -> torch.Tensor:
        """The tensor, mapped into memory (copy-on-write); the mapping ends with the tensor."""
        length = 1 + sum((n - 1) * stride for n, stride in zip(self.meta.shape, self.meta.stride(), strict=True))
        data = np.memmap(self.path, mode="c", offset=self.offset, shape=length * self.meta.itemsize)
        return torch.from_numpy(data).view(self.meta.dtype).as_strided(self.meta.shape, self.meta.stride())


def index(path: Path) -> dict[str, Stored]:
    """{name: Stored} of the tensors in a file: .safetensors, or any other suffix for what torch.save writes."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    stored = index_safetensors(path) if path.suffix == ".safetensors" else index_ckpt(path)
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return stored


def index_parts(parts: Mapping[str, Mapping[str, str]]) -> dict[str, Stored]:
    """{name in the model: Stored} of the files for parts of a model, {prefix in the model: {path, without}}: tensors whose
    name in the file begins with `without` belong to something else."""
    stored: dict[str, Stored] = {}
    for prefix, part in parts.items():
        without = (part["without"],) if "without" in part else ()
        found = index(resolve_path(part["path"]))
        stored |= {prefix + name: tensor for name, tensor in found.items() if not name.startswith(without)}
    return stored


def load_parts(model: nn.Module, parts: Mapping[str, Mapping[str, str]]) -> None:
    """Copy the tensors of `parts` into a model that exists already, strictly."""
    stored = index_parts(parts)
    expected = {k: v for k, v in model.state_dict(keep_vars=True).items() if k.startswith(tuple(parts))}
    files = ", ".join(part["path"] for part in parts.values())
    model.load_state_dict({k: stored[name].read() for k, name in match(Path(files), stored, expected).items()}, strict=False)


def index_safetensors(path: Path) -> dict[str, Stored]:
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


def index_ckpt(path: Path) -> dict[str, Stored]:
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
        begins: dict[str, Any] = {k: v.untyped_storage()._checkpoint_offset for k, v in metas.items()}
    except Exception as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and plain data ({one_line(error)})") from None
    # torch computes the offsets from the order of the records: wrong where another program has rewritten the archive.
    if not set(begins.values()) <= set(record_offsets(path)):
        raise ValueError(f"{path} was compressed or repacked: load it with torch and save it again with torch.save")
    return {k: Stored(path, begins[k] + int(v.storage_offset()) * v.itemsize, v) for k, v in metas.items()}


def is_alarming(name: str) -> bool:
    """Whether a global is one of Python itself and not plain data: os.system, builtins.eval ..."""
    module, _, attribute = name.rpartition(".")
    if module == "builtins":
        return attribute not in DATA_BUILTINS
    package = module.partition(".")[0]
    return package in sys.stdlib_module_names and package not in DATA_MODULES


def stub(name: str) -> type:
    """A class that takes any arguments and any state and does nothing with them; a kind of dict becomes a plain one."""

    class Stub:
        def __new__(cls, *args):
            return OrderedDict() if "dict" in name.lower() else super().__new__(cls)

        def __init__(self, *args):
            pass

        def __setstate__(self, state):
            pass

    return Stub


def record_offsets(path: Path) -> Iterator[int]:
    """Where the bytes of each uncompressed record of a zip archive begin."""
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type == zipfile.ZIP_STORED:
                file.seek(info.header_offset + 26)  # in the record's own header: the lengths of its two variable fields
                yield info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))


def one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
