"""Figures and tables of an evaluation: intervals, verdicts, breakdowns, what perception costs, an audit sheet.

    responses = read_responses("responses.jsonl")                pid -> {"response", ..}
    verdicts = judge_all("mathvista", responses, items)          pid -> {"extraction", "rule", "prediction", ..}
    report = summarize("mathvista", items, responses, verdicts)  what report.json holds
    print(markdown(report))

No model, no process group, no images: stored responses can be scored again anywhere, and give the identical numbers.
Accuracies are in percent of all questions of the split; a question without a response is wrong and is listed.
"""
import datetime
import importlib.metadata
import math
import os
import platform
import random
import statistics
import subprocess
from collections import Counter

from benchmarks.common import Item, Verdict, grouped, lettered, percent
from benchmarks.extraction import NO_ANSWER, VERSION
from benchmarks.registry import BENCHMARKS
from data import InputError, parse, read_file
from grading.algebra import process_grader


MISSING = "missing"                                # the rule of a question without a response
STORED = "stored"                                  # of an extraction that was made elsewhere
FIGURES = ("official", "strict")

# ---------------------------------------------------------------- intervals


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, 1.96 standard errors; one value per question."""
    if len(values) < 2:
        return sum(values), math.inf
    return statistics.fmean(values), 1.96 * statistics.stdev(values) / len(values) ** 0.5


def wilson(right: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share: within [0, 1], and right where 1.96 standard errors are not, near 0 and 1.

        right, n   -> low, high
        0, 10      -> 0, .278
        5, 10      -> .237, .763
        10, 10     -> .722, 1
    """
    if n == 0:
        return 0.0, 1.0
    z, share = 1.96, right / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def figure(values: list[float]) -> dict:
    """Mean, half width, and low and high end of the 95 % interval, of one value per question. Zeros and ones get
    Wilson's interval. None stands for infinity, which JSON does not know."""
    mean, half = interval(values)
    low, high = wilson(sum(values), len(values)) if set(values) <= {0, 1} else (mean - half, mean + half)
    ends = dict(mean=mean, half_width=half, low=low, high=high)
    return {name: value if math.isfinite(value) else None for name, value in ends.items()}


def figures(rows: list[dict], parts: list[str]) -> dict[str, dict]:
    """Every `figure` of a file of questions. rows: as `records` of train.py makes them; parts: of the reward."""
    per_question = {part: [statistics.fmean(r[part] for r in row["responses"]) for row in rows] for part in parts}
    G = len(rows[0]["responses"])
    per_question[f"pass@{G}"] = [float(any(r["accuracy"] == 1 for r in row["responses"])) for row in rows]
    per_question["truncated"] = [statistics.fmean(not r["finished"] for r in row["responses"]) for row in rows]
    per_question["no answer"] = [statistics.fmean(r["extracted"] is None for r in row["responses"]) for row in rows]
    per_question["tokens"] = [statistics.fmean(r["tokens"] for r in row["responses"]) for row in rows]
    return {name: figure(values) for name, values in per_question.items()}


# ---------------------------------------------------------------- responses and verdicts


def read_responses(path: str) -> dict[str, dict]:
    """pid -> row with its "response": our responses.jsonl, or MathVista's object of rows by pid, plain or .gz."""
    responses = {}
    for key, row in read_file(path):
        if isinstance(row, dict) and isinstance(key, str):
            row = row | {"pid": key}
        if not isinstance(row, dict) or "pid" not in row:
            raise InputError(f"{path}: expected one row with pid and response per question, or an object of them by pid")
        pid = str(row["pid"])
        if pid in responses or not isinstance(row.get("response") or "", str):
            wrong = "is there twice" if pid in responses else "has no text as response"
            raise InputError(f"{path}: pid {pid} {wrong}; fix or remove its row")
        if not isinstance(row.get("tokens") or 0, int):
            raise InputError(f"{path}: pid {pid} has tokens {row['tokens']!r}; expected a number, or no such column")
        responses[pid] = row
    return responses


