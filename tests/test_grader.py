r"""Answers compared by algebra: what is right, what is never asked, and that nothing hangs, grows, stays or is lost."""
import ast
import os
import random
import signal
import sys
import threading
import time
from contextlib import closing
from glob import glob

import pytest
from test_answers import HOSTILE, PAIRS

import rewards
from data import InputError, Sample
from grading import algebra
from grading.algebra import LIMIT, Grader, check_rule, expression, expressions, process_grader
from grading.equal import correct, same_answer, symbolic
from ranks import ranks


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and may fork after importing torch")
ENDLESS = "9^{9^{9^{9}}}", r"\sqrt{2}"  # what expressions() refuses and the worker would work on for ever


@pytest.fixture(scope="module")
def grader():
    """The one that `same_answer` asks."""
    grader = process_grader("own")
    grader.limit = 20  # on a busy machine no right answer may be lost here
    yield grader
    grader.limit = LIMIT


def asked(grader: Grader) -> int:
    """Pairs that its worker has been asked."""
    return grader.equal.cache_info().misses


@pytest.fixture
def hasty():
    """Gives up after half a second."""
    with closing(Grader(limit=0.5)) as grader:
        yield grader


def gone(pid: int, seconds: float) -> bool:
    """Linux only: whether a process ends within so many seconds; one that waits for its parent to notice has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


# ---------------------------------------------------------------- what is right


def test_all_91_pairs_are_judged_right(grader):
    wrong = [(candidate, gold) for _, candidate, gold, right in PAIRS if same_answer(candidate, gold) != right]
    assert len(PAIRS) == 91 and not wrong and grader.timeouts == 0


@pytest.mark.parametrize("candidate, gold", [
    (r"\pi(R-r)(R+r)", r"\pi(R^2-r^2)"), (r"\frac{1}{2}x", r"\frac{x}{2}"), ("0.5x", r"\frac{x}{2}"),
    ("x^2+x", "x(x+1)"), ("a^2-b^2", "(a+b)(a-b)"), ("y = 1 + 2x", "y=2x+1"), (r"\boxed{6\sqrt{3}}", r"\sqrt{108}"),
    (r"\pi\cdot 4 cm^2", r"4\pi cm^2"), (r"sqrt(3)/2", r"\frac{\sqrt3}{2}"), ("4pi/2", r"2\pi"),
    (r"\sqrt{x}", "x^{1/2}"), (r"\frac{1}{x}", "x^{-1}"), (r"t(v_0+at/2)", r"v_0t+\frac{1}{2}at^2"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"), (r"2\sqrt[3]{2}", r"\sqrt[3]{16}"),
    ("1000+x^2", "x^{2}+10^3"),
    (r"\frac{-3x}{2}", r"-\frac{3}{2}x"), (r"\alpha+\alpha", r"2\alpha"), ("x/6", "x/2/3"), ("(e^x)^2", "e^{2x}"),
    ("√8\nThat is twice the root of two.", r"2\sqrt{2}"),
])
def test_equal_by_algebra(grader, candidate, gold):
    assert not correct(candidate, gold) and same_answer(candidate, gold)


@pytest.mark.parametrize("candidate, gold", [
    ("0", r"\pi(R^2-r^2)"), ("r-R", "R-r"), ("x+1", "y+1"), ("x=1+2x", "y=2x+1"), (r"\beta", r"\gamma+0"),
    (r"\sqrt{3}\times10^{-40}", r"\sqrt{2}\times10^{-40}"), ("0.0", r"\sqrt{2}/10^7"), (r"12.566", r"4\pi"),
    (r"4\pi cm", r"4\pi cm^2"), ("x", r"\sqrt{x^2}"), ("2x=2x+1", "2x+1"), (r"2\sqrt{2} or 3", r"\sqrt{8}"),
    (r"\sqrt{8}, 2\sqrt{2}", r"2\sqrt{2}"), (r"\pm\sqrt{8}", r"2\sqrt{2}"), ("1/2x", r"\frac{1}{2x}"),
    ("1/2x", r"\frac{x}{2}"), ("2f(x)", "f(2x)"), ("2sin(x)", "sin(2x)"), ("2ln x", "ln 2x"), ("HO2", "H2O"),
    ("BA", "AB"), ("2", "3-1"), ("[π, π/2]", r"[\pi/2, \pi]"), ("(√8, 1)", r"[2\sqrt{2}, 1]"),
    ("{2x}", r"\{x+x\}"), ("[2,1,3]", "[1,2,3]"), ("(x+1, x)", "(x, x+1)"),
    ("The answer is 12 + 13, so 25", "2^3+17"), ("x2", "2x"), (r"1\frac{1}{2}x", r"\frac{x}{2}"), ("-3x+e", "e-3x+1"),
])
def test_not_equal_or_not_one_expression(grader, candidate, gold):
    assert not same_answer(candidate, gold)


def drawn(generator: random.Random, depth: int) -> tuple[str, str, callable]:
    """One random expression in two spellings, and its value as a function of the variables' values."""
    if depth == 0:
        name = generator.choice(["x", "X", "y_1", r"\pi", "2", "3", "7"])
        return name, name, lambda at: at[name] if name in at else float(name)
    (a, a2, f), (b, b2, g) = drawn(generator, depth - 1), drawn(generator, generator.randrange(depth))
    return generator.choice([
        (f"{a}+({b})", f"({b2})+{a2}", lambda at: f(at) + g(at)),
        (f"{a}-({b})", f"-({b2})+{a2}", lambda at: f(at) - g(at)),
        (f"({a})({b})", f"({b2}) * ({a2})", lambda at: f(at) * g(at)),
        (rf"\frac{{{a}}}{{{b}}}", f"({a2})/({b2})", lambda at: f(at) / g(at)),
        (f"({a})^2", rf"({a2}) \cdot ({a2})", lambda at: f(at) ** 2),
        (rf"0.5\sqrt{{3}}({a})", rf"\frac{{\sqrt3}}{{2}}({a2})", lambda at: 3 ** 0.5 / 2 * f(at)),
    ])


