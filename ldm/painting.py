"""A mask painted over an image in a notebook: a brush, its size, undo. The mask is a tensor in the next cell.

    painter = MaskPainter("photo.png")
    painter                              # paint over what is to be filled in
    make_mask(painter.mask, size)        # or latent_inpainting(model, image, painter.mask)

Needs anywidget (pip install anywidget), and JupyterLab, VS Code or Colab to show it. Without it, masks come from files, arrays and
rectangles as before (ldm/masks.py).
"""

import io
from pathlib import Path
from typing import Any

import torch
import traitlets
from torch import Tensor

try:
    import anywidget
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "ldm.painting needs anywidget: pip install anywidget, or give a mask file", name="anywidget"
    ) from error

from ldm.images import Source, on_white, open_image, to_pil


class MaskPainter(anywidget.AnyWidget):
    """An image (what `ldm.images.open_image` takes, or a tensor [1, 3, H, W] in [-1, 1]) to paint a mask over.

    brush   radius in pixels of the image
    width   of the widget on the page, in CSS pixels
    """

    _esm = Path(__file__).parent / "painting.js"
    size: Any = traitlets.List().tag(sync=True)  # [H, W]
    picture = traitlets.Bytes().tag(sync=True)  # the image as PNG
    # H W bytes, 1 where painted; they come from the browser as a memoryview
    painted = traitlets.Bytes().tag(sync=True, from_json=lambda value, _: bytes(value))
    brush = traitlets.Float().tag(sync=True)
    width = traitlets.Int().tag(sync=True)

    def __init__(self, image: Source | Tensor, brush: float | None = None, width: int = 512, **kwargs: Any):
        pil = to_pil(image[0]) if torch.is_tensor(image) else on_white(open_image(image))
        file = io.BytesIO()
        pil.convert("RGB").save(file, "PNG")
        brush = max(pil.height, pil.width) / 16 if brush is None else brush
        if not brush > 0:
            raise ValueError(f"brush = {brush}: give a radius > 0, in pixels of the image")
        size, empty = [pil.height, pil.width], bytes(pil.height * pil.width)
        super().__init__(size=size, picture=file.getvalue(), painted=empty, brush=brush, width=width, **kwargs)

    @property
    def mask(self) -> Tensor:
        """[1, 1, H, W] float32, 0 where it was painted (to be filled in) and 1 elsewhere (known)."""
        h, w = self.size
        return 1 - torch.frombuffer(bytearray(self.painted), dtype=torch.uint8).view(1, 1, h, w).float()

    @mask.setter
    def mask(self, mask: Tensor) -> None:
        if tuple(mask.shape[-2:]) != tuple(self.size) or mask.numel() != mask.shape[-2] * mask.shape[-1]:
            raise ValueError(f"mask has shape {list(mask.shape)}: give [1, 1, {self.size[0]}, {self.size[1]}]")
        self.painted = (mask.reshape(-1) < 1).to(torch.uint8).cpu().numpy().tobytes()
