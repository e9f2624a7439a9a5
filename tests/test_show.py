"""Rows of images with labels: every pixel where it belongs, no text cut off, and one display per cell in a notebook."""

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from PIL import Image

from ldm.images import from_uint8, load_image
from ldm.show import GAP, MARGIN, save_images, show

IMAGES = from_uint8(torch.randint(0, 256, (3, 3, 16, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def expected(images, times):
    """[B, H, W, 3] uint8, each pixel `times` x `times`."""
    x = ((images + 1) * 127.5).round().to(torch.uint8).repeat_interleave(times, 2).repeat_interleave(times, 3)
    return x.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()


def cells(figure, left, top, height, width, number):
    return [figure[top : top + height, x : x + width] for x in (left + i * (width + GAP) for i in range(number))]


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_magnified_exactly(tmp_path, channels):
    images = IMAGES[:, :channels]
    show(images, path=tmp_path / "figure.png")
    figure = pixels(tmp_path / "figure.png")
    assert figure.shape == (16 * 8 + 2 * MARGIN, 3 * (12 * 8 + GAP) - GAP + 2 * MARGIN, 3)
    for found, wanted in zip(cells(figure, MARGIN, MARGIN, 128, 96, 3), expected(images, 8), strict=True):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize(
    "label", ["x", "a very long label that names the method, the model and more", "two\nlines", "$5 and $x_t^$"]
)
def test_labels_are_never_cut_off(tmp_path, label):
    """All dark pixels of the text lie between the margins, left of the images and in the height of their row."""
    white = torch.ones(2, 3, 16, 16)
    show({label: white, "": white}, path=tmp_path / "figure.png")
    figure = pixels(tmp_path / "figure.png")
    rows, columns = np.nonzero((figure < 128).any(2))
    assert len(rows) > 10 and columns.min() >= MARGIN - 2 and columns.max() < figure.shape[1] - 2 * 128 - GAP - MARGIN
    assert rows.min() >= MARGIN and rows.max() < MARGIN + 128


@pytest.mark.parametrize(
    "title", ["cat", "a red cat with a hat on a mat in front of a house", "Donaudampfschifffahrtsgesellschaft"]
)
@pytest.mark.parametrize("columns, side", [(2, 128), (16, 48)])
def test_titles_keep_to_their_column(tmp_path, title, columns, side):
    show([torch.ones(columns, 3, 16, 16)], ["m"], [title, *[""] * (columns - 1)], tmp_path / "figure.png")
    figure = pixels(tmp_path / "figure.png")
    rows, found = np.nonzero((figure[: -MARGIN - side] < 128).any(2))
    left = figure.shape[1] - MARGIN - columns * (side + GAP) + GAP
    assert len(rows) > 10 and rows.min() >= MARGIN - 2
    assert left - GAP <= found.min() and found.max() < left + side + GAP


def test_rows_of_several_sizes_and_lengths(tmp_path):
    """A measured image with a quarter of the side is drawn as large as the others; missing images stay white."""
    small = torch.nn.functional.avg_pool2d(IMAGES, 4)
    show([IMAGES, small[:1]], path=tmp_path / "figure.png")
    figure = pixels(tmp_path / "figure.png")
    second = cells(figure, MARGIN, MARGIN + 128 + GAP, 128, 96, 3)
    assert np.array_equal(second[0], expected(small[:1], 32)[0])
    assert (second[1] == 255).all() and (second[2] == 255).all()


def test_large_images_are_reduced_and_many_go_into_lines(tmp_path):
    show(torch.zeros(4, 3, 512, 256), path=tmp_path / "large.png")
    height, width, _ = pixels(tmp_path / "large.png").shape
    assert width == 4 * (256 + GAP) - GAP + 2 * MARGIN and height == 512 + 2 * MARGIN
    show(torch.zeros(4, 3, 512, 512), width=500, path=tmp_path / "reduced.png")
    assert pixels(tmp_path / "reduced.png").shape[1] <= 500 + 2 * MARGIN
    show(torch.zeros(32, 3, 64, 64), path=tmp_path / "many.png")
    assert pixels(tmp_path / "many.png").shape[:2] == (3 * (64 + GAP) - GAP + 2 * MARGIN, 11 * (64 + GAP) - GAP + 2 * MARGIN)


@pytest.mark.parametrize("rows, options, message", [
    ({"a": IMAGES, "b": IMAGES}, {"labels": ["a"]}, "labels has 1 texts for 2 rows"),
    (IMAGES, {"titles": ["a"]}, "titles has 1 texts for 3 columns"),
    (torch.zeros(0, 3, 4, 4), {}, "rows has no image"), ([], {}, "rows has no image"),
    (IMAGES, {"titles": ["a", "b", "c"], "columns": 2}, "columns = 2 with titles"),
    ({"latents": torch.zeros(2, 4, 8, 8)}, {}, r"'latents' has the shape \[4, 8, 8\]: give \[C, H, W\] with C = 1 or 3"),
])  # fmt: skip
def test_what_does_not_fit_is_named(rows, options, message):
    with pytest.raises(ValueError, match=message):
        show(rows, **options)


def test_nan_is_an_error_that_names_the_row():
    with pytest.raises(FloatingPointError, match="'newton' has 1 of 576 values that are NaN or infinite: .*float32"):
        x = IMAGES.clone()
        x[1, 0, 0, 0] = float("nan")
        show({"known": IMAGES, "newton": x})


def test_images_are_saved_one_by_one(tmp_path):
    paths = save_images(IMAGES, tmp_path / "new", ["a cat / a dog", "a cat / a dog", "../../etc"])
    assert [path.name for path in paths] == ["a cat - a dog-0.png", "a cat - a dog-1.png", "etc.png"]
    assert all(torch.equal(load_image(path), image[None]) for path, image in zip(paths, IMAGES, strict=True))
    assert [path.name for path in save_images(IMAGES, tmp_path, "newton")] == ["newton-0.png", "newton-1.png", "newton-2.png"]
    with pytest.raises(ValueError, match="names has 2 texts for 3 images"):
        save_images(IMAGES, tmp_path, ["a", "b"])


def test_a_cell_displays_each_figure_once():
    shell = InteractiveShell.instance()
    try:
        shell.push({"show": show, "images": IMAGES})
        shown = []
        for cell in ("show(images); 1", "figure = show(images)\nfigure", "figure"):
            with capture_output() as captured:
                shell.run_cell(cell, store_history=True)
            shown.append(sum("image/png" in output.data for output in captured.outputs))
        assert shown == [1, 1, 1]
    finally:
        InteractiveShell.clear_instance()
