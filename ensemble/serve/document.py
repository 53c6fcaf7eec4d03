"""The HTTP API in OpenAPI's words: every route, what it takes, what it answers, and what it refuses.

Written by hand, because most refusals come from the guard, which stands before the framework that could derive them.
OpenAPI 3.0.3, which generators of clients read best. tests/ensemble/serve/test_document.py holds it to the server.
"""

from typing import Any

from ensemble.serve.drift import CLEAR
from ensemble.serve.guard import BATCH, DOCUMENT, DRIFT, HEALTH, METRICS, PREDICT
from ensemble.serve.metrics import REFUSED
from ensemble.serve.routes import FILES, MOST_PICTURES

SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
WEIGHT = {**SHARE, "maximum": 1.001}  # the weights of an ensemble sum to 1 within a thousandth
COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
TEXT: dict[str, Any] = {"type": "string"}
DICT: dict[str, Any] = {"type": "object"}
PICTURE = {"type": "string", "format": "binary", "description": "the bytes of an image file"}

REFUSALS = {  # of the guard, and of what is behind it
    "400": "no HTTP request, or not the form that is expected",
    "401": "no token, or another one",
    "403": "a page of another site has sent it",
    "408": "the request did not arrive in time",
    "413": "it is too large",
    "415": "not a picture that can be read, or another kind of body",
    "421": "the Host header names another server",
    "431": "the head is too large",
    "500": "the server failed",
    "503": "the server is busy",
}
ALWAYS = ("400", "403", "408", "413", "421", "431", "500")
HEADERS = {
    "401": {"WWW-Authenticate": {"schema": TEXT, "required": True}},
    "503": {"Retry-After": {"schema": {"type": "string", "pattern": "^[0-9]+$"}, "required": True}},
}


def describe_api(has_risk: bool, needs_token: bool) -> dict[str, Any]:
    """The document that /openapi.json answers, as plain JSON.

    has_risk: the ensemble says when it is unsure, so answers have `set` and `unsure`; needs_token: all but /health do.
    """
    paths = {
        PREDICT: {
            "post": _operation(
                "predict",
                "Answer one picture",
                _json("Answer"),
                {mime: {"schema": PICTURE} for mime in ("application/octet-stream", "image/*")},
                "415", "503",
            )
        },
        BATCH: {
            "post": _operation(
                "predict_batch",
                f"Answer up to {MOST_PICTURES} pictures, in order; those that cannot be answered have an error",
                _json("Answers"),
                {"multipart/form-data": {"schema": _ref("Pictures")}},
                "415", "503",
            )
        },
        HEALTH: {"get": _operation("health", "Say that the server runs, and with which ensemble", _json("Health"))},
        METRICS: {"get": _operation("metrics", "Count for Prometheus", {"text/plain": {"schema": TEXT}})},
        DRIFT: {"get": _operation("drift", "Compare the last answers with those to the select split", _json("Drift"))},
        DOCUMENT: {"get": _operation("document", "This document", {"application/json": {"schema": DICT}})},
    }  # fmt: skip
    components: dict[str, Any] = {"schemas": _schemas(has_risk)}
    document = {
        "openapi": "3.0.3",
        "info": {
            "title": "Ninefold",
            "version": "1",
            "description": "An ensemble that says what is on pictures. The demo page at / is not described here.",
        },
        "paths": paths,
        "components": components,
    }
    if needs_token:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        for path, methods in paths.items():
            for operation in methods.values():
                operation["security"] = [] if path == HEALTH else [{"token": []}]
                if path != HEALTH:
                    operation["responses"]["401"] = _refusal("401")
    return document


def _operation(
    name: str, summary: str, answer: dict[str, Any], body: dict[str, Any] | None = None, *refusals: str
) -> dict[str, Any]:
    responses = {"200": {"description": "the answer", "content": answer}}
    responses |= {status: _refusal(status) for status in sorted((*ALWAYS, *refusals))}
    operation: dict[str, Any] = {"operationId": name, "summary": summary, "responses": responses}
    if body is not None:
        operation["requestBody"] = {"required": True, "content": body}
    return operation


def _refusal(status: str) -> dict[str, Any]:
    found: dict[str, Any] = {"description": REFUSALS[status], "content": _json("Error")}
    if status in HEADERS:
        found["headers"] = HEADERS[status]
    return found


def _schemas(has_risk: bool) -> dict[str, Any]:
    sure: dict[str, Any] = {}
    if has_risk:
        sure = {
            "set": _list(TEXT, "classes among which the right one is, at the risk that was selected for"),
            "unsure": {"type": "boolean"},
        }
    return {
        "Answer": _object(
            label={**TEXT, "description": "the class that is answered"},
            probability={**SHARE, "description": "of that class"},
            agreement={**WEIGHT, "description": "weight of the members that say the same"},
            **sure,
            probs={"type": "object", "additionalProperties": SHARE, "description": "by class"},
            members=_list(_ref("Vote"), "what each network says, the heaviest first"),
        ),
        "Vote": _object(id=TEXT, architecture=TEXT, weight=WEIGHT, label=TEXT, probability=SHARE),
        "Refusal": _object(error=TEXT, status={"type": "integer", "enum": list(REFUSED)}),
        "Pictures": _object(**{FILES: {**_list(PICTURE, "image files"), "minItems": 1, "maxItems": MOST_PICTURES}}),
        "Answers": _object(answers=_list({"oneOf": [_ref("Answer"), _ref("Refusal")]}, "in the order of the pictures")),
        "Health": _object(status={**TEXT, "enum": ["ok"]}, run=TEXT, ensemble=TEXT, members={**COUNT, "minimum": 1}),
        "Side": _object(
            images=COUNT,
            confidence={**SHARE, "description": "mean probability of the answers"},
            classes={"type": "object", "additionalProperties": SHARE, "description": "shares of the answers"},
        ),
        "Test": _object(
            "degrees",
            statistic={"type": "number", "description": "z, or chi-square"},
            p={**SHARE, "description": "probability of one as large where nothing has changed"},
            degrees={"type": "integer", "minimum": 1, "description": "of freedom, of chi-square"},
            clear={"type": "boolean", "description": f"p is below {CLEAR:g}"},
        ),
        "Drift": _object(
            "answers", "select",
            window={**COUNT, "description": "how many answers are compared at most"},
            answers=_ref("Side"),
            select=_ref("Side"),
            tests=_object("confidence", "classes", confidence=_ref("Test"), classes=_ref("Test")),
        ),
        "Error": _object(error={**TEXT, "description": "why, in words"}),
    }  # fmt: skip


def _object(*optional: str, **properties: Any) -> dict[str, Any]:
    """Of these properties and no others; all of them but for the optional ones."""
    required = [name for name in properties if name not in optional]
    schema = {"type": "object", "properties": properties, "additionalProperties": False}
    return {**schema, "required": required} if required else schema  # which must not be empty


def _list(items: dict[str, Any], description: str) -> dict[str, Any]:
    return {"type": "array", "items": items, "description": description}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(name)}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}
