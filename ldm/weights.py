"""The tensors of a file as those of a model: matched strictly by name and shape, and saved.

Nothing that belongs to the model is dropped silently. What published files spell in several ways, what they hold without a use here
and what they may lack stands in the tables below.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from ldm.commands import suggestion
from ldm.models.diffusion.ddpm import SCHEDULE_BUFFERS
from ldm.tensor_files import Stored, index, some
from ldm.util import atomic_write, resolve_path

# What a file may hold without being loaded, or lack: what the model computes itself, and what only training needs.
RECOMPUTED = re.compile(rf"{'|'.join(SCHEDULE_BUFFERS)}|(.*\.)?position_ids")
TRAINING_ONLY = re.compile(
    r"(first_stage_model\.)?loss\..*|model_ema\.(decay|num_updates)|ema\.(decay|num_updates|step|initted)|logvar|scale_factor"
    r"|n_averaged|global_step|epoch|iteration"
)
# What other programs leave in a file, without a use here: named in a notice, and ignored.
USELESS = re.compile(
    r"v_pred|ztsnr|edm_(mean|std|vpred\..*)|cond_stage_model\.(model\.|transformer\.(text_model\.)?)?(logit_scale|text_projection(\.weight)?)"
    r"|embedding_manager\..*|safety_checker\..*|cond_stage_model\.(model\.visual|transformer\.vision_model)\..*|denoiser\.sigmas"
)
# Other spellings of a name: of torch.compile, of data-parallel training, of text encoders that web interfaces wrap or rename.
SPELLINGS = [
    (re.compile(r"\b_orig_mod\."), ""),
    (re.compile(r"^module\."), ""),
    (re.compile(r"^(cond_stage_model\.)wrapped\."), r"\1"),
    (re.compile(r"^(cond_stage_model\..*token_embedding)\.wrapped\."), r"\1."),
    (re.compile(r"^(cond_stage_model\.transformer)\.(embeddings|encoder|final_layer_norm)\."), r"\1.text_model.\2."),
]
# The name of a parameter's average in a file.
AVERAGES: list[Callable[[str], str]] = [
    lambda name: "model_ema." + name.removeprefix("model.").replace(".", ""),  # the published one
    lambda name: "model_ema." + name.removeprefix("model."),
    lambda name: "model_ema." + name,
    lambda name: "ema." + name,
    lambda name: "ema_model." + name,
]
AVERAGE = re.compile(r"(model_ema|ema|ema_model)\..*")
# What else the file of a part alone may hold: its training, the other half of CLIP.
IN_PARTS = re.compile(
    r"loss\..*|(model_)?ema.*|(.*\.)?position_ids|(model\.|transformer\.)?(visual|vision_model)\..*"
    r"|(model\.|transformer\.)?(text_model\.)?(logit_scale|visual_projection.*|text_projection.*)"
)
FAR = 0.5  # relative distance at which averages no longer belong to the plain weights


def save_weights(model: nn.Module, path: str | Path, dtype: torch.dtype, without: Iterable[str] = ()) -> None:
    """Write the model's state dict, floating-point tensors as `dtype` (single numbers as they are), as safetensors. Left out
    are the schedule's buffers and the names that begin with one of `without`. Never leaves half a file."""
    tensors = {k: v for k, v in model.state_dict().items() if k not in SCHEDULE_BUFFERS and not k.startswith(tuple(without))}
    tensors = {k: (v.to(dtype) if v.is_floating_point() and v.ndim else v).contiguous().cpu() for k, v in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary)


