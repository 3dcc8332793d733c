"""Zygotes for services: see `everstep.worker.zygote.shared`, where a light import finds them."""

from everstep.worker.zygote.shared import (
    OFF,
    VARIABLE,
    forking_disabled,
    shared_path,
    shared_zygote,
    start_early,
)

__all__ = ["OFF", "VARIABLE", "forking_disabled", "shared_path", "shared_zygote", "start_early"]
