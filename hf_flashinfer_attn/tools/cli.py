"""Command line. Parsing imports the standard library only; each subcommand imports its own code when it runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlashInferAttentionError
from ..version import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["check_usage", "main"]

_Run = Callable[[argparse.Namespace], int]
_DTYPES = ("float32", "float16", "bfloat16")
_SHAPES = ("gte-small", "bge-base", "bge-large", "reranker-base", "modernbert-base", "qwen3-embedding")
_RIVALS = ("sdpa", "eager", "flex_attention", "varlen", "compile")
_OURS = ("flashinfer", "unpad", "unpad_host", "graphs", "graphs_host", "compiled_graphs", "compiled_graphs_host")
_REQUEST_SETS = ("chat", "bulk", "sorted", "single", "uniform", "full", "pairs", "long")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line, by default with `sys.argv`.

    Returns:
        The exit status: 0 on success, 1 if the command raised an error of this package.

    Raises:
        SystemExit: On wrong usage (status 2), `--help` and `--version` (status 0).
    """
    arguments = _parse(argv)
    run: _Run = arguments.run
    try:
        return run(arguments)
    except FlashInferAttentionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def check_usage(argv: Sequence[str]) -> None:
    """Checks the arguments before the slow imports, and prints a line about them; exits like `main`."""
    arguments = _parse(argv)
    if not getattr(arguments, "quiet", False):
        print("importing torch and transformers ...", file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    arguments = _parser().parse_args(argv)
    if arguments.run is _run_doctor and arguments.model is None:
        for option in ("arch", "dtype"):
            if getattr(arguments, option) is not None:
                arguments.parser.error(f"argument --{option}: needs a model to plan for; add --model PATH_OR_ID")
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_flashinfer_attn", description="FlashInfer attention for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf_flashinfer_attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (_add_demo, _add_bench, _add_warmup, _add_doctor):
        add(commands)
    return parser


def _add_command(commands: Subparsers, name: str, run: _Run, summary: str, more: str = "") -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {more}".rstrip()
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_count(group: argparse._ActionsContainer, option: str, meaning: str, **options: Any) -> None:
    group.add_argument(option, type=_positive, help=meaning, **{"metavar": "N", **options})


def _add_device_and_dtype(group: argparse._ActionsContainer) -> None:
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    default = "(default: float16 on a GPU, float32 on a CPU)"
    group.add_argument("--dtype", choices=("auto", *_DTYPES), default="auto", help=default)


def _add_demo(commands: Subparsers) -> None:
    summary = "search Python's documentation with a real model, and compare it with sdpa"
    parser = _add_command(commands, "demo", _run_demo, summary)
    meaning = "text to search for (default: a question about Python)"
    parser.add_argument("query", nargs="?", type=_query, metavar="QUERY", help=meaning)
    _add_count(parser, "--top-k", "passages to show (default: 5)", default=5, metavar="K")
    _add_count(parser, "--batch-size", "rows per forward (default: 64)", default=64)
    _add_count(parser, "--passages", "passages to embed, at most 10000 (default: every paragraph)")
    _add_device_and_dtype(parser)
    parser.add_argument("--json", type=_writable_file, metavar="FILE", help="write the measured figures to FILE")


def _run_demo(arguments: argparse.Namespace) -> int:
    from . import demo

    names = ("top_k", "batch_size", "passages", "device", "dtype")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    report = demo.run_demo(arguments.query or demo.DEFAULT_QUERY, progress=True, **options)
    # At most 110 columns, since long lines are hard to read.
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)
    print(demo.format_report(report, width))
    _write_json(arguments.json, dataclasses.asdict(report))
    return 0


