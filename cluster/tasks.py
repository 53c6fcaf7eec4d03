"""Short work on the cluster's machines, beside no trial: calls of a function, each on a place of a lane's size."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from cluster.capacity import Lanes
from trainables.errors import UserError
from trainables.job import LaneRequest

RETRIES = 5  # of a call whose machine is lost, each on another
PATIENCE_S = 600.0  # for the next result; there may be no machine left
JOIN_S = 60.0  # for a first machine


def call_on_workers(
    request: LaneRequest, say: Callable[[str], None], function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
) -> Iterator[Any]:
    """Yield `function(device, *call)` for every call, in their order, as the machines have room; connects by itself.

    Args:
        request: what a call takes: as much as one worker of a trial.
        say: is told that machines are waited for.
        function: importable; `device` is "cuda" where a call gets a GPU, else "cpu".
        calls: taken one by one, as many ahead as there are places, so they need not all fit into memory.

    Raises what the function raises, and UserError when the machines have no room for a call or do not answer.
    """
    with Lanes(request, say, JOIN_S) as lanes:
        spec, running = lanes.spec, deque[Any]()
        device = "cuda" if spec.gpus else "cpu"
        task = ray.remote(num_cpus=spec.cpus, num_gpus=spec.gpus, max_retries=RETRIES)(function)
        for call in calls:
            if len(running) > lanes.count:
                yield _result(running.popleft())
            running.append(task.remote(device, *call))
        while running:
            yield _result(running.popleft())


def _result(reference: Any) -> Any:
    if not ray.wait([reference], timeout=PATIENCE_S)[0]:
        raise UserError(f"no machine of the cluster has answered for {PATIENCE_S:.0f} s")
    try:
        return ray.get(reference)
    except RayTaskError as error:
        raise error.cause from None
    except RayError as error:
        raise UserError(f"the cluster's machines could not do it ({' '.join(str(error).split())[:200]})") from error
