"""Checkpoint files for tests: as Lightning and torch.save write them, innocent or not, and what loading has to say of them."""

import argparse
import collections
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from common import PIXELS
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.utilities.parsing import AttributeDict

from ldm.checkpoints import load_model


def as_lightning(state, **extra):
    """What Lightning's files hold next to the weights, class references and foreign objects included."""
    return {
        "epoch": 3, "global_step": 1000, "pytorch-lightning_version": "1.4.2", "state_dict": state,
        "callbacks": {ModelCheckpoint: {"monitor": "loss", "best_model_score": torch.tensor(0.1), "score": np.float64(0.1),
                                        "dirpath": Path("logs"), "history": np.ones(3)}},
        "optimizer_states": [torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))]).state_dict()],
        "lr_schedulers": [{"base_lrs": [1e-4], "lr_lambdas": [{}]}],
        "hyper_parameters": AttributeDict(lr=1e-4, config=OmegaConf.create({"a": [1, {"b": None}]})),
        "args": argparse.Namespace(seed=1), "counts": collections.defaultdict(list, {"a": [1]}), **extra,
    }  # fmt: skip


def refused(path, *words, error=ValueError, config=PIXELS, **kwargs):
    """Loading raises one sentence, in one line, with these words in it."""
    with pytest.raises(error) as caught:
        load_model(path, config, device="cpu", **kwargs)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert word in message, message


def assert_equal(loaded, model):
    ours, theirs = loaded.state_dict(), model.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


class Calls:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def archive(path, data):
    """A file as torch.save writes it, around any pickle."""
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("archive/data.pkl", data)
        z.writestr("archive/version", "3\n")
        z.writestr("archive/byteorder", "little")
