"""ensemble.serve.document: that it is true of a real server."""

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from ensemble.serve.document import describe_api
from tests.contract import check_contract, run_cases
from tests.server import Server, bomb, encoded, head

FAST = 40  # random cases of each operation; tests/slow/test_serve.py sends 2,000


def check_answer(document: dict[str, Any], path: str, method: str, status: int, body: bytes) -> None:
    """Raise jsonschema.ValidationError for an answer that the document does not describe."""
    media = document["paths"][path][method]["responses"][str(status)]["content"]["application/json"]
    jsonschema.Draft4Validator({**media["schema"], "components": document["components"]}).validate(json.loads(body))


def test_answers_and_refusals_are_as_described(wary: Server, server: Server, picture: Image.Image) -> None:
    png = encoded(picture, "PNG")
    for asked, has_risk in ((wary, True), (server, False)):
        document = json.loads(asked.ask("GET", "/openapi.json")[1])
        assert document == describe_api(has_risk, needs_token=False)
        assert ("unsure" in document["components"]["schemas"]["Answer"]["required"]) == has_risk
        for content, headers in (
            (png, {}), (b"text", {}), (bomb(), {}), (bytes(3 * 2**20), {}), (png, {"Host": "evil.example"}),
            (png, {"Sec_Fetch_Site": "cross-site"}),
        ):  # fmt: skip
            status, body, _ = asked.ask("POST", "/predict", content, **headers)
            check_answer(document, "/predict", "post", status, body)
        status, told = asked.post_batch([png, b"text", bomb()])
        assert [answer.get("status") for answer in told["answers"]] == [None, 415, 415]
        check_answer(document, "/predict/batch", "post", status, json.dumps(told).encode())
        status, told = asked.post_batch([])
        check_answer(document, "/predict/batch", "post", status, json.dumps(told).encode())
        for path in ("/health", "/drift", "/openapi.json"):
            status, body, _ = asked.ask("GET", path)
            check_answer(document, path, "get", status, body)
        status, told = asked.send(head("/predict", "Content-Length: -5"))
        check_answer(document, "/predict", "post", status, json.dumps(told).encode())
    with pytest.raises(jsonschema.ValidationError):
        check_answer(document, "/health", "get", 200, b'{"status": "ok"}')


def test_a_token_is_part_of_it() -> None:
    document = describe_api(has_risk=False, needs_token=True)
    for path, methods in document["paths"].items():
        (operation,) = methods.values()
        is_open = path == "/health"
        assert operation["security"] == ([] if is_open else [{"token": []}])
        assert ("401" in operation["responses"]) != is_open
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"


def test_schemathesis_finds_no_fault(wary: Server, tmp_path: Path) -> None:
    assert check_contract(wary, tmp_path, FAST) > 3 * FAST


def test_schemathesis_finds_a_planted_fault(wary: Server, tmp_path: Path) -> None:
    truth = json.loads(wary.ask("GET", "/openapi.json")[1])
    false = copy.deepcopy(truth)
    del false["paths"]["/predict/batch"]["post"]["responses"]["400"]
    false["components"]["schemas"]["Health"]["properties"]["members"] = {"type": "string"}
    report = run_cases(wary, false, tmp_path, 10)
    assert report["exit_code"] == 1
    found = {(failure["type"], *failure["operations"]) for failure in report["failures"]}
    assert found == {("UndefinedStatusCode", "POST /predict/batch"), ("JsonSchemaError", "GET /health")}