def judge_all(name: str, responses: dict[str, dict], items: dict[str, Item], stored: bool = False) -> dict[str, dict]:
    """The verdict on every item, in their order; stored: judge the rows' own "extraction", reading no response."""
    benchmark, verdicts = BENCHMARKS[name], {}
    for pid, item in items.items():
        extraction, rule, verdict = "", MISSING, Verdict(None, False, False)
        if pid in responses:
            response, extraction = responses[pid].get("response") or "", responses[pid].get("extraction")
            if not stored:
                extraction, rule = benchmark.extract(response, item)
            else:
                extraction, rule = ("", "nothing") if extraction in (None, "") else (str(extraction), STORED)
            verdict = benchmark.verdict(response, extraction, rule, item)
        verdicts[pid] = dict(extraction=extraction, rule=rule) | verdict._asdict()
    return verdicts


# ---------------------------------------------------------------- the report


def accuracy(right: list[bool]) -> dict:
    low, high = wilson(sum(right), len(right))
    return dict(accuracy=percent(right), low=100 * low, high=100 * high, correct=sum(right))


def breakdown(right: dict[str, bool], items: dict[str, Item], groups: tuple[str, ...]) -> dict:
    """MathVista's scores_*.json, for any benchmark: average, then per group every value's score, best first.

    A question without a verdict is wrong. With several skills a question counts in each of them.
    """
    right = {pid: bool(right.get(pid)) for pid in items}
    correct = sum(right.values())
    scores = {"average": {"accuracy": str(round(percent(right.values()), 2)), "correct": correct, "total": len(items)}}
    for name in groups:
        counts = {value: {"accuracy": f"{percent(members):.2f}", "correct": sum(members), "total": len(members)}
                  for value, members in sorted(grouped(right, items, name).items())}
        scores[name] = dict(sorted(counts.items(), key=lambda pair: -float(pair[1]["accuracy"])))
    return scores


def summarize(name: str, items: dict[str, Item], responses: dict[str, dict], verdicts: dict[str, dict]) -> dict:
    """Everything that is said of the responses to one benchmark."""
    benchmark = BENCHMARKS[name]
    right = {kind: {pid: verdict[kind] for pid, verdict in verdicts.items()} for kind in FIGURES}
    silent = judge_all(name, {pid: {"response": ""} for pid in items}, items)
    answered = [responses[pid] for pid in items if pid in responses]
    finished = [row["finished"] for row in answered if "finished" in row]
    tokens = [row["tokens"] for row in answered if "tokens" in row]
    return dict(
        benchmark=name, questions=len(items), missing=[pid for pid in items if pid not in responses],
        truncated=finished.count(False) if finished else None,  # unknown where responses come from elsewhere
        tokens=statistics.fmean(tokens) if tokens else None,
        no_answer=sum(verdict["rule"] in NO_ANSWER for verdict in verdicts.values()),
        **{kind: accuracy(list(right[kind].values())) | {"counts": getattr(benchmark, kind)} for kind in FIGURES},
        chance_credit=sum(verdict["official"] and verdict["rule"] in NO_ANSWER for verdict in verdicts.values()),
        empty_model={kind: accuracy([verdict[kind] for verdict in silent.values()])["accuracy"] for kind in FIGURES},
        means={kind: benchmark.means(right[kind], items) for kind in FIGURES},
        grader=dict(process_grader("own").take_counts()),  # timeouts among them: pairs that count as different
        rules=dict(Counter(verdict["rule"] for verdict in verdicts.values()).most_common()),
        breakdown={kind: breakdown(right[kind], items, benchmark.groups) for kind in FIGURES},
    )


def revision() -> str:
    """The commit of this code, "-dirty" when files differ from it; "" where there is no git."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        asked = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    except OSError:
        return ""
    return asked.stdout.strip()


def provenance() -> dict:
    """What a score cannot be compared without: extractor, commit, versions, date."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "math-verify")}
    return dict(extractor=VERSION, date=datetime.datetime.now().isoformat(timespec="seconds"), git=revision(),
                versions={"python": platform.python_version()} | versions)


