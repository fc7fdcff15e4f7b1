"""The steps of DeepSpeed and of transformers + accelerate that peers.py times, set up as their guides say.

    deepspeed      deepspeed.initialize on the model of peers_model.py; ZeRO 1 over dp where ours has it
    transformers   its own GPT-2 or Llama of the same shape in accelerate's loop. Its GPT-2 has LayerNorm and biases
                   whatever our model has: of all that are timed it alone does not compute quite the same

The update is torch's fused AdamW, as in plain PyTorch.
"""

from __future__ import annotations

import importlib
import math
import os
from typing import Any

import torch
from torch import nn

from benchmarks.peers_model import PlainTransformer
from benchmarks.peers_steps import (
    CannotRunError,
    Contestant,
    build_adamw,
    fill,
    microbatches,
    require_only_data,
)
from dist_llm.config.model import ModelConfig
from dist_llm.config.run import RunConfig
from dist_llm.runtime.mesh import Mesh
from dist_llm.runtime.variables import lend_variables
from dist_llm.types import Batch, DataSlice


def imported(name: str) -> Any:
    """Return a package's module. Raises CannotRunError where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotRunError(f"{error.name or name} is not installed") from error


def _variables(mesh: Mesh) -> dict[str, str]:
    """Return what a launcher tells ranks, to libraries that ask; the group is there, so nothing listens on the port."""
    rank, size = str(mesh.world.index), str(mesh.world.size)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, **place}


def build_deepspeed(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return the step of DeepSpeed's engine."""
    require_only_data(config, "DeepSpeed")
    data = config.data
    count = data.global_batch // mesh.dp.size // data.microbatch
    with lend_variables({"DS_ACCELERATOR": "cpu", **_variables(mesh)}):
        deepspeed = imported("deepspeed")
        # Said to be none: asking runs a compiler for minutes, for collectives that training does not use.
        deepspeed.ops.__dict__["__compatible_ops__"] = {}
        model = PlainTransformer(config.model)
        fill(model, config.model, config.run.seed)
        size = sum(weight.numel() for weight in model.parameters())
        settings = {
            "train_micro_batch_size_per_gpu": data.microbatch,
            "gradient_accumulation_steps": count,
            "gradient_clipping": config.optimizer.clip_norm,
            "steps_per_print": 2**31,
            # One bucket, as its default makes of a model of this size, without memory for 5e8 elements.
            "zero_optimization": {"stage": config.parallel.zero, "reduce_bucket_size": 2 * size},
        }
        engine = deepspeed.initialize(model=model, optimizer=build_adamw(model, config), config=settings)[0]

    def step(batch: Batch) -> float:
        total = torch.zeros(())
        for tokens, targets in microbatches(batch, data.microbatch):
            loss = engine(tokens, targets)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        return float(total) / count

    return Contestant(DataSlice(mesh.dp.index, mesh.dp.size), step, mesh.dp.size == 1)


def _transformer(model: ModelConfig) -> nn.Module:
    """Return transformers' model of the same shape."""
    transformers = imported("transformers")
    shape: dict[str, Any] = {"vocab_size": model.vocab_size, "tie_word_embeddings": model.tie_embeddings}
    shape |= {"use_cache": False, "bos_token_id": None, "eos_token_id": None, "initializer_range": model.init_std}
    if model.position == "learned":
        sizes = {"n_positions": model.max_seq_len, "n_embd": model.hidden_size, "n_layer": model.num_layers}
        sizes |= {"n_head": model.num_heads, "n_inner": model.ffn_hidden_size}
        drops = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        settings = transformers.GPT2Config(**shape, **sizes, **drops, attn_implementation="sdpa")
        return transformers.GPT2LMHeadModel(settings)
    settings = transformers.LlamaConfig(
        **shape,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_seq_len,
        rms_norm_eps=model.norm_eps,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(settings)


def build_transformers(config: RunConfig, mesh: Mesh) -> Contestant:
    """Return the step of accelerate's loop over transformers' model."""
    require_only_data(config, "accelerate")
    accelerate = imported("accelerate")
    data = config.data
    count = data.global_batch // mesh.dp.size // data.microbatch
    torch.manual_seed(config.run.seed)
    whole = _transformer(config.model).train()
    # Left there: accelerate asks for them again in its steps.
    os.environ.update(_variables(mesh) if mesh.world.size > 1 else {})
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=count)
    model, optimizer = accelerator.prepare(whole, build_adamw(whole, config))

    def step(batch: Batch) -> float:
        total = torch.zeros(())
        for tokens, _ in microbatches(batch, data.microbatch):
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        return float(total) / count if math.isfinite(total) else math.nan

    return Contestant(DataSlice(mesh.dp.index, mesh.dp.size), step)
