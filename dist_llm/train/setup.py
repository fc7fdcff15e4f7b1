"""Bring a run up and through: process -> mesh -> engine -> data -> restore -> loop. RunConfig stops here."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from dist_llm.accounting.flops import step_flops
from dist_llm.checkpoint.agreement import Channel, connect, each, lead, together
from dist_llm.checkpoint.manifest import check_identity
from dist_llm.config.decode import decode
from dist_llm.config.document import read_document
from dist_llm.config.run import RunConfig
from dist_llm.data.indexed import IndexedDataset
from dist_llm.data.loader import Split, TokenLoader
from dist_llm.data.prepare import prepare
from dist_llm.data.prepared import PreparedData
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.engine.build import build_engine
from dist_llm.errors import ConfigError, DataError, DistLLMError, ExitCode, Violation, exit_code_of
from dist_llm.runtime.device import peak_memory_gib
from dist_llm.runtime.log import get_logger
from dist_llm.runtime.mesh import build_control_group, build_mesh
from dist_llm.runtime.process import is_peer_loss, start_process, stop_process
from dist_llm.runtime.ranks import RankInfo
from dist_llm.runtime.seed import set_determinism
from dist_llm.telemetry.live import LiveLine
from dist_llm.telemetry.meters import Meter
from dist_llm.telemetry.records import CONFIG_FILE, REPORT_FILE, EventKind, RunFiles, read_metrics
from dist_llm.telemetry.tensorboard import TensorBoard
from dist_llm.telemetry.wandb import WandB
from dist_llm.train.checkpoints import Checkpoints
from dist_llm.train.evaluation import Evaluation
from dist_llm.train.foresight import write_prediction
from dist_llm.train.identity import identity_of, layout_of, recipe_of
from dist_llm.train.interrupt import Interruption
from dist_llm.train.lock import lock_run
from dist_llm.train.loop import Hook, Span, loop
from dist_llm.train.numerics import NumericsGuard
from dist_llm.train.peak import peak_flops
from dist_llm.types import StepRecord

log = get_logger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code, and whether it is done and its report is still to be written."""

    code: ExitCode
    report_due: bool


def run(config: RunConfig, config_yaml: str, ranks: RankInfo) -> Outcome:
    """Train as configured, as one rank of `ranks`, and return how it ended; errors are raised.

    config_yaml is the resolved config as text, kept in the run folder. Collectives: those of the engine, and over a CPU
    control group those of saving and one flag a step.
    """
    device = start_process(ranks, config.device, config.launcher.timeout_seconds, config.launcher.threads)
    try:
        # Only attention dropout draws from torch's own stream: ranks hold other samples or heads and must not share it.
        set_determinism((config.run.seed + ranks.rank) % 2**63, config.run.deterministic)
        control = build_control_group(config.launcher.timeout_seconds)
        # Whoever prepares says so; that the others wait, only rank 0's log shows.
        say = log.info if ranks.rank == 0 else log.warning
        data, tokenizer, size = config.data, config.tokenizer, config.model.vocab_size
        prepared = together(connect(control), lambda: prepare(data, tokenizer, size, say, log.info))
        require_same_data(connect(control), prepared)
        with contextlib.closing(_Run(config, config_yaml, ranks, prepared, device, control)) as started:
            return started.train()
    finally:
        stop_process()


def require_same_data(channel: Channel, prepared: PreparedData) -> None:
    """Raise DataError on every rank unless all prepared the same tokens: each lists the corpus for itself.

    Collectives: a gather and two broadcasts.
    """
    found = each(channel, lambda: [prepared.fingerprint, prepared.tokenizer_sha256])

    def compare() -> None:
        others = [str(rank) for rank, facts in enumerate(found) if facts != found[0]]
        if others:
            whose = f"rank{'s' * (len(others) > 1)} {', '.join(others[:8])}{' and more' * (len(others) > 8)}"
            raise DataError(f"data.path held other text for {whose} than for rank 0; keep it unchanged and start again")

    lead(channel, compare)


