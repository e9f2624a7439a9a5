"""Words key=value on the command line of training: text stays text, numbers are numbers, wrong keys are told the right one."""

from pathlib import Path

import pytest
from common import ROOT
from omegaconf import OmegaConf

from ldm import train
from ldm.commands import override
from ldm.util import instantiate_from_config, load_config

CONFIG = {"data": {"folder": None, "params": {"root": "data"}}, "init": None, "batch_size": 32,
          "training": {"target": "ldm.training.Any", "params": {"lr": 0.001, "prompts": ["a cat", "a dog"], "drop": 0.1}},
          "trainer": {"max_steps": 10, "devices": 1, "betas": [0.9, 0.99], "fast": False}}  # fmt: skip


@pytest.mark.parametrize("word, value", [
    ("trainer.max_steps=20", 20), ("training.params.lr=1e-4", 1e-4), ("training.params.lr=.5", 0.5), ("trainer.fast=true", True),
    ("trainer.devices=auto", "auto"), ("trainer.max_time=00:01:00:00", "00:01:00:00"), ("trainer.precision=16-mixed", "16-mixed"),
    ("trainer.betas=[0.5, 0.9]", [0.5, 0.9]), ("trainer.betas.1=0.5", 0.5), ("trainer.limit=null", None), ("trainer.limit=-3", -3),
    ("trainer.x={a: 1}", {"a": 1}), ("training.target=007", "007"),
    ("data.folder=2024", "2024"), ("data.folder=~/images", str(Path.home() / "images")), ("data.folder=a #1: b", "a #1: b"),
    ("init=1e5", "1e5"), ("data.params.root=null", "null"),
    ("training.params.prompts=a lake #1", ["a lake #1"]),
    ("training.params.prompts=[photo: a lake, a lake #1]", ["photo: a lake", "a lake #1"]),
    ('training.params.prompts=["one, two", 3]', ["one, two", "3"]), ("training.params.prompts=", [""]),
])  # fmt: skip
def test_values(word, value):
    node = override(CONFIG, [word])
    for name in word.partition("=")[0].split("."):
        node = node[int(name)] if isinstance(node, list) else node[name]
    assert node == value and type(node) is type(value)
    assert CONFIG["trainer"]["max_steps"] == 10 and CONFIG["trainer"]["betas"] == [0.9, 0.99]


@pytest.mark.parametrize("word, message", [
    ("trainer.max_stesp=3", "trainer.max_stesp: there is no such key, did you mean max_steps?"),
    ("batchsize=3", "batchsize: there is no such key, did you mean batch_size?"), ("init.path.x=3", "nothing below"),
    ("trainer.max_steps", "trainer.max_steps: give key=value"), ("data.foldr=a", "did you mean folder?"),
    ("training.params.betas=[0.5, 0.9", "no list or dict"), ("training.param.lr=1", "did you mean params?"),
])  # fmt: skip
def test_wrong_words_are_one_sentence(word, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(
        "model: {target: a}\ninit: a\ndata: {target: a}\ntrainer: {}\ntraining: {target: a, params: {betas: [0.9]}}\n"
    )
    with pytest.raises(SystemExit):
        train.main(["--config", "a.yaml", word])
    error = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in error and message in error


def test_a_wrong_argument_of_a_task_names_the_right_one():
    config = {"target": "ldm.training.DiffusionTraining", "params": {"weigth_cap": 5}}
    with pytest.raises(ValueError, match="ldm.training.DiffusionTraining has no argument weigth_cap: did you mean weight_cap?"):
        instantiate_from_config(config, model=None)
    with pytest.raises(ValueError, match="did you mean warmup?"):  # an argument of the class that it derives from
        instantiate_from_config(config | {"params": {"warm_up": 5}}, model=None)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_key_of_the_shipped_configs_is_known(path):
    config = OmegaConf.to_container(load_config(path))
    if "training" in config:
        train.check_config(config)
