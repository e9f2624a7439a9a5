"""The package: what can be imported from it, what it requires, what a wheel of it holds, and other packages of its name."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from types import FunctionType

import pytest
from common import ROOT
from hatchling.builders.wheel import WheelBuilder

import ldm
from ldm.checkpoints import SHIPPED

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Modules that need an extra; all others run on the dependencies alone.
EXTRAS = {
    "examples": "notebooks",
    "painting": "notebooks",
    "physics": "compare",
    "problems": "compare",
    "train": "train",
    "training": "train",
    "iconify": "train",
    "show": "notebooks",
    "evaluate": "compare",
    "comparison": "compare",
    "diffusers_autoencoders": "diffusers",
    "diffusers_models": "diffusers",
    "diffusers_pipeline": "diffusers",
    "diffusers_schedules": "diffusers",
    "diffusers_text_to_image": "diffusers",
    "export_diffusers": "diffusers",
    "newton_pipeline": "diffusers",
}
# Where an import has another name than its distribution, or comes with another one.
DISTRIBUTIONS = {
    "skimage": "scikit-image",
    "PIL": "pillow",
    "open_clip": "open-clip-torch",
    "huggingface_hub": "transformers",
    "typing_extensions": "torch",
}


def python(code, *path, cwd=None):
    """What a new interpreter prints for `code` with these folders first on its path; its error where it fails."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_importing_the_package_imports_no_library(tmp_path):
    code = "import sys; before = set(sys.modules); import ldm; print(ldm.__version__, *sorted(set(sys.modules) - before))"
    version, *imported = python(code, ROOT, cwd=tmp_path).split()
    assert version == ldm.__version__
    assert {name.partition(".")[0] for name in imported} <= {"ldm"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ldm.EXPORTS)
def test_every_export_is_the_documented_object_of_its_module(name):
    value = getattr(ldm, name)
    assert value is vars(importlib.import_module(f"ldm.{ldm.EXPORTS[name]}"))[name]
    assert value.__doc__ and value.__module__.startswith("ldm.") and name in dir(ldm)


def test_type_checkers_see_the_same_exports():
    tree = ast.parse((ROOT / "ldm/__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module.removeprefix("ldm.") for node in block.body for alias in node.names}
    assert seen == ldm.EXPORTS


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'ldm' has no attribute 'load_modle'"):
        ldm.load_modle  # noqa: B018


def test_a_function_wins_over_the_module_of_its_name():
    module = importlib.import_module("ldm.newton_sampler")
    ldm.newton_sampler = module  # as Python's import does
    assert isinstance(ldm.newton_sampler, FunctionType) and ldm.newton_sampler is module.newton_sampler


def test_a_missing_extra_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.delitem(sys.modules, "ldm.diffusers_models", raising=False)
    monkeypatch.delitem(vars(ldm), "from_diffusers", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"ldm.from_diffusers needs diffusers, .*`pip install '.\[all\]'`"):
        ldm.from_diffusers  # noqa: B018


def canonical(name):
    """A distribution's name as all its spellings are compared."""
    return name.lower().replace("_", "-")


def requirements(extra=None):
    """Names of the distributions that the package, or one of its extras, requires."""
    stated = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names = {canonical(re.match(r"[\w.-]+", line)[0]) for line in stated}
    others = [name for line in stated if line.startswith("ldm[") for name in line[4:-1].split(",")]
    return (names - {"ldm"}).union(*map(requirements, others))


@pytest.mark.parametrize("path", sorted((ROOT / "ldm").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_is_required(path):
    """Of the dependencies, or of the extra that the module is for."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    foreign = {DISTRIBUTIONS.get(name, canonical(name)) for name in imported - set(sys.stdlib_module_names) - {"ldm"}}
    extra = EXTRAS.get(path.stem)
    assert foreign <= requirements() | (requirements(extra) if extra else set())


def test_imports_go_one_way():
    """No circle among the modules, lazy imports included."""
    imported = {}
    for path in (ROOT / "ldm").rglob("*.py"):
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        imported[name] = {node.module for node in nodes if node.module.startswith("ldm.")}
        imported[name] |= {f"ldm.{alias.name}" for node in nodes if node.module == "ldm" for alias in node.names}
    del imported["ldm.__init__"]  # which names all that people use
    TopologicalSorter(imported).prepare()


def test_no_test_file_imports_another():
    """What several of them use is in tests/common.py and other modules for it."""
    for path in (ROOT / "tests").glob("*.py"):
        assert not re.search(r"^(from|import) test_", path.read_text(), re.MULTILINE), path.name


def test_every_requirement_is_pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonical(line.partition("==")[0]) for line in lines if "==" in line}
    assert requirements() | requirements("all") == pinned


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder as `pip install .` fills it: the files of the wheel, here copies of the code and links to the rest."""
    folder = tmp_path_factory.mktemp("site-packages")
    for file in WheelBuilder(str(ROOT)).recurse_included_files():
        target = folder / file.distribution_path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".py":
            shutil.copy(ROOT / file.path, target)
        else:
            target.symlink_to(ROOT / file.path)
    return folder


def test_a_wheel_holds_the_shipped_models_and_their_configs(installed):
    for config, weights in SHIPPED.values():
        assert (installed / "ldm/shipped" / config).is_file() and (installed / "ldm/shipped" / weights).is_file()
    assert not list((installed / "ldm/shipped/checkpoints").glob("*/next"))
    assert (installed / "ldm/py.typed").is_file() and not (installed / "tests").exists()


def test_an_installed_wheel_finds_them(installed, tmp_path):
    code = """
import ldm
from ldm.data.mnist import sample_digits
from ldm.util import ROOT
print(ldm.__file__, ROOT, ldm.load_model("mnist", device="cpu").image_size, len(sample_digits()[0]))"""
    assert python(code, installed, cwd=tmp_path) == f"{installed}/ldm/__init__.py {installed}/ldm/shipped 32 100"


def test_another_ldm_without_init_does_not_shadow_this_one(tmp_path):
    """Of Stable Diffusion's original repository, for example."""
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/util.py").write_text("raise SystemExit('the other one')")
    assert python("import ldm; print(ldm.__file__)", tmp_path, ROOT, cwd=tmp_path) == f"{ROOT}/ldm/__init__.py"


def test_another_ldm_with_init_is_named_in_the_error(tmp_path):
    (tmp_path / "ldm").mkdir()
    (tmp_path / "ldm/__init__.py").touch()
    error = python("from ldm import load_model", tmp_path, ROOT, cwd=tmp_path)
    assert error == f"ImportError: cannot import name 'load_model' from 'ldm' ({tmp_path}/ldm/__init__.py)"


def test_make_does_not_look_into_pythonpath(tmp_path):
    command = ["make", "--no-print-directory", "--eval", "shown:; @echo [$$PYTHONPATH]", "shown"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.stdout.strip() == "[]"


def test_changelog_and_citation_are_of_this_version():
    assert re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == ldm.__version__
    assert f"\nversion: {ldm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
