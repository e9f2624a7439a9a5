"""The mask painter in a real browser, on a running JupyterLab: a stroke, undo and clear reach the tensor of the next cell.

npm install --prefix /tmp/browser puppeteer-core @sparticuz/chromium
NODE_PATH=/tmp/browser/node_modules python -m pytest tests/test_painting_browser.py
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from common import ROOT

RESOLVE = 'require.resolve("puppeteer-core"); require.resolve("@sparticuz/chromium")'
FOUND = shutil.which("node") and subprocess.run(["node", "-e", RESOLVE], capture_output=True).returncode == 0
CELLS = [
    "import torch\nfrom ldm.painting import MaskPainter\n"
    "painter = MaskPainter(torch.zeros(1, 3, 40, 60), brush=4, width=600)\npainter",
    "rows, columns = torch.nonzero(painter.mask[0, 0] == 0, as_tuple=True)\n"
    "seen = [len(rows), *[int(x) for v in (rows, columns) if len(v) for x in (v.min(), v.max())], painter.brush]\n"
    "print('SEEN', seen)",
]
SCRIPT = r"""
const chromium = require("@sparticuz/chromium").default ?? require("@sparticuz/chromium");
(async () => {
  const executablePath = await chromium.executablePath();
  const browser = await require("puppeteer-core").launch({ executablePath, args: chromium.args, headless: "shell" });
  const page = await browser.newPage(), seen = [];
  await page.setViewport({ width: 1200, height: 1000 });
  await page.goto(process.argv[1], { waitUntil: "domcontentloaded" });
  const run = async (cell) => {
    await page.evaluate((i) => {
      const { commands, shell } = window.jupyterapp;
      shell.currentWidget.content.activeCellIndex = i;
      return commands.execute("notebook:run-cell");
    }, cell);
  };
  const mask = async () => {
    await new Promise((resolve) => setTimeout(resolve, 500));  // what the brush sent is with the kernel
    await run(1);
    seen.push(await page.evaluate(() => {
      const { outputs } = window.jupyterapp.shell.currentWidget.content.widgets[1].model;
      return outputs.get(0).toJSON().text;
    }));
  };
  await page.waitForFunction(() => window.jupyterapp?.shell.currentWidget?.content?.widgets?.length > 1 &&
    window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === "idle", { timeout: 120000 });
  await run(0);
  const canvas = await page.waitForSelector("canvas", { timeout: 60000 });
  await new Promise((resolve) => setTimeout(resolve, 500));
  const box = await canvas.boundingBox(), scale = box.width / 60;
  const stroke = async (x0, y0, x1, y1) => {
    await page.mouse.move(box.x + x0 * scale, box.y + y0 * scale);
    await page.mouse.down();
    await page.mouse.move(box.x + x1 * scale, box.y + y1 * scale, { steps: 5 });
    await page.mouse.up();
  };
  const press = (label) => page.evaluate((label) =>
    [...document.querySelectorAll("button")].find((b) => b.textContent === label).click(), label);
  await mask();
  await stroke(10, 20, 40, 20); await mask();
  await stroke(50, 30, 50, 30); await mask();
  await press("undo"); await mask();
  await press("clear"); await mask();
  await page.screenshot({ path: process.argv[2] });
  console.log(JSON.stringify(seen));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The address of a notebook in a JupyterLab of its own, with CELLS."""
    folder = tmp_path_factory.mktemp("lab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, folder / "painting.ipynb")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{s.getsockname()[1]}"
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "RUNTIME")} | {"JUPYTERLAB_WORKSPACES_DIR": str(folder)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               f"--port={address[17:]}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]  # fmt: skip
    environment = os.environ | own | {"PYTHONPATH": str(ROOT)}
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/api", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield f"{address}/lab/tree/painting.ipynb?reset"
    finally:
        server.terminate()
        server.wait(20)


@pytest.mark.skipif(not FOUND, reason="no browser for node, see above")
def test_a_stroke_undo_and_clear_reach_the_next_cell(lab, tmp_path):
    pytest.importorskip("anywidget")
    done = subprocess.run(["node", "-e", SCRIPT, lab, str(tmp_path / "page.png")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    nothing, stroke, both, undone, cleared = (json.loads(text.split("SEEN ")[1]) for text in json.loads(done.stdout))
    assert nothing == cleared == [0, 4.0]
    count, top, bottom, left, right, brush = stroke
    assert abs(count - (30 * 8 + 3.14 * 16)) < 20 and brush == 4
    assert [top, bottom, left, right] == pytest.approx([16, 23, 6, 43], abs=1)
    assert both[0] - count == pytest.approx(3.14 * 16, abs=6) and both[2] == pytest.approx(33, abs=1)
    assert undone == stroke
