"""The rules of CONTRIBUTING.md that a parser can enforce. Each checker is also shown a snippet that breaks its rule."""

import ast
import collections
import graphlib
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "popsd": ROOT / "popsd",
    "popsd_kernels": ROOT / "kernels" / "popsd_kernels",
    "popsd_integrations": ROOT / "integrations" / "popsd_integrations",
    "popsd_benchmarks": ROOT / "benchmarks" / "popsd_benchmarks",
}
MAY_IMPORT = {
    "popsd_kernels": {"popsd_kernels", "torch", "triton"},
    "popsd": {"popsd", "popsd_kernels", "torch", "numpy"},
}
"""Beside the standard library. Integrations and benchmarks may import anything but what nothing may import."""
MAY_NOT_BE_IMPORTED = {"benchmarks", "tests", "conftest"}
BENCHMARKS, DOOR = "popsd_benchmarks", "popsd_integrations.cli"
"""Nothing of ours imports the benchmarks but themselves, and the door of the command line when it is walked through."""
OPTIONAL = ("triton", "transformers", "trl", "peft", "accelerate", "datasets", "matplotlib")
TAKEN_NAMES = {"kernels", "torch", "numpy", "psutil", "pytest_benchmark", "liger_kernel", "orda_kernel", *OPTIONAL}
MAX_FILE_LINES, MAX_KERNEL_LINES, MAX_KERNEL_ARGUMENTS, MAX_FOLDER_FILES = 400, 80, 20, 10
HOLDING_NONE = {"streams", "student", "target", "base", "teacher", "reference", "strip", "scaling"}
"""Kernel arguments that are tuples with fields of None: `x is None` of such a one does not compile under Triton 3.6."""


