"""Figures and tables of an evaluation: intervals, verdicts, breakdowns, what perception costs.

    responses = read_responses("responses.jsonl")                pid -> {"response", ..}
    rows = judge_all("mathvista", responses, items)              pid -> {"response", "extraction", "rule", ..}
    report = summarize("mathvista", items, {"responses": rows})  what report.json holds
    print(markdown(report | {"model": .., "prompt_id": ..}))

Stored responses can be scored again anywhere, and give the identical numbers. Figures are shares of all questions of
the split; a question without a response is wrong.
"""
import math
import statistics
import time
from collections import Counter

from benchmarks.common import Item, Verdict, grouped, misfit, percent, plain
from benchmarks.extraction import NO_ANSWER, VERSION
from benchmarks.registry import BENCHMARKS
from data import InputError, read_file
from grading.algebra import grader_counts


MISSING = "missing"                                # the rule of a question without a response
FIGURES = ("official", "strict")
WAYS = {"caption_only": "from its own description", "blind": "without the image"}

# ---------------------------------------------------------------- intervals


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, 1.96 standard errors; one value per question."""
    if len(values) < 2:
        return sum(values), math.inf
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: within [0, 1], and right where 1.96 standard errors are not, near 0 and 1. It
    is 0 .. .278 for 0 of 10, .237 .. .763 for 5 of 10."""
    z, share = 1.96, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def figure(values: list[float]) -> dict:
    """Mean, half width, and low and high end of the 95 % interval, of one value per question, and how many these are.
    Zeros and ones get Wilson's interval. None stands for infinity, which JSON does not know."""
    mean, half = interval(values)
    low, high = wilson(sum(values), len(values)) if set(values) <= {0, 1} else (mean - half, mean + half)
    ends = dict(mean=mean, half_width=half, low=low, high=high)
    finite = {name: value if math.isfinite(value) else None for name, value in ends.items()}
    return finite | {"questions": len(values)}


def figures(rows: list[dict], parts: list[str]) -> dict[str, dict]:
    """Every `figure` of a file of questions. rows: as `records` of plumbing/log.py makes them; parts: of the reward."""
    groups = [row["responses"] for row in rows]
    values = {part: [[response[part] for response in group] for group in groups] for part in parts}
    values[f"pass@{len(groups[0])}"] = [[any(response["accuracy"] == 1 for response in group)] for group in groups]
    values["truncated"] = [[not response["finished"] for response in group] for group in groups]
    values["no answer"] = [[response["extracted"] is None for response in group] for group in groups]
    values["tokens"] = [[response["tokens"] for response in group] for group in groups]
    return {name: figure(list(map(statistics.fmean, per_question))) for name, per_question in values.items()}


# ---------------------------------------------------------------- responses and verdicts


COLUMNS = {"pid": "string or number", "response": "string or null", "tokens": "number or null",
           "finished": "true or false or null"}


def read_responses(path: str) -> dict[str, dict]:
    """pid -> row: our responses.jsonl, or MathVista's object of rows by pid, plain or .gz. A row without a response, as
    after a failed request, is left out; of two with one pid the later one counts. InputError: a row that is none, or no
    row with a response."""
    responses, row = {}, {}
    for key, row in read_file(path):
        row = plain({"pid": key} | row if isinstance(key, str) and isinstance(row, dict) else row)
        if wrong := misfit(row, COLUMNS):
            raise InputError(f"{path} row {key}: {wrong}; fix or remove this row")
        if row.get("response") is not None:
            responses[str(row["pid"])] = row | {"pid": str(row["pid"])}
    if not responses:
        raise InputError(f"{path}: no row has response, the last has {', '.join(row) or 'nothing'}: rename the column "
                         "that holds it")
    return responses


def judge_all(name: str, responses: dict[str, dict], items: dict[str, Item]) -> dict[str, dict]:
    """pid -> the response to every item, in their order, with question, gold and verdict; a missing one is null."""
    benchmark, rows = BENCHMARKS[name], {}
    for pid, item in items.items():
        row = responses.get(pid, {"pid": pid, "response": None})
        extraction, rule, verdict = "", MISSING, Verdict(None, False, False)
        if pid in responses:
            extraction, rule = benchmark.extract(row["response"], item)
            verdict = benchmark.verdict(row["response"], extraction, rule, item)
        about = dict(question=item.question, gold=item.answer, extraction=extraction, rule=rule)
        rows[pid] = row | about | verdict._asdict()
    return rows


# ---------------------------------------------------------------- the report


def breakdown(right: dict[str, bool], items: dict[str, Item], groups: tuple[str, ...]) -> dict:
    """MathVista's scores_*.json, for any benchmark: average, then per group every value's score, best first.

    A question without a verdict is wrong. With several skills a question counts in each of them.
    """
    right = {pid: bool(right.get(pid)) for pid in items}
    correct = sum(right.values())
    scores = {"average": {"accuracy": str(round(percent(right.values()), 2)), "correct": correct, "total": len(items)}}
    for name in groups:
        members = grouped(right, items, name)
        best_first = sorted(members, key=lambda value: (-round(percent(members[value]), 2), value))
        scores[name] = {value: {"accuracy": f"{percent(members[value]):.2f}", "correct": sum(members[value]),
                                "total": len(members[value])} for value in best_first}
    return scores


