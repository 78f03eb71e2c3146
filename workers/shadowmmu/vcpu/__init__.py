"""The vCPU worker process around the processor model.

`run_worker(WorkerOptions(coordinator=...))` is the whole process. Inside, from the pure to the impure: `driver` joins
processor, session and timers, and knows no socket; `connection` puts it on one; `life` takes it through a run as a
member of it; `worker` says which processor it is. `latencies` are the histograms that it reports.
"""

from shadowmmu.vcpu.driver import VcpuDriver
from shadowmmu.vcpu.worker import WorkerOptions, run_worker

__all__ = ["WorkerOptions", "run_worker", "VcpuDriver"]
