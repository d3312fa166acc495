"""The command line: rayjobs JOB --config FILE [section.key=value …] [--dry-run | --submit]."""

# PYTHON_ARGCOMPLETE_OK

import argparse
import difflib
import importlib
import logging
import os
import re
import select
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import rayjobs
from rayjobs.cluster.environment import set_auth_mode, set_environment
from rayjobs.cluster.job_submission import cluster_environment, job_command, ray_submit_command, submit
from rayjobs.cluster.ray_init import INTERRUPTED, end_at_next_interrupt, handle_interrupts
from rayjobs.config import iter_paths, load, replace_paths
from rayjobs.console import printable, setup_logging, show_table
from rayjobs.errors import UserError, describe_error, is_user_error
from rayjobs.job_help import config_class, description, settings_help
from rayjobs.runs.record import find_runs
from rayjobs.shipped_configs import copy_config, list_configs
from rayjobs.storage.hub import pin
from rayjobs.storage.paths import check_reachable, resolve_path
from rayjobs.train.start_times import begin_command

logger = logging.getLogger("rayjobs")

DONE, DIFFERENT, USER_ERROR, READER_LEFT = 0, 1, 2, 141
"""Exit codes, beside INTERRUPTED. DIFFERENT is that of `verify` for a run that is not as its record says; READER_LEFT
is the one that shells give to a program whose output nobody reads any more. Any other exception keeps its traceback,
and Python then exits with 1."""

