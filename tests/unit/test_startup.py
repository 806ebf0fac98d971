"""Process defaults of the scripts, and the imports that they avoid."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import transformers.utils
from transformers.utils import import_utils

from tests.conftest import ROOT
from vlmvqa import startup

# Prints which of the given modules a training script has imported after its own imports.
IMPORTS = """\
import json, runpy, sys
from vlmvqa import cli
sys.argv = ["launch/train.py"]
with cli.script("__main__", "launch/train.py"):
    import vlmvqa.training.run
print(json.dumps(sorted(name for name in {names!r} if sys.modules.get(name))))
"""


def test_environment_variables_of_the_user_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    startup.prepare()
    assert startup.os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    startup.prepare()
    assert startup.os.environ["GOMP_SPINCOUNT"] == "10000"


def test_packages_are_hidden_only_within_the_block() -> None:
    """Functions imported within the block keep returning False, except for packages that are looked up later."""
    before = import_utils.is_peft_available
    with startup.fewer_imports():
        peft, torchao = transformers.utils.is_peft_available, import_utils.is_torchao_available
        assert not peft() and not torchao()
    assert import_utils.is_peft_available is transformers.utils.is_peft_available is before
    assert not peft() and torchao() == import_utils.is_torchao_available()


def test_a_package_that_is_imported_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", startup)
    with startup.fewer_imports():
        assert sys.modules["wandb"] is startup
    assert sys.modules["wandb"] is startup
    monkeypatch.delitem(sys.modules, "wandb")
    with startup.fewer_imports(), pytest.raises(ImportError):
        import wandb  # noqa: F401
    assert "wandb" not in sys.modules


@pytest.mark.slow
def test_a_training_imports_no_optional_package() -> None:
    names = ("torch", "transformers.trainer", "peft", "datasets", "scipy", "bitsandbytes", "torchao", "wandb", "pandas")
    program = IMPORTS.format(names=names)
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == ["torch", "transformers.trainer"]
