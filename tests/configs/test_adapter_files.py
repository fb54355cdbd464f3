"""Where adapters may lie, what is fetched of them, what is kept: real folders, a real S3 server."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from configs.adapters.cache import KEEP_S, AdapterCache
from configs.adapters.files import AdapterFiles, Fit, fit_for
from configs.adapters.place import Folder, OutsideError, Remote, Roots, place_of
from configs.adapters.remote import FetchBounds, UnreachableError, fetch, look
from configs.lora import LoraError, read_lora
from configs.schema import (
    AdapterFilesConfig,
    AdapterSourceConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    TenantConfig,
)
from tests.configs.s3_server import BUCKET, S3, s3

__all__ = ["s3"]

ANY = Fit((), 512)


def checkpoint(folder: Path, mark: int = 0, **changes: Any) -> Path:
    """A folder as PEFT saves it, with one tensor in it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    header = json.dumps({"x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}).encode()
    content = len(header).to_bytes(8, "little") + header + mark.to_bytes(8, "little")
    (folder / "adapter_model.safetensors").write_bytes(content)
    return folder


def files(home: Path, *roots: str, sources: tuple[str, ...] = (), **limits: Any) -> AdapterFiles:
    config = Config(
        models=(ModelConfig(id="m", source="sim:bytes"),),
        groups=(GroupConfig(name="g", model="m"),),
        tenants=(TenantConfig(id="t", anonymous=True),),
        adapter_sources=tuple(AdapterSourceConfig(url=url, base_model="m") for url in sources),
        adapter_files=AdapterFilesConfig(roots=roots, **limits),
    )
    return AdapterFiles(config, home)


BOUNDS = FetchBounds(1 << 20, 10.0, Roots())


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("/a/b", Folder(Path("/a/b"))),
        ("file:///a/b/", Remote("file:///a/b", "file", Path("/a/b"))),
        ("file:///a%20b", Remote("file:///a b", "file", Path("/a b"))),
        ("s3://bucket/a/b/", Remote("s3://bucket/a/b", "s3")),
        ("abfs://c@a.dfs.core.windows.net/x", Remote("abfs://c@a.dfs.core.windows.net/x", "abfs")),
    ],
)  # fmt: skip
def test_paths_and_urls_mean_places(path: str, means: object) -> None:
    assert place_of(path) == means


@pytest.mark.parametrize(
    "path",
    ["", "a/b", "http://host/x", "memory://x", "simplecache::s3://b/x", "s3://b/x::y", "ssh://h/x", "s3://b/../x",
     "file://host/x", "file:///a/../b", "s3://b//x", "s3://b/*", "s3://b/x?versionId=1", "s3://", "local:///x",
     "s3://key:secret@host/x", "~nosuchuser/x"],
)  # fmt: skip
def test_what_reads_other_things_than_adapters_is_refused(path: str) -> None:
    with pytest.raises(LoraError) as caught:
        place_of(path)
    assert "secret" not in str(caught.value)


