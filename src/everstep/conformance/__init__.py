"""Conformance: checks the persistence promises of any service that speaks the protocol.

The checks only use HTTP and know nothing of a service's implementation. `suite.opened` connects,
`suite.run` runs checks, and `report.Report` writes reports. A new check is a function in
``checks/`` under ``@check``.
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
