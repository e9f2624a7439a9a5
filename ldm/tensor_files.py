"""Files of tensors: what is in them and where it lies, without executing anything.

`index` reads names, shapes, dtypes and places; `Stored.read` maps one tensor into memory. Files are .safetensors, or what
torch.save has written since torch 1.6: a zip archive with one pickle, of any protocol.
"""

import io
import json
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open

# Python's modules whose classes honest checkpoints mention; a stub takes their place. Any other of them is an alarm.
DATA_MODULES = {"argparse", "collections", "copyreg", "datetime", "decimal", "enum", "fractions", "functools",
                "logging", "pathlib", "re", "types", "typing", "uuid"}  # fmt: skip
DATA_BUILTINS = {"bool", "bytes", "dict", "float", "frozenset", "int", "list", "object", "range", "slice", "str",
                 "tuple"}  # fmt: skip
SAFETENSORS_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# Where training scripts put the weights inside their files, most telling first; and their averages.
WEIGHTS_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights", "net", "generator", "params", "unet")
AVERAGES_KEYS = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "params_ema", "net_ema")
TEXT_OPCODES = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8")
OTHER_OPCODES = {"EMPTY_SET": b"]", "ADDITEMS": b"e", "FROZENSET": b"t"}  # as a list, its elements, a tuple
MOST_PICKLE = 2**28  # bytes; that of Stable Diffusion has 10**5


class Stored(NamedTuple):
    """A tensor in a file, not read yet: dtype, shape and strides as a tensor on "meta", and where its bytes begin."""

    path: Path
    offset: int
    meta: torch.Tensor

    def read(self) -> torch.Tensor:
        """The tensor, mapped into memory (copy-on-write); the mapping ends with the tensor."""
        if 0 in self.meta.shape:
            return torch.empty(self.meta.shape, dtype=self.meta.dtype)
        data = np.memmap(self.path, mode="c", offset=self.offset, shape=extent(self.meta))
        return torch.from_numpy(data).view(self.meta.dtype).as_strided(self.meta.shape, self.meta.stride())


def extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first number to its last."""
    return (1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.itemsize


def index(path: Path) -> dict[str, Stored]:
    """{name: Stored} of the tensors in a file: .safetensors, or any other suffix for what torch.save writes. Averages that stand
    next to the weights, under a key of their own, get the prefix "ema."."""
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    stored = index_safetensors(path) if path.suffix == ".safetensors" else index_ckpt(path)
    if not stored:
        raise ValueError(f"{path} holds no tensors")
    return stored


def index_safetensors(path: Path) -> dict[str, Stored]:
    """As `index`, of a .safetensors file."""
    try:
        with safe_open(path, "pt"):  # checks the header and the length of the file
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if unknown := {entry["dtype"] for entry in header.values()} - set(SAFETENSORS_DTYPES):
            raise TypeError(f"its tensors of the kind {', '.join(sorted(unknown))} are not supported")
        metas = {name: torch.empty(entry["shape"], dtype=SAFETENSORS_DTYPES[entry["dtype"]], device="meta")
                 for name, entry in header.items()}  # fmt: skip
    except Exception as error:  # of many types
        reason = "" if isinstance(error, TypeError) else "truncated or of another kind "
        raise ValueError(f"{path} is no readable safetensors file: {reason}({one_line(error)})") from None
    return {k: Stored(path, 8 + length + header[k]["data_offsets"][0], meta) for k, meta in metas.items()}


# ---- torch.save


def index_ckpt(path: Path) -> dict[str, Stored]:
    """Unpickled by torch's restricted unpickler, which builds tensors and containers only. Lightning's files also
    mention classes (callbacks, hyper-parameters ...): each name is bound to a stub, the class itself never looked up."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("truncated, of another kind, or from before torch 1.6")
        records = record_places(path)
        outline = outline_of(path, records)
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(outline)
        alarming = sorted(filter(is_alarming, unknown))
    except Exception as error:
        raise ValueError(f"{path} is no readable checkpoint ({one_line(error)})") from None
    if alarming:
        raise ValueError(
            f"{path} is refused, nothing of it was run: it asks for {some(alarming)}, which can execute "
            "code and which no weights need"
        )
    try:
        outline.seek(0)
        with torch.serialization.safe_globals([(stub(name), name) for name in unknown]):
            content = torch.load(outline, map_location="meta", weights_only=True)
        metas = weights_in(content)
    except Exception as error:
        raise ValueError(f"{path} is refused: it holds more than tensors and plain data ({one_line(error)})") from None
    places: dict[Any, Place] = {place.in_outline: place for place in records}
    stored = {}
    for name, meta in metas.items():
        place = places.get(meta.untyped_storage()._checkpoint_offset)
        if place is None or place.offset is None:
            raise ValueError(f"{path} was compressed or repacked: load it with torch and save it again with torch.save")
        begin = int(meta.storage_offset()) * meta.itemsize
        if meta.numel() and (begin + extent(meta) > place.size or place.offset + place.size > path.stat().st_size):
            raise ValueError(f"{path} is damaged: the tensor {name} is larger than the data stored for it")
        stored[name] = Stored(path, place.offset + begin, meta)
    return stored


