"""Where an instance lives: short paths, private folders, secrets."""

from __future__ import annotations

import os
import pickle
import stat
from pathlib import Path
from typing import Any

import msgspec
import pytest

from configs.errors import ConfigError
from configs.runtime import MAX_SOCKET_NAME, MAX_SOCKET_PATH, Runtime, home_dir, run_dir_for
from configs.schema import Config


def config(**changes: Any) -> Config:
    base: dict[str, Any] = {
        "models": [{"id": "m", "source": "sim:bytes"}],
        "groups": [{"name": "g", "model": "m", "engine": {"kind": "sim"}}],
        "tenants": [{"id": "t", "anonymous": True}],
        "cluster": "c",
    }
    return msgspec.convert({**base, **changes}, Config)


def runtime(tmp_path: Path, **env: str) -> Runtime:
    return Runtime.from_config(config(), {"WARMGATE_HOME": str(tmp_path), **env}, lambda n: b"r" * n)


def test_two_ports_have_two_run_folders() -> None:
    one = run_dir_for(config(http={"port": 1}), Path("/tmp"))
    two = run_dir_for(config(http={"port": 2}), Path("/tmp"))
    assert one == Path(f"/tmp/wg-{os.getuid()}/c-1")
    assert two == Path(f"/tmp/wg-{os.getuid()}/c-2")


@pytest.mark.parametrize("temp_dir", ["/tmp", "/var/folders/" + "x" * 60])
@pytest.mark.parametrize("cluster", ["c", "c" * 63])
def test_a_socket_in_the_run_folder_has_a_path_that_fits(temp_dir: str, cluster: str) -> None:
    run_dir = run_dir_for(config(cluster=cluster), Path(temp_dir))
    assert len(os.fsencode(run_dir)) + 1 + MAX_SOCKET_NAME <= MAX_SOCKET_PATH


def test_secret_comes_from_the_environment_or_is_drawn(tmp_path: Path) -> None:
    assert runtime(tmp_path).secret == b"r" * 32
    assert runtime(tmp_path, WARMGATE_CLUSTER_SECRET="s" * 16).secret == b"s" * 16
    with pytest.raises(ConfigError, match="WARMGATE_CLUSTER_SECRET: the cluster secret must have at least 16 bytes"):
        runtime(tmp_path, WARMGATE_CLUSTER_SECRET="short")


def test_runtime_travels_and_keeps_its_secret_out_of_logs(tmp_path: Path) -> None:
    made = runtime(tmp_path, WARMGATE_CLUSTER_SECRET="very-secret-value")
    assert pickle.loads(pickle.dumps(made)) == made
    assert "very-secret-value" not in repr(made)


def test_embedded_store_is_a_socket_in_the_run_folder_and_others_are_taken_as_given(tmp_path: Path) -> None:
    made = runtime(tmp_path)
    assert made.redis_url == f"unix://{made.run_dir}/valkey.sock"
    given = Runtime.from_config(config(redis={"url": "redis://h:1"}), {}, os.urandom)
    assert given.redis_url == "redis://h:1"


def test_run_folder_is_for_its_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "wg" / "c-1"
    here = Runtime(run_dir=folder, home=tmp_path, redis_url="", secret=b"", instance="c-1")
    folder.mkdir(parents=True, mode=0o755)
    here.prepare()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700


def test_a_link_in_place_of_the_run_folder_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "wg").mkdir()
    (tmp_path / "wg" / "c-1").symlink_to(target)
    here = Runtime(run_dir=tmp_path / "wg" / "c-1", home=tmp_path, redis_url="", secret=b"", instance="c-1")
    with pytest.raises(ConfigError, match="must be a folder that belongs to user"):
        here.prepare()


def test_home_is_a_variable_or_the_cache_folder() -> None:
    assert home_dir({"WARMGATE_HOME": "/data"}) == Path("/data")
    assert home_dir({}) == Path.home() / ".cache" / "warmgate"
