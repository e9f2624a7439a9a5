"""Runs notebooks anew with their defaults, in place, and takes the gallery from what they saved:

    python notebooks/execute.py [inpaint style ...]

Without names: all of them. A notebook is replaced, and its images in assets/, once it has reached its end. What cells write to
stderr (progress bars, warnings) is left out, and figures in the notebook have 256 colours, which takes a third of the bytes.
"""

import argparse
import base64
import io
import shutil
from pathlib import Path

import nbformat
import papermill
from PIL import Image
from tqdm import tqdm

from ldm.util import ROOT, atomic_write

FOLDERS = ("stable-diffusion", "mnist", "notebooks")
NOTEBOOKS = {path.stem: path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.ipynb"))}
# What the README and the findings show: {notebook: {image in assets/: file in the notebook's folder in outputs/}}.
GALLERY = {
    "inpaint": {"inpaint.png": "inpaint.png", "inpaint.gif": "inpaint.gif"},
    "superres": {"superres.png": "superres.png"},
    "superres_vae_newton": {"superres_vae_newton.png": "superres_vae_newton.png"},
    "style": {"style.png": "style.png"},
    "guidance": {"guidance.png": "guidance.png"},
    "multiscale": {"multiscale.png": "multiscale.png"},
    "train_diffusion": {"mnist.png": "mnist.png", "mnist.gif": "mnist.gif"},
    "jacobian_exact_vs_gd": {"jacobian_maps.png": "jacobian_exact_vs_gd.png"},
    "jacobian_analysis": {"jacobian_convergence.png": "jacobian_convergence.png"},
}


def small(png):
    """A png in base64, in 256 colours if that is smaller."""
    image, file = Image.open(io.BytesIO(base64.b64decode(png))), io.BytesIO()
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), png, key=len)


def cleaned(notebook):
    """The notebook without stderr and without what depends on the time and the program that ran it."""
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata = nbformat.NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags" and v})
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for data in (output.data for output in cell.outputs if "image/png" in output.get("data", {})):
                data["image/png"] = small(data["image/png"])
    return notebook


def execute(path):
    """Runs the notebook in its own folder; it stays as it was where a cell fails."""
    ran = ROOT / "outputs" / path.name
    ran.parent.mkdir(exist_ok=True)
    papermill.execute_notebook(path, ran, cwd=path.parent, progress_bar=False)
    with atomic_write(path) as temporary:
        nbformat.write(cleaned(nbformat.read(ran, as_version=4)), temporary)
    for asset, saved in GALLERY.get(path.stem, {}).items():
        shutil.copyfile(ROOT / "outputs" / path.stem / saved, ROOT / "assets" / asset)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(NOTEBOOKS), metavar="NAME", help=", ".join(NOTEBOOKS))
    names = parser.parse_args(argv).names
    if unknown := [name for name in names if Path(name).stem not in NOTEBOOKS]:
        parser.error(f"{unknown[0]}: known are {', '.join(NOTEBOOKS)}")
    for name in (bar := tqdm(names)):
        bar.set_description(name)
        execute(NOTEBOOKS[Path(name).stem])


if __name__ == "__main__":
    main()
