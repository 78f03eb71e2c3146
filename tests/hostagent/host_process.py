"""A host agent as a process: `python host_process.py ADDRESS [OPTIONS]`, options of the agent as JSON."""

from __future__ import annotations

import asyncio
import json
import sys

from shadowmmu.hostagent import AgentOptions, run_agent

if __name__ == "__main__":
    address, *more = sys.argv[1:]
    options = AgentOptions(coordinator=address, **(json.loads(more[0]) if more else {}))
    sys.exit(asyncio.run(run_agent(options)))