def _add_bench(commands: Subparsers) -> None:
    summary = "benchmark whole models against sdpa, on your texts or a preset workload"
    more = (
        "Outputs are verified first; an inaccurate variant is not timed. Prints a table per model and request set. The "
        "exit status is 1 if a variant failed or its outputs were wrong."
    )
    parser = _add_command(commands, "bench", _run_bench, summary, more)
    # Replaces the generated usage of 14 lines, which precedes each error.
    parser.usage = "%(prog)s (--model PATH_OR_ID | --shape NAME,...) [options]"

    inputs = parser.add_argument_group("what to run")
    models = inputs.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", metavar="PATH_OR_ID", help="your model")
    _add_names(models, "--shape", _SHAPES, "named shapes with random weights: {}", dest="shapes", default=())
    inputs.add_argument("--texts", metavar="FILE", help="with --model: texts to embed, one per line")
    lengths = (
        f"request sets of random tokens: {', '.join(_REQUEST_SETS)}; a length (128); alternating lengths (16+32+128); "
        "uniform:LOW:HIGH (default, without --texts: chat)"
    )
    inputs.add_argument("--lengths", metavar="SET,...", help=lengths)
    _add_count(inputs, "--batch-size", "rows per forward (default: the request set's, 64)")
    _add_count(inputs, "--requests", "requests per request set, at most; for small machines")
    _add_count(inputs, "--layers", "with --shape: number of layers, for small machines")
    inputs.add_argument("--sort", action="store_true", help="with --texts: longest first")
    _add_count(inputs, "--max-length", "with --texts: truncate them to N tokens")

    running = parser.add_argument_group("how to run it")
    rivals = "others to compare with: {} (default: sdpa, which always runs)"
    _add_names(running, "--against", _RIVALS, rivals, default=("sdpa",))
    _add_names(running, "--ours", _OURS, "variants of this package: {} (default: all that can run here)")
    _add_device_and_dtype(running)
    _add_count(running, "--repeats", "timed passes per variant (default: 3)", default=3)
    limit = "time limit per model and request set; no new round of passes starts after it (default: none)"
    _add_count(running, "--seconds", limit)

    results = parser.add_argument_group("results")
    meaning = "write all results to FILE, after each table"
    results.add_argument("--json", type=_writable_file, metavar="FILE", help=meaning)
    results.add_argument("--plot", type=_png_file, metavar="FILE.png", help="draw a bar chart")


def _run_bench(arguments: argparse.Namespace) -> int:
    from . import bench

    if arguments.plot is not None:
        bench.require_matplotlib()
    try:
        arguments.texts = None if arguments.texts is None else _texts(arguments.texts)
        names = _names(arguments.lengths or ("chat" if arguments.texts is None else ""))
        arguments.request_sets = tuple(map(bench.parse_request_set, names))
    except ValueError as error:
        arguments.parser.error(str(error))
    plan = bench.Plan(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(bench.Plan)})

    def show(report: bench.BenchReport) -> None:
        progress.print(bench.format_cell(report.cells[-1]) + "\n")
        if len(report.cells) == 1:
            progress.print(bench.COLUMNS_EXPLAINED + "\n")
        # After each cell, so that an interrupted benchmark keeps its results.
        _write_json(arguments.json, bench.report_figures(report))

    with bench.Progress() as progress:
        report = bench.run_bench(plan, on_step=progress.step, on_cell=show)
    for reason in report.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    _write_json(arguments.json, bench.report_figures(report))
    if arguments.plot is not None:
        bench.draw_chart([bench.report_figures(report)], arguments.plot)
    return 0 if report.passed else 1


def _add_warmup(commands: Subparsers) -> None:
    summary = "compile the kernels that a model may need ahead of time, for another GPU too"
    more = (
        "Needs nvcc and ninja, but with --arch no GPU, and only the model's config. The exit status is 1 if a kernel "
        "could not be compiled or a graph not captured."
    )
    parser = _add_command(commands, "warmup", _run_warmup, summary, more)
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help="model to compile for")
    meaning = "float16, bfloat16 or both (default: the model's, otherwise float16)"
    parser.add_argument("--dtype", type=_half_dtypes, metavar="NAME,...", help=meaning)
    meaning = "compute capability of the GPU, such as 8.0 or 9.0a (default: this machine's)"
    parser.add_argument("--arch", metavar="ARCH", help=meaning)
    meaning = "also try to capture CUDA graphs of these batch sizes, and report their memory; needs a GPU"
    parser.add_argument("--graphs", type=_graph_sizes, default=(), metavar="ROWSxTOKENS,...", help=meaning)
    _add_count(parser, "--workers", "parallel compilers (default: by cores and memory)")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _run_warmup(arguments: argparse.Namespace) -> int:
    import torch

    from .kernel_warmup import warmup

    dtypes = None if arguments.dtype is None else tuple(getattr(torch, name) for name in arguments.dtype)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("arch", "graphs", "workers")}
    try:
        report = warmup(arguments.model, dtypes=dtypes, progress=not arguments.quiet, **options)
    except ValueError as error:
        # An argument that can only be checked with the model or its config.
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0 if report.passed else 1


