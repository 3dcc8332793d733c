"""Model store: the simplest store of checkpoints, the reference for a real one.

store, model = YourStore(directory), ModelStore()
for step in program:  # of `strategies.steps`
    yours(store, step)
    model.apply(step)
    assert contents_of(store) == model.held
"""

from __future__ import annotations

from everstep.testing.workload import Step


class ModelStore:
    """Names and contents, in a dictionary.

    Attributes:
        held: the content of each checkpoint, by name.
    """

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def apply(self, step: Step) -> None:
        """Apply a step.

        Args:
            step: ``save`` stores a content under a name and replaces an existing one. ``fork``
                stores the content of the first name, if any, under another name. ``delete``
                removes a name if it exists. ``collect`` has no visible effect.

        Raises:
            ValueError: the step is unknown.
        """
        what, name, content = step
        if what == "save":
            self.held[name] = content
        elif what == "fork" and self.held:
            self.held[name] = self.held[min(self.held)]
        elif what == "delete":
            self.held.pop(name, None)
        elif what not in ("fork", "collect"):
            raise ValueError(f"{what!r} is no step: save, fork, delete, collect")
