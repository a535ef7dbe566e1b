"""Searches the images of shards for proposals, in this process or in several, and writes the file of each shard."""

import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import datasets

from ..processes import leave_signals_to_parent
from .bit_depth import pixel_window
from .errors import ImageError
from .images import Window, decode_image, image_name
from .shards import Shard, reopened, write_shard
from .sources import Search
from .splits import Splits

Work = Callable[[Shard], None]


def work_on_shards(
    shards: Iterable[Shard], open_work: Callable[[], Work], num_workers: int, done: Work, preload: list[str]
) -> None:
    """
    Does some work with each shard.

    Args:
        shards (`Iterable[Shard]`): They are not taken much earlier than they are worked on.
        open_work (`Callable`): Is called once in each process, and gives what is then called with the shards.
        num_workers (`int`): Processes; 0: this one.
        done (`Callable`): Is called in this process with each shard that is done.
        preload (`list[str]`): Modules that the processes need.

    Raises:
        ChildProcessError: a process died.
    """
    if num_workers == 0:
        work = None
        for shard in shards:
            work = work or open_work()
            work(shard)
            done(shard)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers, _process_context(preload), initializer=_init_worker, initargs=(open_work,)
    )
    try:
        futures = {}
        for shard in itertools.chain(shards, [None]):
            if shard is not None:
                futures[pool.submit(_work_in_worker, shard)] = shard
            # A stream is not read further than the search needs it.
            while len(futures) >= (2 * num_workers if shard else 1):
                finished, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    future.result()
                    done(futures.pop(future))
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "A worker process died: in a script for lack of `if __name__ == '__main__':` around its calls, else "
            "perhaps for lack of memory. What is finished is kept: run the same again, with fewer "
            "dataloader_num_workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def number_of_cores() -> int:
    """The cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))  # Linux only
    except AttributeError:
        return os.cpu_count() or 1


def _process_context(preload: list[str]):
    """
    Workers are not forked from this process, whose threads (OpenCV, Arrow, torch) would not survive that, but from a
    server that has imported what they need and done nothing else.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


_worker: dict[str, Work] = {}


def _init_worker(open_work: Callable[[], Work]) -> None:
    leave_signals_to_parent()  # which lets us finish the shard
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker["work"] = open_work()


def _end_with_parent() -> None:
    """A killed parent cannot stop its workers."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _work_in_worker(shard: Shard) -> None:
    _worker["work"](shard)


def search_shard(
    shard: Shard, inputs: Splits | None, search: Search, with_clusters: bool, batch_size: int, window: Window | None
) -> None:
    """
    Searches the images of a shard, a batch at a time, and writes its file.

    Args:
        shard (`Shard`): The shard.
        inputs (`dict[str, datasets.Dataset]`, *optional*): The splits. Else the rows lie beside the shard's file.
        search (`Search`): The source.
        with_clusters (`bool`): Whether its proposals have clusters.
        batch_size (`int`): Images that are searched together.
        window (`tuple[float, float]`, *optional*): See [`~aligndet_hf.data.images.decode_image`]; a window that is
            recorded with the data comes first.
    """
    if inputs is None:
        rows = datasets.Dataset.from_file(str(Path(shard.path).with_suffix(".rows")))
    else:
        rows = reopened(inputs[shard.split], range(shard.start, shard.stop))
    window, results = pixel_window(rows) or window, []
    for start in range(0, len(rows), batch_size):
        searched, images, faults = [], [], []
        for row in (rows[place] for place in range(start, min(start + batch_size, len(rows)))):
            try:
                images.append(decode_image(row["image"], window))
                searched.append(row)
                faults.append(None)
            except ImageError as error:
                faults.append({"file": image_name(row["image"]), "reason": str(error)})
        found = iter(search(images, searched) if images else [])
        results += [fault or {"proposals": {k: v.tolist() for k, v in next(found).items()}} for fault in faults]
    write_shard(shard, results, with_clusters)
