"""Unknown fields: a protobuf message is refused for what it asks for and nobody here reads.

JSON bodies are treated alike (`everstep.wire.base`): an unknown field that is off (zero or empty)
asks for nothing. A newer SDK may send further fields in a message, but not in its parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.unknown_fields import UnknownFieldSet

_MEASURED_BYTES = 1 << 20
"""Messages of this size at most are measured before their parts are searched, which takes 15 times
as long. Of large messages the measurement, which encodes them, takes longer."""
_NOT_READ = ("image", "dmel")
"""Parts whose fields don't matter, because no pass with such a part is computed."""


def check_fields(message: Any, body: bytes, *, newer_client: bool) -> None:
    """Raise `ValueError` if an unknown field of a message asks for something.

    Args:
        message: as parsed from the body.
        body: the message's bytes.
        newer_client: ignore unknown fields of the message itself.
    """
    if len(body) <= _MEASURED_BYTES:
        message.DiscardUnknownFields()
        if message.ByteSize() == len(body):  # there was none
            return
        message.ParseFromString(body)
    for part, number in _unknown(message):
        if part is not message or not newer_client:
            known = ", ".join(f"{each.name} = {each.number}" for each in part.DESCRIPTOR.fields)
            raise ValueError(f"{part.DESCRIPTOR.name} has no field number {number}; it has {known}")


def _unknown(message: Any) -> Iterator[tuple[Any, int]]:
    """Yield the unknown fields that ask for something: the part that holds one, and its number."""
    fields: Any = UnknownFieldSet(message)
    for field in fields:
        if field.data:
            yield message, field.field_number
    for descriptor, value in message.ListFields():
        if descriptor.name not in _NOT_READ:
            for part in _parts(descriptor, value):
                yield from _unknown(part)


def _parts(descriptor: FieldDescriptor, value: Any) -> Iterator[Any]:
    """Yield the messages that a field holds."""
    kind = descriptor.message_type
    if kind is None:
        return
    if kind.GetOptions().map_entry:
        if kind.fields_by_name["value"].message_type is not None:
            yield from value.values()
    elif descriptor.is_repeated:
        yield from value
    else:
        yield value
