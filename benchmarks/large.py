"""A data set that would not fit as raw pixels: generated, prepared through a kill -9, and swept.

    python -m benchmarks.large --folder /tmp/large [--images 100000] [--classes 1000] [--minutes 30] [--json FILE]

The pictures are JPEG files of 500 x 375 pixels, about 30 kB each: a pattern of their class under noise of their own, so
that a small net can learn them and no two are twins. What is there already is not generated again. Then they are
prepared in a cache of their own, by a process that is killed half-way and by one that goes on; a plain DataLoader
(ImageFolder, two workers, resize to the same size) reads the same files; and `search.run` sweeps. Printed are images
per second, the largest memory of all processes together (proportional set size: shared pages count once; pages of files
do not count, because the kernel takes them back whenever it needs room), and the bytes of the cache against those of
the pictures. 100,000 take about an hour and a quarter on two cores.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import tyro
from PIL import Image
from torchvision import transforms
from torchvision.datasets import ImageFolder

from trainables.command import progress
from trainables.data.prepare import prepare

WIDTH, HEIGHT = 500, 375
READ = 4000  # images that the plain DataLoader reads
PREPARE = "import sys; from trainables.data.prepare import prepare; prepare('folder', sys.argv[1], twins=False)"


@dataclass(frozen=True)
class Large:
    """Prepare and sweep many pictures."""

    folder: Path
    """Where the pictures, the cache and the run go; about 7 GB for 100,000."""
    images: int = 100_000
    classes: int = 1000
    minutes: float = 30.0
    """Of the sweep; 0 leaves it away."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None


class Memory:
    """The largest sum of what a process and all that it has started hold, in bytes, each shared page counted once."""

    def __init__(self, pid: int) -> None:
        self.pid, self.largest, self.over = pid, 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.over.wait(1.0):
            total = 0
            try:
                one = psutil.Process(self.pid)
                for process in [one, *one.children(recursive=True)]:
                    try:
                        total += held_by(process.pid)
                    except OSError:  # it has ended
                        continue
            except psutil.Error:
                return
            self.largest = max(self.largest, total)

    def stop(self) -> int:
        self.over.set()
        self.thread.join()
        return self.largest


