"""The host agent worker: notifiers, dirty logs, memory pressure.

`run_agent(AgentOptions(coordinator=...))` is the whole process. Inside: `requests` decides what to ask for next,
and knows no socket; `connection` asks the MMU service for it; `life` takes the agent through a run as a member of it.
What the host does to the guest is in `shadowmmu.machine.host_program`.
"""

from shadowmmu.hostagent.agent import AgentOptions, run_agent

__all__ = ["AgentOptions", "run_agent"]
