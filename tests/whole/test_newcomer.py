"""What a newcomer does: install, read --help, run the lines of the README and of docs/running.md one after another."""
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import evaluate
import retrieve
import train
from tests.helpers import tiny_state_dict
from ucdr_ref.config import resolve

ROOT = Path(__file__).resolve().parents[2]
NEEDS_DATA = "# needs data that is not shipped"  # the first line of such a block
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
ENVIRONMENT.pop("PYTHONPATH", None)


def blocks() -> list[str]:
    """The shell blocks of both pages, in order; a command that goes on in the next line stands in one."""
    text = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/running.md"))
    return re.findall(r"^```bash\n(.*?)^```", text.replace("\\\n", " "), re.DOTALL | re.MULTILINE)


def commands(fast: bool) -> list[str]:
    """What can be run of the blocks, each once, with the scripts and python of this checkout."""
    found = []
    for block in blocks():
        if block.startswith(NEEDS_DATA):
            continue
        for line in block.splitlines():
            line = line.removeprefix("pip install -r requirements.txt && ")  # .ci/run installs
            if re.search(r"-m (pytest|tests\.killtest|ucdr_ref\.bench)", line):
                continue  # .ci/run, tests/test_killtest.py
            if fast and " train.py" in line:
                sre = "sre-clip" in line
                line += " --fast --toy-images 4"
                line += " --sre-iterations 20" if sre else " --run runs/demo --data-root data/toy"
            found.append(re.sub(r"^python (\w+\.py)", rf"{shlex.quote(sys.executable)} {ROOT}/\1", line))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("fast", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["fast", "whole"])
def test_the_lines_of_the_docs_run_in_order_from_an_empty_folder(fast, tmp_path, monkeypatch):
    """In processes of their own; fast, all but the first in this one."""
    monkeypatch.chdir(tmp_path)
    lines = commands(fast)
    scripts = [line.split()[1].rsplit("/", 1)[-1] for line in lines]
    assert scripts[:3] == ["train.py", "evaluate.py", "retrieve.py"] and any("sre-clip" in line for line in lines)
    for number, line in enumerate(lines):
        if fast and number:
            arguments = [name for part in shlex.split(line)[2:] for name in sorted(glob(part)) or [part]]
            assert {"train": train, "evaluate": evaluate, "retrieve": retrieve}[scripts[number][:-3]].main(arguments) == 0, line
        else:
            done = subprocess.run(line, shell=True, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
            assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)[1]
    exec(code.replace("weights/", f"{ROOT}/weights/"), {})
    runs = {"demo", "sre-fast" if fast else "sre-demo"}
    assert {path.name for path in (tmp_path / "runs").iterdir()} >= runs
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "data", "sheet.png", "gallery.npy", "gallery.paths.txt"}


def test_weights_beside_the_scripts_serve_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(resolve({}).weights).samefile(ROOT / "weights" / "demo-clip.pt")
    (tmp_path / "weights").mkdir()
    torch.save(tiny_state_dict(), tmp_path / "weights" / "demo-clip.pt")
    assert resolve({}).weights == "weights/demo-clip.pt"  # what lies here comes first
    assert resolve({"weights": "weights/absent.pt"}).weights == "weights/absent.pt"


USE = """
import ucdr_ref
from ucdr_ref.clip import tokenize
from ucdr_ref.data.benchmarks import DATASETS, alias_list
assert tokenize(["a photo of a cat"])[0, :7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
assert all(dataset.splits() for dataset in DATASETS.values()) and alias_list("tuberlin-images")
print(ucdr_ref.__version__, ucdr_ref.__file__)
"""


def test_pip_installs_the_package_with_its_data(tmp_path):
    spec = find_spec("setuptools")
    if find_spec("pip") is None or spec is None or not (find_spec("wheel") or Path(spec.origin).with_name("command").joinpath("bdist_wheel.py").exists()):
        pytest.skip("nothing can be built here: pip and setuptools, before 70.1 wheel too, would have to be downloaded")
    copy, venv = tmp_path / "copy", tmp_path / "venv"
    copy.mkdir()  # a build leaves folders where it runs
    shutil.copytree(ROOT / "ucdr_ref", copy / "ucdr_ref", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    here = subprocess.run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], check=True,
                          capture_output=True, text=True).stdout.strip()
    # PyTorch is not installed again: it is found where it is for the tests.
    outside = {Path(torch.__file__).parents[1], Path(sysconfig.get_path("purelib"))}
    Path(here, "outside.pth").write_text("".join(f"{path}\n" for path in outside))
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index",
               "--no-build-isolation", str(copy)]
    done = subprocess.run(install, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.rmtree(copy)
    done = subprocess.run([str(python), "-c", USE], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(here) in done.stdout
    installed = {path.relative_to(here).as_posix() for path in Path(here, "ucdr_ref").rglob("*")
                 if path.is_file() and path.suffix != ".pyc"}
    shipped = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ucdr_ref").rglob("*")
               if path.is_file() and path.suffix != ".pyc"}
    assert installed == shipped
    assert not list(Path(here).glob("train*"))  # the scripts stay scripts
