"""The command line. Parsing imports the standard library only; each subcommand imports its own code when it runs."""

from __future__ import annotations

import argparse
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
_SHAPES = ("gte-small", "bge-base", "bge-large", "reranker-base", "modernbert-base", "qwen3-embedding")
_RIVALS = ("sdpa", "eager", "flex_attention", "varlen", "compile")
_OURS = ("flashinfer", "unpad", "unpad_host", "graphs", "graphs_host", "compiled_graphs", "compiled_graphs_host")
_REQUEST_SETS = ("chat", "bulk", "sorted", "single", "uniform", "full", "pairs", "long")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 on success, 1 where a command failed with a known error.

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
    """Checks the arguments before the slow imports, and announces those.

    Raises:
        SystemExit: On wrong usage (status 2), `--help` and `--version` (status 0).
    """
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
    _add_demo(commands)
    _add_bench(commands)
    _add_warmup(commands)
    _add_doctor(commands)
    return parser


def _add_command(commands: Subparsers, name: str, run: _Run, summary: str, more: str = "") -> argparse.ArgumentParser:
    description = f"{summary[0].upper()}{summary[1:]}. {more}".rstrip()
    parser = commands.add_parser(name, help=summary, description=description)
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_demo(commands: Subparsers) -> None:
    summary = "search Python's documentation with a real model, and compare it with sdpa"
    parser = _add_command(commands, "demo", _run_demo, summary)
    parser.add_argument(
        "query", nargs="?", type=_query, metavar="QUERY", help="text to search for (default: a question about Python)"
    )
    parser.add_argument("--top-k", type=_positive, default=5, metavar="K", help="passages to show (default: 5)")
    parser.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="rows per forward (default: 64)")
    parser.add_argument(
        "--passages",
        type=_positive,
        metavar="N",
        help="passages to embed, at most 10000 (default: every paragraph)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="(default: float16 on a GPU, float32 on a CPU)",
    )
    parser.add_argument("--json", type=_writable_file, metavar="FILE", help="write the measured figures to FILE")


def _run_demo(arguments: argparse.Namespace) -> int:
    from . import demo

    report = demo.run_demo(
        arguments.query or demo.DEFAULT_QUERY,
        top_k=arguments.top_k,
        batch_size=arguments.batch_size,
        passages=arguments.passages,
        device=arguments.device,
        dtype=arguments.dtype,
        progress=True,
    )
    print(demo.format_report(report, width=_terminal_width()))
    if arguments.json is not None:
        _write_json(arguments.json, demo.report_figures(report))
    return 0


