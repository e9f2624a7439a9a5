"""Parameters of notebooks mean what a person means, however they are written."""

import papermill.cli
import pytest
import torch

from ldm.masks import make_mask
from ldm.parameters import flag, numbers, samples, several, text


def passed(value):
    """What papermill makes of `-p name value`."""
    return papermill.cli._resolve_type(value)


def test_several():
    assert several(None, "times") == () and several(passed("700"), "times") == (700,)
    assert several("900, 300", "times") == several([900, 300], "times") == (900, 300)


@pytest.mark.parametrize("given, meant", [
    ("0.1", 0.1), ("1e-3", 1e-3), ("1", 1), ("(0.5, 0.1)", (0.5, 0.1)), ("[0.5,0.1]", (0.5, 0.1)), ("0.5, 0.1", (0.5, 0.1)),
    ("0.5 .1", (0.5, 0.1)), ("0.5, 0.4, 0.3,", (0.5, 0.4, 0.3)), ("-1 1e2", (-1, 100)), ("None", None),
])  # fmt: skip
def test_numbers(given, meant):
    assert numbers(passed(given)) == numbers(given) == numbers(meant) == meant
    assert numbers(list(meant)) == meant if isinstance(meant, tuple) else True


@pytest.mark.parametrize("given", ["fast", "0.5 to 0.1", "", [], ["a"], True, "[True, 1]", {"a": 1}, "(0.5, None)"])
def test_what_are_no_numbers(given):
    with pytest.raises(ValueError, match="^lr = .*: give a number, or several such as"):
        numbers(given)


@pytest.mark.parametrize("prompts, seeds, count, meant", [
    (None, None, None, ([""], [0])), ("a cat", None, 3, (["a cat"] * 3, [0, 1, 2])), ("a cat", 7, None, (["a cat"], [7])),
    ("a cat", "7", 3, (["a cat"] * 3, [7, 8, 9])), (["a", "b", "c"], 7, None, (["a", "b", "c"], [7, 8, 9])),
    (["a", "b", "c"], [7], None, (["a", "b", "c"], [7, 8, 9])), ("['a', 'b']", "0, 5", None, (["a", "b"], [0, 5])),
    ("a, b, c", [1, 2], None, (["a, b, c"] * 2, [1, 2])), (2024, "[3, 1]", None, (["2024"] * 2, [3, 1])),
    (["a", "b"], None, 6, (["a"] * 3 + ["b"] * 3, [0, 1, 2, 3, 4, 5])),
    ("(a cat:1.2) in a hat", 0, 1, (["(a cat:1.2) in a hat"], [0])),
    ("[a cat]", range(2), None, (["[a cat]"] * 2, [0, 1])), ("it's", 2.0, None, (["it's"], [2])), ("", None, 2, (["", ""], [0, 1])),
])  # fmt: skip
def test_samples(prompts, seeds, count, meant):
    assert samples(prompts, seeds, count) == meant
    given = [passed(value) if isinstance(value, str) else value for value in (prompts, seeds)]
    assert samples(*given, count) == meant


def test_the_default_number_of_samples():
    assert samples("a cat", 7, default=4) == (["a cat"] * 4, [7, 8, 9, 10])
    assert samples(["a", "b"], None, default=4) == (["a", "b"], [0, 1])


@pytest.mark.parametrize("prompts, seeds, count, message", [
    (["a", "b", "c"], None, 4, "prompts has 3 texts for 4 samples: give one for all, or one per sample"),
    ("a", [1, 2], 4, "seeds has 2 numbers for 4 samples: give the first one, or one per sample"),
    ([], None, 4, "prompts has 0 texts"), ({"a": 1}, None, None, "prompts = {'a': 1}: give a text or a list of texts"),
    ([None], None, None, "give a text or a list"), ("a", "seven", None, "seeds = 'seven': give an integer, or a list of integers"),
    ("a", 0.5, None, "seeds = 0.5"), ("a", True, None, "seeds = True"), ("a", "0, b", None, "seeds = '0, b'"),
    ("a", float("nan"), None, "seeds = nan"), ("a", float("inf"), None, "seeds = inf"),
])  # fmt: skip
def test_samples_that_do_not_fit(prompts, seeds, count, message):
    with pytest.raises(ValueError, match=message):
        samples(prompts, seeds, count)


def test_texts_flags_and_rectangles(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [text(passed(x)) for x in ("2024", "a.png", "None", "", "~/a.png", "1.5")] == [
        "2024", "a.png", None, None, "/home/me/a.png", "1.5"]  # fmt: skip
    assert [flag(passed(x)) for x in ("True", "false", "Yes", "0", "None", "on")] == [True, False, True, False, False, True]
    with pytest.raises(ValueError, match="sliders = 'maybe': give True or False"):
        flag("maybe", "sliders")
    with pytest.raises(ValueError, match="image = \\['a'\\]: give one text"):
        text(["a"])
    assert torch.equal(make_mask(passed("(8, 8, 16, 16)"), (32, 32)), make_mask((8, 8, 16, 16), (32, 32)))
