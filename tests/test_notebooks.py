"""Every notebook runs from end to end, its cells can be run again, and the loop that it shows is the library's."""

import ast
import functools
import os
import re
import runpy
from pathlib import Path

import nbformat
import notebook_costs as costs
import papermill
import papermill.cli
import pytest
import torch
from common import ROOT
from PIL import Image
from pipelines import build

from ldm.constraints import LinearConstraint
from ldm.linalg import max_norm, unit
from ldm.newton_sampler import sample, step_lengths
from ldm.operators import Mask
from ldm.sampling import jvp, seeded_noise

NOTEBOOKS = sorted(p for folder in ("mnist", "stable-diffusion", "notebooks") for p in (ROOT / folder).glob("*.ipynb"))
IDS = [str(p.relative_to(ROOT)) for p in NOTEBOOKS]
# What makes the run in every test short, where the defaults take more than half a minute of one core: fewer samples, times and
# Arnoldi steps; all diffusion steps where evaluations are counted. The defaults run by `pytest -m slow`, those of `inpaint` always.
SHORTER = {
    "compare_methods": dict(digits=[2], tasks=["half", "sr4"]),
    "diffusers_inpaint": dict(seeds=[0, 1]),
    "guidance": dict(prompts=["red apple"], steps=4),
    "jacobian_analysis": dict(times=[700, 300], krylov=8, factors=[0.5, 3.0]),
    "jacobian_exact_vs_gd": dict(times=[300], seeds=[0, 1]),
    "layers": dict(numbers=[1], starts=1, rounds=2, completions=2),
    "multiscale": dict(prompts=["red apple"], seeds=[0], steps=6, factor=2),
    "rectified_flow": dict(steps=10),
    "style": dict(prompts=["red apple", "rocket"], strength=0.1),
    "superres": dict(seeds=[0, 1]),
    "superres_vae_newton": dict(seeds=[0, 1], compare=False),
}
EVALUATIONS = {"inpaint": 220, "style": 160, "superres": 420, "superres_vae_newton": 420}  # of the network, as in the paper


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def assigned(source):
    """The names that the cell binds by assignment, outside functions."""
    nodes = [node for node in ast.parse(source).body for node in ([node] if isinstance(node, ast.FunctionDef) else ast.walk(node))]
    return {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def run_cells(path, twice=False, **parameters):
    """The cells of a notebook in this process, with parameters as the command line passes them. Returns the namespace."""
    namespace = {}
    cells = code_cells(path)
    (given,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    known = assigned(given.source)
    assert set(parameters) <= known
    for cell in cells:
        exec(cell.source, namespace)  # noqa: S102
        if cell is given:
            namespace |= {name: papermill.cli._resolve_type(str(value)) for name, value in parameters.items()}
    for cell in cells[::-1] if twice else []:
        if cell is not given:
            exec(cell.source, namespace)  # noqa: S102
    return namespace


def runs(path, folder, monkeypatch, **parameters):
    monkeypatch.delenv("MPLBACKEND", raising=False)
    monkeypatch.setitem(os.environ, "PYDEVD_DISABLE_FILE_VALIDATION", "1")
    parameters |= {"out": str(folder)}
    papermill.execute_notebook(path, folder / path.name, parameters=parameters, cwd=path.parent, progress_bar=False)
    written = {p.suffix for p in folder.iterdir()}
    assert {".png", ".txt"} <= written
    if "sampling-loop" in path.read_text():
        assert ".gif" in written
    if path.stem in EVALUATIONS:
        assert f"NFE {EVALUATIONS[path.stem]} " in (folder / "summary.txt").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_runs(path, tmp_path, monkeypatch):
    runs(path, tmp_path, monkeypatch, **SHORTER.get(path.stem, {}))


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if p.stem in SHORTER], ids=lambda p: p.stem)
def test_runs_with_default_parameters(path, tmp_path, monkeypatch):
    runs(path, tmp_path, monkeypatch)


