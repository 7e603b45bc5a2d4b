"""Embeds a Parquet file with Ray Data: one actor per GPU, or as many as asked for on CPUs.

    python examples/embed_ray.py --model PATH --input texts.parquet --output embeddings.parquet --actors 2

The output has a row for each row of the input, in order. If an actor is killed, its replacement repeats the parts that
it had not finished. If a run is stopped, the same command continues it.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

BEGAN = time.time()
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray

from plan import PARTS_AT_A_TIME, Gatherer, Part, PartReport, Plan, add_arguments, options_from, write_report


class Embedder:
    """A model in an actor, which Ray calls from several threads.

    Args:
        plan: Path of `plan.json`, on a file system that all machines share.
    """

    def __init__(self, plan: str) -> None:
        # Imported here: the program that starts actors needs no torch.
        import torch

        from embedding import PartEmbedder

        device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self._embedder = PartEmbedder(Plan.load(Path(plan)), device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        index, start, stop = (int(batch[name][0]) for name in ("index", "start", "stop"))
        part = Part(index, start, stop)
        return {name: [value] for name, value in asdict(self._embedder.embed(part)).items()}


def embed(plan: Plan, actors: int, gpus: int) -> list[PartReport]:
    """Embeds the remaining parts of a plan, and gathers all."""
    todo = [asdict(part) for part in plan.remaining()]
    with Gatherer(plan):
        if not todo:
            return []
        # Actors get numbers of rows; they read texts and write embeddings themselves, past the object store. Each part
        # is a block, which is what Ray repeats when an actor dies. It restarts actors and repeats blocks without limit.
        found = ray.data.from_items(todo, override_num_blocks=len(todo)).map_batches(
            Embedder,
            fn_constructor_args=(str(plan.folder / "plan.json"),),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                size=actors,
                max_tasks_in_flight_per_actor=PARTS_AT_A_TIME,
                max_concurrent_calls_per_actor=PARTS_AT_A_TIME,
                enable_true_multi_threading=True,
            ),
            num_cpus=None if gpus else 1,
            num_gpus=1 if gpus else None,
        )
        return [PartReport(**row) for row in found.iter_rows()]


def main(command_line: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.add_argument("--actors", type=int, help="default: one per GPU, or one")
    parser.add_argument("--address", help="of a Ray cluster; default: one is started here")
    arguments = parser.parse_args(command_line)
    ray.init(address=arguments.address, include_dashboard=False, log_to_driver=False, logging_level="warning")
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = int(ray.cluster_resources().get("GPU", 0))
    actors = arguments.actors or max(gpus, 1)
    try:
        plan = Plan.make(options_from(arguments), arguments.output)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if plan is None:
        print(f"{arguments.output} is there already, of the same input and options.")
    else:
        write_report(arguments.report, plan, embed(plan, actors, gpus), BEGAN, actors)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
