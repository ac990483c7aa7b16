"""Run a script for several seeds, one after another, and print mean ± standard deviation.

    python tests/sweep.py --seeds 0,1,2 sgan_mnist.py --num-labeled 50
    python tests/sweep.py --seeds 0,1,2 --photos data/PetImages sgan_catsdogs.py --image-size 64
    python tests/sweep.py --curves curve.png runs/mnist100 runs/mnist20

The first form runs the script with `--seed S --split-seed S` for each S, and reads the test
accuracies of its RESULT lines, of toy_rings.py that of each method. The second runs it with
`--seed S` on four folders, which --prepare draws with `--split-seed S` unless data/draws/ has them.
The third draws, for all runs in each folder, the error of the averaged weights on validation images
against the seconds since the start, or with `--x step` the steps (the rings have no validation).
"""

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent


def summary(values):
    """Mean ± sample standard deviation, and of how many."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread} of {len(values)}"


def photo_folders(root):
    """The flags for the four folders of photos in root."""
    return ["--labeled-dir", root / "labeled", "--unlabeled-dir", root / "train",
            "--val-dir", root / "val", "--test-dir", root / "test"]


def draw_photos(source, labels_per_class, seed):
    """The flags for the four folders of a draw, which is made first if it is not there."""
    root = Path(f"data/draws/{labels_per_class}_of_each__split{seed}")
    flags = photo_folders(root)
    if not root.exists():
        subprocess.run([sys.executable, ROOT / "sgan_catsdogs.py", "--prepare", source,
                        "--labels-per-class", labels_per_class, "--split-seed", seed, *flags],
                       check=True)
    return flags


def sweep(seeds, script, flags, photos=None, labels_per_class=None):
    scores = {}  # what was measured -> a value for each seed: accuracies in percent, seconds
    for seed in seeds:
        line = ""
        command = [sys.executable, ROOT / script, "--seed", seed]
        command += (draw_photos(photos, labels_per_class, seed) if photos
                    else ["--split-seed", seed])
        with subprocess.Popen([*command, *flags], stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode:
            raise SystemExit(f"{script} with --seed {seed} stopped with {process.returncode}")
        if not line.startswith("RESULT "):
            raise SystemExit(f"{script} with --seed {seed} printed no RESULT")
        result = json.loads(line.removeprefix("RESULT "))
        accuracy = result.get("accuracy") or {"test": result["test_accuracy"],
                                              "best val": result["test_accuracy_best_val"]}
        for name, value in accuracy.items():
            scores.setdefault(name + ", %", []).append(100 * value)
        scores.setdefault("seconds", []).append(result["seconds"])
    print("\n".join(f"{name}: {summary(values)}" for name, values in scores.items()))


def draw_curves(folders, path, x):
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for n, folder in enumerate(folders):
        runs = sorted(Path(folder).glob("*/metrics.csv"))
        if not runs:
            raise SystemExit(f"{folder} has no folders of runs in it")
        for k, metrics in enumerate(runs):
            with open(metrics, newline="") as f:
                rows = list(csv.DictReader(f))
            axes.plot([float(row[x]) for row in rows],
                      [100 * (1 - float(row["val_accuracy_ema"])) for row in rows], marker=".",
                      color=f"C{n}", alpha=0.6, label=None if k else Path(folder).name)
    axes.set(xlabel={"seconds": "seconds of training and validation", "step": "steps"}[x],
             ylabel="error on validation images, %", xscale="log", yscale="log")
    for axis, ticks in ((axes.xaxis, [10, 30, 100, 300, 1000, 3000, 10000]),
                        (axes.yaxis, [1, 2, 5, 10, 15, 20, 30, 50])):
        low, high = axis.get_view_interval()
        axis.set_ticks([n for n in ticks if low <= n <= high])
        axis.set_major_formatter("{x:.0f}")
        axis.set_minor_formatter("")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower left")
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--photos", help="folder that sgan_catsdogs.py --prepare draws from")
    parser.add_argument("--labels-per-class", default="50", help="labeled photos to draw")
    parser.add_argument("--curves", help="draw the runs of these folders into this picture instead")
    parser.add_argument("--x", choices=["seconds", "step"], default="seconds",
                        help="what the curves are drawn against")
    args, rest = parser.parse_known_args()
    if not rest:
        parser.error("name a script, or folders of runs for --curves")
    if args.curves:
        draw_curves(rest, args.curves, args.x)
    else:
        sweep(args.seeds.split(","), rest[0], rest[1:], args.photos, args.labels_per_class)


if __name__ == "__main__":
    main()