class Place:
    """A record of a zip archive: its name, the bytes it has, where they begin (None: compressed), and where in the outline."""

    def __init__(self, name: str, size: int, offset: int | None):
        self.name, self.size, self.offset, self.in_outline = name, size, offset, 0


def record_places(path: Path) -> list[Place]:
    """A `Place` for each record of a zip archive."""
    places = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)  # in the record's own header: the lengths of its two variable fields
            offset = info.header_offset + 30 + sum(struct.unpack("<2H", file.read(4)))
            places.append(Place(info.filename, info.file_size, offset if info.compress_type == zipfile.ZIP_STORED else None))
    return places


def outline_of(path: Path, records: list[Place]) -> io.BytesIO:
    """The archive in memory without its tensors' data: the pickle in protocol 2, the only one that torch's restricted unpickler
    reads, and one byte for each record. Fills in the records' `in_outline`, by which torch names the place of a tensor's data."""
    outline = io.BytesIO()
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(outline, "w") as target:
        for place in records:
            own = place.name.partition("/")[2]
            if own in (".format_version", ".storage_alignment"):
                continue  # without them torch looks places up instead of computing them
            data = b"0"
            if own in ("data.pkl", "version", "byteorder"):
                if place.size > MOST_PICKLE:
                    raise ValueError(f"{place.name} has {place.size} bytes")
                data = source.read(place.name)
            begin = outline.tell()
            target.writestr(place.name, as_protocol_2(data) if own == "data.pkl" else data)
            place.in_outline = begin + 30 + len(place.name.encode())  # a header without extra fields
    outline.seek(0)
    return outline


def weights_in(content: Any) -> dict[str, torch.Tensor]:
    """{name: tensor} of the weights in an unpickled checkpoint, however deep, and its averages as ema.NAME."""
    metas, depth = tensors_in(content), 0
    averages: dict[str, torch.Tensor] = {}
    while depth < 4 and isinstance(content, dict):
        averages |= {f"ema.{k}": v for key in AVERAGES_KEYS for k, v in tensors_in(content.get(key)).items()}
        inner = next((content[key] for key in WEIGHTS_KEYS if holds_tensors(content.get(key))), None)
        if inner is None and not metas:  # under a key of its own, the only one
            found = [value for key, value in content.items() if holds_tensors(value) and key not in AVERAGES_KEYS]
            inner = found[0] if len(found) == 1 else None
        if inner is None:
            break
        content, depth = inner, depth + 1
        metas = tensors_in(content)
    return metas | averages if metas else {k.removeprefix("ema."): v for k, v in averages.items()}


def tensors_in(node: Any) -> dict[str, torch.Tensor]:
    if not isinstance(node, dict):
        return {}
    return {k: v for k, v in node.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}


def holds_tensors(node: Any, depth: int = 3) -> bool:
    """Whether there is a tensor with a name somewhere below."""
    if not isinstance(node, dict) or depth == 0:
        return False
    return bool(tensors_in(node)) or any(holds_tensors(value, depth - 1) for key, value in node.items() if isinstance(key, str))


def as_protocol_2(data: bytes) -> bytes:
    """A pickle of any protocol, with the opcodes of protocol 2 only. Nothing is looked up or built here.

    Byte strings become text and sets become lists: of a checkpoint only the tensors are wanted. An opcode without a counterpart
    stays, and torch refuses it. Texts are written where they are used, not where they are made: so the name of a class can stand in
    its opcode, and no text needs the memo.
    """
    if data[:1] != b"\x80" or data[1:2] <= b"\x02":
        return data
    ops = list(pickletools.genops(data))
    ends = [position for _, _, position in ops[1:]] + [len(data)]
    out, texts = [b"\x80\x02"], list[Any]()
    memo: dict[Any, Any] = {}  # index -> text, None for anything else
    for (op, arg, begin), end in zip(ops, ends, strict=True):
        if op.name in ("PROTO", "FRAME"):
            continue
        if op.name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            place = len(memo) if op.name == "MEMOIZE" else arg
            memo[place] = texts[-1] if texts else None
            out += [] if texts else [b"r" + struct.pack("<I", place)]
        elif op.name in ("BINGET", "LONG_BINGET") and memo.get(arg) is not None:
            texts.append(memo[arg])
        elif op.name in TEXT_OPCODES:
            texts.append(arg.decode("latin-1") if isinstance(arg, (bytes, bytearray)) else arg)
        else:
            code = OTHER_OPCODES.get(op.name, data[begin:end])
            if op.name == "STACK_GLOBAL":
                *texts, module, name = texts
                if "\n" in module + name:
                    raise pickle.UnpicklingError("a class with a line break in its name")
                code = f"c{module}\n{name}\n".encode()
            encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
            out += [b"X" + struct.pack("<I", len(text)) + text for text in encoded]
            out.append(code)
            texts = []
    return b"".join(out)


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


def some(names: Iterable[str], most: int = 10) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
