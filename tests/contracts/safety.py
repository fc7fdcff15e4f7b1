"""What the package may not do (rule S1): run code that it read, and touch what another layer owns.

Names are resolved through imports, so `from torch import load as fetch` is seen for what it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.contracts.source import Names, Source, imported_modules, within

UNSAFE_MODULES = ("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
UNSAFE_NAMES = {
    "torch.load": "is a pickle reader",
    "torch.save": "is a pickle writer",
    "torch.distributed.checkpoint.FileSystemReader": "reads a pickled index",
    "torch.distributed.checkpoint.FileSystemWriter": "writes a pickled index",
    "torch.distributed.all_gather_object": "sends pickles between ranks",
    "torch.distributed.gather_object": "sends pickles between ranks",
    "torch.distributed.scatter_object_list": "sends pickles between ranks",
    "torch.distributed.broadcast_object_list": "sends pickles between ranks",
    "torch.distributed.send_object_list": "sends pickles between ranks",
    "torch.distributed.recv_object_list": "receives pickles from ranks",
    "yaml.load": "builds arbitrary objects; yaml.safe_load does not",
    "yaml.load_all": "builds arbitrary objects; yaml.safe_load_all does not",
    "yaml.full_load": "builds objects; yaml.safe_load does not",
    "yaml.unsafe_load": "runs code",
    "yaml.unsafe_load_all": "runs code",
    "eval": "runs code",
    "exec": "runs code",
    "__import__": "imports by a string",
    "builtins.eval": "runs code",
    "builtins.exec": "runs code",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "subprocess.getoutput": "runs a shell",
    "subprocess.getstatusoutput": "runs a shell",
}
UNSAFE_KEYWORDS = {"shell": "runs a shell", "allow_pickle": "reads pickles"}

RUNTIME_ONLY = (
    "os.environ",
    "os.environb",
    "os.getenv",
    "os.putenv",
    "os.unsetenv",
    "torch.cuda",
)
RUNTIME_ONLY_CALLS = (
    "torch.distributed.init_process_group",
    "torch.distributed.destroy_process_group",
    "torch.distributed.new_group",
    "torch.distributed.new_subgroups",
    "torch.distributed.TCPStore",
    "torch.distributed.FileStore",
    "torch.distributed.HashStore",
    "torch.distributed.init_device_mesh",
    "torch.distributed.device_mesh.init_device_mesh",
    "torch.distributed.device_mesh.DeviceMesh",
    "torch.distributed.DeviceMesh",
    "torch.manual_seed",
    "torch.seed",
    "torch.set_rng_state",
    "torch.random.manual_seed",
    "torch.random.set_rng_state",
    "torch.use_deterministic_algorithms",
    "torch.set_num_threads",
    "random.seed",
    "numpy.random.seed",
)


def unsafe_code(source: Source) -> Iterator[str]:
    """Find readers of pickles, runners of code and shells."""
    names = Names(source.tree)
    for node, module in imported_modules(source.tree):
        if any(within(module, unsafe) for unsafe in UNSAFE_MODULES):
            yield source.at(node, f"{module} runs code from what it reads")
        if module in UNSAFE_NAMES:
            yield source.at(node, f"{module} {UNSAFE_NAMES[module]}")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = names.dotted(node)
            if name in UNSAFE_NAMES:
                yield source.at(node, f"{name} {UNSAFE_NAMES[name]}")
        elif isinstance(node, ast.Call):
            for keyword in node.keywords:
                harmless = isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                if keyword.arg in UNSAFE_KEYWORDS and not harmless:
                    yield source.at(node, f"{keyword.arg}={ast.unparse(keyword.value)} {UNSAFE_KEYWORDS[keyword.arg]}")


def outside_runtime(source: Source) -> Iterator[str]:
    """Find environment variables, CUDA, process groups and global seeds outside `runtime/`."""
    if source.layer == "runtime":
        return
    names = Names(source.tree)
    for node, module in imported_modules(source.tree):
        if any(within(module, owned) for owned in RUNTIME_ONLY):
            yield source.at(node, f"{module} belongs to runtime/")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute | ast.Name) and names.dotted(node) in RUNTIME_ONLY:
            yield source.at(node, f"{names.dotted(node)} belongs to runtime/")
        elif isinstance(node, ast.Call) and names.dotted(node.func) in RUNTIME_ONLY_CALLS:
            yield source.at(node, f"{names.dotted(node.func)} belongs to runtime/")


def distributed_models(source: Source) -> Iterator[str]:
    """Find ranks, meshes and process groups in `models/`, which is single-device code."""
    if source.layer != "models":
        return
    names = Names(source.tree)
    for node, module in imported_modules(source.tree):
        if within(module, "torch.distributed"):
            yield source.at(node, f"{module} in a single-device model")
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and names.dotted(node) == "torch.distributed":
            yield source.at(node, "torch.distributed in a single-device model")
