"""Many random programs, held to the laws: python experiments/random_programs/run.py [--programs N] [--again]."""

import argparse
import collections
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import re
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
FILE, ROOT = HERE / "results.json", HERE.parents[1]
MACHINE = f"{os.cpu_count()} CPU cores, {platform.machine()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=5000, help="how many distinct ones, in all")
    parser.add_argument("--seed", type=int, default=0, help="of the first worker; the others count on from it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true", help="examine the recorded failures again, and draw none")
    arguments = parser.parse_args()
    if arguments.again:
        return examined_again()
    share = -(-arguments.programs * 21 // (20 * arguments.workers))  # workers may draw the same
    seeds = [arguments.seed + i for i in range(arguments.workers)]
    began = time.time()
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        parts = pool.starmap(work, [(seed, share) for seed in seeds])
    seconds = time.time() - began
    sources = {source for part in parts for source in part["sources"]}
    run = {
        "machine": MACHINE,
        "versions": {"python": platform.python_version(), "jax": parts[0]["jax"], "hypothesis": parts[0]["hypothesis"]},
        "seeds": seeds,
        "programs": len(sources),
        "seconds": round(seconds),
        "worst": max(parts, key=lambda part: part["worst"][0])["worst"],
        "discards": added(part["discards"] for part in parts),
        "failures": [failure for part in parts for failure in part["failures"]],
        "moves": added(part["moves"] for part in parts),
        "primitives": added(part["primitives"] for part in parts),
    }
    runs = json.loads(FILE.read_text()) if FILE.exists() else {}
    runs[f"Python {platform.python_version()}, seed {arguments.seed}"] = run
    FILE.write_text(json.dumps(dict(sorted(runs.items())), indent=1) + "\n")
    print(f"{len(sources)} programs in {seconds:.0f} s; {len(run['failures'])} failed; {run['discards']} discarded")
    for failure in run["failures"][:5]:
        print(f"\n{failure['error']}\n{failure['program']}")
    return bool(run["failures"])


def examined_again():
    """Takes those failures out of the record that hold, now that a check or a rule has changed; whether any is left."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    importlib.import_module("conftest")
    import jax
    from programs import Program
    from test_random_programs import examine

    runs = json.loads(FILE.read_text())
    for run in runs.values():
        run.setdefault("failed_at_first", len(run["failures"]))
        left = []
        for failure in run["failures"]:
            try:
                with jax.numpy_dtype_promotion("strict"):
                    examine(eval(failure["program"], {"Program": Program}))
            except Exception as error:  # as below: whatever goes wrong is a finding, and is written down
                left.append({**failure, "error": f"{type(error).__name__}: {error}"})
        run["failures"] = left
        print(f"{run['failed_at_first']} failed, {len(left)} do still")
    FILE.write_text(json.dumps(runs, indent=1) + "\n")
    return any(run["failures"] for run in runs.values())


def added(counts):
    total = sum(map(collections.Counter, counts), collections.Counter())
    return dict(total.most_common())


def work(first, count):
    """Distinct programs until there are enough, by one seed after another; what they used, and which failed."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    importlib.import_module("conftest")  # the tests' platform and flags, before JAX is imported
    import hypothesis
    import jax
    from hypothesis import HealthCheck, Phase, given, settings
    from programs import programs
    from test_random_programs import examine

    from lora_jax.interpreter import RULES

    primitives, moves, seen, failures, worst = collections.Counter(), collections.Counter(), set(), [], (0.0, 1.0)
    discards = collections.Counter()

    def counting(name, rule):
        def counted(*args):
            primitives[name] += 1
            return rule(*args)

        return counted

    RULES.update({name: counting(name, rule) for name, rule in RULES.items()})

    def hold(program):
        nonlocal worst
        if repr(program) in seen:
            discards["drawn before"] += 1
            return
        if len(seen) == count:
            return
        seen.add(repr(program))
        moves.update(program.moves)
        try:
            with jax.numpy_dtype_promotion("strict"):
                worst = max(worst, (examine(program), program.tolerance), key=lambda pair: pair[0] / pair[1])
        except Exception as error:  # whatever a program brings to light is what is looked for, and is written down
            cause = re.sub(r"program_\w+\.py", "program.py", f"{type(error).__name__}: {error}")
            failures.append({"error": cause, "program": repr(program)})

    round_ = 0
    while len(seen) < count:
        budget = settings(
            max_examples=min(500, 50 + count - len(seen)),
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        hypothesis.seed(1000 * first + round_)(budget(given(programs())(hold)))()
        jax.clear_caches()
        round_ += 1
    return {
        "sources": sorted(seen),
        "jax": jax.__version__,
        "hypothesis": importlib.metadata.version("hypothesis"),
        "worst": worst,
        "discards": discards,
        "failures": failures,
        "moves": moves,
        "primitives": primitives,
    }


if __name__ == "__main__":
    sys.exit(main())
