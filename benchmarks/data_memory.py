"""Memory and seconds that large corpora cost a worker, next to reading them whole.

    python benchmarks/data_memory.py [--gigabytes 1] [--tokenized 0.02] [--only Parquet]

Makes a text file, a shard of tokens, a JSONL and a Parquet file of that size, and smaller ones for
a BPE, which is slow. Loads each in a process of its own with an empty cache folder, and once more
with what the first left there, and takes 200 batches from it. `anonymous` is what the process has
allocated; `resident` counts the pages of mapped files too, which the kernel takes back when it
needs them. Both are peaks above the same process before it loads, over the size of the file. The
peer reads the file into memory and copies its training part out. Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BATCHES = 200
BATCH_SIZE, LENGTH = 16, 256
GIGABYTE = 10**9


def tables(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a corpus → the keys of its [data]."""
    bpe = {"tokenizer": str(folder / "bpe.json")}
    return {
        "text, bytes": {"source": str(folder / "text.txt")},
        "shard, uint16": {"source": str(folder / "shard.bin"), "dtype": "uint16"},
        "JSONL, bytes": {"source": str(folder / "lines.jsonl")},
        "Parquet, bytes": {"source": str(folder / "rows.parquet")},
        "text, BPE": {"source": str(folder / "small.txt"), **bpe},
        "JSONL, BPE": {"source": str(folder / "small.jsonl"), **bpe},
    }


def make_files(folder: Path, size: float, small: float, only: str) -> None:
    """Write the files of `tables` whose name has `only` in it, in gigabytes."""
    from telescope.config import PYTHON_STDLIB, DataConfig
    from telescope.data.corpus import load_corpus
    from telescope.data.tokenizing import make_tokenizer

    config = DataConfig(source=PYTHON_STDLIB)
    if only in "BPE, text, JSONL":
        make_tokenizer(config, 2048, folder / "bpe.json", lambda done, whole: None)
    corpus = load_corpus(config)
    text = np.asarray(corpus.train_tokens).astype(np.uint8).tobytes().decode(errors="ignore")
    documents = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    contents = {
        ".txt": text.encode(),
        ".jsonl": "".join(json.dumps({"text": each}) + "\n" for each in documents).encode(),
        ".bin": np.random.default_rng(0).integers(0, 50257, 5_000_000, dtype=np.uint16).tobytes(),
    }
    for name, keys in tables(folder).items():
        path = Path(keys["source"])
        wanted = (small if "tokenizer" in keys else size) * GIGABYTE
        if only in name and path.suffix == ".parquet":
            _write_parquet(path, documents, int(wanted / len(text)))
        elif only in name:
            with path.open("wb") as file:
                while file.tell() < wanted:
                    file.write(contents[path.suffix])


def _write_parquet(path: Path, documents: list[str], groups: int) -> None:
    """The documents as row groups, again and again."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema({"text": pyarrow.string()})
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(groups):
            writer.write_table(pyarrow.table({"text": documents}, schema=schema))


def memory() -> dict[str, int]:
    """Bytes of this process now, by kind."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kinds = {"anonymous": "RssAnon", "resident": "VmRSS"}
    return {kind: int(lines[key].split()[0]) * 1024 for kind, key in kinds.items()}


def measure(data: dict[str, Any], *, whole: bool) -> dict[str, float]:
    """Load a corpus and train nothing on it; peaks above the start, and seconds."""
    from telescope.config import DataConfig
    from telescope.data.corpus import Batches, held_out_batch, held_out_mask, load_corpus
    from telescope.data.tokenizer import load_tokenizer

    if data["source"].endswith(".parquet"):
        importlib.import_module("pyarrow.parquet")  # the library's own size is not the file's
    if "tokenizer" in data:
        load_tokenizer(data["tokenizer"]).encode(["warm"])
    at_start, peak, done = memory(), memory(), threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            for kind, now in memory().items():
                peak[kind] = max(peak[kind], now)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    if whole:
        read = np.frombuffer(Path(data["source"]).read_bytes(), dtype=np.uint8)
        tokens: Any = read[~held_out_mask(len(read), 0.05)]
    else:
        corpus = load_corpus(DataConfig(**data))
        tokens = corpus.train_tokens
        held_out_batch(corpus.held_out_tokens, count=16384, length=LENGTH)
    seconds = time.perf_counter() - start
    batches = Batches(tokens, batch_size=BATCH_SIZE, length=LENGTH, seed=0)
    for step in range(BATCHES):
        batches.at(step)
    done.set()
    watcher.join()
    return {kind: peak[kind] - at_start[kind] for kind in peak} | {"seconds": seconds}


def report(name: str, data: dict[str, Any], *, whole: bool = False) -> None:
    """Measure in a process of its own and print a row."""
    size = os.stat(data["source"]).st_size
    command = [sys.executable, __file__, "--measure", json.dumps(data)]
    done = subprocess.run(
        [*command, *(["--whole"] if whole else [])], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    megabytes = " ".join(f"{found[kind] / 1e6:9.0f}" for kind in ("anonymous", "resident"))
    ratios = " ".join(f"{found[kind] / size:9.3f}" for kind in ("anonymous", "resident"))
    print(
        f"{name:32} {size / GIGABYTE:6.2f} {megabytes} {ratios} {found['seconds']:8.2f}", flush=True
    )


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenized", type=float, default=0.02)
    parser.add_argument("--only", default="", help="measure what has this in its name")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure), whole=options.whole)))
        return
    folder = Path(tempfile.mkdtemp(prefix="data-memory-", dir=options.folder))
    os.environ["TELESCOPE_CACHE"] = str(folder / "cache")
    try:
        make_files(folder, options.gigabytes, options.tokenized, options.only)
        corpora = {name: keys for name, keys in tables(folder).items() if options.only in name}
        time.sleep(3)  # what was written just now is not remembered
        titles = ("anon. MB", "res. MB", "ratio", "ratio")
        print(f"{'':32} {'GB':>6} {' '.join(f'{t:>9}' for t in titles)} {'seconds':>8}")
        if "text, bytes" in corpora:
            report("text, bytes: read whole", corpora["text, bytes"], whole=True)
        for name, data in corpora.items():
            report(f"{name}: first time", data)
            report(f"{name}: from then on", data)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