def summarize(name: str, items: dict[str, Item], passes: dict[str, dict[str, dict]]) -> dict:
    """Everything that is said of the responses to one benchmark. passes: what `judge_all` returns of its "responses",
    and of those to the same questions asked in the ways of WAYS."""
    benchmark, rows = BENCHMARKS[name], passes["responses"]
    right = {kind: {pid: row[kind] for pid, row in rows.items()} for kind in FIGURES}
    tokens = [row["tokens"] for row in rows.values() if row.get("tokens") is not None]
    rules = Counter(row["rule"] for row in rows.values())
    return dict(
        benchmark=name, questions=len(items), missing=[pid for pid, row in rows.items() if row["rule"] == MISSING],
        truncated=sum(row.get("finished") is False for row in rows.values()),
        tokens=statistics.fmean(tokens) if tokens else None,  # unknown where responses come from elsewhere
        no_answer=sum(rules[rule] for rule in NO_ANSWER),
        figures={kind: figure(list(right[kind].values())) for kind in FIGURES} | perception(passes),
        chance_credit=sum(row["official"] and row["rule"] in NO_ANSWER for row in rows.values()),
        counts={kind: getattr(benchmark, kind) for kind in FIGURES},
        means={kind: benchmark.means(right[kind], items) if benchmark.means else {} for kind in FIGURES},
        **grader_counts("own"),  # pairs that took too long to compare, and count as different
        rules=dict(rules.most_common()),
        breakdown={kind: breakdown(right[kind], items, benchmark.groups) for kind in FIGURES},
        extractor=VERSION, date=time.strftime("%F %T"))


def perception(passes: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """Where wrong answers come from: figures of the strict verdicts on the same questions, asked in other ways.

    A wrong answer that is right from the model's own description is a slip of reasoning, because the description held
    what was needed. The others come from bad descriptions or from bad reasoning, which only true descriptions could
    tell apart, so they bound what perception costs. Luck makes some wrong answers right without any image, so the share
    of slips means something only as far as it is above that of luck, and nothing where the model cannot answer from a
    text: there it is no better from its description than without the image.
    """
    figures, wrong = {}, [pid for pid, row in passes["responses"].items() if not row["strict"]]
    for way, name in WAYS.items():
        right = {pid: row["strict"] for pid, row in passes.get(way, {}).items()}
        if right:
            figures[f"strict {name}"] = figure(list(right.values()))
        if right and wrong:
            figures[f"wrong, but right {name}"] = figure([right[pid] for pid in wrong])
    return figures


# ---------------------------------------------------------------- text


def table(head: list[str], rows) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def warnings(report: dict) -> list[str]:
    """What a reader of the figures must know, in whole lines."""
    lines, pids = [], report["missing"]
    if report["chance_credit"] > report["figures"]["official"]["mean"] * report["questions"] / 2:
        lines.append(f"warning: {report['chance_credit']} of the right ones in the official figure are no answers")
    if pids:
        lines.append(f"warning: {len(pids)} questions have no response and count as wrong; the first is pid {pids[0]}")
    return lines


def markdown(report: dict) -> str:
    """The report as text; what stands below the second heading is long."""
    length = f", {report['truncated']} truncated, {report['tokens']:.0f} tokens each" if report["tokens"] else ""
    rows = [[name, f"{100 * f['mean']:.2f}", f"{100 * f['low']:.2f} .. {100 * f['high']:.2f}",
             f"{f['mean'] * f['questions']:.0f} of {f['questions']}"] for name, f in report["figures"].items()]
    blocks = [
        f"# {report['benchmark']}: {report['model']}",
        f"{report['questions']} questions; {len(report['missing'])} without response, {report['no_answer']} without "
        f"answer{length};\nextractor {report['extractor']}, prompt {report['prompt_id']}",
        table(["figure", "%", "95 % interval", "right"], rows),
        "\n".join(f"- {kind}: {what}" for kind, what in report["counts"].items())]
    means = [[name, *(f"{report['means'][kind][name]:.2f}" for kind in FIGURES)] for name in report["means"]["strict"]]
    blocks += [table(["", *FIGURES], means)] if means else []
    blocks += ["\n".join(warnings(report))] if warnings(report) else []
    strict = report["breakdown"]["strict"]
    rows = [[group, value, official["total"], official["accuracy"], strict[group][value]["accuracy"]]
            for group, values in report["breakdown"]["official"].items() if group != "average"
            for value, official in values.items()]
    blocks += ["## Rules of extraction", table(["rule", "responses"], report["rules"].items())]
    blocks += ["## Breakdown", table(["", "value", "questions", *FIGURES], rows)]
    return "\n\n".join(blocks) + "\n"