def warnings(report: dict) -> list[str]:
    """What a reader of the two numbers must know, in whole lines."""
    lines, official = [], report["official"]["correct"]
    if report["chance_credit"] > official / 2:
        silent = report["empty_model"]["official"]
        lines.append(f"warning: {report['chance_credit']} of the {official} answers that are right in the official "
                     f"figure are no answers; saying nothing at all scores {silent:.1f} there")
    if report["missing"]:
        lines.append(f"warning: {len(report['missing'])} questions have no response and count as wrong: "
                     + ", ".join(report["missing"][:10]) + (", .." if len(report["missing"]) > 10 else ""))
    return lines


# ---------------------------------------------------------------- what perception costs


def share(part: int, whole: int) -> dict:
    low, high = wilson(part, whole)
    return dict(count=part, of=whole, percent=100 * part / whole if whole else None, low=100 * low, high=100 * high)


def perception(full: dict[str, dict], others: dict[str, dict[str, dict]]) -> dict:
    """What the wrong answers come from, by the strict verdicts on the same questions, asked in up to three ways.

    full: with the image. caption_only: with the Image Description of the full response, the model's own, in its place.
    blind: with neither. others holds the verdicts of one or both of the last two.

    A question that is wrong in full and
      right from the description    is a slip of reasoning: what was needed stood in the description;
      wrong from the description    may lack something in the description, or in the reasoning, or both. Without true
                                    descriptions these cannot be told apart: an upper bound of what perception costs.
    A right answer that is wrong from the description used something that the description does not say. How many of
    the wrong answers are right when blind is what luck and other knowledge alone would do: the first share means
    something only as far as it is above that one. unread: the accuracy from descriptions is at most the blind one; then
    this model does not read descriptions given as text, and the shares say nothing of its perception.
    """
    every = {"full": full} | others
    right = {name: {pid: verdict["strict"] for pid, verdict in verdicts.items()} for name, verdicts in every.items()}
    ways = {name: share(sum(verdicts.values()), len(verdicts)) for name, verdicts in right.items()}
    wrong = [pid for pid in full if not right["full"][pid]]
    good = [pid for pid in full if right["full"][pid]]
    rows = {}
    if "caption_only" in right:
        caption, silent = right["caption_only"], [v["rule"] == MISSING for v in others["caption_only"].values()]
        slips, unsaid = sum(caption[pid] for pid in wrong), sum(not caption[pid] for pid in good)
        rows = {"wrong, but right from its description (reasoning)": share(slips, len(wrong)),
                "wrong, also from its description (perception, at most)": share(len(wrong) - slips, len(wrong)),
                "right, but wrong from its description": share(unsaid, len(good)),
                "without a description (counts as wrong from it)": share(sum(silent), len(full))}
    if "blind" in right:
        rows["wrong, but right without any image (luck)"] = share(sum(right["blind"][pid] for pid in wrong), len(wrong))
    unread = {"caption_only", "blind"} <= set(ways) and ways["caption_only"]["count"] <= ways["blind"]["count"]
    return dict(accuracy=ways, shares=rows, unread=unread)


# ---------------------------------------------------------------- text


