"""Plugins are held to bytes: whatever gets media by itself is found, and what reads bytes is not."""

import ast
from pathlib import Path

import pytest

from light_sdk.testing.opening import find_openings, openings_of_package


@pytest.mark.parametrize(
    "code",
    [
        "import requests",
        "import os, httpx",
        "from urllib.request import urlopen",
        "from urllib import request",
        "import http.client",
        "import socket",
        "from requests import get",
        "image = Image.open(source)",
        "image = PIL.Image.open(item['url'])",
        "image = Image.open()",
        "from transformers.image_utils import load_image\nload_image(url)",
        "cv2.imread(path)",
        "torchvision.io.read_image(path)",
    ],
)
def test_what_gets_media_is_found(code: str) -> None:
    assert len(find_openings(ast.parse(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "image = Image.open(io.BytesIO(data)).convert('RGB')",
        "image = Image.open(BytesIO(data))",
        "from urllib.parse import urlsplit",
        "import http",
        "vocabulary = open(folder / 'qwen.tiktoken').read()",
        "Image.fromarray(x)",
    ],
)
def test_what_reads_bytes_is_not(code: str) -> None:
    assert find_openings(ast.parse(code)) == []


def test_packages_are_walked(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "good.py").write_text("x = 1")
    (tmp_path / "sub" / "bad.py").write_text("import requests\n")
    assert openings_of_package(tmp_path) == {"sub/bad.py": ["1: import requests"]}


def test_no_plugin_of_ours_does() -> None:
    root = Path(__file__).parents[3]
    folders = [folder for folder in (root / "plugins").glob("*/src") if folder.is_dir()]
    assert len(folders) > 1
    for folder in [*folders, root / "sdk" / "src" / "light_sdk" / "layers"]:
        assert openings_of_package(folder) == {}, folder