def test_random_expressions_are_equal_where_their_values_are(grader):
    """In float64, at random values of the variables. One expression in two spellings, and with one symbol changed."""
    generator, equal = random.Random(0), 0
    for _ in range(40):
        gold, other, value = drawn(generator, 2)
        points = [{"x": generator.random(), "X": 2 + generator.random(), "y_1": 3.3, r"\pi": 3.141592653589793}
                  for _ in range(3)]
        changed = generator.choice(["x", "X", "y_1"])
        for candidate, at in ((other, lambda p: p), (other.replace(changed, "8"), lambda p: p | {changed: 8.0})):
            same = all(abs(value(point) - value(at(point))) < 1e-9 * abs(value(point)) + 1e-12 for point in points)
            if symbolic(gold) and expressions(candidate, gold):
                assert same_answer(candidate, gold) == same, (candidate, gold)
                equal += same
    assert equal > 20


def test_one_entry_asks_the_rules_and_then_algebra(grader):
    assert same_answer("B", "30°", ("20°", "30°")) and same_answer(r"\sqrt{8}", "2√2")
    assert not any(same_answer(answer, r"2\sqrt{2}") for answer in (None, "", "9" * 500))


def test_algebra_is_entered_only_where_the_gold_answer_is_symbolic(monkeypatch):
    def entered(*_):
        raise AssertionError
    monkeypatch.setattr(algebra, "by_algebra", entered)
    golds = ["7", "B", "yes", "[1, 2]", "25 cm", "50%", r"\frac{1}{2}", "1.2e3", "3-1", "red"]
    assert not any(same_answer("2+5+8", gold) for gold in golds)
    with pytest.raises(AssertionError):
        same_answer("x", r"2\sqrt{2}")
    assert symbolic(r"2\sqrt{2}") and symbolic("x+1") and not symbolic("x") and not symbolic("25cm")


def test_where_the_rules_understand_the_gold_nothing_else_is_asked(grader):
    """So no figure that was made without algebra changes."""
    golds = ["7", "B", "yes", "red cube", "[1, 2]", "25 cm", "50%", "5:30", r"\frac{1}{2}", "1.2e3", "3-1", "AB", "n"]
    answers = [candidate for _, candidate, _, _ in PAIRS]
    before = asked(grader)
    assert all(same_answer(c, gold) == correct(c, gold) for gold in golds for c in answers)
    assert asked(grader) == before