def _add_bench(commands: Subparsers) -> None:
    summary = "benchmark whole models against sdpa, on your texts or a preset workload"
    more = (
        "Outputs are verified first; an inaccurate variant is not timed. Prints a table per model and request set. The "
        "exit status is 1 if a variant failed or its outputs were wrong."
    )
    parser = _add_command(commands, "bench", _run_bench, summary, more)
    # The generated usage takes 14 lines, above each error.
    parser.usage = "%(prog)s (--model PATH_OR_ID | --shape NAME,...) [options]"
    what = parser.add_argument_group("what to run")
    models = what.add_mutually_exclusive_group(required=True)
    models.add_argument("--model", metavar="PATH_OR_ID", help="your model")
    models.add_argument(
        "--shape",
        action=_Names,
        known=_SHAPES,
        metavar="NAME,...",
        help=f"named shapes with random weights: {', '.join(_SHAPES)}",
    )
    what.add_argument("--texts", metavar="FILE", help="with --model: texts to embed, one per line")
    what.add_argument(
        "--lengths",
        metavar="SET,...",
        help=f"request sets of random tokens: {', '.join(_REQUEST_SETS)}; a length (128); "
        "alternating lengths (16+32+128); uniform:LOW:HIGH (default, without --texts: chat)",
    )
    what.add_argument(
        "--batch-size", type=_positive, metavar="N", help="rows per forward (default: the request set's, 64)"
    )
    what.add_argument(
        "--requests", type=_positive, metavar="N", help="requests per request set, at most; for small machines"
    )
    what.add_argument(
        "--layers", type=_positive, metavar="N", help="with --shape: number of layers, for small machines"
    )
    what.add_argument("--sort", action="store_true", help="with --texts: longest first")
    what.add_argument("--max-length", type=_positive, metavar="N", help="with --texts: truncate them to N tokens")
    how = parser.add_argument_group("how to run it")
    how.add_argument(
        "--against",
        action=_Names,
        known=_RIVALS,
        default=("sdpa",),
        metavar="NAME,...",
        help=f"others to compare with: {', '.join(_RIVALS)} (default: sdpa, which always runs)",
    )
    how.add_argument(
        "--ours",
        action=_Names,
        known=_OURS,
        metavar="NAME,...",
        help=f"variants of this package: {', '.join(_OURS)} (default: all that can run here)",
    )
    how.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    how.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="(default: float16 on a GPU, float32 on a CPU)",
    )
    how.add_argument("--repeats", type=_positive, default=3, metavar="N", help="timed passes per variant (default: 3)")
    how.add_argument(
        "--seconds",
        type=_positive,
        metavar="N",
        help="time limit per model and request set; no new round of passes starts after it (default: none)",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--json", type=_writable_file, metavar="FILE", help="write all results to FILE, after each table"
    )
    results.add_argument("--plot", type=_png_file, metavar="FILE.png", help="draw a bar chart")


