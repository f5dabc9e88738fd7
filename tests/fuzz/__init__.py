"""Random JAX programs: what they are, how they are drawn, how a failing one is made small, and a loop to find some.

A `Program` is a list of steps over a pool of values; every step is one assignment in Python, so a program is its own
source. `programs` draws programs through Hypothesis, `generate` does so from a seed. `reduce` takes a failing program
apart: a step gives way to a fresh parameter or input of its shape, a value to an older one, what nothing reads goes.

    JAX_ENABLE_X64=1 PYTHONPATH=tests python -m fuzz --seconds 600 --seed 1 --out found.py

draws programs for a time, puts each to the laws and appends every small counter-example as source. Operations come in
families; each program uses a few of them ("Swarm testing", Groce et al., ISSTA 2012).

Reading order: `program.py`, `builder.py`, `products.py` and the other steps, `drawing.py`, `judging.py`, `reducing.py`.
"""

from fuzz.drawing import generate, programs
from fuzz.judging import FLAGS, Failure, Trivial, check, names
from fuzz.reducing import reduce, report

__all__ = ["FLAGS", "Failure", "Trivial", "check", "generate", "names", "programs", "reduce", "report"]
