"""Draw programs for a time, put each to the laws, append every small counter-example as source."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time

import jax

from fuzz.builder import OPS
from fuzz.drawing import ALWAYS, generate
from fuzz.judging import FLAGS, Trivial, check
from fuzz.reducing import reduce, report


def main() -> None:
    os.environ.setdefault("XLA_FLAGS", FLAGS)  # read when the first array is made
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="found.py")
    parser.add_argument("--skip", default="", help="families to leave out, with commas")
    parser.add_argument("--only", default="", help="families to draw from, with commas")
    parser.add_argument("--ignore", action="append", default=[], help="failures to pass over: part of their text")
    parser.add_argument("--most", type=int, default=9, help="steps of a program")
    parser.add_argument("--dry", action="store_true", help="only trace, many more programs")
    parser.add_argument("--extra", action="store_true", help="narrow under vmap and twice as well")
    parser.add_argument("-v", action="store_true")
    args = parser.parse_args()
    if not jax.config.jax_enable_x64:
        parser.error("set JAX_ENABLE_X64=1: the laws are exact in float64")
    start, counts, seen = time.monotonic(), {"held": 0, "trivial": 0, "failed": 0, "invalid": 0}, {}
    for n in itertools.count():
        if time.monotonic() - start > args.seconds:
            break
        if n % 50 == 49:
            jax.clear_caches()
        seed = args.seed * 100000 + n
        rng = random.Random(seed)
        families = [f for f in OPS if f not in args.skip.split(",") and (not args.only or f in args.only.split(","))]
        families = [f for f in families if f not in ALWAYS and rng.random() < (0.3 if not args.only else 0.7)]
        try:
            program = generate(seed, families, args.most)
            failure = check(program, seed=seed, extra=args.extra and n % 3 == 0, dry=args.dry)
        except Trivial:
            counts["trivial"] += 1
            continue
        except Exception as error:  # noqa: BLE001
            counts["invalid"] += 1
            print(f"seed {seed}: invalid: {error!r}"[:300], flush=True)
            continue
        if not failure:
            counts["held"] += 1
            continue
        counts["failed"] += 1
        known = failure.kind if " at " in failure.kind else None
        if any(text in failure.kind + failure.text for text in args.ignore) or seen.get(known, 0) >= 2:
            continue
        print(f"seed {seed}: {failure.kind}: {failure.text[:200]}", flush=True)
        program, failure = reduce(program, failure, seed, dry=args.dry)
        seen[failure.kind] = seen.get(failure.kind, 0) + 1
        text = report(program, failure, seed)
        print(text, flush=True)
        with open(args.out, "a") as file:
            file.write(text)
    took = time.monotonic() - start
    print(f"{counts} in {took:.0f} s: {3600 * (counts['held'] + counts['failed']) / took:.0f} programs an hour")
    sys.exit(bool(counts["failed"] + counts["invalid"]))


if __name__ == "__main__":
    main()
