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
    path = save_image(x, tmp_path / "new" / "image.png")
    assert torch.equal(load_image(path)[0], x)
    assert [p.name for p in path.parent.iterdir()] == ["image.png"]  # nothing half-written left behind


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nothing_that_is_not_finite_is_saved(tmp_path, value):
    x = torch.zeros(3, 4, 4)
    x[0, 1, 2] = value
    for save in (lambda: to_uint8(x), lambda: save_image(x, tmp_path / "x.png"), lambda: save_gif([x], tmp_path / "x.gif")):
        with pytest.raises(FloatingPointError, match="the image has 1 of 48 values that are NaN or infinite: .*float32"):
            save()
    assert not list(tmp_path.iterdir())


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
