"""Fetched files: verified, explained where they cannot be fetched, read without executing anything."""

import hashlib
import io
import pickle
import sys
import tarfile

import lpips
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ldm import metrics
from ldm.data import alexnet
from ldm.data.packages import fetch
from ldm.metrics import lpips_distance, psnr, ssim


def write(name, text="data"):
    return [sys.executable, "-c", f"open({name!r}, 'w').write({text!r})"]


def test_a_file_is_fetched_once_and_verified(tmp_path):
    good = hashlib.sha256(b"data").hexdigest()
    path = fetch(write("a.tgz"), "a.tgz", good, tmp_path / "new")
    assert path.read_text() == "data"
    assert fetch(["no-such-program"], "a.tgz", good, tmp_path / "new") == path
    with pytest.raises(ValueError, match=r"has the checksum 3a6eb0790f39\.\.\., not 000000000000\.\.\.: delete it"):
        fetch(["no-such-program"], "a.tgz", "0" * 64, tmp_path / "new")


def test_what_cannot_be_fetched_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no-such-npm is not installed: run `no-such-npm pack a@1` on any machine"):
        fetch(["no-such-npm", "pack", "a@1"], "a.tgz", "0", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"failed \(no network\): put a.tgz into"):
        fetch([sys.executable, "-c", "import sys; sys.exit('no network')"], "a.tgz", "0", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def alexnet_weights(tmp_path, monkeypatch):
    """data/lpips/alexnet.safetensors as `make data-lpips` would write it, of random weights."""
    rng = np.random.default_rng(0)
    shapes = [(11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 256), (3, 3, 256, 256)]
    layers = {f"Conv_{i}": {"kernel": (rng.normal(size=s) * np.prod(s[:3]) ** -0.5).astype(np.float32),
                            "bias": rng.normal(size=s[3]).astype(np.float32)} for i, s in enumerate(shapes)}  # fmt: skip
    content = pickle.dumps({"AlexNet_0": layers}, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    pack(tmp_path, monkeypatch, content)
    monkeypatch.chdir(tmp_path)
    metrics._lpips.cache_clear()
    yield layers
    metrics._lpips.cache_clear()


def pack(tmp_path, monkeypatch, content):
    """An archive of the package's form that holds `content`, where `fetch` finds it."""
    folder = tmp_path / "data/lpips"
    folder.mkdir(parents=True)
    with tarfile.open(folder / alexnet.ARCHIVE, "w:gz") as archive:
        member = tarfile.TarInfo(alexnet.MEMBER)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(alexnet, "CHECKSUM", hashlib.sha256((folder / alexnet.ARCHIVE).read_bytes()).hexdigest())


def test_lpips_is_the_package_s_with_these_weights(alexnet_weights, tmp_path):
    tensors = load_file(alexnet.build(tmp_path / "data"))
    kernel = alexnet_weights["Conv_1"]["kernel"]
    assert tensors["features.3.weight"][7, 5, 1, 2] == kernel[1, 2, 5, 7]
    reference = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    net = reference.net
    for part, index in zip((net.slice1, net.slice2, net.slice3, net.slice4, net.slice5), (0, 3, 6, 8, 10), strict=True):
        part._modules[str(index)].weight.data = tensors[f"features.{index}.weight"]
        part._modules[str(index)].bias.data = tensors[f"features.{index}.bias"]
    x, y = (torch.rand(3, 3, 64, 64) * 2 - 1 for _ in range(2))
    assert torch.allclose(lpips_distance(x, y), reference(x, y).flatten(), atol=1e-6)
    assert lpips_distance(x, x).abs().max() < 1e-6 and (lpips_distance(x, y) > 1e-3).all()


def test_lpips_without_weights_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "ROOT", tmp_path)
    metrics._lpips.cache_clear()
    with pytest.raises(FileNotFoundError, match="make data-lpips"):
        lpips_distance(torch.zeros(1, 3, 64, 64), torch.zeros(1, 3, 64, 64))


def test_a_pickle_that_would_execute_something_is_refused(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    pack(tmp_path, monkeypatch, pickle.dumps({"AlexNet_0": Evil()}, protocol=3))
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.print is not part of an array"):
        alexnet.build(tmp_path / "data")


def test_psnr_and_ssim():
    x = torch.rand(3, 3, 32, 32) * 2 - 1
    assert torch.allclose(psnr(x * 0 + 0.02, x * 0), torch.full((3,), 40.0))  # a hundredth of the range
    assert torch.allclose(ssim(x, x), torch.ones(3)) and (ssim(x.flip(0), x)[[0, 2]] < 0.2).all()
    each = torch.stack([psnr(x[i : i + 1].flip(3), x[i : i + 1])[0] for i in range(3)])
    assert torch.allclose(psnr(x.flip(3), x), each)
