"""ensemble.serve.page: what the demo page opens, keeps and shows."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from ensemble.file import read_ensemble
from ensemble.serve.page import answer_html, build_page
from tests.server import Server


def test_the_page_opens_uploads_alone(server: Server, pictures: Path) -> None:
    """Whoever can reach the page must not get at other files of this machine, nor at addresses through it."""
    picture = pictures / "test/grid/0.png"
    told = server.ask_page(0, server.upload(picture.read_bytes()))
    assert told["success"]
    assert "Votes:" in told["output"]["data"][0]
    kept = sorted(server.temporary.rglob("*.png"))
    assert kept
    named = {"path": str(picture), "meta": {"_type": "gradio.FileData"}}
    fetched = {**named, "path": "https://127.0.0.1/a.png"}
    upload, slider = 0, 1
    for function, value in (
        (upload, named), (upload, {**named, "is_stream": True}), (upload, fetched), (slider, named), (slider, fetched),
    ):  # fmt: skip
        told = server.ask_page(function, value)
        assert not told["success"]
        assert "nothing else is opened" in told["output"]["error"]
    assert sorted(server.temporary.rglob("*.png")) == kept, "nothing was copied into reach"
    with pytest.raises(AssertionError, match="the upload is too large, expected at most 2 MiB"):
        server.upload(bytes(3 * 2**20))


def test_uploads_to_the_page_are_bounded_together(server: Server) -> None:
    """They stay for ten minutes, and those that Gradio does not know of longer."""
    for number in range(60):
        server.upload(bytes([number]) * (2**21 - 100))
    form = {"Content-Type": "multipart/form-data; boundary=cut"}
    part = b'--cut\r\nContent-Disposition: form-data; name="other"; filename="a"\r\n\r\n' + bytes(2**21 - 100)
    for _ in range(60):
        server.ask("POST", "/gradio_api/upload", part + b"\r\n--cut--\r\n", **form)
    assert sum(path.stat().st_size for path in server.temporary.rglob("*") if path.is_file()) <= 50 * 2**21


def test_the_page_has_few_uploads_in_memory(small_run: UPath, tmp_path: Path) -> None:
    """A request for the answer takes a hundred bytes, and names an upload of 20 MiB."""
    at_a_time, most = 0, 0

    async def answer(content: bytes) -> dict[str, Any]:
        nonlocal at_a_time, most
        at_a_time += 1
        most = max(most, at_a_time)
        await asyncio.sleep(0.01)
        at_a_time -= 1
        return {"error": "no"}

    page = build_page(small_run, read_ensemble(small_run), None, answer, tmp_path)
    (tmp_path / "a.png").write_bytes(b"picture")
    function: Any = page.fns[0].fn

    async def ask() -> list[str]:
        return await asyncio.gather(*[function(str(tmp_path / "a.png")) for _ in range(20)])

    assert len(asyncio.run(ask())) == 20
    assert most == 4


def test_names_of_classes_and_files_are_no_markup() -> None:
    evil = "<script>alert(1)</script>"
    member = {"id": evil, "architecture": evil, "weight": 1.0, "label": evil, "probability": 0.9}
    answer = {"label": evil, "probability": 0.9, "probs": {evil: 0.9, "b": 0.1}, "members": [member]}
    for page in (answer_html(answer, evil), answer_html({"error": evil})):
        assert "<script>" not in page
        assert "&lt;script&gt;" in page
