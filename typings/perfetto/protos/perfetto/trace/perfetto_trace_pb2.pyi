"""Types of what we use of Perfetto's protocol buffers; the package has them, but says not that they are to be used."""

# ruff: noqa: N802 - the names are those of protocol buffers

from collections.abc import Iterable, Iterator, MutableSequence
from typing import ClassVar, Generic, NewType, TypeVar

_M = TypeVar("_M")

class _Repeated(Generic[_M]):
    def add(self, *, iid: int = ..., name: str = ..., name_iid: int = ...) -> _M: ...
    def __iter__(self) -> Iterator[_M]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> _M: ...

class _Message:
    def SerializeToString(self) -> bytes: ...
    def ParseFromString(self, data: bytes) -> int: ...
    def HasField(self, name: str) -> bool: ...
    def WhichOneof(self, name: str) -> str | None: ...
    def CopyFrom(self, other: _Message) -> None: ...

class EventName(_Message):
    iid: int
    name: str

class EventCategory(_Message):
    iid: int
    name: str

class DebugAnnotationName(_Message):
    iid: int
    name: str

class DebugAnnotation(_Message):
    name_iid: int
    bool_value: bool
    int_value: int
    string_value: str
    pointer_value: int

class InternedData(_Message):
    event_names: _Repeated[EventName]
    event_categories: _Repeated[EventCategory]
    debug_annotation_names: _Repeated[DebugAnnotationName]

class ProcessDescriptor(_Message):
    pid: int
    process_name: str
    process_labels: MutableSequence[str]
    def __init__(
        self, *, pid: int = ..., process_name: str = ..., process_labels: Iterable[str] = ...
    ) -> None: ...

class CounterDescriptor(_Message):
    Unit = NewType("Unit", int)
    UNIT_COUNT: ClassVar[Unit]
    unit: Unit
    def __init__(self, *, unit: Unit = ...) -> None: ...

class TrackDescriptor(_Message):
    ChildTracksOrdering = NewType("ChildTracksOrdering", int)
    EXPLICIT: ClassVar[ChildTracksOrdering]
    uuid: int
    parent_uuid: int
    name: str
    description: str
    child_ordering: ChildTracksOrdering
    sibling_order_rank: int
    process: ProcessDescriptor
    counter: CounterDescriptor
    def __init__(self, *, uuid: int = ..., sibling_order_rank: int = ...) -> None: ...

class TrackEvent(_Message):
    Type = NewType("Type", int)
    TYPE_SLICE_BEGIN: ClassVar[Type]
    TYPE_SLICE_END: ClassVar[Type]
    TYPE_INSTANT: ClassVar[Type]
    TYPE_COUNTER: ClassVar[Type]
    type: Type
    track_uuid: int
    name_iid: int
    category_iids: MutableSequence[int]
    counter_value: int
    flow_ids: MutableSequence[int]
    terminating_flow_ids: MutableSequence[int]
    debug_annotations: _Repeated[DebugAnnotation]

class TracePacket(_Message):
    SequenceFlags = NewType("SequenceFlags", int)
    SEQ_INCREMENTAL_STATE_CLEARED: ClassVar[SequenceFlags]
    SEQ_NEEDS_INCREMENTAL_STATE: ClassVar[SequenceFlags]
    timestamp: int
    trusted_packet_sequence_id: int
    sequence_flags: int
    interned_data: InternedData
    track_descriptor: TrackDescriptor
    track_event: TrackEvent
    def __init__(
        self, *, timestamp: int = ..., trusted_packet_sequence_id: int = ..., sequence_flags: int = ...
    ) -> None: ...

class Trace(_Message):
    packet: _Repeated[TracePacket]
