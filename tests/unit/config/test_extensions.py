"""Optional packages are found without an import, and told from others of their name. Those here are empty files."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from dist_llm.config.extensions import EXTENSIONS, find_extension

ROOT = Path(__file__).parents[3]
FAKED = ("apex", "megatron", "deepspeed", "transformer_engine", "mpi4py", "wandb")

Lay = Callable[..., Path]


@pytest.fixture
def lay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lay:
    """Write empty files below a new folder in front of the path, hide real packages, and return the folder."""
    others = [folder for folder in sys.path if not any((Path(folder) / name).exists() for name in FAKED)]
    monkeypatch.setattr(sys, "path", others)
    for name in [name for name in sys.modules if name.partition(".")[0] in FAKED]:
        monkeypatch.delitem(sys.modules, name)

    def put(*files: str, folder: str = "site") -> Path:
        site = tmp_path / folder
        for file in files:
            (site / file).parent.mkdir(parents=True, exist_ok=True)
            (site / file).write_text("raise AssertionError('imported')\n" if file.endswith(".py") else "")
        monkeypatch.setattr(sys, "path", [str(site), *sys.path])
        importlib.invalidate_caches()
        return site

    return put


def _metadata(site: Path, name: str, version: str, files: Iterable[tuple[str, str]] = ()) -> None:
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, text in files:
        (info / file).write_text(text)


def _compiled(stem: str) -> str:
    return stem + EXTENSION_SUFFIXES[0]


APEX = ("apex/__init__.py", "apex/optimizers/fused_adam.py", "apex/normalization/fused_layer_norm.py")
MEGATRON = ("megatron/core/__init__.py", "megatron/core/parallel_state.py")


def test_nothing_is_missing_not_wrong(lay: Lay) -> None:
    lay()
    for name, row in EXTENSIONS.items():
        if row.module.partition(".")[0] in FAKED:
            found = find_extension(name)
            assert (found.place, found.version, found.problem, found.usable) == (None, None, None, False)
            assert found.install == row.install


def test_apex_of_pypi_is_named(lay: Lay) -> None:
    site = lay("apex/__init__.py", "apex/models.py", "apex/lib/libapex.py")
    _metadata(site, "apex", "0.9.10.dev0")
    found = find_extension("apex")
    assert not found.usable
    assert found.place == str(site / "apex")
    assert found.version is None
    assert found.problem is not None
    start = f"{site / 'apex'} is not NVIDIA's apex (it has no optimizers/fused_adam.py): pip uninstall apex; "
    assert found.problem.startswith(start)
    assert found.problem.endswith("git+https://github.com/NVIDIA/apex")


def test_apex_that_pip_did_not_install_is_moved(lay: Lay) -> None:
    site = lay("apex.py")
    problem = find_extension("apex").problem
    assert problem is not None
    assert problem.startswith(f"{site / 'apex.py'} is not NVIDIA's apex")
    assert f"move {site / 'apex.py'} out of the way" in problem


def test_apex_with_and_without_compiled_parts(lay: Lay) -> None:
    site = lay(*APEX)
    _metadata(site, "apex", "0.1")
    found = find_extension("apex")
    assert (found.usable, found.version) == (False, "0.1")
    assert found.problem is not None
    assert "is NVIDIA's apex without its compiled part amp_C: APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip" in found.problem
    built = lay(*APEX, _compiled("amp_C"), folder="built")
    _metadata(built, "apex", "0.2")
    found = find_extension("apex")
    assert (found.usable, found.version, found.place, found.problem) == (True, "0.2", str(built / "apex"), None)


def test_compiled_for_another_python_does_not_count(lay: Lay) -> None:
    lay(*APEX, "amp_C.cpython-38-x86_64-linux-gnu.so")
    assert not find_extension("apex").usable


def test_megatron_core_in_its_namespace(lay: Lay) -> None:
    site = lay(*MEGATRON)
    _metadata(site, "megatron_core", "0.17.0")
    for name in ("megatron-core", "megatron.core", "megatron", "megatron_core"):
        found = find_extension(name)
        assert (found.name, found.version) == ("megatron-core", "0.17.0")
        assert (found.place, found.usable) == (str(site / "megatron" / "core"), True)


def test_other_megatron_in_front_of_the_namespace(lay: Lay) -> None:
    behind = lay(*MEGATRON, folder="behind")
    _metadata(behind, "megatron_core", "0.17.0")
    front = lay("megatron/__init__.py", folder="front")
    _metadata(front, "megatron", "0.5.1")
    found = find_extension("megatron-core")
    assert not found.usable
    assert found.problem is not None
    assert f"{front / 'megatron'} is not of Megatron-Core" in found.problem
    assert "pip uninstall megatron; pip install 'dist-llm[megatron]'" in found.problem


def test_other_megatron_in_the_same_folder(lay: Lay) -> None:
    lay(*MEGATRON, "megatron/__init__.py")
    found = find_extension("megatron-core")
    assert not found.usable
    assert "which has no __init__.py there" in str(found.problem)


def test_folder_in_front_does_not_hide_a_namespace(lay: Lay) -> None:
    behind = lay(*MEGATRON, folder="behind")
    lay("megatron/config.yaml", folder="front")
    found = find_extension("megatron-core")
    assert (found.usable, found.place) == (True, str(behind / "megatron" / "core"))
    assert found.version is None


def test_folder_alone_is_no_package(lay: Lay) -> None:
    site = lay("wandb/run-1/config.yaml", "megatron/notes.txt")
    assert f"{site / 'wandb'} is only a folder of that name, not Weights & Biases" in str(
        find_extension("wandb").problem
    )
    found = find_extension("megatron-core")
    assert "it has no core/parallel_state.py): pip install 'dist-llm[megatron]'" in str(found.problem)
    assert not found.usable


def test_too_old(lay: Lay) -> None:
    site = lay(*MEGATRON)
    _metadata(site, "megatron_core", "0.9.0rc1")
    found = find_extension("megatron-core")
    assert (found.usable, found.version) == (False, "0.9.0rc1")
    assert "is Megatron-Core 0.9.0rc1, older than 0.16: pip install" in str(found.problem)


def test_torch_part_of_transformer_engine(lay: Lay) -> None:
    files = ("transformer_engine/__init__.py", "transformer_engine/pytorch/__init__.py")
    lay(*files)
    assert "without its compiled part transformer_engine_torch" in str(find_extension("transformer_engine").problem)
    lay(*files, _compiled("transformer_engine/wheel_lib/transformer_engine_torch"), folder="built")
    assert find_extension("transformer_engine").usable


@pytest.mark.parametrize("part", ["mpi4py/MPI", "mpi4py/MPI.mpich"])
def test_mpi4py(lay: Lay, part: str) -> None:
    lay("mpi4py/__init__.py", "mpi4py/run.py", _compiled(part))
    assert find_extension("mpi").usable


@pytest.mark.parametrize("damage", ["empty folder", "no version", "not text"])
def test_broken_metadata_hides_the_version_alone(lay: Lay, damage: str) -> None:
    site = lay("deepspeed/__init__.py", "deepspeed/runtime/engine.py")
    info = site / "deepspeed-1.0.dist-info"
    info.mkdir()
    if damage == "no version":
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\n")
    elif damage == "not text":
        (info / "METADATA").write_bytes(b"\xff\xfe\x00")
    found = find_extension("deepspeed")
    assert (found.usable, found.version) == (True, None)


def test_metadata_of_another_copy_is_not_its_version(lay: Lay) -> None:
    files = ("deepspeed/__init__.py", "deepspeed/runtime/engine.py")
    _metadata(lay(*files, folder="installed"), "deepspeed", "0.1")
    assert find_extension("deepspeed").version == "0.1"
    lay(*files, folder="checkout")
    assert (find_extension("deepspeed").usable, find_extension("deepspeed").version) == (True, None)


def test_editable_install_has_its_version(lay: Lay, tmp_path: Path) -> None:
    site = lay()
    site.mkdir()
    facts = json.dumps({"url": "file:source", "dir_info": {"editable": True}})
    _metadata(site, "deepspeed", "0.3", [("direct_url.json", facts)])
    lay("deepspeed/__init__.py", "deepspeed/runtime/engine.py", folder="source")
    assert find_extension("deepspeed").version == "0.3"


def test_refused_or_faked_modules_are_missing(lay: Lay, monkeypatch: pytest.MonkeyPatch) -> None:
    lay()

    class Refuses:
        def find_spec(self, name: str, path: object = None, target: object = None) -> None:
            if name == "deepspeed":
                raise ModuleNotFoundError(name)

    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    assert find_extension("deepspeed").place is None
    monkeypatch.setitem(sys.modules, "apex", type(sys)("apex"))
    assert find_extension("apex").place is None


def test_path_is_spelled_on_one_line(lay: Lay) -> None:
    lay("apex.py", folder="a\nb")
    problem = find_extension("apex").problem
    assert problem is not None
    assert problem.isprintable()
    assert "a\\nb" in problem


def test_unknown_name_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError, match="horovod"):
        find_extension("horovod")


def test_install_commands_are_safe_and_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for row in EXTENSIONS.values():
        named = re.search(r"'dist-llm\[(\w+)\]'", row.install)
        assert (named is not None) == bool(row.extra)
        if named is not None:
            floor = ">=" + ".".join(str(number) for number in row.oldest)
            requirement = next(text for text in extras[named[1]] if text.startswith(row.name))
            assert not row.oldest or requirement == row.name + floor
    names = {re.split(r"[\[<>=]", text)[0] for extra in extras.values() for text in extra}
    assert not names & {"apex", "megatron"}, "those on PyPI are unrelated projects"
    assert "github.com/NVIDIA/apex" in EXTENSIONS["apex"].install


def test_what_setup_installs_is_found_and_not_imported() -> None:
    program = (
        "import sys; from dist_llm.config.extensions import EXTENSIONS, find_extension\n"
        "for name in EXTENSIONS: found = find_extension(name); print(name, found.version, found.usable)\n"
        "print([name for name in sys.modules if name.partition('.')[0] in ('deepspeed', 'megatron', 'torch')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    lines = done.stdout.splitlines()
    assert f"deepspeed {importlib.metadata.version('deepspeed')} True" in lines
    assert f"megatron-core {importlib.metadata.version('megatron-core')} True" in lines
    assert lines[-1] == "[]"
