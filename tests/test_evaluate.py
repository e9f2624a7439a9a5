"""ldm.evaluate: the row of a folder of pictures, on any number of devices, and what it says of wrong arguments."""

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import interpolate

from ldm.checkpoints import load_model
from ldm.data.emoji import sample_emoji
from ldm.evaluate import Evaluation, main, read_settings
from ldm.images import load_image, save_image
from ldm.table import KEY, read_rows


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four held-out pictures of the repository, in four sizes."""
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(sample_emoji()[0][:4]):
        save_image(interpolate(image[None], (64 + i, 70 - i))[0], tmp_path / f"pictures/{i}.png")
    return tmp_path / "pictures"


def settings(folder, *more):
    return [f"data={folder}", "method=fast", "budget=20", "batch=2", "accelerator=cpu", *more]


def row(path):
    (only,) = read_rows(path)
    return {k: v for k, v in only.items() if not k.startswith(("seconds", "memory"))}


def test_the_row_of_a_folder_and_its_resumption(folder, tmp_path, capsys):
    main(settings(folder))
    table = tmp_path / "outputs/evaluate/evaluate.csv"
    first = row(table)
    assert [first[k] for k in KEY] == ["tiny", "half", "fast", "20", "4"]
    assert 15 < float(first["nfe_forward"]) <= 20 and first["nfe_backward"] == "0"
    assert float(first["residual"]) < 0.25 and float(first["psnr"]) > 12
    assert "right half missing" in (table.parent / "evaluate.md").read_text()
    results = table.parent / "tiny-half-fast-20"
    assert load_image(results / "3.png").shape == (1, 3, 64, 64)

    (results / "1.pt").unlink()  # the second block is made anew, the first is not
    before = (results / "0.pt").stat().st_mtime_ns
    table.unlink()
    main(settings(folder))
    assert row(table) == first and (results / "0.pt").stat().st_mtime_ns == before

    with pytest.raises(SystemExit, match="holds results with another guidance: delete it or give another out"):
        main(settings(folder, "guidance=2"))


@pytest.mark.slow
def test_two_devices_give_the_same_row(folder, tmp_path):
    """To every digit: blocks are the same, and so are their seeds."""
    for devices in (1, 2):
        command = [sys.executable, "-m", "ldm.evaluate", *settings(folder, f"devices={devices}", f"out=out{devices}")]
        subprocess.run(command, check=True, timeout=900, cwd=tmp_path)
    assert row("out1/evaluate.csv") == row("out2/evaluate.csv")


def test_a_back_propagating_method_on_a_pixel_model(folder, tmp_path):
    """Grey pictures of 32 x 32, and gradients although Lightning predicts without."""
    main(settings(folder, "model=mnist", "method=DPS", "task=hole", "limit=3"))
    found = row(tmp_path / "outputs/evaluate/evaluate.csv")
    assert (found["images"], found["nfe_forward"], found["nfe_backward"]) == ("3", "10", "10")


def test_pictures_are_cropped_to_their_middle(tmp_path):
    image = torch.linspace(-1, 1, 60).view(1, 1, 1, 60).expand(1, 3, 20, 60)
    save_image(image[0], tmp_path / "wide.png")
    assert torch.allclose(load_image(tmp_path / "wide.png", (20, 20), crop=True), image[..., 20:40], atol=0.01)
    assert load_image(tmp_path / "wide.png", (20, 20))[0, 0, 0, 0] < -0.9


@pytest.mark.parametrize("words, message", [
    (["colour=red"], "colour: known are data, model"), (["method=magic"], "method = magic: known are newton, newton-eta1, fast"),
    (["task=deblur"], "task = 'deblur': known are half"), (["budget=3"], "budget = 3: give an integer >= 20"),
    (["batch=x"], "batch = x: give an integer"), (["precision=8"], "precision = 8: known are 32, 16, bf16"),
    (["data=/no/such"], "data = /no/such: there is no such folder"), (["data=."], r"data = \. has 0 pictures"),
    (["limit=1"], "limit = 1: give an integer >= 2"), (["model=none.ckpt"], "none.ckpt: there is no such file"),
    (["method=DDNM", "task=sr4"], "method = DDNM does not apply to task = sr4 with this model: it takes no task through"),
    (["method=PSLD"], "it takes only tasks through the decoder"), (["task=sr7"], "factor = 7 does not divide"),
    (["method=DDNM", "budget=1001"], "steps = 1001: give an integer from 1 to 1000"),
])  # fmt: skip
def test_wrong_arguments_are_one_sentence(words, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=f"^ldm.evaluate: .*{message}"):
        main([f"data={folder}", *words])
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize("precision, h", [("32", 0.005), ("bf16", 0.2)])
def test_half_precision_takes_a_longer_difference(folder, precision, h):
    s, files = read_settings(settings(folder, f"precision={precision}"))
    evaluation = Evaluation(load_model("tiny", device="cpu"), s, files, None)
    task = evaluation.task(torch.zeros(1, 3, 64, 64), [0], evaluation.model)
    assert evaluation.chosen(task)[1]["h"] == h