def _add_doctor(commands: Subparsers) -> None:
    summary = "report whether FlashInfer runs here, what is missing, and which kernels a model would use"
    more = "The exit status is 0 if FlashInfer would run on a GPU here, otherwise 1."
    parser = _add_command(commands, "doctor", _run_doctor, summary, more)
    meaning = "show the kernels of each layer of a model, from its config only"
    parser.add_argument("--model", metavar="PATH_OR_ID", help=meaning)
    meaning = "with --model: dtype of its weights (default: that of its config, otherwise float16)"
    parser.add_argument("--dtype", choices=_DTYPES, help=meaning)
    meaning = "with --model: compute capability of another GPU, such as 9.0 (default: this machine's)"
    parser.add_argument("--arch", type=_capability, metavar="ARCH", help=meaning)
    meaning = "compare the kernels used here with float64; compiles kernels that are not compiled yet"
    parser.add_argument("--check", action="store_true", help=meaning)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_doctor(arguments: argparse.Namespace) -> int:
    import torch

    from .bench.progress import Progress
    from .diagnosis import doctor

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    options: dict[str, Any] = {"check": arguments.check, "dtype": dtype, "capability": arguments.arch}
    with Progress() as progress:
        diagnosis = doctor(arguments.model, on_step=progress.step, **options)
    print(json.dumps(diagnosis.to_dict(), indent=2, ensure_ascii=False) if arguments.json else diagnosis)
    return 0 if diagnosis.ready else 1


# Argument types.


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _query(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the query is empty; leave it out for the default one")
    return text


def _half_dtypes(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not names or not {*names} <= {"float16", "bfloat16"}:
        raise argparse.ArgumentTypeError(f"{text!r} is not float16, bfloat16 or both")
    return names


def _graph_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = [re.fullmatch(r"(\d+)x(\d+)", name) for name in _names(text)]
    if not sizes or None in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes ROWSxTOKENS, such as 8x400,64x6000")
    return tuple((int(size[1]), int(size[2])) for size in sizes if size is not None)


def _capability(text: str) -> tuple[int, int]:
    # Accepts "9.0", "90", "sm_90" and "9.0a".
    match = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.0 or 9.0")
    return int(match[1]), int(match[2])


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class _Names(argparse.Action):
    """A comma-separated list of names from `known`; repeated options add up."""

    def __init__(self, known: tuple[str, ...], **options: Any) -> None:
        # nargs="?", so that the error for a missing value can list the names.
        super().__init__(nargs="?", metavar="NAME,...", **options)
        self.known = known

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        names = _names(values or "")
        unknown = [name for name in names if name not in self.known]
        if unknown or not names:
            wrong = f"{unknown[0]!r} is not known" if unknown else "no name given"
            parser.error(f"argument {option_string}: {wrong}; expected some of {','.join(self.known)}")
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *names))


def _add_names(
    group: argparse._ActionsContainer, option: str, known: tuple[str, ...], meaning: str, **options: Any
) -> None:
    group.add_argument(option, action=_Names, known=known, help=meaning.format(", ".join(known)), **options)


def _png_file(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, the format that is drawn")
    return _writable_file(text)


def _writable_file(text: str) -> Path:
    # Checked before the measurement.
    file = Path(text)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    existed = file.exists()
    try:
        file.open("a").close()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    if not existed:
        file.unlink()
    return file


def _texts(text: str) -> tuple[str, ...]:
    # Read once, since the file may be a pipe.
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"argument --texts: {text!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"argument --texts: {text!r} cannot be read: it is not UTF-8") from error
    return tuple(line for line in lines if line.strip())


def _write_json(file: Path | None, figures: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
