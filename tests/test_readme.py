"""The README's Python runs as it stands, and its links lead somewhere."""

import re

import pytest
from common import ROOT, randomised
from PIL import Image
from test_latent_diffusion import tiny_config

from ldm import checkpoints
from ldm.export_diffusers import export
from ldm.util import instantiate_from_config

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_code_runs(block, tmp_path, monkeypatch, capsys):
    """Stable Diffusion is replaced by a model with all its parts, of random weights and a tenth of its width; the pipeline is the
    shipped model's."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (100, 80), "red").save("photo.png")
    if "from_diffusers" in block:
        export("tiny", "pipeline")
        block = block.replace("path or hub name", "pipeline").replace("(512, 512)", "(64, 64)")
    if "sd-v1-4" in block:
        model = randomised(instantiate_from_config(tiny_config()))
        monkeypatch.setattr(checkpoints, "load_model", lambda path, device: model.to(device))
        block = block.replace("(512, 512)", "(64, 64)")
    exec(block, {})  # noqa: S102
    if "photo.png" in block:
        assert Image.open("outputs/lake.png").size == (64, 64)
    else:
        assert len(capsys.readouterr().out.splitlines()) == 20


def test_links_and_pictures_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [t for t in targets if not t.startswith("http")]
    assert len(local) > 3
    for target in local + re.findall(r"`((?:ldm|configs|mnist|checkpoints|benchmarks)/[\w./-]*)`", README):
        assert (ROOT / target).exists(), target
