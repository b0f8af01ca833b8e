r"""Whether two answers are equal by algebra, found out in a process that can be killed.

    by_algebra(r"\sqrt{8}", r"2\sqrt{2}")    True: x^2+2x+1 is (x+1)^2 as well

Algebra needs sympy, which may work on a hostile answer for ever or fill the memory. So a worker does it
(algebra_worker.py, with math-verify), and is killed when it takes longer than the limit. No reply, or a worker that
dies, counts as wrong; pairs that are given up are counted.

Rule "own" asks the worker where both sides read as one expression: numbers, variables, fractions, roots, powers. It is
rewritten first: every product is made explicit, every decimal a fraction, and every variable gets a name of its own. To
math-verify R and r would otherwise be one variable, and the area \pi(R^2-r^2) would be 0. Rule "release" is the
authors' accuracy reward, mathruler on the whole response, for ablations.
"""
import functools
import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
from fractions import Fraction

from data import InputError
from grading.equal import answer_line, clean, without_left_side

WORKER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "algebra_worker.py")
LIMIT = 2.0  # seconds for a pair
START = 60.0  # seconds for the worker's imports
CACHE = 4096  # pairs remembered: the responses of a group repeat each other


def check_rule(rule: str):
    """Raise InputError where the release's rule is asked for and its packages, which few have, are not installed."""
    needed = ("mathruler", "pylatexenc") if rule == "release" else ()
    if not all(map(importlib.util.find_spec, needed)):
        raise InputError(f"--grader {rule} needs what is not installed: pip install {' '.join(needed)}")


# ---------------------------------------------------------------- what may be asked: one expression

DEPTH = 6  # groups within groups
GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|rho|sigma|tau|phi|varphi|omega"
TOKEN = re.compile(
    r"(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<pi>\\pi)(?![A-Za-z])|(?P<call>\\frac|\\sqrt(?:\[\d\])?)(?![A-Za-z])"
    rf"|(?P<variable>(?:\\(?:{GREEK})(?![A-Za-z])|[A-Za-z])(?:_(?:[A-Za-z\d]|\{{[A-Za-z\d]{{1,3}}\}}))?)"
    r"|(?P<sign>(?:\\cdot|\\times|\\div)(?![A-Za-z])|[-+*/])|(?P<power>\^)|(?P<open>[({])|(?P<close>[)}])")
PI = re.compile(r"(?<![\\A-Za-z])pi(?![A-Za-z])")
EXPONENT = re.compile(r"\^(?:[A-Za-z]|\{(?![^{}]*\d{3})[-+/A-Za-z\d]{1,8}\}|\{-?\\frac\{\d{1,2}\}\{\d{1,2}\}\})(?!\^)")
WORD = re.compile(r"(?<![\\A-Za-z])(?:[A-Za-z]{4}|(?:sin|cos|tan|cot|sec|csc|log|ln|lg|exp|max|min|lim|det|gcd|lcm|mod"
                  r"|abs|arg|and|or)(?![A-Za-z])|(?:[A-Za-z]{2,}|[FGP])\()", re.IGNORECASE)
DENIED = re.compile(  # what is no token, as in n!, needs no entry
    r"\*\*|\d{40}|\)\^\{-?[2-9]\d"  # may take for ever; (x+y+z)^{99} does
    r"|\d \d|\d[eE][-+]?\d")  # has two readings
FACTORS = {"number", "pi", "call", "variable"}  # each begins a factor; so does a parenthesis


def tokens_of(text: str) -> list[re.Match] | None:
    """The tokens of an expression; None when there is anything else in the text, or what may take for ever."""
    text = PI.sub(r"\\pi ", text)
    tokens = list(TOKEN.finditer(text))
    strange = "".join(token[0] for token in tokens) != text.replace(" ", "")
    if strange or DENIED.search(text) or WORD.search(text) or len(EXPONENT.findall(text)) != text.count("^"):
        return None
    return tokens


