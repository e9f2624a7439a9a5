"""Which caption belongs to which image of a folder: text files next to the images, or tables of file names and captions."""

import codecs
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path

from ldm.images import EXTENSIONS

TABLES = ("captions.csv", "captions.tsv", "metadata.csv")
TEXTS = (".txt", ".caption")  # of text files that are named as their image is
MARKS = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16",
         codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
LINE = re.compile(r'\s*"(?P<quoted>(?:[^"]|"")+)"\s*[,;\t](?P<caption>.*)')


def find_captions(folder):
    """The captions of all images in a folder and its subfolders.

    An image `a.png` has its caption in `a.txt`, `a.png.txt` or `a.caption` next to it. Where its folder or one above holds a table
    (captions.csv, captions.tsv or metadata.csv), it is there, on a line `file,caption`; `;` or a tab may stand for the comma. The
    caption is all that follows: further commas belong to it, and quotes around it do not. Names match in every Unicode normal form,
    and in upper or lower case where only one file fits. Texts are UTF-8, or UTF-16 and UTF-32 with a byte-order mark.

    Returns ({path: caption} by name, [(path, kind, reason)] of what is left out, hidden files and folders included).
    """
    images, texts, tables, left_out = _files(Path(folder))
    captions, table_of = {}, {}
    for table in tables:
        here = [path for path in images if table.parent in path.parents]
        captions |= _read_table(table, here, left_out)
        table_of |= dict.fromkeys(here, table.name)
    for path in images:
        try:
            if path not in captions and path not in table_of:
                captions[path] = _read_companion(path, texts)
        except (OSError, ValueError) as error:
            left_out.append((path, "with an unreadable caption", str(error)))
        else:
            if captions.get(path) is None:
                where = f"{table_of[path]} has no line for it" if path in table_of else f"there is no {path.stem}.txt"
                left_out.append((path, "without caption", f"no caption, {where}"))
    return {path: captions[path] for path in images if captions.get(path) is not None}, left_out


def read_text(path, errors="strict"):
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 with its byte-order mark, in the normal form NFC. ValueError otherwise.
    With errors="surrogateescape" each byte that is not UTF-8 becomes one of the characters U+DC80 to U+DCFF."""
    data = Path(path).read_bytes()
    encoding = next((encoding for mark, encoding in MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding, errors if encoding == "utf-8" else "strict")
    except UnicodeDecodeError as error:
        raise ValueError(f"{Path(path).name} is not {encoding.upper()} text from byte {error.start} on: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{Path(path).name} holds zero bytes, as UTF-16 without a byte-order mark does: save it as UTF-8")
    return unicodedata.normalize("NFC", text)


def _files(folder):
    """(images, {(folder, name): text file}, tables, what is left out) of a folder and its subfolders, each by name."""
    images, texts, tables, left_out, seen = [], {}, [], [], set()
    failed = lambda error: left_out.append((Path(error.filename), "in an unreadable folder", str(error.strerror)))  # noqa: E731
    for place, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        seen.add(os.path.realpath(place))
        place = Path(place)
        for name in [name for name in folders if name.startswith(".") or name == "__MACOSX"]:
            folders.remove(name)
            left_out.append((place / name, "hidden", "hidden folder"))
        folders[:] = [name for name in folders if os.path.realpath(place / name) not in seen]
        for path in (place / name for name in names):
            kind = path.suffix.lower()
            if path.name.startswith("."):
                left_out.append((path, "hidden", "hidden file, as macOS makes them of every file"))
            elif path.name.lower() in TABLES:
                tables.append(path)
            elif kind in EXTENSIONS:
                images.append(path)
            elif kind in TEXTS:
                texts[place, unicodedata.normalize("NFC", path.stem), kind] = path
                texts.setdefault((place, unicodedata.normalize("NFC", path.stem).casefold(), kind), path)
            else:
                left_out.append((path, f"of another kind ({kind or 'no extension'})", f"images are {', '.join(EXTENSIONS)}"))
    tables.sort(key=lambda path: (len(path.parts), -TABLES.index(path.name.lower())))  # later ones win
    return sorted(images), texts, tables, left_out


def _read_companion(image, texts):
    """The caption in the text file of an image, or None."""
    names = [unicodedata.normalize("NFC", name) for name in (image.stem, image.name)]
    for name in [*names, *map(str.casefold, names)]:
        for kind in TEXTS:
            if (image.parent, name, kind) in texts:
                return " ".join(read_text(texts[image.parent, name, kind]).split())
    return None


def _read_table(table, images, left_out):
    """{path: caption} of a table's lines; the lines that are not used are added to `left_out`."""
    captions, find = {}, _finder(table.parent, images)
    try:
        lines = re.split(r"\r\n|\r|\n", read_text(table, "surrogateescape"))
    except (OSError, ValueError) as error:
        left_out.append((table, "that are unreadable tables", str(error)))
        return {}
    header, number = next((i for i, line in enumerate(lines) if line.strip()), 0), 0
    while number < len(lines):
        first, line = number, lines[number]
        number += 1
        name, caption = _split(line, find)
        if caption is not None and caption.lstrip().startswith('"') and caption.count('"') % 2:  # it goes on in the next lines
            for last in range(number, len(lines)):
                if find(_split(lines[last], find)[0]):
                    break
                if lines[last].count('"') % 2:
                    caption, number = " ".join([caption, *lines[number : last + 1]]), last + 1
                    break
        image, reason = find(name), None
        if not line.strip() or image is None and first == header and Path(name).suffix.lower() not in EXTENSIONS:
            continue
        if caption is None:
            reason = "no separator after the file's name"
        elif image is None:
            reason = f"there is no image {name!r}"
        elif any("\udc80" <= c <= "\udcff" for c in caption):
            reason = "it is not UTF-8 text: save the table as UTF-8"
        elif image in captions:
            reason = f"{name} has a caption already"
        else:
            quoted = re.fullmatch(r'\s*"((?:[^"]|"")*)"\s*', caption)
            captions[image] = " ".join((quoted[1].replace('""', '"') if quoted else caption).split())
        if reason:
            left_out.append((table, "that are lines of a table", f"line {first + 1}: {reason}"))
    return captions


def _split(line, find):
    """(file name, caption) of a table's line: the name ends at the separator before which an image's name stands, or else at the
    first one. The caption is None where there is no separator."""
    if match := LINE.match(line):
        return match["quoted"].replace('""', '"'), match["caption"]
    parts = [(line[: m.start()].strip(), line[m.end() :]) for m in re.finditer("[,;\t]", line)]
    return next((part for part in parts if find(part[0], with_extension=True)), parts[0] if parts else (line.strip(), None))


def _finder(folder, images):
    """A function that finds the image meant by a name in a table: with or without its folder, extension or exact case."""
    plain = lambda name: unicodedata.normalize("NFC", str(name)).replace("\\", "/").removeprefix("./")  # noqa: E731
    keys = [lambda path: plain(path.relative_to(folder).as_posix()), lambda path: plain(path.name),
            lambda path: plain(path.relative_to(folder).with_suffix("").as_posix())]  # fmt: skip
    tables = []
    for key in keys:
        for case in (str, str.casefold):
            table = defaultdict(list)
            for path in images:
                table[case(key(path))].append(path)
            tables.append((case, table))

    def find(name, with_extension=False):
        for case, table in tables[:4] if with_extension else tables:
            found = table.get(case(plain(name)), ())
            if len(found) == 1:
                return found[0]
        return None

    return find
