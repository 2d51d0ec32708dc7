"""Model files are data: nothing that serves or scores runs, evaluates or unpickles them."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from pickles import Evil, with_pickled_weights

import rayward

ROOT = Path(__file__).parents[2]
SERVING = [*ROOT.glob("serve/**/*.py"), *ROOT.glob("reward_actor/**/*.py")]
PROGRAMS = [*SERVING, *ROOT.glob("trainer/**/*.py"), *ROOT.glob("rayward/**/*.py")]

# What turns bytes into code or objects of any class, by the name under which it is called.
RUNS_WHAT_IT_READS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "cloudpickle.load", "cloudpickle.loads"),
    *("dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads", "shelve.open"),
    *("torch.load", "torch.jit.load", "pandas.read_pickle", "pd.read_pickle", "eval", "exec"),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.unsafe_load_all"),
    *("os.system", "os.popen", "jinja2.Environment", "jinja2.Template"),
}
# Where it is done all the same, and why it may be.
ALLOWED = {
    # DeepSpeed-Chat's weights, by torch's restricted unpickler, in `rayward convert` alone.
    ("reward_actor/convert.py", "torch.load"),
    # DeepSpeed's own training state, after its digests were checked.
    ("trainer/deepspeed_internals.py", "torch.load"),
}


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_nothing_runs_what_it_reads() -> None:
    found = {
        (str(file.relative_to(ROOT)), name)
        for file in PROGRAMS
        for name, _ in calls(file)
        if name in RUNS_WHAT_IT_READS
    }
    assert found == ALLOWED


def test_no_call_asks_for_a_pickle_or_a_shell() -> None:
    for file in PROGRAMS:
        for name, call in calls(file):
            given = {key.arg: ast.unparse(key.value) for key in call.keywords}
            assert given.get("shell") != "True", f"{file}: {name}"
            assert given.get("allow_pickle") != "True", f"{file}: {name}"
            if name.endswith("from_pretrained") and file in SERVING:
                assert given.get("use_safetensors", "True") == "True", f"{file}: {name}"
            if name == "torch.load" and file in SERVING:
                assert given.get("weights_only") == "True", f"{file}: {name}"


def test_code_of_a_model_runs_nowhere_by_default() -> None:
    from serve.config import ServeConfig

    assert ServeConfig(model="m").trust_remote_code is False
    switched_on = [
        (str(file.relative_to(ROOT)), name)
        for file in SERVING
        for name, call in calls(file)
        for key in call.keywords
        if key.arg == "trust_remote_code" and ast.unparse(key.value) == "True"
    ]
    # Behind Layout.require_trust, which the loader calls first.
    assert {file for file, _ in switched_on} <= {"reward_actor/model/weights.py"}


def test_the_pickle_would_do_its_harm(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


@pytest.mark.process
def test_pickled_weights_are_not_served(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    directory = with_pickled_weights(export_dir, tmp_path / "pickled", mark)
    assert rayward.main(["serve", str(directory)]) == 2
    error = capsys.readouterr().err
    assert "no .safetensors weights" in error
    assert "pickle" in error
    assert not mark.exists()


@pytest.mark.process
def test_code_beside_the_weights_is_not_run(
    export_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "mark"
    directory = shutil.copytree(export_dir, tmp_path / "coded")
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "modeling.Model"}
    config["architectures"] = ["Model"]
    config["model_type"] = "unheard_of"
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "modeling.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n")
    (directory / "MANIFEST.json").unlink()
    assert rayward.main(["serve", str(directory)]) == 2
    assert "Python code of its own" in capsys.readouterr().err
    assert not mark.exists()
