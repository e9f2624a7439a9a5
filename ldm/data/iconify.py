"""Emoji drawings in the @iconify-json packages: SVG bodies by name in icons.json, drawn by resvg."""

import io
import json
import tarfile
from pathlib import Path

from PIL import Image


def members(path, folder):
    """{file name: bytes} of what lies directly in a folder of a .tgz archive."""
    with tarfile.open(path) as archive:
        return {Path(m.name).name: archive.extractfile(m).read() for m in archive if str(Path(m.name).parent) == folder}


def read_icons(path):
    """({name: SVG text}, {code points: name}) of an @iconify-json package, a .tgz. Code points are as in "1f44b-1f3fb", without
    the variation selector FE0F; some packages have none. Aliases are names of their own; mirrored ones are left out."""
    files = members(path, "package")
    data = json.loads(files["icons.json"])
    names = {name: name for name in data["icons"]}
    names |= {alias: at["parent"] for alias, at in data.get("aliases", {}).items() if set(at) == {"parent"}}

    def svg(icon):
        box = [icon.get(key, data.get(key, default)) for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))]
        space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {space} viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>'

    drawings = {name: svg(data["icons"][parent]) for name, parent in names.items() if parent in data["icons"]}
    return drawings, {bare(code): name for code, name in json.loads(files["chars.json"]).items()}


def bare(code):
    """Code points such as "2764-fe0f-200d-1f525" in small letters, without FE0F: packages differ in where they write it."""
    return code.lower().replace("-fe0f", "")


def draw(svg, size):
    """SVG text -> a transparent square image of size x size pixels. The same on every machine: no fonts, no GPU."""
    import resvg_py  # of the extra `train`: not needed by who only reads what was drawn

    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True))))
