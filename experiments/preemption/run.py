"""Kills runs at random instants and starts them again: python experiments/preemption/run.py [--kills 5] [--seed 0].

With all 100 kills it writes a log, kills_PYTHON.json, beside this file.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jaxlib
import orbax.checkpoint

from lora_jax.formats import manifest

HERE = Path(__file__).parent
ALL = 100


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=ALL)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), arguments.kills, arguments.seed)
    print(found["summary"])
    if arguments.kills == ALL:
        rows = ",\n  ".join(json.dumps(kill) for kill in found.pop("kills"))
        text = f'{json.dumps(found, indent=1)[:-2]},\n "kills": [\n  {rows}\n ]\n}}\n'
        (HERE / f"kills_{platform.python_version()}.json").write_text(text)
    return found["summary"]["lost"] or found["summary"]["other bits"]


def measure(folder, number, seed):
    """So many kills over as many runs as it takes, two at a time."""
    start = time.time()
    train(folder / "warm").wait()  # compiles, for all that follow
    began = time.time()
    train(folder / "undisturbed").wait()
    life = time.time() - began
    expected = (folder / "undisturbed" / "adapter.safetensors").read_bytes()
    left = threading.Semaphore(number)  # kills that are still to be made

    def killed_run(i):
        draw = random.Random(f"{seed} {i}")
        instants = [draw.uniform(0, life) for _ in range(draw.choice([1, 2, 3]))]
        found = one_run(folder / str(i), i, instants, left, expected)
        if found:
            print(f"run {i}: {len(found)} kills, {time.time() - start:.0f} s", flush=True)
        return found

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        kills = [kill for found in pool.map(killed_run, range(10 * number)) for kill in found]
    phases = collections.Counter(kill["phase"] for kill in kills)
    summary = {
        "kills": len(kills),
        "runs": len({kill["run"] for kill in kills}),
        "phases": dict(phases),
        "during a save": sum(bool(kill["half-written"]) for kill in kills),
        "during a deletion": sum(bool(kill["half-deleted"]) for kill in kills),
        "lost": sum(kill["resumed from"] not in (kill["newest"], None) for kill in kills),
        "other bits": sum(not kill["same bits"] for kill in kills),
        "seconds of an undisturbed run": round(life, 1),
        "seconds": round(time.time() - start),
    }
    modules = (jax, jaxlib, orbax.checkpoint)
    versions = {"python": platform.python_version(), **{m.__name__: m.__version__ for m in modules}}
    machine = f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}"
    return {"summary": summary, "machine": machine, "versions": versions, "seed": seed, "kills": kills}


def one_run(folder, i, instants, left, expected):
    """A run that is killed so many seconds after each start, then left alone; what was there at each kill."""
    kills = []
    for instant in [*instants, None]:
        patience = instant if instant is not None and left.acquire(blocking=False) else None
        if patience is None and not kills:
            return []
        began = time.time()
        process = train(folder)
        try:
            status = process.wait(patience)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            if kills:
                kills[-1]["resumed from"] = resumed_from(folder)
            kills.append({"run": i, "seconds": round(instant, 3), **left_behind(folder, began)})
            continue
        assert status == 0, f"run {i} ended with {status}"
        if patience is not None:  # it has ended before its kill
            left.release()
        break
    if not kills:
        return []
    kills[-1]["resumed from"] = resumed_from(folder)
    same = (folder / "adapter.safetensors").read_bytes() == expected
    return [{**kill, "same bits": same} for kill in kills]


def train(folder):
    """The same command each time, with a file of steps of its own."""
    folder.mkdir(exist_ok=True)
    (folder / "steps").unlink(missing_ok=True)
    return subprocess.Popen([sys.executable, str(HERE / "train.py"), str(folder)])


def said(folder):
    """What a run has told since its last start: that its folder is open, and the steps that it took."""
    file = folder / "steps"
    lines = file.read_text().splitlines() if file.exists() else []
    return bool(lines), [int(line) for line in lines[1:]]


def resumed_from(folder):
    """The step that the last start went on from; None where it was killed too early to tell."""
    _, steps = said(folder)
    if steps:
        return steps[0] - 1
    return manifest.steps(folder / "checkpoints")[-1] if (folder / "adapter.safetensors").exists() else None


def left_behind(folder, began):
    """What a kill has left: the newest checkpoint, and what it cut off; not what an earlier one did."""
    opened, steps = said(folder)
    place = folder / "checkpoints"
    complete, deleted = [], []
    for step in manifest.steps(place) if place.exists() else []:
        try:
            manifest.read(place / str(step))
            complete.append(step)
        except manifest.DamagedError:
            deleted.append(step)
    phase = "training" if steps else "restoring" if opened else "starting"

    def own(path):
        return max(each.stat().st_ctime for each in (path, *path.rglob("*"))) > began

    return {
        "phase": "ending" if (folder / "adapter.safetensors").exists() else phase,
        "step": steps[-1] if steps else 0,
        "newest": complete[-1] if complete else 0,
        "half-written": [int(path.name.split(".")[0]) for path in place.glob("*tmp*") if own(path)],
        "half-deleted": [step for step in deleted if own(place / str(step))],
    }


if __name__ == "__main__":
    sys.exit(bool(main()))
