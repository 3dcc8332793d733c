"""Known runs: look-up of a run that a request names."""

from __future__ import annotations

from everstep.ledger import Ledger, Run
from everstep.runtime.absence import absent


async def known_run(ledger: Ledger, model_id: str | None) -> Run:
    """Return a run. Raises `Rejected` (404) for an unknown one."""
    run = await ledger.run(model_id) if model_id else None
    if run is None:
        text = (
            f"Model {model_id} does not exist. Create it first (create_model), or check that its "
            "creation did not fail."
        )
        raise await absent(ledger, model_id, text)
    return run
