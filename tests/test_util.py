import stat

import pytest
import torch
from safetensors.torch import save_file

from ldm.util import atomic_write


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new folder" / "table.csv"
    with atomic_write(path) as temporary:
        temporary.write_text("old")
        assert temporary.parent == path.parent and temporary.suffix == ".csv" and not path.exists()
    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error
        assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with atomic_write(tmp_path / "x.safetensors") as temporary:
        save_file({"x": torch.zeros(1)}, temporary)  # which makes it readable to its owner only
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1