def respelled(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a file by the names that models have. A name that is there in both spellings stays."""
    names = {}
    for name in stored:
        new = name
        for pattern, replacement in SPELLINGS:
            new = pattern.sub(replacement, new)
        names[name] = new if new not in stored else name
    return {names[name]: tensor for name, tensor in stored.items()}


def match(
    path: Path,
    stored: Mapping[str, Stored],
    expected: Mapping[str, torch.Tensor],
    ema: bool | str = "auto",
    unused: Collection[str] = (),
) -> dict[str, str]:
    """{name in the model: name in the file} of all tensors to load; one ValueError lists all that does not fit.

    stored    {name: Stored} of the file
    expected  the model's state dict, with its Parameters
    ema       "auto": averages of the parameters where the file has any, which must belong to the plain weights; True: averages,
              without that test; False: plain weights
    unused    names in the model whose values nothing depends on: they may be missing
    """
    names = {name: name for name in expected if not RECOMPUTED.fullmatch(name)}
    averages = averaged_names(path, stored, expected, ema)
    names |= averages

    missing = [k for name, k in names.items() if k not in stored and name not in unused]
    names = {name: k for name, k in names.items() if k in stored or name not in unused}
    known = {*expected, *names.values()}
    known |= {k for k in stored if RECOMPUTED.fullmatch(k) or TRAINING_ONLY.fullmatch(k)}
    if averages or ema is False:
        known |= {k for k in stored if AVERAGE.fullmatch(k) and (ema is False or k in averages.values())}
    useless = [k for k in stored if k not in known and USELESS.fullmatch(k)]
    unexpected = [k for k in stored if k not in known and k not in useless]
    shapes = {k: (list(stored[k].meta.shape), list(expected[n].shape)) for n, k in names.items() if k in stored}
    misshaped = [f"{k} {found} instead of {needed}" for k, (found, needed) in shapes.items() if found != needed]
    lists = {"missing tensors": missing, "unexpected tensors": unexpected, "tensors of another shape": misshaped}
    if problems := [f"\n  {kind} ({len(v)}): {some(v)}" for kind, v in lists.items() if v]:
        unet = any(k.startswith("model") for k in missing + unexpected + misshaped)
        raise ValueError(
            f"{path} does not fit the config{', its U-Net is of another architecture' if unet else ''}:" + "".join(problems)
        )
    if useless:
        print(f"{path.name} holds tensors without a use here, which are ignored: {some(useless)}")
    if averages and ema == "auto":
        check_averages(path, stored, averages)
    check_schedule(path, stored, expected)
    return names


def averaged_names(
    path: Path, stored: Mapping[str, Stored], expected: Mapping[str, torch.Tensor], ema: bool | str
) -> dict[str, str]:
    """{name in the model: name of its average in the file}, {} where plain weights are to be loaded."""
    if ema not in (True, False, "auto"):
        raise ValueError(f'ema = {ema!r}: give True, False or "auto"')
    if ema is False:
        return {}
    found = [k for k in stored if AVERAGE.fullmatch(k) and not TRAINING_ONLY.fullmatch(k)]
    if not found:
        if ema is True:
            raise ValueError(f'ema = True, but {path} holds no averaged (EMA) weights: give ema=False or "auto"')
        return {}
    parameters = [name for name, own in expected.items() if isinstance(own, nn.Parameter)]
    spelling = max(AVERAGES, key=lambda spelling: sum(spelling(name) in stored for name in parameters))
    print(f"{path.name} holds averaged (EMA) weights: these are used (ema=False takes the plain ones)")
    return {name: spelling(name) for name in parameters if name.startswith("model.") or spelling(name) in stored}


def check_averages(path: Path, stored: Mapping[str, Stored], averages: Mapping[str, str]) -> None:
    """ValueError where averages are not near the plain weights of the file: left behind by a merge, or never filled.

    A sample of the larger tensors is compared. A file without plain weights, or with zeros in their place, passes."""
    pairs = [(name, k) for name, k in averages.items() if name in stored and stored[name].meta.ndim > 1]
    distance = size = 0.0
    for name, k in pairs[:: max(1, len(pairs) // 24)]:
        plain, average = (stored[k].read().double() for k in (name, k))
        distance, size = distance + (average - plain).square().sum().item(), size + plain.square().sum().item()
    if size and not (ratio := (distance / size) ** 0.5) <= FAR:
        raise ValueError(
            f"{path}: its averaged (EMA) weights do not belong to its plain ones (they differ by {ratio:.0%}), as after a merge: "
            "give ema=False for the plain weights, or ema=True for the averages"
        )


def check_schedule(path: Path, stored: Mapping[str, Stored], expected: Mapping[str, torch.Tensor]) -> None:
    """The file's noise schedule is not loaded (the model's own is exact), but has to be the same."""
    if "betas" in stored and "betas" in expected and "ztsnr" not in stored:  # which changes the schedule that stands there
        found, own = stored["betas"].read().double(), expected["betas"].double()
        if found.shape != own.shape or not torch.allclose(found, own, rtol=1e-2):
            raise ValueError(
                f"{path} was trained with another noise schedule ({len(found)} betas, {found[0]:.3g} to "
                f"{found[-1]:.3g}) than the config's ({len(own)}, {own[0]:.3g} to {own[-1]:.3g})"
            )


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


def index_own_parts(parts: Mapping[str, str | Path], model: nn.Module) -> dict[str, Stored]:
    """{name in the model: Stored} of a user's own files for parts of a model, {part: path}.

    Such as a fine-tuned autoencoder, {"first_stage_model": "vae.safetensors"}. The file may name its tensors as the whole model
    does, or as the part alone. Of the file of a whole model only the part is taken. ValueError for a part that the model does not
    have, and for a file that holds nothing of it. What else does not fit is for `match` to say."""
    found: dict[str, Stored] = {}
    for part, source in parts.items():
        part = part.removesuffix(".")
        children = [name for name, _ in model.named_children()]
        if part not in children:
            raise ValueError(f"parts: the model has no {part}, {suggestion(part, children)}")
        path = Path(source).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"parts: {path}: there is no such file")
        expected = {k for k in model.state_dict() if k.startswith(part + ".")}
        stored, inside = index(path), ("", f"{part}.", f"{part}.model.", f"{part}.transformer.", f"{part}.transformer.text_model.")
        spelled = [respelled({prefix + k: v for k, v in stored.items()}) for prefix in inside]
        best = max(spelled, key=lambda names: len(expected & set(names)))
        own = {k: v for k, v in best.items() if k.startswith(part + ".")}
        own = {k: v for k, v in own.items() if k in expected or not IN_PARTS.fullmatch(k.removeprefix(part + "."))}
        if not expected & set(own):
            raise ValueError(
                f"{path} holds nothing of {part}, but {some(stored)}: give a file with the names of published checkpoints"
            )
        found |= own
    return found
