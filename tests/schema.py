"""The schema in docs/ of what commands print with `--json`."""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "json-schema.json").read_text())


def check_answer(name: str, answer: Any) -> None:
    """Raise unless an answer is what the schema says of a command, such as `rank`."""
    Draft202012Validator({**SCHEMA, "$ref": f"#/$defs/{name}"}).validate(answer)
