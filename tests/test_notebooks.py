"""Every notebook runs from end to end, and the loop that it shows is the library's."""

import functools
import os
import re

import nbformat
import open_clip
import papermill
import pytest
import torch
from common import ROOT
from PIL import Image

from ldm.constraints import LinearConstraint
from ldm.linalg import max_norm, unit
from ldm.newton_sampler import sample, step_lengths
from ldm.operators import Mask
from ldm.sampling import jvp, seeded_noise
from ldm.util import instantiate_from_config, load_config
from ldm.weights import save_weights

NOTEBOOKS = sorted(p for folder in ("mnist", "stable-diffusion", "notebooks") for p in (ROOT / folder).glob("*.ipynb"))
IDS = [str(p.relative_to(ROOT)) for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_runs_with_default_parameters(path, tmp_path, monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    papermill.execute_notebook(path, tmp_path / path.name, parameters={"out": str(tmp_path)}, cwd=path.parent, progress_bar=False)
    written = {p.suffix for p in tmp_path.iterdir()}
    assert {".png", ".txt"} <= written
    if "sampling-loop" in path.read_text():
        assert ".gif" in written
        assert re.search(r"NFE (220|420)\b", (tmp_path / "summary.txt").read_text())


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory):
    """A checkpoint of Stable Diffusion v1 and one of CLIP ViT-B/16, complete, of random weights."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    model = instantiate_from_config(load_config(ROOT / "configs/stable-diffusion/v1-inference.yaml").model)
    save_weights(model, folder / "sd.safetensors", torch.float16)
    clip = open_clip.create_model("ViT-B-16", load_weights=False, force_quick_gelu=True)
    save_weights(clip, folder / "clip.safetensors", torch.float32)
    Image.effect_noise((600, 480), 60).convert("RGB").save(folder / "photo.png")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["inpaint", "superres", "superres_vae_newton", "style"])
def test_runs_on_a_full_size_checkpoint(name, stable_diffusion, tmp_path, monkeypatch):
    """Two diffusion steps with one inner step: shapes, masks, prompts and the CLIP block fit."""
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    parameters = dict(model_name=str(stable_diffusion / "sd.safetensors"), steps=2, newton_steps=1, seeds=[0], out=str(tmp_path))
    photo = str(stable_diffusion / "photo.png")
    if name == "style":
        parameters |= dict(prompts=["a lake"], reference=photo, clip=str(stable_diffusion / "clip.safetensors"))
    else:
        parameters |= dict(image=photo, prompts="a lake", guidance=2.0)
    path = ROOT / f"stable-diffusion/{name}.ipynb"
    papermill.execute_notebook(path, tmp_path / "run.ipynb", parameters=parameters, cwd=path.parent, progress_bar=False)
    assert "NFE 6" in (tmp_path / "summary.txt").read_text()
    assert min(Image.open(tmp_path / f"{name}.png").size) > 100


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_is_committed_fresh_and_short(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert path.stat().st_size < 500_000
    assert len(code) <= 10 and all(len(cell.source.splitlines()) <= 30 for cell in code)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "not executed from top to bottom"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    text = path.read_text()
    assert not re.search(r"(?<![\w.])/(home|root|work|Users|tmp|nfs|mnt)/\w", text), "an absolute path"
    assert not re.search(r"cuda:\d|sys\.path|%cd ", text)


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if "sampling-loop" in p.read_text()], ids=lambda p: p.stem)
def test_the_loop_written_out_is_the_library_s(path, gaussian):
    """The cell tagged `sampling-loop`, run on the analytic Gaussian denoiser, against `newton_sampler`; in float64, because the
    difference quotient magnifies the rounding of a product taken in another order."""
    from itertools import pairwise

    (cell,) = [c for c in nbformat.read(path, as_version=4).cells if "sampling-loop" in c.metadata.get("tags", [])]
    loop = cell.source[cell.source.index("@torch.inference_mode()") :]
    shape, seeds, mask = (4, 1, 8, 8), range(4), torch.ones(1, 1, 8, 8, dtype=torch.float64)
    mask[..., 4:] = 0
    y = seeded_noise(shape, range(10, 14))() * mask
    constraint = LinearConstraint(Mask(mask), y)
    settings = dict(steps=6, newton_steps=3, lr=(0.5, 0.1), eta="paper", h=0.005, mode=None)
    namespace = dict(torch=torch, pairwise=pairwise, tqdm=lambda x, **_: x, unit=unit, max_norm=max_norm, jvp=jvp,
                     step_lengths=step_lengths, seeded_noise=functools.partial(seeded_noise, dtype=torch.float64),
                     device="cpu")  # fmt: skip
    exec(loop, namespace)  # noqa: S102
    x, history = namespace["newton"](gaussian, constraint, shape, seeds, **settings)
    state = sample(gaussian, constraint, shape, seeds, **settings, dtype=torch.float64)
    assert x.dtype == torch.float64 and torch.allclose(x, state.x_t, atol=1e-8)
    assert len(history) == 6 and torch.equal(history[-1], x)
