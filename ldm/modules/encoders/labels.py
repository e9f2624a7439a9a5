"""Class labels as a condition: the counterpart of prompts."""

from numbers import Integral

import torch


def class_labels(labels, n_classes, empty=None):
    """Labels as people give them -> int64 [B], on the CPU.

    labels     an integer or a list of B of them, 0 .. n_classes - 1; or a tensor [B] of integers. Strings of digits count as
               integers, as a command line gives them; "" and None mean no class
    empty      the label that stands for no class; None: this model has none, and "" is refused

    Raises ValueError for anything else.
    """
    given = labels.tolist() if isinstance(labels, torch.Tensor) else "" if labels is None else labels
    given = list(given) if isinstance(given, (list, tuple, range)) else [given]
    if "" in given and empty is None:
        raise ValueError("this model has no label for no class: give a label for each sample, and guidance = 1")
    wanted = [empty if label == "" else _integer(label) for label in given]
    if not wanted or not all(label is not None and 0 <= label < n_classes for label in wanted):
        raise ValueError(f"labels = {labels!r}: give integers from 0 to {n_classes - 1}, one for all samples or one for each")
    return torch.tensor(wanted, dtype=torch.int64)


def _integer(label):
    """The integer that a label means, or None."""
    if isinstance(label, str):
        return int(label) if label.strip().isdecimal() else None
    return int(label) if isinstance(label, Integral) and not isinstance(label, bool) else None
