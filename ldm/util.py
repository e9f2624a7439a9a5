"""Objects and paths from configs, files written whole, the device by name, and memory."""

import inspect
import re
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from ldm.commands import suggestion

PACKAGE = Path(__file__).resolve().parent
# Where configs/ and checkpoints/ are: in a checkout the repository's root, in an installed wheel a folder of the package.
ROOT = PACKAGE / "shipped" if (PACKAGE / "shipped").is_dir() else PACKAGE.parent


def resolve_path(path: str | Path) -> Path:
    """A path in a config: as it is where it exists, otherwise below the repository's root. FileNotFoundError if in neither."""
    for candidate in (Path(path).expanduser(), ROOT / path):
        if candidate.exists():
            return candidate
    raise FileNotFoundError(f"{path}: there is no such file, here or in {ROOT}")


@contextmanager
def atomic_write(path: str | PathLike) -> Iterator[Path]:
    """`with atomic_write(path) as temporary: save(temporary)`: what is written to `temporary`, a path in the same folder with the
    same suffix, takes the place of `path` at the end. An interrupted or failed write leaves the old file and nothing else.
    The folder is made where it is missing; the permissions are those of any new file, whatever `save` sets."""
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    temporary.touch()
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load_config(path: str | Path) -> DictConfig:
    """A yaml file as an OmegaConf. With `base: other.yaml` in it (relative to the file) it is that config, with its own values
    in their places. FileNotFoundError where there is none."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config {path}: there is no such file")
    config = OmegaConf.load(path)
    return OmegaConf.merge(load_config(path.parent / config.pop("base")), config) if "base" in config else config


def get_obj_from_str(string: str) -> Any:
    """The class or function at a dotted path such as "ldm.models.autoencoder.AutoencoderKL"."""
    module, _, name = string.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"target = {string!r} in the config cannot be imported: {error}") from error


def moved(old: str, new: str, names: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module `old` for the names (one string, separated by spaces) that are in the module `new` by now."""

    def find(name: str) -> Any:
        if name not in names.split():
            raise AttributeError(f"module {old!r} has no attribute {name!r}")
        warnings.warn(f"{old}.{name} is now {new}.{name}", DeprecationWarning, stacklevel=2)
        return getattr(import_module(new), name)

    return find


def instantiate_from_config(config: Mapping[str, Any] | DictConfig, **overrides: Any) -> Any:
    """The object `target(**params)` of a config node {target, params}; overrides win over params."""
    if "target" not in config:
        raise ValueError(f"this part of the config has no 'target', only {sorted(config)}")
    params = config.get("params") or {}
    params = OmegaConf.to_container(params, resolve=True) if OmegaConf.is_config(params) else params
    build = get_obj_from_str(config["target"])
    try:
        return build(**{**params, **overrides})
    except TypeError as error:
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if not wrong or wrong[1] not in params:
            raise
        known = [name for name in argument_names(build) if name not in overrides]
        raise ValueError(f"{config['target']} has no argument {wrong[1]}: {suggestion(wrong[1], known)}") from error


def argument_names(build: Callable) -> list[str]:
    """The names of a function's arguments, or of a class's and of those classes that its **kwargs go to."""
    classes = [c for c in inspect.getmro(build) if "__init__" in vars(c)] if inspect.isclass(build) else [build]
    parameters = [p for c in classes if c is not object for p in inspect.signature(c).parameters.values()]
    return list(dict.fromkeys(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)))


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """A torch.device by name; "auto" takes CUDA, then Apple's MPS, then the CPU. An absent device is one clear ValueError."""
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'device = {str(device)!r} is not available here ({reason}): give "auto", "cpu", "cuda" or "mps"'
        ) from None
    return resolved


def peak_memory(device: str | torch.device) -> float:
    """Peak memory of this process in GiB: allocated on a CUDA device, resident on the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Where the memory of any device does not suffice inside: a MemoryError that says what to change, `advice`."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one; elsewhere only the text tells
        if not re.search("out of memory|allocate memory|not enough memory|ALLOC_FAILED", str(error), re.IGNORECASE):
            raise
        raise MemoryError(advice) from error
