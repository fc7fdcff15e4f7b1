"""When and what to save and restore: engine state, RNG state, tokens seen, identity and layout in one checkpoint.

A step that is skipped may follow an update that ruined the weights: none of an interval is saved at one, and nothing is
deleted, so that of two that are kept one is from before. Nothing is deleted before those that stay were read back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist

from dist_llm.checkpoint.agreement import connect, lead, together
from dist_llm.checkpoint.inspect import read_manifest
from dist_llm.checkpoint.load import find_latest, load, shared_problem
from dist_llm.checkpoint.manifest import check_identity
from dist_llm.checkpoint.retention import prune, sound_checkpoints
from dist_llm.checkpoint.save import save
from dist_llm.checkpoint.storage import list_steps, step_directory
from dist_llm.config.operations import CheckpointConfig
from dist_llm.engine.base import Engine
from dist_llm.errors import ConfigError, Violation
from dist_llm.runtime.seed import generator_state, set_generator_state
from dist_llm.types import StepRecord, TensorShard, TrainState


@dataclass
class Checkpoints:
    """The checkpoints of one run, under `root`; `group` is a CPU group over all ranks."""

    root: Path
    config: CheckpointConfig
    engine: Engine
    group: dist.ProcessGroup
    identity: dict[str, object]
    layout: dict[str, object]
    recipe: dict[str, object]
    report: Callable[[int], None]
    warn: Callable[[str], None]
    saved_step: int = field(default=-1)
    skipped_in_a_row: int = field(default=0)
    _due: bool = field(default=False)
    _is_sound: dict[Path, bool] = field(default_factory=dict)

    def _state(self, tokens: int, with_rng: bool) -> TrainState:
        state = self.engine.state()
        tensors = list(state.tensors)
        if with_rng:
            for name, value in generator_state().items():
                key = f"rng.{name}.rank-{dist.get_rank()}"
                tensors.append(TensorShard(key, tuple(value.shape), (0,) * value.dim(), value, True))
        facts = {
            **state.facts,
            "tokens": tokens,
            "skipped_in_a_row": self.skipped_in_a_row,
            "identity": self.identity,
            "layout": self.layout,
            "recipe": self.recipe,
        }
        return TrainState(tuple(tensors), facts)

    def after_step(self, record: StepRecord) -> None:
        """Save when the interval says so, or at the first step after it that is not skipped (a hook of the loop)."""
        self._due |= bool(self.config.interval) and record.step % self.config.interval == 0
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if record.skipped else 0
        if self._due and not record.skipped:
            self.save(record.step, record.tokens)

    def save(self, step: int, tokens: int, hurried: bool = False) -> None:
        """Commit a checkpoint of `step` once, then prune, unless it must be quick: a stopped rank may soon be killed.

        Every rank calls it; collectives over the control group.
        """
        if step == self.saved_step:
            return
        save(self.root, step, self._state(tokens, with_rng=True), self.group)
        self.saved_step, self._due = step, False
        self._is_sound.pop(step_directory(self.root, step), None)
        self.report(step)
        if not (self.skipped_in_a_row or hurried):
            self._prune()

    def _prune(self) -> None:
        """Delete what is older than the `keep` newest that were read back, once each; every rank hashes its share."""
        channel, root, keep = connect(self.group), self.root, self.config.keep
        names = lead(channel, lambda: [path.name for path in sound_checkpoints(root)])
        if len(names) <= keep:
            return
        kept: list[Path] = []
        for path in (root / name for name in names):
            if len(kept) < keep and self._reads_back(path):
                kept.append(path)
        if len(kept) == keep:
            rejected = {path for path, is_sound in self._is_sound.items() if not is_sound}
            lead(channel, lambda: prune(root, keep, checked=kept[0], rejected=rejected) and None)

    def _reads_back(self, path: Path) -> bool:
        """Say whether every byte of a checkpoint is as it was saved, looking once. Collectives if it is new."""
        if path not in self._is_sound:
            problem = shared_problem(connect(self.group), path)
            self._is_sound[path] = problem is None
            if problem is not None:
                self.warn(f"{path.name} cannot be read back and does not count as kept: {problem}")
        return self._is_sound[path]

    def restore(self, must: bool) -> tuple[int, int]:
        """Load the newest sound checkpoint; return (steps done, tokens seen), zeros when there is none.

        CheckpointMismatch when it is of another model, tokenizer or data; RNG state returns on the same layout only.
        """
        path = find_latest(self.root, self.group)
        saved = together(connect(self.group), lambda: self._read_facts(path, must))
        if path is None:
            return 0, 0
        # Newer ones were passed over; what could not be read then stays out, even if it can be read later.
        names = lead(connect(self.group), lambda: [newer.name for _, newer in list_steps(self.root)])
        self._is_sound = {self.root / name: False for name in names if name > path.name} | {path: True}
        self._say_engine(_mapping(saved.get("layout")))
        changed = self._say_changes(_mapping(saved.get("recipe")))
        same_layout = saved.get("layout") == self.layout
        state = self._state(0, with_rng=same_layout)
        facts = load(path, state, self.group, partial=not same_layout)
        self.engine.restore(facts)
        if same_layout:
            prefix, suffix = "rng.", f".rank-{dist.get_rank()}"
            rng = {s.name[len(prefix) : -len(suffix)]: s.data for s in state.tensors if s.name.startswith(prefix)}
            set_generator_state(rng)
        elif self.identity.get("model.attention_dropout"):
            self.warn("resuming on another layout: attention dropout goes on with other random numbers")
        step, tokens = int(str(facts["step"])), int(str(facts["tokens"]))
        self.saved_step = step
        self.skipped_in_a_row = 0 if changed else int(str(facts.get("skipped_in_a_row", 0)))
        return step, tokens

    def _read_facts(self, path: Path | None, must: bool) -> Mapping[str, object]:
        """Return the facts of the checkpoint to resume from, none where there is none, if it is this run's."""
        if path is None:
            if must:
                rule = f"goes on from a checkpoint, and {self.root} holds none"
                raise ConfigError([Violation("run.resume", "must", rule, ("auto",))])
            return {}
        facts = read_manifest(path)[0].facts
        check_identity(
            _mapping(facts.get("identity")),
            self.identity,
            f"the run in {self.root.parent} (another run.name starts another)",
        )
        return facts

    def _say_engine(self, before: dict[str, object]) -> None:
        """Say that another engine goes on, if one does."""
        one, other = before.get("engine"), self.layout.get("engine")
        if one is not None and one != other:
            self.warn(f"resuming on another engine: {one} -> {other}; the same weights, optimizer state and data")

    def _say_changes(self, before: dict[str, object]) -> bool:
        """Warn of what is set otherwise than before, if anything is."""
        changed = [key for key, value in self.recipe.items() if before.get(key) != value]
        if changed:
            words = ", ".join(f"{key} {before.get(key)} -> {self.recipe[key]}" for key in changed)
            self.warn(f"resuming with another recipe, later steps will differ: {words}")
        return bool(changed)


def _mapping(value: object) -> dict[str, object]:
    return dict(value) if isinstance(value, dict) else {}
