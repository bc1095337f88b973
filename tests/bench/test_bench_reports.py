"""What `mlxfuse bench` takes from llama-bench, and the pictures it draws."""

import json
import os
import stat
import sys
from xml.etree import ElementTree

import pytest

from mlxfuse.bench import llama, plot, run
from mlxfuse.errors import ReportError

from ..cli.test_cli import invoke
from ..models import tiny
from .test_bench_model import SMALL


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    made = tiny.build("llama-q4", 0)
    return tiny.write(tmp_path_factory.mktemp("models") / "tiny.gguf", made)


# --- llama-bench --------------------------------------------------------------------------


def result_of(about, **changed):
    about = {k: v for k, v in about.items() if k != "model_filename"}
    sizes = {"n_prompt": 8, "n_gen": 0, "n_depth": 0}
    samples = {"samples_ns": [1_000_000_000, 500_000_000]}
    kind = f"{about['model_type']} 1B Q4_0"
    return {**about, **sizes, **samples, "model_type": kind, **changed}


def test_results_of_llama_bench_are_added(model, tmp_path):
    about = run.about(model)
    file = tmp_path / "llama.json"
    file.write_text(json.dumps([result_of(about), result_of(about, n_prompt=0, n_gen=2)]))
    rows = llama.read(file, about)
    assert [row["test"] for row in rows] == ["pp8", "tg2"]
    assert rows[0]["samples_ts"] == [8.0, 16.0]
    file.write_text("\n".join(json.dumps(result_of(about, n_depth=d)) for d in (0, 4)))
    assert [row["test"] for row in llama.read(file, about)] == ["pp8", "pp8 @ d4"]
    result = invoke("bench", model, *SMALL, "-n", "0", "--compare", file, "--json")
    found = json.loads(result.stdout)
    assert [(r["arm"], r["test"]) for r in found["rows"]] == [
        *(("mlx-lm", "pp8"), ("mlxfuse", "pp8"), ("llama.cpp (file)", "pp8")),
        ("llama.cpp (file)", "pp8 @ d4"),
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_size": 1}, "another file: its model_size is 1"),
        ({"model_n_params": None}, "another file: its model_n_params is None"),
        ({"model_type": "qwen2 1B Q4_0"}, "another model: qwen2"),
        ({"model_type": "\x1b[31m"}, r"\\x1b"),
        ({"n_prompt": -1}, "n_prompt is -1"),
        ({"n_prompt": True}, "n_prompt is True"),
        ({"n_gen": 8}, "either of a prompt"),
        ({"samples_ns": []}, "are not times"),
        ({"samples_ns": [0]}, "are not times"),
        ({"samples_ns": [float("nan")]}, "are not times"),
        ({"samples_ns": "1"}, "are not times"),
    ],
)
def test_wrong_results_are_refused(model, changed, message):
    about = run.about(model)
    text = json.dumps([result_of(about, **changed)]).encode()
    with pytest.raises(ReportError, match=message) as error:
        llama.parse(text, "x.json", about)
    assert "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", b"{", b"1", b"[1]", b"[]", b"[" * 100_000, b'{"a":' * 100_000, b"null"],
)
def test_hostile_files_are_refused(model, data, tmp_path):
    with pytest.raises(ReportError):
        llama.parse(data, "x.json", run.about(model))
    path = tmp_path / "x.json"
    path.write_bytes(data)
    with pytest.raises(ReportError):
        plot.read(path)


FAKE = """#!{python}
import json, sys
a = dict(zip(sys.argv[1::2], sys.argv[2::2]))
open({log!r}, "a").write(" ".join(sys.argv[3:]) + "\\n")
about = json.loads({about!r})
print(json.dumps([{{**about, "n_prompt": int(a["-p"]), "n_gen": int(a["-n"]),
    "n_depth": int(a["-d"]), "samples_ns": [2000000000]}}]))
"""


def fake_llama_bench(folder, about, text=FAKE):
    log = folder / "log"
    about = {**about, "model_type": f"{about['model_type']} 1B Q4_0"}
    program = folder / "llama-bench"
    program.write_text(text.format(python=sys.executable, log=str(log), about=json.dumps(about)))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return log


