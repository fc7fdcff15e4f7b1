"""`dist-llm config`: what can be configured: presets, settings, the schema for editors, the rules across settings."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dist_llm.cli.parse import Answer, Command, add_json
from dist_llm.errors import ConfigError, StorageError


def add_presets_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the name of a group."""
    parser.add_argument("group", nargs="?", metavar="GROUP", help="one group, such as model (default: all)")
    add_json(parser)


def presets(arguments: argparse.Namespace) -> Answer:
    """List the presets of one group or of all."""
    from dist_llm.cli.compose import list_presets

    found = list_presets()
    if arguments.group is not None:
        if arguments.group not in found:
            raise ConfigError(f"{arguments.group!r} is not a group of presets; use one of {', '.join(found)}")
        found = {arguments.group: found[arguments.group]}
    lines = [f"{group}= {' '.join(names)}" for group, names in found.items()]
    return Answer("\n".join(lines), {group: list(names) for group, names in found.items()})


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Take what to look for, and the form to print in."""
    parser.add_argument(
        "text", nargs="?", metavar="TEXT", help="only settings whose key or description contains TEXT (default: all)"
    )
    parser.add_argument("--markdown", action="store_true", help="print the page docs/reference/settings.md")
    add_json(parser)


def settings(arguments: argparse.Namespace) -> Answer:
    """Print what settings take, what they are by default and what they mean."""
    from dist_llm.config.keys import closest_key
    from dist_llm.config.reference import list_settings, settings_page

    text = arguments.text or ""
    if arguments.markdown and text:
        raise ConfigError(f"--markdown prints the whole page: leave {text!r} out")
    found = list_settings(text)
    if not found:
        near = closest_key(text)
        hint = f"did you mean {near}?" if near and list_settings(near) else "dist-llm config settings prints them all"
        raise ConfigError(f"no setting has {text!r} in its key or description: {hint}")
    data = {"settings": [setting.as_json() for setting in found]}
    if arguments.markdown:
        return Answer(settings_page().rstrip(), data)
    return Answer("\n".join(str(setting) for setting in found), data)


def add_schema_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a file to write to."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the schema there (default: stdout)")
    add_json(parser)


def schema(arguments: argparse.Namespace) -> Answer:
    """Export the JSON schema of a config file."""
    from dist_llm.config.reference import json_schema

    tree = json_schema()
    if arguments.output is None:
        return Answer(json.dumps(tree, indent=2), tree)
    try:
        arguments.output.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {arguments.output}: {error.strerror}") from error
    return Answer(f"wrote {arguments.output}", {"output": str(arguments.output)})


def add_rules_arguments(parser: argparse.ArgumentParser) -> None:
    """Take the form to print in."""
    parser.add_argument("--markdown", action="store_true", help="print the page docs/reference/layout-rules.md")
    add_json(parser)


def rules(arguments: argparse.Namespace) -> Answer:
    """Print the rules across settings that every config is checked against."""
    from dist_llm.config.checks import RULES
    from dist_llm.config.reference import rules_page

    data = {"rules": [{"name": rule.name, "keys": list(rule.keys), "statement": rule.statement} for rule in RULES]}
    if arguments.markdown:
        return Answer(rules_page().rstrip(), data)
    return Answer("\n".join(f"{rule.name}: {rule.statement}" for rule in RULES), data)


COMMANDS = {
    "presets": Command("the presets of every group: model=..., cluster=..., ...", add_presets_arguments, presets),
    "settings": Command("every setting: what it takes, its default, what it means", add_settings_arguments, settings),
    "schema": Command("the JSON schema of a config file, for editors", add_schema_arguments, schema),
    "rules": Command("the rules that settings must keep together", add_rules_arguments, rules),
}
