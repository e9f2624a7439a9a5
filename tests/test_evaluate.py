"""ldm.evaluate: the row of a folder of pictures, on any number of devices, and what it says of wrong arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ROOT
from torch.nn.functional import interpolate

from ldm import evaluate
from ldm.checkpoints import load_model
from ldm.data.emoji import sample_emoji
from ldm.evaluate import main, read_settings
from ldm.images import load_image, save_image
from ldm.table import KEY, read_rows
from ldm.weights import save_weights


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

    (results / "2.pt").unlink()  # the second block is made anew, the first is not
    before = (results / "0.pt").stat().st_mtime_ns
    main(settings(folder))
    assert row(table) == first and (results / "0.pt").stat().st_mtime_ns == before and (results / "2.pt").is_file()

    with pytest.raises(SystemExit, match="holds results with another guidance: delete it or give another out"):
        main(settings(folder, "guidance=2"))


def test_the_cache_knows_the_content_of_images_and_weights(folder, tmp_path):
    """A block whose image has changed is made anew, even with the same name, size and time; other weights are refused."""
    weights = tmp_path / "own.safetensors"
    model = load_model("mnist", device="cpu")
    save_weights(model, weights, torch.float32)
    words = settings(folder, f"model={weights}", "config=" + str(ROOT / "configs/mnist/unet.yaml"), "method=DDNM")
    main(words)
    results, table = tmp_path / "outputs/evaluate/own-half-DDNM-20", tmp_path / "outputs/evaluate/evaluate.csv"
    first, times = row(table), {file.name: file.stat().st_mtime_ns for file in results.glob("*.pt")}

    changed, size = folder / "3.png", (folder / "3.png").stat()
    data = bytearray(save_image(torch.zeros(3, 9, 9), tmp_path / "x.png").read_bytes())
    changed.write_bytes(data + bytes(size.st_size - len(data)))
    os.utime(changed, ns=(size.st_atime_ns, size.st_mtime_ns))
    assert changed.stat().st_size == size.st_size and changed.stat().st_mtime_ns == size.st_mtime_ns
    main(words)
    assert row(table)["psnr"] != first["psnr"]
    assert {file.name for file in results.glob("*.pt") if file.stat().st_mtime_ns != times[file.name]} == {"2.pt"}

    next(model.parameters()).data += 0.1
    save_weights(model, weights, torch.float32)
    with pytest.raises(SystemExit, match="holds results with another weights: delete it"):
        main(words)


def test_a_broken_image_stops_before_the_first_sample_or_is_skipped(folder, tmp_path, capsys):
    """Truncated in the middle: its header is good. The seeds of the others do not change."""
    whole = tmp_path / "whole"
    main(settings(folder, "out=whole", "model=mnist", "method=DDNM"))
    data = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(data[: len(data) // 2])
    words = settings(folder, "model=mnist", "method=DDNM")
    with pytest.raises(SystemExit, match="1.png.*not a readable image.*on_error=skip leaves such files out"):
        main(words)
    assert not (tmp_path / "outputs").exists()
    main([*words, "on_error=skip"])
    assert "left out" in capsys.readouterr().out
    results = tmp_path / "outputs/evaluate/mnist-half-DDNM-20"
    assert row(results.parent / "evaluate.csv")["images"] == "3" and not (results / "1.png").exists()
    for name in ("0.png", "2.png", "3.png"):
        again, before = (load_image(path / name) for path in (results, whole / "mnist-half-DDNM-20"))
        assert (again - before).abs().max() < 0.02, name


def test_results_of_one_stem_are_all_kept():
    paths = [Path(name) for name in ("a.jpg", "A.png", "b.png")]
    assert evaluate.result_names(paths) == ["0-a.png", "1-A.png", "2-b.png"]
    assert evaluate.result_names(paths[1:]) == ["A.png", "b.png"]


@pytest.mark.parametrize("word, field, value", [
    ("prompt=a lake #1", "prompt", "a lake #1"), ("prompt=photo: a lake", "prompt", "photo: a lake"), ("prompt=", "prompt", ""),
    ("prompt=[red, blue]", "prompt", "[red, blue]"), ("prompt=a=b", "prompt", "a=b"), ("prompt=007", "prompt", "007"),
    ("prompt=null", "prompt", "null"), ("data=2024", "data", Path("2024")), ("model=1e5.ckpt", "model", "1e5.ckpt"),
    ("out=~/results", "out", Path.home() / "results"), ("limit=", "limit", None), ("limit=7", "limit", 7),
    ("guidance=7.5", "guidance", 7.5), ("guidance=3", "guidance", 3.0), ("precision=16", "precision", "16"),
])  # fmt: skip
def test_text_stays_text(word, field, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    found = getattr(read_settings(["data=2024", word]), field)
    assert found == value and type(found) is type(value)


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
    (["colour=red"], "colour: there is no such setting, known are data, model"),
    (["budgt=44"], "did you mean budget?"),
    (["inpaint"], "inpaint: give key=value"), (["guidance=x"], "guidance = x: give a number"),
    (["method=Newton"], "did you mean newton?"),
    (["method=magic"], "method = magic: known are newton, newton-eta1, fast"),
    (["task=deblur"], "task = 'deblur': known are half"), (["budget=3"], "budget = 3: give an integer >= 20"),
    (["batch=x"], "batch = x: give an integer"), (["precision=8"], "precision = 8: known are 32, 16, bf16"),
    (["data=/no/such"], "data = /no/such: there is no such folder"), (["data=."], r"data = \. has 0 usable images"),
    (["limit=1"], "limit = 1: give an integer >= 2"), (["model=none.ckpt"], "none.ckpt: there is no such file"),
    (["method=DDNM", "task=sr4"], "method = DDNM does not apply to task = sr4 with this model: it takes no task through"),
    (["method=PSLD"], "it takes only tasks through the decoder"), (["task=sr7"], "factor = 7 does not divide"),
    (["method=DDNM", "budget=1001"], "steps = 1001: give an integer from 1 to 1000"),
])  # fmt: skip
def test_wrong_arguments_are_one_sentence(words, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=f"^ldm.evaluate: .*{message}"):
        main([f"data={folder}", *words])
    assert not (tmp_path / "outputs").exists()
