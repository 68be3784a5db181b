"""Compiles for TPU topologies, one request per line, in its own process and environment.

  python -m gptjax.planning.worker   < requests   > answers

A request is {"config": text of config.json, "topology": "v5e:4x4", "slices": 1}; its answer is {"facts": ...},
{"user_error": message} or {"bug": traceback}. The compiler writes to stderr.
"""

import json
import os
import sys
import traceback

# Set before JAX is imported: there is no TPU, no metadata server, and another compilation may be running.
os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")

from gptjax import config as config_lib
from gptjax.errors import UserError


def answer(request: dict) -> dict:
    """Carries out one request."""
    from jax.experimental import topologies

    from gptjax.planning import chips
    from gptjax.planning.compilation import compile_step

    try:
        topology = chips.parse_topology(request["topology"])
        options = {"num_slices": topology.slices} if topology.slices > 1 else {}
        if topology.chip.cores > 1:
            options["chip_config_name"] = "megacore"  # the cores of a chip are one device
        try:
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{topology.chip.name}:{topology.shape}", **options
            )
        except Exception as error:
            raise UserError(f"--topology={topology}: the TPU compiler does not know it: {error}") from error
        facts = compile_step(
            config_lib.from_json(request["config"]),
            described.devices,
            topology=str(topology),
            available_bytes=topology.chip.usable_bytes,
        )
    except UserError as error:
        return {"user_error": str(error)}
    except Exception:
        return {"bug": traceback.format_exc()}
    return {"facts": json.loads(facts.to_json())}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # so that nothing else is printed between the answers
    for line in sys.stdin:
        answers.write(json.dumps(answer(json.loads(line))) + "\n")


if __name__ == "__main__":
    main()
