"""The persistence promises, checked against any service that speaks the protocol.

Over HTTP alone: nothing here knows how a service is made. `suite.opened` connects, `suite.run`
checks, `report.Report` tells. A new check is a function in ``checks/`` under ``@check``.
"""

from everstep.conformance.registry import Check, all_checks
from everstep.conformance.report import Report
from everstep.conformance.suite import Target, UnknownCheck, chosen, opened, run
from everstep.conformance.transport import Unreachable
from everstep.conformance.verdicts import CheckEnded, Result, Verdict

__all__ = [
    "Check",
    "CheckEnded",
    "Report",
    "Result",
    "Target",
    "UnknownCheck",
    "Unreachable",
    "Verdict",
    "all_checks",
    "chosen",
    "opened",
    "run",
]
