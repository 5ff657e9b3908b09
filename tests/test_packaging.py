"""Hugging Face's `kernels` package and our `kernels/` folder live side by side; the wheel holds our packages alone."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distributions, requires
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = ("triton", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib")
SOURCES = {
    "popsd": ROOT / "popsd",
    "popsd_kernels": ROOT / "kernels" / "popsd_kernels",
    "popsd_integrations": ROOT / "integrations" / "popsd_integrations",
    "popsd_benchmarks": ROOT / "benchmarks" / "popsd_benchmarks",
}
EXAMPLES = {"popsd_integrations/examples": ROOT / "examples"}

# What transformers and TRL do with it: find it, read its version, import names from it, call them as decorators.
STUB = """
IS_STUB = True
class _Anything:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, *args, **kwargs): return args[0] if args else self
    def __getattr__(self, name): return _Anything()
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: _Anything()
"""
IMPORT_BOTH = """
import importlib.metadata, importlib.util
present = any(found.name == "kernels" for found in importlib.metadata.distributions())
import transformers.modeling_utils
from transformers.utils.import_utils import is_kernels_available
from trl import DistillationTrainer
import popsd, popsd_kernels
spec = importlib.util.find_spec("kernels")
if present:
    import kernels
    assert kernels.IS_STUB and is_kernels_available(), spec
else:
    assert spec is None or spec.origin is None, f"a regular package: {spec}"
    assert not is_kernels_available()
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """A folder with a stand-in for Hugging Face's `kernels`, of a version that the installed transformers accepts."""
    pytest.importorskip("trl")
    wanted = next(line for line in requires("transformers") or [] if line.startswith("kernels"))
    version = wanted.split(">=")[1].split(",")[0].split(";")[0].strip()
    folder = tmp_path_factory.mktemp("stub")
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STUB + f"__version__ = '{version}'\n")
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


@pytest.fixture(params=[pytest.param("absent", marks=pytest.mark.slow), "present"])
def kernels(request, stub):
    """What to put on the path so that Hugging Face's `kernels` is absent or present: nothing, or the stand-in."""
    if request.param == "absent" and any(found.name == "kernels" for found in distributions()):
        pytest.skip("Hugging Face's kernels is installed")
    return [stub] if request.param == "present" else []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, for a build writes into its source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    results = {str(ROOT): {"runs"}}  # of experiments; a package has that name too
    shutil.copytree(ROOT, folder / "source", ignore=lambda at, names: skip(at, names) | results.get(str(at), set()))
    command = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, folder / "source"]
    run([sys.executable, "-m", "pip", *command], cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed_wheel(wheel, tmp_path_factory):
    """As pip would: our packages are pure, and such a wheel is an archive of what goes to site-packages."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run(command, cwd, path=()):
    env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    env |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_transformers_and_trl_import_from_the_repository_root(kernels):
    run([sys.executable, "-c", IMPORT_BOTH], ROOT, kernels)


@pytest.mark.slow
def test_transformers_and_trl_import_under_pytest(kernels, tmp_path):
    body = "".join(f"    {line}\n" for line in IMPORT_BOTH.splitlines())
    (tmp_path / "test_both.py").write_text(f"def test_both():\n{body}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", ROOT / "pyproject.toml"]
    run([*command, "--rootdir", ROOT, tmp_path / "test_both.py"], ROOT, kernels)


@pytest.mark.slow
def test_transformers_and_trl_import_beside_the_wheel(kernels, installed_wheel, tmp_path):
    run([sys.executable, "-c", IMPORT_BOTH], tmp_path, [installed_wheel, *kernels])


@pytest.mark.slow
def test_a_regular_package_there_would_hide_theirs(stub, tmp_path):
    """The checks above bite: with an `__init__.py` in our folder the same imports fail."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").touch()
    with pytest.raises(AssertionError, match="kernels"):
        run([sys.executable, "-c", IMPORT_BOTH], tmp_path, [stub])


def test_wheel_holds_our_packages_alone(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    written = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in (SOURCES | EXAMPLES).items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == written
    assert {"popsd/py.typed", "popsd_kernels/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == SOURCES.keys()


def test_wheel_imports(installed_wheel, tmp_path):
    found = f"import {', '.join(SOURCES)}; print({', '.join(f'{package}.__file__' for package in SOURCES)})"
    for file in run([sys.executable, "-c", found], tmp_path, [installed_wheel]).split():
        assert Path(file).is_relative_to(installed_wheel)


def test_the_command_runs_from_the_wheel(installed_wheel, tmp_path):
    """Every sub-command that a wheel of popsd alone can answer for: `bench` is in it, not in the repository only."""
    for arguments in (["--help"], ["bench", "--help"]):
        out = run([sys.executable, "-m", "popsd_integrations.cli", *arguments], tmp_path, [installed_wheel])
        assert "usage: popsd" in out
    command = [sys.executable, "-m", "popsd_integrations.cli", "examples"]
    assert "qwen3_lora.yaml " in run(command, tmp_path, [installed_wheel])
    run([*command, "loops", "--output_dir", "mine"], tmp_path, [installed_wheel])
    for path in (ROOT / "examples/loops").glob("*.py"):
        assert (tmp_path / "mine/loops" / path.name).read_text() == path.read_text()


BLOCKED_RUN = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import transformers
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the blocker does not block")

import torch, popsd
assert "torch._dynamo" not in sys.modules, "importing popsd loads torch's compiler, a second or two"
streams = [torch.randn(5, 8, requires_grad=i == 0) for i in range(4)]
out = popsd.linear_purified_jsd(popsd.HiddenStates(*streams), popsd.Head(torch.randn(33, 8)))
out.loss.sum().backward()
assert streams[0].grad.isfinite().all() and (out.loss > 0).all()
import popsd_kernels
assert not sys.modules.keys() & {set(OPTIONAL)}
"""


def test_core_runs_without_optional_packages(tmp_path):
    run = subprocess.run([sys.executable, "-c", BLOCKED_RUN], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
