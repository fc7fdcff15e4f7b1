"""Text from a run's newest checkpoint, in one process on whatever layout it was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dist_llm.checkpoint.load import find_latest, load
from dist_llm.config.decode import decode
from dist_llm.config.document import read_document
from dist_llm.config.run import RunConfig
from dist_llm.data.tokenizer import Tokenizer
from dist_llm.errors import CheckpointError, ConfigError
from dist_llm.models.transformer import Transformer
from dist_llm.types import TensorShard, TrainState


def read_run(run_dir: Path) -> RunConfig:
    """Return the config that a run folder holds; StorageError when it cannot be read."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise ConfigError(
            f"{run_dir} is not the folder of a run: it holds no config.yaml; name one such as runs/default"
        )
    return decode(read_document(path))


def load_model(run_dir: Path) -> Transformer:
    """Return the model of a run's newest sound checkpoint on the CPU in fp32, ready for inference."""
    config = read_run(run_dir)
    path = find_latest(run_dir / "checkpoints")
    if path is None:
        raise CheckpointError(f"{run_dir / 'checkpoints'} holds no checkpoint")
    model = Transformer(config.model).to(torch.float64 if config.precision.master == "fp64" else torch.float32)
    shards = tuple(
        TensorShard(f"model.{name}", tuple(value.shape), (0,) * value.dim(), value.detach(), True)
        for name, value in (*model.named_parameters(), *model.named_buffers())
    )
    load(path, TrainState(shards), partial=True)
    return model.float().eval()


def _next_token(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    values, tokens = logits.topk(min(top_k, logits.numel()) if top_k > 0 else logits.numel())
    probabilities = torch.softmax(values / temperature, dim=-1)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


@torch.no_grad()
def generate_text(
    run_dir: Path, prompt: str, max_tokens: int, temperature: float = 0.8, top_k: int = 40, seed: int = 0
) -> str:
    """Return the prompt and up to `max_tokens` sampled tokens after it; temperature 0 takes the likeliest.

    An empty prompt starts from the end-of-document token, and generation ends with the next one.
    """
    model = load_model(run_dir)
    tokenizer = Tokenizer.load(run_dir / "tokenizer.model")
    generator = torch.Generator().manual_seed(seed)
    tokens = tokenizer.encode(prompt) or [tokenizer.eos_id]
    begun = len(tokens)
    for _ in range(max_tokens):
        window = torch.tensor([tokens[-model.config.max_seq_len :]])
        token = _next_token(model(window)[0, -1], temperature, top_k, generator)
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    written = tokens[1:] if tokens[0] == tokenizer.eos_id and begun == 1 else tokens
    return tokenizer.decode(written)
