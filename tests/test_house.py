"""The house rules: one list of requirements, imports that run one way, a quiet import, and no machine's paths in the files."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]

# A module of rtb_inverse may import modules of its own rank or below, without cycles. A subpackage counts as one module here.
RANK = {
    "checks": 0,
    "particles": 0,
    "averaging": 0,
    "randomness": 0,
    "schedules": 1,
    "checkpoints": 1,
    "objectives": 1,
    "diagnostics": 1,
    "distributions": 2,
    "noise": 2,
    "noise_distributions": 2,
    "noise_range": 2,
    "problems": 2,
    "denoiser_error": 2,
    "chains": 3,
    "guidance": 4,
    "networks": 4,
    "laplace": 5,
    "references": 5,
    "kept_draws": 5,
    "second_look": 5,
    "posterior": 6,
    "behaviours": 7,
    "corrections": 7,
    "baselines": 7,
    "training": 8,
    "prior_training": 8,
    "plots": 8,
    "data": 8,
    "evaluation": 8,
    "bounds": 8,
    "lightning": 9,
    "cli": 10,
    "__init__": 11,
}
SEE_TENSORS_ONLY = {"objectives", "diagnostics"}
TENSOR_MODULES = SEE_TENSORS_ONLY | {"particles", "checks", "randomness"}


# Requirements


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines]
    named = {canonicalize_name(r.name): r for r in parsed}
    assert len(named) == len(parsed), "a package is listed twice"
    return named


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def project_requirements() -> dict[str, Requirement]:
    return requirements(project()["dependencies"] + project()["optional-dependencies"]["dev"])


def environment() -> tuple[list[str], list[str]]:
    """The conda lines and the pip lines of environment.yml."""
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    return [line for line in lines if isinstance(line, str)], next(line["pip"] for line in lines if isinstance(line, dict))


def test_environment_repeats_the_project_requirements():
    conda, pip = environment()
    assert "-e ." in pip
    ours = project_requirements()
    theirs = requirements([line for line in pip if not line.startswith("-")])
    assert {name: str(r) for name, r in theirs.items()} == {name: str(r) for name, r in ours.items()}
    python = next(line for line in conda if line.startswith("python="))
    assert SpecifierSet(project()["requires-python"]).contains(python.removeprefix("python="))


@pytest.mark.parametrize("name", project_requirements())
def test_every_requirement_is_bounded(name):
    bounds = {s.operator for s in project_requirements()[name].specifier}
    assert bounds == {">=", "<"}


def constraints() -> dict[str, Requirement]:
    return requirements([line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")])


def test_constraints_are_names_and_versions_only():
    for constraint in constraints().values():
        assert re.fullmatch(r"[\w.-]+==[\w.]+", str(constraint)), constraint


@pytest.mark.parametrize("name", project_requirements())
def test_constraints_cover_each_requirement(name):
    (pin,) = constraints()[name].specifier
    assert project_requirements()[name].specifier.contains(pin.version)


# Import direction


def engine_modules() -> dict[str, Path]:
    """Dotted names inside rtb_inverse, as "chains" or "baselines.dps"; the package itself and subpackages end in "__init__"."""
    package = ROOT / "rtb_inverse"
    return {".".join(path.relative_to(package).with_suffix("").parts): path for path in sorted(package.rglob("*.py"))}


def imports(source: str, module: str) -> set[tuple[str, str]]:
    """What `source`, the text of rtb_inverse.`module`, imports anywhere: (a, b) for `from a import b`, (a, "") for `import a`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["rtb_inverse", *module.split(".")][: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {(base, alias.name) for alias in node.names}
    return found


def engine_imports(source: str, module: str, modules: set[str]) -> set[str]:
    """Those of `modules` that `source` imports. `from a import b` counts as a.b where that is a module, else as a."""
    found = set()
    for base, name in imports(source, module):
        head, *parts = base.split(".")
        if head == "rtb_inverse":
            candidates = [[*parts, name], [*parts, name, "__init__"], parts, [*parts, "__init__"]]
            found |= {next((c for c in map(".".join, candidates) if c in modules), ".".join(parts))}  # else not written yet
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def violations(module: str, imported: set[str]) -> list[str]:
    """Which of those `imported` by `module` the rank table forbids."""
    if top(module) in SEE_TENSORS_ONLY:
        return sorted(other for other in imported if top(other) not in TENSOR_MODULES)
    return sorted(other for other in imported if RANK[top(other)] > RANK[top(module)])


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from rtb_inverse.chains import Chain", "posterior", {"chains"}),
        ("import rtb_inverse.chains as c", "posterior", {"chains"}),
        ("from rtb_inverse import chains", "posterior", {"chains"}),
        ("from rtb_inverse import Chain", "posterior", {"__init__"}),
        ("from rtb_inverse import chains, Chain", "posterior", {"chains", "__init__"}),
        ("from rtb_inverse import chains\nfrom rtb_inverse.report import Report", "posterior", {"chains", "report"}),
        ("from rtb_inverse import baselines", "report", {"baselines.__init__"}),
        ("import rtb_inverse", "posterior", {"__init__"}),
        ("from .chains import Chain", "posterior", {"chains"}),
        ("from . import chains", "posterior", {"chains"}),
        ("from ..chains import Chain", "baselines.dps", {"chains"}),
        ("from .dps import dps", "baselines.__init__", {"baselines.dps"}),
        ("from rtb_inverse.baselines import dps", "report", {"baselines.dps"}),
        ("from rtb_inverse.baselines import DPS", "report", {"baselines.__init__"}),
        ("def f():\n    from rtb_inverse.chains import Chain", "posterior", {"chains"}),
        ("from rtb_inverse.plots import plot", "report", {"plots"}),
        ("from lightning import Trainer\nimport torch", "posterior", set()),
    ],
)
def test_the_import_reader(source, module, expected):
    modules = {"__init__", "chains", "posterior", "report", "baselines.__init__", "baselines.dps"}
    assert engine_imports(source, module, modules) == expected


