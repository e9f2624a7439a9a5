"""The brush of the mask painter: its strokes in JavaScript, run by node, and the mask in Python."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from common import ROOT

from ldm.inpainting import check_mask

SCRIPT = """
import { readFileSync, writeFileSync } from "node:fs";
const { Strokes } = await import("data:text/javascript," + encodeURIComponent(readFileSync(process.argv[1], "utf8")));
const s = new Strokes(12, 20), seen = [];
const keep = () => seen.push(Array.from(s.mask));
s.begin(); s.line(2, 3, 15, 9, 2.5); keep();
s.begin(); s.line(10, 6, 10, 6, 3, 0); keep();
s.undo(); keep(); s.undo(); keep(); s.undo(); keep();
s.begin(); s.line(-5, -5, 40, 40, 1); keep(); s.clear(); keep(); s.undo(); keep();
console.log(JSON.stringify(seen));
"""


def line(x0, y0, x1, y1, radius):
    y, x = torch.meshgrid(torch.arange(12) + 0.5, torch.arange(20) + 0.5, indexing="ij")
    length = (x1 - x0) ** 2 + (y1 - y0) ** 2
    t = (((x - x0) * (x1 - x0) + (y - y0) * (y1 - y0)) / max(length, 1)).clamp(0, 1)
    return torch.hypot(x - x0 - t * (x1 - x0), y - y0 - t * (y1 - y0)) <= radius


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_brush_paints_erases_and_goes_back():
    command = ["node", "--input-type=module", "-e", SCRIPT, str(ROOT / "ldm/painting.js")]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    seen = [torch.tensor(mask).view(12, 20).bool() for mask in json.loads(out.stdout)]
    stroke, erased = line(2, 3, 15, 9, 2.5), line(10, 6, 10, 6, 3)
    long = line(-5, -5, 40, 40, 1)
    nothing = torch.zeros_like(stroke)
    for got, expected in zip(seen, [stroke, stroke & ~erased, stroke, nothing, nothing, long, nothing, long], strict=True):
        assert torch.equal(got, expected)


def test_the_mask_is_a_tensor_in_the_next_cell():
    pytest.importorskip("anywidget")
    from ldm.painting import MaskPainter

    painter = MaskPainter(torch.rand(1, 3, 12, 20) * 2 - 1)
    assert painter.mask.shape == (1, 1, 12, 20) and painter.mask.all() and painter.brush == 20 / 16
    with pytest.raises(ValueError, match="no hole"):
        check_mask(painter.mask)
    painter.set_state({"painted": memoryview(bytes([1] * 5 + [0] * 235))})  # as the kernel gets it from the browser
    assert painter.mask[0, 0, 0].tolist() == [0] * 5 + [1] * 15 and painter.mask[0, 0, 1:].all()
    wanted = torch.ones(1, 1, 12, 20)
    wanted[..., 3:5, 7:9] = 0
    painter.mask = wanted
    assert torch.equal(painter.mask, wanted) and painter.get_state()["painted"].count(1) == 4
    with pytest.raises(ValueError, match=r"mask has shape \[1, 1, 12, 12\]: give \[1, 1, 12, 20\]"):
        painter.mask = wanted[..., :12]
    with pytest.raises(ValueError, match="brush = 0: give a radius > 0"):
        MaskPainter(torch.zeros(1, 3, 4, 4), brush=0)


def test_without_anywidget_one_sentence_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    monkeypatch.delitem(sys.modules, "ldm.painting", raising=False)
    with pytest.raises(ModuleNotFoundError, match="ldm.painting needs anywidget: pip install anywidget, or give a mask file"):
        import ldm.painting  # noqa: F401