JOBS = {
    "adapter-train": "train an adapter on a frozen decoder, on instruction records",
    "adapter-eval": "measure held-out loss, answers, or ScienceQA accuracy, with or without an adapter",
    "adapter-harness": "run tasks of lm-evaluation-harness, with or without an adapter",
    "adapter-judge": "let a language model compare the answers of two runs, pair by pair",
    "adapter-tune": "sweep the settings of adapter-train: the paper's ablations, or a search",
    "adapter-generate": "generate responses to one instruction, to a file of them, or interactively",
    "adapter-export": "write an adapter in the official v1 format, litgpt's or PEFT's",
    "adapter-push": "upload a trained adapter and its model card to the Hugging Face hub",
    "cafo-prompt": "describe a data set's classes with a language model",
    "cafo-generate": "generate training images of a data set's classes, and keep the best by CLIP",
    "cafo-features": "encode a data set's images once, for all later runs",
    "cafo-tune": "train caches over a search space, and choose hyperparameters on the validation split",
    "cafo-eval": "measure the chosen caches on the test split, which is read once",
    "cafo": "run CaFo from end to end: descriptions, generated images, features, tuning, test accuracy",
    "cafo-inspect": "explain a chosen classifier, find wrong labels and duplicates, say what to label next",
    "cafo-predict": "label any number of images with a chosen classifier",
    "serve": "serve a base, many adapters and saved classifiers by the OpenAI API",
    "demo": "run both methods on tiny models and data, offline, on two cores",
}
COMMANDS = (*JOBS, "report", "runs", "verify", "configs", "example-data")
"""The jobs, and the commands that run none."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code: 0 done, 2 an error that the user can correct, 130 interrupted."""
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how its line may go on
        _answer_shell()
    handle_interrupts()
    args = parse_arguments(argv)
    set_environment(show_library_output=args.verbose)  # before Ray and DeepSpeed are imported, which read it
    setup_logging()
    try:
        code = args.command(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        logger.error("\nrayjobs %s: interrupted; the same command resumes it", args.job)
        end_at_next_interrupt()
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return READER_LEFT
        if not is_user_error(error):
            raise
        if args.verbose:
            logger.error("%s", traceback.format_exc())
        message = describe_error(error)
        if str(Path("examples").absolute()) in message and not Path("examples").exists():
            message += "; `rayjobs example-data` makes ./examples"
        for line in message.splitlines():
            logger.error("rayjobs %s: error: %s", args.job, line)
        return USER_ERROR


def _reader_has_left() -> bool:
    """Return whether the program that reads our output, such as `head`, has ended. What is left is then discarded."""
    try:
        output = sys.stdout.fileno()
    except (AttributeError, OSError):  # there is no output, or it is kept in memory
        return False
    poll = select.poll()
    poll.register(output, select.POLLOUT)
    left = any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    if left:
        with open(os.devnull, "wb") as nothing:
            os.dup2(nothing.fileno(), output)
    return left


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all jobs and of the commands that run nothing."""
    parser = argparse.ArgumentParser(prog="rayjobs", description=__doc__)
    parser.add_argument("--version", action="version", version=f"rayjobs {rayjobs.__version__}")
    commands = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, summary in JOBS.items():
        job = commands.add_parser(name, help=summary, add_help=False)
        job.add_argument("-h", "--help", action="store_true", help="show this help with every setting, and exit")
        job.add_argument(
            "--config", metavar="FILE", help="YAML file of settings, or a name that `rayjobs configs` lists"
        )
        job.add_argument("--dry-run", action="store_true", help="check everything and show the plan, without running")
        job.add_argument(
            "--submit",
            action="store_true",
            help="run on a cluster, as `ray job submit` does, and wait for the end; with --dry-run, show the command",
        )
        job.add_argument("--verbose", action="store_true", help="show the output of Ray and DeepSpeed, and tracebacks")
        job.add_argument(
            "overrides",
            nargs="*",
            metavar="section.key=value",
            help="settings that override the file's; text is taken as it is typed, any other value is YAML",
        )
        job.set_defaults(command=run_job, parser=job)
    report = commands.add_parser("report", help="write a run's report.html again, or compare several runs on one page")
    report.add_argument("run", nargs="+", help="folder of a run")
    report.add_argument("--out", type=Path, default=Path("comparison.html"), help="page that compares several runs")
    report.set_defaults(command=show_report, parser=report, verbose=False)
    runs = commands.add_parser("runs", help="list runs with their state and result")
    runs.add_argument("storage", nargs="?", default="runs", help="folder of all runs")
    runs.set_defaults(command=list_runs, parser=runs, verbose=False)
    check = commands.add_parser("verify", help="check a finished run's files, and make a part of its training again")
    check.add_argument("run", help="folder of a run")
    check.add_argument("--step", type=int, help="checkpoint from which to train up to the next; 0 for the beginning")
    check.set_defaults(command=verify_run, parser=check, verbose=False)
    configs = commands.add_parser("configs", help="list the configs of this package, or copy one")
    configs.add_argument("action", nargs="?", choices=("list", "copy"), default="list", help="what to do")
    configs.add_argument("name", nargs="?", help="config to copy")
    configs.add_argument("to", nargs="?", type=Path, default=Path(), help="file or folder of the copy; by default here")
    configs.set_defaults(command=show_configs, parser=configs, verbose=False)
    examples = commands.add_parser(
        "example-data", help="write what the documents' examples need: records, photos, a tiny base and CLIP; a minute"
    )
    examples.add_argument("folder", nargs="?", type=Path, default=Path("examples"), help="folder to write them into")
    examples.set_defaults(command=write_examples, parser=examples, verbose=False)
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line, with overrides before or after the options."""
    parser, words = build_parser(), list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] not in (*COMMANDS, "-h", "--help", "--version"):
        parser.error(_describe_wrong_job(words))
    args, rest = parser.parse_known_args(words)  # argparse leaves the overrides that follow an option
    takes_overrides = args.job in JOBS
    if unknown := [word for word in rest if word.startswith("-") or not takes_overrides]:
        own: argparse.ArgumentParser = args.parser
        close = difflib.get_close_matches(unknown[0], re.findall(r"--[\w-]+", own.format_help()), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if takes_overrides and not close:
            hint = "; settings are given as section.key=value, without dashes"
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if takes_overrides:
        args.overrides += rest
    return args


def _describe_wrong_job(words: Sequence[str]) -> str:
    """Say that a command line names no job, with the closest or, if none is close, all of them."""
    if not words:
        return f"no job is named: give one of {', '.join(COMMANDS)}"
    named = [name for name in COMMANDS if words[0] in name.split("-")]  # `train` for adapter-train
    close = named or difflib.get_close_matches(words[0], COMMANDS, n=1)
    way_out = f"did you mean {' or '.join(close)}?" if close else f"give one of {', '.join(COMMANDS)}"
    return f"{words[0]!r} is not a job: {way_out}"


def _answer_shell() -> None:
    """Complete the line of a shell, and exit; return if the package that does it is not installed."""
    from rayjobs.completion import answer_shell, complete_config, complete_setting

    parser = build_parser()
    jobs = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
    for job in JOBS:
        for action in jobs[job]._actions:
            complete = {"config": complete_config, "overrides": complete_setting}.get(action.dest)
            if complete:
                action.completer = complete
    answer_shell(parser)


def run_job(args: argparse.Namespace) -> int:
    """Run a job here or on a cluster, or show its plan or its help."""
    if args.submit:
        set_auth_mode(cluster_environment()["RAY_AUTH_MODE"])
    if args.help:
        args.parser.print_help()
        print(f"\n{description(args.job)}\n{settings_help(args.job)}")
        return DONE
    config = config_class(args.job)
    settings = load(config, args.config, args.overrides)
    command = job_command(args.job, config, args.config, args.overrides, verbose=args.verbose) if args.submit else []
    if args.submit and not args.dry_run:
        return submit(command)
    for path in iter_paths(settings):
        check_reachable(path)
    settings = replace_paths(settings, pin)
    begin_command(args.job)
    job = importlib.import_module(f"rayjobs.jobs.{args.job.replace('-', '_')}")  # late: it imports PyTorch and Ray
    if not args.dry_run:
        job.run(settings)
        return DONE
    job.plan(settings)
    if args.submit:
        print(f"on a cluster: {printable(ray_submit_command(command))}")
    return DONE


def show_report(args: argparse.Namespace) -> int:
    """Write the report of one run, or the comparison of several, and print its path."""
    from rayjobs.reporting.comparison import compare
    from rayjobs.reporting.report import write_report

    for run in args.run:
        check_reachable(run)
    folders = [resolve_path(run) for run in args.run]
    print(write_report(*folders) if len(folders) == 1 else compare(folders, args.out))
    return DONE


def show_configs(args: argparse.Namespace) -> int:
    """Print the configs of this package by job, a line each, or copy one and print the path of the copy."""
    if args.action == "copy":
        if args.name is None:
            raise UserError("name the config to copy; `rayjobs configs` lists them")
        print(copy_config(args.name, args.to))
        return DONE
    rows = [[config.name, config.job, config.summary] for config in list_configs()]
    if sys.stdout.isatty():
        show_table("rayjobs JOB --config NAME", ("name", "job", "what it does"), rows)
    else:
        print("\n".join("\t".join(row) for row in rows))
    return DONE


def list_runs(args: argparse.Namespace) -> int:
    """Print the runs of a folder: a table on a terminal, elsewhere a tab-separated line each, for grep and cut."""
    from rayjobs.reporting.report import RUN_COLUMNS, run_rows

    check_reachable(args.storage)
    storage = resolve_path(args.storage)
    folders = find_runs(storage)
    names = [str(folder.relative_to(storage)) for folder in folders]
    rows = [[name, *row] for name, row in zip(names, run_rows(folders), strict=True)]
    if sys.stdout.isatty():
        show_table(args.storage, RUN_COLUMNS, rows)
    else:
        print("\n".join("\t".join(row) for row in rows))
    return DONE


def verify_run(args: argparse.Namespace) -> int:
    """Print a line for each thing in which a finished run differs from its record; return DIFFERENT if there is one."""
    from rayjobs.verify import verify

    check_reachable(args.run)
    differences = verify(resolve_path(args.run), args.step)
    for line in differences:
        print(printable(line))
    return DIFFERENT if differences else DONE


def write_examples(args: argparse.Namespace) -> int:
    """Write the examples' files, and print what there is."""
    from rayjobs.demo.example_data import write_example_data

    parts = write_example_data(args.folder)
    show_table(str(args.folder), ["", ""], [list(part) for part in parts])
    return DONE


if __name__ == "__main__":
    sys.exit(main())
