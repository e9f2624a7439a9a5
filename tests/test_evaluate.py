"""ldm.evaluate: the row of a folder of images, on any number of devices, and what it says of wrong arguments."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ROOT
from pipelines import build
from published import built
from torch.nn.functional import interpolate
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import FrechetInceptionDistance, NoTrainInceptionV3
from torchmetrics.image.kid import KernelInceptionDistance

from ldm import evaluate, metrics
from ldm.checkpoints import load_model
from ldm.data.emoji import sample_emoji
from ldm.evaluate import Settings, main, read_settings
from ldm.export_diffusers import export
from ldm.images import load_image, save_image
from ldm.presets import sweep
from ldm.table import KEY, read_rows
from ldm.weights import save_weights


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four held-out images of the repository, in four sizes."""
    monkeypatch.chdir(tmp_path)
    for i, image in enumerate(sample_emoji()[0][:4]):
        save_image(interpolate(image[None], (64 + i, 70 - i))[0], tmp_path / f"photos/{i}.png")
    return tmp_path / "photos"


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


def test_a_pipeline_of_diffusers_gives_the_row_of_the_same_model(folder, tmp_path, capsys):
    """`tiny`, as we export it, with prompts; and one on pixels, which takes none. By a method whose steps magnify no rounding."""
    export("tiny", tmp_path / "tiny-1.5")
    common = ["method=DDNM", "prompt=red apple", "guidance=2", "limit=2"]
    words = {model: settings(folder, f"model={model}", f"out={model}.out", *common) for model in ("tiny", "tiny-1.5")}
    for model in words:
        main(words[model])
    ours, theirs = (row(tmp_path / f"{model}.out/evaluate.csv") for model in ("tiny", "tiny-1.5"))
    assert theirs.pop("model") == "tiny-1.5" and ours.pop("model") == "tiny"
    for name, value in ours.items():
        if not name.startswith("kid"):  # of two images it says nothing
            assert theirs[name] == value or float(theirs[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-3), name
    main(words["tiny-1.5"])  # nothing is left to do
    (tmp_path / "tiny-1.5/scheduler/extra.json").write_text("{}")
    with pytest.raises(SystemExit, match="holds results with another weights"):
        main(words["tiny-1.5"])

    build("pixels").save_pretrained(tmp_path / "pixels")
    main(settings(folder, "model=pixels", "method=DDNM", "out=pixels.out", "limit=2"))
    assert float(row(tmp_path / "pixels.out/evaluate.csv")["residual"]) < 0.01
    with pytest.raises(SystemExit, match="prompt = 'a cat': model = pixels takes no prompts"):
        main(settings(folder, "model=pixels", "method=DDNM", "prompt=a cat"))
    with pytest.raises(SystemExit, match="model = tiny-judge is a EmojiClassifier: give a diffusion model"):
        main(settings(folder, "model=tiny-judge"))


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


def test_a_wrong_label_is_known_before_anything_is_read():
    model = built("adm/imagenet-256-classes")
    for settings in (Settings(method="fast", prompt="3"), Settings(method="fast", captions="yes")):
        evaluate.Evaluation(model, settings).check()
    for prompt, message in (("11", "labels = .*11.*: give"), ("a dog", "labels = .*a dog.*: give"), ("", "no label for no class")):
        with pytest.raises(ValueError, match=message):
            evaluate.Evaluation(model, Settings(method="fast", prompt=prompt)).check()


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


def test_a_row_and_a_folder_for_each_value_of_a_list(folder, tmp_path):
    words = settings(folder, "model=mnist", "method=newton", "limit=2", "lr=[.05, .1]", "guidance=1")
    main(words)
    main([word for word in words if not word.startswith("lr")])  # the paper's own is another row
    out = tmp_path / "outputs/evaluate"
    rows = read_rows(out / "evaluate.csv")
    assert [row["method"] for row in rows] == ["newton lr=0.05", "newton lr=0.1", "newton"]
    assert len({row["residual"] for row in rows}) == 3 and "newton lr=0.1" in (out / "evaluate.md").read_text()
    for name in ("mnist-half-newton-lr=0.05-20", "mnist-half-newton-lr=0.1-20", "mnist-half-newton-20"):
        assert (out / name / "0.png").is_file()


@pytest.mark.parametrize("words, keys, values", [
    (["lr=[.05,.1]"], ("lr",), [{"lr": ".05"}, {"lr": ".1"}]),
    (["budget=[20,44]", "task=half", "method=[fast,DPS]"], ("budget", "method"), [
        {"budget": b, "task": "half", "method": m} for b in ("20", "44") for m in ("fast", "DPS")]),
    (["prompt=[red, blue]"], (), [{"prompt": "[red, blue]"}]),  # a text stays a text
])  # fmt: skip
def test_lists_of_values(words, keys, values):
    assert [(dict(word.split("=", 1) for word in row), swept) for row, swept in sweep(words)] == [(value, keys) for value in values]


def test_each_image_has_its_own_caption(folder, tmp_path):
    """From a text file or a table, next to a row with one prompt for all."""
    words = settings(folder, "limit=2", "guidance=2", "steps=3")
    (folder / "0.txt").write_text("red apple")
    with pytest.raises(SystemExit, match="1.png has no caption, neither in 1.txt nor in a captions.csv; on_error=skip"):
        main([*words, "captions=yes"])
    (folder / "captions.csv").write_text("0.png,red apple\n1.png,rocket\n")
    main([*words, "captions=yes", "out=captions"])
    main([*words, "prompt=red apple", "out=prompt"])
    same, other = ([load_image(tmp_path / f"{out}/tiny-half-fast-steps=3-20/{i}.png") for out in ("captions", "prompt")]
                   for i in range(2))  # fmt: skip
    same, other = ((a - b).abs().mean() for a, b in (same, other))
    assert same < 0.005 < 0.02 < other  # rounding differs where prompts do


@pytest.fixture
def inception(tmp_path, monkeypatch):
    """A file of random weights in the form of FID's Inception v3."""
    made = {}
    with monkeypatch.context() as patch:  # the package builds its network only together with a file
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(torch.nn.Module, "load_state_dict", lambda self, state: made.update(network=self))
        feature_extractor_inceptionv3.FeatureExtractorInceptionV3("random", ["2048"])
    torch.manual_seed(0)
    for p in made["network"].parameters():
        torch.nn.init.normal_(p, std=3 * (p[0].numel() or 1) ** -0.5 if p.ndim > 1 else 0.1)
    torch.save(made["network"].state_dict(), tmp_path / "inception.pth")
    monkeypatch.setattr(metrics, "INCEPTION_LAYER", "64")  # the first: the others take seconds
    metrics._inception.cache_clear()
    yield tmp_path / "inception.pth"
    metrics._inception.cache_clear()


def test_fid_and_kid_are_torchmetrics_with_these_weights(folder, tmp_path, inception):
    words = settings(folder, "model=mnist", "method=DDNM", f"inception={inception}")
    main(words)
    found, results = row(tmp_path / "outputs/evaluate/evaluate.csv"), tmp_path / "outputs/evaluate/mnist-half-DDNM-20"
    network = NoTrainInceptionV3("theirs", ["64"], str(inception))
    fid = FrechetInceptionDistance(64, feature_extractor_weights_path=str(inception))
    kid = KernelInceptionDistance(network, subsets=1, subset_size=4)
    for real, where in ((True, folder), (False, results)):
        images = torch.cat([load_image(where / f"{i}.png", (32, 32), 1, crop=True) for i in range(4)]).expand(-1, 3, -1, -1)
        for metric in (fid, kid):
            metric.update((127.5 * (images.clamp(-1, 1) + 1)).round().byte(), real=real)
    assert float(found["fid"]) == pytest.approx(fid.compute().item(), rel=0.02)
    assert float(found["kid_inception"]) == pytest.approx(kid.compute()[0].item(), rel=0.02)
    assert "| FID | KID, Inception |" in (results.parent / "evaluate.md").read_text()
    inception.write_bytes(b"none")
    metrics._inception.cache_clear()
    with pytest.raises(SystemExit, match="inception.pth is not the weights of FID's Inception v3, torch-fidelity's weights-incep"):
        main(words)


def test_a_long_run_says_first_what_it_will_take(folder, capsys, monkeypatch):
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(evaluate.time, "perf_counter", lambda: next(clock))
    main(settings(folder, "model=mnist", "method=DDNM", "limit=2"))
    assert "about 200 s on 1 device(s) and 0.0 GiB on each, not counted the decoder's time" in capsys.readouterr().out


@pytest.mark.slow
def test_two_devices_give_the_same_row(folder, tmp_path):
    """To every digit: blocks are the same, and so are their seeds."""
    for devices in (1, 2):
        command = [sys.executable, "-m", "ldm.evaluate", *settings(folder, f"devices={devices}", f"out=out{devices}")]
        subprocess.run(command, check=True, timeout=900, cwd=tmp_path)
    assert row("out1/evaluate.csv") == row("out2/evaluate.csv")


def test_a_back_propagating_method_on_a_pixel_model(folder, tmp_path):
    """Grey images of 32 x 32, and gradients although Lightning predicts without."""
    main(settings(folder, "model=mnist", "method=DPS", "task=hole", "limit=3"))
    found = row(tmp_path / "outputs/evaluate/evaluate.csv")
    assert (found["images"], found["nfe_forward"], found["nfe_backward"]) == ("3", "10", "10")


def test_images_are_cropped_to_their_middle(tmp_path):
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
    (["method=fast", "lr=0.1"], r"lr = 0.1: method = fast has steps, sigma_y"), (["lr=[.1,]"], r"lr = \[.1,\]: give values with"),
    (["method=newton", "lr=-1"], "lr = -1.0: give a positive number"), (["captions=maybe"], "captions = maybe: "),
    (["model=mnist", "captions=yes"], "captions = yes: model = mnist takes no prompts"),
    (["model=mnist", "prompt=a dog"], "prompt = 'a dog': model = mnist takes no prompts"),
    (["inception=none.pth"], "inception = none.pth is not the weights of FID's Inception v3"),
    (["method=DDNM", "budget=1001"], "steps = 1001: give an integer from 1 to 1000"),
])  # fmt: skip
def test_wrong_arguments_are_one_sentence(words, message, folder, tmp_path):
    with pytest.raises(SystemExit, match=f"^ldm.evaluate: .*{message}"):
        main([f"data={folder}", *words])
    assert not (tmp_path / "outputs").exists()
