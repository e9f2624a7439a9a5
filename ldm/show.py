"""Images in rows with labels, for notebooks: every pixel is drawn sharply, and no label is cut off."""

import io
import re
import sys
import textwrap
from pathlib import Path

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from ldm.images import to_pil
from ldm.util import atomic_write

DPI, GAP, MARGIN = 100, 6, 8  # figure pixels per inch; between images, and around everything
LETTERS = 22  # in a line of a row's label


def show(rows, labels=None, titles=None, path=None, *, width=1080, cell=128, columns=None):
    """Draw rows of images, one label at the left of each row; in a notebook the figure is displayed at once.

    rows     a dict {label: images}, or a list of images (one row each), or the images of one row. Images are a float tensor
             [B, C, H, W] or [C, H, W] in [-1, 1] (values outside are clipped) with C = 1 or 3, or a list of such [C, H, W] or PIL
             images. Rows may differ in number and size of images
    labels   one text per row; None: those of the dict, or none
    titles   one text per column, above the first row; None: none
    path     where the figure is saved, for example "out/figure.png"; None: nowhere
    width    most figure pixels for the images of a row
    cell     small images are magnified, by a whole number, to about so many figure pixels
    columns  images in a line; None: all of a row, or, without titles, as many as keep 96 figure pixels each

    Returns the matplotlib figure. One figure pixel is one image pixel or a part of one; images that do not fit in `width` are
    reduced (Lanczos). ValueError for rows, labels and titles that do not fit together, FloatingPointError for NaN or infinity.
    """
    if isinstance(rows, dict):
        rows, labels = list(rows.values()), list(rows) if labels is None else labels
    elif _is_row(rows):
        rows = [rows]
    labels = [""] * len(rows) if labels is None else [labels] if isinstance(labels, str) else [str(label) for label in labels]
    if len(labels) != len(rows) or not rows:
        raise ValueError(f"labels has {len(labels)} texts for {len(rows)} rows: give one per row, and at least one row")
    rows = [_images(row, label or f"row {i + 1}") for i, (row, label) in enumerate(zip(rows, labels, strict=True))]
    most = max(len(row) for row in rows)
    if not most:
        raise ValueError("rows has no image: give at least one")
    if titles is not None and len(titles) != most:
        raise ValueError(f"titles has {len(titles)} texts for {most} columns: give one per column")
    if columns is None:
        lines = 1 if titles else -(-most // max(width // (min(max(image.width for row in rows for image in row), 96) + GAP), 1))
        columns = -(-most // lines)
    if titles and columns < most:
        raise ValueError(f"columns = {columns} with titles: give at least {most}, so that a row is one line")
    columns = min(columns, most)
    lines = [(row[i : i + columns], i // columns) for row in rows for i in range(0, len(row), columns)]
    size = _cell_size([image for row in rows for image in row], (width + GAP) // columns - GAP, cell)

    figure = _Shown(dpi=DPI)
    renderer = FigureCanvasAgg(figure).get_renderer()
    text = lambda s: figure.text(0, 0, s, fontsize=10, color="0.15", parse_math=False, linespacing=1.15)  # noqa: E731
    labels = [text("\n".join(textwrap.fill(line, LETTERS) for line in label.splitlines())) for label in labels]
    left = max(int(label.get_window_extent(renderer).width) for label in labels)
    left = MARGIN + (left + 10 if left else 0)
    titles = [_fit_title(text(""), str(title), size[0], renderer) for title in titles or []]
    top = MARGIN + (max(int(title.get_window_extent(renderer).height) for title in titles) + 6 if titles else 0)
    space = (columns * (size[0] + GAP) - GAP, len(lines) * (size[1] + GAP) - GAP)  # of the images
    sheet = Image.new("RGB", (left + space[0] + MARGIN, top + space[1] + MARGIN), "white")
    y, starts = top, []
    for images, line in lines:
        if line == 0:
            starts.append(y)
        for column, image in enumerate(images):
            image = _resized(image, size)
            x = left + column * (size[0] + GAP)
            sheet.paste(image, (x + (size[0] - image.width) // 2, y + (size[1] - image.height) // 2))
        y += size[1] + GAP
    for label, start, end in zip(labels, starts, [*starts[1:], y], strict=True):
        label.set(x=(left - 10) / sheet.width, y=1 - (start + end - GAP) / 2 / sheet.height, ha="right", va="center")
    for column, title in enumerate(titles):
        x = left + column * (size[0] + GAP) + size[0] / 2
        title.set(x=x / sheet.width, y=1 - (top - 5) / sheet.height, ha="center", va="bottom")
    figure.set_size_inches((sheet.width + 1e-6) / DPI, (sheet.height + 1e-6) / DPI)  # matplotlib rounds down to whole pixels
    figure.figimage(sheet, 0, 0)
    if path is not None:
        with atomic_write(Path(path).expanduser()) as temporary:
            figure.savefig(temporary, dpi=DPI)
    figure.display()
    return figure


def save_images(images, folder, names="image"):
    """Write every image of a row (as `show` takes them) at its full size to FOLDER/NAME.png. Returns the paths.

    names: one per image, such as the prompts (what no file name may contain becomes "-"); or one text, to which numbers are added.
    """
    images = _images(images, "images")
    names = [names] * len(images) if isinstance(names, str) else [str(name) for name in names]
    if len(names) != len(images):
        raise ValueError(f"names has {len(names)} texts for {len(images)} images: give one per image, or one for all")
    names = [re.sub(r"[^\w ().,+=-]+", "-", name).strip(" .-")[:100] or "image" for name in names]
    several = {name for name in names if names.count(name) > 1}
    names = [f"{name}-{i}" if name in several else name for i, name in enumerate(names)]
    paths = [Path(folder).expanduser() / f"{name}.png" for name in names]
    for image, path in zip(images, paths, strict=True):
        with atomic_write(path) as temporary:
            image.save(temporary)
    return paths


def colored(values, cmap="RdBu_r", low=-1.0, high=1.0):
    """Numbers [B, H, W] or [B, 1, H, W] in a colour map of matplotlib, from low to high -> images [B, 3, H, W] in [-1, 1]."""
    values = values.detach().float().cpu().reshape(len(values), *values.shape[-2:])
    colors = colormaps[cmap](((values - low) / (high - low)).clamp(0, 1).numpy())
    return torch.from_numpy(colors[..., :3]).float().permute(0, 3, 1, 2) * 2 - 1


class _Shown(Figure):
    """A figure that a notebook's cell displays once: when it is made, but not again as the value of the same cell."""

    cell = None

    def display(self):
        ipython = sys.modules.get("IPython")
        shell = ipython and ipython.get_ipython()
        if shell is None or self.cell == shell.execution_count:
            return
        self.cell = shell.execution_count
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=DPI)
        ipython.display.display(ipython.display.Image(file.getvalue(), format="png"))

    _ipython_display_ = display


def _is_row(rows):
    """Whether they are the images of one row, not several rows."""
    return torch.is_tensor(rows) or all(isinstance(x, Image.Image) or torch.is_tensor(x) and x.ndim == 3 for x in rows)


def _images(row, name):
    """The PIL images, "L" or "RGB", of a row."""
    row = row[None] if torch.is_tensor(row) and row.ndim == 3 else [row] if isinstance(row, Image.Image) else row
    return [x.convert("RGB") if isinstance(x, Image.Image) else to_pil(x, stage=f"{name!r}") for x in row]


def _cell_size(images, most, cell):
    """(width, height) in figure pixels of the space for one image: at most `most` wide; small images a whole number of times."""
    w, h = max(image.width for image in images), max(image.height for image in images)
    if w <= most:
        times = max(min(most // w, round(cell / max(w, h))), 1)
        return w * times, h * times
    return most, max(round(h * most / w), 1)


def _resized(image, size):
    """A PIL image as large as fits in size = (width, height): magnified pixels stay squares, reduced ones are averaged."""
    times = min(size[0] / image.width, size[1] / image.height)
    to = [max(round(n * times), 1) for n in image.size]
    if times > 1:
        whole = int(-(-times // 1))
        image = image.resize((image.width * whole, image.height * whole), Image.Resampling.NEAREST)
        return image.resize(to, Image.Resampling.BOX)
    return image.resize(to, Image.Resampling.LANCZOS) if times < 1 else image


def _fit_title(text, title, width, renderer):
    """The title broken into lines of at most `width` figure pixels: between words, in smaller letters, or else within words."""
    for points, within in ((10, False), (8, False), (8, True)):
        for letters in range(max(width // 5, 3), 2, -1):
            text.set(text=textwrap.fill(title, letters, break_long_words=within), fontsize=points)
            if text.get_window_extent(renderer).width <= width + GAP - 2:
                return text
    return text
