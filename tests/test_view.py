"""view.py: what a run's files say is on its page, and nothing that they hold can take the page over."""
import html
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from PIL import Image

import view

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EVIL = '</script><script>document.title="taken"</script><img src=x onerror="document.title=\'taken\'">\x1b[31m<b'


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def response(text="### Image Description: red circle.\n### The final answer is: 3", accuracy=1.0, **more):
    return dict(text=text, extracted="3", tokens=9, finished=True, clip=0.5, keyword=0.5, format=1.0, length=1.0,
                accuracy=accuracy, reward=0.6, advantage=-0.7) | more


@pytest.fixture
def run(tmp_path):
    """Two stages of three steps, four groups each."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    for name, stage in (("stage1", "1"), ("stage2", "2")):
        folder = tmp_path / name
        write_lines(folder / "metrics.jsonl", [{"step": step, "reward/total": 0.1 * step, "policy/kl": None,
                                                "time/step": 2.0} for step in range(3)])
        config = dict(stage=stage, lr=1e-6, kl_coef=0.01, clip_weight=0.4, accuracy_weight=0.0)
        (folder / "config.json").write_text(json.dumps(config))
        for step in range(3):
            rows = [dict(qid=f"q{q}", question="How many?", answer="3", key_words=["red circle", "blue square"],
                         images=[str(tmp_path / "red.png")], responses=[response(), response(accuracy=float(q == 0))])
                    for q in range(4)]
            write_lines(folder / "rollouts" / f"step_{step:06d}.jsonl", rows)
    for name, count in (("easy", 5), ("medium", 2), ("hard", 1)):
        write_lines(tmp_path / "sample" / f"{name}.jsonl", [dict(qid=i) for i in range(count)])
    return tmp_path


def page_of(run, *argv) -> str:
    assert view.main([str(run), *argv]) == 0
    return (run / "view.html").read_text()


def content_of(page: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="content">(.*?)</script>', page, re.S)[1])


def in_browser(path, script: str) -> str:
    """The page after this script has run in a real browser, as html; console errors are in it as well."""
    copy = path.with_name("scripted.html")
    copy.write_text(path.read_text().replace("</html>", "") + f"<script>{script}</script>")
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom",
               f"--user-data-dir={path.parent}/browser", f"file://{copy}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not errors, errors
    return done.stdout


needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")


def test_the_page_has_every_stage(run):
    content = content_of(page_of(run))
    assert [stage["name"] for stage in content["stages"]] == ["stage1", "stage2"]
    assert content["stages"][0]["steps"] == [0, 1, 2]
    assert content["stages"][0]["metrics"]["reward/total"] == pytest.approx([0.0, 0.1, 0.2])
    assert content["buckets"] == dict(easy=5, medium=2, hard=1)


def test_each_picture_is_embedded_once_and_no_more_than_asked_for(run):
    content = content_of(page_of(run))
    assert len(content["rollouts"]) == 2 * 3 * 4 and len(content["pictures"]) == 1
    assert content_of(page_of(run, "--images", "0"))["pictures"] == {}


def test_of_many_groups_the_same_questions_stay_at_every_step(run):
    # 6 of 12 groups in each stage are two whole questions, each at all three steps.
    groups = content_of(page_of(run, "--groups", "6"))["rollouts"]
    steps = {}
    for group in groups:
        steps.setdefault((group["stage"], group["qid"]), []).append(group["step"])
    assert len(groups) == 12 and set(map(tuple, steps.values())) == {(0, 1, 2)}


def test_a_torn_last_line_is_left_out_and_missing_images_are_a_note(run):
    with open(run / "stage1" / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "reward/to')
    os.remove(run / "red.png")
    content = content_of(page_of(run))
    assert "gone" in " ".join(content["notes"])
    assert [stage["steps"] for stage in content["stages"]] == [[0, 1, 2]] * 2


@pytest.mark.parametrize("make, reason", [
    (lambda path: path / "nothing", "is no folder"),
    (lambda path: path, "holds no metrics.jsonl"),
])
def test_a_folder_without_a_run_is_one_line(tmp_path, capsys, make, reason):
    assert view.main([str(make(tmp_path))]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert reason in line


def test_a_benchmark_alone_shows_its_wrong_answers_first(tmp_path):
    write_lines(tmp_path / "responses.jsonl", [
        dict(pid=str(i), response=f"text {i}", tokens=3, finished=True, extraction="A", rule="letter", prediction="A",
             official=i != 1, strict=i != 1, question="Which?", gold="B") for i in range(3)])
    (tmp_path / "report.json").write_text(json.dumps(dict(questions=3, figures=dict(strict=dict(mean=0.667)))))
    [evaluation] = content_of(page_of(tmp_path))["evaluations"]
    assert [item["qid"] for item in evaluation["items"]] == ["1", "0", "2"]
    assert evaluation["items"][0]["answer"] == "B" and evaluation["items"][0]["responses"][0]["rule"] == "letter"
    assert evaluation["figures"]["strict"]["mean"] == 0.667


def test_view_reads_files_without_torch(run):
    code = "import sys, view; view.main(sys.argv[1:]); assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, cwd=ROOT, capture_output=True)


@needs_browser
def test_the_browser_shows_filters_and_the_filters_filter(run):
    page_of(run)
    shown = in_browser(run / "view.html", """
        const choose = (n, value) => { const s = document.querySelectorAll('#rollout-filters select')[n];
                                       s.value = value; s.dispatchEvent(new Event('input')); };
        const count = () => document.querySelector('#rollout-filters .count').textContent;
        const counts = [count()];
        choose(0, 'stage2'); counts.push(count());
        choose(2, 'all right'); counts.push(count());
        document.querySelector('#rollout-list button').click(); counts.push(count());
        document.title = counts.join(' | ');""")
    # 24 groups; 12 in stage 2; question 0 alone is all right, at three steps; it is asked at six steps in both stages.
    assert "<title>24 of 24, page 1 of 3 | 12 of 24, page 1 of 2 | 3 of 24, page 1 of 1 | 6 of 24, page 1 of 1" in shown
    assert '<mark>red circle</mark>' in shown and "missed: blue square" in shown
    assert "data:image/webp" in shown and "<polyline" in shown


@needs_browser
def test_the_browser_draws_the_curves_and_says_the_values_below_the_pointer(run):
    metrics = run / "stage1" / "metrics.jsonl"
    write_lines(metrics, [{"step": i, "reward/total": value, "reward/accuracy": 0.0, "policy/kl": 2.0}
                          for i, value in enumerate([0.0, 1.0, 1.0, 0.5])])
    page_of(run)
    shown = in_browser(run / "view.html", """
        const [reward, kl] = document.querySelectorAll('#curves svg');
        const points = line => line.getAttribute('points').split(' ').map(point => point.split(',').map(Number));
        const [raw, mean] = [...reward.querySelectorAll('polyline')].map(points);
        reward.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight'}));
        document.title = JSON.stringify([raw, mean, at('hover').textContent.split('\\n'),
                                         reward.textContent, kl.getAttribute('aria-label')]);""")
    raw, mean, hover, texts, kl = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown)[1]))
    # Seven steps of two stages lie 500 / 6 apart from 52 on; 0 is drawn at 172, 1 at 34, so a value v at 172 - 138 v.
    assert raw == [[52, 172], [135.3, 34], [218.7, 34], [302, 103]]
    # The running means are 0, .3, .3 + .3 * .7 = .51 and .51 - .3 * .01 = .507.
    assert [y for _, y in mean] == pytest.approx([172, 130.6, 101.62, 102.034], abs=0.06)
    assert hover == ["stage1 step 1", "reward/total 1.000"]  # accuracy has no weight and is 0: it was not computed
    assert texts == "reward10stage1stage2" and kl == "policy/kl"  # title, highest, lowest, stages


@needs_browser
def test_no_text_of_data_or_model_becomes_markup_or_runs(run):
    for path in (run / "stage1" / "rollouts").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            row |= dict(qid=EVIL, question=EVIL, answer=EVIL, key_words=[EVIL, "(", "["])
            row["responses"] = [response(text="### Image Description: " + EVIL, extracted=EVIL) for _ in range(2)]
        write_lines(path, rows)
    write_lines(run / "stage1" / "metrics.jsonl", [{"step": 0, f"reward/{EVIL}": 1.0}])
    page_of(run)
    shown = in_browser(run / "view.html", "document.title += ' scripts ' + document.scripts.length;")
    title = re.search("<title>(.*?)</title>", shown)[1]
    assert "taken" not in title and title.endswith("scripts 3")  # the data, the page's own, and this test's
    assert "\\u001b[31m" in shown and "\x1b" not in shown
