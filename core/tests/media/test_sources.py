"""Data URLs and files: what may be read is read, and nothing else, without telling what is there."""

import base64
import os
import socket
from pathlib import Path

import pytest

from light_core.errors import ConfigError, RequestError
from light_core.media.settings import MediaSettings
from light_core.media.sources import check_source, read_data_url, read_file, scheme_of

DATA = b"some bytes of a file"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that may be read, beside a secret."""
    (tmp_path / "secret").write_bytes(b"the secret")
    root = tmp_path / "media"
    (root / "sub").mkdir(parents=True)
    (root / "a b.png").write_bytes(DATA)
    (root / "sub" / "link.png").symlink_to(root / "a b.png")
    (root / "escape.png").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to(tmp_path)
    os.mkfifo(root / "pipe")
    return root


def settings(**values: object) -> MediaSettings:
    return MediaSettings(**values)


def test_data_urls() -> None:
    text = base64.b64encode(DATA).decode()
    for head in (
        "data:image/png;base64,",
        "data:;base64,",
        "data:image/svg+xml;charset=utf-8;base64,",
        "data:application/pdf;base64,",
        "DATA:image/PNG;BASE64,",
    ):
        assert read_data_url(head + text, settings(), "image") == DATA, head


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("data:image/png,plain", "begins with"),
        ("data:image/png;base64", "begins with"),
        ("data:;base64,", "empty"),
        ("data:;base64,A", "not valid base64"),
        ("data:;base64,@@@@", "not valid base64"),
        ("data:;base64,QUJD\nREVG", "not valid base64"),
        ("data:;base64," + base64.b64encode(bytes(101)).decode(), "more than 100 bytes"),
        ("data:" + "x" * 1000 + ";base64,QUJD", "begins with"),
    ],
)
def test_bad_data_urls(url: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        read_data_url(url, settings(max_media_bytes=100), "images[3]")
    assert caught.value.param == "images[3]" and str(caught.value).startswith("images[3]: ")


def test_the_size_of_a_data_url_is_looked_at_before_it_is_decoded() -> None:
    for size, fits in ((100, True), (101, False)):
        url = "data:;base64," + base64.b64encode(bytes(size)).decode()
        if fits:
            assert len(read_data_url(url, settings(max_media_bytes=100), "image")) == size
    with pytest.raises(RequestError, match="more than 100 bytes"):
        check_source("data:;base64," + "A" * 5000, settings(max_media_bytes=100), "image")


@pytest.mark.parametrize("url", ["gopher://x/", "ftp://x/a.png", "dict://x", "javascript:1", "blob:x", "a.png", "/etc/passwd", "", "//x/y"])
def test_other_schemes_are_refused_at_once(url: str) -> None:
    for allowed in ((), ("x",)):
        with pytest.raises(RequestError, match="give a data: URL"):
            check_source(url, settings(allowed_media_domains=allowed), "image")


def test_addresses_and_files_must_be_allowed() -> None:
    with pytest.raises(RequestError, match="fetches no addresses"):
        check_source("https://example.com/a.png", settings(), "image")
    with pytest.raises(RequestError, match="reads no files"):
        check_source("FILE:///etc/passwd", settings(), "image")
    check_source("HTTPS://example.com/a.png", settings(allowed_media_domains=("example.com",)), "image")
    check_source("file:///a", settings(allowed_local_media_path="/srv"), "image")
    with pytest.raises(RequestError, match="8192 characters"):
        check_source("https://example.com/" + "a" * 9000, settings(allowed_media_domains=("example.com",)), "image")
    assert [scheme_of(url) for url in ("Data:x", "http:", "x", ":", "1a:x")] == ["data", "http", "", "", ""]


def test_files_below_the_folder_are_read(folder: Path) -> None:
    allowed = settings(allowed_local_media_path=str(folder))
    assert read_file(f"file://{folder}/a%20b.png", allowed, "image") == DATA
    assert read_file(f"file://{folder}/sub/link.png", allowed, "image") == DATA
    assert read_file(f"file://{folder}/sub/../a b.png", allowed, "image") == DATA


@pytest.mark.parametrize(
    "path",
    [
        "{root}/../secret",
        "{root}/%2e%2e/secret",
        "{root}/..%2fsecret",
        "{root}/escape.png",
        "{root}/up/secret",
        "{root}/pipe",
        "{root}/sub",
        "{root}",
        "{root}/nothing.png",
        "{root}/a b.png%00.png",
        "{root}/a b.png?x",
        "/etc/passwd",
        "/proc/self/environ",
        "/proc/self/fd/0",
        "/dev/zero",
        "{root}x/a.png",
    ],
)
def test_everything_else_is_refused_with_one_text(folder: Path, path: str) -> None:
    allowed = settings(allowed_local_media_path=str(folder))
    with pytest.raises(RequestError) as caught:
        read_file("file://" + path.format(root=folder), allowed, "image")
    assert str(caught.value) == "image: there is no such file that may be read"


@pytest.mark.parametrize(
    "url", ["file:{root}/a b.png", "file://localhost{root}/a b.png", "file://evil{root}/a b.png", "file:a b.png", "file://"]
)
def test_files_of_other_hosts_and_relative_ones_are_refused(folder: Path, url: str) -> None:
    with pytest.raises(RequestError, match="no such file"):
        read_file(url.format(root=folder), settings(allowed_local_media_path=str(folder)), "image")


def test_large_files_sockets_and_a_missing_folder(folder: Path) -> None:
    with pytest.raises(RequestError, match="more than 10 bytes"):
        read_file(f"file://{folder}/a b.png", settings(allowed_local_media_path=str(folder), max_media_bytes=10), "image")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        with pytest.raises(RequestError, match="no such file"):
            read_file(f"file://{folder}/socket", settings(allowed_local_media_path=str(folder)), "image")
    with pytest.raises(RequestError, match="no such file"):
        read_file("file:///a.png", settings(allowed_local_media_path=str(folder / "gone")), "image")


def test_settings_are_checked() -> None:
    for values in ({"allowed_media_domains": ("https://x",)}, {"allowed_media_domains": ("x/y",)}, {"allowed_media_domains": ("ü.de",)}):
        with pytest.raises(ConfigError, match="no host"):
            settings(**values)
    for values in (
        {"max_media_bytes": 0},
        {"decoders": True},
        {"fetch_timeout_s": "1"},
        {"max_image_ratio": float("nan")},
        {"max_redirects": -1},
    ):
        with pytest.raises(ConfigError):
            settings(**values)
    assert settings(max_redirects=0, fetch_timeout_s=1).max_redirects == 0
