"""The project as a whole: what its pages claim, what its files say, what its pins promise."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEXT = {".md", ".py", ".toml", ".txt", ".yaml", ".yml", ".sh", ".sbatch", ".svg", ".cfg", ""}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TREE_LINE = re.compile(r"^ {4}( *)([\w.-]+/?)(?:\s{2,}(.*))?$")


def tracked(*suffixes: str) -> list[Path]:
    """Files of the working tree that git knows or would take, of the given suffixes."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    paths = [ROOT / name for name in listing]
    return [path for path in paths if path.is_file() and path.suffix in (suffixes or TEXT)]


def tree_of(page: str) -> Iterator[tuple[Path, str]]:
    """Paths that the file tree under "Repository layout" names, with their comments."""
    section = page.split("## Repository layout", 1)[1].split("\n## ", 1)[0]
    parents: list[tuple[int, Path]] = []
    for line in section.splitlines():
        match = TREE_LINE.match(line)
        if match is None:
            continue
        depth, name, comment = len(match[1]), match[2], match[3] or ""
        parents = [(level, path) for level, path in parents if level < depth]
        path = (parents[-1][1] if parents else ROOT) / name
        parents.append((depth, path))
        yield path, comment


def test_readme_tour_names_existing_paths() -> None:
    tour = list(tree_of((ROOT / "README.md").read_text()))
    assert len(tour) > 20
    missing = [str(path.relative_to(ROOT)) for path, _ in tour if not path.exists()]
    assert missing == []


def test_readme_tour_shows_every_folder_of_the_package() -> None:
    shown = {path for path, _ in tree_of((ROOT / "README.md").read_text())}
    packages = {path.parent for path in (ROOT / "megatron_ttt").glob("*/__init__.py")}
    assert packages - shown == set()


@pytest.mark.parametrize("page", tracked(".md"), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_pages_resolve(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text())]
    local = [target for target in targets if target and "://" not in target]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in LINK.findall(index.read_text())}
    pages = {path for path in tracked(".md") if path.parent == index.parent} - {index}
    assert pages - listed == set()


def defined_names(path: Path) -> set[str]:
    """Functions, classes and their methods (``Class.method``) that a module defines."""
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{node.name}.{part.name}" for part in methods}
    return names


def test_life_of_a_chunk_names_existing_functions() -> None:
    page = (ROOT / "docs" / "chunk.md").read_text()
    package = ROOT / "megatron_ttt"
    placed = re.findall(r"`([\w/]+\.py)`:\s+`([\w.]+)`", page)
    assert len(placed) > 10
    assert [f"{file}: {name}" for file, name in placed
            if name not in defined_names(package / file)] == []  # fmt: skip
    steps = [line for line in page.splitlines() if re.match(r"\| \d \|", line)]
    assert len(steps) == 8
    known = set().union(*(defined_names(package / file) for file, _ in placed))
    named = [name for line in steps for name in re.findall(r"`([\w.]+)`", line.split("|")[4])]
    assert set(named) - known == set()


def test_commands_of_the_readme_name_existing_programs() -> None:
    pages = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    programs = set(re.findall(r"\b(?:launch|tools)/[\w/]+\.(?:py|sbatch)", pages))
    assert {"launch/pretrain.py", "tools/preprocess_data.py"} <= programs
    assert sorted(name for name in programs if not (ROOT / name).is_file()) == []
    targets = set(re.findall(r"(?:`|^ {4})make ([a-z-]+)", pages, re.MULTILINE))
    declared = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "demo", "test"} <= targets
    assert targets - declared == set()