def _run_bench(arguments: argparse.Namespace) -> int:
    from . import bench
    from .bench.progress import Progress

    if arguments.plot is not None:
        bench.require_matplotlib()
    try:
        texts = None if arguments.texts is None else _texts(arguments.texts)
        lengths = arguments.lengths or ("chat" if texts is None else "")
        request_sets = tuple(map(bench.parse_request_set, _names(lengths)))
    except ValueError as error:
        arguments.parser.error(str(error))
    plan = bench.Plan(
        shapes=arguments.shape or (),
        model=arguments.model,
        texts=texts,
        request_sets=request_sets,
        against=arguments.against,
        ours=arguments.ours,
        batch_size=arguments.batch_size,
        requests=arguments.requests,
        layers=arguments.layers,
        sort=arguments.sort,
        max_length=arguments.max_length,
        device=arguments.device,
        dtype=arguments.dtype,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
    )
    progress = Progress()

    def show(report: bench.BenchReport) -> None:
        progress.print(bench.format_cell(report.cells[-1]) + "\n")
        if len(report.cells) == 1:
            progress.print(bench.COLUMNS_EXPLAINED + "\n")
        # After each, so that an interrupted benchmark keeps what it has.
        if arguments.json is not None:
            _write_json(arguments.json, bench.report_figures(report))

    try:
        report = bench.run_bench(plan, on_step=progress.step, on_cell=show)
    finally:
        progress.close()
    for reason in report.skipped:
        print(f"skipped: {reason}", file=sys.stderr)
    if arguments.json is not None:
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
    parser.add_argument(
        "--dtype",
        type=_half_dtypes,
        metavar="NAME,...",
        help="float16, bfloat16 or both (default: the model's, otherwise float16)",
    )
    parser.add_argument(
        "--arch", metavar="ARCH", help="compute capability of the GPU, such as 8.0 or 9.0a (default: this machine's)"
    )
    parser.add_argument(
        "--graphs",
        type=_graph_sizes,
        default=(),
        metavar="ROWSxTOKENS,...",
        help="also try to capture CUDA graphs of these batch sizes, and report their memory; needs a GPU",
    )
    parser.add_argument(
        "--workers", type=_positive, metavar="N", help="parallel compilers (default: by cores and memory)"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _run_warmup(arguments: argparse.Namespace) -> int:
    import torch

    from .kernel_warmup import warmup

    dtypes = None if arguments.dtype is None else tuple(getattr(torch, name) for name in arguments.dtype)
    try:
        report = warmup(
            arguments.model,
            dtypes=dtypes,
            arch=arguments.arch,
            graphs=arguments.graphs,
            workers=arguments.workers,
            progress=not arguments.quiet,
        )
    except ValueError as error:
        # An argument is not what it should be.
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0 if report.passed else 1


def _half_dtypes(text: str) -> tuple[str, ...]:
    names = _names(text)
    if not names or any(name not in ("float16", "bfloat16") for name in names):
        raise argparse.ArgumentTypeError(f"{text!r} is not float16, bfloat16 or both")
    return names


def _graph_sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = [re.fullmatch(r"(\d+)x(\d+)", name) for name in _names(text)]
    if not sizes or None in sizes:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes ROWSxTOKENS, such as 8x400,64x6000")
    return tuple((int(size[1]), int(size[2])) for size in sizes if size is not None)


def _add_doctor(commands: Subparsers) -> None:
    summary = "report whether FlashInfer runs here, what is missing, and which kernels a model would use"
    more = "The exit status is 0 if FlashInfer would run on a GPU here, otherwise 1."
    parser = _add_command(commands, "doctor", _run_doctor, summary, more)
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="show the kernels of each layer of a model, from its config only"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="with --model: dtype of its weights (default: that of its config, otherwise float16)",
    )
    parser.add_argument(
        "--arch",
        type=_capability,
        metavar="ARCH",
        help="with --model: compute capability of another GPU, such as 9.0 (default: this machine's)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the kernels used here with float64; compiles kernels that are not compiled yet",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _run_doctor(arguments: argparse.Namespace) -> int:
    import torch

    from .bench.progress import Progress
    from .diagnosis import doctor

    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with Progress() as progress:
        diagnosis = doctor(
            arguments.model,
            check=arguments.check,
            dtype=dtype,
            capability=arguments.arch,
            on_step=progress.step,
        )
    print(json.dumps(diagnosis.to_dict(), indent=2, ensure_ascii=False) if arguments.json else diagnosis)
    return 0 if diagnosis.ready else 1


def _capability(text: str) -> tuple[int, int]:
    # "9.0a" is what compilers call it.
    found = re.fullmatch(r"(?:sm_?)?(\d{1,2})\.?(\d)[af]?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a compute capability such as 8.0 or 9.0")
    return int(found[1]), int(found[2])


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


class _Names(argparse.Action):
    """A comma-separated list of known names; repeated options add up."""

    def __init__(self, known: tuple[str, ...], **options: Any) -> None:
        # nargs="?", so that the error for a missing value can list the names.
        super().__init__(nargs="?", **options)
        self.known = known

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        names = _names(values or "")
        unknown = [name for name in names if name not in self.known]
        if unknown or not names:
            wrong = f"{unknown[0]!r} is not known" if unknown else "no name given"
            parser.error(f"argument {option_string}: {wrong}; expected some of {','.join(self.known)}")
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *names))


def _texts(text: str) -> tuple[str, ...]:
    # Read once, when the command runs: the file may be a pipe.
    try:
        lines = Path(text).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ValueError(f"argument --texts: {text!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"argument --texts: {text!r} cannot be read: it is not UTF-8") from error
    return tuple(line for line in lines if line.strip())


def _query(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the query is empty; leave it out for the default one")
    return text


def _write_json(file: Path, figures: dict[str, object]) -> None:
    file.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _terminal_width() -> int:
    # Long lines are hard to read, however wide the terminal.
    return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 110)


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return number


def _png_file(text: str) -> Path:
    if not text.endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, the format that is drawn")
    return _writable_file(text)


def _writable_file(text: str) -> Path:
    # Checked before the measurement, not after it.
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
