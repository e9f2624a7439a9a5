"""Training folders as people bring them: every caption that can be read is read, and everything else is named and counted."""

import codecs
import unicodedata
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data.captioned import CaptionedFolder
from ldm.data.captions import find_captions, read_text

NFC, NFD = (unicodedata.normalize(form, "Kätzchen é") for form in ("NFC", "NFD"))


def fill(folder, files):
    """Write files: {name: text, bytes, or None for an image}."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8), "red").save(path, {".jfif": "JPEG"}.get(path.suffix.lower()))
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def found(folder):
    captions, left_out = find_captions(folder)
    return {path.relative_to(folder).as_posix(): caption for path, caption in captions.items()}, left_out


TABLE = "a.png{0}a cat, sitting{1}b.png{0}two dogs; one red{1}"
MARKED = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CAPTIONS = {"a.png": "a cat, sitting", "b.png": "two dogs; one red"}
FOLDERS = {  # {name: (files, captions)}; of each a.png and b.png are images
    "text files": ({"a.txt": "a cat, sitting\n", "b.txt": "  two dogs; one red"}, CAPTIONS),
    "lines and spaces": ({"a.txt": "a cat,\r\n  sitting", "b.txt": "two\tdogs; one\nred\n\n"}, CAPTIONS),
    "UTF-8 with a mark": ({"a.txt": codecs.BOM_UTF8 + "schön".encode(), "b.txt": "x"}, {"a.png": "schön", "b.png": "x"}),
    "UTF-16": ({"a.txt": "schöne Katze".encode("utf-16"), "b.txt": codecs.BOM_UTF16_BE + "ä".encode("utf-16-be")},
               {"a.png": "schöne Katze", "b.png": "ä"}),
    "UTF-32": ({"a.txt": "猫".encode("utf-32"), "b.txt": "x"}, {"a.png": "猫", "b.png": "x"}),
    "decomposed": ({"a.txt": NFD, "b.txt": NFC}, {"a.png": NFC, "b.png": NFC}),
    "empty captions": ({"a.txt": "", "b.txt": " \n"}, {"a.png": "", "b.png": ""}),
    "upper case": ({"a.TXT": "a", "B.Txt": "b"}, {"a.png": "a", "b.png": "b"}),
    "other names": ({"a.png.txt": "a", "b.caption": "b"}, {"a.png": "a", "b.png": "b"}),
    "comma": ({"captions.csv": TABLE.format(",", "\n")}, CAPTIONS), "tab": ({"captions.tsv": TABLE.format("\t", "\n")}, CAPTIONS),
    "semicolon": ({"captions.csv": TABLE.format(";", "\n")}, CAPTIONS),
    "spaces": ({"captions.csv": TABLE.format(" ; ", "\n")}, CAPTIONS),
    "Windows": ({"captions.csv": TABLE.format(",", "\r\n")}, CAPTIONS),
    "old Macs": ({"captions.csv": TABLE.format(" , ", "\r")}, CAPTIONS),
    "a table in UTF-16": ({"captions.csv": TABLE.format(",", "\n").encode("utf-16")}, CAPTIONS),
    "a table with a mark": ({"captions.csv": codecs.BOM_UTF8 + TABLE.format(",", "\n").encode()}, CAPTIONS),
    "quoted": ({"captions.csv": '"a.png","a cat, sitting"\n"b.png" , "two dogs; one red" \n'}, CAPTIONS),
    "quotes within": ({"captions.csv": 'a.png,a "big" cat\nb.png,"a ""big"" dog"'},
                      {"a.png": 'a "big" cat', "b.png": 'a "big" dog'}),
    "quotes at the start": ({"captions.csv": 'a.png,"big" cat\nb.png,"odd\n'}, {"a.png": '"big" cat', "b.png": '"odd'}),
    "an open quote before a line": ({"captions.csv": 'a.png,"odd\nb.png,"fine, too"\n'}, {"a.png": '"odd', "b.png": "fine, too"}),
    "several lines": ({"captions.csv": 'a.png,"a cat,\n\nsitting"\nb.png,dog'}, {"a.png": "a cat, sitting", "b.png": "dog"}),
    "a header": ({"metadata.csv": "file_name,text\na.png,cat\nb.png,dog"}, {"a.png": "cat", "b.png": "dog"}),
    "no extensions": ({"captions.csv": "a,cat\nB,dog"}, {"a.png": "cat", "b.png": "dog"}),
    "folders in names": ({"captions.csv": "./a.png,cat\n.\\b.png,dog"}, {"a.png": "cat", "b.png": "dog"}),
    "empty ones in a table": ({"captions.csv": "a.png,\nb.png;"}, {"a.png": "", "b.png": ""}),
    "upper case in a table": ({"Captions.CSV": "A.PNG,cat\nb.Png,dog"}, {"a.png": "cat", "b.png": "dog"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_kind_of_caption_is_read(kind, tmp_path):
    files, captions = FOLDERS[kind]
    assert found(fill(tmp_path, {"a.png": None, "b.png": None, **files})) == (captions, [])


def test_names_in_every_normal_form(tmp_path):
    fill(tmp_path / "texts", {f"{NFD}.png": None, f"{NFC}.txt": "a", f"{NFC} 2.png": None, f"{NFD} 2.txt": "b"})
    assert sorted(found(tmp_path / "texts")[0].values()) == ["a", "b"]
    fill(tmp_path / "table", {f"{NFD}.png": None, f"{NFC} 2.png": None, "captions.csv": f"{NFC}.png,a\n{NFD} 2.png,b"})
    assert sorted(found(tmp_path / "table")[0].values()) == ["a", "b"] and not found(tmp_path / "table")[1]


def test_names_with_separators(tmp_path):
    fill(tmp_path, {"a.png": None, "a,b.png": None, "c; d.png": None, "captions.csv": 'a.png,1\na,b.png,2, too\n"c; d.png",3'})
    assert found(tmp_path) == ({"a.png": "1", "a,b.png": "2, too", "c; d.png": "3"}, [])


def test_extensions_and_subfolders(tmp_path):
    names = ["a.JPG", "b.jfif", "c.gif", "d.TIF", "e.tiff", "f.avif", "g.Jpeg", "h.bmp", "i.webp", "deep/er/j.PNG"]
    texts = {f"{name.rpartition('.')[0]}.TXT": name[-5:] for name in names}
    fill(tmp_path, {**dict.fromkeys(names), **texts})
    assert found(tmp_path)[0] == {name: name[-5:] for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = [CaptionedFolder(tmp_path, 8, train) for train in (True, False)]
    assert sum(map(len, data)) == 10 and data[0][0][0].shape == (3, 8, 8)
    fill(tmp_path, {"deep/er/captions.csv": "j.png,own"})
    assert found(tmp_path)[0]["deep/er/j.PNG"] == "own"
    fill(tmp_path, {"captions.csv": "a.jpg,A\ndeep\\er\\j.PNG,not this\nb.jfif,B"})
    assert found(tmp_path)[0] == {"a.JPG": "A", "b.jfif": "B", "deep/er/j.PNG": "own"}


def test_a_link_to_a_folder_above_ends(tmp_path):
    fill(tmp_path, {"a.png": None, "a.txt": "a", "sub/b.png": None, "sub/b.txt": "b"})
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    assert found(tmp_path)[0] == {"a.png": "a", "sub/b.png": "b"}


LEFT_OUT = {  # {name: (files, what is named and why)}
    "no text": ({"c.png": None}, ("c.png", "no caption, there is no c.txt")),
    "cp1252": ({"c.png": None, "c.txt": "schön".encode("cp1252")},
               ("c.png", "c.txt is not UTF-8 text from byte 3 on: save it as UTF-8")),
    "UTF-16 without a mark": ({"c.png": None, "c.txt": "cat".encode("utf-16-le")}, ("c.png", "c.txt holds zero bytes")),
    "half of UTF-16": ({"c.png": None, "c.txt": "cat".encode("utf-16")[:-1]}, ("c.png", "c.txt is not UTF-16 text")),
    "damaged": ({"c.png": b"\x89PNG\r\n", "c.txt": "c"}, ("c.png", "not a readable image")),
    "another kind": ({"c.HEIC": b"x", "c.txt": "c"}, ("c.HEIC", "images are .png, .jpg, ")),
    "hidden": ({"._a.png": b"x", "._a.txt": "c"}, ("._a.png", "hidden file")),
    "hidden folder": ({".ipynb_checkpoints/c.png": None}, (".ipynb_checkpoints", "hidden folder")),
}  # fmt: skip


@pytest.mark.parametrize("kind", LEFT_OUT)
def test_what_cannot_be_read_is_named_and_counted(kind, tmp_path):
    files, (name, reason) = LEFT_OUT[kind]
    fill(tmp_path, {"a.png": None, "b.png": None, "a.txt": "a", "b.txt": "b", **files})
    with pytest.warns(UserWarning) as caught:
        data = [CaptionedFolder(tmp_path, 8, train) for train in (True, False)]
    assert [each.captions for each in data] == [["a"], ["b"]]
    messages = [str(warning.message) for warning in caught]
    assert any(message.startswith(f"{tmp_path / name} is left out: {reason}") for message in messages)
    assert any("has 2 usable images with captions; left out are " in message for message in messages)


@pytest.mark.parametrize("lines, reason", [
    (b"c.png,c", "line 2: there is no image 'c.png'"), (b"b.png", "line 2: no separator"),
    (b"a.png,again", "line 2: a.png has a caption"),
    ("b.png,schön".encode("cp1252"), "line 2: it is not UTF-8 text: save the table as UTF-8"),
])  # fmt: skip
def test_lines_of_a_table_that_are_not_used_are_named(lines, reason, tmp_path):
    fill(tmp_path, {"a.png": None, "b.png": None, "captions.csv": b"a.png,a\n" + lines})
    captions, left_out = found(tmp_path)
    assert captions == {"a.png": "a"}
    assert any(path.name == "captions.csv" and why.startswith(reason) for path, _, why in left_out)
    assert any(path.name == "b.png" and why == "no caption, captions.csv has no line for it" for path, _, why in left_out)


def test_nothing_usable_says_why(tmp_path):
    fill(tmp_path, {"a.heic": b"", "b.heic": b"", "c.png": None, "d.png": b"", "d.txt": "d", "e.png": None, "e.txt": "e"})
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=(
        r"has 1 usable images with captions; left out are 2 of another kind \(.heic\), 1 without caption, 1 unreadable: at least"
    )):  # fmt: skip
        CaptionedFolder(tmp_path, 8)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    st.lists(st.binary(max_size=60) | st.text(max_size=30).map(str.encode), max_size=4),
    st.sampled_from([b"", *MARKED, b"a.png"]),
)
@example([b'a.png,"'], b"")
def test_any_table_and_text_is_read_or_named(tmp_path_factory, parts, start):
    """Random bytes between lines that are right: these are found, and nothing raises but the one ValueError."""
    folder = fill(tmp_path_factory.mktemp("fuzz"), {"a.png": None, "b.png": None})
    data = start + b"\n".join(parts)
    fill(folder, {"captions.csv": data + b"\nb.png,a cat, sitting\n"})
    captions, left_out = found(folder)
    assert captions.keys() <= {"a.png", "b.png"} and all(isinstance(reason, str) for *_, reason in left_out)
    if not data.startswith(MARKED) and b"b.png" not in data and b"\0" not in data:
        assert captions.get("b.png") == "a cat, sitting"
    try:
        assert "\0" not in read_text(fill(folder, {"x.txt": data}) / "x.txt")
    except ValueError as error:
        assert str(error).startswith("x.txt ")
