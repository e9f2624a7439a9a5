"""Parameters of notebooks as people give them: in a cell, or as text on the command line.

    papermill inpaint.ipynb out.ipynb -p lr 0.1 -p seeds 7 -p prompts "a cat" -p mask "(8, 8, 16, 16)"

papermill passes numbers, True, False and None as Python values and everything else as text. The functions here take all forms of a
value and return one. `make_mask` (ldm/masks.py) reads rectangles as text by itself. All errors are ValueErrors.
"""

import ast
import re
from pathlib import Path
from typing import Any


def samples(
    prompts: Any = None, seeds: Any = None, count: int | None = None, default: int = 1, name: str = "prompts"
) -> tuple[list[str], list[int]]:
    """(prompts, seeds): a list of texts and a list of integers, one each per sample.

    prompts  a text, a list of texts, such a list as text ("['a cat', 'a dog']"), or None: no words
    seeds    an integer n (n, n + 1, n + 2 ...), a list of integers, such a list as text ("0, 1"), or None: 0, 1, 2 ...
    count    how many samples there are; None: as many as there are prompts or seeds in a list, whichever are more
    default  how many, where neither is a list of several
    name     what error messages call the prompts

    Fewer prompts than samples are repeated: of two for six samples, each is taken three times in a row. One seed counts on.
    """
    prompts, seeds = _texts(prompts, name), _seeds(seeds)
    if count is None:
        count = max(len(prompts), len(seeds)) if max(len(prompts), len(seeds)) > 1 else default
    if not prompts or count % len(prompts):
        raise ValueError(f"{name} has {len(prompts)} texts for {count} samples: give one for all, or one per sample")
    if len(seeds) <= 1:
        first = seeds[0] if seeds else 0
        seeds = list(range(first, first + count))
    if len(seeds) != count:
        raise ValueError(f"seeds has {len(seeds)} numbers for {count} samples: give the first one, or one per sample")
    return [prompt for prompt in prompts for _ in range(count // len(prompts))], seeds


def numbers(value: Any, name: str = "lr") -> Any:
    """A number, a tuple of numbers, or None: of these themselves, a list, or a text such as "0.1", "0.5, 0.1" or "(0.5, 0.1)"."""
    value = _literal(value)
    parts = value if isinstance(value, (list, tuple, range)) else [value]
    if value is None:
        return None
    if not parts or not all(isinstance(part, (int, float)) and not isinstance(part, bool) for part in parts):
        raise ValueError(f"{name} = {value!r}: give a number, or several such as (0.5, 0.1)")
    return tuple(parts) if parts is value else value


def several(value: Any, name: str) -> tuple:
    """A tuple of numbers, of what `numbers` takes: of one number, that one; of None, none."""
    value = numbers(value, name)
    return () if value is None else value if isinstance(value, tuple) else (value,)


def text(value: Any, name: str = "image") -> str | None:
    """A text or None: paths and names, of which papermill makes numbers (2024) where it can. ~ is the home folder."""
    if value is None or isinstance(value, str) and value.strip() in ("", "None"):
        return None
    if isinstance(value, (list, tuple, dict, set)):
        raise ValueError(f"{name} = {value!r}: give one text")
    value = str(value)
    return str(Path(value).expanduser()) if value.startswith("~") else value


def flag(value: Any, name: str = "flag") -> bool:
    """True or False, of these themselves or of text: "yes", "true", "on", "1" and their opposites in any case."""
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0", "none", ""):
        return False
    raise ValueError(f"{name} = {value!r}: give True or False")


def _literal(value):
    """The numbers of a text, or what a text means in Python; anything else as it is."""
    if not isinstance(value, str):
        return value
    plain = value.strip()
    number = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
    if re.fullmatch(rf"{number}(?:[\s,;]+{number})+[\s,;]*", plain):
        plain = "(" + ",".join(re.findall(number, plain)) + ")"
    try:
        return ast.literal_eval(plain)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return value


def _texts(value, name):
    if isinstance(value, str) and value.strip().startswith(("[", "(")):  # a list as text; a prompt may begin so too
        literal = _literal(value)
        if isinstance(literal, (list, tuple)) and all(isinstance(part, str) for part in literal):
            value = literal
    if value is None or isinstance(value, (str, int, float)):
        return ["" if value is None else str(value)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(part, (str, int, float)) for part in value):
        raise ValueError(f"{name} = {value!r}: give a text or a list of texts")
    return [str(part) for part in value]


def _seeds(value):
    given, value = value, _literal(value)
    value = [] if value is None else list(value) if isinstance(value, (list, tuple, range)) else [value]
    if not all(isinstance(seed, (int, float)) and not isinstance(seed, bool) and float(seed).is_integer() for seed in value):
        raise ValueError(f"seeds = {given!r}: give an integer, or a list of integers")
    return [int(seed) for seed in value]
