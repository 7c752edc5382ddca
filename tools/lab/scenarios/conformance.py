"""Scenario 1: the transports' conformance suite in guests with SoftRoCE.

First programs of rdma-core prove the guests' side: rping in both directions through the connection manager. Then the
suite runs in a guest that has a verbs device, over every transport that the program knows, and at last traffic goes
from guest to guest.
"""

from labkit import rdma

TITLE = "the transports' conformance suite, in guests with SoftRoCE, and between two"
SECONDS_MAX = 600
TRAFFIC_SECONDS = 15


def play(lab):
    a, b = lab.pair()
    for guest in (a, b):
        rdma.link_up(guest)
    for server, client in ((a, b), (b, a)):
        rdma.ping(server, client)
    lab.note("rping through the connection manager: both directions, contents checked")

    tests = a.run("conformance --list --format terse").splitlines()
    told = a.run("conformance --test-threads=1 --nocapture", seconds=400)
    passed = next((line for line in told.splitlines() if line.startswith("test result: ok")), None)
    lab.check(passed is not None, "the suite did not say that it passed")
    lab.check("RDMA: no device" not in told, "the suite found no verbs device, and rxe0 is up")
    over_rdma = [line for line in tests if "rdma" in line.lower()]
    lab.check(over_rdma, "the suite has no test over RDMA")
    lab.note(f"suite: {passed.removeprefix('test result: ').split(';')[0]}, {len(over_rdma)} over RDMA")
    inside(lab, b)

    for listener, dialler, transport in ((a, b, "rdma"), (b, a, "rdma"), (a, b, "tcp")):
        jobs = rdma.wire_traffic(listener, dialler, TRAFFIC_SECONDS, transport)
        wanted = "wire: RDMA over rxe0" if transport == "rdma" else "wire: TCP"
        for job in jobs:
            lab.check(wanted in job.wait(), f"guest {job.guest.name} did not say {wanted!r}: {job.output[-300:]}")
        counts = [rdma.messages_checked(job) for job in jobs]
        lab.check(min(counts) > 0, "nothing was checked")
        lab.note(f"{dialler.name} to {listener.name} over {transport}: {counts[0]} and {counts[1]} messages checked")


def inside(lab, guest):
    """The crate's own tests on a device: wrong keys, writes past what is lent, a queue pair in its error state."""
    told = guest.run("rdma_units --test-threads=1 --nocapture rdma:: 2>&1", seconds=240)
    passed = next((line for line in told.splitlines() if line.startswith("test result: ok")), None)
    lab.check(passed is not None and " 0 passed" not in passed, f"the crate's tests did not say that they passed: {told[-300:]}")
    lab.check("RDMA: no device" not in told, "the crate's tests found no verbs device, and rxe0 is up")
    lab.note(f"the crate's own, wrong keys and broken queue pairs among them: {passed.removeprefix('test result: ').split(';')[0]}")
