"""Kill a process (SIGKILL) at every system call of a save or a prune, and look at what is left each time.

Prints, as JSON, how many points there were, which step was the latest after each, and what was wrong.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path

import torch

from dist_llm.checkpoint.inspect import verify
from dist_llm.checkpoint.load import find_latest, load
from dist_llm.checkpoint.retention import prune
from dist_llm.checkpoint.save import save
from dist_llm.checkpoint.storage import list_steps
from tests.unit.checkpoint.synthetic import blank, same_bits, small_state

CALLS = ("open", "write", "fsync", "rename", "mkdir", "close", "scandir", "unlink", "rmdir")


def arm(point: int, torn: bool) -> None:
    """Have this process killed before its call number `point`, or, when torn, half-way through it if it is a write."""
    seen = [0]
    for name in CALLS:
        really = getattr(os, name)

        def counted(*arguments: object, really=really, name=name, **options: object) -> object:
            seen[0] += 1
            if seen[0] == point + 1 and not (torn and name != "write"):
                if torn:
                    fd, content = arguments
                    really(fd, content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return really(*arguments, **options)

        setattr(os, name, counted)


def prepare(scenario: str, template: Path) -> None:
    """Save what stands there before the act."""
    save(template, 1, small_state(1.0))
    if scenario == "save over damage":
        file = save(template, 2, small_state(7.0)) / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    if scenario == "prune":
        save(template, 2, small_state(2.0))
        save(template, 3, small_state(3.0))


def act(scenario: str, root: Path) -> None:
    """Do what is interrupted."""
    if scenario == "prune":
        prune(root, 1)
    else:
        save(root, 2, small_state(2.0))


def killed(scenario: str, root: Path, point: int, torn: bool) -> bool:
    """Act in a child that is to be killed; was it?"""
    child = os.fork()
    if child == 0:
        arm(point, torn)
        act(scenario, root)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def sound(root: Path, path: Path | None) -> bool:
    """Does the latest checkpoint hold exactly what its step's state was?"""
    if path is None:
        return False
    state = small_state(float(int(path.name[-8:])))
    wanted = blank([state])[0]
    return load(path, wanted) == state.facts and same_bits([wanted], [state])


def broken(root: Path) -> list[str]:
    """Return what is wrong with anything that has a committed name."""
    return [problem for _, path in list_steps(root) for problem in verify(path)]


def main(folder: Path, scenario: str) -> None:
    """Try every point until the act ends by itself."""
    template, root = folder / "template", folder / "checkpoints"
    prepare(scenario, template)
    latest: Counter[str] = Counter()
    wrong: list[str] = []
    hits = {False: 0, True: 0}
    for torn in (False,) if scenario == "prune" else (False, True):
        for point in itertools.count():
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(template, root)
            hit = killed(scenario, root, point, torn)
            hits[torn] += hit
            found = find_latest(root, report=lambda line: None)
            latest[found.name[-1] if found else "none"] += 1
            if not sound(root, found) or (scenario != "save over damage" and broken(root)):
                wrong.append(f"point {point} torn {torn}: {found}")
            act(scenario, root)
            after = find_latest(root, report=lambda line: None)
            expected = "step-00000003" if scenario == "prune" else "step-00000002"
            if after is None or after.name != expected or not sound(root, after):
                wrong.append(f"point {point} torn {torn}: then {after}")
            if scenario != "prune" and any(".tmp-" in entry.name for entry in root.iterdir()):
                wrong.append(f"point {point} torn {torn}: leftovers")
            if not hit and point >= hits[False]:
                break
    print(json.dumps({"points": hits[False], "torn writes": hits[True], "latest": latest, "wrong": wrong}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2])
