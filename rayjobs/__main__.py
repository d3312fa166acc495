"""The command line: rayjobs JOB --config FILE [section.key=value …] [--dry-run]."""

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from rayjobs.cluster.environment import set_auth_mode, set_environment
from rayjobs.cluster.job_submission import cluster_environment, job_command, ray_submit_command, submit
from rayjobs.cluster.ray_init import interrupt_on_sigterm
from rayjobs.config import describe, load
from rayjobs.errors import USER_ERRORS, UserError
from rayjobs.runs.record import find_runs
from rayjobs.storage.paths import resolve_path

JOBS = {
    "adapter-train": "train an adapter on instruction records",
    "adapter-eval": "loss on held-out records, or accuracy on ScienceQA, with or without an adapter",
    "adapter-tune": "sweep adapter-train's settings: the paper's ablations, or a search",
    "adapter-generate": "answer one prompt, a file of prompts, or whoever types",
    "cafo-prompt": "sentences about a data set's classes, from a language model or a file",
    "cafo-generate": "images of a data set's classes, from a generator, the best by CLIP",
    "cafo-features": "encode a data set's images once, for all later runs",
    "cafo-tune": "train and search caches over a space of settings; choose on val",
    "cafo-eval": "open the test split once and score what a sweep has chosen",
    "cafo": "all of CaFo for one data set: features, tune, eval",
    "demo": "the whole of it on a world small enough for two cores, offline",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one job. Returns the exit code: 0 done, 1 a failure with its traceback, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="rayjobs", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    jobs = parser.add_subparsers(dest="job", metavar="JOB", required=True)
    for name, summary in JOBS.items():
        command = jobs.add_parser(name, help=summary, add_help=False)
        command.add_argument("-h", "--help", action="store_true", help="show this help with every field, and exit")
        command.add_argument("--config", metavar="FILE", help="YAML file of settings")
        command.add_argument(
            "--dry-run", action="store_true", help="check everything and show the plan, without running it"
        )
        command.add_argument(
            "--submit", action="store_true", help="run it on a cluster, as `ray job submit` does, and wait for its end"
        )
        command.add_argument("--verbose", action="store_true", help="let Ray and DeepSpeed speak, and show tracebacks")
        command.add_argument(
            "overrides", nargs="*", metavar="section.key=value", help="settings that override the file's"
        )
    shown = jobs.add_parser("report", help="write a run's report.html anew, or compare several runs on one page")
    shown.add_argument("run", nargs="+", help="a run's folder")
    shown.add_argument("--out", type=Path, default=Path("comparison.html"), help="the page that compares several runs")
    listed = jobs.add_parser("runs", help="list runs with their state and headline")
    listed.add_argument("storage", nargs="?", default="runs", help="the folder of all runs")
    args, more = parser.parse_known_args(argv)  # overrides that stand behind an option, which argparse leaves
    if unknown := [word for word in more if word.startswith("-") or args.job in ("report", "runs")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.job in ("report", "runs"):
        return _look(args)
    args.overrides += more

    set_environment(show_library_output=args.verbose)  # before Ray and DeepSpeed are imported
    if args.submit:
        set_auth_mode(cluster_environment()["RAY_AUTH_MODE"])
    interrupt_on_sigterm()
    try:
        job = importlib.import_module(f"rayjobs.jobs.{args.job.replace('-', '_')}")
        if args.help:
            _help(jobs.choices[args.job], job)
            return 0
        settings = load(job.Config, args.config, args.overrides)
        given = (args.job, args.config, args.overrides)
        if args.submit:
            return submit(job_command(*given, verbose=args.verbose))
        if args.dry_run:
            job.plan(settings)
            try:
                told = ray_submit_command(job_command(*given, verbose=args.verbose))
            except UserError as error:  # nothing that keeps it from running here
                told = str(error)
            print(f"on a cluster: {told}")
        else:
            job.run(settings)
    except KeyboardInterrupt:
        print(f"\nrayjobs {args.job}: interrupted; the same command resumes it", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if args.verbose:
            traceback.print_exc()
        print("\n".join(f"rayjobs {args.job}: error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


def _look(args: argparse.Namespace) -> int:
    """The commands that run nothing."""
    from rayjobs.console import show_table
    from rayjobs.reporting.comparison import compare
    from rayjobs.reporting.report import RUN_COLUMNS, run_rows, write_report

    try:
        if args.job == "report":
            shown = [resolve_path(run) for run in args.run]
            print(write_report(*shown) if len(shown) == 1 else compare(shown, args.out))
            return 0
        storage = resolve_path(args.storage)
        folders = find_runs(storage)
        names = [str(folder.relative_to(storage)) for folder in folders]
        rows = [[name, *row] for name, row in zip(names, run_rows(folders), strict=True)]
        if sys.stdout.isatty():
            show_table(args.storage, RUN_COLUMNS, rows)
        else:  # a line for each, whole, for grep and cut
            print("\n".join("\t".join(row) for row in rows))
        return 0
    except USER_ERRORS as error:
        print(f"rayjobs {args.job}: error: {error}", file=sys.stderr)
        return 2


def _help(parser: argparse.ArgumentParser, job: ModuleType) -> None:
    parser.print_help()
    print(f"\n{(job.__doc__ or '').strip()}\n\nsettings:")
    for name, kind, default, meaning in describe(job.Config):
        print(f"  {name}  ({kind}, {default if default == 'required' else f'default {default}'})\n      {meaning}")


if __name__ == "__main__":
    sys.exit(main())
