"""An OpenAPI description that a fake server is held to: its routes, and what may be said on them.

`openapi-core` judges every request and every answer. Answers that the description leaves out, as it
does not repeat on each operation what can always happen, are not judged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from jsonschema.exceptions import best_match
from openapi_core import Config, OpenAPI
from openapi_core.exceptions import OpenAPIError
from openapi_core.testing import MockRequest, MockResponse

from tests.fakes.web import Answer, Request

_HOST = "https://api.github.com"
_ALWAYS = {301, 307, 401, 403, 404, 429}
"""What any operation may answer, said in the documentation's prose alone."""
_LONG = {"path", "ref", "branch", "base", "head", "name"}
"""Path parameters that may have slashes."""
_MISSING: Any = object()


@dataclass(frozen=True)
class Operation:
    """A method of a path."""

    name: str
    method: str
    template: str
    spec: Mapping[str, Any]

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """What a path of this operation looks like."""
        parts = re.split(r"\{(\w+)\}", self.template)
        named = (
            f"(?P<{part}>{'.+?' if part in _LONG else '[^/]+'})" if number % 2 else re.escape(part)
            for number, part in enumerate(parts)
        )
        return re.compile("".join(named))


class Description:
    """A description read from a file."""

    def __init__(self, path: Path, url: str) -> None:
        self.spec: dict[str, Any] = json.loads(path.read_text())
        self._empty = {"uri": url, "date-time": "2026-01-01T00:00:00Z"}
        """Of strings, by format."""
        # The file is checked by a test of its own, not at each start.
        self._openapi = OpenAPI.from_dict(self.spec, Config(spec_validator_cls=None))
        self.operations = [
            Operation(spec["operationId"], method.upper(), template, spec)
            for template, methods in self.spec["paths"].items()
            for method, spec in methods.items()
        ]

    def find(self, method: str, path: str) -> tuple[Operation, dict[str, str]] | None:
        """Return the operation of a request, and its path's parameters."""
        for operation in self.operations:
            found = operation.pattern.fullmatch(path) if operation.method == method else None
            if found:
                return operation, {k: unquote(v) for k, v in found.groupdict().items()}
        return None

    def wrong_request(
        self, operation: Operation, parameters: Mapping[str, str], request: Request
    ) -> str:
        """Return why a request is not as described; empty if it is."""
        given = [self._resolved(spec) for spec in operation.spec.get("parameters", [])]
        known = {spec["name"] for spec in given if spec["in"] == "query"}
        if unknown := set(request.query) - known:
            return f"query parameters {sorted(unknown)} are not described"
        try:
            self._openapi.validate_request(_asked(operation, parameters, request))
        except OpenAPIError as error:
            return _reason(error)
        return ""

    def wrong_answer(
        self,
        operation: Operation,
        parameters: Mapping[str, str],
        request: Request,
        answer: Answer,
    ) -> str:
        """Return why an answer is not as described; empty if it is."""
        if str(answer.status) not in operation.spec["responses"]:
            return "" if answer.status in _ALWAYS else f"status {answer.status} is not described"
        said = MockResponse(answer.body, answer.status, dict(answer.headers), answer.media)
        try:
            self._openapi.validate_response(_asked(operation, parameters, request), said)
        except OpenAPIError as error:
            return _reason(error)
        return ""

    def complete(self, operation: Operation, status: int, given: Any) -> Any:
        """Add to what a server says what else must be in such an answer: empty values."""
        response = self._resolved(operation.spec["responses"].get(str(status), {}))
        schema = response.get("content", {}).get("application/json", {}).get("schema")
        return self._filled(schema, given) if schema else given

    def _filled(self, schema: Mapping[str, Any], given: Any = _MISSING) -> Any:
        schema = self._chosen(schema, given)
        if given is None or (given is _MISSING and schema.get("nullable")):
            return None
        if "properties" in schema and (given is _MISSING or isinstance(given, dict)):
            known: dict[str, Any] = {} if given is _MISSING else given
            properties = schema["properties"]
            names = dict.fromkeys([*known, *schema.get("required", [])])
            return {
                name: self._filled(properties.get(name, {}), known.get(name, _MISSING))
                for name in names
            }
        if schema.get("type") == "array" and (given is _MISSING or isinstance(given, list)):
            return [] if given is _MISSING else [self._filled(schema["items"], x) for x in given]
        return self._nothing(schema) if given is _MISSING else given

    def _nothing(self, schema: Mapping[str, Any]) -> Any:
        if "enum" in schema:
            return schema["enum"][0]
        text = self._empty.get(schema.get("format", ""), "")
        nothing = {"string": text, "integer": 0, "number": 0, "boolean": False, "object": {}}
        return nothing.get(schema.get("type", ""))

    def _chosen(self, schema: Mapping[str, Any], given: Any) -> Mapping[str, Any]:
        """Return a schema without references or alternatives: the first that knows the value."""
        schema = self._resolved(schema)
        if "allOf" in schema:
            parts = [self._chosen(part, given) for part in schema["allOf"]]
            merged: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
            for part in parts:
                merged["properties"] |= part.get("properties", {})
                merged["required"] = [*merged["required"], *part.get("required", [])]
            return {**schema, **merged}
        alternatives = schema.get("anyOf") or schema.get("oneOf")
        if not alternatives:
            return schema
        choices = [self._chosen(choice, given) for choice in alternatives]
        kind = {dict: "object", list: "array", str: "string", int: "integer"}.get(type(given))
        fitting = [choice for choice in choices if kind is None or choice.get("type") == kind]
        keys = set(given) if isinstance(given, dict) else set()
        knowing = [c for c in fitting if keys <= set(c.get("properties", {}))]
        return (knowing or fitting or choices)[0]

    def _resolved(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            found: Any = self.spec
            for part in node["$ref"].removeprefix("#/").split("/"):
                found = found[part]
            node = found
        return node


def _asked(operation: Operation, parameters: Mapping[str, str], request: Request) -> MockRequest:
    return MockRequest(
        _HOST,
        request.method,
        request.path,
        path_pattern=operation.template,
        args=dict(request.query),
        view_args=dict(parameters),
        headers=dict(request.headers),
        data=request.body,
        content_type=request.headers.get("content-type", "application/json"),
    )


def _reason(error: BaseException) -> str:
    """Return what is wrong, which the last cause knows best."""
    while error.__cause__ is not None:
        error = error.__cause__
    details = list(getattr(error, "schema_errors", None) or ())
    if not details:
        return f"{type(error).__name__}: {error}"
    found = best_match(details)
    return f"{found.json_path}: {found.message[:300]}"
