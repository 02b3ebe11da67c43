"""What users install: wheel, sdist, editable install and bare checkout, each imported away from the sources."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from pyproject_hooks import BuildBackendHookCaller, quiet_subprocess_runner

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {name: ROOT / folder for name, folder in PYPROJECT["tool"]["setuptools"]["package-dir"].items()}
NEEDED_TO_BUILD = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "vision_remember", "adapters")
NEEDED_TO_BUILD += ("benchmarks", "examples", "tests")

LOCATE = """
import importlib, json, sys
found = {name: importlib.import_module(name).__file__ for name in ("vision_remember", "vision_remember.adapters")}
print(json.dumps(found | {"version": sys.modules["vision_remember"].__version__}))
"""


def python(
    code: str, *, cwd: Path, first: Path | None = None, site: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` with the libraries of this environment, but not what it knows about this project.

    Args:
        first: a folder to search before all others.
        site: a folder to treat as site-packages, ``.pth`` files included.
    """
    # -S and plain paths: the .pth file of an editable install would find the checkout wherever we look
    libraries = [
        entry for entry in sys.path if entry and not Path(entry).resolve().is_relative_to(ROOT / "vision_remember")
    ]
    libraries = [entry for entry in libraries if Path(entry).resolve() not in (ROOT, ROOT / "tests")]
    prelude = ["import site, sys", f"sys.path = {libraries!r}"]
    if first:
        prelude.append(f"sys.path.insert(0, {str(first)!r})")
    if site:
        # first as well: the finder that its .pth file imports is a module with the same name in every editable install
        prelude += [f"sys.path.insert(0, {str(site)!r})", f"site.addsitedir({str(site)!r})"]
    return subprocess.run(
        [sys.executable, "-I", "-S", "-c", "\n".join([*prelude, code])],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def locate(**where: Any) -> dict[str, str]:
    """Imports the package and its adapters in a process of their own and says where they came from."""
    result = python(LOCATE, **where)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def run(*command: object, cwd: Path) -> None:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def copy_of_sources(target: Path, *, with_link: bool = True) -> Path:
    target.mkdir()
    for name in NEEDED_TO_BUILD:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, target)
    if not with_link:
        link = target / "vision_remember" / "adapters"
        link.unlink()
        link.write_text("../adapters")  # what git leaves where links are not supported
    return target


def sources() -> dict[str, Path]:
    """Every file of the packages on disk, by the name it has in a wheel; what benchmarks measured is not shipped."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*"):
            inside = path.relative_to(folder).parts
            if path.is_file() and not path.is_symlink() and not {"__pycache__", "results"} & set(inside):
                files[str(PurePosixPath(*package.split("."), *path.relative_to(folder).parts))] = path
    files.pop("vision_remember/adapters", None)  # the link, where git wrote it as a text file
    return files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``wheel`` built from the sources, ``sdist``, and ``sdist wheel`` built from that, as a user would get it."""
    folder = tmp_path_factory.mktemp("built")
    copy = copy_of_sources(folder / "sources")
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--outdir", folder / "by-sdist", copy, cwd=folder)
    run(*build, "--wheel", "--outdir", folder / "direct", copy, cwd=folder)
    return {
        "wheel": next((folder / "direct").glob("*.whl")),
        "sdist": next((folder / "by-sdist").glob("*.tar.gz")),
        "sdist wheel": next((folder / "by-sdist").glob("*.whl")),
    }


@pytest.fixture(scope="module")
def metadata(built: dict[str, Path]) -> Message:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def test_every_package_is_shipped() -> None:
    on_disk = {
        ".".join([package, *path.parent.relative_to(folder).parts])
        for package, folder in FOLDERS.items()
        for path in folder.rglob("__init__.py")
    }
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(on_disk), (
        "pyproject.toml, [tool.setuptools] packages, must list the packages on disk"
    )


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for folder in FOLDERS.values() for path in folder.rglob("*.py")}
    assert not [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]


def test_adapters_is_flat() -> None:
    nested = [str(path.relative_to(ROOT)) for path in FOLDERS["vision_remember.adapters"].glob("*/*.py")]
    assert not nested, "a subfolder of adapters/ would need its own line in the package map"


def test_the_link_is_relative() -> None:
    link = ROOT / "vision_remember" / "adapters"
    target = os.readlink(link) if link.is_symlink() else link.read_text()
    assert target.strip() == "../adapters"


@pytest.mark.parametrize("which", ["wheel", "sdist wheel"])
def test_wheel_holds_every_source_and_nothing_else(built: dict[str, Path], which: str) -> None:
    with zipfile.ZipFile(built[which]) as wheel:
        shipped = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert sorted(shipped) == sorted(sources())
    assert not [name for name, path in sources().items() if shipped[name] != path.read_bytes()]
    assert "vision_remember/py.typed" in shipped


