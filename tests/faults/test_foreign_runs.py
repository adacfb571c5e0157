"""Run folders of strangers, and damaged ones: the page escapes them, and each error names the file and the way out."""

import json
import re
import shutil

import pytest

from openwork.cli.main import main
from openwork.recipes.classification import ClassificationConfig as Config
from openwork.recipes.recipe import train
from openwork.recipes.report import write_report

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(1)>$\\frac'
SMALL = {"limit": 64, "limit_val": 16, "batch_size": 16, "epochs": 1, "threads": 1, "progress": False, "log_every": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(Config(**SMALL, out=str(out)))
    return out


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def change(run, edit, name="result.json"):
    content = json.loads((run / name).read_text())
    edit(content)
    (run / name).write_text(json.dumps(content))


def texts_replaced(value, keep=()):
    """Every text in a piece of JSON, names of keys among them, made hostile."""
    if isinstance(value, dict):
        return {key: item if key in keep else texts_replaced(item, keep) for key, item in value.items()}
    if isinstance(value, list):
        return [texts_replaced(item, keep) for item in value]
    return EVIL if isinstance(value, str) else value


def test_every_text_of_a_run_is_escaped_in_its_page(run, tmp_path):
    result = json.loads((run / "result.json").read_text())
    hostile = texts_replaced(result, keep=("method", "pattern", "start", "end", "key"))
    hostile["config"] |= {EVIL: EVIL, "model": EVIL}
    hostile["notes"] = {EVIL: EVIL}
    hostile["environment"] |= {EVIL: EVIL}
    hostile["diverged"] = {"step": 1, "what": EVIL}
    (run / "result.json").write_text(json.dumps(hostile))
    view = {"caption": EVIL, "image": "data:image/png;base64,AAAA" + EVIL, "text": [[EVIL, True]]}
    samples = [{"name": EVIL, "truth": [view], "predicted": [view]}]
    (run / "visualizations.json").write_text(json.dumps(samples))
    named = run.rename(tmp_path / "<img src=x onerror=alert(1)>")
    page = write_report(named).read_text()
    assert EVIL.split("$")[0] not in page
    tags = set(re.findall(r"<([a-zA-Z!/][\w-]*)", page))
    assert not {"script", "iframe", "object", "a", "form"} & tags
    for tag in re.findall(r"<img[^>]*>", page):
        assert re.fullmatch(r'<img src="data:image/png;base64,AAAA[^"<>]*" alt="[^"<>]*">', tag)
    assert not re.findall(r"<[^>]*\son\w+\s*=", re.sub(r'"[^"]*"', '""', page))


def test_the_page_forbids_what_it_does_not_need(run):
    page = write_report(run).read_text()
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)[1]
    assert page.index("Content-Security-Policy") < page.index("<style>")
    assert {"default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"} <= set(policy.split("; "))
    assert "script-src" not in policy


def test_images_from_elsewhere_are_refused(run):
    view = {"caption": "", "image": "https://example.com/x.png", "text": []}
    (run / "visualizations.json").write_text(json.dumps([{"name": "", "truth": [view], "predicted": [view]}]))
    with pytest.raises(ValueError, match=r"visualizations.json: an image is not in the file itself"):
        write_report(run)


def spoil(run, name, text):
    (run / name).write_bytes(text if isinstance(text, bytes) else text.encode())


DAMAGES = {
    "garbage": ("result.json", b"\xff\xfe garbage", r"result.json is not what a run writes .*remove it, and"),
    "half": ("result.json", '{"config": {', r"result.json is not what a run writes"),
    "NaN": ("result.json", '{"val_loss": NaN}', r"result.json .*NaN is not JSON: an older version wrote it"),
    "list": ("result.json", "[]", r"result.json .*it holds a list, not a dict"),
    "empty": ("result.json", "", r"result.json is not what a run writes"),
    "lacks": ("result.json", "{}", r"result.json: it lacks config.*restore it, or train again"),
    "deep": ("result.json", "[" * 100_000, r"result.json is not what a run writes"),
    "infinite line": ("metrics.jsonl", '{"step": 1, "train_loss": Infinity}\n', r"metrics.jsonl, line 1 .*Infinity"),
    "text line": ("metrics.jsonl", '{"step": 1}\nhello\n', r"metrics.jsonl, line 2 .*correct the line"),
    "bytes": ("metrics.jsonl", b"\xff\n", r"metrics.jsonl is not UTF-8"),
    "no step": ("metrics.jsonl", '{"train_loss": 1}\n', r"metrics.jsonl: a record is not what a run writes"),
    "not a number": ("metrics.jsonl", '{"step": 1, "train_loss": {}}\n', r"metrics.jsonl: a record is not"),
    "no weights": ("topology.jsonl", '{"step": 1, "sad_start": 1, "weights": 0}\n', r"topology.jsonl: a record is not"),
    "samples": ("visualizations.json", '[{"name": 1}]', r"visualizations.json: \[0\]"),
}


@pytest.mark.parametrize(("name", "text", "message"), DAMAGES.values(), ids=DAMAGES)
def test_report_names_the_damaged_file(run, name, text, message, capsys):
    spoil(run, name, text)
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert str(run / name) in error
    assert error.count("\n") == 1


FIELDS = {
    "pattern": (lambda r: r["config"].update(pattern="2of4"), "N:M"),
    "method": (lambda r: r["config"].update(method="x"), "method 'x' is not known"),
    "seed": (lambda r: r["config"].update(seed="0"), "config.seed is '0', not int"),
    "mask": (lambda r: r["mask"].update(start=["01", "0"]), "the rows of its mask differ in length"),
    "metrics": (lambda r: r.update(metrics=[]), "metrics is empty"),
    "score": (lambda r: r.update(val_accuracy="high"), "val_accuracy is 'high', not int or float or NoneType"),
    "layers": (lambda r: r.update(layers=[{}]), r"layers\[0\] lacks name"),
    "digits": (lambda r: r["metrics"][0].update(digits=10**9), "metrics asks for 1000000000 digits"),
}


@pytest.mark.parametrize(("edit", "message"), FIELDS.values(), ids=FIELDS)
def test_report_names_the_field_that_is_wrong(run, edit, message):
    change(run, edit)
    with pytest.raises(ValueError, match=rf"result.json: .*{message}"):
        write_report(run)


def test_runs_of_several_tasks_are_no_comparison(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    change(other, lambda r: r["config"].update(task="flow"))
    with pytest.raises(ValueError, match=r"holds runs of several tasks, classification, flow; move them"):
        write_report(tmp_path)


CONFIGS = {
    "empty": ("", r"config.yaml holds nothing; needed are names of fields .*another --out"),
    "text": ("hello", r"config.yaml holds str; needed are names"),
    "broken": ("a: [", r"config.yaml is not valid YAML"),
    "no task": ("lr: 1\n", r"config.yaml does not say the task, method, pattern of its run"),
}


@pytest.mark.parametrize(("text", "message"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_a_damaged_configuration_is_named(run, verb, text, message, capsys):
    (run / "config.yaml").write_text(text)
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value).lower())]
    words = {"train": ["train", "classification", *flags, "--out", str(run), "--resume"], "plan": ["plan", str(run)]}
    assert main(words[verb]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert str(run) in error


def test_a_run_without_its_configuration_is_not_mixed_with_a_new_one(run):
    (run / "config.yaml").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has result.json, .*but no config.yaml; restore it, or choose another"
    ):
        train(Config(**SMALL, out=str(run), resume=True))
