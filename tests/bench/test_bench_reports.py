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


def test_a_picture_is_of_its_numbers_and_escapes_names():
    row = {"arm": "<a>&", "test": "tg2", "n_depth": 0, "median_ts": 50.0}
    found = {"bench": "model", "rows": [row, {**row, "n_depth": 10, "median_ts": 25.0}]}
    text = plot.draw(found)
    root = ElementTree.fromstring(text)
    circles = root.findall("{http://www.w3.org/2000/svg}circle")
    # 50 of 100 tokens/s is half of the height, 25 a quarter.
    assert [float(c.get("cx")) for c in circles] == [64.0, 624.0]
    first, second = (float(c.get("cy")) for c in circles)
    assert second - first == pytest.approx(plot._HEIGHT / 4)
    assert "&lt;a&gt;&amp;" in text
    bars = {"bench": "kernels", "rows": [{"kernel": "k", "case": "c", "gb_s": 5.0}]}
    assert ">5.0<" in plot.draw(bars)
    for broken in ({**row, "median_ts": float("nan")}, {**row, "arm": 1}, 3):
        assert not plot._is_row(broken, ("median_ts", "n_depth"))
