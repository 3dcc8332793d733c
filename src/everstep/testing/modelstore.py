"""A store of checkpoints as simple as can be: what a real one must agree with.

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
        """Do what a step says.

        Args:
            step: ``save`` stores a content under a name, over one that is there; ``fork`` gives
                the content of the first name another one, where there is any; ``delete`` takes
                one away, if it is there; ``collect`` changes nothing that can be seen.

        Raises:
            ValueError: it says something else.
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