def source_files():
    folders = [*ROOMS.values(), ROOT / "benchmarks", ROOT / "tests"]
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_name(path, room):
    parts = path.relative_to(ROOMS[room].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_modules():
    """{(module, is_package): source} of our packages."""
    return {
        (module_name(path, room), path.name == "__init__.py"): path.read_text()
        for room, folder in ROOMS.items()
        for path in folder.rglob("*.py")
    }


def imported_names(source, module="", is_package=False):
    """Dotted names that a module imports anywhere in it: `from a import b` gives a.b, for b may be a module."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
            origin = ".".join([*parents, *filter(None, [node.module])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return names


def without_functions(source):
    """What runs when a module is imported, as long as it calls nothing."""
    return "\n".join(ast.unparse(node) for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef))


def forbidden_imports(source, module, is_package=False):
    def roots(source):
        return {name.split(".")[0] for name in imported_names(source, module, is_package)} - sys.stdlib_module_names

    room, found = module.split(".")[0], roots(source)
    forbidden = found & MAY_NOT_BE_IMPORTED
    if room != BENCHMARKS:
        forbidden |= roots(without_functions(source) if module == DOOR else source) & {BENCHMARKS}
    return forbidden | (found - MAY_IMPORT[room] if room in MAY_IMPORT else set())


def import_graph(modules):
    """{module: modules it imports}, of those given."""
    known = {name for name, _ in modules}

    def resolved(name):
        return name if name in known else name.rpartition(".")[0]

    return {
        name: {resolved(target) for target in imported_names(source, name, is_package)} & known - {name}
        for (name, is_package), source in modules.items()
    }


def cycle(graph):
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def kernels(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(x) for x in node.decorator_list):
            yield node


def kernels_over_budget(source):
    over = []
    for node in kernels(source):
        lines = node.end_lineno - node.lineno + 1
        arguments = sum(map(len, (node.args.posonlyargs, node.args.args, node.args.kwonlyargs)))
        if lines > MAX_KERNEL_LINES or arguments > MAX_KERNEL_ARGUMENTS:
            over.append(f"{node.name}: {lines} lines, {arguments} arguments")
    return over


def tuples_compared_with_none(source):
    return [
        f"{kernel.name}: {ast.unparse(node)}"
        for kernel in kernels(source)
        for node in ast.walk(kernel)
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Is | ast.IsNot)
        and isinstance(node.left, ast.Name)
        and node.left.id in HOLDING_NONE
    ]


def shadowing_paths(paths):
    """Modules and regular packages named like somebody else's: one of them in sys.path[0] hides the real one."""
    return [p for p in paths if p.stem in TAKEN_NAMES or (p.name == "__init__.py" and p.parent.name in TAKEN_NAMES)]


@pytest.mark.parametrize("room", ROOMS)
def test_import_arrows(room):
    for (module, is_package), source in room_modules().items():
        if module.split(".")[0] == room:
            assert not forbidden_imports(source, module, is_package), f"{module} imports what {room} may not"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("popsd.x", "import triton", {"triton"}),
        (
            "popsd.x",
            "def f():\n    from popsd_integrations.huggingface.heads import head_from_model",
            {"popsd_integrations"},
        ),
        ("popsd.x", "import importlib\nimportlib.import_module('trl.trainer')", {"trl"}),
        ("popsd.x", "from . import y\nfrom .y import z\nimport os, numpy, popsd_kernels.launch", set()),
        ("popsd_kernels.x", "from popsd.config import PurifiedConfig", {"popsd"}),
        ("popsd_kernels.x", "import torch, triton.language as tl", set()),
        ("popsd_integrations.x", "import trl, popsd", set()),
        ("popsd_integrations.x", "from benchmarks import cpu_torch", {"benchmarks"}),
        ("popsd_integrations.x", "def f():\n    from popsd_benchmarks import command", {"popsd_benchmarks"}),
        ("popsd_integrations.cli", "if True:\n    from popsd_benchmarks import command", {"popsd_benchmarks"}),
        ("popsd_integrations.cli", "def f():\n    from popsd_benchmarks import command", set()),
        ("popsd.x", "def f():\n    from popsd_benchmarks import command", {"popsd_benchmarks"}),
        (
            "popsd_benchmarks.x",
            "import trl, popsd_kernels, popsd_integrations.huggingface.heads\nfrom . import cells",
            set(),
        ),
        ("popsd_benchmarks.x", "from tests import kernel_helpers", {"tests"}),
    ],
)
def test_import_arrows_bite(module, source, found):
    assert forbidden_imports(source, module) == found


def test_no_import_cycle():
    assert cycle(import_graph(room_modules())) is None


def test_import_cycle_is_found():
    bad = {("p", True): "from .a import f", ("p.a", False): "from p import b", ("p.b", False): "from p.a import f"}
    assert set(cycle(import_graph(bad))) == {"p.a", "p.b"}
    through_package = {("p", True): "from p.a import f", ("p.a", False): "def g():\n    from p import h"}
    assert set(cycle(import_graph(through_package))) == {"p", "p.a"}


def test_file_length():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in source_files()}
    assert not {path: n for path, n in lengths.items() if n > MAX_FILE_LINES}, "cut by concept, never by adding a flag"


def test_kernel_size():
    assert not [over for source in room_modules().values() for over in kernels_over_budget(source)]


def test_kernel_size_bites():
    long = "@triton.jit(noinline=True)\ndef k(a):\n" + "    a += 1\n" * MAX_KERNEL_LINES
    wide = f"@triton.jit\ndef k({', '.join(f'a{i}' for i in range(MAX_KERNEL_ARGUMENTS))}, *, b): pass"
    assert kernels_over_budget(long) == ["k: 81 lines, 1 arguments"]
    assert kernels_over_budget(wide) == ["k: 1 lines, 21 arguments"]
    assert not kernels_over_budget(long.replace("@triton.jit(noinline=True)\n", ""))


def test_no_tuple_that_may_hold_none_is_compared_with_it():
    assert not [found for source in room_modules().values() for found in tuples_compared_with_none(source)]
    kernel = "@triton.jit\ndef k(base, strip):\n    if strip.ptr is not None:\n        pass\n    return base is None"
    assert tuples_compared_with_none(kernel) == ["k: base is None"]