def test_names_are_shared_by_both_sides_and_products_explicit():
    names = {}
    assert expression("2xX", names) == r"2 \cdot {x_{1}} \cdot {x_{2}}"
    assert expression("X/1.5", names) == r"{x_{2}} / \frac{3}{2}"
    assert expressions("7", r"7\sqrt{x}") == ("7", r"7 \cdot \sqrt { {x_{1}} }")


def test_an_options_letter_and_an_options_algebra(grader):
    choices = (r"\sqrt{2}", r"2\sqrt{2}")
    assert same_answer("B", choices[1], choices) and same_answer(r"\sqrt{8}", choices[1], choices)
    assert not same_answer("A", choices[1], choices)


def test_the_same_pair_is_asked_once(grader):
    before = asked(grader)
    judged = [same_answer(answer, r"3\sqrt{7}") for answer in [r"\sqrt{63}"] * 7 + [r"\sqrt{64}"]]
    assert judged == [True] * 7 + [False] and asked(grader) == before + 2


# ---------------------------------------------------------------- what may take for ever


def hostile() -> list[str]:
    """Made to hang, to grow, to overflow the stack, to run code."""
    towers = [f"{base}{power}{base}{power}{base}" for base in ("9", "7", "x", "99") for power in ("^", "**")]
    towers += ["^{".join("9" * n) + "}" * (n - 1) for n in range(3, 8)]
    towers += ["2^{%s}" % inner for inner in (r"\sqrt{2^{\sqrt{3}}}", r"\sqrt{2}", "2^{40}", "99999999", "(9^9)")]
    towers += ["((9^{99})^{99})^{99}", "(9^9)^{9^9}", "10^{10^{10}}+1", "1/3^{99999999}", "{9^{99}}^{99}", "x^{y^{z}}"]
    factorials = ["99999999!", "x^x^x!", "(10^7)!", "((9!)!)!", "n!!", r"\Gamma(10^9)", "factorial(9)", r"\binom{9}{8}"]
    nests = [left * n + "2" + right * n for n in (8, 30, 60) for left, right in
             ((r"\frac{1}{", "}"), (r"\sqrt{", "}"), ("(", ")"), ("{", "}"), (r"\frac{", "}{3}"), ("x^{", "}"))]
    sums = ["(x+1)^{3000}", "(x+y+z)^{99}", "(x+1)**3000", r"\sum_{n=1}^{99999999}n", r"\int_0^1x^xdx", r"\prod_{n}n"]
    code = ["__import__('os').system('true')", "eval(1)", "exec(1)", "lambda x: x", "[x for x in ().__class__]", "1;2"]
    return towers + factorials + nests + sums + code + ["1" * 40 + "x", "x" * 10**6, r"\sqrt{8" * 9, "}{", "2)("]


@pytest.mark.parametrize("gold", [r"2\sqrt{2}", "(x+1)^2", r"\frac{\pi}{3}"])
def test_hostile_answers_are_wrong_at_once(grader, gold):
    answers = list(dict.fromkeys(HOSTILE + hostile()))
    assert len(answers) >= 109
    for answer in answers:
        start = time.perf_counter()
        assert not same_answer(answer, gold)
        assert time.perf_counter() - start < 3
    assert grader.timeouts == 0  # none was let through


@pytest.mark.parametrize("endless", [ENDLESS[0], "(x+1)^{3000}"], ids=["one operation", "many"])
def test_a_worker_that_hangs_is_killed_and_the_next_pair_judged(hasty, endless):
    start = time.perf_counter()
    assert not hasty.ask(endless, r"\sqrt{2}")
    assert time.perf_counter() - start < 30  # half a second, and the start of the worker
    assert hasty.timeouts == 1
    hasty.limit = 20
    assert hasty.ask(r"\sqrt{8}", r"2 \sqrt{2}") and hasty.timeouts == 1


