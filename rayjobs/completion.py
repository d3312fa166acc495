"""Completion of the command line in a shell: jobs, options, names of configs, keys of settings and their values.

It needs the `completion` extra, and `eval "$(register-python-argcomplete rayjobs)"` in the shell's start-up file. Other
commands do not import it.
"""

import argparse
import glob
import os
from typing import Any, get_args

from rayjobs.config_fields import describe, field_type, is_text, members
from rayjobs.job_help import config_class
from rayjobs.shipped_configs import list_configs


def answer_shell(parser: argparse.ArgumentParser) -> None:
    """Print the completions that the shell asks for, and exit; do nothing if the extra is not installed."""
    try:
        import argcomplete
    except ModuleNotFoundError:
        return
    argcomplete.autocomplete(parser, always_complete_options="long")


def complete_config(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the files, and the names of this package's configs for the job, that begin with a prefix."""
    names = [config.name for config in list_configs() if config.job == parsed_args.job]
    return [name for name in names if name.startswith(prefix)] + _files(prefix)


def complete_setting(prefix: str, parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Return the settings of a job that begin with a prefix: `key=`, or `key=value` once the key is whole."""
    config = config_class(parsed_args.job)
    fields = {field.name: field for field in describe(config)}
    key, equals, value = prefix.partition("=")
    if not equals:
        return [f"{name}=" for name in fields if name.startswith(prefix)]
    if key not in fields:
        return []
    kinds = members(field_type(config, key.split(".")))
    values = [str(one) for kind in kinds if is_text(kind) for one in get_args(kind)]
    values += ["true", "false"] if bool in kinds else []
    if "path" in fields[key].type or "file" in fields[key].type:
        values += _files(value)
    return [f"{key}={one}" for one in values if one.startswith(value)]


def _files(prefix: str) -> list[str]:
    """Return the files, and the folders with a slash, that begin with a prefix."""
    return [f"{path}/" if os.path.isdir(path) else path for path in sorted(glob.glob(f"{glob.escape(prefix)}*"))]
