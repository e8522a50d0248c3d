"""Stands in for jaxtyping on a machine without it: annotations of shapes say nothing there, and nothing checks them."""

from typing import Any


class _AnyShape:
    def __getitem__(self, item: tuple[Any, str]) -> Any:
        return item[0]


Float = Int = UInt8 = _AnyShape()
