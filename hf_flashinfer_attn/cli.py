"""The command line. Each subcommand imports what it runs when it runs; nothing in the package imports this module."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import FlashInferAttentionError
from .version import __version__

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["main"]

_Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 on success, 1 where a command failed with a known error.

    Raises:
        SystemExit: On wrong usage (status 2), `--help` and `--version` (status 0).
    """
    arguments = _parser().parse_args(argv)
    run: _Run = arguments.run
    try:
        return run(arguments)
    except FlashInferAttentionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m hf_flashinfer_attn", description="FlashInfer attention for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf_flashinfer_attn {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    return parser


def _add_demo(commands: Subparsers) -> None:
    summary = "search Python's documentation with a real model, and compare with sdpa"
    parser = commands.add_parser("demo", help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    parser.set_defaults(run=_run_demo)
    parser.add_argument("query", nargs="?", metavar="QUERY", help="what to search for (default: a question that fits)")
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


def _writable_file(text: str) -> Path:
    # Known before a measurement, not after it.
    file = Path(text)
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is not a file in an existing folder")
    return file
