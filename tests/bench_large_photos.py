"""Decode photos of 12 megapixels: photos a second and peak memory, ours against whole batches.

    python tests/bench_large_photos.py             # 40 photos, batches of 64, 224 px, CPU

"whole batches" is a DALI pipeline as in its tutorials: it decodes 64 photos at once and fills the
last batch with copies. Each way runs in a process of its own, so that its peak memory is its own.
"""

import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import dali_loader

BATCH, SIDE = 64, 224


def whole_batches(files):
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH, num_threads=torch.get_num_threads(), device_id=None)
    def pipeline():
        encoded, _ = fn.readers.file(files=files, pad_last_batch=True)
        x = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
        return fn.resize(x, resize_x=SIDE, resize_y=SIDE)

    pipe = pipeline()
    pipe.build()
    for _ in range(-(-len(files) // BATCH)):
        pipe.run()


def ours(files):
    for _ in dali_loader(files, None, BATCH, SIDE, torch.device("cpu")):
        pass


def measure(way, files):
    ours(files[:1])  # DALI is loaded
    before, started = peak_mib(), time.perf_counter()
    {"ours": ours, "whole batches": whole_batches}[way](files)
    seconds = time.perf_counter() - started
    print(f"{way}: {len(files)} photos, {len(files) / seconds:.1f} photos/s, peak memory "
          f"{peak_mib() - before:.0f} MiB above the start's {before:.0f}")


def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main():
    if len(sys.argv) > 1:
        return measure(sys.argv[1], sys.argv[2:])
    with TemporaryDirectory() as folder:
        rng, files = np.random.default_rng(0), []
        for n in range(40):  # as large on disk as a phone's photos, about 3 MB
            coarse = Image.fromarray(rng.integers(256, size=(756, 1008, 3), dtype=np.uint8))
            files.append(f"{folder}/{n}.jpg")
            coarse.resize((4032, 3024), Image.Resampling.BICUBIC).save(files[-1], quality=75)
        print(f"{sum(Path(path).stat().st_size for path in files) / len(files) / 1e6:.1f} MB each")
        for some in (files, files[:4]):
            for way in ("ours", "whole batches"):
                subprocess.run([sys.executable, __file__, way, *some], check=True)


if __name__ == "__main__":
    main()
