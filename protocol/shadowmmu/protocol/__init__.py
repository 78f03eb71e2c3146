"""The protocol, pure: what the messages are, how they become frames, and which is legal when.

    from shadowmmu.protocol import TO_MMU, FROM_MMU, MMU, Session, Side, error_reply

    session = Session(MMU, Side.SERVICE)          # one per connection; the other end has Session(MMU, Side.PEER)
    try:
        envelope = TO_MMU.decode(frames)          # two frames -> Envelope
        act = session.receive(envelope)           # checks order, numbers, credits; False: to be ignored
    except RemoteProtocolError as error:          # the message changed nothing
        reply = error_reply(error)                # unnumbered; if error.info.ends: session.send(Ended(...)) too
    else:
        reply = session.send(Attached(...))       # numbers it; LocalProtocolError if it is not legal now
    frames = FROM_MMU.encode(reply)

Messages are in `shadowmmu.protocol.messages`, events in `shadowmmu.protocol.events`, the tables of legal order in
`shadowmmu.protocol.states`, the error registry in `shadowmmu.protocol.errors`. `docs/PROTOCOL.md` is made from them.
"""

from shadowmmu.protocol.codec import (
    DIRECTIONS,
    FROM_COORDINATOR,
    FROM_MMU,
    TO_COORDINATOR,
    TO_MMU,
    VERSION,
    VERSION_FRAME,
    Direction,
    minor_version,
)
from shadowmmu.protocol.errors import (
    REGISTRY,
    Effect,
    ErrorCode,
    ErrorInfo,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    error_info,
    error_reply,
)
from shadowmmu.protocol.heartbeat import MISSED_LIMIT, HeartbeatTimer
from shadowmmu.protocol.messages import LOG_CREDITS, LOG_LIMIT, LOG_SECONDS, Envelope, Message
from shadowmmu.protocol.session import EVENT_CREDITS, HOST_CREDITS, Session
from shadowmmu.protocol.states import (
    CONVERSATIONS,
    COORDINATOR,
    GUEST_MODE,
    MMU,
    Conversation,
    Service,
    Side,
    State,
)

__all__ = [
    # A connection's two halves: bytes and legality.
    "TO_MMU",
    "FROM_MMU",
    "TO_COORDINATOR",
    "FROM_COORDINATOR",
    "Session",
    "MMU",
    "COORDINATOR",
    "Side",
    "State",
    "Envelope",
    "Message",
    # When something is wrong.
    "RemoteProtocolError",
    "LocalProtocolError",
    "ProtocolError",
    "ErrorCode",
    "error_reply",
    "error_info",
    # Signs of life.
    "HeartbeatTimer",
    "MISSED_LIMIT",
    # Limits.
    "LOG_LIMIT",
    "LOG_SECONDS",
    "LOG_CREDITS",
    "HOST_CREDITS",
    "EVENT_CREDITS",
    # The data behind it.
    "CONVERSATIONS",
    "DIRECTIONS",
    "GUEST_MODE",
    "REGISTRY",
    "VERSION",
    "VERSION_FRAME",
    "Conversation",
    "minor_version",
    "Direction",
    "Effect",
    "ErrorInfo",
    "Service",
]
