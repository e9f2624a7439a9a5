"""What ldm.evaluate runs at one command: the rows of a preset, and of lists of values."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from omegaconf import OmegaConf

from ldm.commands import split_words
from ldm.util import ROOT

LISTS = ("task", "method", "budget", "runs", "guidance", "precision", "lr", "steps", "newton_steps")  # may be [a, b, ...]


def presets() -> list[str]:
    """The names of the tables in configs/evaluate."""
    return sorted(path.stem for path in (ROOT / "configs/evaluate").glob("*.yaml"))


def preset_words(preset: str, quick: bool = False) -> list[list[str]]:
    """The words key=value of each row of a preset, a name or a yaml file: its `common` settings, for each of its `tasks` with each
    of its `methods`, all of them mappings of settings. quick: each task with one of the methods in turn, on the shipped model that
    the preset names, with two images, one run and three diffusion steps. ValueError for other files."""
    path = ROOT / f"configs/evaluate/{preset}.yaml" if preset in presets() else Path(preset).expanduser()
    if not path.is_file():
        raise ValueError(f"preset = {preset}: there is no such file, and known are {', '.join(presets())}")
    config = OmegaConf.to_container(OmegaConf.load(path))
    if not isinstance(config, dict) or set(config) != {"common", "tasks", "methods", "quick"}:
        raise ValueError(f"preset = {preset}: give a yaml file with common, tasks, methods and quick")
    tasks, methods = config["tasks"], config["methods"]
    rows = [config["common"] | task | method for task in tasks for method in methods]
    if quick:
        small = {"model": config["quick"], "limit": 2, "budget": 20, "steps": 3, "runs": 1}
        rows = [config["common"] | task | methods[i % len(methods)] | small for i, task in enumerate(tasks)]
    return [[f"{key}={value}" for key, value in row.items()] for row in rows]


def sweep(words: Sequence[str]) -> list[tuple[list[str], tuple[str, ...]]]:
    """[(words, the keys with a list)] for every combination of the values in lists, lr=[.05,.1,.2] budget=[44,220]: words with
    single values. ValueError for an empty list."""
    texts = split_words(words)
    lists = {}
    for key, text in texts.items():
        if key in LISTS and text[:1] == "[" and text[-1:] == "]":
            lists[key] = [value.strip() for value in text[1:-1].split(",")]
            if not all(lists[key]):
                raise ValueError(f"{key} = {text}: give values with commas between them, {key}=[a,b]")
    rows = [texts | dict(zip(lists, values, strict=True)) for values in product(*lists.values())]
    return [([f"{key}={text}" for key, text in row.items()], tuple(lists)) for row in rows]