def test_nothing_hides_another_package():
    assert not shadowing_paths([*source_files(), *ROOT.glob("*.py"), *ROOT.glob("*/*.py")])


def test_hiding_is_found():
    good = [Path("kernels/popsd_kernels/__init__.py"), Path("integrations/popsd_integrations/trl_trainer.py")]
    bad = [Path("kernels/__init__.py"), Path("integrations/trl.py"), Path("benchmarks/triton/__init__.py")]
    assert shadowing_paths(good + bad) == bad


def test_namespace_folders():
    """Hugging Face's `kernels` must win over ours, so ours is no regular package; nor are its neighbours."""
    folders = ("kernels", "integrations", "benchmarks")
    assert not [folder for folder in folders if (ROOT / folder / "__init__.py").exists()]


def of(package, names):
    return {f"{package}.{name}" for name in names.split()}


_LAUNCHERS = of("popsd_kernels", "rows device launch checks")
ARROWS = {
    "popsd_kernels.rows": set(),
    "popsd_kernels.device": of("popsd_kernels", "rows device"),
    "popsd_kernels.launch": of("popsd_kernels", "rows device"),
    "popsd_kernels.checks": of("popsd_kernels", "rows device launch"),
    **{f"popsd_kernels.{x}": _LAUNCHERS | {f"popsd_kernels.{x}"} for x in ("sweeps", "streaming")},
    "popsd.engine.vocabulary.reduce": set(),
    "popsd.engine.torch_backend": of("popsd", "config head outputs engine.torch_backend engine.vocabulary.reduce"),
    "popsd.engine": of("popsd", "config head outputs engine"),
    "popsd.functional": of("popsd", "config head outputs engine"),
    **{x: set() for x in of("popsd_integrations", "run_folder finite_steps plotting estimates pages own_code")},
    **{
        f"popsd_integrations.{name}": of("popsd_integrations", f"{name} {others}")
        for name, others in {
            "scoring": "own_code",
            "huggingface": "own_code",
            "axolotl_plugin": "trl_trainer",
            "ms_swift": "commandline huggingface runs",
            "runs": "huggingface run_folder plotting estimates scoring pages",
            "torch_loop": "huggingface run_folder finite_steps runs",
            "commandline": "huggingface",
            "trl_trainer": "commandline huggingface run_folder finite_steps plotting runs",
            "miniature": "huggingface torch_loop plotting pages runs",
            "diagnose": "commandline huggingface torch_loop miniature plotting pages estimates",
            "diagnose.training": "commandline huggingface trl_trainer diagnose",
            "init": "commandline huggingface trl_trainer",
            "evaluate": "commandline huggingface run_folder plotting estimates scoring pages runs",
        }.items()
    },
}
"""Within a package: what a module may import of it. The longest name counts; what is not listed may import anything."""


def within(name, packages):
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def arrows_against(modules, arrows):
    """Imports of a module's own package that ``arrows`` does not allow."""
    found = []
    for name, targets in import_graph(modules).items():
        rules = [package for package in arrows if within(name, [package])]
        if rules:
            allowed = arrows[max(rules, key=len)]
            own = [x for x in targets if x.split(".")[0] == name.split(".")[0] and "." in x]
            found += [f"{name} -> {x}" for x in sorted(own) if not within(x, allowed)]
    return found


def test_arrows_within_a_package():
    assert not arrows_against(room_modules(), ARROWS)


def test_arrows_within_a_package_bite():
    modules = {("p.low", False): "from p.high import f", ("p.high", False): "import p.low"}
    assert arrows_against(modules, {"p.low": set(), "p.high": {"p.low"}}) == ["p.low -> p.high"]


