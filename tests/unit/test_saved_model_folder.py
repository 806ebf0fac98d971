"""Where a saved model is found, and the sentence for everything that is none."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

import vlmvqa
from tests.unit.test_predictor import predictor
from tests.unit.test_trainer import write_checkpoint
from vlmvqa import hub
from vlmvqa.errors import InputError
from vlmvqa.extras.pretrained.build import pretrained_config
from vlmvqa.extras.pretrained.model import PretrainedSettings
from vlmvqa.models import loading


def test_a_missing_path_names_the_one_that_was_tried_and_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    near = rf"no model at {tmp_path}/runs/dmeo/model; the nearest is {tmp_path}/runs/demo; name a run's folder"
    with pytest.raises(InputError, match=near):
        loading.find("runs/dmeo/model")
    with pytest.raises(InputError, match=rf"no model at {tmp_path}/x; the nearest is {tmp_path};"):
        loading.find("x")
    with pytest.raises(InputError, match=rf"HF_HUB_OFFLINE is set.*\(no model at {tmp_path}/runs/x; the nearest is"):
        loading.find("runs/x")


def test_a_folder_that_is_no_model_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for name, file in (("pictures", "a.jpg"), ("run", "run.json"), ("checkpoint-3", "files.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("{}")
    expected = {
        "empty": "it is an empty folder",
        "file": "it is a file",
        "pictures": r"it holds no config\.json",
        "run": "it is a run without model/ and without a checkpoint",
        "checkpoint-3": r"it is a checkpoint without config\.json",
    }
    for name, reason in expected.items():
        with pytest.raises(InputError, match=rf"{name} is not a saved model: {reason}.*; name a run's folder, its"):
            loading.find(tmp_path / name)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "bert"}, "is not a vision-language model of transformers but of model_type bert"),
        ({"model_type": "gemma2"}, "is not a vision-language model of transformers but of model_type gemma2"),
        ({"model_type": "nothing"}, "has a model_type that this version of transformers does not know"),
        ({"architecture": "vit"}, r"is neither of vlmvqa \(format 1\) nor of a model of transformers"),
    ],
)
def test_a_model_of_another_kind_is_told_apart(tmp_path: Path, config: dict[str, str], expected: str) -> None:
    """Not called unreachable: the folder is there."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"{tmp_path}.*{expected}"):
        vlmvqa.load(tmp_path, "cpu")


def test_a_folder_without_config_is_not_called_unreachable(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it has no config\.json with a model_type"):
        pretrained_config(PretrainedSettings(str(tmp_path)))
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    with pytest.raises(InputError, match=r"it has no config\.json with a model_type"):
        pretrained_config(PretrainedSettings(str(tmp_path)))


# --- checkpoints -----------------------------------------------------------------------------------------


def test_a_run_without_model_loads_its_newest_undamaged_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step, **{"config.json": "{}"})
    (tmp_path / "checkpoint-6" / "config.json").write_text("{")
    assert loading.find(tmp_path) == tmp_path / "checkpoint-4"
    printed = capsys.readouterr().err
    assert "checkpoint-6 is damaged" in printed
    assert f"{tmp_path} has no model/ yet: loading {tmp_path / 'checkpoint-4'}\n" in printed
    assert loading.find(tmp_path / "latest") == tmp_path / "latest" and capsys.readouterr().err == ""
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "config.json").unlink()
    with pytest.raises(InputError, match=r"is not a saved model: .*checkpoint-6 is damaged"):
        loading.find(tmp_path)


def test_a_checkpoints_checksums_cover_its_folders(tmp_path: Path) -> None:
    from vlmvqa.training import checkpoints

    with checkpoints.writing(tmp_path, 2) as partial:
        predictor().save(partial)
    checkpoint = tmp_path / "checkpoint-2"
    assert checkpoints.damage(checkpoint) is None
    (checkpoint / "tokenizer" / "tokenizer.json").write_text("{}")
    assert checkpoints.damage(checkpoint) == "tokenizer/tokenizer.json has changed since it was written"


# --- the hub ---------------------------------------------------------------------------------------------


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A hub that cannot be reached: the requests that were made of it."""
    made: list[Any] = []

    def head(url: str, **options: Any) -> None:
        made.append((url, options))
        raise HTTPError("Name or service not known")

    monkeypatch.setattr(hub, "_unreached", (float("-inf"), ""))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=head))
    return made


def test_an_unreachable_hub_is_asked_once(requests: list[Any]) -> None:
    reason = (
        r"nobody/nothing is neither .* \(https://\S+ cannot be reached: Name or service not known\); check the path"
    )
    with pytest.raises(InputError, match=reason):
        loading.find("nobody/nothing")
    assert [options["timeout"] for _, options in requests] == [hub.SECONDS]


def test_what_is_cached_is_loaded_without_the_hub(
    requests: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(name: str, **_: Any) -> str:
        if not huggingface_hub.is_offline_mode():
            raise LocalEntryNotFoundError("retried for a minute")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert loading.find("nobody/nothing") == tmp_path


def test_a_reachable_hub_is_asked_for_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    assert hub.unreachable() == ""


def test_gated_weights_name_the_command_that_logs_in() -> None:
    assert "run `hf auth login`" in str(hub.unread("model.pretrained=x/y", OSError("401")))
