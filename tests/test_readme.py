"""The README's Python runs as it stands, from top to bottom, and its links lead somewhere."""

import re
from functools import partial
from pathlib import Path

import pytest
from common import ROOT, randomised
from PIL import Image
from published import tiny_config

from ldm import sample
from ldm.export_diffusers import export
from ldm.util import instantiate_from_config

README = (ROOT / "README.md").read_text()
EXAMPLE, LOOP, STABLE_DIFFUSION, DIFFUSERS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def rest_of_example(*replaced):
    """The example without the lines that assign these names, and without its import."""
    return "\n".join(line for line in EXAMPLE.splitlines() if not line.startswith(("from", *(f"{name} =" for name in replaced))))


def result():
    """The size of the image that was saved; it is removed."""
    path = Path("outputs/result.png")
    with Image.open(path) as image:
        path.unlink()
        return image.size


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The names that the example leaves, in a folder with a photo."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
        Image.new("RGB", (100, 80), "red").save("photo.png")
        names = {}
        exec(EXAMPLE, names)
        assert result() == (64, 64)
        yield names


@pytest.fixture
def names(left):
    """The same, with two diffusion steps from here on."""
    return left | {"sample": partial(sample, steps=2)}


def test_each_step_can_be_looked_at(names, capsys):
    exec(LOOP, names)
    assert len(capsys.readouterr().out.splitlines()) == 20


def test_stable_diffusion(names):
    """Replaced by a model with all its parts, of random weights and a tenth of its width."""
    model = randomised(instantiate_from_config(tiny_config()))
    code = STABLE_DIFFUSION.replace("512", "64")
    assert code.count('load_model("sd-v1-4.ckpt", dtype=torch.float16)') == 1
    names["load_model"] = lambda path, dtype: model
    exec(code, names)
    exec(rest_of_example("model", "image", "mask", "D"), names)
    assert names["model"] is model and result() == (64, 64)


def test_diffusers(names):
    """With the shipped model as a pipeline."""
    export("tiny", "pipeline")
    exec(DIFFUSERS.replace("path or hub name", "pipeline"), names)
    exec(rest_of_example("model"), names)
    assert result() == (64, 64)


def test_links_and_images_exist():
    targets = re.findall(r"\]\(([^)]+)\)", README)
    local = [target.partition("#") for target in targets if not target.startswith("http")]
    assert len(local) > 20
    for path, _, heading in local:
        assert (ROOT / path).exists(), path
        assert not heading or heading in anchors((ROOT / path).read_text()), heading
    for path in re.findall(r"`((?:ldm|configs|mnist|checkpoints|benchmarks)/[\w./-]*)`", README):
        assert (ROOT / path).exists(), path


def anchors(markdown):
    """The anchors of a file's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_it_is_short():
    assert len(README.split()) <= 1200