def test_roots_hold_after_links_are_resolved(tmp_path: Path) -> None:
    inside, outside = checkpoint(tmp_path / "root" / "x"), checkpoint(tmp_path / "outside" / "y")
    (tmp_path / "root" / "link").symlink_to(outside)
    (tmp_path / "root" / "alias").symlink_to(inside)
    sneaky = checkpoint(tmp_path / "root" / "sneaky")
    (sneaky / "adapter_config.json").unlink()
    (sneaky / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    (tmp_path / "root" / "circle").symlink_to(tmp_path / "root" / "circle")
    roots = Roots((place_of(str(tmp_path / "root")), place_of("s3://bucket/team")))
    for good in (str(inside), str(tmp_path / "root" / "alias"), f"file://{inside}", "s3://bucket/team/x"):
        roots.check(place_of(good))
    bad = ("link", "sneaky", "../outside/y", "nowhere/../../outside/y", "circle")
    for path in (*(str(tmp_path / "root" / name) for name in bad), "/", "s3://bucket/teams/x", "s3://other/team/x"):
        with pytest.raises(OutsideError, match=r"does not lie within adapter_files\.roots") as caught:
            roots.check(place_of(path))
        assert str(outside) not in str(caught.value).replace(path, "")
    Roots().check(place_of("/anywhere"))


def test_a_path_outside_says_the_same_whether_it_is_there_or_not(tmp_path: Path) -> None:
    there = checkpoint(tmp_path / "there")
    said = []
    for path in (there, tmp_path / "thare"):
        with pytest.raises(OutsideError) as caught:
            files(tmp_path / "home", str(tmp_path / "root")).read(str(path), ANY)
        said.append(str(caught.value).replace("thare", "there"))
    assert said[0] == said[1]


def test_a_replica_reads_what_is_within_roots_or_of_a_source(tmp_path: Path) -> None:
    root, source = checkpoint(tmp_path / "root" / "x").parent, checkpoint(tmp_path / "source" / "x").parent
    (source / "out").symlink_to(root / "x")
    (source / "x" / "more").symlink_to(root)
    both = files(tmp_path / "home", str(root), sources=(f"file://{source}",))
    assert both.local(str(root / "x"), "", ANY) == root / "x"
    digest = read_lora(source / "x").digest()
    assert both.local(f"file://{source}/x", digest, ANY) == tmp_path / "home" / "adapters" / digest
    for path in (f"file://{source}/out", str(source / "x"), "/etc"):
        with pytest.raises(OutsideError):
            both.local(path, "", ANY)
    free = files(tmp_path / "home", sources=(f"file://{source}",))
    assert free.local(str(source / "out"), "", ANY), "without roots a path is read as it is"
    with pytest.raises(OutsideError, match="its source"):
        free.local(f"file://{source}/out", "", ANY)


def test_size_rank_and_base_model_are_looked_at_before_anything_is_copied_or_loaded(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", r=16, base_model_name_or_path="org/Other-Model")
    small = files(tmp_path / "home", max_mib=1)
    with (folder / "adapter_model.safetensors").open("r+b") as weights:
        weights.truncate(2 << 20)
    with pytest.raises(LoraError, match="2097152 bytes, the most is 1048576"):
        small.read(f"file://{folder}", ANY)
    assert list((tmp_path / "home" / "adapters").iterdir()) == []
    checkpoint(folder, r=16, base_model_name_or_path="org/Other-Model")
    for path in (str(folder), f"file://{folder}"):
        with pytest.raises(LoraError, match="rank 16, the most is 8"):
            small.read(path, Fit((), 8))
        with pytest.raises(LoraError, match="trained on 'org/Other-Model'"):
            small.local(path, "", Fit(("m",), 64))
        assert small.local(path, "", Fit(("m", "x/other_model"), 64))


def test_what_fits_is_any_name_of_the_model_and_the_largest_rank_of_its_engines() -> None:
    engines = [EngineConfig(max_adapters=1, max_lora_rank=r, lora_base_models=(f"other-{r}",)) for r in (8, 32)]
    fit = fit_for(ModelConfig(id="m", source="smollm2-135m"), engines, Path("/home"))
    assert fit.max_rank == 32
    assert {"m", "smollm2-135m", "HuggingFaceTB/SmolLM2-135M-Instruct", "other-8", "other-32"} <= set(fit.names)
    assert fit_for(ModelConfig(id="m", source="sim:bytes"), [EngineConfig(kind="sim")], Path("/home")).names == ()


def test_a_pipe_in_place_of_a_file_holds_nobody(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    (folder / "adapter_config.json").unlink()
    os.mkfifo(folder / "adapter_config.json")
    for path in (f"file://{folder}", str(folder)):
        with pytest.raises(LoraError, match="is no file"):
            files(tmp_path / "home").read(path, ANY)


def test_copies_are_whole_named_by_digest_and_mended(tmp_path: Path) -> None:
    cache = AdapterCache(tmp_path / "cache", 1 << 30)
    source = checkpoint(tmp_path / "x")
    (source / "optimizer.pt").write_bytes(b"large")
    fetched = cache.fetch(place_of(f"file://{source}"), BOUNDS)
    assert fetched.digest == read_lora(source).digest() == fetched.files.folder.name
    assert {p.name for p in fetched.files.folder.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    checkpoint(source, mark=1)
    with pytest.raises(LoraError, match="have changed since it was added"):
        cache.fetch(place_of(f"file://{source}"), BOUNDS, fetched.digest)
    assert cache.find(fetched.digest) is not None
    fetched.files.weights.write_bytes(fetched.files.weights.read_bytes()[:-1] + b"!")
    assert cache.find(fetched.digest) is None, "damaged: it is not used"
    checkpoint(source)
    assert cache.fetch(place_of(f"file://{source}"), BOUNDS, fetched.digest).digest == fetched.digest
    assert [p.name for p in cache.folder.iterdir()] == [fetched.digest], "nothing is left over"
    assert cache.find("../x") is None


def test_the_least_recently_used_copies_go(tmp_path: Path) -> None:
    now = 1_000_000.0
    cache = AdapterCache(tmp_path / "cache", 600, lambda: now)
    kept = []
    for mark in range(4):
        kept.append(cache.fetch(place_of(f"file://{checkpoint(tmp_path / 'x', mark=mark)}"), BOUNDS))
        now += 1.0
    assert len(list(cache.folder.iterdir())) == 4, "all were used just now"
    now += KEEP_S
    assert cache.find(kept[0].digest) is not None
    cache.shrink()
    names = {p.name for p in cache.folder.iterdir()}
    assert kept[0].digest in names and kept[1].digest not in names and len(names) < 4


def test_folders_and_links_in_a_source_are_looked_at_and_no_folder_is_unreachable(tmp_path: Path) -> None:
    checkpoint(tmp_path / "s" / "x")
    checkpoint(tmp_path / "s" / "deep" / "er")
    found = look(Remote(f"file://{tmp_path}/s", "file", tmp_path / "s"), 1.0)
    assert set(found.folders) == {"x"} and re.fullmatch(r"\d+:\d+", found.identity)
    with pytest.raises(UnreachableError):
        look(Remote(f"file://{tmp_path}/none", "file", tmp_path / "none"), 1.0)


def test_an_object_store_is_looked_into_and_fetched_from(s3: S3, tmp_path: Path) -> None:
    s3.put(checkpoint(tmp_path / "x"), "team/x")
    s3.put(checkpoint(tmp_path / "x"), "team/.y")
    s3.put(checkpoint(tmp_path / "x"), "team-b/z")
    s3.client.put_object(Bucket=BUCKET, Key="team/notes/readme", Body=b"")
    source = place_of(f"s3://{BUCKET}/team")
    assert isinstance(source, Remote)
    before = look(source, 10.0).folders
    assert set(before) == {"x"}
    s3.put(checkpoint(tmp_path / "x", mark=7), "team/x")
    assert look(source, 10.0).folders != before
    (tmp_path / "to").mkdir()
    fetch(source.child("x"), tmp_path / "to", BOUNDS)
    assert read_lora(tmp_path / "to").digest() == read_lora(tmp_path / "x").digest()
    assert look(source.child("none"), 10.0).folders == {}, "an empty prefix is empty"
    with pytest.raises(UnreachableError, match="s3://nobody/x cannot be read"):
        look(Remote("s3://nobody/x", "s3"), 10.0)


def test_what_is_too_large_or_missing_in_a_store_is_not_fetched(s3: S3, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x")
    s3.put(folder, "x")
    (tmp_path / "to").mkdir()
    place = Remote(f"s3://{BUCKET}/x", "s3")
    with pytest.raises(LoraError, match="the most is 10"):
        fetch(place, tmp_path / "to", FetchBounds(10, 10.0, Roots()))
    s3.client.delete_object(Bucket=BUCKET, Key="x/adapter_model.safetensors")
    s3.client.put_object(Bucket=BUCKET, Key="x/adapter_model.bin", Body=b"pickle")
    with pytest.raises(LoraError, match=r"adapter_model.bin cannot be served: save it as safetensors"):
        fetch(place, tmp_path / "to", BOUNDS)
    with pytest.raises(LoraError, match=r"adapter_config.json is missing"):
        fetch(Remote(f"s3://{BUCKET}/none", "s3"), tmp_path / "to", BOUNDS)
    assert not (tmp_path / "to" / "adapter_model.safetensors").exists()


def test_a_store_that_does_not_answer_is_given_up(s3: S3, tmp_path: Path) -> None:
    s3.stop()
    with pytest.raises(UnreachableError):
        look(Remote(f"s3://{BUCKET}/x", "s3"), 0.5)


def test_a_store_without_its_package_says_which_one_is_missing(tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="gs:// needs gcsfs: it is not installed here"):
        look(Remote("gs://bucket/x", "gs"), 1.0)


def test_files_that_cannot_be_looked_at_are_not_taken_for_none(tmp_path: Path) -> None:
    """A network that stutters must not unload a fleet."""
    checkpoint(tmp_path / "fine")
    (tmp_path / "stale").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "stale" / name).symlink_to(tmp_path / "stale" / name)  # ELOOP
    (tmp_path / "empty").mkdir()
    place = place_of(f"file://{tmp_path}")
    assert isinstance(place, Remote)
    found = look(place, 5.0).folders
    assert set(found) == {"fine", "stale"} and "cannot be looked at" in found["stale"]


def test_a_link_that_appears_after_the_look_leads_nowhere_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "theirs" / "secret")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "x").symlink_to(tmp_path / "theirs" / "secret")
    place = place_of(f"file://{tmp_path}/mine/x")
    assert isinstance(place, Remote)
    monkeypatch.setattr(Roots, "check", lambda roots, place: None)  # as if it had been a folder a moment ago
    roots = Roots((place_of(f"file://{tmp_path}/mine"),))
    (tmp_path / "copy").mkdir()
    with pytest.raises(OutsideError):
        fetch(place, tmp_path / "copy", FetchBounds(max_bytes=1000, timeout_s=5.0, roots=roots))