@linux_only
def test_the_worker_has_2_gb_and_no_torch(grader):
    """Asked a pair, it has loaded all it ever loads; /proc lists the libraries of torch where it is loaded."""
    grader.ask("x+1", "1+x")
    with open(f"/proc/{grader.worker.pid}/limits") as limits, open(f"/proc/{grader.worker.pid}/maps") as maps:
        assert str(2 * 2**30) in next(line for line in limits if line.startswith("Max address space"))
        loaded = maps.read()
    assert "python" in loaded and "torch" not in loaded and "cuda" not in loaded


# ---------------------------------------------------------------- threads, processes, signals


def test_from_many_threads(grader):
    judged = {}

    def judge(i):
        judged[i] = same_answer(rf"\sqrt{{{8 * i * i}}}", rf"{2 * i + i % 2}\sqrt{{2}}")  # even i: equal

    threads = [threading.Thread(target=judge, args=(i,)) for i in range(3, 15)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert judged == {i: i % 2 == 0 for i in range(3, 15)}


def test_an_outer_alarm_survives(hasty):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(60)
    hasty.ask("x+1", "1+x")
    hasty.ask(*ENDLESS)
    assert 0 < signal.alarm(0) < 60
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def test_a_handler_that_raises_leaves_no_reply_for_the_next_pair(grader):
    """Else the late answer to the first pair would be taken for the second's."""
    def handler(*_):
        raise TimeoutError
    grader.ask("x", "x")
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with pytest.raises(TimeoutError):
        grader.ask(*ENDLESS)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    assert grader.worker is None and grader.ask("x+1", "1+x")


def test_a_worker_killed_by_somebody_else_costs_at_most_its_pair(grader):
    assert grader.ask("x+1", "1+x")
    grader.worker.kill()  # between two pairs: none is lost
    grader.worker.wait()
    assert grader.ask("x+2", "2+x")
    timer = threading.Timer(0.3, grader.worker.kill)
    timer.start()
    assert not grader.ask(*ENDLESS)  # during a pair: that one is wrong
    assert grader.ask("x+3", "3+x") and grader.timeouts == 0


@linux_only
@pytest.mark.parametrize("busy", [False, True])
def test_the_worker_ends_when_its_parent_is_killed(busy):
    """While it waits, it sees its input end; in the middle of a pair, the kernel ends it after 3 seconds of work."""
    reading, writing = os.pipe()
    parent = os.fork()  # a fresh one would import torch first
    if parent == 0:
        try:
            grader = Grader(limit=1)
            grader.ask("x+1", "1+x")
            os.write(writing, str(grader.worker.pid).encode())
            grader.limit = 100
            if busy:
                grader.ask(*ENDLESS)
            time.sleep(100)
        finally:
            os._exit(1)
    worker = int(os.read(reading, 20))
    time.sleep(0.3)
    assert not gone(worker, 0.1)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert gone(worker, 30)


def judge_alone():
    process_grader("own").limit = 20
    print(algebra.by_algebra(r"\sqrt{8}", r"2\sqrt{2}"), process_grader("own").worker.pid)


@linux_only
def test_from_a_spawned_process_which_takes_its_worker_along():
    judged, worker = ranks(1, judge_alone)[0].stdout.split()
    assert judged == "True" and gone(int(worker), 10)


# ---------------------------------------------------------------- in the reward


def test_4096_mixed_pairs_with_hostile_ones_restart_nothing(grader):
    """512 questions of 8 responses, an eighth of the golds symbolic, 1 % of the responses hostile: see the figure."""
    generator, bad, right = random.Random(0), hostile(), 0
    grader.ask("x+1", "1+x")
    start, worker, before = time.perf_counter(), grader.worker, asked(grader)
    for i in range(512):
        if i % 8 == 0:
            k = generator.randint(2, 99)
            gold, answers = rf"{k}\sqrt{{2}}", [rf"\sqrt{{{2 * k * k}}}", rf"{k}√2", rf"{k + 1}\sqrt{{2}}"]
        else:
            _, answer, gold, _ = generator.choice(PAIRS)
            answers = [answer, gold, "7", "B"]
        for _ in range(8):
            answer = generator.choice(bad) if generator.random() < 0.01 else generator.choice(answers)
            right += same_answer(answer, gold)
    print(f"\n4096 pairs in {time.perf_counter() - start:.1f} s, {right} right, {asked(grader) - before} asked")
    assert right > 1000 and asked(grader) - before > 50 and grader.worker is worker


RESPONSE = "### Image Description: a ### Rationales: b ### Step 1: c ### The final answer is: {}"


def test_the_accuracy_part_knows_algebra():
    responses = [RESPONSE.format(answer) for answer in (r"\sqrt{8}", r"\sqrt{2}", "2√2", "B")]
    _, parts = rewards.score([Sample("q", "?", answer=r"2\sqrt{2}")], responses, [1] * 4, {}, None)
    assert parts["accuracy"].tolist() == [1, 0, 1, 0]


def test_metrics_count_each_timeout_once(grader, monkeypatch):
    algebra.grader_counts("own")
    monkeypatch.setattr(grader, "limit", 0.5)
    grader.ask(*ENDLESS)
    assert [algebra.grader_counts("own") for _ in range(2)] == [{"grader/timeouts": 1}, {"grader/timeouts": 0}]


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setattr(algebra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="^--grader release needs .*: pip install mathruler pylatexenc$"):
        check_rule("release")


def test_a_worker_that_does_not_start_stops_the_run(monkeypatch, tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(algebra, "WORKER", str(tmp_path / "worker.py"))
    with pytest.raises(InputError, match="does not start: `.*worker.py own 2` shows why"):
        Grader().ask("x", "x")


# ---------------------------------------------------------------- the release's rule


@pytest.fixture(scope="module")
def release():
    pytest.importorskip("mathruler.grader")
    with closing(Grader("release", limit=20)) as grader:
        yield grader


@pytest.mark.parametrize("response, gold, right", [
    (RESPONSE.format(7), "7", True), (RESPONSE.format("B. 12"), "B", False), (RESPONSE.format("**7**"), "7", False),
    (RESPONSE.format("12°"), "12", False), (RESPONSE.format("BA"), "AB", True),
    (RESPONSE.format(r"\sqrt{8}"), r"2\sqrt{2}", True),
    (RESPONSE.format("1 / 2"), "1/2", True),  # spaces around < > / go
    (RESPONSE.format("7\n### The final answer is: 8"), "7", True),  # the first section counts
    (RESPONSE.format("7\n### The final answer is: 8"), "8", False),
    (RESPONSE.format("7\nIt is 8."), "7", True), (RESPONSE.format("\n\n7"), "7", True),  # and its first line
    (RESPONSE.format("7 ### The final answer is: 8"), "7", False),  # which goes on behind ###
    ("7", "7", True), ("It is 7", "7", False),  # without a section the whole response
    ("### the final answer is: 7", "7", False),  # the header in this case only
])
def test_release_rule(release, response, gold, right):
    assert release.equal(response, gold) == right


def test_release_rule_on_the_91_pairs(release):
    """58 right, 1 false positive, as measured on its own: it commutes AB."""
    judged = [release.equal(RESPONSE.format(candidate), gold) for _, candidate, gold, _ in PAIRS]
    assert sum(given == right for given, (*_, right) in zip(judged, PAIRS)) == 58
    assert [candidate for given, (_, candidate, _, right) in zip(judged, PAIRS) if given and not right] == ["AB"]


def test_release_rule_in_the_reward_and_killed_when_it_hangs(release):
    responses = ["7", RESPONSE.format(7), RESPONSE.format("**7**"), ""]
    _, parts = rewards.score([Sample("q", "?", answer="7")], responses, [1] * 4, {}, None, grader="release")
    assert parts["accuracy"].tolist() == [1, 1, 0, 0]
    with closing(Grader("release", limit=0.5)) as grader:
        assert not grader.equal(RESPONSE.format("9**9**9**9"), r"\sqrt{2}") and grader.timeouts == 1


def test_no_file_of_the_project_evaluates_text():
    paths = [path for pattern in ("*.py", "*/*.py") for path in glob(pattern, root_dir=ROOT)]
    assert len(paths) > 20
    for path in paths:
        with open(os.path.join(ROOT, path)) as file:
            calls = [node.func for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Call)]
        assert not {call.id for call in calls if isinstance(call, ast.Name)} & {"eval", "exec", "compile"}, path
