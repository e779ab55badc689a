"""Stubs whose methods are made as they are asked for, from what the messages' modules know of their services."""

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc
    from google.protobuf.descriptor import Descriptor, ServiceDescriptor
    from google.protobuf.message import Message


def stub(module: str, name: str) -> "Callable[[grpc.Channel], Stub]":
    """What takes the place of a class that is generated into that module."""
    messages = import_module(module.removesuffix("_grpc"))
    return partial(Stub, messages.DESCRIPTOR.services_by_name[name.removesuffix("Stub")])


class Stub:
    """Of one service, at one channel, as the generated one is."""

    def __init__(self, service: "ServiceDescriptor", channel: "grpc.Channel") -> None:
        self._service = service
        self._channel = channel

    def __getattr__(self, name: str) -> "Callable[..., object]":
        """Raises AttributeError if the service has no such method."""
        method = self._service.methods_by_name.get(name)
        if method is None:
            raise AttributeError(name=name, obj=self)
        sent, answered = ("stream" if many else "unary" for many in (method.client_streaming, method.server_streaming))
        make = getattr(self._channel, f"{sent}_{answered}")
        call: Callable[..., object] = make(
            f"/{self._service.full_name}/{name}",
            request_serializer=_message_class(method.input_type).SerializeToString,
            response_deserializer=_message_class(method.output_type).FromString,
            _registered_method=True,
        )
        setattr(self, name, call)
        return call


def _message_class(descriptor: "Descriptor") -> "type[Message]":
    """As its module has it."""
    module = import_module(f"{descriptor.file.name.removesuffix('.proto').replace('/', '.')}_pb2")
    found: type[Message] = getattr(module, descriptor.name)
    return found
