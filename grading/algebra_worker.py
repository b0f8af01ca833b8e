"""The process in which algebra.py has answers compared: it may hang, grow and die without harm to anybody.

    python algebra_worker.py own 2        a line ["candidate", "gold"] in, a line true or false out; 2 seconds a pair

It says "ready" once its imports are done, and ends when its input ends. Whoever asks keeps the clock and kills it; its
own limits, of time and memory, are for the case that the asker is gone.
"""
import contextlib
import json
import math
import os
import re
import resource
import signal
import sys

MEMORY = 2 * 2**30  # bytes of address space


def own():
    """Equal by math-verify: (candidate, gold), each the LaTeX of one expression with exact numbers -> bool."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Expr

    # No repairs: algebra.py writes the LaTeX, and what math-verify takes for a unit would be lost.
    plain = NormalizationConfig(basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none")
    latex = [LatexExtractionConfig(normalization_config=plain, boxed_match_priority=-1)]

    def read(text):
        return parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None)

    def equal(candidate, gold):
        pair = read(gold), read(candidate)
        if not all(len(found) == 1 and isinstance(found[0], Expr) for found in pair):
            return False
        # 100 digits: with the default 15, math-verify takes any two numbers below 1e-15 for equal.
        return verify(*pair, numeric_precision=100, timeout_seconds=None)

    return equal


def release():
    """The release's accuracy reward, quirks and all: (whole response, gold) -> bool."""
    from mathruler.grader import grade_answer

    def equal(response, gold):
        response = re.sub(r"(?:(?<!\s)\s+)?([<>/])\s*", r"\1", response)  # reference: spaces go, in the text too
        # reference: one line below the first such header, in this very case; without one the whole response (pebr_2.py)
        match = re.search(r"### The final answer is:\s*([^\n]*)", response)
        return grade_answer((match[1] if match else response).strip(), gold.strip())

    return equal


def main(rule: str, limit: float):
    with contextlib.suppress(OSError, ValueError):  # not every system lets us lower it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    sys.stdout = sys.stderr  # whatever a library prints is no reply
    equal = {"own": own, "release": release}[rule]()
    equal(r"\frac{(x+1)^{2}}{\sqrt{2}}", r"\sqrt{2}(x^{2}+2x+1)/2")  # loads what the first pair would wait for
    os.write(1, b"ready\n")  # in one piece, which algebra.py counts on, and print with PYTHONUNBUFFERED does not do
    for line in sys.stdin:
        signal.alarm(math.ceil(limit) + 1)  # ends this process, wherever it is: nobody waits for it any more
        os.write(1, b"true\n" if equal(*json.loads(line)) else b"false\n")
        signal.alarm(0)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
