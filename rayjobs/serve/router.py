"""The choice of a request's replica: of two that are drawn from all, the one with fewer requests.

Ray Serve's own router asks replicas on the proxy's node alone until these are full. The proxy runs on the head node, so
replicas on other nodes would idle.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class EvenRouter(FIFOMixin, RequestRouter):
    """Draws two replicas, wherever they run. Ray Serve asks both how many requests they have."""

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return two of the replicas, or all if there are fewer. The base class calls it again while both are full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # a pause before it is called again
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
