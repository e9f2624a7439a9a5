import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.mnist import sample_digits
from ldm.images import check_image, from_uint8, grid, load_image, save_gif, save_image, to_pil, to_uint8


def test_every_pixel_value_survives():
    values = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(values)
    assert x.min() == -1 and x.max() == 1 and torch.equal(to_uint8(x), values)


def test_save_and_load(tmp_path):
    x = from_uint8(torch.randint(0, 256, (3, 7, 5), dtype=torch.uint8))
    path = save_image(x, tmp_path / "new" / "picture.png")
    assert torch.equal(load_image(path)[0], x)
    assert [p.name for p in path.parent.iterdir()] == ["picture.png"]  # nothing half-written left behind


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "LA", "1", "I;16", "CMYK"])
def test_every_kind_of_picture_loads(tmp_path, mode):
    grey = np.tile(np.linspace(0, 255, 8, dtype=np.uint8), (6, 1))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    image.save(tmp_path / ("x.tiff" if mode == "CMYK" else "x.png"))
    x = load_image(next(tmp_path.iterdir()))
    assert x.shape == (1, 3, 6, 8) and x.dtype == torch.float32 and x.min() >= -1 and x.max() <= 1
    if mode not in ("1", "CMYK"):
        assert (to_uint8(x)[0, 0].numpy() - grey.astype(int)).max() <= 1
    assert load_image(next(tmp_path.iterdir()), size=(4, 5), channels=1).shape == (1, 1, 4, 5)


def test_transparency_is_white(tmp_path):
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (load_image(tmp_path / "x.png") == 1).all()


def test_grid_and_gif(tmp_path):
    x = torch.linspace(-1, 1, 5)[:, None, None, None].expand(5, 1, 4, 3)
    sheet = grid(x, columns=3, gap=1)
    assert sheet.shape == (1, 2 * 5 + 1, 3 * 4 + 1)
    assert (sheet[0, 6:10, 5:8] == x[4]).all() and (sheet[0, 6:10, 9:12] == 1).all() and (sheet[0, 0] == 1).all()
    with Image.open(save_gif(list(x), tmp_path / "x.gif", scale=2, hold=1.5)) as gif:
        assert gif.n_frames == 5 and gif.size == (6, 8)
        gif.seek(4)
        assert gif.info["duration"] == 1500
    assert to_pil(x[0], scale=3).size == (9, 12)


def test_sample_digits():
    images, labels = sample_digits(range(3, 6), each=4)
    assert images.shape == (12, 1, 32, 32) and labels.tolist() == [3] * 4 + [4] * 4 + [5] * 4
    assert images.min() == -1 and images.max() == 1 and (images[..., :2, :] == -1).all()


@pytest.mark.parametrize("image, message", [
    (torch.zeros(3, 4, 4), "float32 \\[3, 4, 4\\]"),
    (torch.zeros(1, 3, 4, 4, dtype=torch.uint8), "uint8"), ("x.png", "image is str"),
    (torch.full((1, 3, 4, 4), 1.1), "must lie in"), (torch.full((1, 3, 4, 4), float("nan")), "48 values that are NaN"),
])  # fmt: skip
def test_bad_tensors(image, message):
    with pytest.raises(ValueError, match=message):
        check_image(image)


def test_bad_files(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    whole = tmp_path / "whole.png"
    Image.effect_noise((64, 64), 50).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:1000])
    with pytest.raises(ValueError, match="no such file"):
        load_image(tmp_path / "absent.png")
    for name in ("text.png", "half.png"):
        with pytest.raises(ValueError, match=f"{name}.*not a readable picture"):
            load_image(tmp_path / name)
    with pytest.raises(ValueError, match="channels = 4"):
        load_image(whole, channels=4)
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    with pytest.raises(ValueError, match="dot.png' has 1 x 1 pixels: give at least 2 x 2"):
        load_image(tmp_path / "dot.png")
