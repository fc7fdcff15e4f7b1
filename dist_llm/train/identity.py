"""What must not change between a checkpoint and the run that resumes from it."""

from __future__ import annotations

from dist_llm.config.run import RunConfig


def identity_of(config: RunConfig, tokenizer_sha256: str, data_fingerprint: str) -> dict[str, object]:
    """Return the JSON-able facts that define the model, the meaning of tokens and the order of samples."""
    facts: dict[str, object] = {f"model.{key}": value for key, value in config.model.model_dump(mode="json").items()}
    facts["tokenizer.sha256"] = tokenizer_sha256
    facts["data.fingerprint"] = data_fingerprint
    facts["data.seq_len"] = config.data.seq_len
    facts["data.global_batch"] = config.data.global_batch
    facts["data.document_mask"] = config.data.document_mask
    facts["data.validation_fraction"] = config.data.validation_fraction
    facts["run.seed"] = config.run.seed
    facts["optimizer.name"] = config.optimizer.name
    facts["precision.master"] = config.precision.master
    return facts


def recipe_of(config: RunConfig) -> dict[str, object]:
    """Return the JSON-able settings that change later steps but not what the checkpoint means; a change is said."""
    return {
        "run.steps": config.run.steps,
        "precision": config.precision.name,
        **{f"optimizer.{key}": value for key, value in config.optimizer.model_dump(mode="json").items()},
        **{f"schedule.{key}": value for key, value in config.schedule.model_dump(mode="json").items()},
    }


def layout_of(config: RunConfig, world_size: int, device: str) -> dict[str, object]:
    """Return the JSON-able facts under which a resume is bit-equal: layout, device, formats, what orders additions.

    However the config spells it: the data axis is derived, and what a layout does not use is left out.
    """
    parallel = config.parallel
    unused = {
        "schedule": parallel.pipeline == 1,
        "context_method": parallel.context == 1,
        "context_heads": parallel.context == 1 or parallel.context_method != "mixed",
        "recompute_operators": parallel.recompute != "selective",
        "recompute_layers": parallel.recompute == "none",
        "compile_backend": not parallel.compile,
        "prefetch": True,  # when something is gathered, not what
    }
    settings = parallel.model_dump(mode="json")
    facts: dict[str, object] = {name: value for name, value in settings.items() if not unused.get(name, False)}
    facts.update(data=world_size // parallel.model_ranks, virtual_pipeline=parallel.chunks)
    facts.update(world_size=world_size, microbatch=config.data.microbatch, engine=config.engine.name)
    facts.update(device=device, compute=config.precision.compute, deterministic=config.run.deterministic)
    return facts