def expression(text: str, names: dict[str, str]) -> str | None:
    r"""The text as LaTeX with one reading; None when it is not one expression, has several readings (1/2x,
    1\frac{1}{2}, x2, f(x)), or may take for ever to compare.

    names: what each variable is called in the LaTeX. The two sides share it, and it is extended here.
    """
    latex, before, signs = [], "", [""]  # before: kind of the token before; signs: the last one of each open group
    for token in tokens_of(text) or ():
        kind, word = token.lastgroup, token[0]
        if (kind in FACTORS or word == "(") and before in ("number", "pi", "variable", "close"):
            mixed = before == "number" and word == r"\frac"
            if kind == "number" or mixed or signs[-1] in ("/", r"\div"):
                return None
            latex.append(r"\cdot")  # a product that was only implied
        if kind == "number" and "." in word:
            word = r"\frac{%d}{%d}" % Fraction(word).as_integer_ratio()
        elif kind == "variable":
            word = "{%s}" % names.setdefault(word, f"x_{{{len(names) + 1}}}")
        elif kind == "sign":
            signs[-1] = word
        elif kind == "open":
            if word == "{" and before not in ("power", "call", "close"):  # a set, perhaps
                return None
            signs.append("")
        elif kind == "close":
            signs.pop()
        if not 0 < len(signs) <= DEPTH:
            return None
        latex.append(word)
        before = kind
    return " ".join(latex) if len(signs) == 1 and latex else None


def expressions(candidate: str, gold: str) -> tuple[str, str] | None:
    """Both sides for the worker to compare, or None when there is nothing to ask."""
    given, wanted = clean(candidate), clean(gold)
    given, wanted = without_left_side(given, wanted), without_left_side(wanted, given)
    names = {}
    wanted, given = expression(wanted, names), expression(given, names)
    return (given, wanted) if given and wanted else None


# ---------------------------------------------------------------- asking

class Grader:
    """Compares answers by one rule, from any thread."""

    def __init__(self, rule: str = "own", limit: float = LIMIT):
        check_rule(rule)
        self.rule, self.limit = rule, limit
        self.timeouts, self.worker = 0, None
        self.lock = threading.Lock()
        self.equal = functools.lru_cache(CACHE)(self.ask)

    def ask(self, candidate: str, gold: str) -> bool:
        """What the worker says of a pair as it is; False when it says nothing within the limit, or dies of it."""
        with self.lock:
            if self.worker is None or self.worker.poll() is not None:
                self.start()
            reply = b""
            try:
                self.worker.stdin.write(json.dumps([candidate, gold]).encode() + b"\n")
                reply = self.read_line(self.limit)
            except BrokenPipeError:
                pass
            finally:  # also when a signal's handler raises: a reply that comes later would be taken for the next pair's
                if not reply:
                    self.close()
            return reply == b"true\n"

    def start(self):
        """A fresh interpreter, not a fork of this one with its threads, locks and CUDA."""
        self.close()
        environment = os.environ | {"PYTHONHASHSEED": "0"}  # sympy walks through sets
        self.worker = subprocess.Popen([sys.executable, WORKER, self.rule, str(self.limit)], bufsize=0, env=environment,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.read_line(START) != b"ready\n":
            self.close()
            raise InputError("the process that compares answers does not start: "
                             f"`{sys.executable} {WORKER} {self.rule} {self.limit:g}` shows why")

    def read_line(self, seconds: float) -> bytes:
        """The worker's next line, which comes in one piece; b"" when the worker has ended, or when the time is over,
        which is counted."""
        poll = select.poll()  # select.select refuses the high descriptors of a process with many files
        poll.register(self.worker.stdout, select.POLLIN)
        if poll.poll(seconds * 1000):
            return self.worker.stdout.read(100)
        self.timeouts += 1
        return b""

    def close(self):
        """End the worker; the next pair that needs one starts another."""
        if self.worker is not None:
            self.worker.kill()
            self.worker.communicate()
            self.worker = None


process_grader = functools.cache(Grader)  # this process's grader of a rule


def grader_counts(rule: str) -> dict[str, int]:
    """The pairs that this process has given up after LIMIT seconds since the last call."""
    grader = process_grader(rule)
    timeouts, grader.timeouts = grader.timeouts, 0
    return {"grader/timeouts": timeouts}


def by_algebra(candidate: str, gold: str) -> bool:
    """Whether the worker finds an answer equal to gold; False where there is nothing to ask."""
    pair = expressions(answer_line(candidate), gold)
    return pair is not None and process_grader("own").equal(*pair)
