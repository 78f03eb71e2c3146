"""A Perfetto file read back by the package's own protocol buffers, with everything resolved or an assertion failed."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import (
    InternedData,
    Trace,
    TracePacket,
    TrackDescriptor,
    TrackEvent,
)

Values = dict[str, int | str | bool]


class Mark(NamedTuple):
    """A slice or an instant (which ends as it begins). `depth`: how many slices it lies in."""

    track: str
    name: str
    category: str
    begin: int
    end: int
    depth: int
    args: Values
    flows: tuple[int, ...]
    ends: tuple[int, ...]
    instant: bool


class Decoded:
    """What the file has: marks in the order of their beginnings, counters' (time, value) by name, tracks by uuid."""

    def __init__(self, data: bytes) -> None:
        trace = Trace()
        trace.ParseFromString(data)
        self.tracks: dict[int, TrackDescriptor] = {}
        self.counters: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        self.marks: list[Mark] = []
        self._names: dict[str, dict[int, str]] = defaultdict(dict)
        self._open: defaultdict[int, list[int]] = defaultdict(list)
        last = 0
        for number, packet in enumerate(trace.packet):
            assert packet.trusted_packet_sequence_id == 1
            cleared = TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
            assert packet.sequence_flags == (TracePacket.SEQ_NEEDS_INCREMENTAL_STATE if number else cleared)
            self._intern(packet.interned_data)
            if packet.HasField("track_descriptor"):
                self._track(packet.track_descriptor)
            else:
                assert packet.timestamp >= last, "time goes back within the sequence"
                last = packet.timestamp
                self._event(packet.timestamp, packet.track_event)
        assert not any(self._open.values()), "slices are open at the end"
        self.packets = len(trace.packet)

    def _intern(self, data: InternedData) -> None:
        for kind, entries in (
            ("name", data.event_names),
            ("category", data.event_categories),
            ("argument", data.debug_annotation_names),
        ):
            for entry in entries:
                assert entry.iid and entry.iid not in self._names[kind], "interned twice"
                self._names[kind][entry.iid] = entry.name

    def _track(self, track: TrackDescriptor) -> None:
        assert track.uuid not in self.tracks, "two tracks of one uuid"
        if self.tracks:
            assert track.parent_uuid in self.tracks, "the parent is not there yet"
        else:
            assert track.process.pid
        self.tracks[track.uuid] = track

    def name_of(self, uuid: int) -> str:
        track = self.tracks[uuid]
        return track.process.process_name if track.HasField("process") else track.name

    def _event(self, time: int, event: TrackEvent) -> None:
        track = self.name_of(event.track_uuid)
        is_counter = self.tracks[event.track_uuid].HasField("counter")
        assert is_counter == (event.type == TrackEvent.TYPE_COUNTER), "events of another kind of track"
        args: Values = {}
        for annotation in event.debug_annotations:
            value = annotation.WhichOneof("value")
            assert value is not None
            args[self._names["argument"][annotation.name_iid]] = getattr(annotation, value)
        if is_counter:
            self.counters[track].append((time, event.counter_value))
            return
        stack = self._open[event.track_uuid]
        if event.type == TrackEvent.TYPE_SLICE_END:
            index = stack.pop()
            mark = self.marks[index]
            self.marks[index] = mark._replace(end=time, args=mark.args | args)
            return
        instant = event.type == TrackEvent.TYPE_INSTANT
        assert instant or event.type == TrackEvent.TYPE_SLICE_BEGIN
        (category,) = event.category_iids
        mark = Mark(
            track=track,
            name=self._names["name"][event.name_iid],
            category=self._names["category"][category],
            begin=time,
            end=time,
            depth=len(stack),
            args=args,
            flows=tuple(event.flow_ids),
            ends=tuple(event.terminating_flow_ids),
            instant=instant,
        )
        if not instant:
            stack.append(len(self.marks))
        self.marks.append(mark)

    def flows(self) -> dict[int, list[tuple[Mark, bool]]]:
        """Each flow: what it leads through, in order, and whether it ends there."""
        flows: defaultdict[int, list[tuple[Mark, bool]]] = defaultdict(list)
        for mark in self.marks:
            for flow in mark.flows:
                flows[flow].append((mark, False))
            for flow in mark.ends:
                flows[flow].append((mark, True))
        return dict(flows)