def test_sdist_holds_the_sources(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        names = [
            PurePosixPath(member.name).relative_to(built["sdist"].name.removesuffix(".tar.gz")) for member in sdist
        ]
    top = {name.parts[0] for name in names if name.parts}
    assert top >= set(NEEDED_TO_BUILD) - {"tests"}
    assert "tests" not in top


@pytest.mark.parametrize("which", ["wheel", "sdist wheel"])
def test_wheel_imports_from_elsewhere(built: dict[str, Path], which: str, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", target, built[which], cwd=tmp_path)
    found = locate(cwd=tmp_path, first=target)
    assert Path(found["vision_remember"]) == target / "vision_remember" / "__init__.py"
    assert Path(found["vision_remember.adapters"]) == target / "vision_remember" / "adapters" / "__init__.py"
    assert f"-{found['version']}-" in built[which].name


@pytest.mark.filterwarnings("ignore:Editable installation")
@pytest.mark.parametrize("with_link", [True, False], ids=["link", "no-link"])
def test_editable_install_imports_from_elsewhere(with_link: bool, tmp_path: Path) -> None:
    copy = copy_of_sources(tmp_path / "sources", with_link=with_link)
    backend = BuildBackendHookCaller(str(copy), "setuptools.build_meta", runner=quiet_subprocess_runner)
    wheel = backend.build_editable(str(tmp_path))
    with zipfile.ZipFile(tmp_path / wheel) as archive:
        archive.extractall(tmp_path / "site")
    found = locate(cwd=tmp_path, site=tmp_path / "site")
    assert Path(found["vision_remember"]).resolve() == copy / "vision_remember" / "__init__.py"
    assert Path(found["vision_remember.adapters"]).resolve() == copy / "adapters" / "__init__.py"


@pytest.mark.skipif(not (ROOT / "vision_remember" / "adapters").is_dir(), reason="git wrote the link as a text file")
def test_bare_checkout_imports() -> None:
    found = locate(cwd=ROOT, first=ROOT)
    assert Path(found["vision_remember.adapters"]).resolve() == ROOT / "adapters" / "__init__.py"


def test_this_environment_resolves_adapters() -> None:
    import vision_remember.adapters

    assert Path(vision_remember.adapters.__file__).name == "__init__.py"
    assert "adapters" not in sys.modules


def test_stray_import_of_adapters_is_refused() -> None:
    result = python("import adapters", cwd=ROOT, first=ROOT)
    assert result.returncode != 0
    assert "ImportError: import this folder as vision_remember.adapters, not as 'adapters'" in result.stderr


def test_requirements(metadata: Message) -> None:
    extras = {"timm", "open-clip", "flash-attn", "triton", "train", "eval", "demo", "synth", "bench"}
    extras |= {"export", "serve", "docs", "dev"}
    assert set(metadata.get_all("Provides-Extra", [])) == extras
    requires = metadata.get_all("Requires-Dist", [])
    plain = {re.split(r"[^\w-]", line, maxsplit=1)[0] for line in requires if "extra ==" not in line}
    assert plain == {"torch", "transformers", "pillow", "safetensors", "typer"}
    # its builds for another kind of torch fail at import, and transformers works without it
    assert not [line for line in requires if line.startswith("torchvision")]


@pytest.mark.parametrize("which", ["wheel", "sdist wheel"])
def test_lmms_eval_can_find_its_plugin(built: dict[str, Path], which: str) -> None:
    with zipfile.ZipFile(built[which]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
        lines = wheel.read(name).decode().splitlines()
    place = lines.index("[lmms_eval.models]")
    assert lines[place + 1] == "vision_remember = vision_remember.adapters.lmms_eval_entry:manifest"


def test_licence_is_shipped(built: dict[str, Path], metadata: Message) -> None:
    assert metadata["License-Expression"] == "Apache-2.0"
    with zipfile.ZipFile(built["wheel"]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert wheel.read(name) == (ROOT / "LICENSE").read_bytes()


def test_one_version_everywhere(metadata: Message) -> None:
    import vision_remember

    version = vision_remember.__version__
    assert metadata["Version"] == version
    assert re.search(rf"^version: {re.escape(version)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert re.search(rf"^## (Unreleased|{re.escape(version)})", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_every_tool_is_pinned() -> None:
    """A tool or dependency that `make` installs has its version in the constraints."""
    extras = PYPROJECT["project"]["optional-dependencies"]
    requirements = [
        *PYPROJECT["project"]["dependencies"],
        *(
            line
            for name in ("bench", "demo", "docs", "export", "synth", "train", "triton", "dev")
            for line in extras[name]
        ),
    ]
    wanted = {re.split(r"[\[<>=;!~ ]", line, maxsplit=1)[0] for line in requirements}
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0] for line in pins if line and not line.startswith("#")}
    assert wanted - pinned <= {"vision-remember", "tomli"}
