"""The live page of a run: what the coordinator knows, for people with a browser and for Prometheus.

`LiveServer` serves it over HTTP inside the coordinator's event loop; `docs/DEPLOY.md`, "Observability", is for its
users. Needs the extra `live` (starlette, uvicorn, prometheus-client); nothing else in the coordinator imports this.
"""

from shadowmmu.coordinator.live.address import LiveAddress
from shadowmmu.coordinator.live.observation import LiveMember, LiveRun, MemberState, Observation, observe
from shadowmmu.coordinator.live.server import LiveServer

__all__ = ["LiveServer", "LiveAddress", "LiveRun", "LiveMember", "MemberState", "Observation", "observe"]
