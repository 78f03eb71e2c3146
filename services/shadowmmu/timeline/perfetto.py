"""A timeline in Perfetto's format: protocol buffers of package `perfetto`, written packet by packet.

The file is a `Trace` message: TracePackets one after another. Names, categories and names of arguments are interned
and stand in the file once; nothing else is kept. Everything is one packet sequence. Field by field:
https://perfetto.dev/docs/reference/trace-packet-proto. Relies on the `perfetto` package (extra `trace`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final, assert_never

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    CounterDescriptor,
    ProcessDescriptor,
    TracePacket,
    TrackDescriptor,
    TrackEvent,
)

from shadowmmu.timeline.executions import Ending, Execution
from shadowmmu.timeline.model import (
    Address,
    Args,
    Begin,
    Category,
    Count,
    End,
    Instant,
    Item,
    NewTrack,
    RecordConsumed,
    Track,
    TrackKind,
)
from shadowmmu.timeline.sorter import Sorter
from shadowmmu.timeline.timeline import Timeline
from shadowmmu.timeline.window import ALL, Records, Window

__all__ = ["PerfettoWriter", "write_perfetto"]

_SEQUENCE: Final = 1
_PROCESS: Final = 1
"""The pid that the virtual machine has in the trace."""
_PACKET_TAG: Final = b"\x0a"
"""Field 1 of `Trace`, length-delimited."""


class PerfettoWriter:
    """A sink; `write` receives the file's bytes in order. `packets` counts what was written."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._names: dict[str, int] = {}
        self._categories: dict[Category, int] = {}
        self._arguments: dict[str, int] = {}
        self.packets = 0

    def __call__(self, item: Item) -> None:
        """The next item."""
        match item:
            case Begin():
                packet = self._slice(item, TrackEvent.TYPE_SLICE_BEGIN)
            case Instant():
                packet = self._slice(item, TrackEvent.TYPE_INSTANT)
            case End():
                packet = self._packet(item.time)
                packet.track_event.type = TrackEvent.TYPE_SLICE_END
                packet.track_event.track_uuid = item.track
                self._annotate(packet, item.args)
            case Count():
                packet = self._packet(item.time)
                packet.track_event.type = TrackEvent.TYPE_COUNTER
                packet.track_event.track_uuid = item.track
                packet.track_event.counter_value = item.value
            case NewTrack():
                packet = self._packet()
                packet.track_descriptor.CopyFrom(_descriptor(item.track))
            case RecordConsumed():
                return
            case _:
                assert_never(item)
        self._out(packet)

    def _packet(self, time: int | None = None) -> TracePacket:
        flags = TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        if not self.packets:
            flags = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        packet = TracePacket(trusted_packet_sequence_id=_SEQUENCE, sequence_flags=flags)
        if time is not None:
            packet.timestamp = time
        return packet

    def _out(self, packet: TracePacket) -> None:
        data = packet.SerializeToString()
        self._write(_PACKET_TAG + _varint(len(data)) + data)
        self.packets += 1

    def _slice(self, item: Begin | Instant, kind: TrackEvent.Type) -> TracePacket:
        packet = self._packet(item.time)
        event = packet.track_event
        event.type = kind
        event.track_uuid = item.track
        iid = self._names.get(item.name)
        if iid is None:
            iid = self._names[item.name] = len(self._names) + 1
            packet.interned_data.event_names.add(iid=iid, name=item.name)
        event.name_iid = iid
        iid = self._categories.get(item.category)
        if iid is None:
            iid = self._categories[item.category] = len(self._categories) + 1
            packet.interned_data.event_categories.add(iid=iid, name=item.category.value)
        event.category_iids.append(iid)
        if item.flows:
            event.flow_ids.extend(item.flows)
        if item.ends:
            event.terminating_flow_ids.extend(item.ends)
        self._annotate(packet, item.args)
        return packet

    def _annotate(self, packet: TracePacket, args: Args) -> None:
        for name, value in args:
            iid = self._arguments.get(name)
            if iid is None:
                iid = self._arguments[name] = len(self._arguments) + 1
                packet.interned_data.debug_annotation_names.add(iid=iid, name=name)
            annotation = packet.track_event.debug_annotations.add(name_iid=iid)
            match value:
                case bool():
                    annotation.bool_value = value
                case int():
                    annotation.int_value = value
                case str():
                    annotation.string_value = value
                case Address():
                    annotation.pointer_value = value.value


def _descriptor(track: Track) -> TrackDescriptor:
    descriptor = TrackDescriptor(uuid=track.id, sibling_order_rank=track.rank)
    if track.note:
        descriptor.description = track.note
    if track.parent:
        descriptor.parent_uuid = track.parent
        descriptor.name = track.name
    match track.kind:
        case TrackKind.MACHINE:
            descriptor.child_ordering = TrackDescriptor.EXPLICIT
            process = ProcessDescriptor(pid=_PROCESS, process_name=track.name, process_labels=[track.note])
            descriptor.process.CopyFrom(process)
        case TrackKind.COUNTER:
            descriptor.counter.CopyFrom(CounterDescriptor(unit=CounterDescriptor.UNIT_COUNT))
        case TrackKind.SLICES:
            pass
    return descriptor


def _varint(number: int) -> bytes:
    """A number as protocol buffers write it: seven bits a byte, the lowest first."""
    if number < 0x80:
        return bytes((number,))
    data = bytearray()
    while number >= 0x80:
        data.append(number & 0x7F | 0x80)
        number >>= 7
    data.append(number)
    return bytes(data)


def write_perfetto(execution: Execution, out: BinaryIO, records: Records = ALL) -> Ending:
    """Executes the run and writes its timeline. Raises what the execution raises."""
    writer = PerfettoWriter(out.write)
    sorter = Sorter(writer)

    def sort(item: Item) -> None:
        sorter.put(0 if isinstance(item, NewTrack) else item.time, item)

    window = Window(writer if execution.ordered else sort, records)
    timeline = Timeline(window, execution.title, execution.axis)
    ending = execution.play(timeline)
    timeline.end()
    sorter.end()
    return ending