def crowded(paths, limit=MAX_FOLDER_FILES):
    """Folders with more source files than the limit, `__init__.py` and `__main__.py` aside."""
    counts = collections.Counter(path.parent for path in paths if not path.name.startswith("__"))
    return {folder: count for folder, count in counts.items() if count > limit}


def test_folders_hold_few_files():
    assert not crowded(path for folder in ROOMS.values() for path in folder.rglob("*.py"))
    assert crowded([Path(f"p/{i}.py") for i in range(11)], 10) == {Path("p"): 11}
    assert not crowded([Path("p/__init__.py"), *(Path(f"p/{i}.py") for i in range(10))], 10)


def statement_lines(source):
    """(number, text) of a module's lines of code: no imports, docstrings, comments, declarations or lone punctuation."""
    tree, skipped = ast.parse(source), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
        elif isinstance(node, ast.FunctionDef):
            skipped |= set(range(node.lineno, node.body[0].lineno))
        elif isinstance(node, ast.AnnAssign | ast.Expr) and (
            node.value is None or isinstance(node.value, ast.Constant)
        ):
            skipped |= set(range(node.lineno, node.end_lineno + 1))
    lines = enumerate(source.splitlines(), start=1)
    return [(n, x.strip()) for n, x in lines if n not in skipped and re.search(r"\w\w", x) and x.strip()[0] != "#"]


def repeated(sources, length=6):
    """Runs of ``length`` lines of code that stand in two files."""
    first, found = {}, []
    for name, source in sources.items():
        lines = statement_lines(source)
        for i in range(len(lines) - length + 1):
            text = "\n".join(x for _, x in lines[i : i + length])
            other = first.setdefault(text, (name, lines[i][0]))
            if other[0] != name:
                found.append(f"{other[0]}:{other[1]} ~ {name}:{lines[i][0]}")
    return found


def test_no_six_lines_stand_in_two_files():
    sources = {name: source for (name, _), source in room_modules().items()}
    assert not repeated(sources), "one decision, one place"


def test_repeated_lines_are_found():
    body = "\n".join(f"    value_{i} = function_{i}()" for i in range(6))
    good = {"a": f"def f(x):\n{body}\n", "b": f"def g(y):\n{body.replace('value_3', 'other')}\n"}
    assert not repeated(good)
    assert repeated(good | {"c": f"# a comment\ndef h(z):\n    '''Text.'''\n\n{body}\n"}) == ["a:2 ~ c:5"]


def texts_without_encoding(source):
    """Lines that read or write text in whatever encoding the machine has, which is ASCII under LC_ALL=C."""
    found = []
    for node in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        on_path = isinstance(node.func, ast.Attribute)
        modes = [*node.args[0 if on_path else 1 :][:1], *(word.value for word in node.keywords if word.arg == "mode")]
        binary = any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)
        descriptor = on_path and getattr(node.func.value, "id", None) == "os"
        is_text = name in ("read_text", "write_text") or (name == "open" and not binary and not descriptor)
        if is_text and "encoding" not in {word.arg for word in node.keywords}:
            found.append(node.lineno)
    return found


def test_text_files_say_their_encoding():
    paths = [path for path in source_files() if ROOT / "tests" not in path.parents]
    found = {str(path): texts_without_encoding(path.read_text(encoding="utf-8")) for path in paths}
    assert {path: lines for path, lines in found.items() if lines} == {}


def test_a_missing_encoding_is_found():
    lines = ['open("a")', 'open("a", "wb")', 'p.open("w")', "p.read_text()", 'p.write_text("x", encoding="utf-8")']
    lines += ['open("a", mode="rb")', 'os.open("a", os.O_RDONLY)', 'open("a", encoding="utf-8")']
    assert texts_without_encoding("\n".join(lines)) == [1, 3, 4]


def test_no_checkpoint_is_asked_to_run_its_code():
    """trust_remote_code is TRL's option of the user, or False."""
    for path in source_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert ast.unparse(node.value) in ("False", "args.trust_remote_code"), path
