"""Sampling many images by Ray Data: the shards of `sample`, drawn by workers on one machine or many.

An image depends on its seed and index only, so that nothing has to be said between workers. They write into one folder,
which on several machines has to be a shared one.
"""

from __future__ import annotations

import logging
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray

from bozzetto.checkpoints.load_settings import LoadSettings, check_gpus, gpus_of
from bozzetto.common.terminal import note
from bozzetto.errors import UsageError
from bozzetto.evaluate.sampling import SampleRun, batched, check_count
from bozzetto.pipeline.loading import load

_AT_A_TIME = 2**16  # batches that are handed to Ray together; after them its workers load the model again


class ShardWriter:
    """What a Ray Data worker does: draws the batches it is given. run: see `SampleRun`."""

    def __init__(self, folder: Path, model: str, loading: LoadSettings, **run: Any):
        self.run = SampleRun(folder, load(model, loading, note), **run)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """batch: `indices`, one list of image numbers per row; tells the seconds of each."""
        seconds = [self.run.draw([int(i) for i in row if i >= 0]) for row in batch["indices"]]
        return {"seconds": np.array(seconds)}


def sample_by_ray(run: SampleRun, count: int, model: str, loading: LoadSettings, workers: int) -> int:
    """Sample what is missing of images 0..count-1 with this many workers of one processor each, and one GPU each where
    the model is to run on one; returns how many images that were. model, loading: what the workers load, and how. Joins
    the cluster that RAY_ADDRESS names, or starts one of this machine. Raises UsageError where it has fewer GPUs."""
    if workers < 1:
        raise UsageError(f"ray = {workers} is not allowed: a whole number >= 1")
    check_count(count)
    with run.alone():
        run.claim()
        have, size = run.done(), run.settings.batch
        there = sum(i < count for i in have)
        if there == count:
            return 0
        batches = batched((i for i in range(count) if i not in have), size)
        blocks = ([*part, *[-1] * (size - len(part))] for part in batches)
        ours = not ray.is_initialized()
        if ours:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        try:
            gpus = gpus_of(loading)
            check_gpus(gpus * workers, f"ray = {workers}", ray.cluster_resources())
            while some := list(islice(blocks, _AT_A_TIME)):
                _map(run, some, model, loading, min(workers, len(some)))
        finally:
            if ours:
                ray.shutdown()
    return count - there


def worker_settings(run: SampleRun, model: str, loading: LoadSettings) -> dict[str, Any]:
    """What a worker needs for opening the same run."""
    same = {"settings": run.settings, "seed": run.seed, "classes": tuple(run.classes), "method": run.method}
    return {"folder": run.folder.resolve(), "model": model, "loading": loading, **same}


def _map(run: SampleRun, blocks: list[list[int]], model: str, loading: LoadSettings, workers: int) -> None:
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = ray.data.from_items([{"indices": block} for block in blocks], override_num_blocks=len(blocks))
    done = rows.map_batches(
        ShardWriter,
        fn_constructor_kwargs=worker_settings(run, model, loading),
        batch_size=1,
        num_cpus=1,
        num_gpus=gpus_of(loading),
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    for _ in done.iter_rows():
        pass