class _Run:
    """One run on one rank, from its parts to its exit code."""

    def __init__(
        self,
        config: RunConfig,
        config_yaml: str,
        ranks: RankInfo,
        prepared: PreparedData,
        device: torch.device,
        control: dist.ProcessGroup,
    ) -> None:
        self._config, self._control, self._device, self._nodes = config, control, device, ranks.nodes
        self._channel = connect(control)
        self._leads = dist.get_rank() == 0
        self._dir = config.run.folder
        self._interruption = Interruption(control)
        self._files: RunFiles | None = None
        lead(self._channel, lambda: self._claim(config_yaml, prepared))
        mesh = build_mesh(config.parallel, device, config.launcher.timeout_seconds)
        self._engine = build_engine(config, mesh)
        self._loaders = together(self._channel, lambda: self._open_data(prepared))
        self._checkpoints = Checkpoints(
            root=self._dir / "checkpoints",
            config=config.checkpoint,
            engine=self._engine,
            group=control,
            identity=identity_of(config, prepared.tokenizer_sha256, prepared.fingerprint),
            layout=layout_of(config, dist.get_world_size(), self._device.type),
            recipe=recipe_of(config),
            warn=self._say,
            report=lambda step: self._event("save", step, "committed"),
        )

    def _claim(self, config_yaml: str, prepared: PreparedData) -> None:
        """Take the run folder for this run (rank 0): refuse another live run, or any run under resume=never."""
        self._lock = lock_run(self._dir)
        holds_run = any((self._dir / name).exists() for name in ("metrics.jsonl", "checkpoints"))
        if self._config.run.resume == "never" and holds_run:
            rule = f"starts afresh, and {self._dir} already holds a run; name another run.name or resume"
            raise ConfigError([Violation("run.resume", "never", rule, ("auto", "must"))])
        self._require_same_run(prepared)
        self._config_yaml, self._prepared = config_yaml, prepared

    def _require_same_run(self, prepared: PreparedData) -> None:
        """Refuse to go on with a run of another model or data, though it left no checkpoint. CheckpointMismatch."""
        if not read_metrics(self._dir):
            return
        try:
            before = decode(read_document(self._dir / CONFIG_FILE))
        except DistLLMError:
            return
        facts = (prepared.tokenizer_sha256, prepared.fingerprint)
        check_identity(
            identity_of(before, *facts),
            identity_of(self._config, *facts),
            f"the run in {self._dir} (another run.name starts another)",
        )

    def _open_data(self, prepared: PreparedData) -> dict[Split, TokenLoader]:
        """Return the readers of this process's share of the batches: of training and, where kept apart, validation."""
        config, mine = self._config, self._engine.data_slice
        dataset, eos = IndexedDataset(prepared.prefix), Tokenizer.load(prepared.tokenizer_path).eos_id
        splits: tuple[Split, ...] = ("train", "validation") if config.data.validation_fraction > 0 else ("train",)
        return {
            split: TokenLoader(dataset, config.data, config.run.seed, mine, eos, config.model.vocab_size, split)
            for split in splits
        }

    def _event(self, kind: EventKind, step: int, reason: str, **facts: object) -> None:
        files = self._files
        if files is not None:
            self._interruption.attempt(lambda: files.event(kind, step, reason, **facts))

    def train(self) -> Outcome:
        """Restore, loop, save; DONE, or PREEMPTED when a signal ended the run early."""
        config = self._config
        done, tokens = self._checkpoints.restore(must=config.run.resume == "must")
        if done >= config.run.steps and done:
            log.info("run %s is done: step %d of %d, %s", config.run.name, done, config.run.steps, self._dir)
            return Outcome(ExitCode.DONE, report_due=not (self._dir / REPORT_FILE).is_file())
        self._step = done
        lead(self._channel, self._open_files)
        layout = layout_of(config, dist.get_world_size(), self._device.type)
        reason = f"from checkpoint {done}" if done else "no checkpoint"
        self._event("resume" if done else "start", done, reason, layout=layout)
        count = self._channel.size
        self._say(f"run {config.run.name}: step {done} of {config.run.steps} on {count} ranks, {self._dir}")
        try:
            reached = self._loop(done, tokens)
        except BaseException as error:
            code = exit_code_of(error, is_peer_loss)
            self._event("fault", self._step, f"{type(error).__name__}: {error}", code=int(code))
            raise
        finished = reached >= config.run.steps
        outcome = Outcome(ExitCode.DONE if finished else ExitCode.PREEMPTED, finished)
        reason = "all steps done" if finished else "asked to stop by a signal"
        self._event("stop", reached, reason, code=int(outcome.code))
        self._interruption.raise_failure()
        return outcome

    def _loop(self, done: int, tokens: int) -> int:
        """Train from step `done` until the end or a signal, save, and return the step that was reached."""
        with contextlib.ExitStack() as closers:
            meter = self._meter(tokens)
            so_far = self._checkpoints.skipped_in_a_row
            guard = NumericsGuard(self._config.precision.max_skipped_steps, self._event, so_far)
            shown = together(self._channel, lambda: self._rank_0_hooks(done, closers))
            hooks: list[Hook] = [self._note_step, *map(self._interruption.shield, shown), guard.after_step]
            hooks += [*self._evaluation(), self._checkpoints.after_step]
            span = Span(done, self._config.run.steps)
            reached = loop(self._engine, self._loaders["train"], span, meter, hooks, self._interruption.agreed)
            self._checkpoints.save(reached, meter.tokens, hurried=reached < self._config.run.steps)
        return reached

    def close(self) -> None:
        """Give back the signals and close what is open; a failed run has not opened everything."""
        self._interruption.close()
        self._engine.close()
        if self._files is not None:
            self._files.close()

    def _open_files(self) -> None:
        self._files = RunFiles(self._dir)
        self._files.write_config(self._config_yaml)
        if self._config.cluster.device == self._device.type:
            write_prediction(self._config, dist.get_world_size(), self._dir)
        (self._dir / REPORT_FILE).unlink(missing_ok=True)
        shutil.copyfile(self._prepared.tokenizer_path, self._dir / "tokenizer.model")

    def _note_step(self, record: StepRecord) -> None:
        self._step = record.step

    def _say(self, message: str) -> None:
        if self._leads:
            log.info(message)

    def _meter(self, tokens: int) -> Meter:
        config = self._config
        peak = peak_flops(config, self._device.type, dist.get_world_size(), self._nodes)
        flops = step_flops(config.model, config.data.seq_len, config.data.global_batch)
        per_token = flops / (config.data.seq_len * config.data.global_batch)
        device = self._device
        return Meter(per_token, peak, lambda: peak_memory_gib(device), tokens)

    def _rank_0_hooks(self, done: int, closers: contextlib.ExitStack) -> list[Hook]:
        """Return the hooks that write and show, to be closed by `closers`; other ranks have none."""
        files, telemetry = self._files, self._config.telemetry
        if files is None:
            return []
        live = LiveLine(self._config.run.steps, telemetry.log_interval)
        closers.callback(live.close)
        hooks: list[Hook] = [files.record, live]
        if telemetry.tensorboard:
            board = TensorBoard(self._dir, done + 1)
            closers.callback(board.close)
            hooks.append(board)
        if telemetry.wandb:
            tracker = WandB(self._dir, self._config.model_dump(mode="json"))
            closers.callback(tracker.close)
            hooks.append(tracker)
        return hooks

    def _evaluation(self) -> list[Hook]:
        telemetry = self._config.telemetry
        if not telemetry.eval_interval or "validation" not in self._loaders:
            return []
        report: Callable[[StepRecord, float, int], None] = self._report_validation
        source = self._loaders["validation"]
        return [Evaluation(self._engine, source, telemetry.eval_interval, telemetry.eval_batches, report).after_step]

    def _report_validation(self, record: StepRecord, loss: float, tokens: int) -> None:
        self._say(f"step {record.step}: validation loss {loss:.4f}")
        files = self._files
        if files is not None:
            self._interruption.attempt(lambda: files.validation(record.step, loss, tokens))