def table(head: list[str], rows: list[list]) -> list[str]:
    """A Markdown table whose columns line up in a terminal too."""
    cells = [[str(cell) for cell in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def markdown(report: dict, split: dict | None = None, whole: bool = False) -> str:
    """The report as text; split: what `perception` returns; whole: with settings, rules and breakdown."""
    known = report["tokens"] is not None and report["truncated"] is not None
    length = f", {report['truncated']} truncated, {report['tokens']:.0f} tokens each" if known else ""
    lines = [f"# {report['benchmark']}: {report.get('model') or report.get('source')}", "",
             f"{report['questions']} questions; {len(report['missing'])} without response, {report['no_answer']} "
             f"without answer{length};",
             f"extractor {report['extractor']}, prompt {report.get('prompt_id') or 'unknown'}", ""]
    rows = [[kind, f"{f['accuracy']:.2f}", f"{f['low']:.2f} .. {f['high']:.2f}", f["correct"],
             f"{report['empty_model'][kind]:.2f}"] for kind in FIGURES for f in [report[kind]]]
    lines += table(["figure", "%", "95 % interval", "right", "% of an empty response"], rows)
    lines += ["", *(f"- {kind}: {report[kind]['counts']}" for kind in FIGURES)]
    if report["means"]["strict"]:
        lines += ["", *table(["", *FIGURES], [[name, *(f"{report['means'][kind][name]:.2f}" for kind in FIGURES)]
                                              for name in report["means"]["strict"]])]
    if split:
        lines += ["", *perception_table(split)]
    lines += ["", *warnings(report)] if warnings(report) else []
    if whole:
        lines += ["", "## Rules of extraction", "", *table(["rule", "responses"], list(report["rules"].items()))]
        lines += ["", "## Breakdown", "", *table(["", "value", "questions", *FIGURES], breakdown_rows(report))]
        lines += ["", "## Settings", "", *table(["", "value"], list(report.get("settings", {}).items()))]
    return "\n".join(lines) + "\n"


def breakdown_rows(report: dict) -> list[list]:
    strict, short = report["breakdown"]["strict"], BENCHMARKS[report["benchmark"]].short
    return [[group, f"{value} ({short[value]})" if value in short else value, official["total"], official["accuracy"],
             strict[group][value]["accuracy"]]
            for group, values in report["breakdown"]["official"].items() if group != "average"
            for value, official in values.items()]


def perception_table(split: dict) -> list[str]:
    names = {"full": "accuracy with the image", "caption_only": "accuracy with its own description instead",
             "blind": "accuracy with neither"}
    shares = {names[name]: value for name, value in split["accuracy"].items()} | split["shares"]
    rows = [[name, "-" if s["percent"] is None else f"{s['percent']:.2f}", f"{s['low']:.2f} .. {s['high']:.2f}",
             f"{s['count']} of {s['of']}"] for name, s in shares.items()]
    note = ["", "warning: the model answers no better from its description than from nothing: it does not read "
            "descriptions given as text, and these shares do not say what perception costs"] if split["unread"] else []
    return table(["what perception costs (strict)", "%", "95 % interval", "questions"], rows) + note


AUDIT_CHARACTERS = 400


def audit_sheet(count: int, items: dict[str, Item], responses: dict[str, dict], verdicts: dict[str, dict]) -> str:
    """A sample of questions, always the same ones, for a person to mark what the rules got wrong."""
    pids = [pid for pid in items if pid in responses]
    sample = set(random.Random(count).sample(pids, min(count, len(pids))))
    lines = ["# Does the verdict hold?", "", "Mark each that does not; the share of marks is the error of the rules."]
    for pid in (pid for pid in pids if pid in sample):
        item, verdict = items[pid], verdicts[pid]
        end = (responses[pid].get("response") or "")[-AUDIT_CHARACTERS:]
        choices = "; ".join(lettered(item.choices))
        lines += ["", f"## [ ] {pid}", "", item.question, *([choices] if choices else []), "",
                  *(f"> {line}" for line in end.splitlines()), "",
                  f"extraction `{verdict['extraction']}` ({verdict['rule']}), prediction `{verdict['prediction']}`, "
                  f"gold `{item.answer}`: official {'right' if verdict['official'] else 'wrong'}, "
                  f"strict {'right' if verdict['strict'] else 'wrong'}"]
    return "\n".join(lines) + "\n"


def descriptions(responses: dict[str, dict]) -> dict[str, str]:
    """pid -> the Image Description section of the response, where there is one."""
    found = {pid: parse(row.get("response") or "").description for pid, row in responses.items()}
    return {pid: text for pid, text in found.items() if text}
