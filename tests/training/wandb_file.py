"""W&B's offline files read back, without W&B's help: records in the framing of a LevelDB log.

The file is 7 bytes of header and then blocks of 32 KiB. A block has chunks of (checksum, length,
kind) and data; a record is one chunk, or a first, middle ones and a last.
"""

import json
import struct
import time
from typing import NamedTuple

from wandb.proto import wandb_internal_pb2

BLOCK, HEAD = 32768, struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


class WandbFile(NamedTuple):
    """What was logged: the run's id, its config, its rows in order, whether it ended.

    Of `axes` the names are patterns, and the values what they are drawn over.
    """

    id: str | None
    config: dict
    rows: list[dict]
    axes: dict[str, str]
    ended: bool

    def column(self, name):
        """All values of one name, in the order of logging."""
        return [row[name] for row in self.rows if name in row]


def records(path):
    """The records of a file; what a crash cut off at its end is no record."""
    data = path.read_bytes()
    assert data[:4] == b":W&B", data[:7]
    place, whole = 7, b""
    while place + HEAD.size <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEAD.size:  # too little for a chunk: the rest of the block is empty
            place += left
            continue
        _, length, kind = HEAD.unpack_from(data, place)
        chunk = data[place + HEAD.size : place + HEAD.size + length]
        if kind not in (FULL, FIRST, MIDDLE, LAST) or len(chunk) < length:
            return
        place += HEAD.size + length
        whole = chunk if kind in (FULL, FIRST) else whole + chunk
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def named(items):
    """Key and value of the items of a history or a config."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def read(path):
    """A file as it stands on the disk, of a run that has ended or has not."""
    run, config, rows, axes, ended = None, {}, [], {}, False
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run.run_id
            config |= named(record.run.config.update)
        elif kind == "config":
            config |= named(record.config.update)
        elif kind == "history":
            rows.append(named(record.history.item))
        elif kind == "metric":
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
        elif kind == "exit":
            ended = True
    config.pop("_wandb", None)
    return WandbFile(run, config, rows, axes, ended)


def read_all(folder, ended=True):
    """The offline files of a run folder, oldest first.

    W&B's process writes the end of a file a moment after the run was told that it is over, so of
    runs that have ended this moment is waited for.
    """
    paths = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    for _ in range(200):
        files = [read(path) for path in paths]
        if not ended or all(file.ended for file in files):
            return files
        time.sleep(0.05)
    raise AssertionError(f"a file of {folder} does not end")
