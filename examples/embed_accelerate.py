"""Embeds a Parquet file on all GPUs of one machine or of several, with accelerate.

    accelerate launch examples/embed_accelerate.py --model PATH --input texts.parquet --output embeddings.parquet
    accelerate launch --multi_gpu --num_processes 2 examples/embed_accelerate.py --cpu ...  # processes on a CPU

The output has a row for each row of the input, in order. If a run is stopped, the same command continues it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

BEGAN = time.time()

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object

from embedding import PartEmbedder, embed_parts
from plan import Gatherer, Plan, add_arguments, options_from, write_report


def make_plan(accelerator: Accelerator, arguments: argparse.Namespace) -> Plan | None:
    """Makes the plan in one process, for all. None if the output exists."""
    answer: list[Plan | ValueError | None] = [None]
    if accelerator.is_main_process:
        try:
            answer[0] = Plan.make(options_from(arguments), arguments.output)
        except ValueError as error:
            answer[0] = error
    broadcast_object_list(answer)
    if isinstance(answer[0], ValueError):
        raise SystemExit(f"error: {answer[0]}" if accelerator.is_main_process else 1)
    return answer[0]


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--cpu", action="store_true", help="ignore GPUs")
    arguments = parser.parse_args(command_line)
    # Processes that finish early wait for the others, however long.
    waiting = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=arguments.cpu or not torch.cuda.is_available(), kwargs_handlers=[waiting])
    plan = make_plan(accelerator, arguments)
    if plan is None:
        accelerator.print(f"{arguments.output} is there already, of the same input and options.")
        accelerator.end_training()
        return 0
    todo, count = broadcast_object_list([plan.remaining()])[0], accelerator.num_processes
    # Each process takes every count-th part: texts of one kind often follow each other.
    in_turn = [part for process in range(count) for part in todo[process::count]]
    with accelerator.split_between_processes(in_turn) as mine:
        if accelerator.process_index >= len(in_turn):
            mine = []  # some versions of accelerate repeat the last one
        embedder = PartEmbedder(plan, accelerator.device)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with Gatherer(plan):
                reports = embed_parts(embedder, mine)
        else:
            reports = embed_parts(embedder, mine)
    reports = gather_object(reports)
    if accelerator.is_main_process:
        write_report(arguments.report, plan, reports, BEGAN, count)
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(main())
