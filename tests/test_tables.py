"""Every table of the README, the pages and the cards says what the committed results say."""

import re

import pytest
import rows
import tables

from ldm.util import ROOT


@pytest.mark.parametrize("name", tables.FILES)
def test_tables_are_those_of_the_results(name):
    text = (ROOT / name).read_text()
    assert tables.filled(text) == text, "python benchmarks/tables.py writes them anew"
    assert text.count("<!-- ") == 2 * len(re.findall(r"<!-- ([\w -]+) -->\n\|.*?\n<!-- /\1 -->", text, re.DOTALL))


def test_a_changed_figure_is_found():
    text = (ROOT / "checkpoints/mnist/README.md").read_text()
    block = re.search(r"<!-- digits -->.*<!-- /digits -->", text, re.DOTALL)[0]
    changed = text.replace(block, re.sub(r"\d", "7", block))
    assert changed != text and tables.filled(changed) == text
    with pytest.raises(KeyError, match="nonsense"):
        tables.filled("<!-- nonsense -->\n| a |\n<!-- /nonsense -->")


@pytest.mark.parametrize("name", tables.TABLES)
def test_every_table_can_be_made(name):
    """Also those that no page has yet; all rows have as many cells as the head."""
    made = tables.TABLES[name]()
    cells = {len(re.findall(r"(?<!\\)\|", line)) for line in made}
    assert len(made) > 2 and len(cells) == 1 and cells.pop() > 2


def test_figures_are_written_short():
    assert [rows.short(v) for v in (0.1234, "-0.5", 12.3456, None, "nan")] == [".123", "-.500", "12.346", "", ""]
    assert rows.signed(-0.0004) == "-.000" and tables.signed("0.1") == "+.100"
    assert rows.lines(["a", "b"], [["x", ""], ["y", ""]]) == ["| a |", "| --- |", "| x |", "| y |"]
