"""`dist-llm generate`: text from the newest checkpoint of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, Violation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a run folder, a prompt and how to sample."""
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="a run folder such as runs/quickstart")
    parser.add_argument("--prompt", default="", help="text to continue (default: the start of a document)")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="tokens to generate (default 128)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: the likeliest (default 0.8)")
    parser.add_argument("--top-k", type=int, default=50, metavar="K", help="of the K likeliest; 0: of all (default 50)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the sampling (default 0)")
    add_json(parser)


def main(arguments: argparse.Namespace) -> Answer:
    """Generate text from a run."""
    violations = [
        Violation(option, value, rule)
        for option, value, legal, rule in (
            ("--max-tokens", arguments.max_tokens, arguments.max_tokens >= 1, "must be at least 1"),
            ("--temperature", arguments.temperature, 0 <= arguments.temperature <= 1e6, "must be a number from 0 up"),
            ("--top-k", arguments.top_k, arguments.top_k >= 0, "must be at least 0"),
            ("--seed", arguments.seed, 0 <= arguments.seed < 2**63, "must be from 0 to 2^63 - 1"),
        )
        if not legal
    ]
    if violations:
        raise ConfigError(violations)
    from dist_llm.evaluate.generate import generate_text

    text = generate_text(
        arguments.run_dir,
        arguments.prompt,
        arguments.max_tokens,
        arguments.temperature,
        arguments.top_k,
        arguments.seed,
    )
    return Answer(text, {"run": str(arguments.run_dir), "prompt": arguments.prompt, "text": text})


GENERATE = Command("text from a run's newest checkpoint", add_arguments, main)
