"""Command lines of words `key=value`: text stays text, whatever is in it, and a wrong key is told the right one."""

import copy
import csv
import dataclasses
import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf

NUMBER = re.compile(r"[-+]?(\d+|(\d+\.\d*|\.\d+|\d+(?=e))(e[-+]?\d+)?)", re.IGNORECASE)
CONSTANTS = {"": None, "null": None, "none": None, "true": True, "false": False}
FILES = ("begin", "folder", "init", "path", "root")  # keys of a config whose values are files or folders, named 2024 too


def suggestion(word: str, known: Iterable[str]) -> str:
    """ "did you mean ...?" where one of the known words is close, otherwise all of them."""
    known = list(known)
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"


def split_words(words: Iterable[str]) -> dict[str, str]:
    """{key: text} of words key=value. The text is all after the first "=". A key given twice has its last text. ValueError
    without "="."""
    texts = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not (equals and key):
            raise ValueError(f"{word}: give key=value, in quotes where the value has spaces")
        texts[key] = text
    return texts


# ---- a dataclass of settings


def option(default: Any, help: str, choices: Iterable[str] = (), least: int | None = None) -> Any:
    """A field of a dataclass that `read_options` fills. choices: the allowed texts; least: the smallest number."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": tuple(choices), "least": least})


def read_options(cls: type, words: Iterable[str]) -> Any:
    """An instance of a dataclass of `option`s from words key=value. str and Path fields take any text, ~ in a Path is the home
    folder; an empty text is None where a field may be None and is no str. ValueError names the key."""
    types, fields = get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for key, text in split_words(words).items():
        if key not in fields:
            raise ValueError(f"{key}: there is no such setting, {suggestion(key, fields)}")
        values[key] = _typed(key, text, get_args(types[key]) or (types[key],), fields[key].metadata)
    return cls(**values)


def _typed(key, text, types, metadata):
    """A text as the first of the types, or None."""
    if not text and type(None) in types and types[0] is not str:
        return None
    if metadata["choices"] and text not in metadata["choices"]:
        raise ValueError(f"{key} = {text}: {suggestion(text, metadata['choices'])}")
    if types[0] is Path:
        return Path(text).expanduser()
    kind, least = {int: "an integer", float: "a number"}.get(types[0]), metadata["least"]
    if kind is None:
        return text
    try:
        value = types[0](text)
    except ValueError:
        value = None
    if value is None or (least is not None and value < least):
        raise ValueError(f"{key} = {text}: give {kind}{'' if least is None else f' >= {least}'}")
    return value


def options_help(cls: type) -> str:
    """A line for each option of a dataclass: name, default, meaning."""
    lines = []
    for field in dataclasses.fields(cls):
        default = "" if field.default is None else str(field.default) or '""'
        lines.append(f"  {field.name:12} {default:16} {field.metadata['help']}")
    return "\n".join(lines)


# ---- a nested config


def override(config: dict, words: Iterable[str]) -> dict:
    """A copy of a nested config (dicts, lists, plain values) with the values of words such as trainer.max_steps=10.

    A text takes the place of a text as it is. Elsewhere it is a number, true, false or null where it looks so; [a, b] is a list and
    {a: 1} a dict (YAML); anything else is text. A list of texts may hold any text without a comma, or with one in quotes; a single
    value becomes a list of one. ValueError names the word.
    """
    config = copy.deepcopy(config)
    for key, text in split_words(words).items():
        *parents, last = key.split(".")
        node: Any = config
        for name in parents:
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}
            node = _child(node, name, key)
        old = node.get(last) if isinstance(node, dict) else _child(node, last, key)
        value = str(Path(text).expanduser()) if last in FILES else _like(text, old, key)
        node[last if isinstance(node, dict) else int(last)] = value
    return config


def _child(node, name, key):
    if isinstance(node, dict):
        return node[name]
    if isinstance(node, list) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    raise ValueError(f"{key}: there is nothing below {name} in the config")


def _like(text, old, key):
    """A text as a value of the kind of `old`."""
    if isinstance(old, str):
        return text
    if isinstance(old, list):
        inner = text[1:-1] if text[:1] == "[" and text[-1:] == "]" else None
        if inner is None or all(isinstance(value, str) for value in old):
            parts = [text] if inner is None else next(csv.reader([inner], skipinitialspace=True), [])
            example = old[0] if old else None
            return [_like(part.strip(), example, key) for part in parts]
    if text[:1] in ("[", "{"):
        try:
            return OmegaConf.to_container(OmegaConf.create(text))
        except Exception as error:  # of PyYAML or OmegaConf
            raise ValueError(f"{key} = {text}: no list or dict in YAML ({str(error).splitlines()[0]})") from None
    if text.lower() in CONSTANTS:
        return CONSTANTS[text.lower()]
    return (int if text.lstrip("+-").isdigit() else float)(text) if NUMBER.fullmatch(text) else text


def check_keys(node: Iterable[str], known: Iterable[str], where: str) -> None:
    """ValueError for a key that is not known, with the right one. where: what stands before it, "trainer." or "" at the top."""
    known = list(known)
    for key in node:
        if key not in known:
            raise ValueError(f"{where}{key}: there is no such key, {suggestion(key, known)}")