@pytest.mark.parametrize(
    ("module", "imported", "forbidden"),
    [
        ("chains", {"schedules", "posterior"}, ["posterior"]),
        ("posterior", {"chains", "__init__"}, ["__init__"]),
        ("objectives", {"diagnostics", "particles", "checks", "schedules"}, ["schedules"]),
        ("diagnostics.weights", {"diagnostics.common", "checks", "chains"}, ["chains"]),
        ("baselines.dps", {"corrections", "lightning"}, ["lightning"]),
    ],
)
def test_the_rank_table_forbids(module, imported, forbidden):
    assert violations(module, imported) == forbidden


def test_every_engine_module_has_a_rank():
    assert {top(module) for module in engine_modules()} <= RANK.keys()


@pytest.mark.parametrize("module", engine_modules())
def test_engine_imports_run_one_way(module):
    modules = engine_modules()
    source = modules[module].read_text()
    outside = {top(base) for base, _ in imports(source, module)}
    assert not outside & {"priors", "tasks"}
    assert violations(module, engine_imports(source, module, set(modules))) == []


def test_engine_imports_have_no_cycle():
    modules = engine_modules()
    graph = {module: engine_imports(path.read_text(), module, set(modules)) for module, path in modules.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


# Import is quiet

QUIET_IMPORT = """
import builtins, getpass, socket

def refuse(*args, **kwargs):
    raise RuntimeError("an import asked a person or the network")

builtins.input = getpass.getpass = socket.getaddrinfo = socket.socket.connect = refuse
import rtb_inverse, priors, tasks
"""


def test_import_asks_nothing_of_anyone(tmp_path):
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", QUIET_IMPORT], cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


# No machine's paths

MACHINE_PATH = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/[\w.]|(?<![\w/])~[/]|\b[A-Z]:\\+Users\b")


@pytest.mark.parametrize("path", ["work", "root", "home", "Users"])
def test_the_machine_path_pattern(path):
    assert MACHINE_PATH.search(f'load("/{path}/data")')
    assert MACHINE_PATH.search(f"/{path}/.cache/module.py:254: UserWarning")
    assert not MACHINE_PATH.search(f"https://example.org/{path}/data and ./{path}/data")


def test_no_file_names_a_machine_path():
    listing = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    guilty = []
    for name in listing.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file() or b"\0" in (data := path.read_bytes()):
            continue  # a folder, a deleted file, a binary
        for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if MACHINE_PATH.search(line):
                guilty.append(f"{name}:{number}")
    assert not guilty


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_every_benchmark_still_imports(script, monkeypatch):
    """What it takes from the library exists; they run for minutes, by hand."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    assert importlib.import_module(script).__doc__