def test_demo_evaluates_what_it_trains() -> None:
    from megatron_ttt.config.load import compose_root, load_config
    from megatron_ttt.evaluation.schema import EVALUATION

    dry_run = subprocess.run(
        ["make", "--dry-run", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    (trained,) = re.findall(r"launch/pretrain\.py ([^;]*);", dry_run)
    (evaluated,) = re.findall(r"tools/evaluate\.py ([^;]*);", dry_run)
    training = load_config(trained.split())
    evaluation: Any = compose_root(EVALUATION, evaluated.split())
    assert evaluation.checkpoint == training.run.dir
    assert evaluation.task.name == "perplexity"
    assert training.train.seq_length % evaluation.perplexity.bins == 0
    assert training.logging.plot and training.parallel.cp == 2
    window = training.model.sliding_window
    assert window is not None and window < training.train.seq_length / evaluation.perplexity.bins


def test_no_file_names_a_package_host() -> None:
    # spelled in pieces: this file is searched too
    hosts = [
        "pypi" + ".org",
        "python" + "hosted.org",
        "download." + "pytorch.org",
        "pypi." + "nvidia",
    ]
    hosts += ["extra-index" + "-url", "index" + "-url", "find" + "-links"]
    found = {
        f"{path.relative_to(ROOT)}: {host}"
        for path in tracked()
        for host in hosts
        if host in path.read_text(encoding="utf-8", errors="replace")
    }
    assert found == set()


def test_sources_parse() -> None:
    for path in tracked(".py"):
        ast.parse(path.read_text(), filename=str(path))
    for path in tracked(".yaml", ".yml"):
        yaml.safe_load(path.read_text())
    for path in tracked(".toml"):
        tomllib.loads(path.read_text())


def test_shell_scripts_parse() -> None:
    scripts = [ROOT / ".ci" / "run", *tracked(".sh", ".sbatch")]
    for script in scripts:
        result = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


def test_ci_script_is_executable() -> None:
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_module_has_a_place_among_the_imports() -> None:
    """A module outside the contract's layers could import anything."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    contracts = {c["id"]: c for c in project["tool"]["importlinter"]["contracts"]}
    assert not any(":" in layer for layer in contracts["one-way"]["layers"]), "both directions"
    placed = [name.strip() for layer in contracts["one-way"]["layers"] for name in layer.split("|")]
    assert len(placed) == len(set(placed))
    package = ROOT / "megatron_ttt"
    modules = [path.relative_to(package).with_suffix("") for path in package.rglob("*.py")]
    for module in modules:
        if module.name == "__init__" and not (package / module).with_suffix(".py").read_text():
            continue
        dotted = ".".join(module.parts)
        if module.parts != ("__init__",):
            assert any(f"{dotted}.".startswith(f"{name}.") for name in placed), dotted


def imported(path: Path) -> set[str]:
    """Dotted names that a module imports, wherever the import stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def test_fast_weights_need_torch_alone() -> None:
    """The import linter sees torch only as a whole; process groups are the part that is barred."""
    allowed = set(sys.stdlib_module_names) | {"torch", "megatron_ttt"}
    for path in (ROOT / "megatron_ttt" / "fast_weights").rglob("*.py"):
        names = imported(path)
        foreign = {name.split(".")[0] for name in names} - allowed - {"triton"}
        assert foreign == set(), path
        assert not any(name.startswith("torch.distributed") for name in names), path


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_pins_satisfy_the_project(version: str) -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints" / f"{version}.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    canonical = {re.sub(r"[-_.]+", "-", name).lower(): pin for name, pin in pins.items()}
    wanted = [*project["dependencies"]]
    wanted += [line for extra in ("dev", "hf") for line in project["optional-dependencies"][extra]]
    for line in wanted:
        requirement = Requirement(line)
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        assert name in canonical, f"{line} is not pinned for Python {version}"
        assert requirement.specifier.contains(canonical[name]), f"{line}: pinned {canonical[name]}"
    assert not any("+" in pin for pin in pins.values())


def test_transformer_engine_is_built_against_the_torch_that_is_there() -> None:
    """Its extension links to torch: what it is built with comes first, then a build in place."""
    says = subprocess.run(
        ["make", "--dry-run", "setup-gpu"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    installs = [line for line in says.splitlines() if "[gpu" in line]
    assert len(installs) == 2
    tools, extension = installs
    assert "'.[gpu-build]'" in tools
    assert "'.[gpu]'" in extension and "--no-build-isolation" in extension
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert "nvidia-cudnn-frontend>=1.29" in extras["gpu-build"]
    assert any(need.startswith("wheel") for need in extras["gpu-build"])
    for path in tracked(".md", ".sh", ".sbatch", ".yaml", ".toml"):
        for line in path.read_text().splitlines():
            if "pip install" in line and "[gpu]" in line:
                assert "--no-build-isolation" in line, f"{path.relative_to(ROOT)}: {line}"