def held_by(pid: int) -> int:
    """Its proportional set size in bytes, without the pages of files."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines[1:])}
    return 1024 * (found["Pss_Anon"] + found["Pss_Shmem"])


def generate(root: Path, images: int, classes: int) -> None:
    """ROOT/train/<class>/<number>.jpg; those that are there stay."""
    with ProcessPoolExecutor() as pool, progress("generating pictures", classes) as advance:
        jobs = [
            pool.submit(_generate_class, root / "train" / f"class{c:04}", c, images // classes) for c in range(classes)
        ]
        for job in jobs:
            job.result()
            advance(1)


def _generate_class(folder: Path, number: int, images: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pattern = np.random.default_rng(number).integers(40, 216, (4, 5, 3)).astype(np.uint8)
    for i in range(images):
        path = folder / f"{i:05}.jpg"
        if path.exists():
            continue
        own = np.random.default_rng([number, i])
        noise = own.normal(0, 30, (HEIGHT // 5, WIDTH // 5, 3)).astype(np.float32)
        coarse = Image.fromarray(np.roll(pattern, own.integers(0, 2, 2), (0, 1))).resize((WIDTH, HEIGHT), 3)
        fine = np.stack(
            [np.asarray(Image.fromarray(band).resize((WIDTH, HEIGHT), 2)) for band in noise.transpose(2, 0, 1)], 2
        )
        picture = (np.asarray(coarse) + fine + own.normal(0, 4, (HEIGHT, WIDTH, 1))).clip(0, 255).astype(np.uint8)
        temporary = path.with_suffix(".tmp")
        Image.fromarray(picture).save(temporary, "JPEG", quality=75)
        temporary.replace(path)


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def prepare_through_a_kill(root: Path, cache: Path, images: int) -> dict[str, Any]:
    """Prepare, killed after half of the images, and go on; returns seconds, images per second and memory."""
    environment = {**os.environ, "NINEFOLD_CACHE": str(cache)}

    def start() -> tuple[subprocess.Popen, Memory]:
        process = subprocess.Popen([sys.executable, "-c", PREPARE, str(root)], env=environment)
        return process, Memory(process.pid)

    def done() -> int:
        logs = list((cache / "data").glob("*.tmp/log.jsonl"))
        return logs[0].read_bytes().count(b"\n") if logs else 0

    began = time.perf_counter()
    process, memory = start()
    while process.poll() is None and done() < images / 2:
        time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed_at, first, largest = done(), time.perf_counter() - began, memory.stop()
    began = time.perf_counter()
    process, memory = start()
    if process.wait() != 0:
        raise SystemExit("preparing failed")
    second = time.perf_counter() - began
    return {
        "killed_after_images": killed_at, "seconds": first + second, "seconds_after_the_kill": second,
        "images_per_second": images / (first + second), "memory": max(largest, memory.stop()),
    }  # fmt: skip


def plain_loader(root: Path, size: tuple[int, int]) -> float:
    """Images per second of ImageFolder and DataLoader with two workers, decoded and resized like ours."""
    change = transforms.Compose([transforms.Resize(size), transforms.PILToTensor()])
    rows = np.random.default_rng(0).permutation(len(data := ImageFolder(root / "train", change)))[:READ].tolist()
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, rows), batch_size=64, num_workers=2)
    began = time.perf_counter()
    count = sum(len(images) for images, _ in loader)
    return count / (time.perf_counter() - began)


def random_reads(cache: Path, root: Path) -> tuple[float, tuple[int, int]]:
    """Images per second that training reads from the cache, in random order, and their height and width."""
    data = prepare("folder", root, cache_dir=cache, twins=False)
    rows = np.random.default_rng(0).permutation(len(data.labels))[:READ]
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    for start in range(0, len(rows), 64):
        np.ascontiguousarray(data.images[rows[start : start + 64]])
    return len(rows) / (time.perf_counter() - began), (data.images.shape[1], data.images.shape[2])


def sweep(args: Large, root: Path, cache: Path) -> dict[str, Any]:
    """A default sweep of one small net; returns seconds, memory and its ensemble's claim."""
    run = args.folder / "run"
    options = ["--data", "folder", "--data-dir", str(root), "--run", str(run), "--minutes", str(args.minutes)]
    options += ["--backbones", "tf_efficientnet_lite0", "--ignore-twins"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "search.run", *options], env={**os.environ, "NINEFOLD_CACHE": str(cache)}
    )
    memory = Memory(process.pid)
    if process.wait() != 0:
        raise SystemExit("the sweep failed")
    files: Sequence[Path] = sorted((run / "ensembles").glob("*.json"))
    claim = json.loads(files[0].read_text())["scores"]["claim"]
    return {"seconds": time.perf_counter() - began, "memory": memory.stop(), "claim": claim, "run_bytes": bytes_in(run)}


def main() -> None:
    args = tyro.cli(Large, description=Large.__doc__, prog="python -m benchmarks.large")
    root, cache = args.folder / "pictures", args.folder / "cache"
    generate(root, args.images, args.classes)
    source = bytes_in(root)
    print(
        f"{args.images:,} pictures of {WIDTH} x {HEIGHT} in {args.classes:,} classes: {source / 1e9:.2f} GB", flush=True
    )
    found: dict[str, Any] = {"images": args.images, "classes": args.classes, "source_bytes": source}
    found["prepare"] = prepare_through_a_kill(root, cache, args.images)
    kept = bytes_in(cache / "data")
    found["cache_bytes"] = kept
    print(
        f"prepared in {found['prepare']['seconds']:.0f} s, killed after {found['prepare']['killed_after_images']:,}: "
        f"{found['prepare']['images_per_second']:.0f} images/s, {found['prepare']['memory'] / 2**30:.2f} GiB, "
        f"{kept / 1e9:.2f} GB kept, {kept / source:.2f} x the pictures", flush=True,
    )  # fmt: skip
    found["reads_per_second"], size = random_reads(cache, root)
    found["plain_loader_per_second"] = plain_loader(root, size)
    print(
        f"read in random order: {found['reads_per_second']:.0f} images/s from the cache, "
        f"{found['plain_loader_per_second']:.0f} by ImageFolder and DataLoader", flush=True,
    )  # fmt: skip
    if args.minutes:
        found["sweep"] = sweep(args, root, cache)
        claim = found["sweep"]["claim"]
        print(
            f"swept in {found['sweep']['seconds']:.0f} s, {found['sweep']['memory'] / 2**30:.2f} GiB: "
            f"select claim {claim['accuracy']:.2%} on {claim['images']:,} images"
        )
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
