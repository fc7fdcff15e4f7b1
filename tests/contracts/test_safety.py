"""Nothing that is read can run, and each layer keeps to what it owns; each rule is first seen to fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.contracts.safety import distributed_models, outside_runtime, unsafe_code
from tests.contracts.source import ROOT, Source, python_sources, repository_files

Rule = Callable[[Source], Iterator[str]]
SHIPPED = ("dist_llm", "docs", "benchmarks", "examples", "launch", "kernels")
UNSAFE_CONFIG = ("_target_", "_partial_", "_recursive_", "${env:", "${oc.env", "!!python", "!python")


@pytest.mark.parametrize("rule", [unsafe_code, outside_runtime, distributed_models], ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    folders = SHIPPED if rule is unsafe_code else ("dist_llm",)
    findings = [finding for source in python_sources(*folders) for finding in rule(source)]
    assert not findings, "\n".join(findings)


def unsafe_config(path: str, text: str) -> list[str]:
    """Find config text that names code or reads the environment."""
    lines = enumerate(text.splitlines(), 1)
    return [f"{path}:{n}: {word} in a config" for n, line in lines for word in UNSAFE_CONFIG if word in line]


def test_configs_name_no_code() -> None:
    names = [name for name in repository_files() if name.endswith((".yaml", ".yml"))]
    assert any(name.startswith("conf/") for name in names)
    findings = [finding for name in names for finding in unsafe_config(name, (ROOT / name).read_text())]
    assert not findings, "\n".join(findings)


def test_unsafe_config_is_seen() -> None:
    assert unsafe_config("a.yaml", "model:\n  _target_: os.system\n") == ["a.yaml:2: _target_ in a config"]
    assert unsafe_config("a.yaml", "key: ${oc.env:HOME}\n")


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "import marshal as m",
        "import shelve",
        "import torch\nx = torch.load(path)",
        "import torch as t\nx = t.load(path, weights_only=True)",
        "from torch import load as fetch",
        "import torch\ntorch.save(x, path)",
        "import torch.distributed as dist\ndist.all_gather_object(out, x)",
        "from torch import distributed\ndistributed.broadcast_object_list(x)",
        "import yaml\nx = yaml.load(text, Loader=yaml.SafeLoader)",
        "from yaml import unsafe_load",
        "x = eval(text)",
        "exec(text)",
        "run = eval\nrun(text)",
        "x = __import__(name)",
        "import os\nos.system(text)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import subprocess\nsubprocess.run(text, shell=flag)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_code_is_seen(text: str) -> None:
    assert list(unsafe_code(Source("dist_llm/data/example.py", text)))


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()",
        "import yaml\nx = yaml.safe_load(text)",
        "import subprocess\nsubprocess.run(words, shell=False)",
        "import torch\ntorch.distributed.all_gather(out, x)",
        "import json\nx = json.load(file)",
    ],
)
def test_safe_code_passes(text: str) -> None:
    assert not list(unsafe_code(Source("dist_llm/data/example.py", text)))


@pytest.mark.parametrize(
    "text",
    [
        "import os\nx = os.environ['RANK']",
        "from os import environ",
        "import os\nx = os.getenv('RANK')",
        "import torch\ntorch.cuda.synchronize()",
        "from torch import cuda",
        "import torch.cuda",
        "import torch.distributed as dist\ndist.init_process_group('gloo')",
        "from torch.distributed.device_mesh import init_device_mesh\ninit_device_mesh('cpu', (2,))",
        "import torch\ntorch.manual_seed(0)",
        "import random\nrandom.seed(0)",
        "import numpy as np\nnp.random.seed(0)",
    ],
)
def test_outside_runtime_is_seen(text: str) -> None:
    assert list(outside_runtime(Source("dist_llm/engine/native.py", text)))
    assert not list(outside_runtime(Source("dist_llm/runtime/process.py", text)))


def test_a_generator_of_ones_own_is_not_a_global_seed() -> None:
    text = "import torch\ngenerator = torch.Generator()\ngenerator.manual_seed(3)"
    assert not list(outside_runtime(Source("dist_llm/models/init.py", text)))


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist",
        "from torch.distributed import P",
        "import torch\ntorch.distributed.barrier()",
    ],
)
def test_distributed_models_is_seen(text: str) -> None:
    assert list(distributed_models(Source("dist_llm/models/mlp.py", text)))
    assert not list(distributed_models(Source("dist_llm/parallel/tensor.py", text)))