@pytest.mark.parametrize("name, parameters, prompts, seeds, lr", [
    ("inpaint", dict(prompts="a cat", seeds=7, lr=0.1, mask="(8, 8, 16, 16)"), ["a cat"] * 8, [*range(7, 15)], 0.1),
    ("inpaint", dict(image="photo.png", prompts=["a", "b", "c"]), ["a", "b", "c"], [0, 1, 2], (0.5, 0.1)),
    ("superres", dict(prompts="a cat", seeds="7, 9", lr="0.2, 0.1", factor=3, sigma_y=0.1), ["a cat"] * 2, [7, 9], (0.2, 0.1)),
    ("superres", dict(low_res="thumb.png"), [""] * 4, [0, 1, 2, 3], 0.1),
    ("superres_vae_newton", dict(image="photo.png", seeds="[7, 8]", compare="yes"), ["", ""], [7, 8], 0.1),
    ("style", dict(prompts="a cat", seeds=7, reference="photo.png", free=0), ["a cat"] * 4, [7, 8, 9, 10], (0.15, 0.04)),
])  # fmt: skip
def test_cells_run_again_with_parameters_of_the_command_line(name, parameters, prompts, seeds, lr, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    Image.effect_noise((80, 64), 60).convert("RGB").save("photo.png")
    Image.effect_noise((20, 17), 60).convert("RGB").save("thumb.png")
    names = run_cells(ROOT / f"stable-diffusion/{name}.ipynb", True, **parameters, steps=2, newton_steps=1, out="out")
    assert (names["p"].prompts, names["p"].seeds, names["p"].lr) == (prompts, seeds, lr)
    assert "NFE 6 " in Path("out/summary.txt").read_text() and Path(f"out/{name}.png").is_file()
    if "low_res" in parameters:
        assert names["results"].shape == (4, 3, 68, 80) and names["truth"] is None


def test_cells_run_again_with_a_pipeline_of_diffusers(tmp_path, monkeypatch):
    """Of SDXL's classes, random; an image that is no square."""
    monkeypatch.chdir(tmp_path)
    build("sdxl").save_pretrained("sdxl")
    Image.effect_noise((90, 70), 60).convert("RGB").save("photo.png")
    parameters = dict(model_name="sdxl", image="photo.png", mask="(8, 8, 20, 20)", prompts="a cat", seeds=7)
    names = run_cells(ROOT / "notebooks/diffusers_inpaint.ipynb", True, **parameters, negative_prompts="rain",
                      steps=2, newton_steps=1, lr=0.1, out="out")  # fmt: skip
    assert (names["p"].prompts, names["p"].seeds, names["p"].lr) == (["a cat"] * 4, [7, 8, 9, 10], 0.1)
    assert "NFE 6 " in Path("out/summary.txt").read_text() and Image.open("out/images/inpainted-0.png").size == names["size"][::-1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=IDS)
def test_cells_are_short_and_leave_parameters_alone(path):
    cells = code_cells(path)
    assert len(cells) <= 10
    (given,) = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    for cell in cells:
        lines = cell.source.splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 100
        if cell is not given:
            assert not assigned(cell.source) & assigned(given.source), "a parameter is overwritten"
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                defaults = [name.id for default in node.args.defaults for name in ast.walk(default) if isinstance(name, ast.Name)]
                assert not set(defaults) & assigned(given.source), "a parameter is bound"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.mark.slow
@pytest.mark.parametrize("name", costs.NOTEBOOKS)
def test_runs_at_the_size_of_stable_diffusion(name, models, record_property):
    """To its end, on a complete checkpoint of random weights: shapes, masks, prompts and the CLIP block fit."""
    row = costs.measured(name, models)
    for column, value in row.items():
        record_property(column, value)
    assert row["evaluations"] >= 6 and float(row["GiB"]) < 24


def test_the_page_of_costs_is_what_the_command_prints():
    rows = costs.read(costs.RESULTS / "notebooks.csv")
    assert [row["notebook"] for row in rows] == [*costs.NOTEBOOKS]
    assert costs.table(rows) in (ROOT / "benchmarks/README.md").read_text()


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


def test_every_image_of_the_gallery_is_one_that_its_notebook_saves(tmp_path, monkeypatch):
    """By the command that runs notebooks anew; a cell that fails leaves the notebook as it was."""
    command = runpy.run_path(str(ROOT / "notebooks/execute.py"))
    for name, images in command["GALLERY"].items():
        source = command["NOTEBOOKS"][name].read_text()
        for asset, saved in images.items():
            assert saved in source and (ROOT / "assets" / asset).is_file()
    shown = {path.name for path in (ROOT / "assets").iterdir()} - {"emoji_held_out.png", "emoji_pairs.png", "mnist_test_digits.png"}
    assert shown == {asset for images in command["GALLERY"].values() for asset in images}

    execute = command["execute"]
    monkeypatch.setitem(execute.__globals__, "ROOT", tmp_path)
    path = tmp_path / "stable-diffusion/small.ipynb"
    path.parent.mkdir()
    cells = [nbformat.v4.new_code_cell("import sys\nprint('a bar', file=sys.stderr)"), nbformat.v4.new_code_cell("print(6 * 7)")]
    kernel = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    execute(path)
    first, second = code_cells(path)
    assert first.outputs == [] and second.outputs[0].text == "42\n" and second.metadata == {} and second.execution_count == 2
    before = path.read_text().replace("6 * 7", "6 / 0")
    path.write_text(before)
    with pytest.raises(papermill.exceptions.PapermillExecutionError, match="division by zero"):
        execute(path)
    assert path.read_text() == before