def test_llama_bench_takes_its_turn(model, tmp_path, monkeypatch):
    log = fake_llama_bench(tmp_path, run.about(model))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = invoke("bench", model, *SMALL, "-n", "0", "--llama-bench", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [r["arm"] for r in found["rows"]] == ["mlx-lm", "mlxfuse", "llama.cpp"]
    assert found["rows"][2]["samples_ts"] == [4.0, 4.0]
    assert str(tmp_path) not in result.stdout  # it is sent to others
    assert log.read_text().splitlines() == ["-r 1 -o json -p 8 -n 0 -d 0"] * 2
    fake_llama_bench(tmp_path, run.about(model), "#!/bin/sh\necho oops >&2; exit 3\n")
    result = invoke("bench", model, *SMALL, "-n", "0", "--llama-bench")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "llama-bench failed: oops" in result.stderr


# --- pictures -----------------------------------------------------------------------------


ROWS = [
    {"arm": arm, "test": test, "n_depth": 0, "median_ts": speed}
    for test, speeds in (("pp8", (100.0, 150.5)), ("tg2", (50.0, 75.0)))
    for arm, speed in zip(("mlx-lm", "<mlxfuse> $x$"), speeds, strict=True)
]
SVG = "{http://www.w3.org/2000/svg}"


def texts(picture):
    return ["".join(t.itertext()) for t in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def test_one_depth_is_bars_that_name_their_arms():
    """As long as their numbers: the second bar of a test is one and a half times the first."""
    picture = plot.draw({"bench": "model", "rows": ROWS, "title": "m.gguf, a Mac"})
    shown = texts(picture)
    for text in ("m.gguf, a Mac", "pp8: prompt", "tg2: decoding", "tokens a second"):
        assert text in shown
    assert [t for t in shown if t in ("100.0", "150.5", "50.0", "75.0")] == [
        "100.0", "150.5", "50.0", "75.0",
    ]  # fmt: skip
    assert shown.count("<mlxfuse> $x$") == 2
    assert "tokens in the cache" not in shown
    assert plot.draw({"bench": "model", "rows": ROWS, "title": "m.gguf, a Mac"}) == picture
    other = [{**row, "median_ts": row["median_ts"] + 1} for row in ROWS]
    assert plot.draw({"bench": "model", "rows": other, "title": "m.gguf, a Mac"}) != picture


def test_several_depths_are_lines():
    deep = [{**row, "test": f"{row['test']} @ d9", "n_depth": 9, "median_ts": 9.0} for row in ROWS]
    picture = plot.draw({"bench": "model", "rows": [*ROWS, *deep], "title": "x"})
    shown = texts(picture)
    assert shown.count("tokens in the cache") == 2
    assert shown.count("<mlxfuse> $x$") == 2  # in a legend each
    assert b"100.0" not in picture


def test_kernels_and_other_kinds_of_pictures():
    bars = {"bench": "kernels", "rows": [{"kernel": "k", "case": "c", "gb_s": 5.0}]}
    assert {"5.0", "k, c", "GB/s"} <= set(texts(plot.draw(bars)))
    assert plot.draw(bars, ".png").startswith(b"\x89PNG")
    plot.draw({"bench": "model", "rows": []})
    for broken in ({**ROWS[0], "median_ts": float("nan")}, {**ROWS[0], "arm": 1}, 3):
        assert not plot._is_row(broken, ("median_ts", "n_depth"))


def test_a_picture_that_cannot_be_is_told_before_anything_is_timed(model, tmp_path, monkeypatch):
    result = invoke("bench", model, "--plot", tmp_path / "x.pdf")
    assert (result.exit_code, result.stdout) == (4, "")
    assert "expected a name that ends in .svg or .png" in result.stderr
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    result = invoke("bench", model, "--plot", tmp_path / "x.svg")
    assert result.exit_code == 4
    assert "pip install 'mlxfuse[plot]'" in result.stderr
